"""Published dictionaries in files of their own: Gemma Scope and Llama Scope, read as their makers define them.

    Gemma Scope 1    params.npz: W_enc, b_enc, W_dec, b_dec, threshold
    Gemma Scope 2    params.safetensors: w_enc, ..., threshold; a transcoder's affine_skip_connection A [d_in, d_out],
                     whose part is x A as in the release's own code, so W_skip is its transpose
    Llama Scope      hyperparams.json, checkpoints/final.safetensors: one threshold for all latents, and inputs scaled
                     to a mean norm of sqrt(d), which is folded into the weights

None of them subtracts b_dec. Reference: Lieberum et al. 2024, arXiv 2408.05147; He et al. 2024, arXiv 2410.20526.
"""

import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from reward_lens.errors import LoadError
from reward_lens.sae.files import read_json, read_tensors, require, site_name

GEMMA, GEMMA_2, LLAMA, LLAMA_WEIGHTS = (
    "params.npz", "params.safetensors", "hyperparams.json", "checkpoints/final.safetensors"
)  # fmt: skip
FILES = (GEMMA, GEMMA_2, LLAMA, LLAMA_WEIGHTS)
_WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")


def reader(present: Sequence[str]) -> Callable[[Path, str], dict[str, Any]] | None:
    """The function that reads a folder with these files: (folder, its name) to the arguments of an `SAE`."""
    if GEMMA in present or GEMMA_2 in present:
        return _from_gemma_scope
    return _from_llama_scope if LLAMA in present and LLAMA_WEIGHTS in present else None


def _from_gemma_scope(path: Path, where: str) -> dict[str, Any]:
    if (path / GEMMA_2).is_file():
        weights = read_tensors(path / GEMMA_2)
    else:
        try:
            with (path / GEMMA).open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                weights = {name: torch.from_numpy(file[name]) for name in file.files}
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise LoadError(f"{path / GEMMA} cannot be read", found=str(error), expected="a file of numpy arrays",
                            do="fetch it again")  from error  # fmt: skip
    weights = {"W_" + name[2:] if name.startswith("w_") else name: tensor for name, tensor in weights.items()}
    require(where, {"an embedding's scale": "embedding" in where}, weights, _WEIGHTS)
    parts: dict[str, Any] = {name: weights[name] for name in _WEIGHTS}
    skip = weights.get("affine_skip_connection")
    parts |= {"W_skip": skip.T} if skip is not None else {}
    return {**parts, "activation": "jumprelu", "apply_b_dec_to_input": False, "meta": {"format": "gemma scope"},
            "transcoder": skip is not None or "transcoder" in where}  # fmt: skip


def _from_llama_scope(path: Path, where: str) -> dict[str, Any]:
    config, weights = read_json(path / LLAMA), read_tensors(path / LLAMA_WEIGHTS)
    names = ("encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias")
    needed = ("d_model", "jump_relu_threshold", "dataset_average_activation_norm", "hook_point_in")
    lacking = [name for name in needed if name not in config]
    if lacking:
        raise LoadError(f"{path / LLAMA} lacks settings", found=f"no {', '.join(lacking)}", do="fetch it again",
                        expected=", ".join(needed))  # fmt: skip
    other = config.get("hook_point_out", config["hook_point_in"]) != config["hook_point_in"]
    require(where, {"another site as its target": other}, weights, names)
    scale = math.sqrt(config["d_model"]) / config["dataset_average_activation_norm"]["in"]
    enc, b_enc, dec, b_dec = (weights[name].float() for name in names)
    return {
        "W_enc": enc.T * scale, "b_enc": b_enc, "W_dec": dec.T / scale, "b_dec": b_dec / scale,
        "threshold": torch.full_like(b_enc, config["jump_relu_threshold"] * scale), "activation": "jumprelu",
        "apply_b_dec_to_input": False, "site": site_name(config["hook_point_in"]), "transcoder": False,
        "meta": {"format": "llama scope", "hook_name": config["hook_point_in"], "cfg": config},
    }  # fmt: skip
