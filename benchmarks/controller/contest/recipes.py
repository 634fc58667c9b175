"""How policies are trained that are compared: the full recipe, and one in which each part is left out or replaced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from esper.greenhouse.episodes import SCOPE, Outcome
from esper.greenhouse.frontier import Frontier
from esper.tamiyo.actions import BLUEPRINTS, SIZES, STRATEGIES, Masks, Operation
from esper.tamiyo.features import GLOBAL_COLUMNS, Features
from esper.tamiyo.sight import Sight

MOST = 5.0
"""Returns are held within so many seed deviations: one run that went astray teaches no more than others."""
_TIME = ("progress", "on_trial")
"""What a policy may see that knows the time alone."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One way to train.

    Attributes
    ----------
    start:
        ``branches`` (imitate the heuristic and the best of many schedules on each of some hosts), ``heuristic`` (that
        alone) or ``nothing``.
    credit:
        ``siblings``: every host runs several times, and a run is worth what it is above its siblings' mean;
        ``critic``: advantages by GAE.
    floors:
        Whether entropies are held above a sinking floor.
    masks:
        Whether the policy knows what is valid; otherwise what is not counts as a wait.
    sees:
        ``all`` features or ``time`` alone.
    reward:
        ``clipped``, ``raw``, or ``uncounted`` (loss alone: what growth costs is left out).
    """

    start: str = "branches"
    credit: str = "siblings"
    floors: bool = True
    masks: bool = True
    sees: str = "all"
    reward: str = "clipped"


FULL = Recipe()
RECIPES: dict[str, Recipe] = {
    "policy": FULL,
    "critic": replace(FULL, credit="critic"),
    "no-start": replace(FULL, start="nothing"),
    "heuristic-start": replace(FULL, start="heuristic"),
    "no-floors": replace(FULL, floors=False),
    "no-masks": replace(FULL, masks=False),
    "time-only": replace(FULL, sees="time"),
    "raw-reward": replace(FULL, reward="raw"),
    "uncounted": replace(FULL, reward="uncounted"),
}


def lens(recipe: Recipe) -> Callable[[Sight], Sight]:
    """What the policy is shown of a sight."""

    def shown(sight: Sight) -> Sight:
        features = sight.features if recipe.sees == "all" else time_alone(sight.features)
        return Sight(features, sight.masks if recipe.masks else open_masks(sight.masks))

    return shown


def time_alone(features: Features) -> Features:
    """Only how far the run is, and whether anything is on trial; the rest is zero and nothing is marked missing."""
    world = np.zeros_like(features.world)
    for name in _TIME:
        world[GLOBAL_COLUMNS.index(name)] = features.world[GLOBAL_COLUMNS.index(name)]
    return Features(world, np.zeros_like(features.sites))


def open_masks(masks: Masks) -> Masks:
    """Everything that the scope names, whether it can be done now or not."""
    fits = np.zeros_like(masks.fits)
    fits[:, [SIZES.index(size) for size in SCOPE.sizes], BLUEPRINTS.index("default")] = True
    cullable = np.ones_like(masks.cullable)
    cullable[0] = False
    strategy = np.array([name in SCOPE.strategies for name in STRATEGIES])
    return Masks(np.ones(len(Operation), dtype=np.bool_), fits, cullable, strategy)


def earned(recipe: Recipe, end: Outcome, frontier: Frontier) -> float:
    """What a run pays while a policy learns."""
    if recipe.reward == "raw":
        return end.reward
    value = end.reward
    if recipe.reward == "uncounted":
        value = (frontier.losses[0] - end.loss) / end.deviation if np.isfinite(end.loss) else -MOST
    return float(np.clip(value, -MOST, MOST))
