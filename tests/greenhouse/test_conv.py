"""Stacked conv nets against their modules, PyTorch's autograd and a real grower."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env
from tests.greenhouse.twins import Twin, assert_same_sight, play, without_snapshots
from torch import nn

from esper.errors import ConfigError, EsperError
from esper.greenhouse.bodies.conv import ConvNet
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.environment import ID, gymnasium
from esper.greenhouse.episodes import Episodes
from esper.greenhouse.family import FAMILIES, HostSpec, all_kept, family_named
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.layout import HOST, VOID, Layout, annex, live, owners
from esper.greenhouse.real import make_model
from esper.greenhouse.stack import losses, output_gradient
from esper.greenhouse.stages import finish
from esper.kasmina.ledger import forward_flops
from esper.protocol import Command, Cull, Germinate, Lifecycle, Observation, SeedPlan, SiteKind
from esper.tamiyo.actions import WAIT, Action, Operation

pytestmark = pytest.mark.component

SPANS = ("0-2", "2-4")
COHORTS = {40: (("0-2", 8),), 60: (("2-4", 8),), 160: (("2-4", 6),), 220: (("0-2", 5), ("2-4", 4)), 300: (("0-2", 4),)}


def specs(*tasks: int, steps: int | None = None, lr: float = 1e-2) -> list[HostSpec]:
    return [HostSpec(family="textures", task=task, seed=task + 1, lr=lr, steps=steps) for task in tasks]


def germinate(hosts: Hosts, host: int, *sites: str, width: int = 5, **plan: str) -> str | None:
    return apply(hosts, host, Germinate(seeds=tuple(SeedPlan(site=s, width=width, **plan) for s in sites)))


def ask(observation: Observation) -> Sequence[Command]:
    """Cohorts beside and behind what is kept of others, one behind one that is on trial, and a cull."""
    plans = COHORTS.get(observation.step)
    if plans is not None:
        return [Germinate(seeds=tuple(SeedPlan(site=site, width=width) for site, width in plans))]
    is_due = observation.step == 320 and observation.alive
    return [Cull(cohort=observation.alive[0].cohort, reason="scripted")] if is_due else []


# ----------------------------------------------------------------------------------------------------------------------
# One pass


@pytest.fixture
def grown() -> Hosts:
    """Three hosts of other widths, one of them with an annex on its first site and seeds behind it."""
    hosts = Hosts(specs(0, 1, 2, steps=200), all_kept(FAMILIES["textures"].config), dtype=torch.float64)
    hosts.advance(20)
    assert germinate(hosts, 1, "0-2") is None
    hosts.advance(60)
    assert hosts.lives[1].grown == [5, 0]
    assert germinate(hosts, 1, *SPANS, width=3) is None
    hosts.advance(20)
    return hosts


@pytest.mark.parametrize("blended", [True, False])
def test_gradients_are_those_of_autograd(grown: Hosts, blended: bool) -> None:
    body, network = grown.body, grown.network
    torch.manual_seed(0)
    x, y = torch.randn(3, 5, 1, 8, 8, dtype=torch.float64), torch.randint(6, (3, 5))
    alphas = [torch.rand_like(alpha) for alpha in network.alphas] if blended else None
    leaf = network.values.clone().requires_grad_()
    wanted = losses(body.forward(network.layout.views(leaf.clone()), x, alphas).output, y)
    wanted.sum().backward()
    run = body.forward(network.weights, x, alphas, learns=True)
    loss, delta = output_gradient(run.output, y)
    found = torch.full_like(network.values, torch.nan)
    body.backward(network.weights, network.layout.views(found), run, delta, alphas)
    assert leaf.grad is not None
    torch.testing.assert_close(loss, wanted.detach())
    torch.testing.assert_close(found, leaf.grad)


def test_a_host_computes_what_its_module_does() -> None:
    """First weights, outputs, what a site puts out, FLOPs and names."""
    hosts = Hosts(specs(0, 1, 2, steps=200), dtype=torch.float64)
    x = torch.randn(3, 5, 1, 8, 8, dtype=torch.float64)
    run = hosts.body.forward(hosts.network.weights, x)
    for number, spec in enumerate(hosts.specs):
        model = make_model(spec, torch.float64)
        assert isinstance(model, nn.Sequential)
        torch.testing.assert_close(run.output[number], model(x[number]).detach())
        for site, end in enumerate((3, 5)):
            y = model[:end](x[number]).detach().movedim(1, -1).flatten(0, 2)
            torch.testing.assert_close(hosts._plain_output(number, site, run), y)
            torch.testing.assert_close(hosts._plain_output(number, site, run, most=30), y[::3])
        counted = forward_flops(model, lambda model=model, number=number: model(x[number]))
        assert hosts.host_flops(number, 5) == counted
        assert hosts.params(number) == sum(parameter.numel() for parameter in model.parameters())
    assert hosts.site_names == SPANS and hosts.body.kind is SiteKind.CONV_SPAN


def test_who_owns_which_tap() -> None:
    body = ConvNet(1, 8, 2, 3)
    layout = Layout(body.parts, (8, 8))
    first = torch.tensor([HOST, annex(0), live(0)] + [VOID] * 5)
    second = torch.tensor([HOST, annex(1), live(1)] + [VOID] * 5)
    flat = owners(layout, [first, second])[None]
    (w1, _), (w2, b2), (w3, _), (w4, b4) = layout.views(flat)
    assert w1.shape == (1, 8, 1, 9) and w3.shape == (1, 12, 8, 9) and layout.length == flat.shape[1]
    for weight in (w1, w2, w3):
        assert torch.equal(weight, weight[..., :1].expand_as(weight))
    assert torch.equal(w1[0, :, 0, 0], first) and torch.equal(b2[0], second) and torch.equal(w3[0, 0, :, 0], second)
    assert w2[0, :3, :3, 0].tolist() == [[HOST, annex(0), live(0)], [annex(1)] * 2 + [VOID], [live(1)] * 2 + [VOID]]
    assert bool((w4 == HOST).all() and (b4 == HOST).all())


def test_kernels_keep_their_taps_in_a_wider_layout() -> None:
    body = body_of("textures")
    old, wider = body.layout((4, 8)), body.layout((20, 9))
    flat = body.first(old, (4, 8), torch.Generator().manual_seed(0), torch.float32)[None]
    x = torch.randn(1, 4, 1, 8, 8)
    narrow = body.forward(old.views(flat), x).output
    torch.testing.assert_close(body.forward(wider.views(old.moved(flat, wider)), x).output, narrow)


# ----------------------------------------------------------------------------------------------------------------------
# Growth


@pytest.mark.integration
@pytest.mark.parametrize("keeps_all", [False, True])
def test_lockstep(keeps_all: bool) -> None:
    """float64: losses, gates by the projected control, verdicts and costs agree over a whole run with a grower's; a
    small learning rate, as what float32 grown units round off grows tenfold in fifty steps at a large one."""
    spec = HostSpec(family="textures", task=2, seed=1, lr=1e-3)
    config = without_snapshots(family_named("textures").config)
    assert config.evidence.control == "projected"
    real = Twin(spec, all_kept(config) if keeps_all else config, ask, torch.float64)
    while len(real.losses) < real.steps:
        real.step()
    real.grower.finish()
    hosts, found, seen = play(real, torch.float64)
    np.testing.assert_allclose(found[:40], real.losses[:40], rtol=1e-11)
    np.testing.assert_allclose(found, real.losses, rtol=5e-3)
    assert np.median(np.abs(np.array(found) / real.losses - 1)) < 1e-5
    kept = [(v.cohort, v.step, v.state, v.sites) for v in real.grower.verdicts]
    assert Lifecycle.FOSSILIZED in [state for _, _, state, _ in kept[:-1]]
    assert [(v.cohort, v.step, v.state, v.sites) for v in hosts.lives[0].verdicts] == kept
    for mine, theirs in zip(hosts.lives[0].verdicts, real.grower.verdicts, strict=True):
        assert mine.gain == pytest.approx(theirs.gain, rel=2e-2, nan_ok=True)
    for part, spent in real.grower.ledger.spent.items():
        assert hosts.lives[0].ledger.spent[part] == pytest.approx(spent, rel=1e-9), part
    assert float(hosts.test_losses()[0]) == pytest.approx(real.test_loss(), rel=1e-3)
    assert hosts.params(0) == real.grower.kasmina.params > hosts.params(0, own=True)
    assert_same_sight(seen, real.player.seen)
    assert real.player.seen[0].sites[:, 1].tolist() == [1.0, 1.0]  # convolutions


def test_alone_as_in_a_stack_and_from_a_copy() -> None:
    wanted = specs(0, 1, steps=80)

    def grow(hosts: Hosts, host: int | None, until: int = 80) -> Hosts:
        while hosts.step_count < until:
            hosts.advance(20)
            if host is not None and hosts.step_count == 20:
                assert germinate(hosts, host, *SPANS) is None
        return hosts

    stack = grow(Hosts(wanted, dtype=torch.float64), 1, until=40)
    copy = grow(stack.select([1, 1]), None)
    grow(stack, None)
    alone = grow(Hosts(wanted[1:], dtype=torch.float64), 0)
    for hosts in (stack, copy, alone):
        finish(hosts)
    value, theirs = float(stack.test_losses()[1]), [(v.step, v.state) for v in stack.lives[1].verdicts]
    for one in (copy, alone):
        assert float(one.test_losses()[0]) == pytest.approx(value, rel=1e-6)
        assert one.lives[0].ledger.spent == pytest.approx(stack.lives[1].ledger.spent)
        assert [(v.step, v.state) for v in one.lives[0].verdicts] == theirs
    assert theirs and not stack.lives[0].verdicts


def test_what_is_drawn_is_on_the_hosts_scale_and_what_leaves_leaves_nothing() -> None:
    hosts = Hosts(specs(0, steps=120))
    hosts.advance(20)
    own = hosts.params(0)
    assert germinate(hosts, 0, *SPANS, width=16) is None
    hosts.advance(2)
    head = hosts.network.units_of(0, 0).w1
    seed = hosts.lives[0].seed_on(0)
    assert seed is not None and hosts.params(0) > own
    fresh = hosts.network.weights[0][0][0, seed.places]
    assert fresh.shape == (16, 1, 9) and float(fresh.std()) == pytest.approx(float(head.std()), rel=0.3)
    finish(hosts)
    mine = hosts.network.owner[0] == HOST
    assert hosts.params(0) == own and hosts.network.values[0, ~mine].count_nonzero() == 0


def test_what_stacked_conv_nets_do_not_know_raises() -> None:
    hosts = Hosts(specs(0, steps=40))
    hosts.advance(20)
    with pytest.raises(EsperError, match="the start random_zero, got 'tiny'"):
        germinate(hosts, 0, "0-2", start="tiny")
    with pytest.raises(EsperError, match="the blueprint bottleneck_conv, got 'bottleneck'"):
        germinate(hosts, 0, "0-2", blueprint="bottleneck")
    assert germinate(hosts, 0, "0-2", blueprint="bottleneck_conv", start="random_zero") is None


def test_a_body_that_nobody_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "jelly", dataclasses.replace(FAMILIES["textures"], name="jelly", body="jelly"))
    with pytest.raises(ConfigError, match="must be one of mlp, conv"):
        body_of("jelly")


# ----------------------------------------------------------------------------------------------------------------------
# Episodes


def test_an_episode_of_a_conv_net() -> None:
    running = Episodes(specs(0, 1))
    grow = Action(Operation.GERMINATE, 0, 2, 0, 0)
    while not running.done:
        is_due = running.hosts.step_count in (20, 200)
        rewards = running.step([grow if is_due and sight.masks.allow(grow) else WAIT for sight in running.sights])
    for reward, end in zip(rewards, running.outcomes, strict=True):
        assert reward == end.reward and np.isfinite(reward) and end.flops == sum(end.parts.values())
    assert all(life.verdicts for life in running.hosts.lives)


def test_gymnasium_finds_nothing_to_say() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(gymnasium.make(ID, family="textures").unwrapped)
