"""Bad input meets an error that states the rule, the value and the remedy; and nothing has changed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.models import Batch, Mlp, Pair, assert_same_state, mse, rows, snapshot
from tests.rigs import adamw, attach
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

import esper
from esper.kasmina.hooks import is_attached

pytestmark = pytest.mark.unit


def no_sites() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))


def normalised() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Flatten(), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    return model


class Shared(nn.Module):
    """One module, run twice a forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = self.fc2(torch.relu(self.fc1(x)))
        return self.head(x)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = (nn.Linear(8, 8, dtype=torch.complex64), nn.Linear(8, 4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.tanh(self.fc1(x.to(torch.complex64)))).real


def frozen() -> nn.Module:
    return Pair().requires_grad_(False)


def parametrised() -> nn.Module:
    model = Pair()
    nn.utils.parametrizations.weight_norm(model.fc1)
    return model


def lazy() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LazyLinear(4))


def scripted() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        return nn.Sequential(torch.jit.script(Pair()), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4))


def doubled() -> nn.Module:
    """The user's own hook stands between the last layer and what a branch adds."""
    model = Pair()
    model.fc2.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def attempt(model: nn.Module, **arguments: Any) -> esper.Grower:
    given: dict[str, Any] = {
        "optimizer": torch.optim.SGD([p for p in model.parameters() if not p.is_meta] or [torch.ones(1)], 0.1),
        "loss": mse, "evaluate": rows(16, seed=7),
    } | arguments  # fmt: skip
    return esper.Grower(model, given.pop("optimizer"), **given)


def config(**settings: Any) -> dict[str, Any]:
    return {"config": esper.Config(**settings)}


def short(number: int) -> Callable[[nn.Module], dict[str, Any]]:
    return lambda _: {"evaluate": rows(number)}


def nan_loss(model: nn.Module, batch: Batch) -> Tensor:
    return mse(model, batch) * float("nan")


def vector_loss(model: nn.Module, batch: Batch) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean(1)


def two_losses(model: nn.Module, batch: Batch) -> Any:
    return mse(model, batch), {}


def complex_loss(model: nn.Module, batch: Batch) -> Tensor:
    return mse(model, batch).to(torch.complex64)


def foreign(_: nn.Module) -> dict[str, Any]:
    return {"optimizer": adamw(Pair())}


Arguments = Callable[[nn.Module], dict[str, Any]]
NONE: Arguments = lambda _: {}  # noqa: E731

