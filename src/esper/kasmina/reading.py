"""What a decision point reads from the devices: one copy and one wait a device, begun before anybody waits.

Until somebody looks at a value the host goes on working, and so does the device: whatever can be prepared without the
values is prepared in between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from esper.kasmina.bank import Bank
from esper.kasmina.site import Site
from esper.kasmina.telemetry import Blocks, Readout, words_of

Words = npt.NDArray[np.int32]


class Transfer:
    """Bits on their way to the host: a device's parts become one copy, begun at once.

    Parameters
    ----------
    parts:
        By device, flat int32 tensors that lie there; they may change afterwards.

    Attributes
    ----------
    host:
        By device, the parts one after another; valid after :meth:`wait`, and nothing writes into it afterwards.
    """

    def __init__(self, parts: Mapping[torch.device, Sequence[Tensor]]) -> None:
        self.host: dict[torch.device, Words] = {}
        self._events: list[torch.cuda.Event] = []
        for device, words in parts.items():
            flat = torch.cat(list(words))
            if device.type == "cuda":
                pinned = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
                pinned.copy_(flat, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(device))
                self._events.append(event)
                self.host[device] = pinned.numpy()
            else:
                self.host[device] = flat.cpu().numpy().copy()  # of the host's memory, whatever the device is

    def wait(self) -> None:
        """Until everything has arrived; the second time there is nothing to wait for."""
        for event in self._events:
            event.synchronize()
        self._events.clear()


@dataclass(frozen=True)
class _Place:
    """Where values of one device lie, and which ones of the sequence they are."""

    device: torch.device
    start: int
    stop: int
    numbers: list[int]


class Reading:
    """Losses, flags of damage and, where wanted, all sensors.

    Parameters
    ----------
    sites:
        What could be damaged; counts of bad gradients begin anew.
    losses, window:
        Numbers, or scalars of any dtype, each wherever it lies: those since the last look, and those of the last steps.
    readout:
        The sensors to be read with them.

    Attributes
    ----------
    num_losses, has_sensors:
        What is in it, known without waiting.
    """

    def __init__(
        self,
        sites: Iterable[Site],
        losses: Sequence[Tensor | float],
        window: Sequence[Tensor | float],
        readout: Readout | None = None,
    ) -> None:
        self._parts: dict[torch.device, list[Tensor]] = {}
        self._sizes: dict[torch.device, int] = {}
        if readout is not None:
            self._parts = {device: list(words) for device, words in readout.words.items()}
            self._sizes = dict(readout.sizes)
        self._asked, flags = _ask_for_damage(sites)
        self.num_losses, self._num_window = len(losses), len(window)
        values = [*losses, *window]
        self._known = {number: value for number, value in enumerate(values) if not isinstance(value, Tensor)}
        # fp64 holds every loss as it is, whatever it was computed in
        self._losses = self._put(values, torch.float64)
        self._flags = self._put(flags, torch.int32)
        self._transfer = Transfer(self._parts)
        self._readout, self.has_sensors = readout, readout is not None
        self._blocks: Blocks = [] if readout is None else readout.blocks(self._transfer.host)
        self._parts.clear()

    @property
    def losses(self) -> list[float]:
        """Losses since the last look as fp32 numbers, oldest first."""
        with np.errstate(over="ignore"):
            return self._values()[: self.num_losses].astype(np.float32).tolist()

    @property
    def window(self) -> list[float]:
        """Losses of the last steps as they were computed, oldest first."""
        return self._values()[self.num_losses :].tolist()

    @property
    def damage(self) -> dict[int, str]:
        """Cohorts with a non-finite gradient since the last look, non-finite parameters, or non-finite activations at
        a site that they add to; what it is, by number."""
        if not self._asked:
            return {}
        found: dict[int, str] = {}
        for (number, what), is_so in zip(
            self._asked, self._taken(self._flags, len(self._asked), np.int32), strict=True
        ):
            if is_so:
                found.setdefault(number, f"a non-finite {what}")
        return found

    @property
    def blocks(self) -> Blocks:
        """What the sensors said; it is their latest from now on."""
        self._transfer.wait()
        if self._readout is not None:
            self._readout.publish(self._blocks)
        return self._blocks

    def _values(self) -> npt.NDArray[np.float64]:
        found = self._taken(self._losses, self.num_losses + self._num_window, np.float64)
        for number, value in self._known.items():
            found[number] = value
        return found

    def _put(self, values: Sequence[Tensor | float], dtype: torch.dtype) -> list[_Place]:
        """Add the tensors, scalars, to what is copied."""
        groups: dict[torch.device, dict[int, Tensor]] = {}
        for number, value in enumerate(values):
            if isinstance(value, Tensor):
                groups.setdefault(value.device, {})[number] = value
        places: list[_Place] = []
        for device, scalars in groups.items():
            words = words_of(torch.stack(list(scalars.values())).to(dtype))
            start = self._sizes.get(device, 0)
            self._sizes[device] = stop = start + words.numel()
            self._parts.setdefault(device, []).append(words)
            places.append(_Place(device, start, stop, list(scalars)))
        return places

    def _taken(self, places: Iterable[_Place], size: int, dtype: type[np.generic]) -> npt.NDArray[Any]:
        self._transfer.wait()
        found = np.empty(size, dtype)
        for place in places:
            found[place.numbers] = self._transfer.host[place.device][place.start : place.stop].view(dtype)
        return found


def _ask_for_damage(sites: Iterable[Site]) -> tuple[list[tuple[int, str]], list[Tensor]]:
    """Cohort and what of it each flag tells of; the flags, on the devices."""
    here = list(sites)
    of_banks = _bank_flags([bank for site in here for bank in site.banks.values()])
    asked: list[tuple[int, str]] = []
    flags: list[Tensor] = []
    for site in here:
        for number, bank in site.banks.items():
            asked += [(number, "gradient"), (number, "parameter")]
            flags += of_banks[id(bank)]
        if site.grafted and site.telemetry is not None:
            asked.append((max(site.grafted), f"activation at {site.info.name}"))
            flags.append(site.telemetry.is_damaged())
    return asked, flags


@torch.no_grad()
def _bank_flags(banks: Iterable[Bank]) -> dict[int, tuple[Tensor, Tensor]]:
    """By bank (its id), whether steps were refused and whether a parameter is not finite; the count begins anew."""
    by_device: dict[torch.device, list[Bank]] = {}
    for bank in banks:
        by_device.setdefault(bank.bad_steps.device, []).append(bank)
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for group in by_device.values():  # together: what is launched for each of them adds up
        bad_steps = [bank.bad_steps for bank in group]
        sums = [torch.stack([value.sum() for value in bank.params.values()]).sum() for bank in group]
        refused, broken = torch.stack(bad_steps) > 0, ~torch.isfinite(torch.stack(sums))
        flags = zip(refused.unbind(), broken.unbind(), strict=True)
        found.update(zip(map(id, group), flags, strict=True))
        torch._foreach_zero_(bad_steps)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]  one launch
    return found
