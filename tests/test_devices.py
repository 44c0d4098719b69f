"""On an accelerator every method gives what it gives on the CPU. Runs where there is one."""

import functools

import numpy as np
import pytest
import torch

import reward_lens as rl
from every_method import METHODS
from families import FAMILIES, STRUCTURES, TEXT_PAIRS, tiny_model

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
REFUSING = ("mixtral", "qwen2_moe", "gpt_oss")


@functools.cache
def model(family: str, device: str, dtype: torch.dtype = torch.float32) -> rl.RewardModel:
    module, tokenizer = tiny_model(family, dtype=dtype, seed=1)
    return rl.RewardModel(module.to(device), tokenizer, name=family)


@pytest.mark.parametrize("family", STRUCTURES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_what_it_gives_on_the_cpu(family, name):
    if family in REFUSING and name in ("by neuron", "integrated"):
        pytest.skip("refused on every device")
    here, there = (METHODS[name](model(family, device), PAIRS) for device in ("cpu", "cuda"))
    for dim in here.value.dims:
        assert list(here.value[dim].values) == list(there.value[dim].values), dim
    if here.value.dtype.kind != "f":
        np.testing.assert_array_equal(here.value, there.value)
        return
    size = float(np.nanmax(np.abs(here.value.values), initial=0.0))
    # An effect along no path at all is rounding of rewards, on both devices.
    np.testing.assert_allclose(there.value, here.value, atol=max(1e-3 * size, 1e-5))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_the_first_look_keeps_its_checks_in_every_precision(family, dtype):
    """Lens, contributions and effects raise where an identity fails."""
    rm = model(family, "cuda", dtype)
    for result in (rl.reward_lens(rm, PAIRS), rl.contributions(rm, PAIRS), rl.effects(rm, PAIRS)):
        assert result.checks and all(check.passed for check in result.checks)


@pytest.mark.parametrize("variant", ["batchtopk", "topk", "jumprelu", "matryoshka"])
def test_a_dictionary_trains(variant):
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    here, there = (
        rl.train_sae(x, 32, 4, variant, n_train=20_000, batch_size=200, device=device) for device in ("cpu", "cuda")
    )
    assert there.meta["fvu"] == pytest.approx(here.meta["fvu"], rel=0.05)


def test_a_store_is_the_same(tmp_path):
    stores = [
        rl.store_activations(
            model("llama", device), PAIRS, "L1.resid_post", positions="response", folder=tmp_path / device
        )
        for device in ("cpu", "cuda")
    ]
    np.testing.assert_allclose(*(store.tensor().numpy() for store in stores), atol=1e-4)
