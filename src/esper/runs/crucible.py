"""The crucible: what a new design must stand before it is used, on a tiny host of its kind under the real Grower.

In the order of the checks: it germinates; its cost is what was declared; it adds nothing while alpha is 0; it grows
without an incident and stays finite; every parameter learns; what it adds is not nothing; it becomes permanent; and the
exported model computes the same. A tenth of a second to a second each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.config import CaptureConfig, Config, EvidenceConfig, FitConfig, GraftConfig, SitesConfig
from esper.errors import CONTAINED, EsperError
from esper.grower import Grower
from esper.karn import Design
from esper.karn.generation import Menu, Pair
from esper.kasmina.bank import Bank
from esper.kasmina.blueprints import BLUEPRINTS
from esper.kasmina.discovery import discover
from esper.kasmina.execution import Kasmina
from esper.kasmina.germination import offers
from esper.kasmina.starts import STARTS
from esper.protocol import AnyEvent, Germinated, Incident, Lifecycle, Refused, SeedPlan, SiteKind, Transitioned
from esper.tamiyo import ScheduleController
from esper.tamiyo.schedule import ScheduleEntry
from esper.worth import reference_width

_STEPS = 40
_FEATURES = 8
_TOKENS = 9
_UNCOUNTED = frozenset({"affine"})
"""Blueprints whose operations no counter counts: one a parameter and row."""


class _Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class _Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(_FEATURES, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class _Recurring(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.GRU(_FEATURES, _FEATURES, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


_HOSTS: dict[SiteKind, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    SiteKind.LINEAR_SPAN: (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6)), (16, 6)),
    SiteKind.LINEAR_GATED_SPAN: (_Gated, (16, 6)),
    SiteKind.CONV_SPAN: (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1)), (4, 3, 6, 6),
    ),
    SiteKind.LINEAR_LAYER: (lambda: nn.Sequential(nn.Linear(_FEATURES, _FEATURES)), (4, 5, _FEATURES)),
    SiteKind.CONV_LAYER: (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, padding=1)), (4, 4, 6, 6)),
    SiteKind.NORM_LAYER: (lambda: nn.Sequential(nn.LayerNorm(_FEATURES)), (4, 5, _FEATURES)),
    SiteKind.CHANNEL_NORM_LAYER: (lambda: nn.Sequential(nn.BatchNorm1d(_FEATURES)), (16, _FEATURES)),
    SiteKind.EMBEDDING_LAYER: (lambda: nn.Sequential(nn.Embedding(_TOKENS, _FEATURES)), (4, 5)),
    SiteKind.ATTENTION_LAYER: (_Attending, (4, 5, _FEATURES)),
    SiteKind.RECURRENT_LAYER: (_Recurring, (4, 5, _FEATURES)),
}  # fmt: skip
"""A host with one site of the kind, and the shape of its input."""


def menu() -> Menu:
    """The blueprints and starts that designs are made of, by kind of site."""
    found: dict[str, tuple[Pair, ...]] = {}
    for kind in SiteKind:
        host, batches = _host(kind)
        discovery = discover(host, lambda host=host, x=batches[0][0]: host(x), SitesConfig(layers=not kind.is_span))
        site = next(iter(Kasmina(host, discovery, Config(), adaptive=True).sites.values()))
        found[str(kind)] = tuple(
            Pair(
                name, start, scalable=bool(BLUEPRINTS[name].input_names()) and STARTS[start].keeps_draw,
                sized=BLUEPRINTS[name].resolve_units(site.geometry, 7) != 1,
            )
            for name, start in offers(site)
        )  # fmt: skip
    return found


def crucible(design: Design) -> str | None:
    """Try a design; returns why it must not be used, or ``None``. Leaves the global random streams as they were."""
    if design.kind not in list(SiteKind):
        return f"no kind of site is called {design.kind!r}"
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):  # the counter does not know fused attention
        warnings.simplefilter("ignore", RuntimeWarning)
        try:
            return next(_Trial(SiteKind(design.kind), design).problems(), None)
        except (EsperError, *CONTAINED) as error:
            return f"{type(error).__name__}: {error}"


def _host(kind: SiteKind) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """The host of a kind and batches for it, the same each time."""
    build, shape = _HOSTS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        host = build()
        batches = [_batch(kind, shape, host) for _ in range(20)]
    return host, batches


def _batch(kind: SiteKind, shape: tuple[int, ...], host: nn.Module) -> tuple[Tensor, Tensor]:
    x = torch.randint(_TOKENS, shape) if kind is SiteKind.EMBEDDING_LAYER else torch.randn(shape)
    with torch.no_grad():
        like = host(x)
    return x, torch.sin(2 * like) + 0.3 * torch.randn_like(like)


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


class _Trial:
    """One design on one host."""

    def __init__(self, kind: SiteKind, design: Design) -> None:
        self.kind, self.design = kind, design
        self.host, self.batches = _host(kind)
        self.events: list[AnyEvent] = []
        self.optimizer = torch.optim.AdamW(self.host.parameters(), 1e-2)
        config = Config(
            sites=SitesConfig(layers=not kind.is_span), capture=CaptureConfig(batches=2, rows=512),
            fit=FitConfig(steps=5, batch_rows=64, min_t=-1e9, reconstruction_threshold=1e9),
            graft=GraftConfig(ramp_steps=3, settle_steps=8, stabilize_steps=1, fine_tune_steps=2, warmup_steps=2),
            evidence=EvidenceConfig(accept="always"), interval=1, held_out_every=1000,
        )  # fmt: skip
        self.grower = Grower(
            self.host, self.optimizer, loss=_loss, evaluate=self.batches[:16], config=config,
            controller=ScheduleController([ScheduleEntry(step=2, seeds=(self._plan(),))]), on_event=self.events.append,
        )  # fmt: skip

    def _plan(self) -> SeedPlan:
        choice = self.design.choice
        found = discover(
            self.host, lambda: self.host(self.batches[0][0]), SitesConfig(layers=not self.kind.is_span)
        ).sites[0].info  # fmt: skip
        units = max(1, round(
            choice.growth * reference_width(found.in_features, found.out_features, found.hidden_features)
        ))  # fmt: skip
        seeds = min(choice.seeds, units)
        return SeedPlan(
            site=found.name, blueprint=choice.blueprint, start=choice.start, width=max(1, units // seeds), seeds=seeds,
            scale=choice.scale, lr_scale=choice.lr_scale,
        )  # fmt: skip

    def problems(self) -> Iterator[str]:
        """What is wrong, as it comes up."""
        learnt: set[str] = set()
        bank: Bank | None = None
        for step in range(_STEPS):
            self._train(self.batches[step % len(self.batches)])
            here = next(iter(self.grower.kasmina.live_banks), None)
            if here is not None and bank is None:
                yield from self._at_birth(here)
            if here is not None:
                bank = here
                learnt |= {name for name, value in here.moments.first.items() if bool((value != 0).any())}
        yield from self._in_events()
        if bank is None:
            yield "it did not germinate"
            return
        yield from _after_learning(bank, learnt)
        self.grower.finish()
        verdicts = self.grower.verdicts
        if [verdict.state for verdict in verdicts] != [Lifecycle.FOSSILIZED]:
            yield f"it did not become permanent: {', '.join(v.reason for v in verdicts) or 'still on trial'}"
        self.grower.export()  # raises where the export differs

    def _train(self, batch: tuple[Tensor, Tensor]) -> None:
        loss = _loss(self.host, batch)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.grower.step(loss)

    def _at_birth(self, bank: Bank) -> Iterator[str]:
        """Cost, and silence at alpha 0."""
        inputs = self.batches[0][0]
        with torch.no_grad():
            y = self.host(inputs)
        x = inputs.unsqueeze(-1) if self.kind is SiteKind.EMBEDDING_LAYER else inputs
        cost = bank.plan.cost(bank.geometry, units=bank.units, columns=bank.width, reads=bank.reads)
        if bank.num_params != cost.params * bank.num_slots:
            yield f"it declares {cost.params * bank.num_slots} parameters and has {bank.num_params}"
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            branch = bank.branch(bank.pick(x, y), alpha=torch.ones_like(bank.alpha), training=False, generator=None)
            silent = bank.scatter(y, bank.branch(bank.pick(x, y), training=False, generator=None))
        rows = y.numel() // y.shape[bank.geometry.feature_axis]
        counted, declared = counter.get_total_flops() / 2, bank.flops_per_row * rows
        # where each seed has one unit its products have nothing to add up, and no counter counts them
        uncounted = bank.blueprint in _UNCOUNTED or (bank.units == 1 and counted <= declared)
        if counted != declared and not uncounted:
            yield f"it declares {declared:.0f} FLOPs and needs {counted:.0f}"
        if not bool(torch.isfinite(branch).all()):
            yield "its first output is not finite"
        if not torch.equal(silent, y):
            yield "it adds something while alpha is 0"

    def _in_events(self) -> Iterator[str]:
        for event in self.events:
            if isinstance(event, Refused | Incident):
                yield f"{type(event).__name__.lower()}: {event.reason}"
            elif isinstance(event, Transitioned) and event.target in (Lifecycle.CULLED, Lifecycle.ROLLED_BACK):
                yield f"{event.target.name.lower()}: {event.reason}"
        if not any(isinstance(event, Germinated) for event in self.events):
            yield "it did not germinate"


def _after_learning(bank: Bank, learnt: set[str]) -> Iterator[str]:
    if not all(bool(torch.isfinite(value).all()) for value in bank.params.values()):
        yield "a parameter is not finite"
    dead = sorted(set(bank.params) - learnt)
    if dead:
        yield f"no gradient reaches {', '.join(dead)}"
    if not any(bool((bank.params[name] != 0).any()) for name in bank.plan.output_names()):
        yield "what it adds is nothing"
