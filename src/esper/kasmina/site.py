"""A site at run time: what its hooks do in a forward pass.

The host module keeps its parameters, keys and methods; everything grown lives here, outside the module tree. A site
that has nothing to add and nothing to record returns the host's own tensor, untouched.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from esper.errors import SiteError
from esper.kasmina.bank import Bank
from esper.kasmina.capture import Capture, Shapes
from esper.kasmina.geometry import Geometry
from esper.kasmina.growth import Growth
from esper.kasmina.isolation import in_backward, in_transform, is_batched
from esper.kasmina.recompute import as_product_reads
from esper.kasmina.telemetry import TelemetryBuffer
from esper.protocol import SiteInfo, SiteKind

SPLIT_REGIONS = "its layers and the module around them lie in different checkpoint regions (checkpoint whole modules)"


def _version(x: Tensor) -> int:
    """How often ``x`` was edited in place; constant where nobody counts (inference mode, a compiler's trace).

    An edit inside a compiled graph shows in the held-out evaluations, which run the model uncompiled.
    """
    return -1 if torch.compiler.is_compiling() or x.is_inference() else x._version


class Probe(Protocol):
    """Takes a site's place in the forward pass while evidence is gathered."""

    def leave(self, site: Site, x: Tensor, layer_input: Tensor, y: Tensor, training: bool) -> Tensor:
        """What the host goes on with."""
        ...


class Switch(Protocol):
    """Whether hooks are called at all."""

    armed: bool

    def arm(self) -> None: ...

    def disarm(self) -> None: ...


class Site(Growth):
    """One site: what has grown there, and what its hooks do.

    Attributes
    ----------
    engaged:
        Whether hooks have anything to do in this step; rewritten only between steps.
    refused:
        Why this site cannot be used after all, found at run time.
    """

    switch: Switch | None = None  # also of sites in models that were saved before there was one

    def __init__(self, info: SiteInfo, geometry: Geometry, upstream: Site | None) -> None:
        super().__init__(info, geometry, upstream)
        self._settle_kind()
        self.capture: Capture | None = None
        self.telemetry: TelemetryBuffer | None = None
        self.probe: Probe | None = None
        """Set during judgements only."""
        self.recording = True
        self.telemetry_due = False
        self.engaged = False
        self.switch = None
        """Takes hooks off their modules while no site is engaged."""
        self.ran_eagerly = False
        """Python itself has called the hooks in a training forward, not a compiled graph."""
        self.refused: str | None = None
        self.num_calls = 0
        self.num_rows = 0
        self.num_samples = 0
        self._traced: Shapes | None = None
        """What one call saw, as a compiled graph notes it: it reads no count, for each would be a guard."""
        self.shapes: Shapes | None = None
        """The latest of these."""
        self._recorder: Capture | None = None
        """The capture, while it is open."""
        self._open = not info.kind.is_span
        self._x: Tensor | None = None
        self._version = -1
        self._seen_in_forward = False

    # ---------------------------------------------------------------------------------------------- between steps

    def _settle_kind(self) -> None:
        """What forward passes ask of the kind, as plain values: a compiled graph checks an enum at each call, that it
        is the same object at all sites."""
        self._is_span, self._is_embedding = self.info.kind.is_span, self.info.kind is SiteKind.EMBEDDING_LAYER
        self._feature_axis, self._sample_axis = self.geometry.feature_axis, self.geometry.sample_axis

    def watch(self, due: bool) -> None:
        """Arm or disarm telemetry for the next step; what is added stays as it is."""
        self.telemetry_due = due and self.refused is None
        records = self.recording and (self.telemetry_due or self._recorder is not None)
        self.engaged = records or self._adds or self.probe is not None
        if self.engaged and self.switch is not None and not self.switch.armed:
            self.switch.arm()

    def refresh(self) -> None:
        """Decide whether the hooks have work in the next step."""
        super().refresh()
        self._recorder = self.capture if self.capture is not None and self.capture.open else None
        self.watch(self.telemetry_due)

    @property
    def shows_hidden(self) -> bool:
        """As in :class:`Growth`; a probe reads the annex's hidden activations too."""
        return super().shows_hidden or self.probe is not None

    def refuse(self, reason: str) -> None:
        """Give the site up. With something grafted on it this is an error: outputs would be wrong from here on."""
        if self.adds:
            raise SiteError(
                f"site {self.info.name!r} must run as it did when it was grown, but {reason}; "
                "undo the change to the model's forward pass, or remove the site's branches first"
            )
        self.refused = reason
        self.capture = self._recorder = None
        self.telemetry_due = False
        self.engaged = False

    # ---------------------------------------------------------------------------------------------- in a forward

    def open(self) -> None:
        """The enclosing module is entered."""
        self._open, self._x, self._grown = True, None, None

    def enter(self, x: Tensor) -> Tensor:
        """The head is about to run on ``x``; returns what it reads: where both would round it, head and branches share
        one rounded copy."""
        if not torch.compiler.is_compiling() and self._shares_input:  # in this order: a compiler asks for less
            x = as_product_reads(x)
        if not self._open:
            self.refuse(SPLIT_REGIONS if in_backward() else "its first layer runs outside its parent, or again")
        elif self._x is not None:
            self.refuse("its first layer runs more than once in a forward")
        else:
            self._x, self._version = x, _version(x)
        return x

    def leave(self, module: nn.Module, layer_input: Tensor, y: Tensor, *, writable: bool = False) -> Tensor | None:
        """The tail has produced ``y``; returns what the host goes on with, or ``None`` for ``y`` itself.

        ``writable``: nobody else holds ``y``, so its memory may be used.
        """
        x = self._take(layer_input)
        if x is None:
            return None
        transformed = in_transform(y)
        if transformed and is_batched(y):
            raise SiteError(
                f"a model with an attached grower must not run under vmap, got a batched tensor at site "
                f"{self.info.name!r}; export() a plain model first"
            )
        training = module.training
        if self.probe is not None:
            return self.probe.leave(self, x, layer_input, y, training)
        tapped = y
        if self.recording and not transformed and torch.is_grad_enabled() and y.requires_grad and self._is_first_look():
            tapped = self._record(x, y)
        if not self._adds:
            return None if tapped is y else tapped
        if self._only is None or torch.compiler.is_compiling():
            return self._compose(x, tapped, self._trial, training=training, writable=writable)
        out = tapped
        for bank in self._only:
            out = bank.graft(out, writable=writable or out is not tapped)
        return out

    def _take(self, layer_input: Tensor) -> Tensor | None:
        if self._is_embedding:
            return layer_input.unsqueeze(-1)  # a token id is the one feature of its row
        if not self._is_span:
            return layer_input
        x, self._x = self._x, None
        if x is None or not self._open:
            self.refuse(SPLIT_REGIONS if in_backward() else "its last layer runs first or twice")
            return None
        self._open = False
        if _version(x) != self._version:
            self.refuse("its input is edited in place before the span ends")
            return None
        return x

    def _is_first_look(self) -> bool:
        """False in a recomputation of what was seen in its forward.

        Reentrant checkpointing runs the forward without gradients: there the recomputation is all there is to see.
        """
        if in_backward():
            return not self._seen_in_forward
        self._seen_in_forward = True
        return True

    def take_counts(self, passes: int = 1) -> tuple[int, int, int]:
        """Calls, rows and samples seen since the last real step, compiled ones ``passes`` times; starts anew."""
        counts = self.num_calls, self.num_rows, self.num_samples
        if self._traced is not None:
            self.shapes, self._traced = self._traced, None
            y, axis = self.shapes.y, self._feature_axis
            rows, samples = math.prod(y) // y[axis], y[self._sample_axis] if len(y) > 1 else 1
            counts = passes, passes * rows, passes * samples
        self.num_calls = self.num_rows = self.num_samples = 0
        self._seen_in_forward, self._grown = False, None
        return counts

    def _record(self, x: Tensor, y: Tensor) -> Tensor:
        """Count and note what is due; returns what the host goes on with."""
        axis = self._feature_axis
        if torch.compiler.is_compiling():
            self._traced = Shapes(tuple(x.shape), x.dtype, tuple(y.shape), y.dtype)
        else:
            self.ran_eagerly = True
            self.num_calls += 1
            self.num_rows += y.numel() // y.shape[axis]
            self.num_samples += y.shape[self._sample_axis] if y.dim() > 1 else 1
        if self.telemetry_due and self.telemetry is not None:
            self.telemetry.record(y, axis)
        return y if self._recorder is None else self._recorder.record(self.read(x), y)

    # ---------------------------------------------------------------------------------------------- copies and state

    def state(self) -> dict[str, Any]:
        """Everything grown and recorded here, between steps; the tensors are its own, not copies.

        The generator of dropout masks is left out: each training forward seeds it from the host's random state.
        """
        return {
            "banks": {cohort: bank.state() for cohort, bank in self.banks.items()},
            "grafted": sorted(self.grafted),
            "annex": None if self.annex is None else self.annex.state(),
            "beside": [bank.state() for bank in self.beside],
            "capture": None if self.capture is None else self.capture.state(),
            "telemetry": None if self.telemetry is None else self.telemetry.state(),
            "telemetry_due": self.telemetry_due,
            "refused": self.refused,
            "counts": [self.num_calls, self.num_rows, self.num_samples],
        }

    def restore(self, state: dict[str, Any], device: torch.device) -> None:
        """Go on from what :meth:`state` has told; it takes over the tensors. Call :meth:`refresh` afterwards."""

        def bank(kept: dict[str, Any]) -> Bank:
            return Bank.of(kept, self.geometry, device)

        banks = {cohort: bank(kept) for cohort, kept in state["banks"].items()}
        self.annex = None if state["annex"] is None else bank(state["annex"])
        self.beside = [bank(kept) for kept in state["beside"]]
        self.banks.clear()
        self.banks.update(banks)
        self.grafted = set(state["grafted"])
        kept = state["capture"]
        self.capture = None if kept is None else Capture.of(kept, self.geometry, device)
        if self.telemetry is not None:
            self.telemetry.restore(state["telemetry"])
        self.telemetry_due, self.refused = state["telemetry_due"], state["refused"]
        self.num_calls, self.num_rows, self.num_samples = state["counts"]
        self.open()
        self._open = not self.info.kind.is_span

    def __getstate__(self) -> dict[str, Any]:
        """What travels with a copied or saved host: the added branches, and nothing that records."""
        state = dict(self.__dict__)
        state.update(
            banks={cohort: self.banks[cohort].frozen_copy() for cohort in self.grafted},
            grafted=set(self.grafted),
            annex=None if self.annex is None else self.annex.frozen_copy(),
            beside=[bank.frozen_copy() for bank in self.beside],
            capture=None,
            _recorder=None,
            telemetry=None,
            generator=None,
            probe=None,
            switch=None,
            recording=False,
            telemetry_due=False,
            _trial=[],
            _only=None,
            _x=None,
            _grown=None,
        )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._settle_kind()
        self.refresh()
