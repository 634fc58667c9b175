"""Peak memory: dormant, with the default pool of seeds, and at the worst moment of a whole lifecycle.

The pool that the default controller makes doubles what every span is wide inside, so the model itself becomes larger.
What an ordinary model of that size takes, trained without Esper, is measured beside it (``peak_bytes_wider``).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import nn

from esper.bench.hosts import Host
from esper.bench.record import Line
from esper.bench.tally import Counters, Meter, Tally, collected
from esper.bench.training import Training
from esper.config import CaptureConfig, Config, EvidenceConfig, FitConfig, GraftConfig, TamiyoConfig
from esper.export import merged
from esper.kasmina import memory
from esper.protocol import AnyEvent, Lifecycle, Transitioned
from esper.tamiyo import make_controller

BARS = {"dormant": 0.01, "default_pool": 0.05, "lifecycle": 0.10}
_LIFE_STEPS = 60
_PLACES = ("training", "between_steps")


@dataclass
class Moments:
    """Peaks of a run, by what its cohort was doing.

    ``most[state]`` holds for each place in a step (forward and backward, or ``grower.step``) the most bytes and the
    step in which they were needed; ``dormant`` and ``at_rest`` are what is alive between steps before the first seed
    and once all is over.
    """

    most: dict[str, dict[str, tuple[int, int]]] = field(default_factory=dict[str, dict[str, tuple[int, int]]])
    dormant: int = 0
    at_rest: int = 0

    def note(self, state: str, place: str, num_bytes: int, step: int) -> None:
        seen = self.most.setdefault(state, dict.fromkeys(_PLACES, (0, 0)))
        seen[place] = max(seen[place], (num_bytes, step), key=lambda found: found[0])

    def peak(self, state: str | None = None) -> tuple[int, int, str, str]:
        """Bytes, step, state and place of the largest peak (of one state, or of all); zeros where it was never in."""
        found = [
            (num_bytes, step, name, place)
            for name, places in self.most.items()
            for place, (num_bytes, step) in places.items()
            if state in (None, name)
        ]
        return max(found, default=(0, 0, "", ""), key=lambda moment: moment[0])

    def table(self) -> dict[str, dict[str, int]]:
        """Bytes by state and place."""
        return {state: {place: seen[place][0] for place in _PLACES} for state, seen in self.most.items()}


def life(host: Host, *, recompute: bool | None = None) -> Config:
    """A whole lifecycle in some forty steps, with the default captures, fit and pool; one cohort, no second one."""
    graft = GraftConfig(
        ramp_steps=4, timeout=40, stabilize_steps=3, stabilize_window=8, fine_tune_steps=5, cull_steps=4,
        recompute=recompute,
    )  # fmt: skip
    return Config(
        sites=host.sites, graft=graft, capture=CaptureConfig(), fit=FitConfig(), interval=5,
        tamiyo=TamiyoConfig(first=5, growth=1.0, spacing=1 << 20), evidence=EvidenceConfig(accept="always"),
        total_steps=None,
    )  # fmt: skip


@contextmanager
def metered(device: torch.device) -> Generator[Meter, None, None]:
    """Counts what lies on ``device``: a GPU's own counters, elsewhere a tally (what goes to the CPU's memory on a GPU
    is then left out)."""
    if device.type == "cuda":
        yield Counters(device)
        return
    with Tally(device.type) as tally:
        before, memory.to_host = memory.to_host, tally.uncounted(memory.to_host)
        try:
            yield tally
        finally:
            memory.to_host = before


def live(host: Host, device: torch.device, meter: Meter, config: Config) -> tuple[Moments, Training]:
    """Train from the first step to some steps after the end of the first cohort."""
    moments, reached = Moments(), list[str]()

    def note(event: AnyEvent) -> None:
        if isinstance(event, Transitioned):
            reached.append(event.target.name)

    controller = make_controller("heuristic", config.tamiyo, seed=0)
    training = Training(host, device, config, controller=controller, on_event=note)
    assert training.grower is not None
    left = 4
    for step in range(1, _LIFE_STEPS + 1):
        # the state a step begins in; what the host makes by itself in its first steps does not count as dormant
        state = reached[-1] if reached else "DORMANT"
        meter.reset()
        loss = training.train()
        moments.note(state, "training", meter.peak, step)
        meter.reset()
        training.grower.step(loss)
        moments.note(state, "between_steps", meter.peak, step)
        del loss
        if step == 2:
            moments.dormant = collected(meter)
        left -= bool(reached) and not training.grower.kasmina.cohorts
        if not left:
            break
    moments.at_rest = collected(meter)
    return moments, training


def alone(host: Host, device: torch.device, meter: Meter, *, model: nn.Module | None = None) -> tuple[int, int]:
    """Peak and bytes at rest of a training without Esper; ``model`` takes the place of the host's own."""
    training = Training(host, device, None, model=model)
    training.train()
    meter.reset()
    for _ in range(3):
        training.train()
    return meter.peak, collected(meter)


def peaks(host: Host, device: torch.device) -> Iterator[Line]:
    """One line a moment, as a share of what the bare host needs at its peak."""
    with metered(device) as meter:
        before = collected(meter)  # of others in this process
        bare, resting = (value - before for value in alone(host, device, meter))
        collected(meter)
        moments, training = live(host, device, meter, life(host))
        grower = training.grower
        assert grower is not None
        grown = grower.kasmina.params - grower.kasmina.host_params
        wide = merged(grower.model, grower.kasmina)
        del training, grower
        collected(meter)
        wider, _ = (value - before for value in alone(host, device, meter, model=wide))
    states = list(moments.most)
    for moment, num_bytes, step, state, place in _named(moments, before):
        share = num_bytes / bare - 1
        yield {
            "host": host.name, "phase": f"memory_{moment}", "peak_bytes_bare": bare, "peak_bytes": num_bytes,
            "added_memory_share": share, "peak_bytes_wider": wider, "over_wider_share": num_bytes / wider - 1,
            "state": state, "step": step, "place": place, "left_bytes": before, "grown_params": grown,
            "states": states, "bar_memory": BARS[moment], "met": share <= BARS[moment],
        }  # fmt: skip
    yield {
        "host": host.name, "phase": "memory_by_state", "peak_bytes_bare": bare, "resting_bytes_bare": resting,
        "resting_bytes_dormant": moments.dormant - before, "resting_bytes_after": moments.at_rest - before,
        "grown_params": grown,
        "by_state": {
            state: {place: num_bytes - before for place, num_bytes in seen.items()}
            for state, seen in moments.table().items()
        },
    }  # fmt: skip


def _named(moments: Moments, before: int) -> Iterator[tuple[str, int, int, str, str]]:
    pool = max((moments.peak(state.name) for state in _POOL), key=lambda moment: moment[0])
    for name, moment in (("dormant", moments.peak("DORMANT")), ("default_pool", pool), ("lifecycle", moments.peak())):
        num_bytes, step, state, place = moment
        yield name, num_bytes - before, step, state, place


_POOL = (Lifecycle.GRAFTING, Lifecycle.STABILIZATION, Lifecycle.EVALUATING, Lifecycle.FINE_TUNING)
"""States in which the pool is in the forward pass and on trial."""
