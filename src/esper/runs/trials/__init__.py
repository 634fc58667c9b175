"""Many small hosts that grow under the real Grower, scored after each run. Importing this does not import torch."""

from esper.runs.trials.options import PEER_NAMES, TrialOptions

__all__ = ["PEER_NAMES", "TrialOptions"]
