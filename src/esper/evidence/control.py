"""What a branch is compared with: the same network without it.

``plain`` switches the branch off. That overstates its worth: a host co-adapts, so taking out a worthless branch hurts
too. ``projected`` first lets the host's own layer take over what it can express: the best linear map from what the
layer reads (what the site has grown for good included) to what the branch adds, fitted by ridge regression on
calibration batches, runs in the branch's place. A branch whose function the host could have had for nothing (any
linear branch on a linear layer, a copy of existing hidden units, a constant) then shows no gain at all.

Cohorts whose branches would all fold into their host's weights have another control (``before``).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.geometry import ConvGeometry, convolve
from esper.kasmina.site import Site
from esper.protocol import SiteKind

RIDGES = tuple(10.0**power for power in range(-9, 3))
"""Ridge penalties relative to the mean feature energy. The smallest must be tiny: at 1e-4 the penalty's own bias left
redundant branches a consistent gain of a millionth, and a sequential test accepts whatever is consistent."""
_BLOCK_BYTES = 1 << 26


@dataclass
class WithoutCohort:
    """Probe: the site without the judged cohort, with a linear stand-in for it where one was fitted.

    ``weight`` has the shape of a weight of the site's last layer that reads the annex's hidden units as well.
    """

    cohort: int
    weight: Tensor | None = None
    bias: Tensor | None = None

    @property
    def stands_in(self) -> bool:
        """Whether anything runs in the cohort's place."""
        return self.weight is not None

    def leave(self, site: Site, x: Tensor, layer_input: Tensor, y: Tensor, training: bool) -> Tensor:
        out = site.compose(x, y, site.grafted - {self.cohort}, training=training)
        if self.weight is None:
            return out
        read = _layer_reads(site, layer_input, y)
        conv = site.geometry.tail_conv
        # fp32 whatever the host computes in: rounding must not make the stand-in worse than the branch
        with torch.autocast(y.device.type, enabled=False):
            if conv is None:
                stand_in = F.linear(read, self.weight, self.bias).movedim(-1, site.geometry.feature_axis)
            else:
                stand_in = convolve(read, self.weight, self.bias, conv)
        return (out.float() + stand_in).to(out.dtype) if out.dtype != torch.float64 else out + stand_in.double()


