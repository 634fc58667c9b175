"""Branches that keep nothing of their own for the backward pass but what they read: hidden activations come again.

Autograd keeps, of a branch of U units on N rows, what it reads and twice ``N * U`` numbers: before the activation and
behind it. On a span that has grown by its own width that is most of the memory the branch takes. Here the backward
pass computes the hidden units a second time (the product with the output weights is not repeated), which costs a sixth
of the branch's own training FLOPs where it reads as many features as it writes. Values and gradients are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.kasmina.isolation import in_transform

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Recipe:
    """How to compute a branch: hidden units from named parameters and what is read, then a product.

    ``output`` names the parameter ``(S, K, U)`` that the product multiplies with.
    """

    hidden: Callable[[Tensors, Tensor], Tensor]
    output: str


def may_recompute(x: Tensor) -> bool:
    """Whether a backward pass may come, and nobody else decides what it keeps (a compiler, a function transform)."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling() and not in_transform(x)


def as_product_reads(x: Tensor) -> Tensor:
    """``x`` as a product reads it: rounded where autocast would do it, otherwise ``x`` itself."""
    kind = x.device.type
    if x.dtype is not torch.float32 or torch.compiler.is_compiling() or not torch.is_autocast_enabled(kind):
        return x
    return x.to(torch.get_autocast_dtype(kind))


def recomputed(recipe: Recipe, params: Tensors, x: Tensor, alpha: Tensor) -> Tensor:
    """``alpha * branch(x)`` over the branch's columns ``(..., S * K)``, keeping ``x`` and no activation."""
    return _Recomputed.apply(recipe, tuple(params), as_product_reads(x), alpha, *params.values())  # type: ignore[no-any-return]


def product(h: Tensor, weight: Tensor) -> Tensor:
    """Hidden units ``(..., S * U)`` times ``weight (S, K, U)``, slot by slot: ``(..., S * K)``."""
    slots, _, units = weight.shape
    if slots == 1:
        return F.linear(h, weight[0])
    return torch.einsum("...su,sku->...sk", h.unflatten(-1, (slots, units)), weight).flatten(-2)


def weighted(value: Tensor, alpha: Tensor, dtype: torch.dtype) -> Tensor:
    """Output weights ``(S, K, U)`` with each slot's alpha multiplied in."""
    return (value * alpha[:, None, None]).to(dtype)


class _Recomputed(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # torch leaves the arguments open
        ctx: Any, recipe: Recipe, names: tuple[str, ...], x: Tensor, alpha: Tensor, *values: Tensor
    ) -> Tensor:
        ctx.recipe, ctx.names, ctx.region = recipe, names, _region(x)
        ctx.save_for_backward(x, alpha, *values)
        params = dict(zip(names, values, strict=True))
        with ctx.region():
            h = recipe.hidden(params, x)
            return product(h, weighted(params[recipe.output], alpha, h.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        twice = torch.is_grad_enabled()  # whoever asks for a graph of the gradients gets one over the originals
        needed = ctx.needs_input_grad[2:]
        saved: tuple[Tensor, ...] = ctx.saved_tensors
        inputs = saved if twice else [t.detach().requires_grad_(n) for t, n in zip(saved, needed, strict=True)]
        x, alpha, *values = inputs
        params = dict(zip(ctx.names, values, strict=True))
        with torch.enable_grad(), ctx.region():
            h = ctx.recipe.hidden(params, x)
            weight = weighted(params[ctx.recipe.output], alpha, h.dtype)
        outs = [value for value in (h, weight) if value.requires_grad]
        heads = [(_to_hidden(g, weight) if value is h else _to_weight(g, h, weight)).to(value.dtype) for value in outs]
        wanted = [value for value, need in zip(inputs, needed, strict=True) if need]
        found: Iterator[Tensor | None] = iter(
            torch.autograd.grad(outs, wanted, heads, create_graph=twice, allow_unused=True)
        )
        return None, None, *(next(found) if need else None for need in needed)


def _to_hidden(g: Tensor, weight: Tensor) -> Tensor:
    """The product's gradient at the hidden units."""
    slots, columns, _ = weight.shape
    weight = weight.to(g.dtype)  # autocast computes some activations in fp32, and the product behind them lower
    if slots == 1:
        return g @ weight[0]
    return torch.einsum("...sk,sku->...su", g.unflatten(-1, (slots, columns)), weight).flatten(-2)


def _to_weight(g: Tensor, h: Tensor, weight: Tensor) -> Tensor:
    """The product's gradient at its weights."""
    slots, columns, units = weight.shape
    rows, read = g.reshape(-1, g.shape[-1]), h.reshape(-1, h.shape[-1]).to(g.dtype)
    if slots == 1:
        return (rows.t() @ read)[None]
    return torch.einsum("nsk,nsu->sku", rows.unflatten(-1, (slots, columns)), read.unflatten(-1, (slots, units)))


def _region(x: Tensor) -> Callable[[], AbstractContextManager[Any]]:
    """Autocast as it is now, for later; its cache stays out of it, which must not hold weights without a graph."""
    kind = x.device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype, cache_enabled=False)
