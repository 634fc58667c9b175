"""Small hosts with a branch whose worth is known by construction, trained together so that both have adapted.

A *null* branch adds no function that the host lacks: whatever the two compute together, the host alone could compute
with other weights. A host trained beside it leans on it all the same, so switching it off hurts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from tests.example_sites import attached, plant, settle
from torch import Tensor, nn

from esper.config import EvidenceConfig
from esper.evidence.before import HostBefore, only_folds
from esper.evidence.evaluator import Evaluator
from esper.evidence.judge import Judge, Judgement
from esper.kasmina.bank import Bank
from esper.kasmina.execution import Kasmina
from esper.kasmina.site import Site

Batch = tuple[Tensor, Tensor]
COHORT = 1


@dataclass
class Trial:
    """A trained host with one cohort on trial, and held-out batches it has not seen."""

    model: nn.Module
    kasmina: Kasmina
    site: str
    held_out: list[Batch]
    before: HostBefore | None = None
    """The host from before the branch, where the branch folds into the host's layer."""

    @property
    def bank(self) -> Bank:
        return self.kasmina.sites[self.site].banks[COHORT]

    def judge(self, *, control: str = "projected", seed: int = 0) -> Judge:
        """A judge of its own, with nothing accepted or refused before: the lowest threshold there is.

        ``control="before"``: as in a run, which keeps the host from before the graft of a branch that folds.
        """
        evaluator = Evaluator(
            self.model, mean_squared_error, self.held_out, calibration_share=0.2, confirm_share=0.3, seed=seed
        )
        settings = EvidenceConfig(control="projected" if control == "before" else control)
        judge = Judge(evaluator, self.kasmina.sites, settings, seed=seed)
        if control == "before" and self.before is not None:
            judge._before[COHORT] = self.before
        return judge

    def judgement(self, *, control: str = "projected", seed: int = 0) -> Judgement:
        """Looked at until it is decided, as in a run (but it does not learn in between)."""
        judge = self.judge(control=control, seed=seed)
        while True:
            judged = judge.evaluate(COHORT, [self.site], further=True)
            if not judged.undecided:
                return judged


