"""What a germinated seed learns from: sampled rows of (x, y, dL/dy) copied from ordinary training steps.

Nothing here changes the host: rows are copied (the user may edit x in place), gradients are read by a read-only tensor
hook, and sampling draws from a generator of its own. Draws are made between steps, on the device: nothing in a forward
pass waits for the device, and a compiled graph holds only tensor operations.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from esper.kasmina.geometry import Geometry

Captured = tuple[Tensor, Tensor, Tensor, Tensor]
"""Rows of x, of y and of dL/dy, and the cluster of each."""


class Shapes(NamedTuple):
    """What a site has seen in one call."""

    x: tuple[int, ...]
    x_dtype: torch.dtype
    y: tuple[int, ...]
    y_dtype: torch.dtype


@dataclass
class Rows:
    """Captured rows of one site.

    For linear sites ``x (N, I)``, ``y, g (N, O)``; for convolutions images (of any dimension) ``x (N, I, *spatial)``,
    ``y, g (N, O, *spatial')``; for embeddings ``x (N, 1)`` holds token ids.
    ``cluster (N,)`` numbers the sequence or image a row came from, ``batch (N,)`` the training batch. ``g`` is scaled
    to unit root mean square within each batch, so that loss scaling and accumulation do not matter.
    """

    x: Tensor
    y: Tensor
    g: Tensor
    cluster: Tensor
    batch: Tensor

    def select(self, which: Tensor | slice) -> Rows:
        """Rows of a mask, copied; or of a slice, which shares their memory."""
        return Rows(self.x[which], self.y[which], self.g[which], self.cluster[which], self.batch[which])

    @property
    def positions(self) -> int:
        """Rows of the site's output these captures hold (every position of an image counts)."""
        return self.y.numel() // self.y.shape[1]


class Capture:
    """Collects rows of one site over several training batches, within a byte budget.

    Parameters
    ----------
    num_batches:
        Batches (calls with gradients) to record.
    rows_per_batch:
        Rows, or images for convolutions, sampled from each: one from each of as many equal shares of the batch.
    generator:
        On the CPU; the stream that rows are drawn from follows from it.
    device:
        Where the site computes.
    """

    def __init__(
        self,
        geometry: Geometry,
        *,
        num_batches: int,
        rows_per_batch: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> None:
        self.geometry = geometry
        self.num_batches = num_batches
        self.rows_per_batch = rows_per_batch
        self._device = torch.device(device)
        # plain values: of an object that forward passes look into, a compiled graph checks every part at each call
        self._by_image, self._sample_axis = geometry.kind.channels_first, geometry.sample_axis
        seed = int(torch.randint(1 << 62, (), generator=generator))
        self._generator = torch.Generator(device).manual_seed(seed)
        self._cut: tuple[int, Tensor, Tensor] | None = None
        """Rows of a call, and where the shares of as many begin and how long they are: calls are mostly alike."""
        self._places = torch.rand(rows_per_batch, generator=self._generator, dtype=torch.float64, device=device)
        self._done: list[Captured] = []
        self._slots: Captured | None = None
        self._like: Captured | None = None
        self._ran = False
        self.open = True
        """Whether forward passes record; changes between steps only, so that a compiled graph holds for all of them."""
        self.dropped_batches = 0
        self.completed_at: int | None = None
        """Real step in which the last batch came in; the rows are as old as that."""

    @property
    def filled(self) -> int:
        return len(self._done)

    @property
    def full(self) -> bool:
        return self.filled >= self.num_batches

    def state(self) -> dict[str, Any]:
        """Everything of it as a state tree; the tensors are its own, not copies."""
        return {
            "num_batches": self.num_batches,
            "rows_per_batch": self.rows_per_batch,
            "generator": self._generator.get_state(),
            "places": self._places,
            "done": [list(part) for part in self._done],
            "open": self.open,
            "dropped_batches": self.dropped_batches,
            "completed_at": self.completed_at,
        }

    @classmethod
    def of(cls, state: dict[str, Any], geometry: Geometry, device: torch.device) -> Capture:
        """The capture that :meth:`state` has told of; it takes over the tensors."""
        capture = cls(
            geometry, num_batches=state["num_batches"], rows_per_batch=state["rows_per_batch"],
            generator=torch.Generator(), device=device,
        )  # fmt: skip
        capture._generator.set_state(state["generator"].cpu())
        capture._places = state["places"].to(device)
        for x, y, g, cluster in state["done"]:
            capture._done.append((x.to(device), y.to(device), g.to(device), cluster.to(device)))
        capture.open, capture.dropped_batches = state["open"], state["dropped_batches"]
        capture.completed_at = state["completed_at"]
        return capture

    def expect(self, shapes: Shapes) -> None:
        """Make the slots of a compiled graph now, for calls like that: its first one would need a graph of its own."""
        conv = self._by_image
        total = shapes.y[0] if conv else math.prod(shapes.y[:-1])
        size, device = min(total, self.rows_per_batch), self._device
        x, y = (shape[1:] if conv else shape[-1:] for shape in (shapes.x, shapes.y))
        self._slots = (
            torch.zeros(size, *x, dtype=shapes.x_dtype, device=device),
            torch.zeros(size, *y, dtype=shapes.y_dtype, device=device),
            torch.full((size, *y), torch.nan, dtype=shapes.y_dtype, device=device),
            torch.zeros(size, dtype=torch.int64, device=device),
        )

    def after_step(self, step: int) -> bool:
        """Take what a compiled graph has left, then draw the places of the next batch's rows, or close.

        Returns whether it has closed now. Call :func:`renew` before the next forward pass.
        """
        if self._slots is not None and self._ran and not self.full:
            self._keep(self._slots)
            self._like = self._slots  # the next batch is written elsewhere, which saves copying this one
        self._ran = False
        if not self.full:
            self._places.uniform_(generator=self._generator)
        elif self.completed_at is None:
            self.completed_at, self.open = step, False
            self._slots = self._like = None
            return True
        return False

    def make_slots(self) -> Captured | None:
        """Slots of a compiled graph, nothing written to them yet, where a batch has taken those of before."""
        if self._like is None:
            return None
        x, y, _, cluster = self._like
        self._slots = torch.empty_like(x), torch.empty_like(y), torch.empty_like(y), torch.empty_like(cluster)
        self._like = None
        return self._slots

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for part in self._done for t in part)

    def record(self, x: Tensor, y: Tensor) -> Tensor:
        """Copy sampled rows of ``x`` and ``y`` now, and of ``dL/dy`` when the backward pass reaches what is returned.

        That is ``y`` itself, or the same numbers in a compiled graph: the host has to go on with them.
        """
        if not self.open or not y.requires_grad:
            return y
        conv = self._by_image
        flat_x = x.detach() if conv else x.detach().reshape(-1, x.shape[-1])
        flat_y = _rows(y.detach(), conv)
        total = flat_y.shape[0]
        first, length = self._shares(total)
        index = first + (self._places[: first.shape[0]] * length).long()
        cluster = index if conv else index // max(1, total // y.shape[0])
        if self._sample_axis == 1:  # sequence first: rows of one sample lie a batch apart
            cluster = index % y.shape[1]
        kept_x, kept_y = flat_x[index], flat_y[index]
        if torch.compiler.is_compiling():
            return self._record_compiled(y, index, (kept_x, kept_y, kept_y, cluster))

        def read(g: Tensor) -> None:
            if not self.full:
                self._keep((kept_x, kept_y, _rows(g.detach(), conv)[index], cluster))

        y.register_hook(read)
        return y

    def _shares(self, total: int) -> tuple[Tensor, Tensor]:
        """First rows and lengths of shares that have none in common, as equal as whole rows allow: no row twice.

        A compiled graph computes them in the kernel that uses them: what it is given it checks at each call.
        """
        compiling = torch.compiler.is_compiling()
        if not compiling and self._cut is not None and self._cut[0] == total:
            return self._cut[1:]
        size = min(total, self.rows_per_batch)
        number = torch.arange(size, device=self._device)
        first = number * total // size
        length = (number + 1) * total // size - first
        if not compiling:
            self._cut = total, first, length
        return first, length

    def _record_compiled(self, y: Tensor, index: Tensor, rows: Captured) -> Tensor:
        """A backward pass in a compiled graph may write to tensors that were there before it, and to nothing else.

        So each batch is written as a whole, by its backward pass, into slots that :meth:`after_step` empties; of
        several batches in one step the last is kept. The slots are made after the first call, like its rows.
        """
        slots = self._slots
        if slots is None or any(slot.shape != r.shape or slot.dtype != r.dtype for slot, r in zip(slots, rows)):  # noqa: B905  # the compiler's zip is not strict
            self._like = rows
            return y
        self._ran = True
        x_rows, y_rows, _, cluster = rows
        return _Tap.apply(y, self._by_image, index, x_rows, y_rows, cluster, *slots)  # type: ignore[reportReturnType]

    def _keep(self, captured: Captured) -> None:
        if self._done and self._done[0][0].shape[1] != captured[0].shape[1]:
            self._done.clear()  # a span before this one has grown: the site reads more features from now on
        self._done.append(captured)

    def rows(self, reads: int | None = None) -> Rows:
        """All captured rows; batches with non-finite or all-zero gradients are dropped and counted.

        ``reads`` is what a branch reads now: where an upstream span has grown since the capture, the further features
        count as zero (nothing is learnt about them).
        """
        self.dropped_batches = 0
        usable: list[tuple[int, Captured, Tensor]] = []
        for number, part in enumerate(self._done):
            size = part[2].float().square().mean().sqrt()
            finite = torch.isfinite(size) & torch.isfinite(part[0]).all() & torch.isfinite(part[1]).all()
            if not bool(finite) or float(size) == 0.0:
                self.dropped_batches += 1
                continue
            usable.append((number, part, size))
        if not usable:
            empty = torch.zeros(0)
            return Rows(empty, empty, empty, empty.long(), empty.long())
        return self._joined(usable, reads)

    def _joined(self, usable: list[tuple[int, Captured, Tensor]], reads: int | None) -> Rows:
        """The batches behind each other, each written to its place once: nothing is held twice."""
        x, y, _, _ = usable[0][1]
        total = sum(part[0].shape[0] for _, part, _ in usable)
        width = x.shape[1] if reads is None or not self.geometry.kind.is_span else max(reads, x.shape[1])
        dtype = functools.reduce(torch.promote_types, (part[0].dtype for _, part, _ in usable))
        rows = Rows(
            x.new_zeros(total, width, *x.shape[2:], dtype=dtype), y.new_empty(total, *y.shape[1:], dtype=torch.float32),
            y.new_empty(total, *y.shape[1:], dtype=torch.float32),
            *torch.empty(2, total, dtype=torch.int64, device=x.device),
        )  # fmt: skip
        at = offset = 0
        for number, (x, y, g, cluster), size in usable:
            place = slice(at, at + x.shape[0])
            rows.x[place, : x.shape[1]], rows.y[place] = x, y
            rows.g[place] = g
            rows.g[place] /= size
            rows.cluster[place], rows.batch[place] = cluster + offset, number
            offset += int(cluster.max()) + 1
            at = place.stop
        return rows


def renew(captures: Iterable[Capture]) -> None:
    """Before the next forward pass: slots for those whose last batch has taken theirs, in a few launches for all."""
    zeros: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    unwritten: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for capture in captures:
        slots = capture.make_slots()
        if slots is not None:
            for slot in slots:
                zeros.setdefault((slot.device, slot.dtype), []).append(slot)
            unwritten.setdefault((slots[2].device, slots[2].dtype), []).append(slots[2])
    for slots in zeros.values():
        torch._foreach_zero_(slots)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  one launch
    for slots in unwritten.values():  # where no backward pass comes by, the next batch will be dropped
        torch._foreach_add_(slots, math.nan)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def _rows(y: Tensor, conv: bool) -> Tensor:
    """Images stay as they are; of anything else every position is a row."""
    return y if conv else y.reshape(-1, y.shape[-1])


class _Tap(torch.autograd.Function):
    """``y``; its backward pass writes a batch into slots, in a compiled graph.

    Not a hook of the tensor: what the compiler makes of one differs from release to release (2.11 loses itself in deep
    graphs, earlier ones break them), while autograd functions are compiled alike by all.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, conv: bool, *tensors: Tensor) -> Tensor:
        ctx.conv = conv
        ctx.save_for_backward(*tensors)
        return y.clone()  # what is behind the site may edit it in place, which a view forbids; Inductor leaves it out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[reportIncompatibleMethodOverride]
        index, x_rows, y_rows, cluster, x_slot, y_slot, g_slot, cluster_slot = ctx.saved_tensors
        x_slot.copy_(x_rows)
        y_slot.copy_(y_rows)
        g_slot.copy_(_rows(g, ctx.conv)[index])
        cluster_slot.copy_(cluster)
        return g, *(None,) * 9


def rows_per_batch(
    geometry: Geometry, batch_rows: int, samples: int, *, rows: int, batches: int, max_bytes: int
) -> int:
    """Rows (images) to keep of each batch so that neither the row target nor the byte budget is exceeded.

    ``batch_rows`` counts output positions of one training batch, ``samples`` its images or sequences.
    """
    positions = max(1, batch_rows // max(1, samples)) if geometry.kind.channels_first else 1
    wanted = -(-rows // batches) // positions
    stride = geometry.head_conv.shrinkage if geometry.head_conv is not None else 1
    row_bytes = 4 * positions * (geometry.captured_features * stride + 2 * geometry.out_features)
    affordable = max_bytes // max(1, row_bytes * batches)
    available = samples if geometry.kind.channels_first else batch_rows
    return max(1, min(wanted, affordable, available))
