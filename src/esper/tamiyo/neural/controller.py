"""The neural controller: asked at decision points only, never on the forward path."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from esper.config import TamiyoConfig
from esper.errors import ConfigError
from esper.protocol import Command, Observation
from esper.tamiyo.actions import Action, commands
from esper.tamiyo.features import FeatureReader
from esper.tamiyo.heuristic import HeuristicController
from esper.tamiyo.neural import policy_file
from esper.tamiyo.neural.batch import Batch
from esper.tamiyo.neural.policy import Policy
from esper.tamiyo.neural.threads import one_thread
from esper.tamiyo.sight import Sight, see

_STATE_KEYS = ("policy", "decisions", "reader", "heuristic")


class NeuralController:
    """Follows a trained policy; hands over to the heuristic where the policy has no experience.

    At every decision point where a feature lies outside what the policy was trained on, the heuristic decides, and
    :meth:`notes` says so. It takes the likeliest action by default: the same run twice should
    grow the same network, and a draw only pays where somebody learns from it.

    Parameters
    ----------
    config:
        ``config.policy`` names the policy's folder (``None``: the one that comes with the package); all of it is the
        heuristic's too.
    seed:
        Starts the generator that ``sampled`` draws from; the heuristic's as well.
    sampled:
        Draw actions by their probabilities, as in training.

    Raises
    ------
    StateError
        The policy is damaged, foreign, or from a newer Esper.
    """

    def __init__(self, config: TamiyoConfig, *, seed: int = 0, sampled: bool = False) -> None:
        self.policy, self.card = policy_file.load(config.policy or policy_file.SHIPPED)
        self.sampled = sampled
        self._seed = seed
        self._reader = FeatureReader()
        self._heuristic = HeuristicController(config, seed=seed)
        self._decisions = 0
        self._notes: list[str] = []

    def decide(self, observation: Observation) -> tuple[Command, ...]:
        """Return the commands of one action: none, one ``Germinate``, one ``Cull`` or one ``Stop``."""
        sight = see(self._reader, observation, self.card.scope)
        stranger = self.card.ranges.stranger(sight.features)
        if stranger is not None:
            self._notes.append(
                f"the policy was not trained on such a run ({stranger} lies outside what it has seen): the heuristic "
                "decides instead at those points"
            )
            return self._heuristic.decide(observation)
        self._decisions += 1
        if sight.masks.forced:
            return ()
        return commands(self._choose(self.policy, sight), observation, reason="neural")

    def notes(self) -> tuple[str, ...]:
        """Why the heuristic decided, since the last call."""
        told, self._notes = tuple(dict.fromkeys(self._notes)), []
        return told

    def state(self) -> dict[str, Any]:
        """Return counters and what is remembered of the run; the policy itself by its hash."""
        return {
            "policy": self.card.sha256,
            "decisions": self._decisions,
            "reader": self._reader.state(),
            "heuristic": self._heuristic.state(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; raises ``ConfigError`` if keys are missing or the policy is another one."""
        if set(state) != set(_STATE_KEYS):
            raise ConfigError(
                f"a neural controller's state must have the keys {sorted(_STATE_KEYS)}, got {sorted(state)}; load it "
                "into the controller that saved it"
            )
        own = self.card.sha256
        if state["policy"] != own:
            raise ConfigError(
                f"a run goes on with the policy it began with ({state['policy']}), got {own}; set tamiyo.policy to it"
            )
        reader = FeatureReader()
        reader.load(state["reader"])
        self._heuristic.load(state["heuristic"])
        self._reader, self._decisions = reader, int(state["decisions"])

    def _choose(self, policy: Policy, sight: Sight) -> Action:
        generator = None
        if self.sampled:  # one generator a decision: the count is all there is to save
            seed = np.random.SeedSequence([self._seed, self._decisions]).generate_state(1)
            generator = torch.Generator().manual_seed(int(seed[0]))
        # A user's autocast is none of the policy's business.
        with one_thread(), torch.inference_mode(), torch.autocast("cpu", enabled=False):
            found = policy(Batch.of([sight]), generator=generator)
        return Action(*found.actions[0].tolist())
