"""Errors a user can meet. Each message states the rule, the value received and the remedy."""

from __future__ import annotations


class EsperError(Exception):
    """Anything Esper refuses to do. Nothing was changed when it is raised."""


class ConfigError(EsperError, ValueError):
    """A setting is outside its range or contradicts another."""


class SiteError(EsperError, ValueError):
    """The model has no place that can grow, or a place cannot be used as asked."""


class AttachError(EsperError, RuntimeError):
    """The grower cannot be attached to this model, optimizer or data."""


class SilentSiteError(EsperError, RuntimeError):
    """A site's parameters receive gradients but its hook never runs."""


class TransitionError(EsperError, RuntimeError):
    """A lifecycle transition that the table does not allow."""


class UnknownNameError(EsperError, KeyError):
    """No plug-in of that name; the message lists the known ones."""

    def __str__(self) -> str:  # KeyError would print the message's repr
        return str(self.args[0]) if self.args else ""


class ExportError(EsperError, RuntimeError):
    """An exported model would not equal the grown one."""


class AbsorbError(EsperError, RuntimeError):
    """Growth cannot move into the host's own tensors now."""


class DataError(EsperError, ValueError):
    """A data set is missing or has the wrong shape."""


class DivergenceError(EsperError, ArithmeticError):
    """A training has left the finite numbers; nothing can be concluded from it."""


class StateError(EsperError, ValueError):
    """A saved state is damaged, of another version or of another run, or something cannot be part of one."""


class EvidenceError(EsperError, ValueError):
    """A measurement that a test needs is missing, not finite or out of order."""


class BusError(EsperError, ConnectionError):
    """The message broker cannot be reached, or does not take what it is given."""


class WorkerError(EsperError, RuntimeError):
    """A process that does a part of the work, perhaps on another machine, cannot be started or is gone."""


class EnvelopeError(EsperError, ValueError):
    """A message that is not what its sender should have sent; it goes to the dead letters."""


CONTAINED = (
    ArithmeticError, AttributeError, LookupError, MemoryError, NameError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip
"""What a user's plug-in or evaluation may raise (``torch.OutOfMemoryError`` among it) without ending the training: the
cohort it happened to leaves, with the reason. Esper's own errors, failed assertions and whatever else pass on."""


def contained(error: BaseException) -> str:
    """What was raised, in a sentence; one of Esper's own errors is raised again."""
    if isinstance(error, EsperError):
        raise error
    return f"{type(error).__name__}: {error}".rstrip(": ")
