"""Process reward models from a hub id or a folder, remote code off: the class by what the readout names.

rows of the vocabulary          the causal language model
labels, no head named           the token classifier
a head named by its path        the trunk, and beside it a linear map with that name's tensors from the checkpoint
                                (value heads that transformers has no class for: `v_head.summary`)
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import TokenClassifierOutput

from reward_lens.arguments import checked_arguments
from reward_lens.errors import LoadError
from reward_lens.model.checkpoint_files import require_places, tensors_in
from reward_lens.model.loading import tokenizer_of
from reward_lens.model.precision import require_precision
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.saved_adapters import head_rows, in_neither, is_adapter, merged, saved_shapes
from reward_lens.model.step_readout import StepReadout
from reward_lens.model.step_scorer import step_model
from reward_lens.model.structure import Structure


class HeadBeside(nn.Module):
    """A trunk with a head at a path of its own, read at every position."""

    def __init__(self, trunk: Any, path: str, head: nn.Module):
        super().__init__()
        self.trunk, self.config, self.path = trunk, trunk.config, path
        *owners, name = path.split(".")
        place: nn.Module = self
        for owner in owners:
            place.add_module(owner, nn.Module())
            place = place.get_submodule(owner)
        place.add_module(name, head)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> TokenClassifierOutput:
        head: Any = self.get_submodule(self.path)
        states = self.trunk(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return TokenClassifierOutput(logits=head(states.to(next(head.parameters()))))


@checked_arguments
def load_step_model(
    path: str | Path, steps: StepReadout, *, revision: str | None = None, device: Any = None, dtype: Any = None,
    device_map: Any = None, attn_implementation: str | None = None, structure: Structure | None = None,
) -> RewardModel:  # fmt: skip
    """A process reward model as a `RewardModel`; arguments as for `load`, `steps` as for `step_model`. A PEFT adapter
    is merged into its base, with a token classifier's head from either.

    Returns what `step_model` returns. Raises `LoadError` where the checkpoint cannot be loaded or lacks weights, its
    head's included, and what `step_model` raises.
    """
    require_precision(dtype)
    settings = {"dtype": dtype or "auto", "device_map": device_map, "attn_implementation": attn_implementation}
    settings = {k: v for k, v in settings.items() if v is not None}
    try:
        module, missing, base = _load(str(path), steps, revision, settings)
        tokenizer = tokenizer_of(str(path), base, {"revision": revision})
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise LoadError(
            f"{path} could not be loaded as a process reward model",
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            expected="a hub id or a folder with config.json, weights and a tokenizer",
            do="check the name and the connection, or load it yourself and pass it to rl.step_model",
        ) from error
    if missing:
        raise LoadError(
            f"{path} is no trained process reward model",
            found=f"the checkpoint lacks {', '.join(missing[:5])}",
            expected="every weight in the checkpoint: a head of random numbers scores noise",
            do="correct the rows or head= of the StepReadout, or load the reward model itself",
        )
    name = str(path) if not Path(path).exists() else Path(path).resolve().name
    return step_model(
        module if device is None else module.to(device), tokenizer, steps, structure=structure, name=name,
        revision=revision or getattr(module.config, "_commit_hash", None), loading={"missing_keys": missing},
    )  # fmt: skip


def _load(path: str, steps: StepReadout, revision: str | None, settings: dict) -> tuple[Any, list[str], str | None]:
    """The module, the weights that are nowhere, and the base of an adapter."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForTokenClassification

    auto: Any = AutoModelForCausalLM if isinstance(steps.positive, str) else AutoModelForTokenClassification
    if not steps.head and is_adapter(path, revision):
        return _load_adapter(auto, path, revision, settings)
    auto = AutoModel if steps.head else auto
    module, info = auto.from_pretrained(path, revision=revision, output_loading_info=True, **settings)
    missing = sorted(info["missing_keys"])
    require_places(path, module, info["unexpected_keys"])
    if not steps.head:
        return module, missing, None
    parts = {part: f"{steps.head}{part}" for part in ("", ".0", ".2")}
    saved = tensors_in(path, revision, tuple(f"{p}.{kind}" for p in parts.values() for kind in ("weight", "bias")))
    like = next(module.parameters()).device
    linear = {part: _linear(saved, name, like) for part, name in parts.items() if f"{name}.weight" in saved}
    if set(linear) == {""}:
        return HeadBeside(module, steps.head, linear[""]), missing, None
    if set(linear) == {".0", ".2"}:
        return HeadBeside(module, steps.head, nn.Sequential(linear[".0"], nn.ReLU(), linear[".2"])), missing, None
    return module, [*missing, f"{steps.head}.weight"], None


def _load_adapter(auto: Any, path: str, revision: str | None, settings: dict) -> tuple[Any, list[str], str]:
    """A PEFT adapter merged into its base; a head that neither of them holds is missing."""
    from peft import PeftConfig

    adapter = PeftConfig.from_pretrained(path, revision=revision)
    base, saved = str(adapter.base_model_name_or_path), saved_shapes(path, revision)
    options = head_rows(saved) | settings
    module, info = auto.from_pretrained(base, revision=adapter.revision, output_loading_info=True, **options)
    missing = in_neither(info["missing_keys"], saved)
    require_places(base, module, info["unexpected_keys"])
    return module if missing else merged(module, path, revision), missing, base


def _linear(saved: dict[str, Tensor], name: str, device: torch.device) -> nn.Linear:
    weight, bias = saved[f"{name}.weight"].to(device), saved.get(f"{name}.bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device=device, dtype=weight.dtype)
    linear.weight.data = weight
    if bias is not None:
        linear.bias.data = bias.to(device)
    return linear
