"""Which checkpoint has which published head: a row each, read off the config, and the loader that follows it."""

import dataclasses
from typing import Any

from reward_lens.errors import LoadError
from reward_lens.model.heads.local import OneScore, TwoLayerScore, ValueHeadScore
from reward_lens.model.heads.own import OwnHead, class_for


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

    def fits(self, config: Any) -> bool:
        if self.key is not None and getattr(config, self.key, None) is None:
            return False
        return not self.named or self.name in (getattr(config, "architectures", None) or [])


KNOWN = (
    Known(OneScore, "INFORMForSequenceClassification"),  # INF-ORM-Llama3.1-70B
    Known(TwoLayerScore, "Qwen2ForRewardModel"),  # Qwen2.5-Math-RM-72B, WorldPM-72B
    Known(ValueHeadScore, "GRewardModel"),  # GRM-sftreg
    Known(ValueHeadScore, "GRewardModel", named=False, key="vhead_layer_type"),
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
    module, info = model_class.from_pretrained(path, config=config, output_loading_info=True, **settings)
    missing = sorted(info["missing_keys"])
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


def _of_head(module: Any, keys) -> list[str]:
    """Those of the keys that belong to no part of the trunk and share a first name with a part of the head."""
    trunk = module.base_model_prefix
    first = {name.split(".")[0] for name, _ in module.named_parameters()} - {trunk}
    return sorted(key for key in keys if key.split(".")[0] in first)
