"""What an embedding could have had for nothing: any function of the token, for its table holds one row for each.

The stand-in is a table of what the cohort added to each token on calibration batches, shrunk towards the mean by
empirical Bayes (one-way analysis of variance): a branch that reads its position only is taken over to the last bit,
one that reads the context around it to the extent that the token foretells it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from esper.evidence.control import Recorder, WithoutCohort, fit_stand_in
from esper.kasmina.site import Site
from esper.protocol import SiteKind


@dataclass
class WithoutTokenCohort(WithoutCohort):
    """Probe: an embedding without the judged cohort, ``table (V, O)`` in its place."""

    table: Tensor | None = None

    def leave(self, site: Site, x: Tensor, layer_input: Tensor, y: Tensor, training: bool) -> Tensor:
        out = super().leave(site, x, layer_input, y, training)
        if self.table is None:
            return out
        return (out.to(self.table.dtype) + F.embedding(layer_input, self.table)).to(out.dtype)

    @property
    def stands_in(self) -> bool:
        return self.table is not None


class TokenRecorder(Recorder):
    """Probe: the site as it is, summing up by token what the cohort adds, in float64."""

    def __init__(self, cohort: int, rows_per_call: int, generator: torch.Generator) -> None:
        super().__init__(cohort, rows_per_call, generator)
        self.counts = torch.zeros(0)
        self.totals = torch.zeros(0)
        self.squares = torch.zeros(())

    def leave(self, site: Site, x: Tensor, layer_input: Tensor, y: Tensor, training: bool) -> Tensor:
        without = site.compose(x, y, site.grafted - {self.cohort}, training=training)
        out = site.compose(x, y, site.grafted, training=training)
        added = (out.double() - without.double()).reshape(-1, y.shape[-1])
        tokens = layer_input.reshape(-1)
        if self.counts.numel() == 0:
            self.counts = added.new_zeros(site.info.in_features)
            self.totals = added.new_zeros(site.info.in_features, y.shape[-1])
            self.squares = added.new_zeros(())
        self.counts.index_add_(0, tokens, torch.ones_like(tokens, dtype=torch.float64))
        self.totals.index_add_(0, tokens, added)
        self.squares += added.square().sum()
        self.rows += tokens.numel()
        return out

    def stand_in(self) -> WithoutTokenCohort:
        """Means by token, each shrunk by how much tokens differ from one another over how much one token varies."""
        finite = self.rows > 0 and bool(torch.isfinite(self.totals).all() & torch.isfinite(self.squares))
        if not finite:
            return WithoutTokenCohort(self.cohort)
        seen = self.counts > 0
        counts, totals = self.counts[seen], self.totals[seen]
        rows, kinds = float(self.rows), float(seen.sum())
        means, grand = totals / counts[:, None], totals.sum(0) / rows
        around = float((counts[:, None] * (means - grand).square()).sum())
        inside = max(0.0, float(self.squares - (counts[:, None] * means.square()).sum()))
        table = grand.repeat(self.counts.numel(), 1)
        if rows > kinds > 1:  # without a repeated token nothing tells a function of the token from chance
            within = inside / (rows - kinds)
            between = (around - (kinds - 1) * within) / (rows - float(counts.square().sum()) / rows)
            if between > 0:
                weight = counts * between / (counts * between + within)
                table[seen] += weight[:, None] * (means - grand)
        return WithoutTokenCohort(self.cohort, table=table.float())


def recorder_for(site: Site, cohort: int, rows_per_call: int, generator: torch.Generator) -> Recorder:
    """What records a cohort's contribution at ``site`` for its stand-in."""
    family = TokenRecorder if site.info.kind is SiteKind.EMBEDDING_LAYER else Recorder
    return family(cohort, rows_per_call, generator)


def stand_in_of(recorder: Recorder, site: Site) -> WithoutCohort:
    """The site without the cohort, the host's layer standing in for it as far as it could."""
    return recorder.stand_in() if isinstance(recorder, TokenRecorder) else fit_stand_in(recorder, site)
