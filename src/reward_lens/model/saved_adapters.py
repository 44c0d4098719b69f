"""PEFT adapters as they are saved: merged into their base, no weight dropped and none drawn at random."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from reward_lens.errors import LoadError
from reward_lens.model import adapters, heads
from reward_lens.model.checkpoint_files import adapter_shapes, require_places, some_of, tensors_in
from reward_lens.model.heads.local import ValueHeadScore

HEAD_SUFFIXES = ("score.weight", "classifier.weight", "v_head.weight", "regression_head.weight")
_IN_PEFT = "base_model.model."  # what an adapter's file puts before the names of its base


def is_adapter(path: str, revision: str | None) -> bool:
    folder = Path(path)
    if folder.exists():
        return (folder / "adapter_config.json").exists()
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError

    try:
        hf_hub_download(path, "adapter_config.json", revision=revision)
    except EntryNotFoundError:  # not in the repository, or neither in the cache nor reachable
        return False
    except HFValidationError as error:
        raise ValueError(f"no folder of that name, and {error}") from error
    except HfHubHTTPError as error:
        raise OSError(str(error)) from error
    return True


def load_adapter(path: str, options: dict, settings: dict):
    """A PEFT adapter merged into its base, which may have a published head of its own; the head taken from the adapter
    if it was saved there."""
    from peft import PeftConfig
    from transformers import AutoModelForSequenceClassification

    adapter = PeftConfig.from_pretrained(path, revision=options["revision"])
    base = str(adapter.base_model_name_or_path)
    saved = saved_shapes(path, options["revision"])
    rows = head_rows(saved) or rows_in(base, adapter.revision)
    base_options = {"trust_remote_code": options["trust_remote_code"], "revision": adapter.revision}
    module = heads.load_known(base, base_options | settings, (path, options["revision"]))
    info: dict[str, Any] = {"missing_keys": [], "unexpected_keys": []}  # load_known has refused either
    if module is None:
        with heads.without_report():
            module, info = AutoModelForSequenceClassification.from_pretrained(
                base, output_loading_info=True, **rows, **base_options, **settings
            )
    missing = in_neither(info["missing_keys"], saved)
    if missing:
        raise LoadError(
            f"The adapter {path} has no trained reward head",
            found=f"neither the adapter nor its base {base} holds {', '.join(missing[:5])}",
            expected="the head among the adapter's weights (modules_to_save=['score']) or in the base",
            do="save the head with the adapter, or load a base that is a reward model",
        )
    require_places(base, module, info["unexpected_keys"])
    if adapter.task_type is None or str(adapter.task_type).endswith("SEQ_CLS") or _with_value_head(module):
        return merged(module, path, options["revision"]), missing, base
    raise LoadError(
        f"The adapter {path} is not one of a reward model",
        found=f"task type {adapter.task_type}",
        expected="SEQ_CLS",
        do="load an adapter that was trained on a sequence classifier",
    )


def saved_shapes(path: str, revision: str | None) -> dict[str, list[int]]:
    """Shapes of an adapter's tensors by name; a part of the base that was trained whole has the base's name."""
    whole = re.compile(r"\.modules_to_save\.default|\.original_module")
    return {whole.sub("", key): shape for key, shape in adapter_shapes(path, revision).items()}


def head_rows(saved: dict[str, list[int]]) -> dict[str, int]:
    """The number of labels of a head that was saved with the adapter, as an option of `from_pretrained`."""
    of_heads = [shape[0] for key, shape in saved.items() if key.endswith(HEAD_SUFFIXES)]
    return {"num_labels": of_heads[0]} if of_heads else {}


def in_neither(missing: Iterable[str], saved: dict[str, list[int]]) -> list[str]:
    """Weights that the base lacks and the adapter does not bring."""
    return sorted(key for key in missing if _IN_PEFT + key not in saved)


def merged(module: Any, path: str, revision: str | None) -> Any:
    """The base with the adapter in its weights. peft only warns of weights that it does not find, and drops those that
    it has no place for: either leaves another model than the one that was trained."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict

    base = {_IN_PEFT + name for name in module.state_dict()}
    shapes = saved_shapes(path, revision)
    whole = _whole_embedding(module, shapes)
    rows = {shapes[name][0] for name in whole}
    if rows - {module.get_input_embeddings().weight.shape[0]}:  # tokens were added before training
        module.resize_token_embeddings(max(rows), mean_resizing=False)
    config = PeftConfig.from_pretrained(path, revision=revision)
    if _with_value_head(module):
        config.task_type = None  # peft's wrapper of a language model asks for one that can generate
    adapted = PeftModel.from_pretrained(module, path, revision=revision, config=config)
    expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False)) - base
    saved = set(shapes) - base - whole
    if expected != saved:
        sides = {"no": expected - saved, "no place for": saved - expected}
        raise LoadError(
            f"The adapter {path} does not fit its base",
            found="; ".join(f"{word} {some_of(sorted(names))}" for word, names in sides.items() if names),
            expected="every weight of the adapter, each with its place in the base",
            do="load the base that the adapter was trained on, or save the adapter again",
        )
    return adapters.merged(adapted)


def _with_value_head(module: Any) -> bool:
    """Whether it is a language model's trunk with TRL's value head, whose adapters are those of language models."""
    return isinstance(module, ValueHeadScore) and module.linear


def _whole_embedding(module: Any, saved: Iterable[str]) -> set[str]:
    """Names under which an adapter holds all rows of the embedding or the unembedding: peft saves them where tokens
    were added, or where it adapts either, within the wrappers that it put around it."""
    tables = [module.get_input_embeddings(), getattr(module, "get_output_embeddings", lambda: None)()]
    at = [re.escape(_IN_PEFT + name) for name, part in module.named_modules() if any(part is t for t in tables)]
    inside = re.compile(f"({'|'.join(at)})" + r"(\.token_adapter)?(\.base_layer|\.modules_to_save)?\.weight")
    return {name for name in saved if inside.fullmatch(name)}


def rows_in(path: str, revision: str | None) -> dict[str, int]:
    """The number of labels by the rows of the head, for a config that does not say it: transformers takes it for 2."""
    values, _ = PreTrainedConfig.get_config_dict(path, revision=revision)
    if values.get("id2label") or values.get("num_labels"):
        return {}
    held = tensors_in(path, revision, ("score.weight", "classifier.weight", "classifier.out_proj.weight"))
    return {"num_labels": next(iter(held.values())).shape[0]} if held else {}
