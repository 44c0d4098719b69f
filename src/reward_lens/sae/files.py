"""What all readers of dictionary files share: fetching, reading, refusing, and the names of sites."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from reward_lens.errors import DataError, LoadError

HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")
_HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn": "hook_attn_out",
    "mlp": "hook_mlp_out",
}


def download(repo: str, subfolder: str | None, revision: str | None, names: Iterable[str]) -> Path:
    """The files of those names in a hub repository's folder, fetched. Returns where the repository begins."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = [f"{subfolder}/{name}" if subfolder else name for name in names]
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise LoadError(
            f"{repo} could not be fetched from the hub",
            found=" ".join(str(error).split())[:300],
            expected="a public repository and a network, or files fetched before",
            do="check the id, the revision, the network and, for gated files, your hub login; or pass a local folder",
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error), "a JSON object") from error
    if not isinstance(found, dict):
        raise _unreadable(path, f"a {type(found).__name__}", "a JSON object")
    return found


def as_json(value: Any, indent: int | None = None) -> str:
    """What goes beside weights, as text; to be made before they are written. `DataError` for what JSON cannot hold."""
    try:
        return json.dumps(value, indent=indent)
    except (TypeError, ValueError) as error:
        raise DataError("The dictionary's meta cannot be written", found=str(error), expected="what JSON can hold",
                        do="put text, numbers, lists and dicts of these into meta")  from error  # fmt: skip


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, str(error), "a whole safetensors file") from error


def require(where: str, refused: Mapping[str, bool], weights: Mapping[str, Tensor], names: Iterable[str]) -> None:
    """Raise `LoadError` for what a file asks for and `SAE` does not compute, and for weights that are missing."""
    asked = [text for text, bad in refused.items() if bad]
    if asked:
        raise LoadError(
            f"The dictionary in {where} computes something that is not known here",
            found="; ".join(asked),
            expected="ReLU, the k largest, or a threshold, on activations as they are",
            do="read it with the library it was made by; read without this, it would give other latents",
        )
    missing = [name for name in names if name not in weights]
    if missing:
        raise LoadError(
            f"The dictionary in {where} lacks weights",
            found=f"{', '.join(weights) or 'none'}; not {', '.join(missing)}",
            expected=", ".join(names),
            do="fetch the files again; a checkpoint of a training is not a dictionary",
        )


def hook_name(site: str | None) -> str | None:
    """TransformerLens' name of a site, which SAELens files use; None for sites that it has no name for."""
    match = re.fullmatch(r"L(\d+)\.(\w+)", site or "")
    if match is None or match[2] not in _HOOKS:
        return "hook_embed" if site == "embed" else None
    return f"blocks.{match[1]}.{_HOOKS[match[2]]}"


def site_name(hook: Any) -> str | None:
    """The site that a TransformerLens name means; None for another."""
    match = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", hook if isinstance(hook, str) else "")
    kinds = {name: kind for kind, name in _HOOKS.items()}
    if match is None or match[2] not in kinds:
        return "embed" if hook == "hook_embed" else None
    return f"L{match[1]}.{kinds[match[2]]}"


def site_of_folder(where: str) -> str | None:
    """The site that a folder of sparsify ("layers.20", "layers.20.mlp") or Gemma Scope is named after, or None.

    Gemma Scope's attention dictionaries, "attn_out" too, read all heads side by side, before the output map.
    """
    if match := re.search(r"(?:^|/)(?:h|layers)\.(\d+)(\.mlp)?$", where):
        return f"L{match[1]}.{'mlp' if match[2] else 'resid_post'}"
    match = re.search(r"gemma-scope.*/.*layer_(\d+)", where)
    kinds = {"resid_post": "-res/|resid_post", "mlp": "-mlp/|mlp_out", "head": "-att/|attn_out"}
    kind = next((kind for kind, pattern in kinds.items() if re.search(pattern, where)), None)
    return f"L{match[1]}.{kind}" if match and kind else None


def _unreadable(path: Path, found: str, expected: str) -> LoadError:
    return LoadError(f"{path} cannot be read", found=found, expected=expected, do="fetch or write the file again")
