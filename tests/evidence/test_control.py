"""The control: what a cohort is compared with, and that measuring it leaves no trace."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tests.evidence.cohorts import COHORT, NULLS, Trial, useful
from tests.example_sites import attached, plant, settle
from tests.span_hosts import FUSED, GATED, FusedGatedFfn, GatedFfn, SpanHost
from torch import Tensor, nn

from esper.evidence.control import Recorder, WithoutCohort, fit_stand_in, probing, recalibrated
from esper.evidence.paired import paired_difference
from esper.kasmina.execution import Kasmina

pytestmark = pytest.mark.component


def _stand_in(model: nn.Module, kasmina: Kasmina, site: str, xs: list[Tensor], rows: int = 400) -> WithoutCohort:
    recorder = Recorder(COHORT, rows, torch.Generator().manual_seed(0))
    model.eval()
    with torch.no_grad(), probing(kasmina.sites, {site: recorder}):
        for x in xs:
            model(x)
    return fit_stand_in(recorder, kasmina.sites[site])


@torch.no_grad()
def _with_and_without(
    model: nn.Module, kasmina: Kasmina, site: str, probe: WithoutCohort, x: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    model.eval()
    present = model(x)
    with probing(kasmina.sites, {site: probe}):
        without = model(x)
    with probing(kasmina.sites, {site: WithoutCohort(COHORT)}):
        plain = model(x)
    return present, without, plain


# ----------------------------------------------------------------------------------------------------------------------
# No gain where the host's layer could have had it


@pytest.mark.parametrize("kind", ["redundant_linear", "constant", "duplicate_units", "duplicate_of_annex"])
def test_what_the_host_could_have_had_gains_nothing_though_the_host_leans_on_it(kind: str) -> None:
    strongest = 0.0
    for seed in range(6):
        trial = NULLS[kind](seed)
        xs = [x for x, _ in trial.held_out]
        probe = _stand_in(trial.model, trial.kasmina, trial.site, xs[:10])
        projected, plain = [], []
        for x, y in trial.held_out[10:]:
            outs = _with_and_without(trial.model, trial.kasmina, trial.site, probe, x)
            present, without, off = (float((out - y).square().mean()) for out in outs)
            projected.append(without - present)
            plain.append(off - present)
        assert np.abs(projected).max() < 1e-5
        result = paired_difference(plain)
        strongest = max(strongest, result.mean / result.standard_error)
    assert strongest > 4, "switching the branch off looks like a certain loss"


def test_a_useful_branch_gains_under_both_controls() -> None:
    trial = useful(0)
    probe = _stand_in(trial.model, trial.kasmina, trial.site, [x for x, _ in trial.held_out[:10]])
    gains: list[tuple[float, float]] = []
    for x, y in trial.held_out[10:]:
        outs = _with_and_without(trial.model, trial.kasmina, trial.site, probe, x)
        present, without, off = (float((out - y).square().mean()) for out in outs)
        gains.append((without - present, off - present))
    assert all(paired_difference([g[i] for g in gains]).low > 0 for i in (0, 1))


# ----------------------------------------------------------------------------------------------------------------------
# The stand-in on every kind of site


def _conv_net(norm: bool, stride: int) -> nn.Sequential:
    middle = [nn.BatchNorm2d(5)] if norm else []
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), *middle, nn.ReLU(), nn.Conv2d(5, 4, 3, stride, 1))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("columns", [None, torch.tensor([[0, 2], [3, 1]])], ids=["whole", "two-slots"])
def test_a_low_rank_branch_on_a_convolution_is_taken_over(stride: int, columns: Tensor | None) -> None:
    model, xs = _conv_net(norm=False, stride=stride), [torch.randn(4, 3, 7, 7) for _ in range(4)]
    kasmina = attached(model, xs[0], layers=True)
    plant(kasmina, "2", "low_rank", units=2, columns=columns)
    present, without, plain = _with_and_without(model, kasmina, "2", _stand_in(model, kasmina, "2", xs[:3]), xs[3])
    torch.testing.assert_close(without, present, atol=1e-5, rtol=1e-4)
    assert float((plain - present).abs().max()) > 0.01


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("grown", [0, 3])
def test_copies_of_channels_are_taken_over_permanent_ones_too(norm: bool, grown: int) -> None:
    model, xs = _conv_net(norm, 1), [torch.randn(6, 3, 6, 6) for _ in range(4)]
    site = "0-3" if norm else "0-2"
    kasmina = attached(model, xs[0])
    source: dict[str, Tensor] = {"w1": model[0].weight[:3], "b1": model[0].bias[:3]}  # type: ignore[dict-item, index]
    if grown:
        plant(kasmina, site, "bottleneck_conv", units=grown, cohort=5)
        source = {name: value[0] for name, value in settle(kasmina, site, cohort=5).params.items()}
    bank = plant(kasmina, site, "bottleneck_conv", units=3)
    with torch.no_grad():
        for name in ("w1", "b1"):
            bank.params[name][0].copy_(source[name])
    present, without, plain = _with_and_without(model, kasmina, site, _stand_in(model, kasmina, site, xs[:3]), xs[3])
    torch.testing.assert_close(without, present, atol=1e-4, rtol=1e-3)
    assert float((plain - present).abs().max()) > 1e-3


@pytest.mark.parametrize("dims", [1, 3])
def test_convolutions_of_other_dimensions_are_taken_over_too(dims: int) -> None:
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    kernel, stride, dilation = (3, 1, 2)[:dims], (2, 1, 1)[:dims], (1, 1, 2)[:dims]
    tail = conv(5, 4, kernel, stride, (1, 0, 1)[:dims], dilation)  # type: ignore[arg-type]
    model = nn.Sequential(conv(3, 5, 3, padding=1), nn.ReLU(), tail)
    xs = [torch.randn(8, 3, *(5, 4, 6)[:dims]) for _ in range(6)]
    kasmina = attached(model, xs[0], layers=True)
    plant(kasmina, "2", "low_rank", units=2)
    present, without, plain = _with_and_without(model, kasmina, "2", _stand_in(model, kasmina, "2", xs[:5]), xs[5])
    torch.testing.assert_close(without, present, atol=1e-4, rtol=1e-3)
    assert float((plain - present).abs().max()) > 0.01


@pytest.mark.parametrize("host", [GATED, FUSED], ids=lambda host: host.name)
@pytest.mark.parametrize("grown", [0, 3])
def test_copies_of_gated_units_are_taken_over_permanent_ones_too(host: SpanHost, grown: int) -> None:
    torch.manual_seed(0)
    model, xs, (site,) = host.build(5), [torch.randn(64, *host.x_shape) for _ in range(5)], host.spans
    kasmina = attached(model, xs[0])
    source = _gated_units(model)
    if grown:
        plant(kasmina, site, "gated", units=grown, cohort=5)
        source = {name: value[0] for name, value in settle(kasmina, site, cohort=5).params.items()}
    bank = plant(kasmina, site, "gated", units=3)
    with torch.no_grad():
        for name in bank.params.keys() - {"wd"}:
            bank.params[name][0].copy_(source[name][:3])
    present, without, plain = _with_and_without(model, kasmina, site, _stand_in(model, kasmina, site, xs[:4]), xs[4])
    torch.testing.assert_close(without, present, atol=1e-4, rtol=1e-3)
    assert float((plain - present).abs().max()) > 0.01


def _gated_units(model: nn.Module) -> dict[str, Tensor]:
    """Input weights of the host's own gated units, under the names of the blueprint."""
    if isinstance(model, GatedFfn):
        return {"wg": model.gate_proj.weight, "wu": model.up_proj.weight}
    assert isinstance(model, FusedGatedFfn)
    (wu, wg), (bu, bg) = model.proj.weight.chunk(2), model.proj.bias.chunk(2)
    return {"wg": wg, "wu": wu, "bg": bg, "bu": bu}


