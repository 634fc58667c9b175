"""Episodes for controllers: one is one training run of one host, from its first decision point to its planned end.

Many hosts go through their episodes side by side. At each decision point every host gives a :class:`Sight` and takes an
:class:`Action`; after the last one the runs are finished, tested once, and rewarded:

    reward = (the task's static frontier at the FLOPs that the run has cost - test loss) / deviation between seeds

Everything is counted, and nothing is paid before the end, so there is no discount and the end is a termination.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from esper.config import Config
from esper.errors import ConfigError
from esper.greenhouse.family import HostSpec
from esper.greenhouse.frontier import Frontier, frontier_of
from esper.greenhouse.germination import apply
from esper.greenhouse.hosts import Hosts
from esper.greenhouse.observing import observe
from esper.greenhouse.stages import finish
from esper.protocol import Command, Observation
from esper.tamiyo.actions import Action, Scope, commands
from esper.tamiyo.features import FeatureReader
from esper.tamiyo.sight import Sight, see

SCOPE = Scope(blueprints=("default",), strategies=("default",))
"""What of the actions stacked hosts can do."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a finished run came to.

    ``parts`` are its FLOPs by part of the ledger, ``frontier_loss`` what the best static network has for their sum.
    """

    loss: float
    flops: float
    frontier_loss: float
    deviation: float
    reward: float
    params: int
    parts: dict[str, float]


class Episodes:
    """N hosts of one family on their way through one episode each.

    Parameters
    ----------
    specs:
        One for each host.
    config:
        Settings of growth; ``None``: the family's.
    scope:
        What of the actions is open.
    """

    def __init__(self, specs: Sequence[HostSpec], config: Config | None = None, *, scope: Scope = SCOPE) -> None:
        self.scope = scope
        self.hosts = Hosts(specs, config)
        self._frontiers = [frontier_of(spec.family, spec.task) for spec in specs]
        self._readers = [FeatureReader() for _ in specs]
        self.outcomes: tuple[Outcome, ...] = ()
        """How the runs ended; empty before."""
        self._go_on()

    def __len__(self) -> int:
        return len(self.hosts)

    @property
    def done(self) -> bool:
        return bool(self.outcomes)

    @property
    def num_decisions(self) -> int:
        """Decisions in an episode; the planned end is none."""
        return (self.hosts.total_steps - 1) // self.hosts.config.interval

    @property
    def observations(self) -> tuple[Observation, ...]:
        """What there is to see of each host now."""
        return self._observations

    @property
    def sights(self) -> tuple[Sight, ...]:
        """The same as features and masks."""
        return self._sights

    def step(self, actions: Sequence[Action]) -> npt.NDArray[np.float64]:
        """One action a host, then training up to the next decision point.

        Returns
        -------
        ``(N,)`` rewards: zero before the end.

        Raises
        ------
        ConfigError
            An action outside its host's masks, or after the end.
        """
        for number, (action, sight) in enumerate(zip(actions, self._sights, strict=True)):
            if not sight.masks.allow(action):
                raise ConfigError(
                    f"an action must lie within its host's masks, got {tuple(action)} for host {number} at step "
                    f"{self.hosts.step_count}; draw each factor among masks.valid(factors before)"
                )
        return self.order([commands(a, seen) for a, seen in zip(actions, self._observations, strict=True)])

    def order(self, orders: Sequence[Sequence[Command]]) -> npt.NDArray[np.float64]:
        """As :meth:`step`, for any commands of a controller; what a gate refuses changes nothing."""
        if self.done:
            raise ConfigError("the episodes have ended and take no more orders; make new ones")
        for number, wanted in enumerate(orders):
            for command in wanted:
                apply(self.hosts, number, command)
        self._go_on()
        return np.array([outcome.reward for outcome in self.outcomes] or [0.0] * len(self))

    def select(self, rows: Sequence[int]) -> Episodes:
        """Copies of some episodes as they are now, in this order; one may be named many times.

        All of them are a snapshot; one of them k times are k branches under common random numbers.
        """
        twin = object.__new__(Episodes)
        twin.scope, twin.hosts = self.scope, self.hosts.select(rows)
        twin._frontiers = [self._frontiers[row] for row in rows]
        twin._readers = [FeatureReader() for _ in rows]
        for reader, row in zip(twin._readers, rows, strict=True):
            reader.load(self._readers[row].state())
        twin._observations = tuple(self._observations[row] for row in rows)
        twin._sights = tuple(self._sights[row] for row in rows)
        twin.outcomes = tuple(self.outcomes[row] for row in rows) if self.done else ()
        return twin

    def branch(self, row: int, actions: Sequence[Action]) -> Episodes:
        """One episode as many times as there are actions, each after its own: common random numbers from there on."""
        twin = self.select([row] * len(actions))
        twin.step(actions)
        return twin

    def _go_on(self) -> None:
        self.hosts.advance(self.hosts.config.interval)
        if self.hosts.done:
            finish(self.hosts)
        self._observations = tuple(observe(self.hosts, number) for number in range(len(self)))
        self._sights = tuple(
            see(reader, seen, self.scope) for reader, seen in zip(self._readers, self._observations, strict=True)
        )
        if self.hosts.done:
            self.outcomes = tuple(
                outcome(self.hosts, number, loss, frontier)
                for number, (loss, frontier) in enumerate(
                    zip(self.hosts.test_losses().tolist(), self._frontiers, strict=True)
                )
            )


def outcome(hosts: Hosts, host: int, loss: float, frontier: Frontier) -> Outcome:
    """The reward of a finished run, and what it is made of."""
    ledger = hosts.lives[host].ledger
    return Outcome(
        loss=loss, flops=ledger.total, frontier_loss=frontier.loss_at(ledger.total), deviation=frontier.deviation,
        reward=frontier.reward(loss, ledger.total), params=hosts.params(host), parts=ledger.state(),
    )  # fmt: skip
