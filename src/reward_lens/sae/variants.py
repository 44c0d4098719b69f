"""Which latents are kept, and a backward pass that costs what was kept.

    topk         the k largest of every sample
    batchtopk    the k * batch largest of the batch; at inference a threshold, the running mean of the smallest one kept
    matryoshka   as batchtopk, with a reconstruction from every prefix of the latents
    jumprelu     what is over a learned threshold; its gradient is estimated in a window around it

The encoder's product is dense. Everything behind the selection touches the kept entries alone: the sums over rows of
the decoder (forward) and over samples (backward) are weighted bags. On CPU at width 4,096 and k = 32 decoding took a
tenth of the dense products' time, at width 64 as much as these. JumpReLU is dense: its window reaches beyond what is
kept.

Reference: Gao et al. 2024, arXiv 2406.04093; Bussmann et al. 2024, arXiv 2412.06410 (BatchTopK); Bussmann et al. 2025,
arXiv 2503.17547 (Matryoshka); Rajamanoharan et al. 2024, arXiv 2407.14435 (the window).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

VARIANTS = ("batchtopk", "topk", "jumprelu", "matryoshka")


class Net(torch.nn.Module):
    """The weights in training: rows of `enc` [d_sae, d_in] and `dec` [d_sae, d_out] are latents."""

    threshold: torch.nn.Parameter | None
    skip: torch.nn.Parameter | None

    def __init__(self, enc: Tensor, dec: Tensor, b_dec: Tensor, *, jumps: bool, skip: bool, centred: bool):
        super().__init__()
        self.centred = centred
        self.enc, self.dec = torch.nn.Parameter(enc), torch.nn.Parameter(dec)
        self.b_enc = torch.nn.Parameter(enc.new_zeros(len(enc)))
        self.b_dec = torch.nn.Parameter(b_dec)
        self.register_parameter("threshold", torch.nn.Parameter(enc.new_zeros(len(enc))) if jumps else None)
        matrix = torch.nn.Parameter(enc.new_zeros(dec.shape[1], enc.shape[1])) if skip else None
        self.register_parameter("skip", matrix)

    def centre(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_in"]:
        return x - self.b_dec if self.centred else x


class Entries(NamedTuple):
    """The kept cells of a [batch, d_sae] table, sorted by sample."""

    rows: Tensor
    cols: Tensor
    of_row: Tensor
    """Where the entries of every sample begin."""
    by_col: Tensor
    """Order that sorts the entries by latent."""
    of_col: Tensor
    """Where, in that order, the entries of every latent begin."""


class Pass(NamedTuple):
    """One forward pass of a batch."""

    parts: list[Tensor]
    """Reconstructions [batch, d_out]; the last one is from all latents."""
    fired: Tensor
    """Which latents were active at all, bool [d_sae]."""
    active: Tensor
    """Mean number of active latents of a sample; for JumpReLU with a gradient to the threshold."""
    lowest: Tensor | None
    """The smallest activation kept (BatchTopK)."""


def forward(
    net: Net,
    x: Float[Tensor, "batch d_in"],
    variant: str,
    k: int,
    prefixes: Sequence[int],
    level: float,
    width: float,
    dtype: torch.dtype,
) -> Pass:
    """Encode, select, decode. `level`: about where the smallest kept entry lies; `width`: JumpReLU's window."""
    base = net.b_dec if net.skip is None else net.b_dec + F.linear(x, net.skip)
    if variant == "jumprelu":
        pre = product(net.centre(x), net.enc, dtype) + net.b_enc
        z, active = _Jump.apply(pre, net.threshold, width)  # type: ignore[reportGeneralTypeIssues]
        return Pass([product(z, net.dec.T, dtype) + base], (z > 0).any(0), active.mean(), None)
    with torch.no_grad():
        centred = net.centre(x)
        pre = product(centred, net.enc, dtype) + net.b_enc
        entries = topk_entries(pre, k) if variant == "topk" else batchtopk_entries(pre, k, level)
    values = _Selected.apply(pre, centred, net.enc, net.b_enc, net.b_dec if net.centred else None, entries)
    values = F.relu(values)  # type: ignore[reportArgumentType]
    on = values.detach() > 0
    fired = torch.zeros_like(net.b_enc, dtype=torch.bool)
    fired[entries.cols[on]] = True
    lowest = None if variant == "topk" or not on.any() else values.detach().min()
    parts, before, total = [], 0, base
    for upto in prefixes if variant == "matryoshka" else (len(net.enc),):
        inside, held = entries, values
        if (before, upto) != (0, len(net.enc)):
            keep = (entries.cols >= before) & (entries.cols < upto)
            inside, held = _entries(entries.rows[keep], entries.cols[keep], pre.shape), values[keep]
        total = total + _decoded(net.dec, held, inside)
        parts.append(total)
        before = upto
    return Pass(parts, fired, on.sum() / len(x), lowest)


