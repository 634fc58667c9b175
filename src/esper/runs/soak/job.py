"""The soak: hosts of three families in turn and one that stays, sampled as they go, over as many sittings as needed."""

from __future__ import annotations

import gc
import os
import tempfile
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import torch

from esper.errors import ConfigError, DataError
from esper.runs.soak.life import FAMILIES, LONGEST, Counts, Life, usable_faults
from esper.runs.soak.options import SoakOptions
from esper.runs.soak.resources import Resources
from esper.runs.soak.summary import Sample, summarise
from esper.runs.trials.job import one_thread

EPISODE = 50
"""Steps of a host before the next one's turn."""
VETERAN = "veteran"
"""The host that stays for the whole sitting, of the first family: what a grower gathers over thousands of cohorts shows
in it. It asks for evidence, for a host that keeps everything soon has grown too large."""
SAMPLE_S = 5.0

_now = time.monotonic  # as it is before any fault of the clock
_DECODER = msgspec.json.Decoder(Sample)

OnSample = Callable[[Sample], None]


def execute(options: SoakOptions, on_sample: OnSample) -> dict[str, Any]:
    """Train until the end that was asked for; returns the summary of all sittings.

    Raises
    ------
    ConfigError
        The device is not there, or the folder cannot be made.
    DataError
        Earlier samples cannot be read.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if options.device == "auto" else options.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' needs a GPU that PyTorch can see, got none; use --device cpu")
    path = options.run_dir / "samples.jsonl"
    try:
        options.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"the folder {str(options.run_dir)!r} cannot be made ({error}); use --run-dir") from error
    if options.fresh and path.exists():
        path.unlink()
    last = next(reversed(read_samples(path)), None)
    with one_thread(), own_temporary_folder(options.run_dir) as temporary:
        sitting = _Sitting(options, last, path, temporary, torch.device(device), on_sample)
        try:
            sitting.run()
        finally:
            sitting.close()
    return summarise(read_samples(path), device)


class _Sitting:
    """One process's share of a soak. It keeps no sample: what it holds would show in them.

    Parameters
    ----------
    last:
        The newest sample of earlier sittings.
    """

    def __init__(
        self, options: SoakOptions, last: Sample | None, path: Path, temporary: Path, device: torch.device,
        on_sample: OnSample,
    ) -> None:  # fmt: skip
        self.options, self.path, self.temporary = options, path, temporary
        self.device, self.on_sample = device, on_sample
        self.counts = Counts() if last is None else last.restored()
        self.number = 1 if last is None else last.sitting + 1
        self.began = self.sampled = _now()
        self.begun_steps = sum(self.counts.steps.values())
        self.faults = usable_faults() if options.faults else ()
        self.lives: dict[str, Life] = {}
        self.stream: int | None = None

    def run(self) -> None:
        while not self._is_over():
            for place in (*FAMILIES, VETERAN):
                life = self.lives.get(place) or self._begin(place)
                if not life.train(EPISODE):
                    self.lives.pop(place).close()
                    del life
                    gc.collect()  # hosts and growers refer to each other
            if _now() - self.sampled >= SAMPLE_S:
                self._sample()

    def close(self) -> None:
        """The last sample is taken while the hosts are still there."""
        try:
            self._sample()
        finally:
            for life in self.lives.values():
                life.close()
            if self.stream is not None:
                os.close(self.stream)

    def _begin(self, place: str) -> Life:
        stays, families = place == VETERAN, list(FAMILIES)
        family = families[0] if stays else place
        number = self.options.seed + self.counts.lives * len(FAMILIES) + families.index(family)
        self.lives[place] = Life(
            number | 1 if stays else number, family, self.counts, self.device, faults=self.faults,
            longest=None if stays else LONGEST,
        )  # fmt: skip
        return self.lives[place]

    def _is_over(self) -> bool:
        hours, steps = self.options.hours, self.options.steps
        if steps is not None and sum(self.counts.steps.values()) >= steps:
            return True
        return hours is not None and (_now() - self.began) / 3600 >= hours

    def _sample(self) -> None:
        now = _now()
        self.sampled = now
        sample = Sample.of(
            self.counts, sitting=self.number, hours=(now - self.began) / 3600,
            sitting_steps=sum(self.counts.steps.values()) - self.begun_steps,
            grown=sum(life.grower.kasmina.params for life in self.lives.values()),
            resources=Resources.now(self.temporary),
        )  # fmt: skip
        if self.stream is None:
            self.stream = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        os.write(self.stream, msgspec.json.encode(sample) + b"\n")
        self.on_sample(sample)


def read_samples(path: Path) -> list[Sample]:
    """All whole lines; a killed writer's last one is cut off."""
    if not path.exists():
        return []
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        os.truncate(path, len(whole))
    try:
        return [_DECODER.decode(line) for line in whole.splitlines()]
    except msgspec.DecodeError as error:
        raise DataError(f"{path} holds something that is not a sample ({error}); use --fresh") from error


@contextmanager
def own_temporary_folder(run_dir: Path) -> Generator[Path]:
    """Whatever this process makes of temporary files lies in one folder, where it can be counted."""
    before = tempfile.tempdir
    with tempfile.TemporaryDirectory(prefix="tmp-", dir=run_dir) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = before
