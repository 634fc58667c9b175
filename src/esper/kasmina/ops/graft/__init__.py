"""Graft: add the branches of many seeds that read and write their own columns of a site's output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from esper.kasmina.ops import dispatch
from esper.kasmina.ops.graft import reference

LARGEST = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
"""Most columns or hidden units a seed may have in the kernels: more do not fit a program's registers, and dense matrix
products take over. Its keys are the types the kernels are for."""
WHOLE_RUNS = 16
"""Columns of a group of seeds, at least."""
_COPIED_RUNS = 4
"""Shorter runs make the kernels copy in pieces that are slower than a copy of its own."""
_INTERPRETED_DTYPES = (torch.float32,)
"""Triton's interpreter multiplies half-precision numbers wrongly."""


@dataclass(frozen=True)
class Seats:
    """Where the seeds of a bank sit.

    Attributes
    ----------
    columns:
        ``(S, K)`` int32: the feature columns of each seed; no column belongs to two.
    flat:
        The same ``(S*K,)`` int64.
    own:
        ``(S, K)`` int32: the numbers 0 to ``S*K - 1``, the columns of a copy of what the seeds read.
    whole:
        Whether the seeds cover all features.
    rising:
        Whether the columns rise from each to the next, in runs of four or more: the kernels can copy what lies between.
    runs, own_runs:
        How many neighbours ``columns`` (``own``) fall into: ``WHOLE_RUNS`` where whole groups of seeds are runs that
        start at a multiple of 8 (read and written 16 bytes at a time), else 8, 4 or 2 where each seed is made of such
        runs that start at a multiple of their length, else 1.
    """

    columns: Tensor
    flat: Tensor
    own: Tensor
    whole: bool
    runs: int
    own_runs: int
    rising: bool = False

    @classmethod
    def of(cls, columns: Tensor, num_features: int, device: torch.device) -> Seats:
        """From ``columns (S, K)`` on the CPU."""
        columns = columns.to(torch.int32).contiguous()
        own = torch.arange(columns.numel(), dtype=torch.int32).view(columns.shape)
        flat, runs = columns.reshape(-1), _run_length(columns)
        fits = runs >= _COPIED_RUNS and num_features % min(runs, 8) == 0
        rising = fits and bool((flat[1:] > flat[:-1]).all())
        return cls(
            columns.to(device), flat.long().to(device), own.to(device), columns.numel() == num_features, runs,
            _run_length(own), rising,
        )  # fmt: skip


def _run_length(columns: Tensor) -> int:
    width = columns.shape[1]
    length = max(WHOLE_RUNS, width)
    if columns.numel() % length == 0 and length % width == 0 and _are_runs(columns, length, 8):
        return WHOLE_RUNS
    return next((size for size in (8, 4, 2) if width % size == 0 and _are_runs(columns, size, size)), 1)


def _are_runs(columns: Tensor, length: int, multiple: int) -> bool:
    """Whether every ``length`` columns are neighbours, the first at a multiple of ``multiple``."""
    runs = columns.reshape(-1, length)
    return bool((runs == runs[:, :1] + torch.arange(length)).all()) and not bool((runs[:, 0] % multiple).any())


def graft(
    y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, seats: Seats, *, writable: bool = False
) -> Tensor:
    """``y[..., c_s] + alpha_s * W2_s silu(W1_s y[..., c_s] + b1_s)`` for every seed s, its columns being ``c_s``.

    Parameters
    ----------
    y:
        ``(..., F)``.
    w1, b1, w2, alpha:
        ``(S, H, K)``, ``(S, H)``, ``(S, K, H)``, ``(S,)``, fp32.
    writable:
        The caller gives ``y`` up: its memory may be used for the result, which saves two passes over it. Whoever has
        saved ``y`` for a backward pass then gets autograd's error, not a wrong gradient.
    """
    compiling = torch.compiler.is_compiling()
    if not _is_taken(y, w1, compiling):
        return reference.graft(y, w1, b1, w2, alpha, seats.flat)
    if compiling:
        places = (seats.columns, seats.own, seats.whole, seats.runs, seats.own_runs, seats.rising)
        return _graft_opaque(y, w1, b1, w2, alpha, *places)[0]
    if not dispatch.runs_triton("graft", y):
        return reference.graft(y, w1, b1, w2, alpha, seats.flat)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (y, w1, b1, w2, alpha)):
        return _apply(y, w1, b1, w2, alpha, seats, writable)  # type: ignore[reportReturnType]
    return _forward(y, w1, b1, w2, alpha, seats, writable=writable, keep=False)[0]


