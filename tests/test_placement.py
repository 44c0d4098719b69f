"""Models whose parts are in several places, on disk and loaded as they run: every number is the plain model's."""

import numpy as np
import pytest
import torch

import reward_lens as rl
from every_method import METHODS
from fake_device import DEVICE, second_device, spread
from families import STRUCTURES, TEXT_PAIRS, more, tiny_model
from reward_lens.model.placement import held, loaded_copy

PAIRS = [rl.Pair(*texts) for texts in TEXT_PAIRS]
EQUAL = rl.Pair("What is the capital of France?", "It is Paris, by the river", "It is Rybix, by a rive", id="equal")
usual = pytest.mark.parametrize(
    "family", ["llama", "gpt2", *more(*(f for f in STRUCTURES if f not in ("llama", "gpt2")))]
)


def on_disk(structure, module) -> dict[str, str]:
    """Every second block, the final norm and the head on disk."""
    parts = {path: "cpu" for path, _ in module.base_model.named_children()}
    prefix = module.base_model_prefix + "."
    layout = {prefix + path: where for path, where in parts.items()}
    layout.pop(structure.blocks)
    layout |= {f"{structure.blocks}.{i}": ("cpu", "disk")[i % 2] for i in range(len(structure.gaps))}
    return layout | {structure.final_norm: "disk", structure.head: "disk"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{family: (plain, partly on disk)}, made when asked for."""
    made: dict[str, tuple[rl.RewardModel, rl.RewardModel]] = {}

    def get(family: str):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            module, tokenizer = tiny_model(family, seed=1, n_layers=4)
            plain = rl.RewardModel(module, tokenizer, name="model")
            module.save_pretrained(folder / "model")
            tokenizer.save_pretrained(folder / "model")
            layout = on_disk(plain.structure, module)
            placed = rl.load(folder / "model", device_map=layout, offload_folder=folder / "offloaded")
            made[family] = plain, placed
        return made[family]

    return get


@usual
def test_weights_on_disk_are_read_and_every_method_gives_the_same(models, family):
    plain, placed = models(family)
    gone = [name for name, parameter in placed.module.named_parameters() if parameter.is_meta]
    assert any(name.startswith(placed.structure.head) for name in gone) and len(gone) > 8
    assert placed.device == torch.device("cpu") and placed.structure == plain.structure
    scores = placed.score_pairs(PAIRS).value.values
    np.testing.assert_allclose(scores, plain.score_pairs(PAIRS).value.values, atol=1e-5)
    assert all(parameter.is_meta for name, parameter in placed.module.named_parameters() if name in gone)


QUICK = ("lens", "by head", "by neuron", "effects", "gradient", "ov")


def compared(name: str, plain: rl.RewardModel, placed: rl.RewardModel, pairs=PAIRS) -> None:
    here, there = (METHODS[name](model, pairs) for model in (plain, placed))
    if here.value.dtype.kind != "f":
        np.testing.assert_array_equal(here.value, there.value)
        return
    size = float(np.nanmax(np.abs(here.value.values), initial=0.0))
    np.testing.assert_allclose(there.value, here.value, atol=max(1e-4 * size, 1e-5))


@pytest.mark.parametrize("name", [n for n in METHODS if n in QUICK])
def test_methods_with_weights_on_disk(models, name):
    compared(name, *models("llama"), PAIRS[:2])


@pytest.mark.full
@pytest.mark.parametrize("name", [n for n in METHODS if n not in QUICK])
def test_every_other_method_with_weights_on_disk(models, name):
    compared(name, *models("llama"))


@pytest.mark.parametrize("estimator", ["exact", "gradient"])
@pytest.mark.parametrize(
    "sites", [["embed", "L1.attn", "L2.resid_mid", "L3.mlp", "L1.H2", "L3.N5"], ["L1.Q1", "L3.P0"]]
)
def test_replay_with_weights_on_disk(models, sites, estimator):
    if estimator == "gradient":
        sites = [s for s in sites if s[3:4] not in ("Q", "P")]
    if not sites:
        pytest.skip("no slopes inside the attention call")
    plain, placed = models("llama")
    here, there = (rl.effects(m, [EQUAL], sites, at="all", estimator=estimator).value.values for m in (plain, placed))
    np.testing.assert_allclose(there, here, atol=1e-5)


def test_what_changes_or_copies_weights_refuses_offloaded_ones(models):
    _, placed = models("llama")
    u = torch.ones(placed.d_model)
    with pytest.raises(rl.DataError, match="An edit of the head needs the weights in memory.*score.weight.*device_map"):
        rl.edit_head(placed, u, 1.0)
    with pytest.raises(rl.DataError, match="needs the weights in memory"):
        rl.random_weight_copy(placed)


def test_a_copy_of_an_offloaded_module_stands_alone(models):
    plain, placed = models("llama")
    norm = placed.module.get_submodule(placed.structure.final_norm)
    copied = loaded_copy(norm)
    x = torch.randn(3, placed.d_model)
    assert not hasattr(copied, "_hf_hook") and hasattr(norm, "_hf_hook") and norm.weight.is_meta
    with torch.no_grad():
        assert torch.equal(copied(x), plain.module.get_submodule(plain.structure.final_norm)(x))


def test_a_weight_that_is_nowhere_is_an_error():
    with pytest.raises(rl.StructureError, match="The weight of a Linear has no numbers.*meta device"):
        held(torch.nn.Linear(2, 2, device="meta"))


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
def test_a_model_under_hooks_is_edited_and_saved(models, tmp_path):
    from accelerate import dispatch_model

    plain, _ = models("llama")
    module, tokenizer = tiny_model("llama", seed=1, n_layers=4)
    layout = {path: "cpu" for path in on_disk(plain.structure, module)}
    hooked = rl.RewardModel(dispatch_model(module, layout, main_device="cpu", force_hooks=True), tokenizer)
    assert hasattr(hooked.trunk.blocks[0], "_hf_hook")
    u = torch.randn(plain.d_model, generator=torch.Generator().manual_seed(0))
    expected = rl.edit_head(plain, u).score("a", "b")
    edited = rl.edit_head(hooked, u)
    assert edited.score("a", "b") == pytest.approx(expected, abs=1e-6)
    assert hooked.score("a", "b") == pytest.approx(plain.score("a", "b"), abs=1e-6)
    assert rl.load(edited.save_pretrained(tmp_path / "edited")).score("a", "b") == pytest.approx(expected, abs=1e-5)


@pytest.fixture(scope="module")
def on_two_devices():
    """{family: (plain, its later blocks, final norm and head on a second device)}, made when asked for."""
    made: dict[str, tuple[rl.RewardModel, rl.RewardModel]] = {}

    def get(family: str):
        if family not in made:
            plain = rl.RewardModel(*tiny_model(family, seed=1, n_layers=4), name="model")
            module, tokenizer = tiny_model(family, seed=1, n_layers=4)
            paths = [plain.structure.final_norm, plain.structure.head]
            with second_device():
                blocks = list(module.get_submodule(plain.structure.blocks))[2:]
                spread(module, [*blocks, *(module.get_submodule(path) for path in paths)])
                made[family] = plain, rl.RewardModel(module, tokenizer, name="model")
        return made[family]

    return get


ACROSS = ("by head", "by neuron", "by token", "effects", "path effects", "gradient", "transfer")
# Not on the second device of these tests: it cannot follow a squeeze in place, which a vector times a matrix does.
UNABLE = ("ov",)


@pytest.mark.parametrize(
    "name",
    [name if name in ACROSS else pytest.param(name, marks=pytest.mark.full) for name in METHODS if name not in UNABLE],
)
def test_methods_on_two_devices(on_two_devices, name):
    plain, placed = on_two_devices("llama")
    assert placed.device == torch.device("cpu") and placed.like.device == DEVICE
    with second_device():
        compared(name, plain, placed, PAIRS[:1] if name in ACROSS else PAIRS)


@pytest.mark.full
@pytest.mark.parametrize("family", [family for family in STRUCTURES if family != "llama"])
@pytest.mark.parametrize("name", ["lens", "by head", "effects", "estimates", "by token"])
def test_families_on_two_devices(on_two_devices, family, name):
    with second_device():
        compared(name, *on_two_devices(family))


def test_the_second_device_refuses_to_be_mixed():
    with second_device():
        here = torch.ones(2, 3)
        there = here.to(DEVICE)
        assert there.device == DEVICE and there.cpu().device == here.device and float(there.sum()) == 6
        for mix in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here @ there.T):
            with pytest.raises(RuntimeError, match="same device"):
                mix()
