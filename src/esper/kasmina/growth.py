"""What has grown at one place of a host, and what it adds to the host's output there."""

from __future__ import annotations

import zlib
from collections.abc import Set as AbstractSet

import torch
from torch import Tensor

from esper.errors import CONTAINED, SiteError, contained
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import FusedBlueprint
from esper.kasmina.geometry import Geometry
from esper.kasmina.recompute import may_recompute
from esper.protocol import SiteInfo


def overlap(banks: list[Bank]) -> bool:
    """Whether two of these banks add to the same column."""
    if any(bank.columns is None for bank in banks):
        return len(banks) > 1
    flat = torch.cat([bank.columns.reshape(-1) for bank in banks if bank.columns is not None])
    return len(torch.unique(flat)) < len(flat)


def _fuses(bank: Bank) -> bool:
    return isinstance(bank.plan, FusedBlueprint)


class Growth:
    """Banks on trial and permanent ones, and the sum of what they add.

    Attributes
    ----------
    banks:
        Live banks by cohort; those in ``grafted`` are in the forward pass.
    annex:
        What has become permanent (one dense bank), or ``None``.
    beside:
        What is permanent as well but cannot join the annex: another blueprint, or one that absorbs nothing.
    thrifty:
        Whether branches compute their hidden units again in the backward pass instead of keeping them.
    """

    thrifty = False  # also of models that were saved before there was a choice

    def __init__(self, info: SiteInfo, geometry: Geometry, upstream: Growth | None) -> None:
        self.info = info
        self.geometry = geometry
        self.upstream = upstream
        self.downstream_reads = False
        self.banks: dict[int, Bank] = {}
        self.grafted: set[int] = set()
        self.annex: Bank | None = None
        self.beside: list[Bank] = []
        self._shares_columns = self._shares_input = False
        # what a forward pass adds: without cohort numbers, so that a compiled graph serves later cohorts of the same
        # sizes as well
        self._adds = False
        self._trial: list[Bank] = []
        self._only: list[Bank] | None = None
        """What is added, if all of it is fused and no two share a column."""
        self.generator: torch.Generator | None = None
        self.mask_seed = 0
        """Tells this site's dropout masks from those of others."""
        self.failures: dict[int, str] = {}
        """Cohorts whose branch has raised in a forward pass since the last step, and what."""
        self._grown: Tensor | None = None

    def refresh(self) -> None:
        """Settle between two steps what the next forward pass adds."""
        self._adds = self.adds
        self._trial = self._on_trial(self.grafted)
        behind = [*self.beside, *self._trial]
        fused = [bank for bank in behind if _fuses(bank)]
        self._shares_columns = len(fused) > 1 and overlap(fused)
        only_fused = self.annex is None and not self._shares_columns and len(fused) == len(behind)
        self._only = fused if only_fused and self.generator is None else None
        self._shares_input = (
            self.thrifty and self._adds and any(bank.may_repeat for bank in [*self.permanent, *self._trial])
        )

    @property
    def adds(self) -> bool:
        return self.annex is not None or bool(self.beside) or bool(self.grafted)

    @property
    def shows_hidden(self) -> bool:
        """Whether somebody reads the annex's hidden activations."""
        return self.downstream_reads

    @property
    def permanent(self) -> list[Bank]:
        """All that has been grown for good: the annex and what stands beside it."""
        return [*([] if self.annex is None else [self.annex]), *self.beside]

    @property
    def grown_units(self) -> int:
        """Hidden units in the annex."""
        return 0 if self.annex is None else self.annex.units

    @property
    def grown_hidden(self) -> Tensor | None:
        """The annex's hidden activations in the forward that is running, for probes and for a downstream span."""
        return self._grown

    @property
    def annex_before(self) -> Bank | None:
        """What the span before has grown for good."""
        return None if self.upstream is None else self.upstream.annex

    @property
    def reads(self) -> int:
        """Features a new branch reads: the host's input and what the upstream annex offers."""
        return self.geometry.in_features + (self.upstream.grown_units if self.upstream is not None else 0)

    @property
    def repeated_flops_per_row(self) -> float:
        """What branches compute a second time, in the backward pass."""
        if not self.thrifty:
            return 0.0
        annex = [self.annex] if self.annex is not None and not self.downstream_reads else []
        return sum(bank.repeated_flops_per_row for bank in [*annex, *self.beside, *self._trial])

    # ---------------------------------------------------------------------------------------------- in a forward

    def compose(
        self, x: Tensor, y: Tensor, cohorts: AbstractSet[int], *, training: bool, writable: bool = False
    ) -> Tensor:
        """``y`` plus the annex and the branches of ``cohorts``; ``y`` is not written unless ``writable``."""
        return self._compose(x, y, self._on_trial(cohorts), training=training, writable=writable)

    def _on_trial(self, cohorts: AbstractSet[int]) -> list[Bank]:
        """In the order of germination: a set's own order would not survive a restore, and sums round by their order."""
        return [bank for cohort, bank in self.banks.items() if cohort in cohorts]

    def _compose(self, x: Tensor, y: Tensor, trial: list[Bank], *, training: bool, writable: bool = False) -> Tensor:
        """:meth:`compose` with banks.

        Every branch reads ``y`` as the host made it. Fused ones come first: where no two of them share a column, each
        finds its own still untouched in what the others have added to.
        """
        read = self.read(x)
        behind = [*self.beside, *trial]
        fused = [] if self._shares_columns else [bank for bank in behind if _fuses(bank)]
        writable = writable and self.annex is None and len(fused) == len(behind)  # the others read y after them
        out = y
        for bank in fused:
            out = bank.graft(out, writable=writable or out is not y)
        if training and self.generator is not None:
            self._seed_masks(y)
        if self.annex is not None and self.shows_hidden:
            self._grown = self.annex.hidden(self.annex.pick(read, y), training=training, generator=self.generator)
            out = self.annex.scatter(out, self.annex.project(self._grown))
        elif self.annex is not None:
            self._grown = None
            out = self._plus(out, self.annex, read, y, training)
        for bank in self.beside:
            if bank not in fused:
                out = self._plus(out, bank, read, y, training)
        for bank in trial:
            if bank not in fused:
                out = self._attempt(out, bank, read, y, training)
        return out

    def _plus(self, out: Tensor, bank: Bank, read: Tensor, y: Tensor, training: bool) -> Tensor:
        picked = bank.pick(read, y)
        thrifty = self.thrifty and may_recompute(picked)
        delta = bank.branch(picked, training=training, generator=self.generator, thrifty=thrifty)
        return bank.scatter(out, delta)

    def _attempt(self, out: Tensor, bank: Bank, read: Tensor, y: Tensor, training: bool) -> Tensor:
        """As :meth:`_plus` for a branch on trial: one that raises is left out, and noted, and the host goes on.

        A compiler's trace has no place for that.
        """
        if torch.compiler.is_compiling():
            return self._plus(out, bank, read, y, training)
        try:
            return self._plus(out, bank, read, y, training)
        except CONTAINED as error:
            cohort = next(number for number, other in self.banks.items() if other is bank)
            self.failures.setdefault(cohort, contained(error))
            return out

    def read(self, x: Tensor) -> Tensor:
        """What branches read: the host's input and, on a chain of spans, what the upstream annex computed."""
        if self.upstream is None or self.upstream.annex is None:
            return x
        grown = self.upstream._grown
        if grown is None:
            raise SiteError(
                f"site {self.info.name!r} reads what {self.upstream.info.name!r} has grown, which has not run in this "
                "forward; run the layers in the order in which they were found"
            )
        return torch.cat([x, grown.to(x.dtype)], dim=self.geometry.feature_axis)

    def _seed_masks(self, y: Tensor) -> None:
        """Let the branches' dropout masks follow from the host's random state, which is read, not advanced.

        The host's own dropout inside the span moves that state at each call, and a checkpoint restores it before it
        recomputes, so a recomputation draws the masks of its forward.
        """
        assert self.generator is not None
        state = torch.cuda.get_rng_state(y.device) if y.is_cuda else torch.get_rng_state()
        self.generator.manual_seed(zlib.crc32(state.numpy().tobytes(), self.mask_seed))