def test_rows_of_sequences_and_low_precision_hosts() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)).bfloat16()
    xs = [torch.randn(4, 9, 6).bfloat16() for _ in range(6)]
    kasmina = attached(model, xs[0], layers=True)
    plant(kasmina, "2", "low_rank", units=2)
    present, without, plain = _with_and_without(model, kasmina, "2", _stand_in(model, kasmina, "2", xs[:5]), xs[5])
    assert without.dtype == torch.bfloat16
    torch.testing.assert_close(without, present, atol=0.03, rtol=0.03)
    assert float((plain - present).float().abs().max()) > 0.1


def test_with_few_rows_the_stand_in_shrinks_instead_of_fitting_noise() -> None:
    """A branch that reads what the layer does not see: the best stand-in is a constant."""
    model = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    xs = [torch.randn(50, 40) for _ in range(3)]
    kasmina = attached(model, xs[0])
    bank = plant(kasmina, "0-2", "bottleneck", units=20)
    with torch.no_grad():
        model[0].weight[:, :20] = 0.0
        bank.params["w1"][..., 20:] = 0.0
        bank.params["w1"].mul_(5.0)
    few = _stand_in(model, kasmina, "0-2", xs[:1])  # 50 rows for 31 coefficients
    present, without, plain = _with_and_without(model, kasmina, "0-2", few, xs[2])
    assert float((without - present).square().mean()) < 1.2 * float((plain - present).square().mean())
    assert few.weight is not None and float(few.weight.abs().max()) < 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_no_stand_in_from_values_that_are_not_finite(bad: float) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    kasmina = attached(model, torch.randn(5, 3))
    plant(kasmina, "0-2", "bottleneck")
    assert _stand_in(model, kasmina, "0-2", [torch.full((9, 3), bad)]).weight is None
    assert fit_stand_in(Recorder(COHORT, 9, torch.Generator()), kasmina.sites["0-2"]).weight is None


