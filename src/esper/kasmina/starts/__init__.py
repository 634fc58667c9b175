"""Starts: how a branch's first weights are made."""

from esper.kasmina.starts import copy, gradmax, negative_gradient, random_zero, reconstruction, tiny
from esper.kasmina.starts.start import STARTS, HostUnits, Start, StartReport

__all__ = [
    "STARTS",
    "HostUnits",
    "Start",
    "StartReport",
    "copy",
    "gradmax",
    "negative_gradient",
    "random_zero",
    "reconstruction",
    "tiny",
]
