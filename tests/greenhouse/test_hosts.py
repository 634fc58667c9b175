"""A host's fate is its own: alone or in a stack, again or from a copy, to the last bit or to rounding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from esper.errors import ConfigError
from esper.greenhouse.family import FAMILIES, HostSpec, all_kept, data_of, family_named, row_hashes
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.isolated import Units, drawn, fit
from esper.greenhouse.life import Capture
from esper.greenhouse.real import make_model
from esper.greenhouse.stages import finish
from esper.protocol import Germinate, Lifecycle, SeedPlan
from esper.runs.hosts import MLP

pytestmark = pytest.mark.component


def specs(*tasks: int, family: str = "teacher", steps: int | None = None) -> list[HostSpec]:
    return [HostSpec(family=family, task=task, seed=task + 1, lr=1e-2 * (1 + task), steps=steps) for task in tasks]


def germinate(hosts: Hosts, host: int, *sites: str, start: str = "negative_gradient", width: int = 5) -> str | None:
    return apply(hosts, host, Germinate(seeds=tuple(SeedPlan(site=s, width=width, start=start) for s in sites)))


def grow(hosts: Hosts, which: Sequence[int], until: int) -> Hosts:
    """Both sites of some hosts at step 20, one of them again at step 140."""
    while hosts.step_count < until:
        hosts.advance(20)
        for host in which:
            if hosts.step_count == 20:
                assert germinate(hosts, host, "0-2", "2-4") is None
            elif hosts.step_count == 140 and hosts.lives[host].seed_on(1) is None:
                germinate(hosts, host, "2-4", start="random_zero")
    return hosts


def test_alone_as_in_a_stack() -> None:
    """float64, growth on two of three hosts, a fit and a judgement included."""
    wanted = specs(0, 1, 2, steps=160)
    stack = grow(Hosts(wanted, dtype=torch.float64), [0, 2], 160)
    finish(stack)
    together = stack.test_losses()
    for number, spec in enumerate(wanted):
        alone = grow(Hosts([spec], dtype=torch.float64), [0] if number != 1 else [], 160)
        finish(alone)
        assert float(alone.test_losses()[0]) == pytest.approx(float(together[number]), rel=1e-6)
        assert alone.lives[0].ledger.spent == pytest.approx(stack.lives[number].ledger.spent)
        mine, theirs = alone.lives[0].verdicts, stack.lives[number].verdicts
        assert [(v.step, v.state) for v in mine] == [(v.step, v.state) for v in theirs]
    assert stack.lives[0].verdicts and not stack.lives[1].verdicts


def test_the_same_specs_give_the_same_bits() -> None:
    first, second = (grow(Hosts(specs(0, 1, steps=160)), [0], 100) for _ in range(2))
    assert torch.equal(first.network.values, second.network.values)
    assert first.lives[0].ledger.spent == second.lives[0].ledger.spent


def test_a_copy_goes_on_to_the_same_bits_and_shares_nothing() -> None:
    """Snapshot and restore, in the middle of a capture, a ramp and a fading branch."""
    for at in (20, 40, 60, 100):
        hosts = grow(Hosts(specs(0, 1, steps=160)), [0], at)
        snapshot = hosts.select([0, 1])
        before = snapshot.network.values.clone()
        grow(hosts, [0], 160)
        assert torch.equal(snapshot.network.values, before) and snapshot.step_count == at
        again = grow(snapshot.select([0, 1]), [0], 160)
        grow(snapshot, [0], 160)
        for copy in (again, snapshot):
            assert torch.equal(copy.network.values, hosts.network.values)
            assert copy.lives[0].ledger.spent == hosts.lives[0].ledger.spent
            assert [v.step for v in copy.lives[0].verdicts] == [v.step for v in hosts.lives[0].verdicts]


def test_branches_share_their_past_and_their_batches() -> None:
    hosts = grow(Hosts(specs(3, 4, steps=120)), [], 40)
    branches = hosts.select([1] * 4)
    assert germinate(branches, 2, "0-2", start="random_zero") is None
    branches.advance(80)
    values = branches.network.values
    # A/A: branches of equal actions agree to the last bit, so the credit of nothing is exactly nothing
    losses = branches.test_losses()
    assert losses[0] == losses[1] == losses[3] and losses[2] != losses[0]
    assert torch.equal(values[0], values[3]) and not torch.equal(values[0], values[2])


def test_stacks_are_of_one_kind() -> None:
    with pytest.raises(ConfigError, match="share family and steps"):
        Hosts([*specs(0), *specs(0, family="spirals")])
    with pytest.raises(ConfigError, match="got no host"):
        Hosts([])
    with pytest.raises(ConfigError, match="known: teacher"):
        family_named("cats")


# ----------------------------------------------------------------------------------------------------------------------
# Splits


@pytest.mark.parametrize("name", list(FAMILIES))
def test_no_row_is_in_two_splits(name: str) -> None:
    seen: set[bytes] = set()
    for task in (0, 1000):
        data = data_of(FAMILIES[name], task)
        for part in (data.train, data.held_out, data.test):
            hashes = row_hashes(part)
            assert len(hashes) == part[0].shape[0] and not hashes & seen
            seen |= hashes
        assert len(data.widths) == FAMILIES[name].num_sites
        y = data.train[1]
        if not y.is_floating_point():
            assert 0 <= int(y.min()) and int(y.max()) < FAMILIES[name].outputs


def test_evaluation_families_are_not_trained_on() -> None:
    training, evaluation = ({f.task for f in FAMILIES.values() if f.purpose == p} for p in ("training", "evaluation"))
    assert training and evaluation and not training & evaluation


# ----------------------------------------------------------------------------------------------------------------------
# Costs


def test_the_ledger_agrees_with_a_count_of_flops() -> None:
    """Within 2% of what PyTorch's counter finds for the same shapes: training, fit and evaluations."""
    hosts = Hosts(specs(0, steps=160), replace(all_kept(FAMILIES["teacher"].config), total_steps=160))
    hosts.advance(20)
    life, family = hosts.lives[0], hosts.family
    counted = 20 * _training_flops(MLP(family.inputs, life.widths, family.outputs), family.batch_rows)
    assert life.ledger.spent["host"] == pytest.approx(counted, rel=0.02)
    rows = hosts.config.evidence.held_out_batches * family.held_out_rows
    evaluation = _forward_flops(MLP(family.inputs, life.widths, family.outputs), rows)
    assert life.ledger.spent["evidence"] == pytest.approx(evaluation, rel=0.02)
    while not life.grown[0]:
        if not life.cohorts:
            germinate(hosts, 0, "0-2", start="random_zero", width=16)
        hosts.advance(20)
        assert not hosts.done
    before = life.ledger.spent["host"] + life.ledger.spent["branches"]
    hosts.advance(5)
    wider = MLP(family.inputs, (life.widths[0] + 16, life.widths[1]), family.outputs)
    spent = life.ledger.spent["host"] + life.ledger.spent["branches"] - before
    assert spent == pytest.approx(5 * _training_flops(wider, family.batch_rows), rel=0.02)


