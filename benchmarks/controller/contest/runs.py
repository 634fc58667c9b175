"""The cells of a contest: tuning in stacks, experience for Karn, and evaluation in stacks and under real growers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
from benchmarks.controller.contest.arms import START, make, names_of, plan_in
from benchmarks.controller.contest.policies import draw_hosts
from benchmarks.controller.schedules import NEVER, Schedule, schedules, scripted, tuned_schedules

from esper.greenhouse.episodes import Outcome, outcome
from esper.greenhouse.family import FAMILIES, HostSpec, data_of
from esper.greenhouse.frontier import FACTORS, LEARNING_RATES, frontier_of, shapes_of
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.observing import observe
from esper.greenhouse.real import RealHost
from esper.greenhouse.stages import finish
from esper.karn import AdvisedController, Architect, Collector, Snapshot
from esper.protocol import Germinate, Lifecycle
from esper.tamiyo import Controller, HeuristicController
from esper.tamiyo.features import FeatureReader, Features
from esper.tamiyo.neural.controller import NeuralController

TOGETHER = 8
"""Schedules played as one stack."""
TUNING = range(6)
EVALUATED = range(1064, 1080)
"""Tasks that nothing was trained, tuned or looked at on: evaluated once. Of longer families the first half."""
TUNING_SEED = 500
FIRST_SEED = 1000


class Watched:
    """Notes what a controller asks for."""

    def __init__(self, inner: Controller) -> None:
        self.inner, self.asked, self.calls = inner, list[tuple[int, int, float]](), 0

    def decide(self, observation: Any) -> tuple[Any, ...]:
        found, self.calls = self.inner.decide(observation), self.calls + 1
        for command in found:
            if isinstance(command, Germinate):
                rows = [observation.site_names.index(plan.site) for plan in command.seeds]
                size = float(
                    np.mean(
                        [
                            (p.width or 0) * p.seeds / observation.hidden[r]
                            for p, r in zip(command.seeds, rows, strict=True)
                        ]
                    )
                )
                self.asked.append((observation.step, -1 if len(rows) > 1 else rows[0], size))
        return found


def run_stack(
    specs: Sequence[HostSpec], controllers: Sequence[Any], *, start: str | None = None
) -> tuple[list[Outcome], list[int], Hosts]:
    """Hosts of a family under a controller each; also how many cohorts were kept. ``start`` holds where no plan names
    one."""
    config = FAMILIES[specs[0].family].config
    config = replace(config, total_steps=FAMILIES[specs[0].family].steps, fit=replace(config.fit, start=start))
    hosts = Hosts(specs, config)
    while not hosts.done:
        hosts.advance(hosts.config.interval)
        for number, controller in enumerate(controllers):
            if hosts.lives[number].stopped is None and not hosts.done:
                for command in controller.decide(observe(hosts, number)):
                    apply(hosts, number, command)
    finish(hosts)
    losses = hosts.test_losses().tolist()
    ends = [
        outcome(hosts, n, loss, frontier_of(s.family, s.task))
        for n, (s, loss) in enumerate(zip(specs, losses, strict=True))
    ]
    kept = [sum(v.state is Lifecycle.FOSSILIZED for v in life.verdicts) for life in hosts.lives]
    return ends, kept, hosts


def _told(end: Outcome, kept: int, asked: int, strange: float = 0.0) -> list[float]:
    """Reward, loss, FLOPs, parameters, cohorts asked for and kept, how often the heuristic stood in."""
    return [round(end.reward, 4), round(end.loss, 6), end.flops, end.params, asked, kept, round(strange, 3)]


def listed(kind: str, family: str, like: str | None = None) -> list[Schedule]:
    """All schedules of a kind for a family: ``even`` (36) or ``search`` (64), those for as many sites as ``like``
    has. Equal numbers name the same schedule in short and in long runs."""
    host = FAMILIES[family]
    if kind == "even":
        return tuned_schedules(host.config.interval, host.steps)
    return schedules(host.config.interval, host.steps, FAMILIES[like or family].num_sites)


def tune_schedules(family: str, kind: str, lr: float, numbers: Sequence[int]) -> list[float]:
    """Mean reward over tuning tasks of some schedules of a kind, by number."""
    host, every = FAMILIES[family], listed(kind, family)
    plans = [every[number] for number in numbers]
    found: list[float] = []
    for first in range(0, len(plans), TOGETHER):
        group = plans[first : first + TOGETHER]
        specs = [HostSpec(family=family, task=task, seed=TUNING_SEED, lr=lr) for _ in group for task in TUNING]
        ends, _, _ = run_stack(
            specs,
            [
                scripted(plan, data_of(host, spec.task).widths, names_of(spec))
                for plan, spec in zip([plan for plan in group for _ in TUNING], specs, strict=True)
            ],
        )
        found += [_mean(ends[row : row + len(TUNING)]) for row in range(0, len(ends), len(TUNING))]
    return found


def _mean(ends: Sequence[Outcome]) -> float:
    return round(float(np.mean([np.clip(end.reward, -10.0, 10.0) for end in ends])), 4)


def tune_static(family: str, lr: float) -> list[dict[str, float]]:
    """Mean reward of fixed widths, multiples of the host's own."""
    found: list[dict[str, float]] = []
    for row, factor in enumerate(FACTORS):
        values = [run[0] for run in _static(family, row, lr, TUNING_SEED, TUNING)]
        found.append({"factor": factor, "row": row, "lr": lr, "reward": float(np.mean(np.clip(values, -10.0, 10.0)))})
    return found


