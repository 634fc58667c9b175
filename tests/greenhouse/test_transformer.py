"""Stacked transformers against the module and under a real grower, and the sequences they learn."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium
import numpy as np
import pytest
import torch
from tests.greenhouse.twins import Twin, assert_same_sight, play, without_snapshots

import esper.greenhouse.environment  # noqa: F401  (registers Growth-v0)
from esper.errors import EsperError
from esper.greenhouse.bodies.kinds import body_of
from esper.greenhouse.bodies.transformer import Transformer
from esper.greenhouse.family import FAMILIES, HostSpec, all_kept, data_of
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.real import make_model, mean_loss
from esper.greenhouse.stack import losses, output_gradient
from esper.greenhouse.tasks import LENGTH, SIDE, grammar, textures
from esper.kasmina.ledger import forward_flops
from esper.protocol import Command, Cull, Germinate, Observation, SeedPlan

pytestmark = pytest.mark.component

FAMILY = FAMILIES["grammar"]
SITES = ("blocks.0.up-down", "blocks.1.up-down")
SPECS = [
    HostSpec(family="grammar", task=task, seed=seed, lr=2e-2, widths=widths)
    for task, seed, widths in ((0, 1, (3, 9)), (2, 1, (8, 4)), (2, 5, (5, 5)))
]


def batch(hosts: Hosts) -> tuple[torch.Tensor, torch.Tensor]:
    rows = [data_of(FAMILY, spec.task).train for spec in hosts.specs]
    return torch.stack([x[:6] for x, _ in rows]), torch.stack([y[:6] for _, y in rows])


def test_losses_gradients_and_costs_are_the_modules() -> None:
    """Hosts of several widths; alphas stand as factors of what the last layer of a site reads."""
    hosts = Hosts(SPECS, dtype=torch.float64)
    x, y = batch(hosts)
    net, body = hosts.network, hosts.body
    alphas = [alpha * torch.rand_like(alpha) for alpha in net.alphas]
    net.gradients.fill_(torch.nan)
    gradients = net.layout.views(net.gradients)
    run = body.forward(net.weights, x, alphas, learns=True)
    loss, delta = output_gradient(run.output, y)
    assert not body.backward(net.weights, gradients, run, delta, alphas)
    assert torch.isfinite(net.gradients).all()
    torch.testing.assert_close(losses(body.forward(net.weights, x, alphas).output, y), loss)
    for number, spec in enumerate(SPECS):
        model = make_model(spec, torch.float64)
        assert hosts.params(number) == sum(parameter.numel() for parameter in model.parameters())
        assert hosts.host_flops(number, 6) == forward_flops(model, lambda m=model, n=number: m(x[n]))
        factors = [alpha[number, :width] for alpha, width in zip(alphas, spec.widths or (), strict=True)]
        layers = dict(model.named_modules())
        for site, factor in enumerate(factors):
            layers[f"blocks.{site}.down"].register_forward_pre_hook(lambda _, args, by=factor: (args[0] * by,))
        wanted = mean_loss(model, (x[number], y[number]))
        wanted.backward()
        torch.testing.assert_close(loss[number], wanted.detach())
        for part, (weight, bias) in zip(body.parts, gradients, strict=True):
            of_weight, of_bias = (getattr(layers[part.name], kind, None) for kind in ("weight", "bias"))
            assert of_weight is not None
            rows, columns = part.shape(spec.widths or ())
            torch.testing.assert_close(weight[number, :rows, :columns], of_weight.grad.view(rows, columns))
            rest = weight[number].abs().sum() - weight[number, :rows, :columns].abs().sum()
            assert abs(float(rest)) < 1e-12  # padding does not learn
            if of_bias is not None:
                torch.testing.assert_close(bias[number, :rows], of_bias.grad)


def test_a_site_is_named_and_costs_as_the_grower_says() -> None:
    body = body_of("grammar")
    assert isinstance(body, Transformer) and body.names == SITES
    assert [body.behind(site) for site in (0, 1)] == [None, None]  # no site reads what another has grown
    assert body.spans[0].params(3, 16, 16) == 3 * 33 and body.spans[0].flops(3, 16, 16) == 2 * LENGTH * 3 * 32


def script(observation: Observation) -> Sequence[Command]:
    cohorts = {40: ((0, 8), (1, 8)), 140: ((1, 6),), 220: ((0, 5), (1, 4)), 300: ((0, 4),)}
    if plans := cohorts.get(observation.step):
        seeds = tuple(SeedPlan(site=SITES[site], width=width, start="random_zero") for site, width in plans)
        return [Germinate(seeds=seeds)]
    is_due = observation.step == 320 and observation.alive
    return [Cull(cohort=observation.alive[0].cohort, reason="scripted")] if is_due else []


@pytest.mark.integration
@pytest.mark.parametrize(("lr", "keeps_all"), [(2e-3, False), (5e-3, True)])
def test_lockstep_with_a_grower(lr: float, keeps_all: bool) -> None:
    """float64: losses, gates, verdicts and costs agree over a whole run, with the projected control. Rates are small,
    so that rounding of grown units (float32 in a grower) stays small to the end."""
    config = without_snapshots(FAMILY.config)
    spec = HostSpec(family="grammar", task=2, seed=1, lr=lr)
    real = Twin(spec, all_kept(config) if keeps_all else config, script, torch.float64)
    end = real.run()
    hosts, found, seen = play(real, torch.float64)
    np.testing.assert_allclose(found[:40], real.losses[:40], rtol=1e-11)
    np.testing.assert_allclose(found, real.losses, rtol=1e-3)
    assert np.median(np.abs(np.array(found) / real.losses - 1)) < 1e-5
    told = [
        [(v.cohort, v.step, v.state, v.sites) for v in some] for some in (hosts.lives[0].verdicts, real.grower.verdicts)
    ]
    assert told[0] == told[1] and len(told[0]) == 4 - (not keeps_all)
    for part, spent in real.grower.ledger.spent.items():
        assert hosts.lives[0].ledger.spent[part] == pytest.approx(spent, rel=1e-9), part
    assert float(hosts.test_losses()[0]) == pytest.approx(end.loss, rel=1e-3)
    assert hosts.params(0) == end.params
    assert_same_sight(seen, real.player.seen)


def test_alone_as_in_a_stack() -> None:
    def grown(specs: list[HostSpec]) -> list[float]:
        hosts = Hosts(specs, dtype=torch.float64)
        hosts.advance(20)
        seeds = tuple(SeedPlan(site=site, width=20) for site in SITES)  # wider than there is room
        for number in range(len(hosts)):
            assert apply(hosts, number, Germinate(seeds=seeds)) is None
        hosts.advance(30)
        return hosts.test_losses().tolist()

    assert [grown([spec])[0] for spec in SPECS] == pytest.approx(grown(SPECS), rel=1e-9)


def test_other_starts_are_refused() -> None:
    hosts = Hosts(SPECS[:1])
    hosts.advance(20)
    with pytest.raises(EsperError, match="the start random_zero, got 'tiny'"):
        apply(hosts, 0, Germinate(seeds=(SeedPlan(site=SITES[0], width=2, start="tiny"),)))


def test_an_episode_of_the_environment() -> None:
    env = gymnasium.make("esper/Growth-v0", family="grammar")
    look, info = env.reset(seed=3, options={"task": 1})
    env.action_space.seed(3)
    ended, reward = False, 0.0
    while not ended:
        assert env.observation_space.contains(look)
        look, reward, ended, truncated, info = env.step(env.action_space.sample())
        assert not truncated
    assert np.isfinite(reward) and info["loss"] < 1.8  # guessing costs log 8


# ----------------------------------------------------------------------------------------------------------------------
# The data


def test_a_grammar_needs_both_tokens_before() -> None:
    """Best guesses from pairs of tokens are clearly better than those from either alone."""
    sample = grammar(8, 8, torch.Generator().manual_seed(1))
    x, y = sample(4000, torch.Generator().manual_seed(2))
    assert x.shape == y.shape == (4000, LENGTH) and torch.equal(x[:, 1:], y[:, :-1]) and int(x.max()) == 7
    again, _ = sample(4000, torch.Generator().manual_seed(2))
    assert torch.equal(x, again)

    def entropy(*given: torch.Tensor) -> float:
        key = sum(part * 8**place for place, part in enumerate(given))
        assert isinstance(key, torch.Tensor)
        counts = torch.zeros(8 ** len(given), 8).index_put_((key.flatten(), y[:, 1:].flatten()), torch.ones(()), True)
        chances = counts / counts.sum(1, keepdim=True).clamp(min=1)
        return float(-(counts * chances.clamp(min=1e-9).log()).sum() / counts.sum())

    alone = min(entropy(x[:, 1:]), entropy(x[:, :-1]))
    assert entropy(x[:, 1:], x[:, :-1]) < alone - 0.3


def test_textures_are_small_images_of_several_classes() -> None:
    sample = textures(1, 6, torch.Generator().manual_seed(1))
    x, y = sample(500, torch.Generator().manual_seed(2))
    assert x.shape == (500, 1, SIDE, SIDE) and x.is_floating_point() and set(y.tolist()) == set(range(6))
    assert float(x.mean()) == pytest.approx(0.0, abs=0.1) and 0.3 < float(x.std()) < 1.5