def product(x: Float[Tensor, "n d"], rows: Float[Tensor, "m d"], dtype: torch.dtype) -> Float[Tensor, "n m"]:
    """x rows^T, computed in `dtype`, in float32."""
    return F.linear(x.to(dtype), rows.to(dtype)).float()


def topk_entries(pre: Float[Tensor, "batch d_sae"], k: int) -> Entries:
    """The k largest cells of every row."""
    cols = pre.topk(k, dim=1, sorted=False).indices
    rows = torch.arange(len(pre), device=pre.device).repeat_interleave(k)
    return _entries(rows, cols.flatten(), pre.shape)


def batchtopk_entries(pre: Float[Tensor, "batch d_sae"], k: int, level: float) -> Entries:
    """The k * batch largest positive cells.

    Cells under half of `level` are left out of the search if enough others remain: the same cells, found sooner.
    """
    flat, wanted = pre.flatten(), k * len(pre)
    found = (flat > level / 2).nonzero().squeeze(1)
    if len(found) < wanted and level > 0:
        found = (flat > 0).nonzero().squeeze(1)
    if len(found) > wanted:
        found = found[flat[found].topk(wanted, sorted=False).indices]
    found = found.sort().values
    return _entries(found // pre.shape[1], found % pre.shape[1], pre.shape)


def _entries(rows: Tensor, cols: Tensor, shape: torch.Size) -> Entries:
    of_row, of_col = (_starts(index, n) for index, n in zip((rows, cols), shape, strict=True))
    return Entries(rows, cols, of_row, torch.argsort(cols, stable=True), of_col)


def _starts(index: Tensor, n: int) -> Tensor:
    counts = torch.bincount(index, minlength=n)
    return counts.cumsum(0) - counts


def _bag(table: Tensor, index: Tensor, starts: Tensor, weights: Tensor) -> Tensor:
    """Weighted sums of rows of a table, one for every start."""
    return F.embedding_bag(index, table, starts, mode="sum", per_sample_weights=weights)


class _Selected(torch.autograd.Function):
    """Kept cells of the pre-activations, which were computed without a graph; the gradient goes to the weights."""

    @staticmethod
    def forward(ctx, pre, centred, enc, b_enc, b_dec, entries):
        ctx.save_for_backward(centred, enc)
        ctx.entries, ctx.has_b_dec = entries, b_dec is not None
        return pre[entries.rows, entries.cols]

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        centred, enc = ctx.saved_tensors
        at: Entries = ctx.entries
        g_enc = _bag(centred, at.rows[at.by_col], at.of_col, g[at.by_col])
        g_bias = torch.zeros_like(enc[:, 0]).index_add_(0, at.cols, g)
        return None, None, g_enc, g_bias, -(g_bias @ enc) if ctx.has_b_dec else None, None


class _WithRows(torch.autograd.Function):
    """Bags of `dec`, unchanged, with the gradient of its rows; torch's own is three times slower on CPU."""

    @staticmethod
    def forward(ctx, bags, dec, values, entries):
        ctx.save_for_backward(values)
        ctx.entries = entries
        return bags.view_as(bags)

    @staticmethod
    def backward(ctx, *grads):
        (g,) = grads
        (values,), at = ctx.saved_tensors, ctx.entries
        return g, _bag(g.contiguous(), at.rows[at.by_col], at.of_col, values[at.by_col]), None, None


def _decoded(dec: Tensor, values: Tensor, entries: Entries) -> Tensor:
    bags = _bag(dec.detach(), entries.cols, entries.of_row, values)
    return _WithRows.apply(bags, dec, values.detach(), entries)  # type: ignore[reportReturnType]


class _Jump(torch.autograd.Function):
    """Values over the threshold and their number a sample; the threshold's gradient from a window around it."""

    @staticmethod
    def forward(ctx, pre, threshold, width):
        over = pre > threshold
        ctx.save_for_backward(pre, threshold)
        ctx.width = width
        return pre * over, over.sum(1).to(pre.dtype)

    @staticmethod
    def backward(ctx, *grads):
        g_z, g_active = grads
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.width / 2) / ctx.width
        return g_z * (pre > threshold), -(near * (threshold * g_z + g_active[:, None])).sum(0), None
