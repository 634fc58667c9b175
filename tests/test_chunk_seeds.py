"""Many small seeds on one layer, each on its own chunk: their whole life, and what is left of them."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from tests.models import Pair, same_bits
from tests.rigs import Rig, attach, host_of, make_visible
from torch import Tensor, nn

import esper
from esper.export import merged, structure
from esper.kasmina.bank import Bank
from esper.kasmina.cohort import Cohort
from esper.kasmina.ops import fit as fit_op
from esper.protocol import Fitted, Germinate, Lifecycle, SeedPlan

pytestmark = pytest.mark.integration

S = Lifecycle
SITE = "fc1"


def _rig(hidden: int = 6) -> Rig:
    rig = attach(Pair(hidden), sites=esper.SitesConfig(layers=True))
    rig.train(2)
    return rig


def _germinate(rig: Rig, chunks: list[int], *, start: str = "random_zero", width: int = 3) -> Cohort:
    seeds = [SeedPlan(site=SITE, chunks=(c,), blueprint="chunk_mlp", width=width, start=start) for c in chunks]
    rig.order(Germinate(seeds=tuple(seeds)))
    assert rig.grower.kasmina.cohorts, rig.refused()[-1:]
    return list(rig.grower.kasmina.cohorts.values())[-1]


def _graft(rig: Rig, chunks: list[int], *, alpha: float = 0.4, width: int = 3) -> Cohort:
    """A cohort in the forward pass, of visible size and paused."""
    cohort = _germinate(rig, chunks, width=width)
    kasmina, step = rig.grower.kasmina, rig.grower.clock.steps
    for state in (S.TRAINING, S.GRAFTING):
        if cohort.state is not S.GRAFTING:
            kasmina.move(cohort, state, step) if state > cohort.state else None
    kasmina.graft(cohort)
    kasmina.set_alpha(cohort, alpha)
    kasmina.set_paused(cohort, True, step)
    make_visible(rig.bank(cohort, SITE))
    return cohort


def _fossilise(rig: Rig, cohort: Cohort) -> None:
    kasmina, step = rig.grower.kasmina, rig.grower.clock.steps
    for state in (S.STABILIZATION, S.EVALUATING, S.FINE_TUNING):
        kasmina.move(cohort, state, step)
    kasmina.fossilise(cohort, step, rig.grower.clock.hosts)


def _by_hand(model: nn.Module, x: Tensor, banks: list[tuple[Bank, float]]) -> Tensor:
    """The host with the branches written out, each reading the host's own output."""
    host = host_of(model)
    assert isinstance(host, Pair)
    y = host.fc1(x)
    out = y.clone()
    for bank, alpha in banks:
        columns = torch.arange(y.shape[1])[None] if bank.columns is None else bank.columns
        for slot, here in enumerate(columns):
            w1, b1, w2 = (bank.params[name][slot] for name in ("w1", "b1", "w2"))
            out[:, here] += alpha * torch.nn.functional.silu(y[:, here] @ w1.T + b1) @ w2.T
    return host.fc2(host.act(out))


def test_a_cohort_of_chunks_lives_its_whole_life() -> None:
    rig = _rig()
    cohort = _germinate(rig, [0, 2, 3])
    bank = rig.bank(cohort, SITE)
    assert bank.num_slots == 3 and bank.width == 1
    rig.until(cohort, S.GRAFTING)
    before = {name: value.detach().clone() for name, value in bank.params.items()}
    rig.train(3)
    assert any(not torch.equal(bank.params[name], value) for name, value in before.items()), "it learns from the task"
    for _ in range(200):
        if not rig.grower.kasmina.cohorts:
            break
        rig.train()
    assert rig.grower.verdicts, "it came to an end of its own"


def test_the_forward_adds_each_seed_to_its_own_chunk() -> None:
    rig = _rig()
    cohort = _graft(rig, [4, 0, 5])
    x = rig.batches[0][0]
    torch.testing.assert_close(rig.model(x), _by_hand(rig.model, x, [(rig.bank(cohort, SITE), 0.4)]))


