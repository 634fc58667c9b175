"""Growth in the host's own tensors: the same function, the same optimizer, and a run that goes on."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from tests.models import Pair, mse
from tests.rigs import Rig, attach, keep_visible
from tests.span_hosts import SPAN_HOSTS, SpanHost
from torch import nn

import esper
from esper.errors import AbsorbError
from esper.protocol import Absorbed, Cancel

pytestmark = pytest.mark.integration

GRAFT = esper.GraftConfig(ramp_steps=4, timeout=40, stabilize_steps=3, warmup_steps=1, lr_boost=1.0, embargo=20)


def _rig(host: SpanHost, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: float) -> Rig:
    torch.manual_seed(3)
    model = host.build(3)
    optimizer = kind(model.parameters(), lr=3e-3, **settings)  # type: ignore[call-arg]
    return attach(
        model, optimizer, batches=host.batches(20, seed=1), held_out=host.batches(16, seed=7), graft=GRAFT,
    )  # fmt: skip


def _grown(host: SpanHost, kind: type[torch.optim.Optimizer] = torch.optim.AdamW, **settings: float) -> Rig:
    rig = _rig(host, kind, **settings)
    rig.train(3)
    for site in host.spans:
        keep_visible(rig, site, 5)
        rig.train(4)
    return rig


@pytest.mark.parametrize("host", SPAN_HOSTS, ids=lambda host: host.name)
def test_the_host_computes_the_same_with_wider_layers_of_its_own(host: SpanHost) -> None:
    rig = _grown(host)
    batch, before, total = rig.batches[2], None, rig.grower.kasmina.params
    keys, modules = list(rig.model.state_dict()), dict(rig.model.named_modules())
    rig.model.eval()
    with torch.no_grad():
        before = rig.model(batch[0])
    absorbed = rig.grower.absorb()
    with torch.no_grad():
        torch.testing.assert_close(rig.model(batch[0]), before, rtol=1e-4, atol=1e-5)
    rig.model.train()
    assert list(rig.model.state_dict()) == keys
    assert all(module is modules[name] for name, module in rig.model.named_modules())
    assert sum(p.numel() for p in rig.model.parameters()) == rig.grower.kasmina.params == total
    assert absorbed.params > 0 and set(absorbed.layers) <= set(modules)
    assert rig.events[-1] == absorbed and isinstance(absorbed, Absorbed)
    assert not any(site.permanent for site in rig.grower.kasmina.sites.values())


@pytest.mark.parametrize("host", SPAN_HOSTS, ids=lambda host: host.name)
def test_the_optimizer_owns_the_new_tensors_with_state_of_their_shape(host: SpanHost) -> None:
    rig = _grown(host)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in rig.optimizer.param_groups]
    rig.grower.absorb()
    owned = [p for group in rig.optimizer.param_groups for p in group["params"]]
    assert [id(p) for p in owned] == [id(p) for p in rig.model.parameters()]
    assert {id(p) for p in rig.optimizer.state} == {id(p) for p in owned}
    assert [{k: v for k, v in group.items() if k != "params"} for group in rig.optimizer.param_groups] == groups
    for parameter, state in rig.optimizer.state.items():
        assert all(
            v.shape == parameter.shape and bool(torch.isfinite(v).all())
            for v in (state["exp_avg"], state["exp_avg_sq"])
        )
        assert float(state["exp_avg_sq"].min()) >= 0
    rig.train(5)  # and it steps


def _twins(kind: type[torch.optim.Optimizer], **settings: float) -> tuple[Rig, Rig]:
    """The same grown run twice, one of them absorbed."""
    pair = SPAN_HOSTS[0]
    kept, absorbed = _grown(pair, kind, **settings), _grown(pair, kind, **settings)
    absorbed.grower.absorb()
    return kept, absorbed


def _distance(one: nn.Module, two: nn.Module, host: nn.Module) -> float:
    """How far two plain models are apart, as a share of how far they have come from ``host``."""
    gap = sum(float((a - b).detach().square().sum()) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    way = sum(float((a - b).detach().square().sum()) for a, b in zip(one.parameters(), host.parameters(), strict=True))
    return math.sqrt(gap / way)


@pytest.mark.parametrize(
    ("kind", "settings", "allowed"),
    [
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.01}, 1e-4),
        (torch.optim.AdamW, {"weight_decay": 0.1, "betas": (0.8, 0.9)}, 0.1),
    ],
)
def test_grown_units_go_on_learning_as_they_did(
    kind: type[torch.optim.Optimizer], settings: dict[str, float], allowed: float
) -> None:
    """SGD to rounding; Adam's further bias corrections follow the host's step count, which is later."""
    kept, absorbed = _twins(kind, **settings)
    start = kept.grower.export()
    kept.train(3), absorbed.train(3)
    assert _distance(kept.grower.export(), absorbed.grower.export(), start) < allowed
    plain = copy.deepcopy(start)  # without its moments the same three steps lead elsewhere
    optimizer = kind(plain.parameters(), lr=3e-3, **settings)  # type: ignore[call-arg]
    for turn in range(kept.turn - 3, kept.turn):
        mse(plain, kept.batches[turn % len(kept.batches)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert _distance(kept.grower.export(), plain, start) > 3 * allowed


def test_growth_goes_on_afterwards_and_counts_on() -> None:
    rig = _grown(SPAN_HOSTS[0])
    rig.grower.absorb()
    (info,) = rig.grower.sites()
    width = info.hidden_features
    cohort = rig.germinate(width=4)
    assert cohort.number == 2 and cohort.seed_ids == (1,)
    rig.order(Cancel(cohort=cohort.number, reason="test"))
    rig.train(40)  # its chunks rest a while
    keep_visible(rig, info.name, 3)
    rig.train(3)
    rig.grower.absorb()
    assert rig.grower.sites()[0].hidden_features == width + 3
    assert rig.grower.report().widths[info.name] == width + 3


def test_with_nothing_grown_nothing_changes() -> None:
    rig = attach(Pair())
    before = [id(p) for p in rig.model.parameters()]
    assert rig.grower.absorb().layers == ()
    assert [id(p) for p in rig.model.parameters()] == before


def _refused(rig: Rig, says: str) -> None:
    before = {name: (id(p), p.detach().clone()) for name, p in rig.model.named_parameters()}
    with pytest.raises(AbsorbError, match=says):
        rig.grower.absorb()
    for name, parameter in rig.model.named_parameters():
        assert id(parameter) == before[name][0] and torch.equal(parameter, before[name][1])
    rig.train(2)  # the run goes on


def test_what_holds_on_to_the_old_tensors_refuses() -> None:
    rig = _grown(SPAN_HOSTS[0])
    rig.germinate(width=2)
    _refused(rig, "no cohort may be on trial")
    rig.grower.finish()

    mse(rig.model, rig.batches[0]).backward()
    _refused(rig, r"holds a gradient of its present shape; call optimizer.step")

    handle = rig.grower.kasmina.plans[rig.grower.sites()[0].name].weight.register_hook(lambda g: g)
    _refused(rig, "has a hook of yours")
    handle.remove()
    rig.grower.absorb()


@pytest.mark.filterwarnings("ignore:grown units learn by AdamW")
@pytest.mark.parametrize(
    ("kind", "settings", "says"),
    [
        (torch.optim.NAdam, {}, "only the state of Adam, AdamW, SGD .* got NAdam"),
        (torch.optim.AdamW, {"amsgrad": True}, "without amsgrad"),
    ],
)
def test_only_known_optimizers(kind: type[torch.optim.Optimizer], settings: dict[str, float], says: str) -> None:
    _refused(_grown(SPAN_HOSTS[0], kind, **settings), says)


def test_growth_of_layers_stays_beside_them() -> None:
    rig = attach(Pair(), sites=esper.SitesConfig(layers=True))
    rig.train(2)
    keep_visible(rig, "fc1", 2)
    _refused(rig, "stays beside them until export")
