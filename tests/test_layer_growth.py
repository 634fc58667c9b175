"""Growth of single layers, whole: germinated, grafted, judged under the default control, permanent, exported."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from tests.models import Batch
from tests.rigs import attach
from torch import Tensor, nn

import esper
from esper.kasmina.blueprints import BLUEPRINTS, register_module
from esper.protocol import Germinate, Lifecycle, SeedPlan, SiteKind

pytestmark = pytest.mark.e2e


@dataclass(frozen=True)
class Job:
    """A host that lacks what one blueprint at one of its layers brings."""

    blueprint: str
    site: str
    kind: SiteKind
    host: Callable[[], nn.Module]
    batches: Callable[[int, int], list[Batch]]
    width: int | None = None
    folds: bool = False
    lr: float = 1e-2


class Normed(nn.Module):
    """Its norm must become five times as large: slow for any optimizer that moves by its learning rate."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 6)
        nn.init.eye_(self.head.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def scaled(num: int, seed: int) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    xs = [torch.randn(32, 6, generator=source) for _ in range(num)]
    return [(x, 5.0 * F.layer_norm(x, (6,)) + 2.0) for x in xs]


class Bag(nn.Module):
    """Scores tokens one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(12, 8), nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def by_token(num: int, seed: int) -> list[Batch]:
    source, table = torch.Generator().manual_seed(seed), torch.randn(12, 3, generator=torch.Generator().manual_seed(9))
    drawn = [torch.randint(12, (16, 5), generator=source) for _ in range(num)]
    return [(tokens, 3.0 * table[tokens]) for tokens in drawn]


class Block(nn.Module):
    """A transformer layer's feed-forward part without its attention: positions never meet."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(x))


def running_means(num: int, seed: int) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    xs = [F.layer_norm(torch.randn(16, 7, 6, generator=source), (6,)) for _ in range(num)]
    return [(x, 3.0 * x.cumsum(1) / torch.arange(1, 8)[:, None]) for x in xs]


class Filter(nn.Module):
    """One linear convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def rectified(num: int, seed: int) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    kernel = torch.randn(2, 1, 3, 3, generator=torch.Generator().manual_seed(3))
    mixed = torch.randn(3, 2, 1, 1, generator=torch.Generator().manual_seed(4))
    xs = [torch.randn(12, 2, 6, 6, generator=source) for _ in range(num)]
    return [(x, 2.0 * F.conv2d(F.conv2d(x, kernel, None, 2, 1, 1, 2).abs(), mixed)) for x in xs]


def squared(num: int, seed: int) -> list[Batch]:
    source = torch.Generator().manual_seed(seed)
    xs = [torch.randn(32, 5, 6, generator=source) for _ in range(num)]
    return [(x, F.layer_norm(x, (6,)).square() * 2.0) for x in xs]


def users_module(in_features: int, out_features: int) -> nn.Module:
    return nn.Sequential(nn.Linear(in_features, 16), nn.GELU(), nn.Linear(16, out_features))


JOBS = (
    Job("affine", "norm", SiteKind.NORM_LAYER, Normed, scaled, folds=True),
    Job("low_rank", "embedding", SiteKind.EMBEDDING_LAYER, Bag, by_token, width=3, folds=True),
    Job("attention", "norm", SiteKind.NORM_LAYER, Block, running_means, width=6),
    Job("depthwise_conv", "conv", SiteKind.CONV_LAYER, Filter, rectified, width=4),
    Job("users_own", "norm", SiteKind.NORM_LAYER, Block, squared),
)


@pytest.fixture
def users_own() -> Iterator[None]:
    register_module("users_own")(users_module)
    yield
    del BLUEPRINTS._items["users_own"]


@pytest.mark.parametrize("job", [JOBS[0], JOBS[2], JOBS[4]], ids=lambda job: job.blueprint)
def test_the_best_of_many_seeds_on_one_layer_are_grafted(job: Job, users_own: None) -> None:
    torch.manual_seed(0)
    model = job.host()
    rig = attach(
        model,
        torch.optim.Adam(model.parameters(), job.lr),
        batches=job.batches(10, 1),
        held_out=job.batches(60, 2),
        sites=esper.SitesConfig(layers=True),
    )
    rig.train(3)
    rig.order(Germinate(seeds=(SeedPlan(site=job.site, blueprint=job.blueprint, seeds=3, keep=2),)))
    (cohort,) = rig.grower.kasmina.cohorts.values()
    assert cohort.num_seeds == 3
    rig.until(cohort, Lifecycle.GRAFTING)
    assert cohort.num_seeds == 2 and rig.bank(cohort).num_slots == 2
    before = model(rig.batches[0][0]).detach()
    rig.train(4)
    assert cohort.alpha > 0 and not torch.equal(model(rig.batches[0][0]), before)


@pytest.mark.parametrize("job", JOBS, ids=lambda job: f"{job.blueprint}-{job.kind}")
def test_a_layers_growth_is_accepted_and_exported_without_esper(job: Job, users_own: None) -> None:
    torch.manual_seed(0)
    model = job.host()
    rig = attach(
        model,
        torch.optim.Adam(model.parameters(), job.lr),
        batches=job.batches(10, 1),
        held_out=job.batches(60, 2),
        sites=esper.SitesConfig(layers=True),
        graft=esper.GraftConfig(ramp_steps=4, settle_steps=40, stabilize_steps=3, stabilize_window=8,
                                fine_tune_steps=5, warmup_steps=1, timeout=300),
    )  # fmt: skip
    (site,) = rig.grower.sites(job.site)
    assert site.kind is job.kind
    rig.train(3)
    seed = SeedPlan(site=job.site, blueprint=job.blueprint, width=job.width)
    rig.order(Germinate(seeds=(seed,)))
    (cohort,) = rig.grower.kasmina.cohorts.values()
    for _ in range(400):
        if not rig.grower.kasmina.cohorts:
            break
        rig.train()
    (verdict,) = rig.grower.verdicts
    assert verdict.state is Lifecycle.FOSSILIZED, verdict.reason
    assert verdict.gain_low > 0 and cohort.number == verdict.cohort
    grown = model(rig.batches[0][0]).detach()
    plain = rig.grower.export()
    torch.testing.assert_close(plain(rig.batches[0][0]), grown, atol=1e-5, rtol=1e-5)
    assert rig.grower.export_difference is not None
    assert rig.grower.export_difference.layers[job.site] < 1e-5
    saved = io.BytesIO()
    torch.save(plain.get_submodule(job.site), saved)
    assert b"esper" not in saved.getvalue()
    same = sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    assert same == job.folds, "what folds costs nothing after the export"
    assert (type(plain.get_submodule(job.site)) is type(model.get_submodule(job.site))) == job.folds
