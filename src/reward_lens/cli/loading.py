"""How a command loads its model: the options every such command has, and the readouts they name."""

import dataclasses
import inspect
import json
import logging
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

import reward_lens as rl

PANEL = "Loading the model"
MODELS = {"model", "models", "policy"}


def _option(help: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=PANEL, **settings)


@dataclasses.dataclass(frozen=True)
class Loading:
    """The settings of `rl.load` that a command line gives."""

    device: Annotated[
        str | None,
        _option("'cpu', 'cuda', 'cuda:1', ...; default: a CUDA device if there is one.", envvar="REWARD_LENS_DEVICE"),
    ] = None
    device_map: Annotated[str | None, _option("'auto' spreads a model over the devices there are.")] = None
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None, _option("Precision of the trunk; default: the checkpoint's.")
    ] = None
    attn_implementation: Annotated[
        str | None,
        _option("Code of the attention: 'eager', 'sdpa', 'flash_attention_2', ...; default: what transformers picks."),
    ] = None
    model_revision: Annotated[str | None, _option("Branch, tag or commit of a hub id.")] = None
    readout: Annotated[
        str | None,
        _option("Where no head gives the reward: " + ", ".join(rl.STEP_READOUTS) + ", or fields of a VocabReadout or "
                "StepReadout as JSON, or a file of them."),
    ] = None  # fmt: skip
    trust_remote_code: Annotated[
        bool, _option("Run the checkpoint's own code. Read it first.", "--trust-remote-code")
    ] = False

    def settings(self) -> dict[str, Any]:
        """As keyword arguments of `rl.load` and `rl.load_language_model`, the readout apart."""
        import torch  # not at the top: it takes longer to import than --help to print

        device = self.device
        if device is None and self.device_map is None:
            device = "cuda" if torch.cuda.is_available() else None
        dtype = None if self.dtype is None else getattr(torch, self.dtype)
        return {
            "device": device, "device_map": self.device_map, "dtype": dtype, "revision": self.model_revision,
            "attn_implementation": self.attn_implementation, "trust_remote_code": self.trust_remote_code,
        }  # fmt: skip


given: ContextVar[Loading] = ContextVar("given")


def with_loading(command: Callable, run: Callable) -> Callable:
    """`run`, which has `command`'s parameters, with the options of `Loading` added where the command loads a model."""
    parameters = inspect.signature(command).parameters
    if not MODELS & set(parameters):
        return run
    hints = get_type_hints(Loading, include_extras=True)
    added = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default,
                          annotation=hints[field.name])
        for field in dataclasses.fields(Loading)
    ]  # fmt: skip

    def loading(*args: Any, **kwargs: Any) -> Any:
        token = given.set(Loading(**{name: kwargs.pop(name) for name in hints}))
        try:
            return run(*args, **kwargs)
        finally:
            given.reset(token)

    everything: Any = loading
    everything.__name__, everything.__doc__ = command.__name__, command.__doc__
    everything.__signature__ = inspect.Signature([*parameters.values(), *added])
    everything.__annotations__ = get_type_hints(command, include_extras=True) | hints
    return everything


def quietly() -> None:
    """Keep transformers' own progress and advice off the terminal."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("torchao").setLevel(logging.ERROR)


def readout_of(text: str | None) -> "rl.VocabReadout | rl.StepReadout | None":
    """The readout that `--readout` names or describes; a `DataError` says what was not understood."""
    if text is None or text in rl.STEP_READOUTS:
        return None if text is None else rl.STEP_READOUTS[text]
    try:
        fields = json.loads(text if text.lstrip().startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _not_understood(text, f"{type(error).__name__}: {error}") from error
    if not isinstance(fields, Mapping):
        raise _not_understood(text, f"JSON that is no object: {fields!r}")
    kind = rl.StepReadout if "marker" in fields else rl.VocabReadout
    known = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(fields) - known)
    if unknown or "positive" not in fields:
        found = f"unknown fields {', '.join(unknown)}" if unknown else "no field 'positive'"
        raise _not_understood(text, f"{found}; {kind.__name__} has {', '.join(sorted(known))}")
    return kind(**{str(name): value for name, value in fields.items()})


def _not_understood(text: str, found: str) -> "rl.DataError":
    return rl.DataError(
        f"The readout {text!r} was not understood",
        found=found,
        expected=f"one of {', '.join(rl.STEP_READOUTS)}, a JSON object, or a file with one",
        do='write it as \'{"positive": " Yes", "negative": " No"}\' (VocabReadout), with "marker" for a StepReadout',
    )
