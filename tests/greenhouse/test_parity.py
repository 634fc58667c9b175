"""A stack does to a host what a grower does to it: in lockstep, with the same first units."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from tests.example_sites import attached
from tests.greenhouse.twins import Scripted, Twin, assert_same_sight, play, without_snapshots
from torch import nn

from esper.greenhouse.episodes import Episodes
from esper.greenhouse.family import HostSpec, all_kept, family_named
from esper.greenhouse.isolated import Units, drawn, fit, tiny
from esper.greenhouse.life import Capture
from esper.greenhouse.real import RealHost, evaluate
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Rows
from esper.kasmina.starts import STARTS
from esper.kasmina.starts.start import HostUnits
from esper.protocol import Command, Cull, Germinate, Observation, SeedPlan

pytestmark = pytest.mark.integration

COHORTS = {40: (("0-2", 8), ("2-4", 8)), 140: (("2-4", 6),), 220: (("0-2", 5), ("2-4", 4)), 300: (("0-2", 4),)}


def script(start: str) -> Callable[[Observation], Sequence[Command]]:
    """Four cohorts of a start, and a cull. Of ``tiny`` two: its pseudo-inverse turns the last bits of float32 into
    thousandths, and with each further cohort into more."""
    cohorts = {step: COHORTS[step] for step in (40, 140)} if start == "tiny" else COHORTS

    def ask(observation: Observation) -> Sequence[Command]:
        plans = cohorts.get(observation.step)
        if plans is not None:
            return [Germinate(seeds=tuple(SeedPlan(site=site, width=width, start=start) for site, width in plans))]
        is_due = start != "tiny" and observation.step == 320 and observation.alive
        return [Cull(cohort=observation.alive[0].cohort, reason="scripted")] if is_due else []

    return ask


@pytest.mark.parametrize(
    ("family", "start", "keeps_all"),
    [
        ("teacher", "random_zero", False), ("spirals", "random_zero", False), ("teacher", "random_zero", True),
        ("teacher", "tiny", False), ("spirals", "tiny", False), ("teacher", "tiny", True),
    ],
)  # fmt: skip
def test_lockstep(family: str, start: str, keeps_all: bool) -> None:
    """float64: losses, gates, verdicts and costs agree over a whole run; where all is kept, annexes grow twice."""
    spec = HostSpec(family=family, task=2, seed=1, lr=1e-2)
    config = without_snapshots(family_named(family).config)
    real = Twin(spec, all_kept(config) if keeps_all else config, script(start), torch.float64)
    end = real.run()
    hosts, losses, seen = play(real, torch.float64)
    # grown units are float32 in a grower: what is left of rounding grows with the steps
    np.testing.assert_allclose(losses[:40], real.losses[:40], rtol=1e-11)
    np.testing.assert_allclose(losses, real.losses, rtol=1e-2)
    assert np.median(np.abs(np.array(losses) / real.losses - 1)) < 1e-5
    kept = [(v.cohort, v.step, v.state, v.sites) for v in real.grower.verdicts]
    assert [(v.cohort, v.step, v.state, v.sites) for v in hosts.lives[0].verdicts] == kept
    for part, spent in real.grower.ledger.spent.items():
        assert hosts.lives[0].ledger.spent[part] == pytest.approx(spent, rel=1e-9), part
    assert float(hosts.test_losses()[0]) == pytest.approx(end.loss, rel=1e-3)
    assert hosts.params(0) == end.params
    assert_same_sight(seen, real.player.seen)


def test_a_fit_is_the_growers_fit() -> None:
    """Same rows, same draws, same first weights: the same units, explained share, t statistic and cost."""
    torch.manual_seed(3)
    span = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))
    kasmina = attached(span, torch.randn(64, 10))
    geometry = kasmina.plans["0-2"].geometry
    units = drawn(6, 10, 3, (0.3, 0.2), torch.Generator().manual_seed(0))
    bank = Bank("bottleneck", geometry, units=6, reads=10, columns=None, generator=torch.Generator(), device="cpu")
    with torch.no_grad():
        for name, value in zip(("w1", "b1", "w2"), (units.w1, units.b1, units.w2), strict=True):
            bank.params[name].copy_(value[None])
    x = [torch.randn(64, 10) for _ in range(4)]
    y, g = [span(rows).detach() for rows in x], [torch.tanh(rows[:, :3]) * 3 for rows in x]
    scaled = torch.cat([part / part.square().mean().sqrt() for part in g])
    number = torch.arange(4).repeat_interleave(64)
    rows = Rows(torch.cat(x), torch.cat(y), scaled, torch.arange(256), number)
    config = family_named("teacher").config.fit
    wanted = STARTS["negative_gradient"].prepare(
        bank, rows, dataclasses.replace(config, steps=20), torch.Generator().manual_seed(9)
    )
    found = fit(units, Capture(x, y, g), config, steps=20, generator=torch.Generator().manual_seed(9))
    assert found.flops == wanted.flops
    assert found.explained == pytest.approx(wanted.explained, rel=1e-3)
    assert found.t_statistic == pytest.approx(wanted.t_statistic, rel=1e-3)
    for name, value in zip(("w1", "b1", "w2"), (units.w1, units.b1, units.w2), strict=True):
        torch.testing.assert_close(bank.params[name].detach()[0], value, rtol=1e-3, atol=1e-5)


def test_tiny_units_are_the_growers() -> None:
    """The same, beside units that have grown before."""
    torch.manual_seed(5)
    span = nn.Sequential(nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 3))
    geometry = attached(span, torch.randn(64, 10)).plans["0-2"].geometry
    banks = [
        Bank("bottleneck", geometry, units=units, reads=10, columns=None, generator=torch.Generator().manual_seed(n),
             device=torch.device("cpu"))
        for n, units in enumerate((3, 4))
    ]  # fmt: skip
    seed, annex = ([bank.params[name].detach()[0].clone() for name in ("w1", "b1", "w2")] for bank in banks)
    x = [torch.randn(64, 10) for _ in range(4)]
    y, g = [span(rows).detach() for rows in x], [torch.tanh(rows[:, :3] * rows[:, 3:6]) * 3 for rows in x]
    scaled = torch.cat([part / part.square().mean().sqrt() for part in g])
    number = torch.arange(4).repeat_interleave(64)
    rows = Rows(torch.cat(x), torch.cat(y), scaled, torch.arange(256), number)
    config = family_named("teacher").config.fit
    wanted = STARTS["tiny"].prepare(
        banks[0], rows, config, torch.Generator(), HostUnits.of(span[0], None, span[2], banks[1])
    )
    units, head = Units(*seed), span[0]
    assert isinstance(head, nn.Linear)
    host = Units(torch.cat([head.weight.detach(), annex[0]]), torch.cat([head.bias.detach(), annex[1]]), annex[2])
    found = tiny(units, Capture(x, y, g), host, config, hidden_flops=2.0 * (7 + 4) * 10)
    assert found.flops == wanted.flops
    assert found.explained == pytest.approx(wanted.explained, rel=1e-4)
    assert found.t_statistic == pytest.approx(wanted.t_statistic, rel=1e-4)
    for name, value in zip(("w1", "b1", "w2"), (units.w1, units.b1, units.w2), strict=True):
        torch.testing.assert_close(banks[0].params[name].detach()[0], value, rtol=1e-4, atol=1e-6)


def test_a_real_host_by_itself() -> None:
    """As evaluations run it, with the grower's own control."""
    spec = HostSpec(family="spirals", task=0, seed=0, lr=2e-2, steps=60)
    real = RealHost(spec, Scripted(lambda seen: []))
    end = real.run()
    assert real.grower.config.evidence.control == "projected" and not real.grower.verdicts
    stack = Episodes([spec])
    while not stack.done:
        stack.order([()])
    assert end.loss == pytest.approx(stack.outcomes[0].loss, rel=1e-4)
    assert end.flops == pytest.approx(stack.outcomes[0].flops, rel=1e-9)
    assert end.reward == pytest.approx(stack.outcomes[0].reward, rel=1e-3, abs=1e-3)
    assert evaluate([spec], [Scripted(lambda seen: [])]) == [end]