def _is_taken(y: Tensor, w1: Tensor, compiling: bool) -> bool:
    """Whether device, sizes and type of number are ones the kernels are for."""
    if not (y.is_cuda or dispatch.INTERPRETED):
        return False
    _, units, width = w1.shape
    if max(units, width) > LARGEST.get(y.dtype, 0):
        return False
    if dispatch.INTERPRETED and y.dtype not in _INTERPRETED_DTYPES:
        return False
    # a function transform sees through PyTorch's operations only
    return compiling or not torch._C._functorch.is_functorch_wrapped_tensor(y)  # type: ignore[reportPrivateUsage]


def _forward(
    y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, seats: Seats, *, writable: bool, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """The result, in ``y``'s memory if it is ``writable``, and what the seeds read (``None`` without ``keep``).

    Seeds over all features write a new tensor and ``y`` itself is kept: a copy would be no smaller.
    """
    from esper.kasmina.ops.graft import triton

    source = y.contiguous()
    rows = source.view(-1, y.shape[-1])
    copy = False
    if seats.whole and (keep or not writable):
        out = torch.empty_like(source)
        kept, written = None, rows
    else:
        copy = seats.rising and not writable
        out = source if writable else torch.empty_like(source) if copy else source.clone()
        kept = rows.new_empty(rows.shape[0], seats.columns.numel()) if keep else None
        written = kept
    triton.forward(rows, out.view(rows.shape), kept, w1, b1, w2, alpha, seats.columns, runs=seats.runs, copy=copy)
    if out is y and not y.is_inference():
        torch.autograd.graph.increment_version(y)
    return out, written if keep else None


def _backward(
    g: Tensor, read: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, seats: Seats, weights: bool
) -> tuple[Tensor, Tensor]:
    """Gradients: of y, and those of w1, ``w2 / alpha`` and b1 behind each other (empty without ``weights``)."""
    from esper.kasmina.ops.graft import triton

    rows = g.reshape(-1, g.shape[-1]).contiguous()
    copy = seats.rising and not seats.whole
    gy = torch.empty_like(rows) if seats.whole or copy else rows.clone()
    read_columns, read_runs = (seats.columns, seats.runs) if seats.whole else (seats.own, seats.own_runs)
    found = triton.backward(
        rows, read, gy, w1, b1, w2, alpha, seats.columns, read_columns,
        runs=seats.runs, read_runs=read_runs, weights=weights, copy=copy,
    )  # fmt: skip
    return gy.view(g.shape), found


class _Graft(torch.autograd.Function):
    """The eager path; a compiled graph holds ``esper::graft`` instead."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, seats: Seats, writable: bool
    ) -> Tensor:
        out, read = _forward(y, w1, b1, w2, alpha, seats, writable=writable, keep=True)
        ctx.save_for_backward(read, w1, b1, w2, alpha)
        ctx.seats = seats
        if out is y:
            # the same memory as a tensor of its own: a view made here could not be edited in place by what follows
            out = torch.empty(0, dtype=y.dtype, device=y.device).set_(y)  # type: ignore[reportArgumentType]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[reportIncompatibleMethodOverride]
        read, w1, b1, w2, alpha = ctx.saved_tensors
        weights = any(ctx.needs_input_grad[1:5])
        gy, found = _backward(g, read, w1, b1, w2, alpha, ctx.seats, weights)
        return gy, *_parameter_gradients(found, w1, b1, w2, alpha, ctx.needs_input_grad), None, None


_apply: Any = super(torch.autograd.Function, _Graft).apply  # pyright: ignore[reportAttributeAccessIssue]  from C++
"""``_Graft.apply`` without its care for function transforms, which :func:`_is_taken` has found not to run."""


def _parameter_gradients(
    found: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, needed: tuple[bool, ...]
) -> tuple[Tensor | None, ...]:
    """Of w1, b1, w2, alpha, from what :func:`_backward` gives."""
    if not found.numel():
        return (None,) * 4
    sums = found.split([w1.numel(), w2.numel(), b1.numel()])
    g1, g2, gb = sums[0].view(w1.shape), sums[1].view(w2.shape), sums[2].view(b1.shape)
    return (
        g1.to(w1.dtype) if needed[1] else None,
        gb.to(b1.dtype) if needed[2] else None,
        (g2 * alpha[:, None, None]).to(w2.dtype) if needed[3] else None,
        (g2 * w2).sum((1, 2)).to(alpha.dtype) if needed[4] else None,
    )


# ---------------------------------------------------------------------------------------------- one node of a graph


@torch.library.custom_op("esper::graft", mutates_args=())
def _graft_opaque(
    y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, columns: Tensor, own: Tensor,
    whole: bool, runs: int, own_runs: int, rising: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and what the seeds read (empty if they are ``whole``: it is ``y`` then)."""
    seats = Seats(columns, columns, own, whole, runs, own_runs, rising)  # the kernels read no flat form
    if dispatch.runs_triton("graft", y):
        out, read = _forward(y, w1, b1, w2, alpha, seats, writable=False, keep=True)
        assert read is not None
    else:
        flat = columns.view(-1).long()
        out = reference.graft(y, w1, b1, w2, alpha, flat)
        read = y.reshape(-1, y.shape[-1]).index_select(1, flat)
    return out, y.new_empty(0) if whole else read


@_graft_opaque.register_fake
def _(
    y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, columns: Tensor, own: Tensor,
    whole: bool, runs: int, own_runs: int, rising: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = y.numel() // y.shape[-1]
    out = torch.empty_like(y, memory_format=torch.contiguous_format)
    return out, y.new_empty(0) if whole else y.new_empty(rows, columns.numel())


@torch.library.custom_op("esper::graft_backward", mutates_args=())
def _graft_backward_opaque(
    g: Tensor, read: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, columns: Tensor, own: Tensor,
    whole: bool, runs: int, own_runs: int, rising: bool, weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Gradients, as of :func:`_backward`."""
    seats = Seats(columns, columns, own, whole, runs, own_runs, rising)
    if dispatch.runs_triton("graft", g):
        return _backward(g, read.reshape(-1, read.shape[-1]), w1, b1, w2, alpha, seats, weights)
    rows, flat = g.reshape(-1, g.shape[-1]), columns.view(-1).long()
    x = read.reshape(rows.shape[0], -1)
    x = x.index_select(1, flat) if whole else x
    gx, g1, gb, g2 = reference.gradients(rows.index_select(1, flat), x, w1, b1, w2, alpha)
    gy = rows.index_add(1, flat, gx.to(g.dtype)).view(g.shape)
    return gy, torch.cat([g1.flatten(), g2.flatten(), gb.flatten()]).float() if weights else g1.new_empty(0)


@_graft_backward_opaque.register_fake
def _(
    g: Tensor, read: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, columns: Tensor, own: Tensor,
    whole: bool, runs: int, own_runs: int, rising: bool, weights: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gy = torch.empty_like(g, memory_format=torch.contiguous_format)
    size = w1.numel() + w2.numel() + b1.numel() if weights else 0
    return gy, torch.empty(size, dtype=torch.float32, device=g.device)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    y, w1, b1, w2, alpha, columns, own, *ctx.layout = inputs
    whole = ctx.layout[0]
    ctx.save_for_backward(y if whole else output[1], w1, b1, w2, alpha, columns, own)


def _differentiate(ctx: Any, g: Tensor, _g_read: Tensor) -> tuple[Tensor | None, ...]:
    read, w1, b1, w2, alpha, columns, own = ctx.saved_tensors
    needed = ctx.needs_input_grad
    weights = any(needed[1:5])
    gy, found = _graft_backward_opaque(g, read, w1, b1, w2, alpha, columns, own, *ctx.layout, weights)
    return gy, *_parameter_gradients(found, w1, b1, w2, alpha, needed), *(None,) * 6


_graft_opaque.register_autograd(_differentiate, setup_context=_setup)
