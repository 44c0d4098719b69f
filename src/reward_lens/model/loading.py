"""`load`: from a hub id, a local folder, a PEFT adapter or "demo" to a `RewardModel` whose load report passed."""

from pathlib import Path
from typing import Any

import torch

from reward_lens.arguments import checked_arguments
from reward_lens.errors import LoadError
from reward_lens.model import heads
from reward_lens.model.checkpoint_files import (
    has_tokenizer,
    lacking,
    other_names,
    require_places,
    require_sizes,
    some_of,
)
from reward_lens.model.forward import padding_id
from reward_lens.model.heads.own import OwnHead
from reward_lens.model.precision import require_precision
from reward_lens.model.reward_model import RewardModel
from reward_lens.model.saved_adapters import HEAD_SUFFIXES, is_adapter, load_adapter, merged, rows_in
from reward_lens.model.step_readout import StepReadout
from reward_lens.model.structure import Structure
from reward_lens.model.vocab_readout import VocabReadout


@checked_arguments
def load(
    path: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | str | None = None,
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    device_map: Any = None,
    offload_folder: str | Path | None = None,
    quantization_config: Any = None,
    objective: str | int | None = None,
    structure: Structure | None = None,
    readout: Any = None,
    truncation: str | None = None,
    tokenizer: Any = None,
) -> RewardModel:
    """Load a reward model and prove that its numbers can be trusted.

    Parameters
    ----------
    path: ``"demo"``, a hub id, a local folder, or a PEFT adapter of either kind (merged into its base).
    device, device_map: where to put it; `device_map="auto"` shards it over what there is. Parts that a map gives to
        "disk" (with `offload_folder`), or to "cpu" beside an accelerator, are loaded each time they run; every method
        gives the same numbers, and only what changes or writes weights refuses (`edit_head`, `base_under_head`).
    quantization_config: as transformers takes it (`BitsAndBytesConfig`), for the trunk; the head has to stay in
        floating point, which is measured. Heads and neurons of quantised maps are not split; components are.
    dtype: default is the checkpoint's own.
    objective: row of a head with several, or "A - B", one less another.
    structure, readout: describe an unusual network; both are put to the same proof. A `VocabReadout` loads a language
        model and reads the reward from its logits, a `StepReadout` a process reward model.
    truncation: None raises on a conversation longer than the model reads, "left" cuts the prompt, "right" the response.
    tokenizer: a fast tokenizer in place of the one beside the weights, with another chat template or rule for its BOS.

    Returns a `RewardModel` whose `load_report` holds the tests it passed.

    Raises
    ------
    LoadError if the checkpoint has no usable reward head or a test of the load report fails; StructureError if the
    network's parts cannot be found. Nothing is loaded in their place.
    """
    require_precision(dtype)
    if str(path) == "demo":
        from reward_lens.model.demo import demo_revision, load_demo

        _refuse(
            "The demo model takes no such setting", "device=, which moves the whole of it",
            "leave it out; the demo has 135 million parameters",
            device_map=device_map, offload_folder=offload_folder, quantization_config=quantization_config,
            tokenizer=tokenizer,
        )  # fmt: skip
        if revision is not None and revision != demo_revision():
            raise LoadError(
                "The demo model has no such revision", found=f"revision={revision!r}", expected=repr(demo_revision()),
                do="leave revision= out, or install the version of the library that has it",
            )  # fmt: skip
        return load_demo(device, dtype, attn_implementation, objective=objective, structure=structure, readout=readout,
                         truncation=truncation)  # fmt: skip
    if isinstance(readout, StepReadout):
        from reward_lens.model.step_loading import load_step_model

        _refuse(
            "A process reward model takes no such setting",
            "the settings of load_step_model: its own classes, one reward a step, whole solutions",
            "leave it out; a solution that is too long is refused, since cutting it would move its steps",
            trust_remote_code=trust_remote_code, objective=objective, truncation=truncation,
            offload_folder=offload_folder, quantization_config=quantization_config, tokenizer=tokenizer,
        )  # fmt: skip
        return load_step_model(path, readout, revision=revision, device=device, dtype=dtype, device_map=device_map,
                               attn_implementation=attn_implementation, structure=structure)  # fmt: skip
    path = str(path)
    options = {"revision": revision, "trust_remote_code": trust_remote_code}
    settings = {"dtype": dtype or "auto", "device_map": device_map, "attn_implementation": attn_implementation,
                "offload_folder": offload_folder, "quantization_config": quantization_config}  # fmt: skip
    settings = {k: v for k, v in settings.items() if v is not None}
    adapted = False
    try:
        if isinstance(readout, VocabReadout):
            module, missing, base = causal_module(path, options, settings)
        elif adapted := is_adapter(path, revision):
            module, missing, base = load_adapter(path, options, settings)
        else:
            module, missing = _load_classifier(path, options, settings)
            base = getattr(module, "tokenizer_name", None)
        own = tokenizer is not None or (adapted and has_tokenizer(path, revision))
        if tokenizer is None:
            tokenizer = tokenizer_of(path, base, options | heads.tokenizer_options(module))
        if adapted and not isinstance(module, OwnHead):
            _pool_as_trained(module, tokenizer, own)
    except (OSError, ValueError, LookupError, ImportError, RuntimeError) as error:
        raise LoadError(
            f"{path} could not be loaded",
            found=f"{type(error).__name__}: {_first_lines(error)}",
            expected="'demo', a hub id such as 'org/name', a folder with config.json and weights, or a PEFT adapter",
            do=lacking(path, tokenizer is None)
            or ("" if Path(path).exists() else "there is no such folder here; of a hub id ")
            + "check the name and the connection; for a model with code of its own read that code, then pass "
            "trust_remote_code=True"
            + ("" if attn_implementation is None else "; without attn_implementation= the class's own is used"),
        ) from error
    return RewardModel(
        module if device is None else placed(module, device),
        tokenizer,
        objective=objective,
        structure=structure,
        readout=readout,
        truncation=truncation,
        name=path if not Path(path).exists() else Path(path).resolve().name,
        revision=revision or getattr(module.config, "_commit_hash", None),
        loading={"missing_keys": missing} | heads.complete(module, tokenizer),
    )


