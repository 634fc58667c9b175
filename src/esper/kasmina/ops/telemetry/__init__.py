"""Telemetry: statistics a chunk."""

from esper.kasmina.ops.telemetry.reference import chunk_statistics

__all__ = ["chunk_statistics"]
