"""Held-out losses, measured without disturbing the host."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import Tensor, nn

from esper.config import EvidenceConfig
from esper.errors import AttachError, EsperError
from esper.evidence.acceptance import fewest_to_judge
from esper.evidence.splits import MIN_PART, Splits, split_batches
from esper.kasmina.isolation import preserved_rng, undisturbed
from esper.kasmina.ledger import Ledger
from esper.kasmina.tracing import tensors_in

Loss = Callable[[nn.Module, Any], Tensor]


class Evaluator:
    """The user's held-out batches, split three ways, and the user's loss over them.

    Parameters
    ----------
    loss:
        ``loss(model, batch)`` returns the mean loss of a batch as a scalar tensor.
    batches:
        Held-out batches; read once, here, without advancing the global random streams.
    min_gate:
        Fewest batches that must be left to judge with.

    Raises
    ------
    AttachError
        Too few batches, or the loss of the first one is not a finite scalar.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        batches: Iterable[Any],
        *,
        calibration_share: float,
        confirm_share: float,
        seed: int,
        min_gate: int = MIN_PART,
    ) -> None:
        if not callable(loss):
            raise AttachError(
                f"loss must be a function loss(model, batch) that returns the mean loss, got {type(loss).__name__}"
            )
        if not isinstance(batches, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]  # callers need not type-check
            raise AttachError(
                f"evaluate must be a list of held-out batches or a DataLoader, got {type(batches).__name__}"
            )
        self.model = model
        self.loss = loss
        with preserved_rng():
            self.batches: list[Any] = list(batches)
        if not self.batches:
            raise AttachError(
                "evaluate must yield held-out batches, got none; pass evaluate=[batch, ...] or a DataLoader over "
                "data that is not trained on"
            )
        self.splits = split_batches(len(self.batches), calibration_share, confirm_share, seed, min_gate)
        self.forward_cost: Callable[[int], float] = lambda num: 0.0
        self.ledger = Ledger()
        with _named_call(model, self.batches[0]):
            first = self.losses([0])[0]
        if not math.isfinite(first):
            raise AttachError(
                f"the loss on held-out batches must be a finite scalar, got {first}; check evaluate= and loss="
            )

    @classmethod
    def of(
        cls, model: nn.Module, loss: Loss, batches: Iterable[Any], config: EvidenceConfig, *, seed: int
    ) -> Evaluator:
        """With ``config``'s shares, and so many batches that the first cohort can be accepted at all."""
        return cls(
            model,
            loss,
            batches,
            calibration_share=config.calibration_share,
            confirm_share=config.confirm_share,
            seed=seed,
            min_gate=fewest_to_judge(config),
        )

    def over(self, model: nn.Module, fresh: Sequence[Any]) -> Evaluator:
        """Another network over this one's calibration batches and ``fresh`` ones, which are its gate; one ledger."""
        other = copy.copy(self)
        calibration = [self.batches[index] for index in self.splits.calibration]
        num, total = len(calibration), len(calibration) + len(fresh)
        other.model, other.batches = model, [*calibration, *fresh]
        rest = tuple(range(num, total))
        other.splits = Splits(calibration=tuple(range(num)), gate=rest, confirm=rest)
        return other

    def run_one(self) -> Tensor:
        """The loss of the first batch, in whatever mode the caller has set."""
        return self.loss(self.model, self.batches[0])

    def losses(self, indices: Sequence[int], model: nn.Module | None = None) -> list[float]:
        """Loss of each batch in evaluation mode; NaN where the loss is not a scalar tensor or number.

        ``model`` is another network to score (a twin); it is booked at the host's present cost.
        """
        scored = self.model if model is None else model
        with undisturbed(scored):
            values = [self._value(self.loss(scored, self.batches[index])) for index in indices]
        self.ledger.add("evidence", self.forward_cost(len(indices)))
        return values

    @staticmethod
    def _value(value: Any) -> float:
        if isinstance(value, Tensor) and value.numel() != 1:
            raise AttachError(
                f"loss(model, batch) must return one number, got a tensor of shape {tuple(value.shape)}; "
                "return the mean over the batch"
            )
        if isinstance(value, Tensor) and not value.is_complex():
            return float(value)
        if isinstance(value, (int, float, np.number)):
            return float(value)
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise AttachError(f"loss(model, batch) must return one number, got {kind}; return the mean loss alone")


@contextmanager
def _named_call(model: nn.Module, batch: Any) -> Generator[None, None, None]:
    """Say of an error in the user's code which call has met it."""
    try:
        yield
    except EsperError:
        raise
    except Exception as error:
        here = next(model.parameters()).device
        devices = sorted({str(tensor.device) for tensor in tensors_in(batch)} - {str(here)})
        moved = f"; the batch is on {', '.join(devices)}, the model on {here}: move one of them" if devices else ""
        error.add_note(f"Esper called loss(model, batch) with the first batch of evaluate={moved}")
        raise
