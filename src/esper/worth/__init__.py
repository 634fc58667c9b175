"""What a branch is worth at a place: features of both, and a Bayesian linear model over them.

Shared by the architect and by controllers that learn; plain data and NumPy only.
"""

from esper.worth.features import FEATURE_NAMES, LAYOUT, encode, prior_precision
from esper.worth.place import Choice, Place, places, reference_width
from esper.worth.posterior import LinearPosterior
from esper.worth.target import TARGETS, compressed, gain_share, targets

__all__ = [
    "FEATURE_NAMES",
    "LAYOUT",
    "TARGETS",
    "Choice",
    "LinearPosterior",
    "Place",
    "compressed",
    "encode",
    "gain_share",
    "places",
    "prior_precision",
    "reference_width",
    "targets",
]
