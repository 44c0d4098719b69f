"""Trunks in 8 and 4 bits: with bitsandbytes where it is installed, everywhere with linear maps of this file's own."""

import importlib.util

import numpy as np
import pytest
import torch
from torch import nn

import reward_lens as rl
from families import _SPECS, TEXT_PAIRS, Family, tiny_model

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
HAS_BNB = importlib.util.find_spec("bitsandbytes") is not None
bitsandbytes = pytest.mark.skipif(not HAS_BNB, reason="bitsandbytes is not installed")


class Int8(nn.Module):
    """A linear map with int8 weights, a scale a row, and inputs rounded to 8 bits a position, as LLM.int8 has them.

    `outliers`: columns in which some input of the batch is larger are left unrounded.
    """

    def __init__(self, linear: nn.Linear, outliers: float | None = None):
        super().__init__()
        self.outliers, self.levels = outliers, 127 if outliers is None else 7
        self.register_buffer("scale", linear.weight.detach().abs().amax(1) / 127)
        rounded = (linear.weight.detach() / self.scale[:, None]).round().to(torch.int8)
        self.weight = nn.Parameter(rounded, requires_grad=False)

    def forward(self, x):
        size = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-9) / self.levels
        coarse = x + ((x / size).round() * size - x).detach()  # the slope of rounding is taken as 1
        if self.outliers is not None:
            large = x.detach().abs().reshape(-1, x.shape[-1]).amax(0) > self.outliers
            coarse = torch.where(large, x, coarse)
        return coarse @ (self.weight.to(x) * self.scale[:, None].to(x)).T


def quantised(outliers: float | None = None, dtype=torch.float32):
    module, tokenizer = tiny_model("llama", seed=3, dtype=dtype)
    for block in module.model.layers:
        for owner in (block.self_attn, block.mlp):
            for name, linear in list(owner.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(owner, name, Int8(linear, outliers))
    return module, tokenizer


@pytest.fixture(scope="module")
def rm() -> rl.RewardModel:
    return rl.RewardModel(*quantised(), name="int8")


def test_the_load_report_states_its_tolerances(rm):
    assert rm.quantised and rm.sixteen_bit and rm.dtype == torch.float32
    report = rm.load_report.value
    assert float(report.sel(check="head not quantised")) == 0
    own = report.sel(check="own reward")
    assert 1e-3 < float(own.tolerance) < 1 and float(own) <= float(own.tolerance)
    assert max(rm.structure.gaps) < 1e-5  # the writes are what the quantised maps give
    assert rm.structure.attn == "self_attn" and rm.structure.mlp == "mlp"


def test_components_are_exact_in_what_the_trunk_gives(rm):
    result = rl.contributions(rm, PAIRS)
    parts, margin = result.value.sel(side="margin"), rm.score_pairs(PAIRS).value.sel(side="margin")
    np.testing.assert_allclose(parts.sum("component").values, margin.values, atol=1e-4)
    assert all(check.passed for check in rl.effects(rm, PAIRS, at="all", align="tail").checks)
    assert np.isfinite(rl.effects(rm, PAIRS, estimator="gradient").value.values).any()


@pytest.mark.parametrize("by", ["head", "neuron"])
def test_splits_that_need_weights_are_refused_with_the_remedy(rm, by):
    with pytest.raises(rl.StructureError, match="cannot be split into .*its maps are quantised.*loaded unquantised"):
        rl.contributions(rm, PAIRS, by=by)
    with pytest.raises(rl.StructureError, match="its maps are quantised"):
        rl.effects(rm, PAIRS, ["L0.H1" if by == "head" else "L0.N1"])


def test_outliers_chosen_by_the_batch_are_refused():
    with pytest.raises(rl.LoadError, match="failed the test 'batching'.*llm_int8_threshold=0.0"):
        rl.RewardModel(*quantised(outliers=2.0))


def test_a_plain_trunk_is_not_quantised():
    assert not rl.RewardModel(*tiny_model("llama")).quantised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose matrices are of sizes that kernels for 4 bits take."""
    import families

    path = tmp_path_factory.mktemp("wide")
    before = families.D_MODEL, families.D_MLP
    families.D_MODEL, families.D_MLP = 64, 128
    _SPECS["wide"] = Family("llama", "Llama", lambda n: {"num_key_value_heads": 4, "head_dim": 16})
    try:
        module, tokenizer = tiny_model("wide", seed=3)
    finally:
        families.D_MODEL, families.D_MLP = before
        del _SPECS["wide"]
    module.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


SETTINGS = {
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
}


@bitsandbytes
@pytest.mark.parametrize("name", SETTINGS)
def test_bitsandbytes(folder, name):
    from transformers import BitsAndBytesConfig

    rm = rl.load(folder, quantization_config=BitsAndBytesConfig(**SETTINGS[name]))
    down = rm.trunk.blocks[0].get_submodule("mlp.down_proj")
    assert type(down).__name__ in ("Linear8bitLt", "Linear4bit") and rm.quantised
    assert type(rm.head) is nn.Linear and rm.head.weight.is_floating_point()  # transformers leaves the last one out
    margin = rm.score_pairs(PAIRS).value.sel(side="margin").values
    exact = rl.load(folder).score_pairs(PAIRS).value.sel(side="margin").values
    assert 1e-3 < np.abs(margin - exact).max() < 4 * exact.std()
    parts = rl.contributions(rm, PAIRS).value.sel(side="margin").sum("component").values
    np.testing.assert_allclose(parts, margin, atol=1e-4)
    assert all(check.passed for check in rl.effects(rm, PAIRS).checks)
    with pytest.raises(rl.StructureError, match="its maps are quantised"):
        rl.contributions(rm, PAIRS, by="head")


@bitsandbytes
def test_bitsandbytes_with_the_head_or_with_outliers_of_the_batch(folder):
    from transformers import BitsAndBytesConfig

    whole = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=["lm_head"])
    with pytest.raises(rl.LoadError, match="reward head .* is quantised.*Linear8bitLt with torch.int8"):
        rl.load(folder, quantization_config=whole)
    with pytest.raises(rl.LoadError, match="'batching'.*llm_int8_threshold=0.0"):
        rl.load(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def test_the_demo_is_not_quantised_without_a_word():
    with pytest.raises(rl.LoadError, match="demo model takes no such setting.*quantization_config"):
        rl.load("demo", quantization_config={"load_in_8bit": True})
