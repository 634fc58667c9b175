"""Training without end under growth without rest, watched for what leaks. Importing this does not import torch."""

from esper.runs.soak.options import SoakOptions

__all__ = ["SoakOptions"]