@pytest.mark.parametrize("name", ["textures", "grammar"])
def test_the_ledger_of_other_kinds_agrees_with_a_count_of_flops(name: str) -> None:
    spec = HostSpec(family=name, task=0, seed=0, lr=1e-3, steps=40)
    hosts = Hosts([spec], replace(FAMILIES[name].config, total_steps=40))
    hosts.advance(10)
    x, y = data_of(hosts.family, 0).train
    x, y = x[: hosts.family.batch_rows], y[: hosts.family.batch_rows]
    module = make_model(spec)
    with FlopCounterMode(display=False) as counter:
        found = module(x)
        torch.nn.functional.cross_entropy(found.reshape(-1, found.shape[-1]), y.reshape(-1)).backward()
    assert hosts.lives[0].ledger.spent["host"] == pytest.approx(10 * counter.get_total_flops(), rel=0.02)


def test_a_fit_is_counted_as_it_runs() -> None:
    units = drawn(6, 10, 3, (0.3, 0.3), torch.Generator().manual_seed(0))
    capture = _captured(4)
    with FlopCounterMode(display=False) as counter:
        report = fit(units, capture, family_named("teacher").config.fit, steps=12, generator=torch.Generator())
    # the counter misses nothing but the gradient of the input, which a fit does not need
    assert report.flops == pytest.approx(counter.get_total_flops(), rel=0.35)
    assert report.flops >= counter.get_total_flops()


def _captured(batches: int) -> Capture:
    torch.manual_seed(5)
    x = [torch.randn(64, 10) for _ in range(batches)]
    g = [torch.tanh(rows[:, :3]) for rows in x]
    return Capture(x, [torch.randn(64, 3) for _ in x], g)


def test_a_fit_holds_on_other_batches_where_there_is_something_to_learn() -> None:
    config = family_named("teacher").config.fit
    capture = _captured(4)
    units = drawn(16, 10, 3, (0.3, 0.3), torch.Generator().manual_seed(0))
    report = fit(units, capture, config, steps=150, generator=torch.Generator().manual_seed(1))
    assert report.explained > 0.3 and report.t_statistic > 5
    capture.g = [torch.randn(64, 3) for _ in capture.g]
    units = drawn(16, 10, 3, (0.3, 0.3), torch.Generator().manual_seed(0))
    report = fit(units, capture, config, steps=150, generator=torch.Generator().manual_seed(1))
    assert report.explained < 0.05 and report.t_statistic < 4


def test_batches_without_a_gradient_are_left_out_of_a_fit() -> None:
    capture = _captured(4)
    capture.g = [torch.zeros(64, 3) for _ in capture.g]
    units = Units(torch.ones(2, 10), torch.zeros(2), torch.ones(3, 2))
    report = fit(units, capture, family_named("teacher").config.fit, steps=5, generator=torch.Generator())
    assert report.flops == 0.0 and report.t_statistic != report.t_statistic
    assert torch.equal(units.w1, torch.ones(2, 10))


def _training_flops(model: MLP, rows: int) -> float:
    x = torch.randn(rows, model[0].in_features, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(x).sum().backward()
    return float(counter.get_total_flops())


def _forward_flops(model: MLP, rows: int) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(rows, model[0].in_features))
    return float(counter.get_total_flops())


# ----------------------------------------------------------------------------------------------------------------------
# Growth


def test_units_that_leave_leave_nothing() -> None:
    hosts = Hosts(specs(0, steps=160))
    hosts.advance(20)
    own = hosts.params(0)
    assert germinate(hosts, 0, "0-2", "2-4") is None and hosts.params(0) > own
    hosts.advance(20)
    finish(hosts)
    assert hosts.lives[0].verdicts[-1].state is Lifecycle.ROLLED_BACK and hosts.params(0) == own
    for group in hosts.network.groups:
        assert set(group[0].tolist()) <= {0, 1}
    mine = hosts.network.owner[0] == 1
    assert hosts.network.values[0, ~mine].count_nonzero() == 0
    assert hosts.network.moments.first[0, ~mine].count_nonzero() == 0
