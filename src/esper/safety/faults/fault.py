"""What a fault is, and the names they go by.

A fault is one file and one registration, like every other family of plug-ins::

    @FAULTS.register("nan_batch")
    class NanBatch(Fault):
        does = "..."
        moment, expects = Moment.GRAFTED, Expectation.RESTORED

        @contextmanager
        def inject(self, subject): ...

and an import in ``esper/safety/faults/__init__.py``. A harness waits for the fault's :class:`Moment`, trains on inside
:meth:`Fault.inject`, and checks afterwards that what the fault :attr:`~Fault.expects` holds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from esper.errors import EsperError
from esper.kasmina.registry import Registry
from esper.kasmina.site import Site

if TYPE_CHECKING:
    from esper.safety.faults.traffic import Traffic


class Expectation(Enum):
    """What must hold once a fault is over."""

    SURVIVES = "survives"
    """No error reaches the user's loop, all numbers are finite, nothing half-made is left, and training goes on."""
    REFUSED = "refused"
    """As above; and what was asked for is refused with a reason and has changed nothing."""
    RESTORED = "restored"
    """As above; and the host is as good as before the fault: its suspects are gone, its weights
    are those from before."""
    REPORTED = "reported"
    """It is the host's or the disk's own trouble: the user is told so, and nothing of it is hidden."""


class Moment(Enum):
    """What a run must be doing when the fault strikes."""

    ANY = "any"
    IDLE = "no cohort alive"
    GERMINATION = "a germination is due"
    GRAFTED = "a branch is in the forward pass"
    JUDGEMENT = "a cohort is about to be judged"
    SAVING = "a checkpoint is being written, or read"
    COMMANDED = "commands come in over a bus"


@dataclass
class Strikes:
    """How often a fault has struck so far: one that never did proves nothing."""

    num: int = 0


@dataclass(frozen=True, kw_only=True)
class Subject:
    """The training that a fault is done to, as its harness sees it."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    sites: Mapping[str, Site]
    """Of the grower on the model, by name."""
    attach: Callable[[], object]
    """Hangs a second grower on the same model."""
    folder: Path | None = None
    """Where the run's checkpoints lie, if it writes any."""
    traffic: Traffic | None = None
    """Of the bus that it is on, if it is on one."""


class Fault(ABC):
    """One thing that goes wrong. Stateless: what it must remember lives in :meth:`inject`."""

    does: str
    """What it does, in a sentence."""
    moment: Moment
    expects: Expectation
    patience: int = 1
    """Training steps in which it waits for its chance to strike."""
    lasts: int = 1
    """Training steps that it goes on for once it has struck, the first one included."""
    time_limit_s: float | None = None
    """Seconds after which the harness must break off a call that hangs."""
    leaves_no_trace: bool = False
    """Whether the run must go on bit for bit as one without it."""

    @abstractmethod
    def inject(self, subject: Subject) -> AbstractContextManager[Strikes]:
        """The fault acts while the context lasts; afterwards everything it changed is as it was."""


class InjectedError(RuntimeError):
    """What a fault raises in the place of user code: nobody can have expected it."""


class NotRefusedError(EsperError, AssertionError):
    """Something went through that had to be refused."""


FAULTS: Registry[Fault] = Registry("fault")
