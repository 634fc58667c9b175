"""Families of hosts: networks of one shape on tasks of one kind, and how one host of a family is drawn.

Everything about a host follows from four numbers: family, task, seed and learning rate. The task fixes data, noise and
the widths it starts from; the seed fixes first weights, the order of batches and whatever growth draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

from esper.config import CaptureConfig, Config, EvidenceConfig, GraftConfig
from esper.errors import ConfigError
from esper.greenhouse import tasks
from esper.greenhouse.tasks import Sampler

HELD_OUT_BATCHES = 112
"""Held-out batches: many small ones, so that a clear gain is proven with few rows."""
DECISIONS = 20
"""Decision points of a run, the one at its end included."""
FIRST_HELD_OUT = 1000
"""Tasks from here on are for evaluation: no policy and no schedule is trained or tuned on them."""


def short_run(steps: int) -> Config:
    """Settings of a :class:`esper.Grower` for hosts that train a few hundred or thousand steps: twenty decisions."""
    interval = max(1, steps // DECISIONS)
    return Config(
        interval=interval,
        total_steps=steps,
        held_out_every=4 * interval,
        capture=CaptureConfig(batches=4, timeout=40),
        graft=GraftConfig(
            ramp_steps=20, stabilize_steps=5, stabilize_window=16, fine_tune_steps=10, cull_steps=5, warmup_steps=20,
            embargo=40, timeout=100,
        ),
        evidence=EvidenceConfig(calibration_share=0.1, held_out_batches=8),
    )  # fmt: skip


def all_kept(config: Config) -> Config:
    """The same without judgement: whatever reaches it becomes permanent, and a controller must cull what harms."""
    return replace(config, evidence=replace(config.evidence, accept="always"))


@dataclass(frozen=True, kw_only=True)
class Family:
    """Hosts of one kind.

    ``widths`` are hidden widths a host may start from, drawn for each layer by itself; ``purpose`` is ``training``,
    ``evaluation`` (never trained on), ``longer`` (one of either kind, five times as long), ``pace`` (training ones of
    other lengths, to choose when growth should begin) or ``probe`` (planted answers, for tests).
    """

    name: str
    task: Callable[[int, int, Generator], Sampler]
    inputs: int
    outputs: int
    widths: tuple[tuple[int, ...], ...]
    purpose: str
    body: str = "mlp"
    """What its hosts are: ``mlp``, ``conv`` or ``transformer`` (:mod:`esper.greenhouse.bodies`). ``inputs`` are then
    features, channels of an image, or tokens; ``outputs`` numbers or classes, of a transformer tokens."""
    rows: int = 2048
    """Rows to train on; a transformer's are sequences."""
    batch_rows: int = 64
    held_out_rows: int = 32
    """Rows of one held-out batch: what a gate can tell apart, and what a look costs."""
    test_rows: int = 2048
    steps: int = 400
    max_width: int = 96
    """Most units a hidden layer may come to have."""
    weight_decay: float = 0.01
    lr: float = 2e-2
    """Learning rate of growing runs in evaluation, chosen once on training tasks (``benchmarks/controller``)."""

    @property
    def num_sites(self) -> int:
        return len(self.widths)

    @property
    def config(self) -> Config:
        """How its hosts grow."""
        return short_run(self.steps)


_SMALL = (4, 6, 8, 12)
_TINY = (3, 4, 6, 8)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            name="teacher",
            task=tasks.teacher,
            inputs=10,
            outputs=3,
            widths=(_SMALL, _SMALL),
            purpose="training",
            lr=4e-2,
        ),
        Family(
            name="spirals",
            task=tasks.spirals,
            inputs=2,
            outputs=4,
            widths=(_SMALL, _SMALL),
            purpose="training",
            lr=4e-2,
        ),
        Family(name="tabular", task=tasks.tabular, inputs=16, outputs=4, widths=(_SMALL, _SMALL), purpose="training"),
        Family(name="deep", task=tasks.teacher, inputs=4, outputs=2, widths=(_SMALL,) * 3, purpose="training"),
        Family(name="flat", task=tasks.tabular, inputs=8, outputs=2, widths=(_SMALL,), purpose="training"),
        Family(
            name="checkers", task=tasks.checkers, inputs=3, outputs=2, widths=(_SMALL, _SMALL), purpose="evaluation"
        ),
        Family(name="waves", task=tasks.waves, inputs=5, outputs=2, widths=(_SMALL,) * 3, purpose="evaluation"),
        Family(name="shells", task=tasks.shells, inputs=6, outputs=3, widths=(_SMALL, _SMALL), purpose="evaluation"),
        Family(
            name="textures",
            task=tasks.textures,
            inputs=1,
            outputs=6,
            widths=(_TINY, _TINY),
            purpose="evaluation",
            body="conv",
            batch_rows=32,
        ),
        Family(
            name="grammar",
            task=tasks.grammar,
            inputs=8,
            outputs=8,
            widths=(_TINY, _TINY),
            purpose="evaluation",
            body="transformer",
            batch_rows=32,
            held_out_rows=8,
            test_rows=1024,
        ),
        Family(name="planted", task=tasks.teacher, inputs=10, outputs=3, widths=((2,), (16,)), purpose="probe"),
        Family(name="null", task=tasks.linear, inputs=8, outputs=2, widths=((8,), (8,)), purpose="probe"),
    )
}
LONGER = 5
"""How many times as long the ``longer`` ones train, on four times as many rows."""
FAMILIES.update(
    {
        f"{name}_long": replace(
            FAMILIES[name], name=f"{name}_long", purpose="longer", steps=LONGER * FAMILIES[name].steps, rows=8192
        )
        for name in ("teacher", "spirals", "tabular", "checkers", "waves", "shells")
    }
)
FAMILIES.update(
    {
        f"{name}_{steps}": replace(FAMILIES[name], name=f"{name}_{steps}", purpose="pace", steps=steps, rows=rows)
        for steps, rows in ((1000, 4096), (5000, 20480))
        for name in ("teacher", "spirals", "tabular")
    }
)
"""All families by name."""


