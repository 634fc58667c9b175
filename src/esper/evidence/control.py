"""What a branch is compared with: the same network without it.

``plain`` switches the branch off. That overstates its worth: a host co-adapts, so taking out a worthless branch hurts
too. ``projected`` first lets the host's own layer take over what it can express: the best linear map from what the
layer reads to what the branch adds, fitted by ridge regression on calibration batches, runs in the branch's place. A
branch whose function the host could have had for nothing (any linear branch on a linear layer, a copy of existing
hidden units, a constant) then shows no gain at all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from esper.kasmina.site import Site

RIDGE = 1e-4
"""Ridge penalty relative to the mean feature energy."""
ROWS_PER_FEATURE = 4
"""Fewest rows a feature for a fit that generalises; with fewer the plain control is all there is."""


@dataclass
class WithoutCohort:
    """Probe: the site without the judged cohort, with a linear stand-in for it where one was fitted."""

    cohort: int
    weight: Tensor | None = None
    bias: Tensor | None = None

    def leave(self, site: Site, x: Tensor, layer_input: Tensor, y: Tensor, training: bool) -> Tensor:
        others = site.grafted - {self.cohort}
        out = site.compose(x, y, others, training=training)
        if self.weight is None:
            return out
        conv = site.geometry.tail_conv
        weight, bias = self.weight.to(layer_input.dtype), None if self.bias is None else self.bias.to(layer_input.dtype)
        if conv is None:
            return out + F.linear(layer_input, weight, bias).to(out.dtype)
        stand_in = F.conv2d(layer_input, weight, bias, conv.stride, conv.padding, conv.dilation)
        return out + stand_in.to(out.dtype)


@dataclass
class Recorder:
    """Probe: the site as it is, keeping sampled rows of what the layer reads and what the cohort adds."""

    cohort: int
    rows_per_call: int
    generator: torch.Generator
    features: list[Tensor] = field(default_factory=list[Tensor])
    added: list[Tensor] = field(default_factory=list[Tensor])

    def leave(self, site: Site, x: Tensor, layer_input: Tensor, y: Tensor, training: bool) -> Tensor:
        without = site.compose(x, y, site.grafted - {self.cohort}, training=training)
        out = site.compose(x, y, site.grafted, training=training)
        delta = (out.float() - without.float()).movedim(site.geometry.feature_axis, -1)
        features = _layer_features(site, layer_input)
        flat = delta.reshape(-1, delta.shape[-1])
        index = torch.randperm(flat.shape[0], generator=self.generator)[: self.rows_per_call].to(flat.device)
        self.features.append(features(index))
        self.added.append(flat[index])
        return out


def _layer_features(site: Site, layer_input: Tensor) -> Callable[[Tensor], Tensor]:
    """Rows of what the site's last layer multiplies with its weight: inputs, or patches for a convolution."""
    conv = site.geometry.tail_conv
    if conv is None:
        flat = layer_input.reshape(-1, layer_input.shape[-1])
        return lambda index: flat[index].float()
    patches = F.unfold(layer_input.float(), conv.kernel, conv.dilation, conv.padding, conv.stride)
    rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    return lambda index: rows[index]


def fit_stand_in(recorder: Recorder, site: Site) -> WithoutCohort:
    """Ridge regression of what the branch adds on what the layer reads (with an intercept), in float64."""
    phi, delta = torch.cat(recorder.features).double(), torch.cat(recorder.added).double()
    rows, width = phi.shape
    if rows < ROWS_PER_FEATURE * (width + 1):
        return WithoutCohort(recorder.cohort)
    phi_mean, delta_mean = phi.mean(0), delta.mean(0)
    centred = phi - phi_mean
    gram = centred.T @ centred
    gram.diagonal().add_(RIDGE * float(gram.diagonal().mean()) + 1e-12)
    solution = torch.linalg.solve(gram, centred.T @ (delta - delta_mean))
    bias = (delta_mean - phi_mean @ solution).float()
    weight = solution.T.float()
    conv = site.geometry.tail_conv
    if conv is not None:
        weight = weight.view(weight.shape[0], -1, *conv.kernel)
    return WithoutCohort(recorder.cohort, weight.contiguous(), bias)


@contextmanager
def probing(sites: dict[str, Site], probes: dict[str, WithoutCohort] | dict[str, Recorder]) -> Iterator[None]:
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


@contextmanager
def recalibrated(model: nn.Module, sites: dict[str, Site], run: list[Callable[[], object]]) -> Iterator[None]:
    """Batch norm statistics recomputed for the network as it stands, from ``run`` (one call a calibration batch).

    Host buffers and the branches' own are restored on exit. Without batch norm nothing is run.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        yield
        return
    banks = [b for s in sites.values() for b in [*s.banks.values(), s.annex] if b is not None and b.buffers]
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