def test_recorders_change_nothing_and_stay_within_their_rows() -> None:
    trial = NULLS["duplicate_units"](0)
    x = trial.held_out[0][0]
    recorder = Recorder(COHORT, 7, torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = trial.model(x)
        with probing(trial.kasmina.sites, {trial.site: recorder}):
            during = trial.model(x)
            trial.model(x)
    assert torch.equal(before, during) and recorder.rows == 14


# ----------------------------------------------------------------------------------------------------------------------
# Leaving no trace


def test_probes_leave_even_after_an_error() -> None:
    trial: Trial = NULLS["constant"](0)
    here = trial.kasmina.sites[trial.site]
    with pytest.raises(ZeroDivisionError), probing({trial.site: here}, {trial.site: WithoutCohort(COHORT)}):
        assert here.probe is not None
        raise ZeroDivisionError
    assert here.probe is None and here.engaged


def _normed() -> tuple[nn.Sequential, Kasmina, list[Tensor]]:
    model = _conv_net(norm=True, stride=1)
    xs = [torch.randn(4, 3, 5, 5) * (i + 1) + i for i in range(3)]
    for x in xs:
        model(x)
    kasmina = attached(model, xs[0])
    plant(kasmina, "0-3", "bottleneck_conv", units=2)
    return model, kasmina, xs


def test_recalibration_recomputes_statistics_and_restores_everything() -> None:
    model, kasmina, xs = _normed()
    norm, bank = model[1], kasmina.sites["0-3"].banks[COHORT]
    assert isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None
    with torch.no_grad():  # the branch's channels are the host's first two: their statistics must agree
        bank.params["w1"][0].copy_(model[0].weight[:2])  # type: ignore[index]
        bank.params["b1"][0].copy_(model[0].bias[:2])  # type: ignore[index]
        inner = [model[0].forward(x) for x in xs]
    model.train()
    model[2].eval()
    flags = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = {name: value.clone() for name, value in bank.buffers.items()}
    tensors = (norm.running_mean, norm.running_var, norm.num_batches_tracked)
    with recalibrated(model, kasmina.sites, [lambda x=x: model(x) for x in xs]):
        mean = torch.stack([h.mean((0, 2, 3)) for h in inner]).mean(0)
        var = torch.stack([h.var((0, 2, 3)) for h in inner]).mean(0)
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        torch.testing.assert_close(bank.buffers["mean"][0], mean[:2])
        torch.testing.assert_close(bank.buffers["var"][0], var[:2])
        assert not norm.training and bank.norm_momentum is None
    assert (norm.running_mean, norm.running_var, norm.num_batches_tracked) == tensors
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, buffers[name]) for name, value in bank.buffers.items())
    assert [module.training for module in model.modules()] == flags
    assert norm.momentum == 0.1 and bank.norm_momentum is None


def test_recalibration_restores_after_an_error() -> None:
    model, kasmina, xs = _normed()
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def broken() -> object:
        model(xs[0])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), recalibrated(model, kasmina.sites, [broken]):
        raise AssertionError("not reached")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert kasmina.sites["0-3"].banks[COHORT].norm_momentum is None


def test_without_norms_nothing_is_run() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False))
    runs: list[int] = []
    with recalibrated(model, {}, [lambda: runs.append(1)]):
        assert runs == [], "a calibration batch was run for nothing"
    assert runs == []
