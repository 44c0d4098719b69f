"""`Crosscoder`: one set of latents that is read from, and written to, the activations of several models.

    z    = act(sum_m (x_m - b_m) W_enc_m + b_enc)        act keeps what is over the threshold
    x^_m = z W_dec_m + b_m

A latent is one cause of what two or more models show at the same position of the same text; the norms of its decoder
rows say in which of them it has an effect. They are compared in the unit of each model's own spread, n_mj =
s_m |W_dec_m[j]| with 1 / s_m the root of model m's total variance, so that a model of large activations does not count
for more.

What it cannot show: that a latent is absent from a model because its row is small there. A training can shrink a row
that the model does have (complete shrinkage) or split it off into another latent (latent decoupling); see
`crosscoder_latents` for the measures that tell these apart.

Reference: Lindsey et al. 2024, "Sparse crosscoders for cross-layer features and model diffing"; Minder et al. 2025,
arXiv 2504.02922.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from reward_lens.errors import DataError, LoadError
from reward_lens.sae.files import as_json

FILE = "crosscoder.safetensors"
_FORMAT = "reward-lens crosscoder 1"
_SHARED, _OF_MODEL = ("b_enc", "threshold", "scale"), ("W_enc", "W_dec", "b_dec")


class Crosscoder(torch.nn.Module):
    """A frozen crosscoder; `encode`, `decode`, and `crosscoder(*xs)` for both.

    Parameters
    ----------
    W_enc, W_dec, b_dec: of every model [d_m, d_sae], [d_sae, d_m], [d_m].
    b_enc, threshold: [d_sae]; a latent is active where it is over its threshold.
    scale: [model] s_m, what decoder rows are compared in; None: 1.
    names, sites: of every model; None where unknown. meta: what it was trained on and how; JSON-able.

    Gradients pass through to the activations, never into the weights. Raises `DataError` for weights that do not fit
    together or are not finite.
    """

    b_enc: torch.nn.Parameter
    threshold: torch.nn.Parameter
    scale: torch.nn.Parameter

    def __init__(
        self,
        W_enc: Iterable[Tensor],
        b_enc: Float[Tensor, "..."],
        W_dec: Iterable[Tensor],
        b_dec: Iterable[Tensor],
        *,
        threshold: Float[Tensor, "..."],
        scale: Float[Tensor, "..."] | None = None,
        names: Sequence[str | None] | None = None,
        sites: Sequence[str | None] | None = None,
        meta: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        W_enc, W_dec, b_dec = list(W_enc), list(W_dec), list(b_dec)
        n = len(W_enc)
        scale = torch.ones(n) if scale is None else scale
        self.names, self.sites = tuple(names or [None] * n), tuple(sites or [None] * n)
        self.meta = dict(meta or {})
        _require_fit(W_enc, b_enc, W_dec, b_dec, threshold, scale, self.names, self.sites)
        self.W_enc, self.W_dec, self.b_dec = (_held(several) for several in (W_enc, W_dec, b_dec))
        for name, tensor in zip(_SHARED, (b_enc, threshold, scale), strict=True):
            self.register_parameter(name, torch.nn.Parameter(tensor.detach().contiguous(), requires_grad=False))

    @property
    def n_models(self) -> int:
        """Number of models."""
        return len(self.W_enc)

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of every model's activations."""
        return tuple(w.shape[0] for w in self.W_enc)

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.b_enc)

    def encode(self, *xs: Float[Tensor, "..."]) -> Float[Tensor, "*batch d_sae"]:
        """Latents of the models' activations at the same positions of the same texts.

        `xs`: one tensor [*batch, d_m] a model, in the crosscoder's order. Returns z [*batch, d_sae], none negative.
        Raises `DataError` for another number of models, other widths or unequal shapes.
        """
        widths = tuple(x.shape[-1] for x in xs)
        if widths != self.widths or len({x.shape[:-1] for x in xs}) != 1:
            raise DataError(
                "The activations do not fit the crosscoder",
                found=", ".join(str(list(x.shape)) for x in xs) or "none",
                expected=f"{self.n_models} tensors of one shape but for the last dimension: {self.widths}",
                do="give the activations of every model at the same positions, in the order it was trained in",
            )
        pre = self.b_enc
        for x, w, b in zip(xs, self.W_enc, self.b_dec, strict=True):
            pre = pre + (x.to(w) - b) @ w
        return torch.where(pre > self.threshold, pre, 0.0)

    def decode(self, z: Float[Tensor, "*batch d_sae"]) -> tuple[Tensor, ...]:
        """Activations that latents stand for. Returns a tuple of [*batch, d_m], one a model."""
        return tuple(z @ w + b for w, b in zip(self.W_dec, self.b_dec, strict=True))

    def forward(self, *xs: Float[Tensor, "..."]) -> tuple[Tensor, ...]:
        """The reconstructions. Returns `decode(encode(*xs))`."""
        return self.decode(self.encode(*xs))

    @property
    def norms(self) -> Float[Tensor, "model d_sae"]:
        """n_mj = s_m |W_dec_m[j]| [model, d_sae]."""
        return torch.stack([w.norm(dim=1) * s for w, s in zip(self.W_dec, self.scale, strict=True)])

    @property
    def delta(self) -> Float[Tensor, " d_sae"]:
        """Relative decoder norm n_2j / (n_1j + n_2j) [d_sae]: 0 in the first model only, 1 in the second only.

        NaN for a latent without any decoder row. Raises `DataError` for other than two models.
        """
        self._require_two()
        first, second = self.norms
        return second / (first + second)

    @property
    def cosine(self) -> Float[Tensor, " d_sae"]:
        """Cosine of the two decoder rows [d_sae]; NaN where a row is zero or the models' widths differ.

        Means something only where one model is a version of the other: else their axes are unrelated. Raises
        `DataError` for other than two models.
        """
        self._require_two()
        first, second = self.W_dec
        if first.shape != second.shape:
            return torch.full_like(self.b_enc, torch.nan)
        return (first * second).sum(1) / (first.norm(dim=1) * second.norm(dim=1))

    def save(self, folder: str | Path) -> Path:
        """Write `crosscoder.safetensors`: the weights, and names, sites and meta as text. Returns the folder."""
        folder = Path(folder)
        about = as_json({"names": self.names, "sites": self.sites, "meta": self.meta})
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: getattr(self, name) for name in _SHARED}
        tensors |= {f"{name}.{m}": w for name in _OF_MODEL for m, w in enumerate(getattr(self, name))}
        flat = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}  # no two of one memory
        save_file(flat, folder / FILE, metadata={"format": _FORMAT, "about": about})
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> "Crosscoder":
        """Read what `save` wrote. Returns a `Crosscoder`; raises `LoadError` for anything else."""
        path = Path(folder) / FILE
        try:
            with safe_open(path, framework="pt") as file:
                head = file.metadata() or {}
                held = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, str(error)) from error
        if head.get("format") != _FORMAT:
            raise _unreadable(path, f"format {head.get('format')!r}")
        about = json.loads(head["about"])
        n = len(about["names"])
        try:
            W_enc, W_dec, b_dec = ([held[f"{name}.{m}"] for m in range(n)] for name in _OF_MODEL)
            return cls(W_enc, held["b_enc"], W_dec, b_dec, threshold=held["threshold"], scale=held["scale"], **about)
        except (KeyError, DataError) as error:
            raise _unreadable(path, f"weights that lack or do not fit: {error}") from error

    def __repr__(self) -> str:
        of = ", ".join(f"{name or 'a model'} [{width}]" for name, width in zip(self.names, self.widths, strict=True))
        return f"<Crosscoder {self.d_sae} latents of {of}>"

    def _require_two(self) -> None:
        if self.n_models != 2:
            raise DataError("Two models are compared by their decoder rows", found=f"{self.n_models} models",
                            expected="a crosscoder of two", do="read `norms` for more")  # fmt: skip


