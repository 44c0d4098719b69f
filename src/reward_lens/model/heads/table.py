"""Which checkpoint has which published head: a row each, read off the config, and the loader that follows it."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig
from transformers.utils import logging
from transformers.utils.hub import cached_file

from reward_lens.errors import LoadError
from reward_lens.model.checkpoint_files import names_in, require_places, some_of, tensors_in, value_head_in
from reward_lens.model.heads.gated import GatedQuantiles, GatedRows
from reward_lens.model.heads.layouts import INTERNLM2, OF_ITS_OWN_TYPE, UNDER_TRANSFORMER, Layout
from reward_lens.model.heads.linear import LinearScore, RegressionScore, StandardisedScore
from reward_lens.model.heads.local import OneScore, TwoLayerScore, ValueHeadScore
from reward_lens.model.heads.own import OwnHead, class_for
from reward_lens.model.heads.self_gated import LevelScore, NormalScore
from reward_lens.model.heads.templates import BEAVER, EURUS, OASST, STARLING, ULTRA


@dataclasses.dataclass(frozen=True)
class Known:
    """A published head and how a config shows it."""

    head: type[OwnHead]
    name: str
    """Of the published class."""
    named: bool = True
    """Whether the config's `architectures` must name it; False: what follows shows it."""
    also: tuple[str, ...] = ()
    """Other names that published configs give the class."""
    key: str | None = None
    """A key that the config must have."""
    holds: tuple[str, ...] = ()
    """Tensors that the checkpoint must hold, where a name is shared by several heads."""
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values that the config must have."""
    files: tuple[str, ...] = ()
    """Parts of the head that stand in files of their own, `<part>.pt`, in float32."""
    layout: Layout | None = None
    """How the trunk was saved, where not as transformers has it."""
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Attributes of the head class that differ from its own."""
    checkpoints: tuple[str, ...] = ()
    """Published ones, for the reader."""
    only: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)
    """What these keys may be, if they are there: other values are other heads."""
    labels: int | None = None
    """Number of labels that the config must have."""
    beside: bool = False
    """Whether the head stands in a file of its own beside a causal language model or an adapter of one."""

    def fits(
        self, config: Mapping[str, Any], holds: Callable[[], frozenset[str]],
        value_head: Callable[[], Mapping[str, Tensor]] = dict,
    ) -> bool:  # fmt: skip
        named = config.get("architectures") or []
        if self.beside and not (causal_of(named) and value_head()):
            return False
        if self.named and not {self.name, *self.also} & set(named):
            return False
        if self.key is not None and config.get(self.key) is None:
            return False
        if any(config.get(key) != value for key, value in self.values.items()):
            return False
        if self.labels not in (None, len(config.get("id2label") or ()) or config.get("num_labels")):
            return False
        return not self.holds or set(self.holds) <= holds()


def _starling(named: bool, vocabulary: int, tokenizer: str, checkpoint: str) -> Known:
    """Starling-RM says no class of its own: a Llama trunk as `transformer` beside a `v_head` shows it."""
    held = () if named else ("v_head.weight", "transformer.layers.0.input_layernorm.weight")
    settings = {"head_path": "v_head", "stops_at": 0, "tokenizer_name": tokenizer}
    settings |= {"chat_template": STARLING} if vocabulary == 32000 else {}
    return Known(LinearScore, "GPTRewardModel", named=named, holds=held, values={"vocab_size": vocabulary},
                 layout=UNDER_TRANSFORMER, settings=settings, checkpoints=() if named else (checkpoint,))  # fmt: skip


