"""The episodes as a gymnasium environment, ``esper/Growth-v0``: one host, one training run, one reward at its end.

    env = gymnasium.make("esper/Growth-v0", family="spirals")

Observations are the features of :mod:`esper.tamiyo.features`; actions are the factors of :mod:`esper.tamiyo.actions`,
each from 0 on. ``info`` holds their masks. A factor that an operation does not ask for is ignored, and an action
outside the masks counts as a wait and is reported (``info["invalid"]``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

try:
    import gymnasium
    from gymnasium import spaces
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        "the environment needs gymnasium, which is not installed; pip install 'esper-morph[rl]'", name="gymnasium"
    ) from error

from esper.errors import ConfigError
from esper.greenhouse.episodes import Episodes
from esper.greenhouse.family import FIRST_HELD_OUT, HostSpec, family_named
from esper.greenhouse.frontier import LEARNING_RATES, tasks_of
from esper.tamiyo.actions import BLUEPRINTS, FACTORS, SIZES, STRATEGIES, UNUSED, WAIT, Action, Operation
from esper.tamiyo.features import GLOBAL_COLUMNS, LIMIT, SITE_COLUMNS
from esper.tamiyo.sight import Sight

ID = "esper/Growth-v0"
Look = dict[str, Any]
"""``world`` and ``sites``, float32 arrays."""


class Growth(gymnasium.Env[Look, npt.NDArray[np.int64]]):
    """One host of a family.

    Parameters
    ----------
    family:
        Its name, see :mod:`esper.greenhouse.family`.
    tasks:
        Tasks to draw from; ``None``: training tasks, not those of evaluation.
    learning_rates:
        Learning rates to draw from.

    ``reset(options={"task": 3, "seed": 7, "lr": 0.01})`` fixes what is named instead of drawing it.
    """

    metadata = {"render_modes": []}  # noqa: RUF012  (gymnasium declares it so)

    def __init__(
        self,
        family: str = "teacher",
        tasks: Sequence[int] | None = None,
        learning_rates: Sequence[float] = LEARNING_RATES,
        render_mode: str | None = None,
    ) -> None:
        self.render_mode = render_mode
        self.family = family_named(family)
        known = tasks_of(family)
        self.tasks = tuple(task for task in known if task < FIRST_HELD_OUT) if tasks is None else tuple(tasks)
        self.learning_rates = tuple(learning_rates)
        if not self.tasks or not set(self.tasks) <= set(known) or not self.learning_rates:
            raise ConfigError(
                f"tasks must be some of the {len(known)} whose frontier was measured, got {self.tasks!r}; leave it None"
            )
        sites = self.family.num_sites
        self.observation_space = spaces.Dict(
            {
                "world": spaces.Box(-LIMIT, LIMIT, (len(GLOBAL_COLUMNS),), np.float32),
                "sites": spaces.Box(-LIMIT, LIMIT, (sites, len(SITE_COLUMNS)), np.float32),
            }
        )
        self.action_space = spaces.MultiDiscrete(
            [len(Operation), sites + 1, len(SIZES), len(BLUEPRINTS), len(STRATEGIES)]
        )
        self.episodes: Episodes | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Look, dict[str, Any]]:
        super().reset(seed=seed)
        drawn: dict[str, Any] = {
            "task": self.tasks[self.np_random.integers(len(self.tasks))],
            "seed": int(self.np_random.integers(1 << 31)),
            "lr": self.learning_rates[self.np_random.integers(len(self.learning_rates))],
        }
        chosen = {**drawn, **(options or {})}
        if set(chosen) != set(drawn):
            raise ConfigError(f"options may name task, seed and lr, got {sorted(options or {})}; leave others out")
        spec = HostSpec(
            family=self.family.name, task=int(chosen["task"]), seed=int(chosen["seed"]), lr=float(chosen["lr"])
        )
        self.episodes = Episodes([spec])
        return self._look(), {**self._masks(), "task": spec.task, "lr": spec.lr, "invalid": False}

    def step(self, action: npt.NDArray[np.int64]) -> tuple[Look, float, bool, bool, dict[str, Any]]:
        episodes = self._running()
        wanted = read_action(action)
        is_valid = episodes.sights[0].masks.allow(wanted)
        reward = float(episodes.step([wanted if is_valid else WAIT])[0])
        info: dict[str, Any] = {**self._masks(), "invalid": not is_valid}
        if episodes.done:
            ended = episodes.outcomes[0]
            info |= {"loss": ended.loss, "flops": ended.flops, "frontier_loss": ended.frontier_loss}
        return self._look(), reward, episodes.done, False, info

    def _running(self) -> Episodes:
        if self.episodes is None:
            raise ConfigError("an environment must be reset before its first step, got none; call reset()")
        return self.episodes

    def _sight(self) -> Sight:
        return self._running().sights[0]

    def _look(self) -> Look:
        features = self._sight().features
        return {"world": features.world.copy(), "sites": features.sites.copy()}

    def _masks(self) -> dict[str, Any]:
        """Masks of the factors: see :class:`esper.tamiyo.actions.Masks`."""
        found = self._sight().masks
        names = ("operation", "fits", "cullable", "strategy")
        return {"masks": {name: np.array(getattr(found, name)) for name in names}}


def read_action(numbers: npt.NDArray[np.int64]) -> Action:
    """An action from one number a factor; those that its operation does not ask for are dropped."""
    values = [int(number) for number in numbers]
    used = {Operation.GERMINATE: len(FACTORS), Operation.CULL: 2}.get(Operation(values[0]), 1)
    return Action(*values[:used], *[UNUSED] * (len(FACTORS) - used))


gymnasium.register(id=ID, entry_point="esper.greenhouse.environment:Growth")