def test_host_and_seeds_get_their_gradients() -> None:
    rig = _rig()
    cohort = _graft(rig, [4, 0, 5])
    bank, x = rig.bank(cohort, SITE), rig.batches[0][0]
    bank.set_learning(True)
    rig.optimizer.zero_grad()
    rig.model(x).square().sum().backward()
    copied = copy.deepcopy(bank)
    host = host_of(rig.model)
    copied.set_learning(True)
    y = host.fc1(x)  # type: ignore[operator]
    out = copied.scatter(y, copied.branch(copied.pick(y, y), alpha=bank.alpha, training=True, generator=None))
    host.fc2(host.act(out)).square().sum().backward()  # type: ignore[operator]
    for name, value in bank.params.items():
        torch.testing.assert_close(value.grad, copied.params[name].grad)
    for one, two in zip(rig.model.parameters(), host.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad)


def test_what_becomes_permanent_stays_what_it_was_and_goes_on_learning() -> None:
    rig = _rig()
    kasmina, x = rig.grower.kasmina, rig.batches[0][0]
    first, second = _graft(rig, [4, 0]), _graft(rig, [5, 1, 2], alpha=0.7)
    for cohort in (first, second):
        rig.grower.kasmina.set_paused(cohort, False, rig.grower.clock.steps)
    before, params = rig.model(x).detach(), kasmina.params
    for cohort in (first, second):
        _fossilise(rig, cohort)
    site = kasmina.sites[SITE]
    torch.testing.assert_close(rig.model(x).detach(), before, atol=1e-6, rtol=1e-5)
    assert site.annex is None and [bank.num_slots for bank in site.beside] == [2, 3] and not site.banks
    assert [bank.columns.flatten().tolist() for bank in site.beside if bank.columns is not None] == [[4, 0], [5, 1, 2]]
    assert kasmina.params == params
    now, taken = site.beside[1].params["w1"].clone(), site.beside[1].moments.steps.tolist()
    rig.train(3)
    assert not torch.equal(now, site.beside[1].params["w1"]), "permanent seeds go on learning"
    assert site.beside[1].moments.steps.tolist() == [steps + 3.0 for steps in taken]


def test_a_second_generation_reads_the_hosts_own_output() -> None:
    """A chunk can be grown again: both seeds read the host's output, whatever the other adds."""
    rig = _rig()
    kasmina, x = rig.grower.kasmina, rig.batches[0][0]
    first = _graft(rig, [4, 0])
    kasmina.set_paused(first, False, rig.grower.clock.steps)
    _fossilise(rig, first)
    second = _graft(rig, [0, 3], alpha=0.5)
    site = kasmina.sites[SITE]
    with torch.no_grad():
        for value in rig.bank(second, SITE).params.values():
            value.mul_(-0.7)
    wanted = _by_hand(rig.model, x, [(site.beside[0], 1.0), (rig.bank(second, SITE), 0.5)])
    torch.testing.assert_close(rig.model(x), wanted)
    before = rig.model(x).detach()
    kasmina.set_paused(second, False, rig.grower.clock.steps)
    _fossilise(rig, second)
    assert [bank.num_slots for bank in site.beside] == [2, 2]
    torch.testing.assert_close(rig.model(x).detach(), before, atol=1e-6, rtol=1e-5)


def _grown() -> tuple[Rig, Tensor]:
    """Two stacks on overlapping chunks and a low-rank annex behind the same layer; one on the span around it."""
    rig = _rig()
    kasmina = rig.grower.kasmina
    for chunks, width in (([4, 0], 3), ([0, 3], 3), ([2], 2)):
        cohort = _graft(rig, chunks, width=width)
        kasmina.set_paused(cohort, False, rig.grower.clock.steps)
        _fossilise(rig, cohort)
    return rig, rig.batches[0][0]


