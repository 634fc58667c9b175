"""Reference for the graft op: gather, two batched matrix products, scatter, in plain PyTorch.

Shapes: S seeds, K columns and H hidden units a seed; w1 (S, H, K), b1 (S, H), w2 (S, K, H), alpha (S,).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def hidden(x: Tensor, w1: Tensor, b1: Tensor) -> Tensor:
    """``silu(W1_s x_s + b1_s)`` of all seeds: ``(..., S*K)`` to ``(..., S*H)``."""
    seeds, _, width = w1.shape
    if seeds == 1:
        return F.silu(F.linear(x, w1[0].to(x.dtype), b1[0].to(x.dtype)))
    z = torch.einsum("...sk,shk->...sh", x.unflatten(-1, (seeds, width)), w1.to(x.dtype))
    return F.silu(z + b1.to(x.dtype)).flatten(-2)


def project(h: Tensor, w2: Tensor, alpha: Tensor) -> Tensor:
    """``alpha_s W2_s h_s`` of all seeds: ``(..., S*H)`` to ``(..., S*K)``."""
    scaled = (w2 * alpha[:, None, None]).to(h.dtype)
    seeds, _, units = scaled.shape
    if seeds == 1:
        return F.linear(h, scaled[0])
    return torch.einsum("...sh,skh->...sk", h.unflatten(-1, (seeds, units)), scaled).flatten(-2)


def graft(y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor, columns: Tensor) -> Tensor:
    """``y (..., F)`` plus each seed's branch of its own ``columns (S*K,)`` int64, in a new tensor."""
    x = y.index_select(-1, columns)
    return y.index_add(-1, columns, project(hidden(x, w1, b1), w2, alpha).to(y.dtype))


def gradients(
    g: Tensor, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, alpha: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of a branch by hand, where autograd does not reach.

    Parameters
    ----------
    g, x:
        ``(N, S*K)``: the gradient at the seeds' columns, and what the seeds read there.

    Returns
    -------
    Gradients at x (without ``g`` itself), w1, b1 and ``w2 / alpha``, in at least fp32.
    """
    seeds, _, width = w1.shape
    dtype = torch.promote_types(g.dtype, torch.float32)
    g_NSK, x_NSK = (t.to(dtype).unflatten(-1, (seeds, width)) for t in (g, x))
    w1, b1, w2, alpha = (t.to(dtype) for t in (w1, b1, w2, alpha))
    z = torch.einsum("nsk,shk->nsh", x_NSK, w1) + b1
    gate = torch.sigmoid(z)
    h = z * gate
    dz = torch.einsum("nsk,skh->nsh", g_NSK, w2 * alpha[:, None, None]) * (gate + h * (1.0 - gate))
    return (
        torch.einsum("nsh,shk->nsk", dz, w1).flatten(1),
        torch.einsum("nsh,nsk->shk", dz, x_NSK),
        dz.sum(0),
        torch.einsum("nsk,nsh->skh", g_NSK, h),
    )
