"""Which annotations of the package are checked while tests run, and by what.

jaxtyping's import hook wraps every function, those that are defined anew inside others at every call too, and binds
every call's arguments by `inspect`: more than half of the suite's time. So it checks what only it can, shapes, and what
beartype alone cannot resolve, names imported for type checkers; beartype checks the other functions of modules and
classes; a function inside another one is checked if it names shapes.
"""

import dataclasses
import functools
import inspect
import types

import jaxtyping
from beartype import beartype

_jaxtyped = jaxtyping.jaxtyped


def checked(fn=None, *, typechecker):
    """What the import hook finds as `jaxtyping.jaxtyped` and decorates with."""
    if fn is None:
        return functools.partial(checked, typechecker=typechecker)
    if inspect.isclass(fn):
        if dataclasses.is_dataclass(fn):
            fn.__init__ = checked(fn.__init__, typechecker=typechecker)
        return fn
    if isinstance(fn, types.FunctionType):
        hints = repr(fn.__annotations__)
        quoted = "ForwardRef" in hints or any(isinstance(hint, str) for hint in fn.__annotations__.values())
        if "jaxtyping" not in hints and not ("Tensor, " in hints or "ndarray, " in hints):
            if "<locals>" in fn.__qualname__:
                return fn
            if not quoted:
                return beartype(fn)
    return _jaxtyped(fn, typechecker=typechecker)


jaxtyping.jaxtyped = checked
