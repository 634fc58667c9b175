"""Kasmina, the execution layer: owns sites, seeds, banks and annexes, and changes them between steps only.

It does what it is told and keeps host and seeds apart; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from esper.config import Config
from esper.kasmina.annex import fossilise
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.capture import renew
from esper.kasmina.cohort import Cohort
from esper.kasmina.discovery import Discovery, SitePlan
from esper.kasmina.family import host_family
from esper.kasmina.gates import Gate
from esper.kasmina.germination import Nursery, Room
from esper.kasmina.hooks import attach
from esper.kasmina.layout import laid_out
from esper.kasmina.lifecycle import learns_from_task
from esper.kasmina.ops import dispatch
from esper.kasmina.optim import Hyperparameters, SlotAdamW
from esper.kasmina.reading import Reading
from esper.kasmina.seeds import SeedTable
from esper.kasmina.site import Site
from esper.kasmina.starts import STARTS, HostUnits
from esper.kasmina.strategies import STRATEGIES
from esper.kasmina.telemetry import Readout, settle
from esper.protocol import Lifecycle, SeedPlan


class Kasmina:
    """Sites and everything that grows on them.

    Parameters
    ----------
    adaptive:
        Whether the host's optimizer scales steps by gradient statistics; decides the default start.
    """

    def __init__(self, model: nn.Module, discovery: Discovery, config: Config, *, adaptive: bool) -> None:
        self.config = config
        self.plans: dict[str, SitePlan] = {plan.info.name: plan for plan in discovery.sites}
        self.family = host_family(model)
        self.optimizer_family = "adaptive" if adaptive else "sgd"
        self.host_params = sum(parameter.numel() for parameter in model.parameters())
        self.device = next(model.parameters()).device
        self.is_on_cpu = self.device.type == "cpu"
        dispatch.prepare(self.device)
        self._norms = {
            name: None if plan.norm_name is None else model.get_submodule(plan.norm_name)
            for name, plan in self.plans.items()
        }
        infos = [plan.info for plan in discovery.sites]
        self.index = {info.name: number for number, info in enumerate(infos)}
        self.table = SeedTable([info.out_features for info in infos], [info.num_chunks for info in infos])
        self.sites = laid_out(self.plans, self.table.bounds, config)
        self.readout = Readout([site.telemetry for site in self.sites.values() if site.telemetry is not None])
        self.cohorts: dict[int, Cohort] = {}
        counts = (dict.fromkeys(self.sites, 0) for _ in range(3))
        self.rows_per_step, self.samples_per_batch, self.rows_per_batch = counts
        self.generator = torch.Generator().manual_seed(config.seed)
        self.optimizer = SlotAdamW(
            lr_boost=config.graft.lr_boost, lr_ceiling=config.graft.lr_ceiling, warmup_steps=config.graft.warmup_steps
        )
        self.nursery = Nursery(
            config=config, adaptive=adaptive, plans=self.plans, sites=self.sites, table=self.table, index=self.index,
            rows_per_step=self.rows_per_step, rows_per_batch=self.rows_per_batch,
            samples_per_batch=self.samples_per_batch, generator=self.generator,
        )  # fmt: skip
        self._grown, self.num_changes = False, 0
        """The latter rises whenever something is added, moved, removed or restored."""
        self._at_work: dict[str, Site] = {}  # where hooks have something to do
        self._branch_flops: float | None = None
        self._watching: bool | None = None
        self._switch = attach(list(discovery.sites), self.sites)

    def go_on_from(self, earlier: Kasmina) -> None:
        """Count cohorts and seeds, and draw, where an earlier one of the same run has left off."""
        self.nursery.next_cohort = earlier.nursery.next_cohort
        self.table.next_seed_id = earlier.table.next_seed_id
        self.generator.set_state(earlier.generator.get_state())

    def state(self) -> dict[str, Any]:
        """Everything that grows and what was seen of it, as a state tree; the tensors are its own, not copies."""
        return {
            "codes": {"blueprint": BLUEPRINTS.names, "strategy": STRATEGIES.names},
            "table": self.table.state(),
            "cohorts": [cohort.state_tree() for cohort in self.cohorts.values()],
            "sites": {name: site.state() for name, site in self.sites.items()},
            "rows_per_step": dict(self.rows_per_step),
            "samples_per_batch": dict(self.samples_per_batch),
            "rows_per_batch": dict(self.rows_per_batch),
            "generator": self.generator.get_state(),
            "next_cohort": self.nursery.next_cohort,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` has told; it takes over tensors and arrays."""
        table = dict(state["table"])
        for name, registry in (("blueprint", BLUEPRINTS), ("strategy", STRATEGIES)):
            table[name] = registry.translated(table[name], state["codes"][name])
        devices = {name: plan.weight.device for name, plan in self.plans.items()}
        cohorts = [Cohort.of(tree, devices) for tree in state["cohorts"]]
        self.table.restore(table)
        for name, site in self.sites.items():
            site.restore(state["sites"][name], devices[name])
        self.cohorts.clear()
        self.cohorts.update({cohort.number: cohort for cohort in cohorts})
        for name in ("rows_per_step", "samples_per_batch", "rows_per_batch"):
            counts: dict[str, int] = getattr(self, name)  # the nursery reads the same dictionaries
            counts.clear()
            counts.update(state[name])
        self.generator.set_state(state["generator"].cpu())
        self.nursery.next_cohort = state["next_cohort"]
        self._watching = None  # the sites know better, until they are told again
        self.refresh()

    def detach(self) -> None:
        """Remove every hook; the host is as it was before."""
        self._switch.detach()

    # ---------------------------------------------------------------------------------------------- measures

    @property
    def live_banks(self) -> list[Bank]:
        return [bank for site in self.sites.values() for bank in site.banks.values()]

    @property
    def params(self) -> int:
        """Host, annexes and live seeds."""
        annexes = sum(bank.num_params for site in self.sites.values() for bank in site.permanent)
        return self.host_params + annexes + sum(bank.num_params for bank in self.live_banks)

    def added_flops_per_step(self, rows: dict[str, int] | None = None, *, waiting: bool = False) -> float:
        """Forward FLOPs a step of all that is in the forward pass now, annexes included.

        ``waiting`` adds live seeds that are not in it yet: what a ceiling has to leave room for.
        """
        rows = self.rows_per_step if rows is None else rows
        total = 0.0
        for name, site in self.sites.items():
            active = [bank for cohort, bank in site.banks.items() if waiting or cohort in site.grafted]
            total += rows[name] * sum(bank.flops_per_row for bank in [*active, *site.permanent])
        return total

    def repeated_flops_per_step(self) -> float:
        """FLOPs a step of what branches compute a second time, in the backward pass."""
        return sum(self.rows_per_step[name] * site.repeated_flops_per_row for name, site in self.sites.items())

    @property
    def branch_flops_per_step(self) -> float:
        """FLOPs a training step of all that is in the forward pass: a forward, and a backward at twice its cost."""
        if self._branch_flops is None:
            self._branch_flops = 3.0 * self.added_flops_per_step() + self.repeated_flops_per_step()
        return self._branch_flops

    def units(self, site: str) -> int:
        """Hidden units a site has grown: annex and live seeds in the forward pass."""
        here = self.sites[site]
        return here.grown_units + sum(here.banks[c].units * here.banks[c].num_slots for c in here.grafted)

    # ---------------------------------------------------------------------------------------------- changes of state

    def germinate(
        self,
        plans: Sequence[SeedPlan],
        *,
        step: int,
        host_flops: float,
        budget_params: int | None,
        budget_flops: float | None,
    ) -> Cohort | Gate:
        """Make a cohort of ``plans``, all or nothing; a :class:`Gate` says why not.

        Raises
        ------
        EsperError
            For an unknown site, blueprint, start or strategy (the known ones are listed), or seeds that do not go
            together.
        """
        room = Room(
            params=self.params,
            flops=host_flops + self.added_flops_per_step(waiting=True),
            budget_params=budget_params,
            budget_flops=budget_flops,
        )
        made = self.nursery.germinate(plans, room, step=step)
        if isinstance(made, Cohort):
            self.cohorts[made.number] = made
            self.refresh()
        return made

    def move(self, cohort: Cohort, target: Lifecycle, step: int, slots: np.ndarray | None = None) -> None:
        """Move a cohort's seeds (or some of them) through the table, and its banks with them."""
        chosen = cohort.slots if slots is None else slots
        self.table.transition(chosen, target, step)
        if slots is not None and len(slots) < len(cohort.slots):
            return
        cohort.state, cohort.entered = target, step
        learns = bool(learns_from_task(int(target)))
        for name in cohort.sites:
            bank = self.sites[name].banks.get(cohort.number)
            if bank is not None:
                bank.set_learning(learns)
        self.refresh()

    def graft(self, cohort: Cohort) -> None:
        """Put the cohort's branches into the forward pass (at their present alpha)."""
        for name in cohort.sites:
            self.sites[name].grafted.add(cohort.number)
        self.refresh()

    def set_alpha(self, cohort: Cohort, alpha: float) -> None:
        """Write alpha of all seeds: host copy first, then the device mirror, in place."""
        self.table.set_alpha(cohort.slots, alpha)
        cohort.alpha = alpha
        for name in cohort.sites:
            self.sites[name].banks[cohort.number].alpha.fill_(alpha)

    def set_paused(self, cohort: Cohort, paused: bool, step: int) -> None:
        """Hold a cohort where it is, or let it go on; the time spent paused does not count."""
        self.table.set_paused(cohort.slots, paused)
        cohort.paused = paused
        cohort.entered = step - cohort.entered  # while paused: steps already spent; resumed: shifted start

    def drop_captures(self, cohort: Cohort, sites: Sequence[str] | None = None) -> None:
        """Free the captures that a cohort needs no longer, except where another cohort still does."""
        for name in self.own_captures(cohort, sites):
            self.sites[name].capture = None
        self.refresh()

    def own_captures(self, cohort: Cohort, sites: Sequence[str] | None = None) -> list[str]:
        """Sites of a cohort (or those of ``sites``) whose captures no other cohort needs."""
        needed = {
            name
            for other in self.cohorts.values()
            if other is not cohort and other.state in (Lifecycle.GERMINATED, Lifecycle.TRAINING)
            for name, member in other.members.items()
            if STARTS[member.start].needs_rows
        }
        return [name for name in (cohort.sites if sites is None else sites) if name not in needed]

    def remove(self, cohort: Cohort, step: int, embargo: int) -> None:
        """Free storage and chunks of a cohort at an end state; nothing of it stays in the forward pass."""
        for name in cohort.sites:
            site = self.sites[name]
            site.grafted.discard(cohort.number)
            site.banks.pop(cohort.number, None)
        self.drop_captures(cohort)
        if cohort.state is not Lifecycle.FOSSILIZED:
            self.table.set_alpha(cohort.slots, 0.0) if cohort.state is not Lifecycle.ROLLED_BACK else None
        self.table.release(cohort.slots, step, embargo)
        del self.cohorts[cohort.number]
        self.refresh()

    def drop_member(self, cohort: Cohort, site: str, step: int, embargo: int) -> None:
        """Cull one site's seeds of a cohort that goes on with the others (not yet in the forward pass)."""
        self.drop_captures(cohort, [site])
        member = cohort.members.pop(site)
        cohort.added_params -= self.sites[site].banks[cohort.number].num_params
        cohort.added_flops_share -= member.flops_share
        cohort.seed_ids = tuple(self.table.seed_id[cohort.slots].tolist())
        self.table.transition(member.slots, Lifecycle.CULLED, step)
        self.table.release(member.slots, step, embargo)
        self.sites[site].banks.pop(cohort.number, None)
        self.refresh()

    def thin(
        self, cohort: Cohort, site: str, kept: npt.NDArray[np.int64], step: int, embargo: int
    ) -> npt.NDArray[np.int64]:
        """Cull all but ``kept`` (positions, ascending) of a cohort's seeds on a site, none of them in the forward
        pass yet; returns the ids of those that left."""
        member, bank = cohort.members[site], self.sites[site].banks[cohort.number]
        leaving = np.delete(member.slots, kept)
        ids = self.table.seed_id[leaving].copy()
        params, share = bank.num_params, member.flops_share
        bank.select(torch.from_numpy(kept))
        member.flops_share = share * len(kept) / len(member.slots)
        member.slots = member.slots[kept]
        cohort.added_params -= params - bank.num_params
        cohort.added_flops_share -= share - member.flops_share
        cohort.seed_ids = tuple(self.table.seed_id[cohort.slots].tolist())
        self.table.transition(leaving, Lifecycle.CULLED, step)
        self.table.release(leaving, step, embargo)
        return ids

    def host_units(self, name: str) -> HostUnits:
        """The hidden units a span has now, for starts that copy or follow them."""
        plan, site = self.plans[name], self.sites[name]
        return HostUnits.of(plan.head, self._norms[name], plan.tail, site.annex, site.annex_before)

    def fossilise(self, cohort: Cohort, step: int, hosts: dict[str, Hyperparameters]) -> None:
        """Move a cohort into the annexes of its sites; its chunks are dormant again in the next generation."""
        for name in cohort.sites:
            site = self.sites[name]
            before = site.grown_units
            fossilise(site, cohort.number, list(range(len(cohort.members[name].slots))), betas=hosts[name].betas)
            self._widen_downstream(site, site.grown_units - before)
        self.move(cohort, Lifecycle.FOSSILIZED, step)
        self.remove(cohort, step, 0)

    def _widen_downstream(self, site: Site, extra: int) -> None:
        for other in self.sites.values():
            if other.upstream is site:
                for bank in [*other.banks.values(), *other.permanent]:
                    bank.widen_reads(extra)

    # ---------------------------------------------------------------------------------------------- every step

    @property
    def at_rest(self) -> bool:
        """Whether nothing is alive and nothing has been grown: every site is as the host made it."""
        return not self._grown

    @property
    def is_dormant(self) -> bool:
        """Whether it is at rest, without a cohort, and only sensors give hooks work."""
        return not (self._grown or self.cohorts) and self._watching is not None

    def learn(self, hosts: dict[str, Hyperparameters], *, inverse_scale: float) -> None:
        """One update of everything that learns, after a real host step."""
        if self.at_rest:
            return
        grown = [(name, [*site.banks.values(), *site.permanent]) for name, site in self.sites.items()]
        learning = [(bank, hosts[name]) for name, banks in grown for bank in banks if bank.learning]
        self.optimizer.step_all(learning, inverse_scale=inverse_scale)

    def damaged(self) -> dict[int, str]:
        """Cohorts with something non-finite since the last look (:attr:`Reading.damage`). Waits for the device once."""
        return Reading(self.sites.values(), (), ()).damage

    def take_failures(self) -> dict[int, str]:
        """Cohorts with a branch that has raised in the forward pass since the last call, and what."""
        found: dict[int, str] = {}
        for name, site in self.sites.items():
            if site.failures:
                found.update({cohort: f"{name}: {what}" for cohort, what in site.failures.items()})
                site.failures.clear()
        return found

    def forget_gradients(self) -> None:
        """Drop accumulated gradients of everything that learns (the host skipped its step)."""
        for bank in [bank for site in self.sites.values() for bank in [*site.banks.values(), *site.permanent]]:
            for value in bank.params.values():
                value.grad = None

    def note_rows(self, step: int, *, passes: int = 1) -> None:
        """Read and reset what the hooks counted since the last real step; note which captures are complete.

        ``passes`` backward passes made that step: a compiled graph notes the rows of one.
        """
        if not self._at_work:
            return  # no hook had anything to do
        settle(site.telemetry for site in self._at_work.values() if site.telemetry is not None)
        closed = False
        for name, site in self._at_work.items():
            if site.capture is not None:
                closed |= site.capture.after_step(step)
            calls, rows, samples = site.take_counts(passes)
            if calls:
                if rows != self.rows_per_step[name]:
                    self.rows_per_step[name], self._branch_flops = rows, None
                self.rows_per_batch[name] = rows // calls
                self.samples_per_batch[name] = samples // calls
        renew(site.capture for site in self._at_work.values() if site.capture is not None)
        if closed:
            self.refresh()

    def watch(self, due: bool) -> None:
        """Arm or disarm telemetry for the next step."""
        if due == self._watching:
            return  # whatever else changes what hooks do refreshes by itself
        self._watching = due
        for site in self.sites.values():
            site.watch(due)
        self._note_work()

    def refresh(self) -> None:
        """After a change: let every site decide what its hooks have to do from now on."""
        self.num_changes += 1
        for site in self.sites.values():
            site.refresh()
        self._grown, self._branch_flops = any(site.banks or site.adds for site in self.sites.values()), None
        self._note_work()

    def _note_work(self) -> None:
        self._at_work = {name: site for name, site in self.sites.items() if site.engaged}
        for name in self.sites.keys() - self._at_work.keys():
            self.sites[name].take_counts()  # of passes that came to no step: nobody would read them until it has work
        if not self._at_work and self._switch.armed:
            self._switch.disarm()
