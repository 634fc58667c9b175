"""Peak memory: dormant, with the default pool of seeds, and at the worst moment of a whole lifecycle."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from esper.bench.hosts import Host
from esper.bench.record import Line
from esper.bench.training import Training, allocated, peak, reset_peak
from esper.config import CaptureConfig, Config, EvidenceConfig, FitConfig, GraftConfig, TamiyoConfig
from esper.protocol import AnyEvent, Transitioned
from esper.tamiyo import make_controller

BARS = {"dormant": 0.01, "default_pool": 0.05, "lifecycle": 0.10}
_LIFE_STEPS = 60


def life(host: Host) -> Config:
    """A whole lifecycle in some forty steps, with the default captures, fit and pool."""
    graft = GraftConfig(
        ramp_steps=4, timeout=40, stabilize_steps=3, stabilize_window=8, fine_tune_steps=5, cull_steps=4
    )
    return Config(
        sites=host.sites, graft=graft, capture=CaptureConfig(), fit=FitConfig(), interval=5,
        tamiyo=TamiyoConfig(first=5), evidence=EvidenceConfig(accept="always"), total_steps=None,
    )  # fmt: skip


def peaks(host: Host, device: torch.device) -> Iterator[Line]:
    """One line a moment, as a share of what the bare host needs at its peak. Nothing is counted on a CPU."""
    bare = Training(host, device, None)
    alone = _peak_of(bare, 4)
    del bare
    left = allocated(device)  # of others in this process; not the watched training's
    config = life(host)
    reached: list[str] = []

    def note(event: AnyEvent) -> None:
        if isinstance(event, Transitioned):
            reached.append(event.target.name)

    controller = make_controller("heuristic", config.tamiyo, seed=0)
    watched = Training(host, device, config, controller=controller, on_event=note)
    found: dict[str, int] = {"dormant": _peak_of(watched, 4)}
    pool = worst = 0
    for _ in range(_LIFE_STEPS):
        reset_peak(device)
        watched.step()
        worst = max(worst, peak(device))
        if "GRAFTING" in reached and not pool:
            pool = _peak_of(watched, 1)
    found |= {"default_pool": pool, "lifecycle": worst}
    for moment, num_bytes in found.items():
        share = num_bytes / alone - 1 if alone and num_bytes else None
        line: Line = {"host": host.name, "phase": f"memory_{moment}", "peak_bytes_bare": alone, "peak_bytes": num_bytes}
        line |= {"added_memory_share": share, "left_bytes": left, "states": list(dict.fromkeys(reached))}
        if share is not None:
            line |= {"bar_memory": BARS[moment], "met": share <= BARS[moment]}
        yield line


def _peak_of(training: Training, steps: int) -> int:
    training.block(1)
    reset_peak(training.device)
    training.block(steps)
    return peak(training.device)
