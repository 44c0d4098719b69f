"""SAELens' trainer on saved activations, with its documented settings (Adam, 3e-4, AuxK), or another rate."""

import dataclasses

import torch
from sae_lens import SAE, BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer
from sae_request import batches, now, serve

KINDS = {
    "topk": (TopKTrainingSAE, TopKTrainingSAEConfig),
    "batchtopk": (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig),
}


def train(x: torch.Tensor, request: dict) -> float:
    torch.manual_seed(request["seed"])
    kind, config = KINDS[request["variant"]]
    sae = kind(config(d_in=x.shape[1], d_sae=request["d_sae"], k=request["k"], device=request["device"],
                      dtype="float32", normalize_activations="expected_average_only_in"))  # fmt: skip
    steps, rate = request["n_train"] // request["batch"], request["lr"] or 3e-4
    # A warm-up and a decay as long as ours, so that only the rate and the recipe differ.
    wanted = {
        "total_training_samples": steps * request["batch"], "train_batch_size_samples": request["batch"],
        "device": request["device"], "autocast": False, "lr": rate, "lr_end": 0.1 * rate,
        "lr_scheduler_name": "constant",
        "lr_warm_up_steps": min(1000, steps // 10), "lr_decay_steps": steps // 5, "n_restart_cycles": 1,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "dead_feature_window": max(1, steps // 10),
        "feature_sampling_window": 2000, "n_checkpoints": 0, "checkpoint_path": None, "save_final_checkpoint": False,
        "logger": LoggingConfig(log_to_wandb=False),
    }  # fmt: skip
    known = {field.name for field in dataclasses.fields(SAETrainerConfig)}
    settings = SAETrainerConfig(**{name: value for name, value in wanted.items() if name in known})
    # A hundred batches more than are trained on: the scale of the input is taken from the first.
    stream = batches(x, (steps + 2000) * request["batch"], request["batch"], request["seed"])
    trainer = SAETrainer(cfg=settings, sae=sae, data_provider=stream)
    start = now(request["device"])
    trained = trainer.fit()
    seconds = now(request["device"]) - start
    trained.save_inference_model(request["folder"])
    return seconds


@torch.no_grad()
def encode(x: torch.Tensor, folder: str) -> torch.Tensor:
    return SAE.load_from_disk(folder, device="cpu").encode(x)


if __name__ == "__main__":
    serve(train, encode)