def family_named(name: str) -> Family:
    """Look a family up.

    Raises
    ------
    ConfigError
        No family of that name.
    """
    if name not in FAMILIES:
        raise ConfigError(f"no family of hosts is called {name!r}; known: {', '.join(FAMILIES)}")
    return FAMILIES[name]


@dataclass(frozen=True, kw_only=True)
class HostSpec:
    """One host. ``widths`` overrides the hidden widths that its task draws (static shapes)."""

    family: str
    task: int
    seed: int
    lr: float
    widths: tuple[int, ...] | None = None
    steps: int | None = None
    """Steps of its training; ``None``: the family's."""

    def with_seed(self, seed: int) -> HostSpec:
        return replace(self, seed=seed)


@dataclass(frozen=True)
class Data:
    """Rows of one task, as :mod:`esper.greenhouse.tasks` has them. Splits share no row."""

    train: tasks.Rows
    held_out: tasks.Rows
    """``HELD_OUT_BATCHES`` times the family's ``held_out_rows``, batch after batch."""
    test: tasks.Rows
    widths: tuple[int, ...]
    """Hidden widths a host of this task starts from."""


def _generator(*parts: object) -> Generator:
    """A stream that follows from ``parts`` alone, on every machine."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


_drawn: dict[tuple[str, int], Data] = {}


def data_of(family: Family, task: int) -> Data:
    """The data of a task (kept: hosts of one task share them)."""
    key = (family.name, task)
    if key not in _drawn:
        made = _generator("task", family.name, task)
        sample = family.task(family.inputs, family.outputs, made)
        widths = tuple(choices[int(torch.randint(len(choices), (), generator=made))] for choices in family.widths)
        sizes = {"train": family.rows, "held_out": HELD_OUT_BATCHES * family.held_out_rows, "test": family.test_rows}
        seen: set[bytes] = set()
        parts = {name: _fresh(sample, rows, _generator(name, family.name, task), seen) for name, rows in sizes.items()}
        _drawn[key] = Data(**parts, widths=widths)
    return _drawn[key]


def _fresh(sample: Sampler, rows: int, draws: Generator, seen: set[bytes]) -> tasks.Rows:
    """So many rows that are not in ``seen``, nor twice: short sequences of few tokens do come again."""
    x, y = sample(rows, draws)
    if x.is_floating_point():
        return x, y
    parts: list[tasks.Rows] = []
    while True:
        new: list[int] = []
        for number, tokens in enumerate(x.numpy()):
            key = tokens.tobytes()
            if key not in seen:
                seen.add(key)
                new.append(number)
        parts.append((x[new], y[new]))
        if sum(len(part[0]) for part in parts) >= rows:
            return torch.cat([part[0] for part in parts])[:rows], torch.cat([part[1] for part in parts])[:rows]
        x, y = sample(rows, draws)


def weights_stream(spec: HostSpec) -> Generator:
    """What first weights are drawn from."""
    return _generator("weights", spec.family, spec.task, spec.seed)


def units_stream(spec: HostSpec, cohort: int, site: int) -> Generator:
    """What a cohort's units on a site, and its fit, are drawn from."""
    return _generator("units", spec.family, spec.task, spec.seed, cohort, site)


def batch_order(spec: HostSpec, family: Family, steps: int) -> Tensor:
    """Rows of every training batch, ``(steps, B)`` int64."""
    stream = _generator("batches", spec.family, spec.task, spec.seed)
    return torch.randint(family.rows, (steps, family.batch_rows), generator=stream)


def row_hashes(rows: tasks.Rows) -> set[bytes]:
    """One hash a row: what tells that two splits have no row in common."""
    x = rows[0].numpy()
    return {hashlib.sha256(row.tobytes()).digest() for row in x}
