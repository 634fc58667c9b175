"""Reference for the telemetry op: mean and variance a chunk over sampled rows, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def row_step(total: int, max_rows: int) -> int:
    """Every how many of ``total`` rows is read: the least odd number by which ``max_rows`` reach over all of them.

    Lengths of sequences and sides of images are mostly even: an even step would fall on the same few positions of every
    example (docs/decisions/0020).
    """
    return -(-total // max_rows) | 1


def chunk_statistics(y_NF: Tensor, chunk_of: Tensor, chunk_sizes: Tensor) -> Tensor:
    """Mean and population variance of each chunk.

    Parameters
    ----------
    y_NF:
        Rows by features, any float dtype; accumulated in fp32 by two passes (no cancellation).
    chunk_of:
        ``(F,)`` int64: the chunk of each feature.
    chunk_sizes:
        ``(C,)`` fp32: features a chunk.

    Returns
    -------
    Tensor
        ``(2, C)`` fp32: means, variances.
    """
    y = y_NF.detach().float()
    rows = y.shape[0]
    counts = chunk_sizes * rows
    if chunk_of.numel() == chunk_sizes.numel():  # a chunk a feature: the same sums without gathering
        mean = y.sum(0) / counts
        return torch.stack([mean, (y - mean).square().sum(0) / counts])
    mean = torch.zeros_like(chunk_sizes).index_add_(0, chunk_of, y.sum(0)) / counts
    centred = y - mean[chunk_of]
    var = torch.zeros_like(chunk_sizes).index_add_(0, chunk_of, centred.square().sum(0)) / counts
    return torch.stack([mean, var])


def feature_statistics_into(out: Tensor, y_NF: Tensor) -> None:
    """:func:`chunk_statistics` of chunks of one feature, the same bits, written to ``out (2, F)`` in fewer steps."""
    y = y_NF.detach().float()
    mean, variance = out.unbind()
    torch.mean(y, 0, out=mean)
    torch.mean((y - mean).square_(), 0, out=variance)
