"""What a layer's branch is compared with: all that its layer could have had, and the host from before it."""

from __future__ import annotations

import pytest
import torch
from tests.evidence.cohorts import COHORT, mean_squared_error
from tests.example_sites import attached, plant
from torch import Tensor, nn

from esper.config import EvidenceConfig
from esper.evidence.before import HostBefore, only_folds, smaller
from esper.evidence.control import Recorder, WithoutCohort, probing
from esper.evidence.evaluator import Evaluator
from esper.evidence.judge import Judge
from esper.evidence.tokens import TokenRecorder, recorder_for, stand_in_of
from esper.kasmina.execution import Kasmina

pytestmark = pytest.mark.component


def _stand_in(model: nn.Module, kasmina: Kasmina, site: str, xs: list[Tensor]) -> WithoutCohort:
    recorder = recorder_for(kasmina.sites[site], COHORT, 400, torch.Generator().manual_seed(0))
    with torch.no_grad(), probing(kasmina.sites, {site: recorder}):
        for x in xs:
            model(x)
    return stand_in_of(recorder, kasmina.sites[site])


def _without(model: nn.Module, kasmina: Kasmina, site: str, probe: WithoutCohort, x: Tensor) -> Tensor:
    with torch.no_grad(), probing(kasmina.sites, {site: probe}):
        return model(x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.LayerNorm(6), (9, 4, 6)), (nn.GroupNorm(2, 6), (9, 6, 5, 4)), (nn.BatchNorm1d(6), (40, 6))],
    ids=["layer-norm", "group-norm", "batch-norm"],
)
def test_scale_and_shift_of_a_norm_are_taken_over(layer: nn.Module, shape: tuple[int, ...]) -> None:
    model, xs = nn.Sequential(layer).eval(), [torch.randn(shape) for _ in range(4)]
    kasmina = attached(model, xs[0], layers=True)
    bank = plant(kasmina, "0", "affine")
    bank.params["scale"].add_(0.7)
    probe = _stand_in(model, kasmina, "0", xs[:3])
    assert not isinstance(probe, TokenRecorder) and probe.weight is not None
    torch.testing.assert_close(_without(model, kasmina, "0", probe, xs[3]), model(xs[3]), atol=1e-5, rtol=1e-4)


def test_attention_on_a_norm_is_not_taken_over() -> None:
    model, xs = nn.Sequential(nn.LayerNorm(6)).eval(), [torch.randn(30, 5, 6) for _ in range(4)]
    kasmina = attached(model, xs[0], layers=True)
    plant(kasmina, "0", "attention", units=6)
    probe = _stand_in(model, kasmina, "0", xs[:3])
    off = _without(model, kasmina, "0", WithoutCohort(COHORT), xs[3])
    missed = (_without(model, kasmina, "0", probe, xs[3]) - model(xs[3])).square().mean()
    assert 0.2 * (off - model(xs[3])).square().mean() < missed


