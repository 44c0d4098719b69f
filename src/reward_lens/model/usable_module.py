"""What a network must be before it is asked anything: a model of transformers, finite weights, a forward that runs."""

from typing import Any

import torch
from torch import Tensor, nn

from reward_lens.errors import LoadError
from reward_lens.model.forward import padding_id
from reward_lens.model.heads.own import OwnHead
from reward_lens.model.linear_maps import is_linear
from reward_lens.model.own_output import own_output, scores_of


def run_probe(module: Any, device: torch.device, of_text: bool = False) -> Tensor:
    """Run two short rows of seeded random tokens and return the logits, those `of_text` for a sequence classifier (else
    `LoadError`); nothing is padded."""
    vocabulary = module.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(min(8, vocabulary // 2), vocabulary, (2, 7), generator=generator).to(device)
    pad = padding_id(module.config)
    if pad is not None:
        ids[ids == pad] = (pad + 1) % vocabulary
    ending = torch.tensor([module.probe_ending if isinstance(module, OwnHead) else ()], dtype=ids.dtype)
    ids = torch.cat([ids, ending.expand(2, -1).to(device)], 1)
    arguments = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if pad is None:  # Hugging Face refuses to pool a batch without a padding token
        arguments = {"input_ids": ids[:1]}
    try:
        return scores_of(module, **arguments) if of_text else own_output(module, **arguments).logits
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        dtypes = sorted({str(p.dtype) for p in module.parameters() if p.is_floating_point()})
        if dtypes == ["torch.float64"]:
            expected = "operations that are written for float64; those of routed experts side by side are not"
            do = "load it in float32, or module.set_experts_implementation('eager') before it is passed"
        elif len(dtypes) > 1:
            expected = "a network that casts between its parts, or one precision (a trainer's autocast is left out)"
            do = "module.to(torch.bfloat16), say, before it is passed; norm and head are read in float32 in any case"
        else:
            raise
        raise LoadError(
            f"A {type(module).__name__} does not run in the precisions of its weights",
            found=f"{' and '.join(dtypes)}; {' '.join(str(error).split())[:200]}",
            expected=expected,
            do=do,
        ) from error


def require_model(module: Any) -> Any:
    """The module; `LoadError` for what is no model of transformers, such as the wrapper of a distributed run."""
    lacking = [name for name in ("config", "get_input_embeddings") if not hasattr(module, name)]
    if isinstance(module, nn.Module) and not lacking:
        return module
    inside = getattr(module, "module", None)
    found = f"no {' and no '.join(lacking)}"
    raise LoadError(
        f"A {type(module).__name__} is no model of transformers",
        found=found + ("" if inside is None else f", and a {type(inside).__name__} inside as .module"),
        expected="a sequence classifier (or a PeftModel around one) as a module",
        do="pass " + ("what AutoModelForSequenceClassification gives; rl.load takes a path, of a reward model that "
                      "another framework saved too" if inside is None
                      else "module.module, or trainer.model: rl.RewardModel(trainer.model, tokenizer)"),
    )  # fmt: skip


def require_usable_weights(module: nn.Module, name: str) -> None:
    """Raise for NaN or infinite weights, and for a quantised reward head."""
    for path, tensor in module.named_parameters():
        if tensor.is_floating_point() and not tensor.is_meta and not bool(torch.isfinite(tensor.sum())):
            bad = int((~torch.isfinite(tensor)).sum())
            if bad:
                raise LoadError(
                    f"The weights of {name} are not finite",
                    found=f"{bad} NaN or infinite values in {path}",
                    expected="finite weights",
                    do="download the checkpoint again, or take one from before training diverged",
                )
    heads = [(n, m) for n, m in module.named_children() if n in ("score", "classifier", "v_head", "regression_head")]
    for path, head in heads:
        weight = getattr(head, "weight", None)
        if isinstance(weight, Tensor) and not (is_linear(head) or weight.is_floating_point()):
            raise LoadError(
                f"The reward head of {name} is quantised",
                found=f"{path} is a {type(head).__name__} with {weight.dtype} weights",
                expected="a floating-point head: quantising it changes the reward direction itself",
                do=f"keep the head out of quantisation (llm_int8_skip_modules=['{path}'] or your method's like option)",
            )
