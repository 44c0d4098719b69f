"""Arguments of another type than a signature's: refused by name, in the house form, before any work."""

import inspect
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import reward_lens as rl
from families import TEXT_PAIRS, tiny_model
from reward_lens.arguments import checked_arguments

FUNCTIONS = [name for name in rl.__all__ if inspect.isfunction(getattr(rl, name))]


class Odd:
    """What no parameter takes."""


def typed(function: Callable) -> list[str]:
    hints = typing.get_type_hints(function)
    return [name for name, hint in hints.items() if name != "return" and hint not in (typing.Any, object)]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_parameter_of_every_public_function(name):
    function = getattr(rl, name)
    for parameter in typed(function):
        with pytest.raises(rl.DataError, match=f"`{parameter}` of `{name}`") as caught:
            function(**{parameter: Odd()})
        assert caught.value.found == "an object of type Odd"
        assert caught.value.expected and "reward_lens." not in caught.value.expected


@checked_arguments
def sample(
    rm: "rl.RewardModel | None" = None,
    ks: Sequence[int] | None = None,
    names: Sequence["str | rl.Site"] = (),
    weights: Mapping[str, float] | None = None,
    drawn: Iterable[int] = (),
    progress: Callable[[int, int], None] | None = None,
    vector: torch.Tensor | None = None,
    seed: int = 0,
    strength: float = 1.0,
    legacy: bool = False,
    mode: typing.Literal["zero", "mean"] | None = None,
):
    return list(drawn)


@pytest.mark.parametrize(
    "taken",
    [
        {"ks": [1, 2]}, {"ks": (np.int64(1),)}, {"ks": np.arange(3)}, {"ks": torch.arange(3)}, {"ks": pd.Series([1])},
        {"ks": range(3)}, {"ks": None}, {"ks": []}, {"names": pd.Index(["L0.attn"])}, 
        {"names": ["L0", rl.Site("mlp", 0)]},
        {"weights": {"a": 1, "b": np.float32(2)}}, {"progress": lambda *_: None}, {"progress": lambda done, of: None},
        {"vector": torch.zeros(3)}, {"seed": np.int32(3)}, {"seed": np.array(3)}, {"strength": 2},
        {"strength": np.float32(2)}, {"strength": torch.tensor(2.0)}, {"legacy": np.True_}, {"mode": "another"},
    ],
    ids=lambda given: ",".join(given) if isinstance(given, dict) else "",
)  # fmt: skip
def test_what_is_taken(taken):
    assert sample(**taken) == []


def test_the_function_gets_what_was_given():
    drawn = (n for n in (1, 2))
    assert sample(drawn=drawn) == [1, 2]  # not used up by the check
    assert sample(None, [3], drawn=iter([4])) == [4]


@checked_arguments
def handed(
    n: int = 0, x: float = 0.0, ks: Sequence[int] = (), at: "Sequence[str] | np.ndarray" = (), names: object = 0
):
    return {"n": n, "x": x, "ks": ks, "at": at, "names": names}


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ({"n": np.int64(3)}, 3), ({"n": torch.tensor(3)}, 3), ({"n": xr.DataArray(3)}, 3), ({"x": np.float32(2)}, 2.0),
        ({"ks": np.arange(3)}, [0, 1, 2]), ({"ks": torch.arange(3)}, [0, 1, 2]), ({"ks": pd.Series([4], [9])}, [4]),
        ({"ks": xr.DataArray([4])}, [4]), ({"at": pd.Index(["L0"])}, ["L0"]),
        ({"at": xr.DataArray(["L0", "L1"], dims="component")}, ["L0", "L1"]),
    ],
    ids=lambda given: ",".join(given) if isinstance(given, dict) else "",
)  # fmt: skip
def test_numbers_arrays_and_columns_become_pythons(given, plain):
    """Seeds are drawn from them and settings written to JSON: numpy's ended in a TypeError when the work was done."""
    (name,) = given
    taken = handed(**given)[name]
    assert taken == plain and type(taken) is type(plain)