def test_the_exported_model_computes_the_same_without_esper() -> None:
    rig, x = _grown()
    kasmina = rig.grower.kasmina
    for blueprint, site in (("low_rank", SITE), ("bottleneck", "fc1-fc2")):
        bank = Bank(
            blueprint, kasmina.sites[site].geometry, units=2, reads=kasmina.sites[site].reads, columns=None,
            generator=kasmina.generator, device=torch.device("cpu"),
        )  # fmt: skip
        bank.alpha.fill_(1.0)
        kasmina.sites[site].annex = bank
    kasmina.refresh()
    wanted = rig.model(x).detach()
    plain = merged(rig.model, kasmina)
    torch.testing.assert_close(plain(x).detach(), wanted, atol=1e-5, rtol=1e-4)
    assert all(type(module).__module__.split(".")[0] in ("torch", "tests") for module in plain.modules())
    assert structure(plain, kasmina)["fc1"] == {"branches": 4}, "the low-rank one, and one for each cohort of seeds"
    file = io.BytesIO()
    torch.save(plain.fc1, file)
    assert b"esper" not in file.getvalue()
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(x), plain.fc1(x))  # type: ignore[operator]
    plain(x).sum().backward()
    assert all(parameter.grad is not None for parameter in plain.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_exported_layer_computes_in_the_hosts_type(dtype: torch.dtype) -> None:
    rig, x = _grown()
    plain = merged(rig.model, rig.grower.kasmina)
    if dtype == torch.bfloat16:
        with torch.autocast("cpu", dtype):
            torch.testing.assert_close(plain(x), rig.model(x), atol=3e-2, rtol=3e-2)
    else:
        assert plain.double()(x.double()).dtype == dtype


def test_copies_carry_their_seeds_along() -> None:
    rig, x = _grown()
    cohort = _graft(rig, [1])
    twin = copy.deepcopy(rig.model)
    wanted = rig.model(x).detach()
    for bank in (*rig.grower.kasmina.sites[SITE].beside, rig.bank(cohort, SITE)):
        for value in bank.params.values():
            value.detach().zero_()
    assert same_bits(twin(x).detach(), wanted) and not same_bits(rig.model(x).detach(), wanted)


def test_a_cohort_without_itself_is_the_network_without_it() -> None:
    """What a judgement compares: the fast path writes nothing that the other side reads."""
    rig = _rig()
    cohort = _graft(rig, [4, 0])
    site = rig.grower.kasmina.sites[SITE]
    x = rig.batches[0][0]
    host = host_of(rig.model)
    y = host.fc1(x).detach()  # type: ignore[operator]
    kept = y.clone()
    without = site.compose(x, y, set(), training=False)
    with_it = site.compose(x, y, {cohort.number}, training=False)
    assert same_bits(without, kept) and same_bits(y, kept) and not same_bits(with_it, kept)


def test_a_thousand_seeds_are_one_operation() -> None:
    rig = attach(Pair(1024), sites=esper.SitesConfig(include=(SITE,), layers=True))
    rig.train(2)
    cohort = _graft(rig, list(range(1024)), width=2)
    bank = rig.bank(cohort, SITE)
    assert (bank.num_slots, bank.width, bank.num_params) == (1024, 1, 1024 * 6)
    operations: list[str] = []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        rig.model(rig.batches[0][0])
    operations = [event.name for event in profile.events()]
    assert operations.count("aten::index_add") == 1 and operations.count("aten::bmm") <= 2


def test_chunks_are_fitted_in_isolation_before_they_are_grafted(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[tuple[int, ...]] = []
    plainly = fit_op.fit

    def noted(w1: Tensor, *others: Any, **more: Any) -> None:
        before = w1.clone()
        plainly(w1, *others, **more)
        assert not torch.equal(before, w1)
        fitted.append(tuple(w1.shape))

    monkeypatch.setattr(fit_op, "fit", noted)
    rig = _rig()
    cohort = _germinate(rig, [0, 2, 3], start="negative_gradient")
    bank = rig.bank(cohort, SITE)
    drawn = bank.params["w1"].clone()
    rig.until(cohort, S.TRAINING)
    assert not fitted and torch.equal(bank.params["w1"], drawn)
    rig.train(10)
    (event,) = [event for event in rig.events if isinstance(event, Fitted)]
    assert fitted == [(3, 3, 1)] and math.isfinite(event.explained) and math.isfinite(event.t_statistic)
