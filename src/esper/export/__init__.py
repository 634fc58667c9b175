"""Merge growth into ordinary layers, and write the result so that it loads without Esper."""

from esper.export.merge import Difference, check_equal, default_tolerance, grown_sites, merged, structure

__all__ = ["Difference", "check_equal", "default_tolerance", "grown_sites", "merged", "structure"]