_STARLINGS = (
    (32000, "meta-llama/Llama-2-7b-chat-hf", "Starling-RM-7B-alpha"),
    (64000, "01-ai/Yi-34B-Chat", "Starling-RM-34B"),
)
KNOWN = (
    Known(OneScore, "INFORMForSequenceClassification", checkpoints=("INF-ORM-Llama3.1-70B",)),
    Known(TwoLayerScore, "Qwen2ForRewardModel", checkpoints=("Qwen2.5-Math-RM-72B", "WorldPM-72B")),
    Known(ValueHeadScore, "GRewardModel", checkpoints=("GRM-sftreg",)),
    Known(ValueHeadScore, "GRewardModel", named=False, key="vhead_layer_type"),
    Known(
        GatedQuantiles, "LlamaForRewardModelWithGating", key="num_quantiles",
        checkpoints=("QRM-Llama3-8B", "QRM-Llama3.1-8B"),
    ),
    Known(GatedRows, "LlamaForRewardModelWithGating", checkpoints=("ArmoRM-Llama3-8B-v0.1",)),
    Known(NormalScore, "LlamaForSequenceClassificationWithNormal_Weights", checkpoints=("URM-LLaMa-3.1-8B",)),
    Known(
        LevelScore, "LDLRewardModel27B", files=("regression_layer", "gating_layer"),
        checkpoints=("LDL-Reward-Gemma-2-27B-v0.1",),
    ),
    Known(
        LinearScore, "InternLM2ForRewardModel", layout=INTERNLM2,
        settings={"head_path": "v_head", "reading_key": "reward_token_id", "reading_token": 92527},
        checkpoints=("internlm2-1_8b-reward", "internlm2-7b-reward", "internlm2-20b-reward"),
    ),
    Known(
        LinearScore, "AtheneForSequenceClassification", also=("CustomAutoModelForSequenceClassification",),
        holds=("v_head.weight",), settings={"reading_token": 128003}, checkpoints=("Athene-RM-8B", "Athene-RM-70B"),
    ),
    Known(
        LinearScore, "LlamaRewardModel", holds=("regression_head.weight",),
        settings={"head_path": "regression_head", "chat_template": ULTRA}, checkpoints=("UltraRM-13b",),
    ),
    Known(
        LinearScore, "EurusRewardModel", settings={"head_path": "regression_head", "chat_template": EURUS},
        checkpoints=("Eurus-RM-7b",),
    ),
    Known(
        StandardisedScore, "LlamaForScore", also=("LlamaModelForScore",), settings={"chat_template": BEAVER},
        checkpoints=("beaver-7b-v1.0-reward", "beaver-7b-v1.0-cost"),
    ),
    # safe-rlhf's of another trunk, by a key that it writes
    Known(StandardisedScore, "AutoModelForScore", named=False, key="score_type", holds=("score_head.weight",)),
    Known(
        LinearScore, "GPTNeoXRewardModel", layout=OF_ITS_OWN_TYPE, only={"pooling": ("last",)},
        settings={"head_path": "out_proj", "bias": True, "chat_template": OASST},
        checkpoints=("oasst-rm-2.1-pythia-1.4b-epoch-2.5", "oasst-rm-2-pythia-6.9b-epoch-1"),
    ),
    *(_starling(named, *model) for named in (True, False) for model in _STARLINGS),
    # OpenRLHF's: its older class by name; the newer ones by a key that it writes, whatever class saved the model (it
    # loads any folder as a reward model). Heads have either name in each.
    *(
        Known(
            RegressionScore, name, named=key is None, key=key, holds=(f"{path}.weight",), settings={"head_path": path},
            checkpoints=("reward models of OpenRLHF",) if path == "value_head" else (),
        )
        for name, key in (("LLMForSequenceRegression", None), ("RewardModel", "normalize_reward"))
        for path in ("value_head", "score")
    ),
    # Token classifiers of one label, read at the last token. Of two labels they are process reward models.
    *(
        Known(
            LinearScore, f"{family}ForTokenClassification", labels=1, holds=("score.weight", "score.bias"),
            settings={"head_path": "score", "bias": True},
            checkpoints=("reward models of verl and AReaL, of other families too",) if family == "Llama" else (),
        )
        for family in ("Llama", "Mistral", "Mixtral", "Qwen2", "Qwen2Moe", "Qwen3", "Qwen3Moe", "Gemma", "Gemma2",
                       "Phi", "Phi3", "Glm4", "DeepseekV3", "StableLm", "Starcoder2")
    ),
    # TRL's value head, saved in its own file beside the language model; once loaded this library saves it with the rest
    *(
        Known(
            ValueHeadScore, "AutoModelForCausalLMWithValueHead", named=not beside, beside=beside,
            settings={"linear": True},
            checkpoints=("reward models of LLaMA-Factory, by a file `value_head.safetensors` or `.bin`",) * beside,
        )
        for beside in (True, False)
    ),
)  # fmt: skip
"""The first row that fits holds."""


def causal_of(architectures: Sequence[str]) -> str | None:
    """The causal language model that a config names."""
    return next((a for a in architectures if a.endswith(("ForCausalLM", "LMHeadModel"))), None)


