"""A stack does to a host what a grower does to it: in lockstep, with the same first units."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from tests.greenhouse.twins import Real, plain

from esper.greenhouse.family import HostSpec, family_named
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.observing import observe
from esper.greenhouse.stages import finish
from esper.protocol import Command, Cull, Germinate, Observation, SeedPlan

pytestmark = pytest.mark.integration

COHORTS = {40: (("0-2", 8), ("2-4", 8)), 140: (("2-4", 6),), 220: (("0-2", 5), ("2-4", 4)), 300: (("0-2", 4),)}


def script(observation: Observation) -> Sequence[Command]:
    plans = COHORTS.get(observation.step)
    if plans is not None:
        seeds = tuple(SeedPlan(site=site, width=width, start="random_zero") for site, width in plans)
        return [Germinate(seeds=seeds)]
    return [Cull(cohort=observation.alive[0].cohort, reason="scripted")] if observation.step == 320 else []


def play(real: Real, dtype: torch.dtype) -> tuple[Hosts, list[float], list[Observation]]:
    hosts = Hosts([real.spec], real.config, dtype=dtype)
    hosts.given_units = real.planted
    losses: list[float] = []
    seen: list[Observation] = []
    while not hosts.done:
        hosts.advance(1)
        losses.append(hosts.lives[0].losses[-1])
        if hosts.step_count % hosts.config.interval == 0:
            seen.append(observe(hosts, 0))
            for command in real.script(seen[-1]):
                apply(hosts, 0, command)
    finish(hosts)
    return hosts, losses, seen


@pytest.mark.parametrize("family", ["teacher", "spirals"])
def test_lockstep(family: str) -> None:
    """float64: losses, gates, verdicts and costs agree over a whole run."""
    spec = HostSpec(family=family, task=2, seed=1, lr=1e-2)
    real = Real(spec, plain(family_named(family).config), script, dtype=torch.float64).run()
    hosts, losses, seen = play(real, torch.float64)
    # grown units are float32 in a grower: what is left of rounding grows with the steps
    np.testing.assert_allclose(losses[:40], real.losses[:40], rtol=1e-11)
    np.testing.assert_allclose(losses, real.losses, rtol=1e-2)
    assert np.median(np.abs(np.array(losses) / real.losses - 1)) < 1e-5
    kept = [(v.cohort, v.step, v.state, v.sites) for v in real.grower.verdicts]
    assert [(v.cohort, v.step, v.state, v.sites) for v in hosts.lives[0].verdicts] == kept
    for part, spent in real.grower.ledger.spent.items():
        assert hosts.lives[0].ledger.spent[part] == pytest.approx(spent, rel=1e-9), part
    assert float(hosts.test_losses()[0]) == pytest.approx(real.test_loss, rel=1e-3)
    _assert_same_sight(seen, real.controller.seen)


def _assert_same_sight(stacked: list[Observation], real: list[Observation]) -> None:
    assert len(stacked) == len(real)
    for mine, theirs in zip(stacked, real, strict=True):
        np.testing.assert_allclose(mine.sites, theirs.sites, rtol=1e-2, err_msg=f"at step {mine.step}")
        for name in ("step", "params", "host_params", "site_names", "stopped", "alive"):
            assert getattr(mine, name) == getattr(theirs, name), (name, mine.step)
        for name in (
            "held_out", "held_out_initial", "flops_per_step", "hidden", "grown", "eligible", "unit_params",
            "unit_flops", "train_loss", "loss_noise", "lr_share", "price",
        ):  # fmt: skip
            np.testing.assert_allclose(getattr(mine, name), getattr(theirs, name), rtol=1e-2, err_msg=name)