def _static(family: str, row: int, lr: float, seed: int, tasks: Sequence[int]) -> list[list[float]]:
    kind = FAMILIES[family]
    shapes = [shapes_of(kind, task, own=True)[row] for task in tasks]
    specs = [HostSpec(family=family, task=t, seed=seed, lr=lr, widths=w) for t, w in zip(tasks, shapes, strict=True)]
    ends, _, hosts = run_stack(specs, [scripted(NEVER, (), ())] * len(specs))
    found: list[list[float]] = []
    for number, (spec, end) in enumerate(zip(specs, ends, strict=True)):
        flops = hosts.lives[number].ledger.spent["host"]  # a fixed network needs no held-out looks
        reward = frontier_of(family, spec.task).reward(end.loss, flops)
        found.append([round(reward, 4), round(end.loss, 6), flops, end.params, 0, 0, 0])
    return found


def tune_arm(arm: str, family: str, folder: str) -> dict[str, Any]:
    """Mean reward at each learning rate over tuning tasks, and what was asked for."""
    found: dict[str, Any] = {"lr": {}, "asked": {}}
    for lr in LEARNING_RATES:
        specs = [HostSpec(family=family, task=task, seed=TUNING_SEED, lr=lr) for task in TUNING]
        watched = [Watched(make(arm, spec, folder)) for spec in specs]
        ends, _, _ = run_stack(specs, watched)
        found["lr"][str(lr)] = _mean(ends)
        found["asked"][str(lr)] = [one.asked for one in watched]
    return found


def evaluate(mode: str, *case: Any) -> list[list[float]]:
    """In a ``stack`` or under a ``real`` grower."""
    return {"stack": evaluate_stack, "real": evaluate_real}[mode](*case)


def evaluate_stack(arm: str, family: str, seed: int, folder: str, tasks: Sequence[int]) -> list[list[float]]:
    """Some tasks with one seed."""
    plan = plan_in(folder)
    if arm == "static":
        chosen = plan.tuned["static"][family]
        return _static(family, chosen["row"], chosen["lr"], FIRST_SEED + seed, tasks)
    specs = [HostSpec(family=family, task=t, seed=FIRST_SEED + seed, lr=plan.lr(arm, family)) for t in tasks]
    controllers = [make(arm, spec, folder) for spec in specs]
    if arm.startswith("shuffled:"):
        _show_others(specs, controllers, folder, arm)
    watched = [Watched(one) for one in controllers]
    ends, kept, _ = run_stack(specs, watched)
    return [_told(end, num, len(one.asked), _strange(one)) for end, num, one in zip(ends, kept, watched, strict=True)]


def _show_others(specs: Sequence[HostSpec], controllers: Sequence[Any], folder: str, arm: str) -> None:
    """Each policy sees what happened, under the same policy, on the next host."""
    recorded: list[list[Features]] = [[] for _ in specs]

    class Recording:
        def __init__(self, inner: Controller, into: list[Features]) -> None:
            self.inner, self.into, self.reader = inner, into, FeatureReader()

        def decide(self, observation: Any) -> Any:
            self.into.append(self.reader.read(observation))
            return self.inner.decide(observation)

    own = [make(arm.replace("shuffled", "policy"), spec, folder) for spec in specs]
    run_stack(specs, [Recording(one, into) for one, into in zip(own, recorded, strict=True)])
    for row, controller in enumerate(controllers):
        seen = recorded[(row + 1) % len(recorded)]
        controller._features = seen + [seen[-1]] * 40  # whoever stopped there is seen as it was


def evaluate_real(arm: str, family: str, seed: int, folder: str, tasks: Sequence[int]) -> list[list[float]]:
    """The same, each under a grower of its own."""
    plan, found = plan_in(folder), []
    for task in tasks:
        spec = HostSpec(family=family, task=task, seed=FIRST_SEED + seed, lr=plan.lr(arm, family))
        watched = Watched(make(arm, spec, folder))
        found.append(_real(spec, watched))
    return found


def _real(spec: HostSpec, watched: Watched) -> list[float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        host = RealHost(spec, _Passing(watched))
        end = host.run()
    kept = sum(v.state is Lifecycle.FOSSILIZED for v in host.grower.verdicts)
    return _told(end, kept, len(watched.asked), _strange(watched))


class _Passing:
    """A watched controller for a grower."""

    def __init__(self, watched: Watched) -> None:
        self._watched = watched

    def decide(self, observation: Any) -> tuple[Any, ...]:
        return self._watched.decide(observation)

    def state(self) -> dict[str, Any]:
        return self._watched.inner.state()

    def load(self, state: dict[str, Any]) -> None:
        self._watched.inner.load(state)


def _strange(watched: Watched) -> float:
    """Share of the decision points at which the heuristic stood in for a policy."""
    inner = getattr(watched.inner, "inner", watched.inner)
    if not isinstance(inner, NeuralController):
        return 0.0
    return 1.0 - inner.state()["decisions"] / max(1, watched.calls)


def gather(chunk: int, num: int) -> list[dict[str, Any]]:
    """Reports of real runs on training hosts, short and longer ones, growing what is drawn evenly from Karn's
    candidates."""
    found: list[dict[str, Any]] = []
    architect = Architect(Snapshot(), uniform=True)
    for number, spec in enumerate(draw_hosts(np.random.default_rng([chunk, 1 << 22]), num)):
        collector = Collector(f"gather-{chunk}-{number}", job=spec.family)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            controller = AdvisedController(HeuristicController(START), architect, seed=spec.seed)
            RealHost(spec, controller, on_event=collector.on_event).run()
        found += [msgspec.to_builtins(report) for report in collector.reports() if report.targets is not None]
    return found
