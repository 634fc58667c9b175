"""Karn, the architect: keeps what became of every cohort, and proposes what to grow next from it.

It sees plain data only: events come in, proposals go out.
"""

from esper.karn.advised import AdvisedController
from esper.karn.architect import Architect, Proposal, Site
from esper.karn.collector import Collector
from esper.karn.database import Database
from esper.karn.design import Design
from esper.karn.report import FieldReport, Placement
from esper.karn.selection import selections
from esper.karn.snapshot import Snapshot, read_snapshot

__all__ = [
    "AdvisedController",
    "Architect",
    "Collector",
    "Database",
    "Design",
    "FieldReport",
    "Placement",
    "Proposal",
    "Site",
    "Snapshot",
    "read_snapshot",
    "selections",
]