CASES: list[tuple[str, Callable[[], nn.Module], Arguments, type[Exception], str]] = [
    ("no activation", no_sites, NONE, esper.SiteError,
     r"at least one place that can grow, got none \(0: leads to the next layer without an activation.*SitesConfig"),
    ("norm in the way", normalised, NONE, esper.SiteError, r"got none \(0: its output passes through 'layer_norm'"),
    ("no parameters", nn.Identity, NONE, esper.AttachError, "must have parameters, got none; pass the nn.Module"),
    ("pattern", Mlp, lambda _: config(sites=esper.SitesConfig(include=("fc1-fc3",))), esper.SiteError,
     r"'fc1-fc3' matches none of 2 sites; near: .*'fc1-fc2'.*list all with"),
    ("exclude", Mlp, lambda _: config(sites=esper.SitesConfig(exclude=("blocks.*",))), esper.SiteError,
     r"'blocks\.\*' matches none of 2 sites"),
    ("all excluded", Mlp, lambda _: config(sites=esper.SitesConfig(exclude=("fc*",))), esper.SiteError,
     r"exclude must leave at least one of the 2 sites, got \('fc\*',\); leave a pattern out"),
    ("complex", Complex, NONE, esper.SiteError, r"got none \(fc1: complex \(branches compute with real numbers\)"),
    ("chunks", Pair, lambda _: config(sites=esper.SitesConfig(chunks=5)), esper.SiteError,
     r"between 1 and out_features=4, got 5; pass chunks=4"),
    ("tied", tied, NONE, esper.SiteError, r"0: tied to 2\.weight"),
    ("shared", Shared, NONE, esper.SiteError, r"fc1: runs 2 times a forward"),
    ("parametrised", parametrised, NONE, esper.SiteError, r"fc1: parametrised"),
    ("frozen", frozen, NONE, esper.SiteError, r"fc1: frozen \(requires_grad is False\)"),
    ("meta", lambda: Pair().to("meta"), NONE, esper.AttachError,
     r"materialised, 4 parameters are on the meta device \(fc1\.weight\); call model\.to_empty"),
    ("data parallel", lambda: nn.DataParallel(Pair()), NONE, esper.AttachError,
     r"pass the module inside it \(model.module\)"),
    ("data parallel inside", lambda: nn.Sequential(nn.DataParallel(Pair())), NONE, esper.AttachError,
     r"got nn\.DataParallel at '0'"),
    ("lazy", lazy, NONE, esper.AttachError, r"2 parameters of lazy modules have none yet \(2\.weight\); run it once"),
    ("scripted", scripted, NONE, esper.AttachError, r"got RecursiveScriptModule at '0'.*before torch\.jit\.script"),
    ("hooked", doubled, NONE, esper.SiteError, r"fc2: a forward hook .* of yours changes its output"),
    ("optimizer by name", Pair, lambda _: {"optimizer": "adam"}, esper.AttachError,
     r"must be a torch\.optim\.Optimizer or a list of them, got str; pass the one that is stepped"),
    ("parameters for an optimizer", Pair, lambda model: {"optimizer": list(model.parameters())}, esper.AttachError,
     r"list of them, got Parameter;"),
    ("no optimizer", Pair, lambda _: {"optimizer": None}, esper.AttachError, r"list of them, got NoneType;"),
    ("no optimizers", Pair, lambda _: {"optimizer": []}, esper.AttachError, r"list of them, got \[\];"),
    ("settings as a dict", Pair, lambda _: {"config": {"interval": 5}}, esper.ConfigError,
     r"must be an esper\.Config, got dict; say esper\.Config\(name=value\)"),
    ("loss by name", Pair, lambda _: {"loss": "mse"}, esper.AttachError, r"loss must be a function .*got str"),
    ("two losses", Pair, lambda _: {"loss": two_losses}, esper.AttachError,
     r"must return one number, got tuple; return the mean loss alone"),
    ("no loss", Pair, lambda _: {"loss": lambda model, batch: None}, esper.AttachError, r"one number, got NoneType;"),
    ("complex", Pair, lambda _: {"loss": complex_loss}, esper.AttachError, r"one number, got torch\.complex64;"),
    ("no batches at all", Pair, lambda _: {"evaluate": 5}, esper.AttachError,
     r"evaluate must be a list of held-out batches or a DataLoader, got int"),
    ("foreign optimizer", Pair, foreign, esper.AttachError,
     r"fc2\.weight is in none of 1; build the optimizer from model\.parameters\(\)"),
    ("no batches", Pair, short(0), esper.AttachError, r"must yield held-out batches, got none; pass evaluate="),
    ("few batches", Pair, short(13), esper.AttachError,
     r"at least 14 batches.*fewer than 7 can accept.*got 13; pass smaller"),
    ("nan", Pair, lambda _: {"loss": nan_loss}, esper.AttachError, r"must be a finite scalar, got nan; check evaluate"),
    ("vector", Pair, lambda _: {"loss": vector_loss}, esper.AttachError,
     r"must return one number, got a tensor of shape \(16,\); return the mean"),
    ("small budget", Pair, lambda _: config(budget=esper.BudgetConfig(params=81)), esper.ConfigError,
     r"budget\.params must be at least the host's 82, got 81; raise it"),
    ("strategy", Pair, lambda _: config(graft=esper.GraftConfig(strategy="fixed")), esper.UnknownNameError,
     "no strategy is called 'fixed'; did you mean 'fixed_ramp'.*known: drift_controlled, fixed_ramp"),
    ("start", Pair, lambda _: config(fit=esper.FitConfig(start="zero")), esper.UnknownNameError,
     "no start is called 'zero'; .*known: copy, .*negative_gradient, random_zero, reconstruction"),
    ("controller", Pair, lambda _: config(tamiyo=esper.TamiyoConfig(controller="oracle")), esper.UnknownNameError,
     "oracle.*heuristic"),
]  # fmt: skip


def _hooks(model: nn.Module) -> list[int]:
    python = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in python]


