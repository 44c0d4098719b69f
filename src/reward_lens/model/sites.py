"""A place in the forward pass that can be read or changed, and how it is written: ``"L3.attn"``, ``"L3.H5"``."""

import dataclasses
import re

from reward_lens.errors import StructureError

KINDS = (
    "embed", "resid_pre", "resid_mid", "resid_post", "attn", "mlp",
    "head", "q", "k", "v", "pattern", "neuron", "latent", "router", "expert",
)  # fmt: skip
_INDEXED = {"head": "H", "neuron": "N", "q": "Q", "k": "K", "v": "V", "pattern": "P", "latent": "F",
            "router": "R", "expert": "E"}  # fmt: skip
_LETTER = {letter: kind for kind, letter in _INDEXED.items()}


@dataclasses.dataclass(frozen=True, order=True)
class Site:
    """`kind` in `KINDS`, the `layer` (0-based; None for `embed`), and for heads, neurons and the like an `index`.

    A head or neuron site without an index means all of them at once. `router` is the weight with which an expert's
    output enters the MLP's (0 where it is not chosen), `expert` what it adds, that weight included.
    """

    kind: str
    layer: int | None = None
    index: int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise _unknown(f"kind {self.kind!r}")
        if (self.layer is None) != (self.kind == "embed"):
            raise _unknown(f"kind {self.kind!r} with layer {self.layer}")
        if self.index is not None and self.kind not in _INDEXED:
            raise _unknown(f"kind {self.kind!r} with index {self.index}")

    @property
    def block(self) -> int:
        """Index of the block the site is in; `embed` is what enters block 0."""
        return self.layer or 0

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """`Site` from its written form."""
        if isinstance(text, Site):
            return text
        if text == "embed":
            return cls("embed")
        if match := re.fullmatch(r"L(\d+)\.([A-Z])(\d+)", str(text)):
            layer, letter, index = match.groups()
            if letter in _LETTER:
                return cls(_LETTER[letter], int(layer), int(index))
        elif match := re.fullmatch(r"L(\d+)\.([a-z_]+)", str(text)):
            if match[2] in KINDS and match[2] != "embed":
                return cls(match[2], int(match[1]))
        raise _unknown(repr(text))

    def __str__(self) -> str:
        if self.kind == "embed":
            return "embed"
        if self.index is None:
            return f"L{self.layer}.{self.kind}"
        return f"L{self.layer}.{_INDEXED[self.kind]}{self.index}"


def _unknown(what: str) -> StructureError:
    return StructureError(
        "A site could not be understood",
        found=what,
        expected="'embed', 'L3.attn', 'L3.mlp', 'L3.resid_pre', 'L3.H5' (head), 'L3.N17' (neuron), 'L3.R2' (weight of "
        "an expert) and the like",
        do="write the site in one of these forms, or pass Site(kind, layer, index)",
    )
