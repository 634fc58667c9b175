"""What crosses a boundary: observations, commands and events, as plain typed data.

Everything here is a frozen ``msgspec.Struct`` (or a NumPy structure of arrays for the observation), so that it can be
logged, sent over a bus and replayed. This package imports nothing else of Esper; controllers and observers import
nothing but this package.

Missing values are NaN (floats) or ``None``; a missing value is *unknown*, never healthy.
"""

from __future__ import annotations

from esper.protocol.commands import (
    Cancel,
    Command,
    Cull,
    Germinate,
    Pause,
    Resume,
    RollBack,
    SeedPlan,
    SetBudget,
    SetStrategy,
    Snapshot,
    Stop,
)
from esper.protocol.events import (
    SCHEMA_VERSION,
    Absorbed,
    AlphaMoved,
    AnyEvent,
    ArmFinished,
    Attached,
    Audited,
    Commanded,
    EffectScored,
    Event,
    Fitted,
    Germinated,
    GrowthPaused,
    HeldOut,
    Incident,
    Judged,
    Overhead,
    Record,
    Refused,
    Restored,
    RunFinished,
    RunStarted,
    Stopped,
    Telemetry,
    TrainLoss,
    Transitioned,
    TwinScored,
    Warned,
    Withheld,
)
from esper.protocol.lifecycle import (
    Lifecycle,
)
from esper.protocol.observation import (
    SITE_FEATURES,
    CohortView,
    Observation,
    Verdict,
)
from esper.protocol.orders import (
    ACKNOWLEDGEMENT_SCHEMA,
    ORDER_SCHEMA,
    Acknowledgement,
    Order,
    Outcome,
)
from esper.protocol.sites import (
    SiteInfo,
    SiteKind,
    Skipped,
)

__all__ = [
    "ACKNOWLEDGEMENT_SCHEMA",
    "ORDER_SCHEMA",
    "SCHEMA_VERSION",
    "SITE_FEATURES",
    "Absorbed",
    "Acknowledgement",
    "AlphaMoved",
    "AnyEvent",
    "ArmFinished",
    "Attached",
    "Audited",
    "Cancel",
    "CohortView",
    "Command",
    "Commanded",
    "Cull",
    "EffectScored",
    "Event",
    "Fitted",
    "Germinate",
    "Germinated",
    "GrowthPaused",
    "HeldOut",
    "Incident",
    "Judged",
    "Lifecycle",
    "Observation",
    "Order",
    "Outcome",
    "Overhead",
    "Pause",
    "Record",
    "Refused",
    "Restored",
    "Resume",
    "RollBack",
    "RunFinished",
    "RunStarted",
    "SeedPlan",
    "SetBudget",
    "SetStrategy",
    "SiteInfo",
    "SiteKind",
    "Skipped",
    "Snapshot",
    "Stop",
    "Stopped",
    "Telemetry",
    "TrainLoss",
    "Transitioned",
    "TwinScored",
    "Verdict",
    "Warned",
    "Withheld",
]