def load_known(path: str, settings: dict[str, Any], adapter: tuple[str, str | None] | None = None) -> Any:
    """The model of a published head, with the checkpoint's weights; None where the config shows none of the table.

    `settings` go to `from_pretrained`. Remote code is not run, whether or not the settings trust it. `adapter`: path
    and revision of an adapter of this base, beside which a value head stands. Raises `LoadError` where the checkpoint
    lacks a weight of the head or trunk, or holds weights of the head that have no place.
    """
    revision = settings.get("revision")
    values, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    holds = functools.cache(lambda: names_in(path, revision))  # read once, and only for a row that asks
    value_head = functools.cache(lambda: value_head_in(*(adapter or (path, revision))))
    row = next((known for known in KNOWN if known.fits(values, holds, value_head)), None)
    if row is None:
        return None
    _require_values(path, row, values)
    settings = {name: value for name, value in settings.items() if name != "trust_remote_code"}
    config = _config(path, row, values, revision)
    published = values.get("model_type")
    unknown = {} if published in CONFIG_MAPPING else {"published_type": published}
    model_class: Any = class_for(row.head, config, row.name, {**row.settings, **unknown})
    if row.layout is None:
        source = {"pretrained_model_name_or_path": path}
    else:
        source = {"pretrained_model_name_or_path": None}
        settings = {name: value for name, value in settings.items() if name != "revision"}
        settings["state_dict"] = row.layout.state(tensors_in(path, revision), config)
    with without_report() if row.files or row.beside else contextlib.nullcontext():
        module, info = model_class.from_pretrained(
            **source, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    if info["mismatched_keys"]:
        key, found, expected = min(map(tuple, info["mismatched_keys"]))
        raise LoadError(
            f"The weights of {path} are not those of the published {row.name}",
            found=f"{key} of shape {tuple(found)}",
            expected=f"{tuple(expected)}, by its config",
            do="look for a newer config.json, or pass structure= and readout= for this head",
        )
    missing = module.fill(sorted(info["missing_keys"]))
    parts = {part: functools.partial(_saved_part, path, f"{part}.pt", settings.get("revision")) for part in row.files}
    parts |= {"v_head": lambda: {k.removeprefix("v_head."): x for k, x in value_head().items()}} if row.beside else {}
    for part, read in parts.items():  # a checkpoint that this library wrote holds them with the others
        if any(key.startswith(part + ".") for key in missing):
            _load_part(module, part, path, "value_head.safetensors or .bin" if row.beside else f"{part}.pt", read)
            missing = [key for key in missing if not key.startswith(part + ".")]
    if missing:
        raise LoadError(
            f"{path} has no trained reward head" if _of_head(module, missing) else f"{path} lacks weights of its trunk",
            found=f"the checkpoint lacks {some_of(missing)}",
            expected=f"every weight of {row.name}: a head of random numbers scores noise",
            do="download the checkpoint again; if its authors changed the head since, pass structure= and readout=",
        )
    left = _of_head(module, info["unexpected_keys"])
    if left:
        raise LoadError(
            f"The head of {path} is not the published {row.name}",
            found=f"weights without a place: {some_of(left)}",
            expected="as many layers as the config says",
            do="look for a newer config.json, or pass structure= and readout= for this head",
        )
    require_places(path, module, info["unexpected_keys"])
    return module


@contextlib.contextmanager
def without_report():
    """transformers' loading report would call parts that have their own files (an adapter's head) newly initialised;
    what stays missing raises here."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _saved_part(path: str, name: str, revision: str | None) -> Mapping[str, Tensor]:
    file: Any = cached_file(path, name, revision=revision)
    return torch.load(file, map_location="cpu", weights_only=True)


def _load_part(module: Any, part: str, path: str, name: str, read: Callable[[], Mapping[str, Tensor]]) -> None:
    """Load one part of the head from its own file; raises `LoadError` for a file that is not there or does not fit."""
    try:
        module.get_submodule(part).float().load_state_dict(read())
    except (OSError, RuntimeError, TypeError) as error:
        raise LoadError(
            f"{path} has no trained reward head",
            found=f"{name}: {' '.join(str(error).split())[:300]}",
            expected=f"a file {name} with every weight of that part: a head of random numbers scores noise",
            do="download the checkpoint again, this file included",
        ) from error


def _of_head(module: Any, keys) -> list[str]:
    """Those of the keys that belong to no part of the trunk and share a first name with a part of the head."""
    trunk = module.base_model_prefix
    first = {name.split(".")[0] for name, _ in module.named_parameters()} - {trunk}
    return sorted(key for key in keys if key.split(".")[0] in first)


def _config(path: str, row: Known, values: Mapping[str, Any], revision: str | None) -> Any:
    if row.layout is None or row.layout.model_type is None:
        return AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    named = row.layout.config(values)
    return CONFIG_MAPPING[row.layout.model_type].from_dict(named)


def _require_values(path: str, row: Known, values: Mapping[str, Any]) -> None:
    for key, allowed in row.only.items():
        value = values.get(key)
        if value is not None and value not in allowed:
            raise LoadError(
                f"The head of {path} is not one that can be read",
                found=f"{key}={value!r} in its config",
                expected=f"{' or '.join(map(repr, allowed))}: the reward is read at one position",
                do="pass readout= for this head",
            )
