"""The weights of a stack of hosts, their optimizer's state, and which units are whose: what growth changes.

Shapes: N hosts, P numbers a host, C places in a hidden layer, G groups.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from esper.greenhouse.bodies.body import Body
from esper.greenhouse.isolated import Units
from esper.greenhouse.layout import HOST, VOID, Weights, annex, live, num_groups, owners
from esper.greenhouse.stack import BETAS, Moments


class Network:
    """N hosts side by side.

    Parameters
    ----------
    body:
        Of every host.
    widths:
        Hidden widths of each host.
    streams:
        What each host's first weights are drawn from.

    Attributes
    ----------
    values, gradients, moments:
        ``(N, P)`` each, laid out as ``layout`` says.
    groups, alphas:
        For each site ``(N, C)``: the group of each unit, and how much of it is blended in.
    owner:
        ``(N, P)`` int64: the group of each weight.
    steps, learns:
        ``(N, G)``: optimizer steps of each group, and whether it learns (1.0 or 0.0).
    """

    def __init__(
        self, body: Body, widths: Sequence[tuple[int, ...]], streams: Sequence[torch.Generator], dtype: torch.dtype
    ) -> None:
        num, sites = len(widths), body.num_sites
        self.body, self.dtype = body, dtype
        self.layout = body.layout([max(width[site] for width in widths) for site in range(sites)])
        pairs = zip(widths, streams, strict=True)
        self.values = torch.stack([body.first(self.layout, width, stream, dtype) for width, stream in pairs])
        self.gradients = torch.zeros_like(self.values)
        self.moments = Moments(torch.zeros_like(self.values), torch.zeros_like(self.values))
        self.groups = [torch.full((num, room), VOID) for room in self.layout.hidden]
        self.alphas = [torch.zeros(num, room, dtype=dtype) for room in self.layout.hidden]
        for number, width in enumerate(widths):
            for site, units in enumerate(width):
                self.groups[site][number, :units] = HOST
                self.alphas[site][number, :units] = 1.0
        self.owner = torch.stack([owners(self.layout, [g[n] for g in self.groups]) for n in range(num)])
        self.steps = np.zeros((num, num_groups(sites)))
        self.learns = np.zeros((num, num_groups(sites)))
        self.learns[:, HOST] = 1.0

    @property
    def weights(self) -> Weights:
        """Weight and bias of each part, as views."""
        return self.layout.views(self.values)

    def select(self, index: Tensor) -> Network:
        """Copies of some hosts, ``index (n,)``."""
        twin = object.__new__(Network)
        twin.__dict__.update(self.__dict__)
        twin.values, twin.gradients = self.values[index].clone(), self.gradients[index].clone()
        twin.moments = Moments(self.moments.first[index].clone(), self.moments.second[index].clone())
        twin.groups = [part[index].clone() for part in self.groups]
        twin.alphas = [part[index].clone() for part in self.alphas]
        twin.owner = self.owner[index].clone()
        twin.steps, twin.learns = self.steps[index.numpy()].copy(), self.learns[index.numpy()].copy()
        return twin

    # ---------------------------------------------------------------------------------------------- units

    def read_places(self, host: int, site: int) -> Tensor:
        """Columns of a site's head that its new units read: the host's, then what is grown there for good."""
        head = self.body.head(site)
        return torch.arange(head.columns) if head.columns_of is None else self.kept_places(host, head.columns_of)

    def kept_places(self, host: int, site: int) -> Tensor:
        """A site's hidden units: the host's, then what is grown there for good."""
        groups = self.groups[site][host]
        return torch.cat([torch.nonzero(groups == kind)[:, 0] for kind in (HOST, annex(site))])

    def seat(self, host: int, site: int, units: int) -> Tensor:
        """Places ``(U,)`` for new units, in the live group; the layout is widened where there is no room."""
        free = torch.nonzero(self.groups[site][host] == VOID)[:, 0]
        if free.numel() < units:
            self._widen(site, units - free.numel())
            free = torch.nonzero(self.groups[site][host] == VOID)[:, 0]
        places = free[:units]
        self.groups[site][host, places] = live(site)
        self.steps[host, live(site)] = self.learns[host, live(site)] = 0.0
        return places

    def _widen(self, site: int, extra: int) -> None:
        old = self.layout
        hidden = list(old.hidden)
        hidden[site] += extra
        wider = self.body.layout(hidden)
        self.values, self.gradients = old.moved(self.values, wider), old.moved(self.gradients, wider)
        self.moments = Moments(old.moved(self.moments.first, wider), old.moved(self.moments.second, wider))
        self.owner = old.moved(self.owner, wider)
        added = wider.hidden[site] - old.hidden[site]
        pad = torch.nn.functional.pad
        self.groups[site] = pad(self.groups[site], (0, added), value=VOID)
        self.alphas[site] = pad(self.alphas[site], (0, added))
        self.layout = wider

    def refresh(self, host: int) -> None:
        """After a change of groups: who owns which weight."""
        self.owner[host] = owners(self.layout, [groups[host] for groups in self.groups])

    def write(self, host: int, site: int, places: Tensor, units: Units) -> None:
        """Set first weights of units at ``places``; they read and write as many features as they have."""
        head, bias, tail = self._ends(self.values, site)
        reads = self.read_places(host, site)[: units.w1.shape[1]]
        columns = torch.arange(units.w2.shape[0])
        head[host][places[:, None], reads[None, :]] = units.w1.to(self.dtype)
        bias[host][places] = units.b1.to(self.dtype)
        tail[host][columns[:, None], places[None, :]] = units.w2.to(self.dtype)

    def _ends(self, flat: Tensor, site: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weight and bias of a site's head and weight of its tail, as views of ``flat (N, P)``."""
        views, span = self.layout.views(flat), self.body.spans[site]
        return *views[span.head], views[span.tail][0]

    def units_of(self, host: int, site: int) -> Units:
        """A site's present hidden units, grown ones included and seeds not, as they read the layer before."""
        head, bias, tail = self._ends(self.values, site)
        places = self.kept_places(host, site)
        w1 = head[host][places[:, None], self.read_places(host, site)[None, :]]
        return Units(w1, bias[host][places], tail[host][:, places])

    def scale_output(self, host: int, site: int, places: Tensor, factor: float) -> None:
        """Multiply what units write."""
        self._ends(self.values, site)[2][host][:, places] *= factor

    def set_alpha(self, host: int, site: int, places: Tensor, alpha: float) -> None:
        self.alphas[site][host, places] = alpha

    def uproot(self, host: int, site: int, places: Tensor) -> None:
        """Take units out: weights and moments are zero, places are free again."""
        for flat in (self.values, self.moments.first, self.moments.second):
            head, bias, tail = self._ends(flat, site)
            head[host, places] = 0.0
            bias[host, places] = 0.0
            tail[host][:, places] = 0.0
        self.groups[site][host, places] = VOID
        self.alphas[site][host, places] = 0.0
        self.refresh(host)

    def keep(self, host: int, site: int, places: Tensor) -> None:
        """Move live units into the site's annex; moments are rescaled to the count of the longest-serving part.

        Call :meth:`refresh` when all sites of a cohort are through.
        """
        kept, young, steps = annex(site), live(site), self.steps[host]
        most = float(max(steps[kept], steps[young]))
        for group in (kept, young):
            self._rescale(host, group, taken=float(steps[group]), steps=most)
        self.groups[site][host, places] = kept
        self.steps[host, kept], self.learns[host, kept] = most, 1.0
        self.steps[host, young] = self.learns[host, young] = 0.0

    def _rescale(self, host: int, group: int, *, taken: float, steps: float) -> None:
        if taken <= 0 or taken == steps:
            return
        mine = self.owner[host] == group
        for moment, beta in zip((self.moments.first, self.moments.second), BETAS, strict=True):
            moment[host] = torch.where(mine, moment[host] * ((1 - beta**steps) / (1 - beta**taken)), moment[host])
