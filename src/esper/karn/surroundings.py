"""The state of one training as its events tell it: where each site stands when something germinates there.

What comes out equals :func:`esper.worth.places` of the observation that the controller saw in the same step.
"""

from __future__ import annotations

import math

import numpy as np

from esper.protocol import Attached, HeldOut, SiteInfo, Telemetry
from esper.worth import Place
from esper.worth.place import log_ratio, progress, relative_energies, share


class Surroundings:
    """What was last told of a training."""

    def __init__(self) -> None:
        self.sites: dict[str, SiteInfo] = {}
        self.host_params = 0
        self.total_steps: int | None = None
        self.family = self.optimizer = ""
        self._held: list[tuple[int, float]] = []
        self._first: float = math.nan
        self._grown: dict[str, int] = {}
        self._energies: dict[str, float | None] = {}
        self._gains: dict[str, list[tuple[int, float]]] = {}
        self._kept: dict[str, list[int]] = {}

    def note(self, event: Attached | HeldOut | Telemetry) -> None:
        """Take up what an event says."""
        if isinstance(event, Attached):
            self.sites = {info.name: info for info in event.sites}
            self.host_params, self.total_steps = event.host_params, event.total_steps
            self.family, self.optimizer = event.family, event.optimizer
        elif isinstance(event, HeldOut):
            self._held.append((event.step, event.loss))
            self._first = event.loss if math.isnan(self._first) else self._first
        else:
            self._grown = dict(zip(event.sites, event.grown, strict=True))
            energies = relative_energies(np.array(event.gradient_energy, dtype=np.float64))
            self._energies = dict(zip(event.sites, energies, strict=True))

    def note_end(self, sites: tuple[str, ...], gain: float | None, step: int, *, kept: bool) -> None:
        """A cohort has ended on these sites."""
        for site in sites:
            self._gains.setdefault(site, []).append((step, math.nan if gain is None else gain))
            if kept:
                self._kept.setdefault(site, []).append(step)

    def go_back(self, step: int) -> None:
        """What came after ``step`` did not happen."""
        self._held = [entry for entry in self._held if entry[0] <= step]
        self._gains = {site: [e for e in entries if e[0] <= step] for site, entries in self._gains.items()}
        self._kept = {site: [s for s in steps if s <= step] for site, steps in self._kept.items()}

    @property
    def held_out(self) -> float | None:
        """Latest held-out loss."""
        return self._held[-1][1] if self._held and math.isfinite(self._held[-1][1]) else None

    def place(self, site: str, step: int, params: int) -> Place:
        """The site now; ``params`` is what the whole model has."""
        info = self.sites.get(site)
        held = math.nan if self.held_out is None else self.held_out
        gains, kept = self._gains.get(site), self._kept.get(site)
        age = None if not kept else share(step - kept[-1], self.total_steps)
        return Place(
            kind="" if info is None else str(info.kind), family=self.family, optimizer=self.optimizer,
            log_in=None if info is None else math.log(info.in_features),
            log_out=None if info is None else math.log(info.out_features),
            log_hidden=math.log(info.hidden_features) if info is not None and info.hidden_features else None,
            fill=self._fill(info), progress=progress(step, self.total_steps), loss_level=log_ratio(held, self._first),
            price=log_ratio(params, self.host_params), energy=self._energies.get(site),
            last_gain=share(gains[-1][1], held) if gains else None, age=age,
        )  # fmt: skip

    def _fill(self, info: SiteInfo | None) -> float | None:
        if info is None or info.hidden_features == 0:
            return None
        return self._grown.get(info.name, 0) / info.hidden_features
