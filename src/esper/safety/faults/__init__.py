"""Faults to inject into a run: for tests and for ``esper trials --faults``.

Faults of training strike in a step, those of the disk (a corrupt or truncated checkpoint, a full disk, a killed writer)
while a checkpoint is written or read, those of the bus (gone, losing, doubling, disordering) while commands come in.
"""

from esper.safety.faults.blueprint_forward import BlueprintForward
from esper.safety.faults.blueprint_init import BlueprintInit
from esper.safety.faults.bus_disorders import BusDisorders
from esper.safety.faults.bus_doubles import BusDoubles
from esper.safety.faults.bus_gone import BusGone
from esper.safety.faults.bus_loses import BusLoses
from esper.safety.faults.clock_jumps import ClockJumps
from esper.safety.faults.corrupt_checkpoint import CorruptCheckpoint
from esper.safety.faults.evaluation_hangs import EvaluationHangs
from esper.safety.faults.evaluation_raises import EvaluationRaises
from esper.safety.faults.exploding_lr import ExplodingRate
from esper.safety.faults.fault import (
    FAULTS,
    Expectation,
    Fault,
    InjectedError,
    Moment,
    NotRefusedError,
    Strikes,
    Subject,
)
from esper.safety.faults.full_disk import FullDisk
from esper.safety.faults.host_nan import HostNan
from esper.safety.faults.inf_batch import InfBatch
from esper.safety.faults.killed_writer import KilledWriter
from esper.safety.faults.nan_batch import NanBatch
from esper.safety.faults.out_of_memory import OutOfMemory
from esper.safety.faults.traffic import Traffic
from esper.safety.faults.truncated_checkpoint import TruncatedCheckpoint
from esper.safety.faults.two_growers import TwoGrowers

__all__ = [
    "FAULTS",
    "BlueprintForward",
    "BlueprintInit",
    "BusDisorders",
    "BusDoubles",
    "BusGone",
    "BusLoses",
    "ClockJumps",
    "CorruptCheckpoint",
    "EvaluationHangs",
    "EvaluationRaises",
    "Expectation",
    "ExplodingRate",
    "Fault",
    "FullDisk",
    "HostNan",
    "InfBatch",
    "InjectedError",
    "KilledWriter",
    "Moment",
    "NanBatch",
    "NotRefusedError",
    "OutOfMemory",
    "Strikes",
    "Subject",
    "Traffic",
    "TruncatedCheckpoint",
    "TwoGrowers",
]