def mean_squared_error(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


@dataclass(frozen=True)
class Task:
    """A teacher network's outputs with noise; ``signal`` inputs matter, ``distractors`` more do not."""

    signal: int = 6
    distractors: int = 0
    outputs: int = 3
    teacher_units: int = 8
    noise: float = 0.3
    pure_noise: bool = False

    def batches(self, num: int, size: int, generator: torch.Generator, teacher: tuple[Tensor, Tensor]) -> list[Batch]:
        x = torch.randn(num * size, self.signal + self.distractors, generator=generator)
        y = torch.tanh(x[:, : self.signal] @ teacher[0]) @ teacher[1] * float(not self.pure_noise)
        y = y + (1.0 if self.pure_noise else self.noise) * torch.randn(y.shape, generator=generator)
        return list(zip(x.split(size), y.split(size), strict=True))

    def teacher(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        units = self.teacher_units
        inner = torch.randn(self.signal, units, generator=generator) * 1.5 / self.signal**0.5
        return inner, torch.randn(units, self.outputs, generator=generator) / units**0.5


Hold = Callable[[nn.Module, Site, Bank], None]
"""Keeps a branch what it is meant to be; called after every training step."""


def grown_trial(
    seed: int,
    task: Task,
    hidden: int,
    blueprint: str,
    *,
    units: int,
    hold: Hold | None = None,
    permanent: int = 0,
    alone: int = 60,
    together: int = 140,
    lr: float = 0.01,
) -> Trial:
    """Train a host alone, plant a branch, train both; as growth does, only shorter.

    ``permanent`` units are grown and settled in the annex before the branch on trial comes.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(task.signal + task.distractors, hidden), nn.ReLU(), nn.Linear(hidden, task.outputs)
        )
    teacher = task.teacher(generator)
    batches = task.batches(16, 64, generator, teacher)
    kasmina = attached(model, batches[0][0], layers=blueprint == "low_rank")
    site = "2" if blueprint == "low_rank" else "0-2"
    learned: list[Tensor] = list(model.parameters())
    train(model, learned, batches, alone, lr)
    if permanent:
        bank = plant(kasmina, site, "bottleneck", units=permanent)
        bank.set_learning(True)
        train(model, [*learned, *bank.params.values()], batches, alone, lr)
        learned += settle(kasmina, site).params.values()
    bank = plant(kasmina, site, blueprint, units=units, cohort=COHORT)
    before = HostBefore(model, kasmina.sites, COHORT) if only_folds(kasmina.sites, COHORT) else None
    bank.scale_output(0.0)
    bank.set_learning(True)

    def keep() -> None:
        if hold is not None:
            hold(model, kasmina.sites[site], bank)

    keep()
    train(model, [*learned, *bank.params.values()], batches, together, lr, keep)
    bank.set_learning(False)
    model.eval()
    return Trial(model, kasmina, site, task.batches(48, 32, generator, teacher), before)


def train(
    model: nn.Module,
    parameters: list[Tensor],
    batches: list[Batch],
    steps: int,
    lr: float,
    after: Callable[[], None] | None = None,
) -> None:
    optimizer = torch.optim.Adam(parameters, lr)
    for step in range(steps):
        optimizer.zero_grad()
        mean_squared_error(model, batches[step % len(batches)]).backward()
        optimizer.step()
        if after is not None:
            after()


# ----------------------------------------------------------------------------------------------------------------------
# Branches that can add nothing


def _constant(_: nn.Module, __: Site, bank: Bank) -> None:
    """Hidden units that ignore their input: together an offset, which the layer's bias already is."""
    with torch.no_grad():
        bank.params["w1"].zero_()
        bank.params["b1"].clamp_(min=0.5)


def _duplicate(model: nn.Module, _: Site, bank: Bank) -> None:
    """Copies of the host's hidden units, kept equal to them: their output weights could be the host's own."""
    with torch.no_grad():
        bank.params["w1"][0].copy_(model[0].weight[: bank.units])  # type: ignore[index]
        bank.params["b1"][0].copy_(model[0].bias[: bank.units])  # type: ignore[index]


def _duplicate_annex(_: nn.Module, site: Site, bank: Bank) -> None:
    assert site.annex is not None
    with torch.no_grad():
        bank.params["w1"].copy_(site.annex.params["w1"])
        bank.params["b1"].copy_(site.annex.params["b1"])


def _distracted(task: Task) -> Hold:
    """Hidden units that read only inputs on which the target does not depend."""

    def hold(_: nn.Module, __: Site, bank: Bank) -> None:
        with torch.no_grad():
            bank.params["w1"][..., : task.signal].zero_()

    return hold


def redundant_linear(seed: int) -> Trial:
    """A low-rank branch beside the Linear layer it could be folded into."""
    return grown_trial(seed, Task(), 12, "low_rank", units=3)


def constant(seed: int) -> Trial:
    return grown_trial(seed, Task(), 12, "bottleneck", units=4, hold=_constant)


def duplicate_units(seed: int) -> Trial:
    return grown_trial(seed, Task(), 12, "bottleneck", units=6, hold=_duplicate)


def noise_features(seed: int) -> Trial:
    task = Task(distractors=4)
    return grown_trial(seed, task, 12, "bottleneck", units=6, hold=_distracted(task))


def noise_targets(seed: int) -> Trial:
    """Nothing can be learned at all: host and branch fit training noise."""
    return grown_trial(seed, Task(pure_noise=True), 8, "bottleneck", units=8)


def duplicate_of_annex(seed: int) -> Trial:
    """Copies of units that are already permanent."""
    return grown_trial(seed, Task(), 8, "bottleneck", units=4, hold=_duplicate_annex, permanent=4)


NULLS: dict[str, Callable[[int], Trial]] = {
    "redundant_linear": redundant_linear,
    "constant": constant,
    "duplicate_units": duplicate_units,
    "duplicate_of_annex": duplicate_of_annex,
    "noise_features": noise_features,
    "noise_targets": noise_targets,
}


def useful(seed: int) -> Trial:
    """More hidden units for a host that has too few."""
    return grown_trial(seed, Task(noise=0.2), 2, "bottleneck", units=8, together=250)