@pytest.mark.integration
@pytest.mark.parametrize(("build", "arguments", "error", "message"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_what_cannot_be_attached_to_says_why_and_is_left_alone(
    build: Callable[[], nn.Module], arguments: Arguments, error: type[Exception], message: str
) -> None:
    torch.manual_seed(1)
    model = build()
    bare = any(p.is_meta or isinstance(p, UninitializedParameter) for p in model.parameters())
    weights = {} if bare else snapshot(model)
    hooks = _hooks(model)
    flags, stream = [module.training for module in model.modules()], torch.get_rng_state()
    given = arguments(model)
    owner = torch.optim.SGD(list(model.parameters()) or [torch.ones(1)], 0.1)
    torch.set_rng_state(stream)
    with pytest.raises(error, match=message):
        attempt(model, **{"optimizer": owner, **given})
    assert not is_attached(model)
    assert _hooks(model) == hooks
    for stepped in (owner, given.get("optimizer")):
        if isinstance(stepped, torch.optim.Optimizer):
            assert not stepped._optimizer_step_pre_hooks and not stepped._optimizer_step_post_hooks
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.get_rng_state(), stream)
    assert all(not p._backward_hooks for p in model.parameters())
    if weights:
        assert_same_state(snapshot(model), weights)


def test_a_model_that_is_no_module_says_so() -> None:
    with pytest.raises(esper.AttachError, match=r"must be an nn\.Module, got function; pass the one that is trained"):
        esper.Grower(mse, adamw(Pair()), loss=mse, evaluate=rows(16))  # type: ignore[arg-type]


@pytest.mark.integration
def test_a_model_of_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each would grow another network."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(esper.AttachError, match=r"got DistributedDataParallel at '0': .*train on one device"):
            attempt(nn.Sequential(nn.parallel.DistributedDataParallel(Pair())))
        attempt(Pair())  # a group of one is one process
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
        with pytest.raises(esper.AttachError, match="got a process group of 2"):
            attempt(Pair())
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.integration
@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_an_error_in_the_users_own_loss_says_which_call_met_it(where: str) -> None:
    batches = [(x[:, :3].to(where), wanted.to(where)) for x, wanted in rows(16)]
    with pytest.raises(RuntimeError) as caught:
        attempt(Pair(), evaluate=batches)
    (note,) = caught.value.__notes__
    assert note.startswith("Esper called loss(model, batch) with the first batch of evaluate=")
    assert note.endswith("the batch is on meta, the model on cpu: move one of them") == (where == "meta")


@pytest.mark.integration
@pytest.mark.parametrize(("loss", "message"), [(None, "got NoneType"), ({"loss": 1.0}, "got dict"), ("low", "got str")])
def test_a_step_without_a_loss_says_so(loss: Any, message: str) -> None:
    rig = attach(Pair())
    rig.backward()
    rig.optimizer.step()
    with pytest.raises(esper.AttachError, match=rf"takes the training loss, one number, {message}; pass the value"):
        rig.grower.step(loss)


@pytest.mark.integration
def test_a_model_that_moves_to_another_device_afterwards_says_so() -> None:
    rig = attach(Pair())
    rig.model.to("meta")
    with pytest.raises(esper.SiteError, match=r"it was on cpu when .* is on meta now; move it first"):
        rig.model(torch.zeros(2, 8, device="meta"))


@pytest.mark.integration
def test_a_grown_model_that_has_diverged_is_not_exported() -> None:
    rig = attach(Pair())
    with torch.no_grad():
        rig.model.fc1.weight.fill_(float("nan"))
    with pytest.raises(esper.ExportError, match=r"whose loss must be finite, got nan: training has diverged"):
        rig.grower.export()


@pytest.mark.integration
def test_a_second_grower_is_refused_wherever_it_sits() -> None:
    inner = Pair()
    outer = nn.Sequential(inner, nn.GELU(), nn.Linear(4, 4))
    rig = attach(inner)
    hooks = [len(m._forward_hooks) for m in outer.modules()]
    for model in (inner, outer, copy.deepcopy(inner)):
        with pytest.raises(esper.AttachError, match=r"one Grower, this one has one already; call its detach\(\) first"):
            attempt(model)
    assert [len(m._forward_hooks) for m in outer.modules()] == hooks
    rig.grower.detach()
    attempt(outer)


@pytest.mark.integration
def test_a_part_that_cannot_grow_does_not_keep_the_rest_from_growing() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.good, self.fixed, self.shared = Pair(), Pair().requires_grad_(False), nn.Linear(4, 8)
            self.spare = nn.Linear(3, 3)
            self.out = nn.Linear(4, 4)
            self.twin = nn.Linear(4, 4)
            self.twin.weight = self.out.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.shared(torch.relu(self.good(x)))
            x = self.shared(torch.relu(self.fixed(x)))
            return self.twin(torch.relu(self.out(self.good.fc2.weight.new_ones(4) * x[..., :4])))

    model = Mixed()
    grower = attempt(model)
    assert [info.name for info in grower.sites()] == ["good.fc1-fc2"]
    reasons = {skipped.name: skipped.reason for skipped in grower.discovery.skipped}
    assert reasons["fixed.fc1"].startswith("frozen")
    assert reasons["shared"] == "runs 2 times a forward"
    assert reasons["out"] == "tied to twin.weight" and reasons["twin"] == "tied to out.weight"
    assert reasons["spare"] == "did not run in the probe forward"


@pytest.mark.integration
def test_an_optimizer_of_several_may_own_a_site() -> None:
    model = Mlp()
    halves = [adamw(model.fc1), torch.optim.SGD([*model.fc2.parameters(), *model.fc3.parameters()], 0.1)]
    grower = attempt(model, optimizer=halves)
    assert {name: host.rule for name, host in grower.clock.hosts.items()} == {"fc1-fc2": "sgd", "fc2-fc3": "sgd"}
    with pytest.raises(esper.AttachError, match=r"fc2\.weight is in none of 1"):
        attempt(Mlp(), optimizer=halves[:1])


@pytest.mark.integration
def test_a_batch_that_turns_nan_later_refuses_the_cohort_it_judges() -> None:
    held_out = rows(16, seed=7)
    rig = attach(Pair(), held_out=held_out)
    cohort = rig.germinate(start="random_zero")
    for x, _ in held_out:
        x.fill_(float("nan"))
    rig.train(60)
    (verdict,) = rig.grower.verdicts
    assert verdict.cohort == cohort.number and verdict.state is esper.Lifecycle.CULLED
    assert "finite" in verdict.reason


SETTINGS: list[tuple[Callable[[], object], str]] = [
    (lambda: esper.SitesConfig(chunks=0), r"chunks must be at least 1, got 0"),
    (lambda: esper.SitesConfig(include=()), r"at least one pattern, got \(\)"),
    (lambda: esper.SitesConfig(include="fc1-fc2"), r"include must be a tuple of patterns, got 'fc1-fc2'; use \('fc1-f"),  # type: ignore[arg-type]
    (lambda: esper.SitesConfig(exclude="fc*"), r"exclude must be a tuple of patterns, got 'fc\*'; use \('fc\*',\)"),  # type: ignore[arg-type]
    (lambda: esper.CaptureConfig(batches=1), r"batches must be at least 2 .*got 1; use 8"),
    (lambda: esper.FitConfig(scales=()), r"scales must be positive, got \(\)"),
    (lambda: esper.GraftConfig(ramp="steep"), r"linear, cosine or sigmoid, got 'steep'"),
    (
        lambda: esper.GraftConfig(ramp_steps=50, timeout=50),
        r"timeout must exceed graft.ramp_steps . graft.settle_steps, got 50",
    ),
    (lambda: esper.GraftConfig(drift_threshold=0.0), r"drift_threshold must be positive, got 0.0"),
    (lambda: esper.GraftConfig(pause_duration=-1), r"pause_duration must not be negative, got -1"),
    (lambda: esper.GraftConfig(performance_window=0), r"performance_window must be at least 1, got 0"),
    (lambda: esper.GraftConfig(performance_band=-0.1), r"performance_band must not be negative, got -0.1"),
    (lambda: esper.GraftConfig(grad_norm_window=0), r"grad_norm_window must be at least 1, got 0"),
    (lambda: esper.GraftConfig(grad_norm_band=(1.0, 2.0)), r"grad_norm_band must hold a low end .*got \(1.0, 2.0\)"),
    (lambda: esper.GraftConfig(grad_norm_band=(0.5, float("nan"))), r"grad_norm_band must hold .*got \(0.5, nan\)"),
    (lambda: esper.EvidenceConfig(fdr=0.0), r"fdr must lie between 0 and 1, got 0.0"),
    (lambda: esper.EvidenceConfig(calibration_share=0.6, confirm_share=0.4), r"leave room for the gate"),
    (lambda: esper.BudgetConfig(flops_share=0.9), r"at least 1 \(the host itself\), got 0.9"),
    (lambda: esper.TamiyoConfig(temper="calm"), r"conservative, balanced, aggressive or exploratory, got 'calm'"),
    (lambda: esper.Config(interval=0), r"interval must be at least 1, got 0; use 10"),
]


@pytest.mark.parametrize(("make", "message"), SETTINGS, ids=[message[:24] for _, message in SETTINGS])
def test_settings_outside_their_range(make: Callable[[], object], message: str) -> None:
    with pytest.raises(esper.ConfigError, match=message):
        make()


def test_every_error_is_of_one_family() -> None:
    for name in esper.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(esper, name), esper.EsperError)


@pytest.mark.integration
def test_an_export_with_a_cohort_on_trial_is_refused() -> None:
    rig = attach(Pair())
    cohort = rig.germinate(start="random_zero")
    rig.until(cohort, esper.Lifecycle.GRAFTING)
    with pytest.raises(esper.ExportError, match=r"only permanent growth can be exported, got cohorts \[1\]"):
        rig.grower.export()
    assert cohort.state is esper.Lifecycle.GRAFTING and is_attached(rig.model)