def _refuse(title: str, expected: str, do: str, **settings: Any) -> None:
    given = [name for name, value in settings.items() if value is not None and value is not False]
    if given:
        raise LoadError(title, found=", ".join(given), expected=expected, do=do)


def placed(module: Any, device: str | torch.device) -> Any:
    """The module on a device; raises `LoadError` where there is no such device or too little room on it."""
    try:
        return module.to(device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        raise LoadError(
            f"The model could not be moved to {device}",
            found=_first_lines(error),
            expected=f"a device with room for {sum(p.numel() for p in module.parameters()):,} parameters; CUDA is "
            f"{'there' if torch.cuda.is_available() else 'not there'}",
            do="pass device='cpu', or device_map='auto' to spread it",
        ) from error


def _load_classifier(path: str, options: dict, settings: dict):
    from transformers import AutoConfig, AutoModelForSequenceClassification

    known = heads.load_known(path, options | settings)
    if known is not None:
        return known, []
    config = AutoConfig.from_pretrained(path, **options, **rows_in(path, options["revision"]))
    architectures = getattr(config, "architectures", None) or []
    causal = heads.causal_of(architectures)
    try:
        module, info = AutoModelForSequenceClassification.from_pretrained(
            path, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **options, **settings
        )
    except ValueError as error:
        if causal is None:
            raise
        raise _no_reward_head(path, f"no such class with a head ({_first_lines(error)})", causal) from error
    require_sizes(path, info["mismatched_keys"])
    missing = sorted(info["missing_keys"])
    left = _beside_trunk(module, info["unexpected_keys"])
    dropped = f"{type(module).__name__} has no place for its {some_of(left)}" if left else ""
    if missing:
        found = f"the checkpoint lacks {some_of(missing)}" + (f"; {dropped}" if dropped else "")
        raise _no_reward_head(path, found, causal, other_names(module, missing, info["unexpected_keys"]))
    if left:
        raise LoadError(
            f"A part of {path} beside its trunk would be dropped",
            found=dropped,
            expected="a place for every weight of the head: what is left of it is another reward",
            do="rl.load_step_model(path, readout) reads a token classifier at the end of every step; only one of one "
            "label is read at the last token"
            if any(a.endswith("ForTokenClassification") for a in architectures)
            else "if these weights have no part in the reward, load the module yourself and pass "
            "rl.RewardModel(module, tokenizer); else pass readout= for this head",
        )
    require_places(path, module, info["unexpected_keys"])
    return module, missing


def _beside_trunk(module: Any, keys) -> list[str]:
    """Those of the keys that are neither the trunk's nor an unembedding's."""
    known = (module.base_model_prefix + ".", "lm_head.", "embed_out.")
    return sorted(key for key in keys if not key.startswith(known))


def _no_reward_head(path: str, found: str, causal: str | None, do: str | None = None) -> LoadError:
    return LoadError(
        f"{path} has no trained reward head" if do or not causal else f"{path} is a language model, not a reward model",
        found=found + (f"; its architecture is {causal}" if causal else ""),
        expected="every weight of the reward model in the checkpoint: a head of random numbers scores noise",
        do=do
        or "load the reward model itself (its config names ...ForSequenceClassification), or pass "
        "readout=rl.VocabReadout(' Yes', ' No') for a reward read from a language model's vocabulary",
    )


def causal_module(path: str, options: dict, settings: dict):
    """A causal language model, or a PEFT adapter of one merged into its base: (module, missing keys, base). Raises
    `LoadError` for a checkpoint with a reward head or without all weights."""
    from transformers import AutoModelForCausalLM

    base = None
    if is_adapter(path, options["revision"]):
        from peft import PeftConfig

        adapter = PeftConfig.from_pretrained(path, revision=options["revision"])
        base = str(adapter.base_model_name_or_path)
        if str(adapter.task_type).endswith("SEQ_CLS"):
            raise _not_a_language_model(path, f"an adapter of task type {adapter.task_type}")
    own = options if base is None else options | {"revision": adapter.revision}
    loaded: Any = AutoModelForCausalLM.from_pretrained(base or path, output_loading_info=True, **own, **settings)
    module, info = loaded
    heads = sorted(key for key in info["unexpected_keys"] if key.endswith(HEAD_SUFFIXES))
    if heads:  # a tied unembedding is never missing: the weights left over tell what the checkpoint is
        raise _not_a_language_model(base or path, f"a reward head in the checkpoint ({', '.join(heads)})")
    missing = sorted(info["missing_keys"])
    if missing:
        raise _not_a_language_model(base or path, f"no weights for {', '.join(missing[:5])}")
    require_places(base or path, module, info["unexpected_keys"])
    if base is not None:
        module = merged(module, path, options["revision"])
    return module, missing, base


def _not_a_language_model(name: str, found: str) -> LoadError:
    return LoadError(
        f"{name} is not a language model whose vocabulary can be read",
        found=found,
        expected="a causal language model with every weight in the checkpoint, its unembedding included",
        do="leave readout= out for a model with a reward head, or load the language model itself",
    )


def _pool_as_trained(module: Any, tokenizer: Any, own: bool) -> None:
    """The head reads the last token that is not the config's padding token. A trainer writes the tokenizer's there, and
    an adapter's folder has no config: its base's may name another, or none, and so have another token read. `own`: the
    tokenizer is not its base's, which has no say where the base's config has one."""
    config = module.config.get_text_config()
    if tokenizer.pad_token_id is not None and (own or padding_id(module.config) is None):
        module.config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id


def tokenizer_of(path: str, base: str | None, options: dict):
    """The tokenizer beside the weights; an adapter without one has its base's."""
    from transformers import AutoTokenizer

    if base is None or has_tokenizer(path, options["revision"]):
        return AutoTokenizer.from_pretrained(path, **options)
    # The revision that was asked for is one of the checkpoint's.
    return AutoTokenizer.from_pretrained(base, **options | {"revision": None})


def _first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:300] + " ..."
