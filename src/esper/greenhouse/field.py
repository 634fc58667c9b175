"""Episodes of several families side by side: what a policy learns in (see :mod:`esper.learning.environment`).

``greenhouse`` draws hosts of the training families from their training tasks, at drawn learning rates;
``greenhouse/FAMILY`` draws one family's hosts from tasks that nothing is trained on, at the family's own learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from esper.errors import ConfigError
from esper.greenhouse.episodes import SCOPE, Episodes, Outcome
from esper.greenhouse.family import FAMILIES, FIRST_HELD_OUT, HostSpec, all_kept
from esper.greenhouse.frontier import LEARNING_RATES, tasks_of
from esper.learning.environment import Stepped, register_environment
from esper.protocol import Observation
from esper.tamiyo.actions import Action
from esper.tamiyo.sight import Sight

Ints = npt.NDArray[np.int64]
Play = Callable[[Sequence[Sight], Sequence[Observation]], Sequence[Action]]
"""What is done at a decision point in each of some episodes."""

TRAINING = tuple(name for name, family in FAMILIES.items() if family.purpose == "training")


class Field:
    """``num`` episodes, shared out evenly over families, each family's as one stack.

    They have one length and end together; then all begin anew with other hosts. Whatever happens follows from the seed
    of :meth:`reset` and the actions. The state is the hosts and what was done since they began: loading plays it again.

    Parameters
    ----------
    held_out:
        Tasks that nothing is trained on, at the families' own learning rates; else training tasks at drawn ones.
    keep_all:
        No judgement: whatever reaches it becomes permanent, and culling is up to the controller.
    """

    scope = SCOPE
    best: float | None = None

    def __init__(
        self, num: int, *, families: Sequence[str] = TRAINING, held_out: bool = False, keep_all: bool = False
    ) -> None:
        self.num, self._held_out, self._keep_all = num, held_out, keep_all
        shares = [num // len(families) + (row < num % len(families)) for row in range(len(families))]
        self._shares = {name: share for name, share in zip(families, shares, strict=True) if share}
        self.families = tuple(self._shares)
        lengths = {FAMILIES[name].steps // FAMILIES[name].config.interval for name in self.families}
        if len(lengths) != 1:
            raise ConfigError(f"families side by side must have as many decision points, got {sorted(lengths)}")
        self.outcomes: tuple[Outcome, ...] = ()
        """How the episodes that ended last came out."""
        self.reset(0)

    def reset(self, seed: int) -> None:
        """Begin all episodes anew."""
        self._rng = np.random.default_rng(seed)
        self._begin([spec for name, share in self._shares.items() for spec in self._draw(name, share)])

    def look(self) -> list[Sight]:
        """What is to be seen now."""
        return [sight for stack in self._stacks for sight in stack.sights]

    def observations(self) -> list[Observation]:
        """The same, as any controller sees it."""
        return [seen for stack in self._stacks for seen in stack.observations]

    def step(self, actions: Ints) -> Stepped[Sight]:
        """Act once in each; ``actions (num, 5)``."""
        chosen = [Action(*numbers) for numbers in actions.tolist()]
        self._done.append([tuple(action) for action in chosen])
        rewards = self._act(chosen)
        ended = self._stacks[0].done
        if ended:
            self.outcomes = tuple(end for stack in self._stacks for end in stack.outcomes)
            self._begin([spec for name, share in self._shares.items() for spec in self._draw(name, share)])
        flags = np.full(self.num, ended)
        return Stepped(rewards, flags, np.zeros(self.num, dtype=np.bool_))

    def state(self) -> dict[str, Any]:
        """The random stream, the hosts, and the actions since they began."""
        hosts = [[spec.family, spec.task, spec.seed, spec.lr] for spec in self._specs]
        return {"rng": self._rng.bit_generator.state, "hosts": hosts, "done": [list(turn) for turn in self._done]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on exactly from :meth:`state`: the actions so far are played again."""
        self._rng.bit_generator.state = state["rng"]
        self._begin([HostSpec(family=f, task=task, seed=seed, lr=lr) for f, task, seed, lr in state["hosts"]])
        for turn in state["done"]:
            self._done.append([tuple(numbers) for numbers in turn])
            self._act([Action(*numbers) for numbers in turn])

    def branches(self, row: int, actions: Sequence[Action], play: Play) -> npt.NDArray[np.float64]:
        """Returns ``(K,)`` of one episode after each of K actions, played on by ``play``: common random numbers.

        The field itself stays where it is. Equal actions, played on equally, have equal returns, to the last bit.
        """
        for stack in self._stacks:
            if row < len(stack):
                twin = stack.branch(row, actions)
                while not twin.done:
                    twin.step(play(twin.sights, twin.observations))
                return np.array([end.reward for end in twin.outcomes])
            row -= len(stack)
        raise ConfigError(f"a field of {self.num} episodes has no row {self.num + row}; count from 0")

    def _begin(self, specs: list[HostSpec]) -> None:
        self._specs = specs
        configs = {name: FAMILIES[name].config for name in self.families}
        if self._keep_all:
            configs = {name: all_kept(config) for name, config in configs.items()}
        self._stacks = [Episodes([s for s in specs if s.family == name], configs[name]) for name in self.families]
        self._done: list[list[tuple[int, ...]]] = []

    def _draw(self, name: str, num: int) -> list[HostSpec]:
        tasks = [task for task in tasks_of(name) if (task >= FIRST_HELD_OUT) == self._held_out] or tasks_of(name)
        rates = [FAMILIES[name].lr] if self._held_out else LEARNING_RATES
        return [
            HostSpec(
                family=name, task=int(self._rng.choice(tasks)), seed=int(self._rng.integers(1 << 20, 1 << 31)),
                lr=float(self._rng.choice(rates)),
            )
            for _ in range(num)
        ]  # fmt: skip

    def _act(self, actions: Sequence[Action]) -> npt.NDArray[np.float64]:
        rewards: list[npt.NDArray[np.float64]] = []
        first = 0
        for stack in self._stacks:
            rewards.append(stack.step(actions[first : first + len(stack)]))
            first += len(stack)
        return np.concatenate(rewards)


register_environment("greenhouse")(Field)
for _name in FAMILIES:
    register_environment(f"greenhouse/{_name}")(partial(Field, families=(_name,), held_out=True))
