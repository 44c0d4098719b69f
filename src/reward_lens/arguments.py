"""Whether the arguments of a public function are of the types in its signature, asked before any work is done.

A name in place of a loaded model, or a number in place of a list, would otherwise end in an error of Python's from deep
inside a run, or in none. Numbers of numpy's, and arrays, tensors and columns that are not asked for as such, reach the
function as Python's numbers and lists, which it can write down and draw seeds from; all else as it was given. Which
words an option takes is left to the function, whose message lists them.
"""

import functools
import inspect
import numbers
import re
import reprlib
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from typeguard import CollectionCheckStrategy, TypeCheckError, check_type

from reward_lens.errors import DataError

P = ParamSpec("P")
R = TypeVar("R")
LOADERS = {
    "RewardModel": "load", "LanguageModel": "load_language_model", "Result": "load_result",
    "SAE": "SAE.load", "Crosscoder": "Crosscoder.load",
}  # fmt: skip
WIDER = {int: numbers.Integral, float: numbers.Real}
MODULES = re.compile(r"\b(collections\.abc|typing|pathlib|reward_lens|rl)\.([a-z_]+\.)*")
OF_MANY: tuple[Any, ...] = (Sequence, Mapping)


def checked_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, which first refuses arguments that its annotations do not admit: DataError names the parameter."""
    names = list(inspect.signature(function).parameters)
    run: Callable[..., R] = function

    @functools.cache
    def admitted() -> dict[str, Any]:  # at the first call: an annotation may name what its module has below
        return {name: _admitted(hint) for name, hint in typing.get_type_hints(function).items()}

    def taken(name: str, value: Any) -> Any:
        hint = admitted().get(name, Any)
        for form in _forms(value):
            if _is_of(form, hint):
                return form
        raise _refusal(function, name, value)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        named = [taken(name, value) for name, value in zip(names, args, strict=False)]
        return run(*named, *args[len(names) :], **{name: taken(name, value) for name, value in kwargs.items()})

    return checked


def _admitted(hint: Any, inside: bool = False) -> Any:
    """What a hint admits: whatever is of a word's type for an option; inside a list any integer or real number."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return typing.Union[tuple(type(word) for word in inner)]  # noqa: UP007
    if origin in (typing.Union, types.UnionType):
        return typing.Union[tuple(_admitted(one, inside) for one in inner)]  # noqa: UP007
    if origin in OF_MANY:
        return origin[tuple(_admitted(one, inside=True) for one in inner)]
    return WIDER.get(hint, hint) if inside and isinstance(hint, type) else hint


def _forms(value: Any) -> Iterator[Any]:
    """A value, then the same in Python's own types where it can say what it is in these."""
    yield value
    if not isinstance(value, type):
        array = value.to_numpy() if hasattr(value, "to_numpy") else value
        if hasattr(array, "tolist"):
            yield array.tolist()


def _is_of(value: Any, hint: Any) -> bool:
    if type(value) is hint:
        return True
    try:
        check_type(value, hint, collection_check_strategy=CollectionCheckStrategy.ALL_ITEMS)
    except TypeCheckError:
        return False
    return True


def _refusal(function: Callable, name: str, value: Any) -> DataError:
    hint = inspect.formatannotation(inspect.signature(function).parameters[name].annotation)
    hint = MODULES.sub("", hint).strip("'")
    do = f"see help(rl.{function.__qualname__})"
    loader = next((LOADERS[kind] for kind in hint.split(" | ") if kind in LOADERS), None)
    if loader and isinstance(value, str | Path):
        do = f"load it first: rl.{loader}({str(value)!r})"
    elif loader == "load":
        do = "give what rl.load(folder) returns, or rl.RewardModel(model, tokenizer) for a model in memory"
    return DataError(
        f"`{name}` of `{function.__qualname__}` is of a type that it does not take",
        found=_shown(value),
        expected=hint,
        do=do,
    )


def _shown(value: Any) -> str:
    kind = type(value).__name__
    if isinstance(value, list | tuple | set | frozenset | dict):
        inside = sorted({type(one).__name__ for one in (value.values() if isinstance(value, dict) else value)})
        return f"a {kind} of {' and '.join(inside)}" if inside else f"an empty {kind}"
    if isinstance(value, str | bytes | Path | numbers.Number):
        return f"{reprlib.repr(value)}, of type {kind}"
    return "None" if value is None else f"an object of type {kind}"