class Recorder:
    """Probe: the site as it is, summing up what a regression of what the cohort adds on what the layer reads needs.

    Rows are sampled, sums are in float64; no rows are kept.
    """

    def __init__(self, cohort: int, rows_per_call: int, generator: torch.Generator) -> None:
        self.cohort = cohort
        self.rows_per_call = rows_per_call
        self.generator = generator
        self.rows = 0
        self.sums: list[Tensor] = []
        """Features (F), added (O), features x features, features x added, added squared (a number)."""

    @staticmethod
    def num_bytes(site: Site) -> int:
        """Memory of the sums at a site."""
        features = _num_features(site)
        return 8 * features * (features + site.info.out_features)

    @property
    def flops(self) -> float:
        """FLOPs of the regression that follows (:func:`ridge_flops`)."""
        return ridge_flops(self.rows, self.sums[0].numel(), self.sums[1].numel()) if self.sums else 0.0

    def leave(self, site: Site, x: Tensor, layer_input: Tensor, y: Tensor, training: bool) -> Tensor:
        without = site.compose(x, y, site.grafted - {self.cohort}, training=training)
        out = site.compose(x, y, site.grafted, training=training)
        delta = (out.float() - without.float()).movedim(site.geometry.feature_axis, -1)
        flat = delta.reshape(-1, delta.shape[-1])
        index = torch.randperm(flat.shape[0], generator=self.generator)[: self.rows_per_call].sort().values
        rows_of = _layer_rows(site, _layer_reads(site, layer_input, y))
        for part in index.split(max(1, _BLOCK_BYTES // (8 * _num_features(site)))):
            here = part.to(flat.device)
            self._add(rows_of(here).double(), flat[here].double())
        return out

    def _add(self, phi: Tensor, delta: Tensor) -> None:
        sums = sums_of(phi, delta)
        self.rows += phi.shape[0]
        if not self.sums:
            self.sums = sums
            return
        for total, part in zip(self.sums, sums, strict=True):
            total.add_(part)


def sums_of(phi: Tensor, delta: Tensor) -> list[Tensor]:
    """What :func:`ridge` needs of features ``(B, F)`` and what is added to them ``(B, O)``, both float64."""
    return [phi.sum(0), delta.sum(0), phi.T @ phi, phi.T @ delta, delta.square().sum()]


_LINEAR = (SiteKind.LINEAR_LAYER, SiteKind.CONV_LAYER)
"""Layers that are linear in what they read. The others are granted any linear map of what they compute: all that a
norm or an attention's output weights could change about it, and more."""


def _layer_reads(site: Site, layer_input: Tensor, y: Tensor) -> Tensor:
    """What the site's last layer reads, fp32: its input and, on a span, the hidden units that became permanent.

    Of a layer that is not linear: its output, features last.
    """
    if not site.info.kind.is_span and site.info.kind not in _LINEAR:
        return y.float().movedim(site.geometry.feature_axis, -1)
    if site.annex is None or not site.info.kind.is_span:
        return layer_input.float()
    assert site.grown_hidden is not None  # composed before
    return torch.cat([layer_input.float(), site.grown_hidden.float()], dim=site.geometry.feature_axis)


def _num_features(site: Site) -> int:
    conv = site.geometry.tail_conv
    if not site.info.kind.is_span and site.info.kind not in _LINEAR:
        return site.geometry.out_features
    inputs = (site.geometry.hidden_features or site.geometry.in_features) + site.grown_units
    return inputs * (1 if conv is None else conv.taps)


def _layer_rows(site: Site, read: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows of what the layer multiplies with its weight, by (sorted) output position: inputs, or patches of images."""
    conv = site.geometry.tail_conv
    if conv is None:
        flat = read.reshape(-1, read.shape[-1])
        return lambda index: flat[index]

    windows = _windows(read, conv)
    dims = len(conv.kernel)

    def patches(index: Tensor) -> Tensor:
        positions = torch.unravel_index(index, (windows.shape[0], *windows.shape[2 : 2 + dims]))
        return windows.movedim(1, 1 + dims)[positions].flatten(1)

    return patches


def _windows(images: Tensor, conv: ConvGeometry) -> Tensor:
    """A view ``(N, I, *positions, *kernel)`` of what each output position of a convolution sees."""
    sides = [side for pad in reversed(conv.padding) for side in (pad, pad)]
    windows = F.pad(images, sides)
    for axis, (kernel, stride, dilation) in enumerate(zip(conv.kernel, conv.stride, conv.dilation, strict=True), 2):
        windows = windows.unfold(axis, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
    return windows


def fit_stand_in(recorder: Recorder, site: Site) -> WithoutCohort:
    """Ridge regression of what the branch adds on what the layer reads, with an intercept, in float64.

    The penalty minimises generalised cross-validation (Golub, Heath & Wahba 1979), so that with few rows the stand-in
    shrinks towards a constant instead of fitting noise. Without finite rows there is no stand-in.
    """
    if recorder.rows < 2 or not all(bool(torch.isfinite(total).all()) for total in recorder.sums):
        return WithoutCohort(recorder.cohort)
    weight, bias = ridge(recorder.rows, recorder.sums)
    weight, conv = weight.float(), site.geometry.tail_conv
    if conv is not None:
        weight = weight.view(weight.shape[0], -1, *conv.kernel)
    return WithoutCohort(recorder.cohort, weight.contiguous(), bias.float())


def ridge(rows: int, sums: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Weight ``(O, F)`` and bias ``(O,)``, float64, from finite sums over ``rows`` rows (:attr:`Recorder.sums`)."""
    phi_sum, delta_sum, gram, cross, energy = sums
    phi_mean, delta_mean = phi_sum / rows, delta_sum / rows
    gram = gram - rows * torch.outer(phi_mean, phi_mean)
    cross = cross - rows * torch.outer(phi_mean, delta_mean)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=0.0)
    rotated = vectors.T @ cross
    penalty = _cross_validated(values, rotated, energy - rows * delta_mean.square().sum(), rows)
    solution = vectors @ (rotated / (values + penalty)[:, None])
    return solution.T, delta_mean - phi_mean @ solution


def ridge_flops(rows: int, features: int, added: int) -> float:
    """Products over the rows, an eigenvalue problem (9 n^3, Golub & Van Loan 8.3), and the solution in its basis."""
    return 2.0 * rows * features * (features + added) + 9.0 * features**3 + 4.0 * features**2 * added


def _cross_validated(values: Tensor, rotated: Tensor, energy: Tensor, rows: int) -> Tensor:
    """The penalty with the least ``residual / (rows - degrees of freedom)^2``."""
    penalties = torch.tensor(RIDGES, dtype=values.dtype, device=values.device) * values.mean() + 1e-30
    powers = rotated.square().sum(1)
    damped = values[None, :] + penalties[:, None]
    explained = (powers * (damped + penalties[:, None]) / damped.square()).sum(1)
    left = rows - 1.0 - (values / damped).sum(1)
    scores = (energy - explained).clamp(min=0.0) / left.square()
    return penalties[torch.where(left > 0, scores, torch.inf).argmin()]


@contextmanager
def probing(
    sites: dict[str, Site], probes: dict[str, WithoutCohort] | dict[str, Recorder]
) -> Generator[None, None, None]:
    """Let probes take their sites' places in the forward pass; everything is as before on exit."""
    try:
        for name, probe in probes.items():
            sites[name].probe = probe
            sites[name].refresh()
        yield
    finally:
        for name in probes:
            sites[name].probe = None
            sites[name].refresh()


def has_statistics(model: nn.Module) -> bool:
    """Whether there are batch norm statistics to recompute (:func:`recalibrated`)."""
    return bool(_with_statistics(model))


def _with_statistics(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:  # pyright: ignore[reportPrivateUsage]
    family = nn.modules.batchnorm._BatchNorm  # pyright: ignore[reportPrivateUsage]  # what all batch norms share
    return [m for m in model.modules() if isinstance(m, family) and m.track_running_stats]


@contextmanager
def recalibrated(
    model: nn.Module, sites: dict[str, Site], run: list[Callable[[], object]]
) -> Generator[None, None, None]:
    """Batch norm statistics recomputed for the network as it stands, from ``run`` (one call a calibration batch).

    Host buffers and the branches' own are restored on exit. Without batch norm nothing is run.
    """
    norms = _with_statistics(model)
    if not norms:
        yield
        return
    banks = [b for s in sites.values() for b in [*s.banks.values(), *s.permanent] if b.buffers]
    kept = [(m, m.momentum, m.running_mean, m.running_var, m.num_batches_tracked, m.training) for m in norms]
    kept_banks = [(bank, bank.buffers) for bank in banks]
    try:
        for norm in norms:
            norm.running_mean, norm.running_var = norm.running_mean.clone(), norm.running_var.clone()  # type: ignore[union-attr]
            norm.num_batches_tracked = torch.zeros_like(norm.num_batches_tracked)  # type: ignore[arg-type]
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        for bank in banks:
            bank.buffers = {name: value.clone() for name, value in bank.buffers.items()}
        with torch.no_grad():
            for number, call in enumerate(run, 1):
                for bank in banks:
                    bank.norm_momentum = 1.0 / number
                call()
        for norm in norms:
            norm.eval()
        for bank in banks:
            bank.norm_momentum = None
        yield
    finally:
        for norm, momentum, mean, var, tracked, training in kept:
            norm.momentum, norm.running_mean, norm.running_var = momentum, mean, var
            norm.num_batches_tracked, norm.training = tracked, training
        for bank, buffers in kept_banks:
            bank.buffers, bank.norm_momentum = buffers, None
