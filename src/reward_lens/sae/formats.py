"""Dictionaries as files: SAELens and sparsify, written and read; other releases read (`sae.releases`).

    saelens     cfg.json, sae_weights.safetensors: W_enc [d_in, d_sae], b_enc, W_dec [d_sae, d_in], b_dec (threshold)
    sparsify    cfg.json, sae.safetensors: encoder.weight [d_sae, d_in], encoder.bias, W_dec [d_sae, d_in], b_dec

A transcoder adds W_skip [d_out, d_in]. What is particular to us (site, training, seed) is under "reward_lens", which
both libraries pass over. Weights are read as float32. A file that asks for a computation that `SAE` does not have is
refused: read without it, it would give other latents. SAELens centres a model's writes where its norm removes the mean
anyway; whether the norm does is known with the model, so `meta["centred_writes"]` keeps it for methods to refuse.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from reward_lens.errors import DataError, LoadError
from reward_lens.sae import releases
from reward_lens.sae.dictionary import SAE
from reward_lens.sae.files import (
    HUB_ID,
    as_json,
    download,
    hook_name,
    read_json,
    read_tensors,
    require,
    site_name,
    site_of_folder,
)
from reward_lens.sae.transcoder import Transcoder

SAELENS, SPARSIFY, CONFIG = "sae_weights.safetensors", "sae.safetensors", "cfg.json"
FILES = (CONFIG, SAELENS, SPARSIFY, *releases.FILES)


def save_sae(sae: SAE, folder: str | Path, fmt: str = "saelens") -> Path:
    """Write a dictionary's two files. Returns the folder.

    Raises `DataError` for what the format has no words for, and for a folder that holds a dictionary of the other
    format (a reader could not tell which one is meant).
    """
    folder = Path(folder)
    if fmt not in ("saelens", "sparsify"):
        raise DataError("The format is not known", found=f"fmt={fmt!r}", expected="'saelens' or 'sparsify'",
                        do="pass one of these")  # fmt: skip
    name, other = (SAELENS, SPARSIFY) if fmt == "saelens" else (SPARSIFY, SAELENS)
    if (folder / other).exists():
        raise DataError(f"{folder} already holds a dictionary", found=other, expected=f"nothing, or {name}",
                        do="choose another folder")  # fmt: skip
    config, weights = (_to_saelens if fmt == "saelens" else _to_sparsify)(sae)
    written = as_json(config, indent=1)
    folder.mkdir(parents=True, exist_ok=True)
    own = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in weights.items()}
    save_file(own, folder / name)  # which takes no two tensors of one memory, as tied weights are
    (folder / CONFIG).write_text(written, encoding="utf-8")
    return folder


def load_sae(folder: str | Path, subfolder: str | None = None, revision: str | None = None) -> SAE:
    """Read a dictionary from a local folder or the hub, in whichever known form its files have.

    Parameters
    ----------
    folder: a folder, or a hub id "org/name". Nothing is fetched but the files a dictionary consists of.
    subfolder: the dictionary's folder inside it, e.g. "layer_20/width_16k/average_l0_71".
    revision: branch, tag or commit of the hub.

    Returns an `SAE`, or a `Transcoder` where the files describe one. Raises `LoadError`.
    """
    where = f"{folder}/{subfolder}" if subfolder else str(folder)
    root = Path(folder)
    if not root.exists() and HUB_ID.fullmatch(str(folder)):
        root = download(str(folder), subfolder, revision, FILES)
    path = root / subfolder if subfolder else root
    present = [name for name in FILES if (path / name).is_file()]
    if SAELENS in present and CONFIG in present:
        read = _from_saelens
    elif SPARSIFY in present and CONFIG in present:
        read = _from_sparsify
    elif (foreign := releases.reader(present)) is not None:
        read = foreign
    else:
        beside = sorted(p.name for p in path.iterdir())[:12] if path.is_dir() else []
        raise LoadError(
            f"There is no dictionary in {where}",
            found=", ".join(beside) or ("an empty folder" if path.is_dir() else "no such folder"),
            expected=f"{CONFIG} with {SAELENS} (SAELens) or {SPARSIFY} (sparsify), or {', '.join(releases.FILES)}",
            do="name the folder of one dictionary; in a release of many that is subfolder=",
        )
    parts = read(path, where)
    kind = Transcoder if parts.pop("transcoder") else SAE
    weights = [parts.pop(name).float() for name in ("W_enc", "b_enc", "W_dec", "b_dec")]
    for name in ("threshold", "W_skip"):
        if parts.get(name) is not None:
            parts[name] = parts[name].float()
    parts["site"] = parts.get("site") or site_of_folder(where)
    try:
        return kind(*weights, **parts)
    except DataError as error:
        raise LoadError(f"The dictionary in {where} does not fit together", found=error.found,
                        expected=error.expected, do="fetch the files again")  from error  # fmt: skip


def _to_saelens(sae: SAE) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    architecture = {"relu": "standard"}.get(sae.activation, sae.activation)
    weights = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    config: dict[str, Any] = {"d_in": sae.d_model, "d_sae": sae.d_sae}
    if isinstance(sae, Transcoder):
        if sae.activation == "topk" or sae.apply_b_dec_to_input:
            raise _unsaid("SAELens", "a transcoder that keeps the k largest or subtracts b_dec", "sparsify")
        skip = "skip_" if sae.W_skip is not None else ""
        architecture = ("jumprelu_" if sae.activation == "jumprelu" else "") + skip + "transcoder"
        config["d_out"] = sae.d_out
        if sae.W_skip is not None:
            weights["W_skip"] = sae.W_skip
    if sae.threshold is not None:
        weights["threshold"] = sae.threshold
    if sae.activation == "topk":
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    ours = {"site": sae.site, "meta": sae.meta}
    config |= {
        "architecture": architecture, "dtype": str(sae.W_enc.dtype).removeprefix("torch."), "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input, "normalize_activations": "none",
        "reshape_activations": "none",
        # The version tells SAELens which layout of cfg.json this is; files without one are read as of before 6.0.
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": hook_name(sae.site), "model_name": sae.meta.get("model"),
                     "reward_lens": ours},
    }  # fmt: skip
    return config, weights


def _from_saelens(path: Path, where: str) -> dict[str, Any]:
    config, weights = read_json(path / CONFIG), read_tensors(path / SAELENS)
    metadata = config.get("metadata") or {}
    kwargs = config.get("activation_fn_kwargs") or {}
    function = config.get("activation_fn_str", config.get("activation_fn", "relu"))  # files of before SAELens 6
    architecture = str(config.get("architecture", "standard"))
    if architecture == "standard" and function == "topk":
        architecture = "topk"
    kept = architecture.removesuffix("transcoder").removesuffix("skip_").removesuffix("_") or "standard"
    factor = weights.get("scaling_factor")
    refused = {
        f"architecture {architecture!r}": kept not in ("standard", "topk", "jumprelu"),
        f"activation {function!r}": function not in ("relu", "topk"),
        f"normalize_activations {config.get('normalize_activations')!r}": config.get("normalize_activations")
        not in (None, False, "none"),
        f"reshape_activations {config.get('reshape_activations')!r}": config.get("reshape_activations", "none")
        not in (None, "none"),
        "scaling_factor other than 1": factor is not None and not torch.allclose(factor.float(), torch.tensor(1.0)),
    }
    require(where, refused, weights, ("W_enc", "b_enc", "W_dec", "b_dec"))
    parts: dict[str, Any] = {name: weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    parts["activation"] = {"standard": "relu"}.get(kept, kept)
    if kept == "jumprelu":
        require(where, {}, weights, ("threshold",))
        parts["threshold"] = weights["threshold"].relu()  # a negative one lets through what ReLU does
    if kept == "topk":
        parts["k"] = int(config.get("k") or kwargs.get("k") or 0)
        if config.get("rescale_acts_by_decoder_norm"):
            norm = parts["W_dec"].float().norm(dim=1)
            parts |= {"W_enc": parts["W_enc"].float() * norm, "b_enc": parts["b_enc"].float() * norm,
                      "W_dec": parts["W_dec"].float() / norm[:, None]}  # fmt: skip
    transcoder = architecture.endswith("transcoder")
    if "skip_transcoder" in architecture:
        require(where, {}, weights, ("W_skip",))
        parts["W_skip"] = weights["W_skip"]
    parts["apply_b_dec_to_input"] = bool(config.get("apply_b_dec_to_input", True)) and not transcoder
    ours = metadata.get("reward_lens") or {}
    hook = metadata.get("hook_name", config.get("hook_name", config.get("hook_point")))
    model = metadata.get("model_name", config.get("model_name"))
    loaded = metadata.get("model_from_pretrained_kwargs", config.get("model_from_pretrained_kwargs")) or {}
    meta = ours.get("meta") or {"format": "saelens", "model": model, "hook_name": hook, "cfg": config,
                                "centred_writes": bool(loaded.get("center_writing_weights"))}  # fmt: skip
    return {**parts, "transcoder": transcoder, "site": ours.get("site") or site_name(hook), "meta": meta}


def _to_sparsify(sae: SAE) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    transcoder = isinstance(sae, Transcoder)
    if sae.activation != "topk":
        raise _unsaid(
            "sparsify", f"activation {sae.activation!r}: it keeps the k largest and knows no threshold", "saelens"
        )
    if sae.W_dec.shape[1] != sae.d_model:
        raise _unsaid("sparsify", f"an output of another width ({sae.W_dec.shape[1]} from {sae.d_model})", None)
    if not transcoder and not sae.apply_b_dec_to_input:
        raise _unsaid("sparsify", "a dictionary that does not subtract b_dec", "saelens")
    weights = {"encoder.weight": sae.W_enc.T, "encoder.bias": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    skip = sae.W_skip if isinstance(sae, Transcoder) else None
    if skip is not None:
        weights["W_skip"] = skip
    config = {
        "activation": "topk", "expansion_factor": max(1, sae.d_sae // sae.d_model), "num_latents": sae.d_sae,
        "normalize_decoder": not transcoder, "k": sae.k, "multi_topk": False, "skip_connection": skip is not None,
        "transcode": not sae.apply_b_dec_to_input, "d_in": sae.d_model,
        "reward_lens": {"site": sae.site, "meta": sae.meta},
    }  # fmt: skip
    return config, weights


def _from_sparsify(path: Path, where: str) -> dict[str, Any]:
    config, weights = read_json(path / CONFIG), read_tensors(path / SPARSIFY)
    refused = {f"activation {config.get('activation')!r}": config.get("activation", "topk") != "topk"}
    refused |= {name: bool(config.get(name)) for name in ("signed", "embed_skip", "gram_lookup")}
    require(where, refused, weights, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    ours: Mapping[str, Any] = config.get("reward_lens") or {}
    parts = {
        "W_enc": weights["encoder.weight"].T, "b_enc": weights["encoder.bias"], "W_dec": weights["W_dec"],
        "b_dec": weights["b_dec"], "activation": "topk", "k": int(config.get("k") or 0),
        "apply_b_dec_to_input": not config.get("transcode"), "site": ours.get("site"),
        "meta": ours.get("meta") or {"format": "sparsify", "cfg": config},
        "transcoder": bool(config.get("transcode") or config.get("skip_connection")),
    }  # fmt: skip
    if config.get("skip_connection"):
        require(where, {}, weights, ("W_skip",))
        parts["W_skip"] = weights["W_skip"]
    return parts


def _unsaid(library: str, what: str, instead: str | None) -> DataError:
    return DataError(
        f"A file of {library} cannot say what this dictionary computes",
        found=what,
        expected=f"what {library} itself trains",
        do=f"save it as fmt={instead!r}" if instead else "keep the weights in a file of your own",
    )
