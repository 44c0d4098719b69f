"""sparsify's trainer on saved activations: a network of one table, whose hook point gives row i for token i."""

import shutil
from pathlib import Path

import torch
from datasets import Dataset
from sae_request import now, order, serve
from sparsify import SparseCoder, SparseCoderConfig, TrainConfig, Trainer


class Replay(torch.nn.Module):
    """What the trainer asks of a transformers model, around an embedding that holds the activations."""

    def __init__(self, x: torch.Tensor):
        super().__init__()
        self.table = torch.nn.Embedding.from_pretrained(x)

    @property
    def base_model(self):
        return self

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    @property
    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.zeros(2, 3, dtype=torch.long)}

    def forward(self, input_ids: torch.Tensor, **_) -> torch.Tensor:
        return self.table(input_ids)


def train(x: torch.Tensor, request: dict) -> float:
    rows = torch.cat(list(order(len(x), request["n_train"], request["seed"])))
    data = Dataset.from_dict({"input_ids": rows[:, None].numpy()}).with_format("torch")
    work = Path(request["folder"] + "-run")
    # "adam": the recipe of Gao et al. in this trainer. Otherwise its own defaults: signs of gradients, no AuxK.
    adam = {
        "optimizer": "adam",
        "auxk_alpha": 1 / 32,
        "dead_feature_threshold": request["n_train"] // 10,
        "lr_warmup_steps": min(1000, len(rows) // request["batch"] // 10),
    }
    config = TrainConfig(
        SparseCoderConfig(num_latents=request["d_sae"], k=request["k"]), batch_size=request["batch"],
        hookpoints=["table"], init_seeds=[request["seed"]], save_every=10**9, log_to_wandb=False,
        save_dir=str(work), run_name="run", **(adam if request["lr"] == "adam" else {}),
    )  # fmt: skip
    trainer = Trainer(config, data, Replay(x).to(request["device"]))
    start = now(request["device"])
    trainer.fit()
    seconds = now(request["device"]) - start
    shutil.move(work / "run" / "table", request["folder"])
    return seconds


@torch.no_grad()
def encode(x: torch.Tensor, folder: str) -> torch.Tensor:
    coder = SparseCoder.load_from_disk(folder, device="cpu")
    found = coder.encode(x)
    z = torch.zeros(len(x), coder.num_latents)
    return z.scatter(1, found.top_indices, found.top_acts.float())


if __name__ == "__main__":
    serve(train, encode)
