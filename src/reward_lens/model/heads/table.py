"""Which checkpoint has which published head: a row each, read off the config, and the loader that follows it."""

import dataclasses
from typing import Any

import torch
from transformers.utils.hub import cached_file

from reward_lens.errors import LoadError
from reward_lens.model.heads.gated import GatedQuantiles, GatedRows
from reward_lens.model.heads.local import OneScore, TwoLayerScore, ValueHeadScore
from reward_lens.model.heads.own import OwnHead, class_for
from reward_lens.model.heads.self_gated import LevelScore, NormalScore


@dataclasses.dataclass(frozen=True)
class Known:
    """A published head and how a config shows it."""

    head: type[OwnHead]
    name: str
    """Of the published class."""
    named: bool = True
    """Whether the config's `architectures` must name it; False: the key alone shows it."""
    key: str | None = None
    """A key that the config must have."""
    files: tuple[str, ...] = ()
    """Parts of the head that stand in files of their own, `<part>.pt`, in float32."""

    def fits(self, config: Any) -> bool:
        if self.key is not None and getattr(config, self.key, None) is None:
            return False
        return not self.named or self.name in (getattr(config, "architectures", None) or [])


KNOWN = (
    Known(OneScore, "INFORMForSequenceClassification"),  # INF-ORM-Llama3.1-70B
    Known(TwoLayerScore, "Qwen2ForRewardModel"),  # Qwen2.5-Math-RM-72B, WorldPM-72B
    Known(ValueHeadScore, "GRewardModel"),  # GRM-sftreg
    Known(ValueHeadScore, "GRewardModel", named=False, key="vhead_layer_type"),
    Known(GatedQuantiles, "LlamaForRewardModelWithGating", key="num_quantiles"),  # QRM-Llama3-8B, QRM-Llama3.1-8B
    Known(GatedRows, "LlamaForRewardModelWithGating"),  # ArmoRM-Llama3-8B-v0.1
    Known(NormalScore, "LlamaForSequenceClassificationWithNormal_Weights"),  # URM-LLaMa-3.1-8B
    Known(LevelScore, "LDLRewardModel27B", files=("regression_layer", "gating_layer")),  # LDL-Reward-Gemma-2-27B-v0.1
)
"""The first row that fits holds."""


def load_known(path: str, config: Any, settings: dict[str, Any]) -> Any:
    """The model of a published head, with the checkpoint's weights; None where the config shows none of the table.

    `settings` go to `from_pretrained`. Remote code is not run, whether or not the settings trust it. Raises `LoadError`
    where the checkpoint lacks a weight of the head or trunk, or holds weights of the head that have no place.
    """
    row = next((known for known in KNOWN if known.fits(config)), None)
    if row is None:
        return None
    settings = {name: value for name, value in settings.items() if name != "trust_remote_code"}
    model_class: Any = class_for(row.head, config, row.name)
    module, info = model_class.from_pretrained(
        path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **settings
    )
    if info["mismatched_keys"]:
        key, found, expected = min(map(tuple, info["mismatched_keys"]))
        raise LoadError(
            f"The weights of {path} are not those of the published {row.name}",
            found=f"{key} of shape {tuple(found)}",
            expected=f"{tuple(expected)}, by its config",
            do="look for a newer config.json, or pass structure= and readout= for this head",
        )
    missing = sorted(info["missing_keys"])
    for part in row.files:  # a checkpoint that this library wrote holds them with the others
        if any(key.startswith(part + ".") for key in missing):
            _load_part(module, part, path, settings.get("revision"))
            missing = [key for key in missing if not key.startswith(part + ".")]
    if missing:
        raise LoadError(
            f"{path} has no trained reward head" if _of_head(module, missing) else f"{path} lacks weights of its trunk",
            found=f"the checkpoint lacks {', '.join(missing[:5])}"
            + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            expected=f"every weight of {row.name}: a head of random numbers scores noise",
            do="download the checkpoint again; if its authors changed the head since, pass structure= and readout=",
        )
    left = _of_head(module, info["unexpected_keys"])
    if left:
        raise LoadError(
            f"The head of {path} is not the published {row.name}",
            found=f"weights without a place: {', '.join(left[:5])}",
            expected="as many layers as the config says",
            do="look for a newer config.json, or pass structure= and readout= for this head",
        )
    return module


def _load_part(module: Any, part: str, path: str, revision: str | None) -> None:
    """Load one part of the head from its own file; raises `LoadError` for a file that is not there or does not fit."""
    try:
        file: Any = cached_file(path, f"{part}.pt", revision=revision)
        module.get_submodule(part).float().load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, TypeError) as error:
        raise LoadError(
            f"{path} has no trained reward head",
            found=f"{part}.pt: {' '.join(str(error).split())[:300]}",
            expected=f"a file {part}.pt with every weight of that part: a head of random numbers scores noise",
            do="download the checkpoint again, this file included",
        ) from error


def _of_head(module: Any, keys) -> list[str]:
    """Those of the keys that belong to no part of the trunk and share a first name with a part of the head."""
    trunk = module.base_model_prefix
    first = {name.split(".")[0] for name, _ in module.named_parameters()} - {trunk}
    return sorted(key for key in keys if key.split(".")[0] in first)
