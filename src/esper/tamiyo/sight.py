"""What a learned controller decides on: features, and what it may do."""

from __future__ import annotations

from dataclasses import dataclass

from esper.protocol import Observation
from esper.tamiyo.actions import EVERYTHING, Masks, Scope, masks
from esper.tamiyo.features import FeatureReader, Features


@dataclass(frozen=True)
class Sight:
    """One decision point."""

    features: Features
    masks: Masks


def see(reader: FeatureReader, observation: Observation, scope: Scope = EVERYTHING) -> Sight:
    """Look once at a decision point; ``reader`` belongs to the run."""
    return Sight(reader.read(observation), masks(observation, scope))