TOKENS = [torch.randint(12, (20, 6), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def test_any_function_of_the_token_is_taken_over_on_an_embedding() -> None:
    model = nn.Sequential(nn.Embedding(12, 5), nn.Linear(5, 3)).eval()
    kasmina = attached(model, TOKENS[0], layers=True)
    plant(kasmina, "0", "low_rank", units=2)
    probe = _stand_in(model, kasmina, "0", TOKENS[:3])
    assert probe.stands_in
    difference = _without(model, kasmina, "0", probe, TOKENS[3]) - model(TOKENS[3]).detach()
    assert float(difference.abs().max()) < 1e-6


def test_the_context_around_a_token_is_not() -> None:
    model = nn.Sequential(nn.Embedding(12, 5)).eval()
    kasmina = attached(model, TOKENS[0], layers=True)
    plant(kasmina, "0", "attention", units=4)
    off = WithoutCohort(COHORT)
    probe = _stand_in(model, kasmina, "0", TOKENS[:3])
    present = model(TOKENS[3]).detach()
    errors = [float((_without(model, kasmina, "0", p, TOKENS[3]) - present).square().mean()) for p in (probe, off)]
    assert 0.1 * errors[1] < errors[0] < errors[1]


def test_tokens_never_seen_get_the_mean_and_too_few_rows_only_that() -> None:
    model = nn.Sequential(nn.Embedding(12, 5)).eval()
    kasmina = attached(model, TOKENS[0], layers=True)
    bank = plant(kasmina, "0", "low_rank", units=2)
    once = torch.arange(4)[None]
    probe = _stand_in(model, kasmina, "0", [once])
    added = bank.branch(once[..., None], training=False, generator=None)[0].detach()
    table = probe.table  # type: ignore[attr-defined]
    torch.testing.assert_close(table, added.mean(0).expand(12, 5), atol=1e-6, rtol=1e-5)


def test_a_branch_that_is_not_finite_has_no_stand_in() -> None:
    model = nn.Sequential(nn.Embedding(12, 5)).eval()
    kasmina = attached(model, TOKENS[0], layers=True)
    plant(kasmina, "0", "low_rank", units=2).params["u"].fill_(float("nan"))
    assert not _stand_in(model, kasmina, "0", TOKENS[:2]).stands_in


def test_recorders_go_by_the_kind_of_the_site() -> None:
    model = nn.Sequential(nn.Embedding(12, 5), nn.Linear(5, 3)).eval()
    sites = attached(model, TOKENS[0], layers=True).sites
    made = {name: type(recorder_for(site, 1, 8, torch.Generator())) for name, site in sites.items()}
    assert made == {"1": Recorder, "0": TokenRecorder}


# ----------------------------------------------------------------------------------------------------------------------
# The host from before the graft


def _trained() -> tuple[nn.Module, Kasmina, Judge]:
    """A host whose branch adds, step by step, what the host takes away: together they change nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 3))
    held = [(torch.randn(8, 6), torch.zeros(8, 3)) for _ in range(60)]
    kasmina = attached(model, held[0][0], layers=True)
    evaluator = Evaluator(model, mean_squared_error, held, calibration_share=0.2, confirm_share=0.3, seed=0)
    return model, kasmina, Judge(evaluator, kasmina.sites, EvidenceConfig(), seed=0)


def test_a_branch_that_only_the_present_host_needs_is_refused() -> None:
    model, kasmina, judge = _trained()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
    bank = plant(kasmina, "0", "low_rank", units=2)
    judge.note_graft(COHORT)
    moved = bank.params["u"][0] @ bank.params["v"][0]
    with torch.no_grad():
        model[0].weight.sub_(moved)
    judgement = judge.evaluate(COHORT, ["0"])
    assert not judgement.gate.passed and judgement.result.mean < 0
    judge.forget(COHORT)
    model[0].weight.data.add_(0.0)
    plain = Judge(judge.evaluator, kasmina.sites, EvidenceConfig(control="plain"), seed=0).evaluate(COHORT, ["0"])
    assert plain.gate.passed, "switching it off does hurt the host that leans on it"


def test_a_branch_that_helps_either_host_is_accepted() -> None:
    model, kasmina, judge = _trained()
    with torch.no_grad():
        model[0].bias.zero_()
    bank = plant(kasmina, "0", "low_rank", units=3)
    left, sizes, right = torch.linalg.svd(model[0].weight.detach(), full_matrices=False)
    with torch.no_grad():
        bank.params["u"][0].copy_(-left * sizes)
        bank.params["v"][0].copy_(right)
    judge.note_graft(COHORT)
    with torch.no_grad():
        model[0].weight.mul_(0.8)  # the host has come some of the way itself
    assert judge.evaluate(COHORT, ["0"]).gate.passed


def test_the_weights_are_the_same_tensors_with_the_same_bits_afterwards() -> None:
    model, kasmina, _ = _trained()
    plant(kasmina, "0", "low_rank")
    before = HostBefore(model, kasmina.sites, COHORT)
    old = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1.0)
    now, pointer = model[0].weight.detach().clone(), model[0].weight.data_ptr()
    with pytest.raises(KeyError), before.restored():
        assert torch.equal(model[0].weight, old)
        raise KeyError
    assert torch.equal(model[0].weight, now) and model[0].weight.data_ptr() == pointer


def test_only_cohorts_that_fold_as_a_whole_are_asked_twice() -> None:
    model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 6)).eval()
    kasmina = attached(model, torch.randn(3, 4, 6), layers=True)
    plant(kasmina, "0", "affine")
    plant(kasmina, "1", "low_rank")
    assert only_folds(kasmina.sites, COHORT)
    plant(kasmina, "0", "attention", cohort=2)
    plant(kasmina, "1", "affine", cohort=2)
    assert not only_folds(kasmina.sites, 2) and not only_folds(kasmina.sites, 3)


def test_the_smaller_difference_counts_and_nan_stays() -> None:
    values = smaller([1.0, 2.0, float("nan")], [3.0, -1.0, 0.0])
    assert values[:2] == [1.0, -1.0] and values[2] != values[2]
