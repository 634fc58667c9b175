"""Starts: how a branch's first weights are made."""

from esper.kasmina.starts import negative_gradient, random_zero, reconstruction
from esper.kasmina.starts.start import STARTS, Start, StartReport

__all__ = ["STARTS", "Start", "StartReport", "negative_gradient", "random_zero", "reconstruction"]
