"""Dictionary files: written as other libraries name things, read back equal, and refused where they mean more."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from reward_lens.errors import DataError, LoadError
from reward_lens.sae.dictionary import SAE
from reward_lens.sae.files import hook_name, site_name, site_of_folder
from reward_lens.sae.formats import save_sae
from reward_lens.sae.transcoder import Transcoder

D, N, OUT = 5, 11, 3
META = {"model": "org/rm", "seed": 4, "trust": "few", "progress": [{"step": 1, "fvu": 0.5}]}


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


X = numbers(20, D, seed=9)


def dictionary(activation: str = "topk", **settings) -> SAE:
    extra = {"topk": {"k": 3}, "jumprelu": {"threshold": numbers(N).abs()}, "relu": {}}[activation]
    return SAE(numbers(D, N), numbers(N), numbers(N, D), numbers(D), activation=activation, site="L2.resid_post",
               meta=META, **{**extra, **settings})  # fmt: skip


def transcoder(activation: str = "jumprelu", out: int = OUT, skip: bool = True, **settings) -> Transcoder:
    extra = {"topk": {"k": 3}, "jumprelu": {"threshold": numbers(N).abs()}, "relu": {}}[activation]
    matrix = numbers(out, D) if skip else None
    return Transcoder(numbers(D, N), numbers(N), numbers(N, out), numbers(out), W_skip=matrix, activation=activation,
                      site="L2.resid_mid", meta=META, **{**extra, **settings})  # fmt: skip


def assert_equal(one: SAE, other: SAE) -> None:
    a, b = one.state_dict(), other.state_dict()
    assert type(one) is type(other) and a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    for name in ("activation", "k", "apply_b_dec_to_input", "site", "meta"):
        assert getattr(one, name) == getattr(other, name), name
    assert torch.equal(one.encode(X), other.encode(X)) and torch.equal(one(X), other(X))


# written and read


@pytest.mark.parametrize(
    ("sae", "fmt"),
    [
        (dictionary("topk"), "saelens"),
        (dictionary("topk"), "sparsify"),
        (dictionary("jumprelu"), "saelens"),
        (dictionary("jumprelu", apply_b_dec_to_input=False), "saelens"),
        (dictionary("relu"), "saelens"),
        (transcoder("jumprelu"), "saelens"),
        (transcoder("relu", skip=False), "saelens"),
        (transcoder("topk", out=D), "sparsify"),
        (transcoder("topk", out=D, skip=False), "sparsify"),
        (transcoder("topk", out=D, apply_b_dec_to_input=True), "sparsify"),
    ],
)
def test_a_round_trip_changes_nothing(sae, fmt, tmp_path):
    assert sae.save(tmp_path / "one", fmt=fmt) == tmp_path / "one"
    assert_equal(SAE.load(tmp_path / "one"), sae)
    assert_equal(SAE.load(tmp_path, subfolder="one"), sae)
    sae.save(tmp_path / "one", fmt=fmt)  # over itself


@pytest.mark.parametrize("fmt", ["saelens", "sparsify"])
def test_a_meta_that_json_cannot_hold_leaves_no_half_of_a_dictionary(fmt, tmp_path):
    sae = dictionary("topk")
    sae.meta = {"seen": {1}}
    with pytest.raises(DataError, match="meta cannot be written.*set is not JSON"):
        sae.save(tmp_path / "one", fmt=fmt)
    assert not (tmp_path / "one").exists()


@pytest.mark.parametrize("activation", ["topk", "jumprelu"])
def test_a_saelens_file_has_the_names_of_saelens(activation, tmp_path):
    sae = dictionary(activation)
    sae.save(tmp_path)
    weights, config = load_file(tmp_path / "sae_weights.safetensors"), json.loads((tmp_path / "cfg.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    expected = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
    assert shapes == expected | ({"threshold": (N,)} if activation == "jumprelu" else {})
    fields = {name: config[name] for name in ("architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input",
                                              "normalize_activations")}  # fmt: skip
    assert fields == {"architecture": activation, "d_in": D, "d_sae": N, "dtype": "float32",
                      "apply_b_dec_to_input": True, "normalize_activations": "none"}  # fmt: skip
    assert config.get("k") == (3 if activation == "topk" else None)
    assert config["metadata"]["hook_name"] == "blocks.2.hook_resid_post"
    assert config["metadata"]["model_name"] == "org/rm"
    pre = (X - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    if activation == "topk":
        top = pre.topk(3)
        z = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
    else:
        z = pre.relu() * (pre > weights["threshold"])
    torch.testing.assert_close(sae.encode(X), z)
    torch.testing.assert_close(sae(X), z @ weights["W_dec"] + weights["b_dec"])


def test_a_sparsify_file_has_the_names_of_sparsify(tmp_path):
    sae = dictionary()
    sae.save(tmp_path, fmt="sparsify")
    weights, config = load_file(tmp_path / "sae.safetensors"), json.loads((tmp_path / "cfg.json").read_text())
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    assert shapes == {"encoder.weight": (N, D), "encoder.bias": (N,), "W_dec": (N, D), "b_dec": (D,)}
    assert {"d_in": D, "num_latents": N, "k": 3, "activation": "topk", "transcode": False}.items() <= config.items()
    pre = F.relu(F.linear(X - weights["b_dec"], weights["encoder.weight"], weights["encoder.bias"]))
    top = pre.topk(3)
    z = torch.zeros_like(pre).scatter(1, top.indices, top.values)
    torch.testing.assert_close(sae(X), z @ weights["W_dec"] + weights["b_dec"])


def test_names_of_transcoders(tmp_path):
    for number, (sae, name) in enumerate([
        (transcoder("jumprelu"), "jumprelu_skip_transcoder"), (transcoder("relu", skip=False), "transcoder"),
        (transcoder("relu"), "skip_transcoder"), (transcoder("jumprelu", skip=False), "jumprelu_transcoder"),
    ]):  # fmt: skip
        config = json.loads((sae.save(tmp_path / str(number)) / "cfg.json").read_text())
        assert (config["architecture"], config["d_out"], config["apply_b_dec_to_input"]) == (name, OUT, False)
    sae = transcoder("topk", out=D)
    weights = load_file(sae.save(tmp_path / "s", fmt="sparsify") / "sae.safetensors")
    config = json.loads((tmp_path / "s" / "cfg.json").read_text())
    assert config["transcode"] and config["skip_connection"]
    top = F.relu(F.linear(X, weights["encoder.weight"], weights["encoder.bias"])).topk(3)
    z = torch.zeros(20, N).scatter(1, top.indices, top.values)
    torch.testing.assert_close(sae(X), z @ weights["W_dec"] + weights["b_dec"] + X @ weights["W_skip"].mT)


@pytest.mark.parametrize(
    ("sae", "fmt", "words"),
    [
        (dictionary("jumprelu"), "sparsify", "no threshold.*fmt='saelens'"),
        (dictionary("relu"), "sparsify", "'relu'"),
        (dictionary("topk", apply_b_dec_to_input=False), "sparsify", "does not subtract b_dec"),
        (transcoder("topk", out=OUT), "sparsify", "another width"),
        (transcoder("topk"), "saelens", "k largest.*fmt='sparsify'"),
        (dictionary(), "pickle", "fmt='pickle'"),
    ],
)
def test_what_a_format_cannot_say_is_not_written(sae, fmt, words, tmp_path):
    with pytest.raises(DataError, match=words):
        save_sae(sae, tmp_path / "x", fmt)
    assert not (tmp_path / "x").exists()


def test_weights_of_one_memory_are_written(tmp_path):
    eye, bias = torch.eye(D), numbers(D)
    tied = SAE(eye, bias, eye, bias, activation="relu", meta=META)
    assert_equal(SAE.load(tied.save(tmp_path)), tied)


def test_one_folder_holds_one_dictionary(tmp_path):
    dictionary().save(tmp_path)
    with pytest.raises(DataError, match="already holds"):
        dictionary().save(tmp_path, fmt="sparsify")


# made by others


WEIGHTS = {"W_enc": numbers(D, N), "b_enc": numbers(N), "W_dec": numbers(N, D), "b_dec": numbers(D)}


def saelens_folder(path, config: dict, weights: dict | None = None):
    path.mkdir(parents=True, exist_ok=True)
    save_file({**WEIGHTS, **(weights or {})}, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": N, "dtype": "float32", **config}))
    return path


def test_files_of_before_saelens_6(tmp_path):
    config = {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 2},
              "hook_name": "blocks.7.hook_mlp_out", "model_name": "gpt2", "normalize_activations": "none",
              "finetuning_scaling_factor": False}  # fmt: skip
    sae = SAE.load(saelens_folder(tmp_path, config, {"scaling_factor": torch.ones(N)}))
    assert (sae.activation, sae.k, sae.site, sae.apply_b_dec_to_input) == ("topk", 2, "L7.mlp", True)
    assert sae.meta["model"] == "gpt2" and ((sae.encode(X) > 0).sum(1) <= 2).all()
    processing = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    for number, layout in enumerate((processing, {"metadata": processing})):
        assert SAE.load(saelens_folder(tmp_path / str(number), layout)).meta["centred_writes"]
    assert not sae.meta["centred_writes"]
    old = SAE.load(saelens_folder(tmp_path / "old", {"hook_point": "blocks.0.hook_resid_pre"}))
    assert (old.activation, old.site) == ("relu", "L0.resid_pre")


def test_a_topk_file_that_ranks_by_what_is_written(tmp_path):
    config = {"architecture": "topk", "k": 3, "rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True}
    sae = SAE.load(saelens_folder(tmp_path, config))
    norm = WEIGHTS["W_dec"].norm(dim=1)
    top = (((X - WEIGHTS["b_dec"]) @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"]) * norm).topk(3)
    z = torch.zeros(20, N).scatter(1, top.indices, top.values.relu())
    torch.testing.assert_close(sae.encode(X), z)
    torch.testing.assert_close(sae(X), (z / norm) @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"])


def test_weights_in_sixteen_bits_are_read_in_thirty_two(tmp_path):
    half = {name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    sae = SAE.load(saelens_folder(tmp_path, {"architecture": "standard", "dtype": "bfloat16"}, half))
    assert sae.W_enc.dtype == torch.float32 and torch.equal(sae.W_enc, half["W_enc"].float())
    assert sae.encode(X.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "weights", "words"),
    [
        ({"architecture": "gated"}, {}, "'gated'"),
        ({"architecture": "standard", "activation_fn": "tanh-relu"}, {}, "tanh-relu"),
        ({"architecture": "standard", "normalize_activations": "layer_norm"}, {}, "layer_norm"),
        ({"architecture": "standard", "reshape_activations": "hook_z"}, {}, "hook_z"),
        ({"architecture": "standard"}, {"scaling_factor": torch.full((N,), 2.0)}, "scaling_factor"),
        ({"architecture": "jumprelu"}, {}, "not threshold"),
        ({"architecture": "skip_transcoder"}, {}, "not W_skip"),
        ({"architecture": "topk"}, {}, "k=0"),
        ({"architecture": "standard"}, {"b_enc": torch.zeros(N + 1)}, "b_enc"),
        ({"architecture": "standard"}, {"b_enc": torch.full((N,), float("nan"))}, "NaN"),
    ],
)
def test_what_has_no_equal_here_is_refused(config, weights, words, tmp_path):
    with pytest.raises(LoadError, match=words):
        SAE.load(saelens_folder(tmp_path, config, weights))


def test_a_sparsify_file_of_another_activation_is_refused(tmp_path):
    dictionary().save(tmp_path, fmt="sparsify")
    config = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "activation": "groupmax"}))
    with pytest.raises(LoadError, match="groupmax"):
        SAE.load(tmp_path)
    # files of sae 0.1, which keep the k largest by size, whatever their sign
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "k": 2, "expansion_factor": 2, "signed": True}))
    with pytest.raises(LoadError, match="signed"):
        SAE.load(tmp_path)
    old = {"d_in": D, "k": 2, "expansion_factor": 2}
    folder = tmp_path / "repo" / "layers.6.mlp"
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(old))
    (tmp_path / "sae.safetensors").rename(folder / "sae.safetensors")
    assert SAE.load(tmp_path / "repo", subfolder="layers.6.mlp").site == "L6.mlp"


def test_gemma_scope(tmp_path):
    folder = tmp_path / "google" / "gemma-scope-2b-pt-res" / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    arrays = {name: tensor.numpy() for name, tensor in WEIGHTS.items()} | {"threshold": np.full(N, 0.5, np.float32)}
    np.savez(folder / "params.npz", **arrays)
    sae = SAE.load(tmp_path / "google" / "gemma-scope-2b-pt-res", subfolder="layer_20/width_16k/average_l0_71")
    assert (sae.activation, sae.site, sae.apply_b_dec_to_input) == ("jumprelu", "L20.resid_post", False)
    pre = X @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"]
    torch.testing.assert_close(sae.encode(X), pre * (pre > 0.5))
    (folder / "params.npz").write_bytes((folder / "params.npz").read_bytes()[:500])
    with pytest.raises(LoadError, match="params.npz cannot be read"):
        SAE.load(folder)
    later = tmp_path / "gemma-scope-2-1b-pt" / "transcoder" / "layer_3"
    later.mkdir(parents=True)
    lower = {name.lower(): tensor for name, tensor in WEIGHTS.items()} | {"threshold": torch.full((N,), 0.5)}
    save_file({**lower, "affine_skip_connection": numbers(D, D)}, later / "params.safetensors")
    found = SAE.load(later)
    assert isinstance(found, Transcoder)
    torch.testing.assert_close(found(X), sae(X) + X @ numbers(D, D))  # x A, not A x


def test_llama_scope(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    config = {"d_model": D, "d_sae": N, "jump_relu_threshold": 0.3, "hook_point_in": "blocks.9.hook_resid_post",
              "dataset_average_activation_norm": {"in": 4.0}}  # fmt: skip
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    named = {"encoder.weight": WEIGHTS["W_enc"].T, "encoder.bias": WEIGHTS["b_enc"],
             "decoder.weight": WEIGHTS["W_dec"].T, "decoder.bias": WEIGHTS["b_dec"]}  # fmt: skip
    save_file({k: v.contiguous() for k, v in named.items()}, tmp_path / "checkpoints" / "final.safetensors")
    sae, scale = SAE.load(tmp_path), D**0.5 / 4
    assert sae.site == "L9.resid_post"
    pre = (X * scale) @ WEIGHTS["W_enc"] + WEIGHTS["b_enc"]
    z = pre.relu() * (pre > 0.3 * scale)
    torch.testing.assert_close(sae(X), (z @ WEIGHTS["W_dec"] + WEIGHTS["b_dec"]) / scale)
    (tmp_path / "hyperparams.json").write_text(json.dumps({"d_model": D}))
    with pytest.raises(LoadError, match="jump_relu_threshold"):
        SAE.load(tmp_path)


# not there


def test_what_is_not_a_dictionary_says_what_is_there(tmp_path):
    with pytest.raises(LoadError, match="no such folder"):
        SAE.load(tmp_path / "nowhere")
    with pytest.raises(LoadError, match="an empty folder.*subfolder="):
        SAE.load(tmp_path)
    (tmp_path / "layer_1").mkdir()
    with pytest.raises(LoadError, match="Found: layer_1"):
        SAE.load(tmp_path)
    folder = saelens_folder(tmp_path / "x", {"architecture": "standard"})
    (folder / "sae_weights.safetensors").write_bytes(b"half a file")
    with pytest.raises(LoadError, match="cannot be read"):
        SAE.load(folder)
    (folder / "cfg.json").write_text("[1]")
    with pytest.raises(LoadError, match="cfg.json cannot be read.*a list"):
        SAE.load(folder)


def test_a_hub_id_without_a_network_says_so(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoadError, match="org/dictionaries could not be fetched.*network.*local folder"):
        SAE.load("org/dictionaries", subfolder="layer_3")


def test_sites_and_hook_names_are_one_to_one():
    for site in ("embed", "L0.resid_pre", "L3.resid_mid", "L12.resid_post", "L1.attn", "L1.mlp"):
        assert site_name(hook_name(site)) == site
    assert hook_name("L3.H2") is None and hook_name(None) is None
    assert site_name("blocks.3.attn.hook_z") is None and site_name(None) is None
    scope = "google/gemma-scope-2"  # what is read there is the input of the output map
    assert site_of_folder(f"{scope}-12b-pt/attn_out_all/layer_11_width_16k_l0_small") == "L11.head"
    assert site_of_folder(f"{scope}b-pt-att/layer_3/width_16k/average_l0_52") == "L3.head"
    assert site_of_folder(f"{scope}-4b-it/mlp_out/layer_17_width_16k_l0_big") == "L17.mlp"
    assert site_of_folder("org/sae/layers.4") == "L4.resid_post" and site_of_folder("org/sae/run4") is None