def _held(several: Sequence[Tensor]) -> torch.nn.ParameterList:
    return torch.nn.ParameterList(torch.nn.Parameter(t.detach().contiguous(), requires_grad=False) for t in several)


def _require_fit(W_enc, b_enc, W_dec, b_dec, threshold, scale, names, sites) -> None:
    n, d_sae = len(W_enc), len(b_enc)
    wrong = [] if n > 1 else [f"{n} model(s)"]
    counts = {"W_dec": W_dec, "b_dec": b_dec, "scale": scale, "names": names, "sites": sites}
    wrong += [f"{len(value)} of {name} for {n} models" for name, value in counts.items() if len(value) != n]
    for m, (enc, dec, bias) in enumerate(zip(W_enc, W_dec, b_dec, strict=False)):
        width = enc.shape[0]
        shapes = {"W_enc": (enc, (width, d_sae)), "W_dec": (dec, (d_sae, width)), "b_dec": (bias, (width,))}
        wrong += [f"{name} {list(t.shape)} of model {m}" for name, (t, to) in shapes.items() if t.shape != to]
    shared = {"b_enc": (b_enc, (d_sae,)), "scale": (scale, (len(scale),))}
    wrong += [f"{name} {list(t.shape)}" for name, (t, to) in shared.items() if t.shape != to]
    every = [*W_enc, *W_dec, *b_dec, b_enc, threshold, scale]
    wrong += ["NaN or infinity"] if not all(bool(t.isfinite().all()) for t in every) else []
    if threshold.shape != (d_sae,) or bool((threshold < 0).any()):
        wrong.append(f"threshold {list(threshold.shape)}" + (" with a negative one" if (threshold < 0).any() else ""))
    wrong += ["a scale that is not positive"] if not bool((scale > 0).all()) else []
    if wrong:
        raise DataError(
            "The weights do not make a crosscoder",
            found="; ".join(wrong),
            expected="of two or more models finite W_enc [d_m, d_sae], W_dec [d_sae, d_m], b_dec [d_m]; b_enc and a "
            "threshold [d_sae] that is not negative; a positive scale a model",
            do="check which weight is which, and its orientation",
        )


def _unreadable(path: Path, found: str) -> LoadError:
    return LoadError(f"The crosscoder {path} cannot be read", found=found, expected=f"a file of {_FORMAT!r}",
                     do="pass the folder that Crosscoder.save wrote")  # fmt: skip
