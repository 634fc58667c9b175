"""What every start promises, with every blueprint, and what the fitted ones find out about held-back rows."""

from __future__ import annotations

import math

import pytest
import torch
from tests.example_sites import EXAMPLES, Example, make_bank
from torch import Tensor, nn

from esper.config import FitConfig
from esper.errors import UnknownNameError
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.capture import Rows
from esper.kasmina.gates import sanity_gate
from esper.kasmina.starts import STARTS, HostUnits, StartReport
from esper.kasmina.starts.correlation import has_kink
from esper.kasmina.starts.start import fit_and_check_rows
from esper.protocol import SiteKind

pytestmark = pytest.mark.component

KINKED = ("gradmax", "gradient_svd")
CONFIG = FitConfig(steps=150, batch_rows=512, lr=1e-2)
FITTED = [name for name in BLUEPRINTS if BLUEPRINTS[name].fits_rows]
PAIRS = [(name, EXAMPLES[kind][0]) for name in FITTED for kind in sorted(BLUEPRINTS[name].kinds)]
PAIRS += [("bottleneck", EXAMPLES[SiteKind.LINEAR_SPAN][1])]  # an activation without a kink
PAIRS += [("bottleneck_conv", example) for example in EXAMPLES[SiteKind.CONV_SPAN] if example.geometry.norm is None]
ALLOWED = [(s, b, e) for s in STARTS for b, e in PAIRS if STARTS[s].refusal(b, e.geometry) is None]


