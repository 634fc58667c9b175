"""The judge: acceptance, refusal of the unknown, costs, and no trace left on the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.evidence.cohorts import COHORT, NULLS, Trial, mean_squared_error, useful
from tests.example_sites import attached, plant
from torch import Tensor, nn

from esper.config import EvidenceConfig
from esper.errors import AttachError
from esper.evidence import judge as judge_module
from esper.evidence.control import Recorder, WithoutCohort
from esper.evidence.evaluator import Evaluator
from esper.evidence.judge import Judge
from esper.evidence.splits import spread
from esper.evidence.tokens import stand_in_of
from esper.kasmina.site import Site

pytestmark = pytest.mark.component


@pytest.fixture(scope="module")
def trial() -> Trial:
    return useful(1)


def _poisoned(trial: Trial, indices: tuple[int, ...], value: float) -> Trial:
    batches = [(x, torch.full_like(y, value)) if i in indices else (x, y) for i, (x, y) in enumerate(trial.held_out)]
    return replace(trial, held_out=batches)


def test_a_useful_cohort_is_accepted_and_the_numbers_agree(trial: Trial) -> None:
    judge = trial.judge()
    judged = judge.evaluate(COHORT, [trial.site])
    assert judged.gate.passed and judged.gate.name == "evidence"
    assert judged.e_value >= judged.threshold and judged.confirm_p <= 0.05
    assert judged.result.low > 0 and 8 <= judged.result.num <= judge.acceptance.confirm.window
    assert 0 < judged.num_batches <= len(judge.evaluator.splits.gate)
    assert (judge.acceptance.fdr.num_tests, judge.acceptance.fdr.num_rejected) == (1, 1)
    again = judge.evaluate(COHORT, [trial.site])
    assert again.threshold > judged.threshold / 2 and again.gate.passed


def test_a_null_cohort_is_refused_with_a_reason() -> None:
    null = NULLS["redundant_linear"](1)
    judge = null.judge()
    judged = judge.evaluate(COHORT, [null.site])
    assert not judged.gate.passed and judged.gate.reason
    assert judged.num_batches == len(judge.evaluator.splits.gate), "everything was looked at before the refusal"
    assert math.isnan(judged.confirm_p), "confirmation batches are spent on candidates for acceptance only"
    assert judge.acceptance.confirm.position == 0
    assert (judge.acceptance.fdr.num_tests, judge.acceptance.fdr.num_rejected) == (1, 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("part", ["calibration", "gate", "confirm"])
def test_unknown_evidence_refuses(trial: Trial, part: str, value: float) -> None:
    splits = trial.judge().evaluator.splits
    bad = _poisoned(trial, getattr(splits, part), value)
    if bad.held_out[0][1].isfinite().all():
        judge = bad.judge()
        judged = judge.evaluate(COHORT, [bad.site])
        assert not judged.gate.passed
        assert (judge.acceptance.fdr.num_tests, judge.acceptance.fdr.num_rejected) == (1, 0)
        assert math.isnan(judged.result.mean)
    else:  # the first batch is looked at before anything else
        with pytest.raises(AttachError, match="finite scalar"):
            bad.judge()


def test_one_nan_among_the_gate_batches_refuses_too(trial: Trial) -> None:
    gate = trial.judge().evaluator.splits.gate
    judge = _poisoned(trial, spread(gate)[5:6], math.nan).judge()
    assert not judge.evaluate(COHORT, [trial.site]).gate.passed


def _strict(trial: Trial, looks: int = 3) -> Judge:
    """A judge whom no cohort satisfies."""
    judge = trial.judge()
    return Judge(judge.evaluator, judge.sites, EvidenceConfig(fdr=1e-12, looks=looks), seed=0)


def test_looks_share_one_e_value(trial: Trial) -> None:
    judge, whole = _strict(trial), _strict(trial, looks=1).evaluate(COHORT, [trial.site], further=True)
    assert whole.look == 1 and not whole.undecided and whole.e_value > 1e3
    looks = [judge.evaluate(COHORT, [trial.site], further=True) for _ in range(3)]
    assert [judged.look for judged in looks] == [1, 2, 3]
    assert [judged.undecided for judged in looks] == [True, True, False]
    # the branch did not change in between, so each look finds the same: weights 1/2, 1/4, 1/4
    expected = [share * whole.e_value for share in (0.5, 0.75, 1.0)]
    assert [judged.e_value for judged in looks] == pytest.approx(expected, rel=1e-3)
    assert not any(judged.gate.passed for judged in looks) and judge.acceptance.fdr.num_tests == 1
    assert judge.evaluate(COHORT, [trial.site], further=True).look == 1, "the next test begins anew"


def test_without_time_for_more_a_look_counts_in_full(trial: Trial) -> None:
    judge = _strict(trial)
    first = judge.evaluate(COHORT, [trial.site], further=True)
    last = judge.evaluate(COHORT, [trial.site], further=False)
    assert not last.undecided and last.e_value == pytest.approx(2 * first.e_value, rel=1e-3)


def test_a_test_that_was_begun_counts_when_its_cohort_goes(trial: Trial) -> None:
    judge = _strict(trial)
    assert judge.evaluate(COHORT, [trial.site], further=True).undecided
    assert judge.acceptance.fdr.num_tests == 0
    judge.forget(COHORT)
    judge.forget(COHORT)
    assert (judge.acceptance.fdr.num_tests, judge.acceptance.fdr.num_rejected) == (1, 0)


def test_no_gain_is_not_looked_at_again() -> None:
    null = NULLS["noise_targets"](1)
    judged = _strict(null).evaluate(COHORT, [null.site], further=True)
    assert judged.result.mean <= 0 and not judged.undecided


def _fingerprint(trial: Trial) -> dict[str, Any]:
    here = trial.kasmina.sites[trial.site]
    bank = here.banks[COHORT]
    return {
        "state": {k: v.clone() for k, v in trial.model.state_dict().items()},
        "grads": [None if p.grad is None else p.grad.clone() for p in trial.model.parameters()],
        "flags": [m.training for m in trial.model.modules()],
        "requires": [p.requires_grad for p in (*trial.model.parameters(), *bank.params.values())],
        "bank": {k: v.clone() for k, v in (*bank.params.items(), *bank.buffers.items(), ("alpha", bank.alpha))},
        "site": (here.probe, set(here.grafted), here.engaged, here.num_calls, here.num_rows),
    }


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(_same(one[key], two[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(two) and all(_same(a, b) for a, b in zip(one, two, strict=True))
    return bool(one == two)


def _normed_trial() -> Trial:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 2, 3))
    batches = [(torch.randn(6, 2, 6, 6), torch.randn(6, 2, 2, 2)) for _ in range(12)]
    kasmina = attached(model, batches[0][0])
    plant(kasmina, "0-4", "bottleneck_conv", units=3)
    model.train()
    model[1].eval()
    return Trial(model, kasmina, "0-4", batches)


@pytest.mark.parametrize("normed", [False, True])
def test_judging_leaves_no_trace(trial: Trial, normed: bool, request: pytest.FixtureRequest) -> None:
    here = _normed_trial() if normed else trial
    judge = here.judge()
    request.getfixturevalue("unchanged_rng")
    before = _fingerprint(here)
    judge.evaluate(COHORT, [here.site])
    judge.hold(COHORT, [here.site], held_out=1.0, flops_share=0.1)
    judge.calibration_loss()
    judge.held_out(3)
    assert _same(before, _fingerprint(here))


def _noting(flops: list[float]) -> Callable[[Recorder, Site], WithoutCohort]:
    def stand_in(recorder: Recorder, site: Site) -> WithoutCohort:
        flops.append(recorder.flops)
        return stand_in_of(recorder, site)

    return stand_in


def test_a_regression_costs_its_products_and_an_eigenvalue_problem() -> None:
    recorder = Recorder(1, 10, torch.Generator())
    assert recorder.flops == 0.0
    recorder._add(torch.ones(7, 3).double(), torch.ones(7, 2).double())
    assert recorder.flops == 2 * 7 * 3 * (3 + 2) + 9 * 3**3 + 4 * 3**2 * 2


@pytest.mark.parametrize("normed", [False, True])
def test_every_forward_pass_is_paid_for(trial: Trial, normed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    here = _normed_trial() if normed else trial
    calls: list[int] = []

    def counted(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        calls.append(1)
        return mean_squared_error(model, batch)

    evaluator = Evaluator(here.model, counted, here.held_out, calibration_share=0.2, confirm_share=0.3, seed=0)
    evaluator.forward_cost = lambda num: 10.0 * num
    judge = Judge(evaluator, here.kasmina.sites, EvidenceConfig(), seed=0)
    regressions: list[float] = []
    monkeypatch.setattr(judge_module, "stand_in_of", _noting(regressions))
    calls.clear()
    judge.evaluate(COHORT, [here.site])
    judge.hold(COHORT, [here.site], held_out=1.0, flops_share=0.1)
    assert len(regressions) == 1 and min(regressions) > 0, "a look has a stand-in, the hold switches off"
    assert evaluator.ledger.spent["evidence"] == 10.0 * len(calls) + sum(regressions)
    assert evaluator.ledger.total == evaluator.ledger.spent["evidence"]


def test_holding_asks_for_a_gain_that_is_worth_its_cost(trial: Trial) -> None:
    judge = trial.judge()
    result, gate = judge.hold(COHORT, [trial.site], held_out=1.0, flops_share=0.5)
    assert gate.passed and result.low > 0
    dear = Judge(judge.evaluator, judge.sites, EvidenceConfig(min_gain_per_cost=100.0), seed=0)
    assert not dear.hold(COHORT, [trial.site], held_out=1.0, flops_share=0.5)[1].passed
    assert not judge.hold(COHORT, [trial.site], held_out=math.nan, flops_share=0.5)[1].passed


def test_what_chose_the_control_is_not_measured_twice(trial: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    judge = trial.judge()
    asked: list[tuple[int, ...]] = []
    losses = judge.evaluator.losses

    def noted(indices: tuple[int, ...]) -> list[float]:
        asked.append(tuple(indices))
        return losses(indices)

    monkeypatch.setattr(judge.evaluator, "losses", noted)
    judge.evaluate(COHORT, [trial.site])
    assert asked.count(judge.calibration) == 3, "as it is, switched off, and with the layer in its place"


def test_the_differences_behind_the_scale_are_those_of_the_chosen_control(
    trial: Trial, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = trial.judge()
    control = judge._control(COHORT, [trial.site])
    assert control.calibration == pytest.approx(judge._differences(control, judge.calibration), rel=1e-4)
    assert min(abs(value) for value in control.calibration) > 0


def test_min_gain_is_the_bar(trial: Trial) -> None:
    config = EvidenceConfig(min_gain=1e3)
    judge = Judge(trial.judge().evaluator, trial.kasmina.sites, config, seed=0)
    assert not judge.evaluate(COHORT, [trial.site]).gate.passed


def test_always_accepting_measures_nothing(trial: Trial) -> None:
    judge = Judge(trial.judge().evaluator, trial.kasmina.sites, EvidenceConfig(accept="always"), seed=0)
    judge.evaluator.forward_cost = lambda num: float(num)
    assert judge.evaluate(COHORT, [trial.site]).gate.passed
    assert judge.hold(COHORT, [trial.site], held_out=1.0, flops_share=0.1)[1].passed
    assert judge.evaluator.ledger.total == 0


# ----------------------------------------------------------------------------------------------------------------------
# The evaluator


def _evaluator(loss: Any, batches: Any) -> Evaluator:
    return Evaluator(nn.Identity(), loss, batches, calibration_share=0.2, confirm_share=0.3, seed=0)


def test_batches_are_read_once_without_moving_the_streams(unchanged_rng: None) -> None:
    data = torch.utils.data.TensorDataset(torch.ones(20, 2))
    evaluator = _evaluator(lambda model, batch: batch[0].mean(), torch.utils.data.DataLoader(data, 2, shuffle=False))
    assert len(evaluator.batches) == 10
    assert evaluator.losses([0, 3]) == [1.0, 1.0]
    assert float(evaluator.run_one()) == 1.0


def test_unusable_held_out_data_is_refused() -> None:
    with pytest.raises(AttachError, match="got none"):
        _evaluator(lambda model, batch: batch, [])
    with pytest.raises(AttachError, match="at least 8 batches"):
        _evaluator(lambda model, batch: batch, [torch.tensor(1.0)] * 7)
    with pytest.raises(AttachError, match="got nan"):
        _evaluator(lambda model, batch: batch, [torch.tensor(math.nan)] * 9)
    with pytest.raises(AttachError, match="one number"):
        _evaluator(lambda model, batch: batch, [torch.ones(3)] * 9)
    assert _evaluator(lambda model, batch: 2.5, [0] * 9).losses([1]) == [2.5]
