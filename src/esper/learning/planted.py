"""Episodes with an answer that is known: one site gains from growth, all others only cost.

The test bench of a learner, in milliseconds an episode and without any training of hosts. An episode has
:data:`HORIZON` decision points and two to five spans. One of them, drawn anew each time, carries a gradient energy a
few times that of the others; growing it lowers the loss, the sooner the better and by one host's width at the best;
every growth anywhere has a price. All reward comes at the end, and the best there is earns :data:`BEST`: grow that site
at once, by one width, and nothing else. Waiting always earns nothing; growing all sites earns less the more there are.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from esper.learning.environment import Ints, Stepped, register_environment
from esper.protocol import SITE_FEATURES, Lifecycle, Observation, Verdict
from esper.tamiyo.actions import ALL, SIZES, Action, Operation, Scope
from esper.tamiyo.features import FeatureReader
from esper.tamiyo.sight import Sight, see

HORIZON = 6
PRICE = 0.1
"""Of growth by one width."""
BEST = 1.0 - PRICE

_STRIDE = 20
"""Host steps between decision points."""
_HIDDEN, _WIDTH = 32, 64
_COLUMN = {name: index for index, name in enumerate(SITE_FEATURES)}


@dataclass
class Episode:
    """One run."""

    energies: list[float]
    right: int
    turn: int = 0
    gained: float = 0.0
    spent: float = 0.0
    stopped: bool = False
    grown: list[float] = field(default_factory=list[float])
    """Widths grown at each site."""
    tried: list[tuple[int, int, float]] = field(default_factory=list[tuple[int, int, float]])
    """Step, site and gain of every growth."""

    @classmethod
    def begin(cls, rng: np.random.Generator) -> Episode:
        num = int(rng.integers(2, 6))
        right = int(rng.integers(num))
        energies = np.exp(rng.normal(0.0, 0.2, num))
        energies[right] *= 4.0 + 4.0 * rng.random()
        return cls(energies=energies.tolist(), right=right, grown=[0.0] * num)

    def act(self, action: Action) -> None:
        """What an action does until the next decision point."""
        if action.operation == Operation.STOP:
            self.stopped = True
        elif action.operation == Operation.GERMINATE:
            width = SIZES[action.size]
            for row in range(len(self.grown)) if action.site == ALL else [action.site - 1]:
                self._grow(row, width)
        self.turn += 1

    def _grow(self, row: int, width: float) -> None:
        before, self.grown[row] = self.grown[row], self.grown[row] + width
        gain = 0.0
        if row == self.right:
            new = min(1.0, self.grown[row]) - min(1.0, before)
            gain = new * (1.0 - 0.5 * self.turn / HORIZON)
        self.gained, self.spent = self.gained + gain, self.spent + PRICE * width
        self.tried.append((self.turn * _STRIDE, row, gain))

    @property
    def earned(self) -> float:
        return self.gained - self.spent


@register_environment("planted")
class Planted:
    """``num`` such episodes side by side."""

    scope = Scope(operations=("wait", "germinate", "stop"), blueprints=("default",), strategies=("fixed_ramp",))
    families = ("planted",)
    best: float | None = BEST

    def __init__(self, num: int) -> None:
        self.num = num
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin anew."""
        self._rng = np.random.default_rng(seed)
        self._episodes = [Episode.begin(self._rng) for _ in range(self.num)]
        self._readers = [FeatureReader() for _ in range(self.num)]
        self._seen: list[Sight] | None = None

    def observations(self) -> list[Observation]:
        """What any controller sees."""
        return [observation_of(episode) for episode in self._episodes]

    def look(self) -> list[Sight]:
        """What a learned one sees; readers look once a decision point."""
        if self._seen is None:
            pairs = zip(self._readers, self.observations(), strict=True)
            self._seen = [see(reader, observation, self.scope) for reader, observation in pairs]
        return self._seen

    def step(self, actions: Ints) -> Stepped[Sight]:
        """Act once in each."""
        self.look()
        rewards, ended = np.zeros(self.num), np.zeros(self.num, dtype=np.bool_)
        for row, numbers in enumerate(actions.tolist()):
            episode = self._episodes[row]
            episode.act(Action(*numbers))
            if episode.turn == HORIZON:
                rewards[row], ended[row] = episode.earned, True
                self._episodes[row], self._readers[row] = Episode.begin(self._rng), FeatureReader()
        self._seen = None
        return Stepped(rewards, ended, np.zeros(self.num, dtype=np.bool_))

    def state(self) -> dict[str, Any]:
        """Episodes, readers and the random stream."""
        return {
            "rng": self._rng.bit_generator.state,
            "episodes": [asdict(episode) for episode in self._episodes],
            "readers": [reader.state() for reader in self._readers],
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`."""
        episodes: list[dict[str, Any]] = state["episodes"]
        self._rng.bit_generator.state = state["rng"]
        self._episodes = [Episode(**plain) for plain in episodes]
        for reader, plain in zip(self._readers, state["readers"], strict=True):
            reader.load(plain)
        self._seen = None


def observation_of(episode: Episode) -> Observation:
    """The run as a grower would show it."""
    num, step = len(episode.grown), episode.turn * _STRIDE
    sites = np.full((num, len(SITE_FEATURES)), np.nan)
    sites[:, _COLUMN["is_span"]], sites[:, _COLUMN["is_conv"]] = 1.0, 0.0
    sites[:, [_COLUMN["log_in"], _COLUMN["log_out"]]] = math.log(_WIDTH)
    sites[:, _COLUMN["log_hidden"]] = math.log(_HIDDEN)
    sites[:, _COLUMN["free_chunk_share"]] = 1.0
    sites[:, _COLUMN["gradient_energy"]] = episode.energies
    grown = np.rint(_HIDDEN * np.array(episode.grown)).astype(np.int64)
    unit = 2.0 * _WIDTH + 1.0
    host = int(num * _HIDDEN * unit)
    names = tuple(f"site.{row}" for row in range(num))
    loss = 2.0 - episode.gained
    return Observation(
        step=step, total_steps=HORIZON * _STRIDE, held_out=loss, held_out_initial=2.0,
        params=host + int(grown.sum() * unit), host_params=host, budget_params=None,
        flops_per_step=2.0 * (host + float(grown.sum()) * unit), host_flops_per_step=2.0 * host, budget_flops=None,
        site_names=names, sites=sites, hidden=np.full(num, _HIDDEN, np.int64), grown=grown,
        eligible=np.ones(num, dtype=np.bool_), chunk_site=np.zeros(0, np.int64), chunk_index=np.zeros(0, np.int64),
        chunk_pressure=np.zeros(0), alive=(), verdicts=tuple(_verdicts(episode, names)),
        stopped="by the policy" if episode.stopped else None, unit_params=np.full(num, unit),
        unit_flops=np.full(num, 2.0 * unit), train_loss=loss, price=PRICE,
    )  # fmt: skip


def _verdicts(episode: Episode, names: tuple[str, ...]) -> list[Verdict]:
    return [
        Verdict(
            cohort=number, step=step, state=Lifecycle.FOSSILIZED if gain > 0 else Lifecycle.CULLED,
            sites=(names[row],), gain=gain, gain_low=gain, gain_high=gain, added_params=1, added_flops_share=0.1,
            reason="planted",
        )
        for number, (step, row, gain) in enumerate(episode.tried)
    ]  # fmt: skip