def test_what_is_asked_for_as_an_array_stays_one():
    for name, value in {"at": np.array(["L0"]), "names": np.arange(3)}.items():
        assert handed(**{name: value})[name] is value


def test_a_class_in_place_of_a_value_is_refused():
    with pytest.raises(rl.DataError, match="`dtype` of `load`") as caught:
        rl.load("folder", dtype=np.float32)
    assert caught.value.found == "an object of type type"


@pytest.mark.parametrize(
    ("refused", "found", "do"),
    [
        ({"rm": "some/folder"}, "'some/folder', of type str", "rl.load('some/folder')"),
        ({"rm": Path("folder")}, "of type PosixPath", "rl.load('folder')"),
        ({"rm": torch.nn.Linear(2, 2)}, "an object of type Linear", "rl.RewardModel(model, tokenizer)"),
        ({"ks": 1}, "1, of type int", "help(rl.sample)"),
        ({"ks": [1, "a"]}, "a list of int and str", "help"),
        ({"ks": [*range(1000), 1.5]}, "a list of float and int", "help"),
        ({"ks": np.array([1.5])}, "an object of type ndarray", "help"),
        ({"names": {"L0"}}, "a set of str", "help"),
        ({"weights": {"a": "b"}}, "a dict of str", "help"),
        ({"weights": [1.0]}, "a list of float", "help"),
        ({"progress": 3}, "3, of type int", "help"),
        ({"progress": lambda done: None}, "an object of type function", "help"),
        ({"vector": [1.0]}, "a list of float", "help"),
        ({"seed": 1.5}, "1.5, of type float", "help"),
        ({"seed": None}, "None", "help"),
        ({"strength": "2"}, "'2', of type str", "help"),
        ({"legacy": "no"}, "'no', of type str", "help"),
        ({"mode": 3}, "3, of type int", "help"),
    ],
    ids=lambda given: ",".join(given) if isinstance(given, dict) else "",
)  # fmt: skip
def test_what_is_refused(refused, found, do):
    with pytest.raises(rl.DataError, match="does not take") as caught:
        sample(**refused)
    assert found in caught.value.found and do in caught.value.do


def test_by_position_too():
    with pytest.raises(rl.DataError, match="`rm` of `contributions`"):
        rl.contributions("folder", [])
    ranked = rl.Result("contributions", xr.DataArray([1.0], dims="component", coords={"component": ["embed"]}), unit="")
    with pytest.raises(rl.DataError, match="`n` of `Result.top`"):
        ranked.top(1.5)


GONE_OVER_ONCE = {
    "lens": rl.reward_lens, "contributions": rl.contributions, "integrated": rl.integrated_contributions,
    "tuned": lambda rm, pairs: rl.tuned_lens(rm, (rl.Pair(f"Say {i}", "a", "b") for i in range(25)), pairs),
}  # fmt: skip


@pytest.mark.parametrize("name", GONE_OVER_ONCE)
def test_pairs_may_come_from_a_generator(name):
    rm, method = rl.RewardModel(*tiny_model("llama")), GONE_OVER_ONCE[name]
    pairs = [rl.Pair(*texts) for texts in TEXT_PAIRS]
    assert method(rm, (pair for pair in pairs)).value.identical(method(rm, pairs).value)


@pytest.mark.parametrize(
    ("call", "parameter"),
    [
        (lambda rm: rl.capture(rm, 3), "texts_or_pairs"), (lambda rm: rl.capture(rm, [("a", "b")], 3), "sites"),
        (lambda rm: rl.linear_probes(rm, None, "words"), "texts"), (lambda rm: rl.ranking(rm, None), "groups"),
        (lambda rm: rl.golden_scores(rm, 3), "entries"),
    ],
)  # fmt: skip
def test_what_is_no_list_is_refused(call, parameter):
    with pytest.raises(rl.DataError, match=f"`{parameter}` of"):
        call(rl.RewardModel(*tiny_model("llama")))


def test_a_site_that_is_no_text_is_refused():
    with pytest.raises(rl.StructureError, match="Found: 3"):
        rl.capture(rl.RewardModel(*tiny_model("llama")), [("a", "b")], [3])