def _parametrize(triples: list[tuple[str, str, Example]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        ("start", "blueprint", "example"), triples, ids=[f"{s}-{b}-{e.name}" for s, b, e in triples]
    )


every_pair = pytest.mark.parametrize(("blueprint", "example"), PAIRS, ids=[f"{b}-{e.name}" for b, e in PAIRS])
every_allowed = _parametrize(ALLOWED)
every_fit = _parametrize([t for t in ALLOWED if STARTS[t[0]].sanity != "none"])
fitted_start = pytest.mark.parametrize("start", [name for name in STARTS if STARTS[name].sanity != "none"])


def _rows(blueprint: str, example: Example, *, noise: bool = False, batches: int = 6, size: int = 32) -> Rows:
    """Rows whose output and gradient a branch of this blueprint can reproduce, or pure noise."""
    generator = torch.Generator().manual_seed(11)
    x = example.rows(batches * size, generator)
    teacher = make_bank(blueprint, example, units=2, seed=5)
    by_itself = torch.Generator().manual_seed(12)
    own = torch.randn(len(x), example.geometry.out_features, generator=by_itself)
    read = teacher.pick(x, own)
    taught = teacher.branch(read, alpha=torch.ones(1), training=True, generator=None)
    y = taught if read is x else own
    if noise:
        y = torch.randn(y.shape, generator=generator)
    g = -(taught - taught.mean(0)) if not noise else torch.randn(y.shape, generator=generator)
    batch = torch.arange(batches).repeat_interleave(size)
    return Rows(x, y, g / g.square().mean().sqrt(), torch.arange(len(x)), batch)


def _out(bank: Bank, rows: Rows) -> Tensor:
    return bank.branch(bank.pick(rows.x, rows.y), alpha=torch.ones_like(bank.alpha), training=False, generator=None)


def _host(start: str, example: Example) -> HostUnits | None:
    """Random layers of the example's shape, for starts that ask for them."""
    if not STARTS[start].needs_host:
        return None
    layers = example.layers()
    generator = torch.Generator().manual_seed(21)
    for parameter in layers.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    norm = next((module for module in layers if isinstance(module, nn.BatchNorm2d)), None)
    return HostUnits.of(layers[0], norm, layers[-1], None)


def _prepare(
    start: str, bank: Bank, rows: Rows | None, example: Example, config: FitConfig, *, seed: int = 0
) -> StartReport:
    return STARTS[start].prepare(bank, rows, config, torch.Generator().manual_seed(seed), _host(start, example))


@every_allowed
@pytest.mark.parametrize("slots", [1, 3])
def test_preserving_starts_add_exactly_nothing_and_others_something(
    start: str, blueprint: str, example: Example, slots: int
) -> None:
    with torch.random.fork_rng():  # the example's own layers are built from the global stream
        host = _host(start, example)
    bank, rows = make_bank(blueprint, example, slots=slots), _rows(blueprint, example)
    before = torch.get_rng_state()
    STARTS[start].prepare(bank, rows, FitConfig(steps=3), torch.Generator().manual_seed(0), host)
    assert torch.equal(torch.get_rng_state(), before)
    out = _out(bank, rows)
    assert torch.isfinite(out).all()
    if start in KINKED and has_kink(example.geometry):
        assert 0 < float(out.square().mean().sqrt()) < 1e-3 * float(rows.y.square().mean().sqrt())
    else:
        assert bool((out == 0).all()) == STARTS[start].preserves_function
    assert not any(value.requires_grad for value in bank.params.values()), "a prepared bank does not learn yet"


@every_allowed
@pytest.mark.parametrize("slots", [1, 3])
def test_every_slot_learns_at_once(start: str, blueprint: str, example: Example, slots: int) -> None:
    """No start leaves a branch without any gradient (born dead)."""
    bank, rows = make_bank(blueprint, example, slots=slots), _rows(blueprint, example)
    _prepare(start, bank, rows, example, FitConfig(steps=3))
    bank.set_learning(True)
    y = rows.g if bank.columns is None else rows.g.index_select(example.geometry.feature_axis, bank.columns.flatten())
    read = bank.pick(rows.x, rows.y)
    out = bank.branch(read, alpha=torch.ones_like(bank.alpha), training=True, generator=None)
    gradients = torch.autograd.grad((out * y).sum(), list(bank.params.values()), allow_unused=True)
    energy = sum(g.flatten(1).square().sum(1) for g in gradients if g is not None)
    assert isinstance(energy, Tensor) and bool((energy > 0).all())


@every_allowed
def test_same_generator_same_weights(start: str, blueprint: str, example: Example) -> None:
    rows = _rows(blueprint, example)
    banks: list[Bank] = []
    for _ in range(2):
        bank = make_bank(blueprint, example)
        _prepare(start, bank, rows, example, FitConfig(steps=4), seed=3)
        banks.append(bank)
    assert all(torch.equal(banks[0].params[name], banks[1].params[name]) for name in banks[0].params)


@every_fit
def test_fits_explain_a_planted_function_on_other_batches(start: str, blueprint: str, example: Example) -> None:
    bank = make_bank(blueprint, example, units=8)
    # a gated branch's output is a product with long tails: the t statistic of few rows says little about it
    rows = _rows(blueprint, example, size=400 if blueprint == "gated" else 32)
    report = _prepare(start, bank, rows, example, CONFIG)
    assert report.t_statistic > 3
    if start != "tiny":  # linear in its inputs: what a kinked unit does beyond that is not its aim
        assert report.explained > 0.5
        assert report.flops > 3 * CONFIG.steps * bank.flops_per_row
        assert _passes(start, report.t_statistic, report.explained)
    assert report.flops > 0


@every_fit
def test_noise_fails_the_sanity_test(start: str, blueprint: str, example: Example) -> None:
    bank = make_bank(blueprint, example)
    report = _prepare(start, bank, _rows(blueprint, example, noise=True), example, CONFIG)
    assert report.explained < 0.05
    assert not _passes(start, report.t_statistic, report.explained)


@fitted_start
def test_without_two_batches_nothing_is_known_and_the_gate_refuses(start: str) -> None:
    blueprint, example = PAIRS[0]
    bank, one = make_bank(blueprint, example), _rows(blueprint, example, batches=1)
    before = {name: value.clone() for name, value in bank.params.items()}
    for rows in (None, one):
        report = _prepare(start, bank, rows, example, CONFIG)
        assert math.isnan(report.explained) and math.isnan(report.t_statistic) and report.flops == 0
        assert not _passes(start, report.t_statistic, report.explained)
    assert all(torch.equal(bank.params[name], value) for name, value in before.items())


@_parametrize([t for t in ALLOWED if not STARTS[t[0]].preserves_function])
def test_a_fitted_branch_starts_at_a_share_of_the_sites_output(start: str, blueprint: str, example: Example) -> None:
    bank, rows = make_bank(blueprint, example), _rows(blueprint, example)
    _prepare(start, bank, rows, example, FitConfig(steps=20, base_scale=0.1))
    held = fit_and_check_rows(rows)[1]
    size = _out(bank, held).square().mean().sqrt() / held.y.square().mean().sqrt()
    assert float(size) == pytest.approx(0.1, rel=1e-4)


@pytest.mark.parametrize(("batches", "held"), [(2, [1]), (3, [2]), (8, [6, 7]), (9, [7, 8])])
def test_checking_rows_come_from_the_last_quarter_of_the_batches(batches: int, held: list[int]) -> None:
    blueprint, example = PAIRS[0]
    train, check = fit_and_check_rows(_rows(blueprint, example, batches=batches, size=2))
    assert torch.unique(check.batch).tolist() == held
    assert sorted(torch.unique(train.batch).tolist() + held) == list(range(batches))


def test_unknown_starts_list_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"no start is called 'random'.*negative_gradient, random_zero"):
        STARTS["random"]


def _passes(start: str, t: float, explained: float) -> bool:
    return sanity_gate(
        STARTS[start].sanity, t_statistic=t, explained=explained, min_t=2.0, max_unexplained=0.9, capture_age=0,
        max_age=50,
    ).passed  # fmt: skip
