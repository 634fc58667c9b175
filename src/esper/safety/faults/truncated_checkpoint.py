"""The newest checkpoint's manifest ends in the middle."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from esper.safety.faults.disks import newest_files, replaced_content
from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject


@FAULTS.register("truncated_checkpoint")
class TruncatedCheckpoint(Fault):
    """As a disk leaves a file that has acknowledged a sync and lost the data all the same."""

    does = "the newest checkpoint's manifest ends in its middle, as after a power cut on a disk that lies"
    moment, expects = Moment.SAVING, Expectation.REPORTED
    leaves_no_trace = True

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        files = newest_files(subject)
        if not files:
            yield Strikes()
            return
        content = files[-1].read_bytes()
        with replaced_content(files[-1], content[: len(content) // 2]):
            yield Strikes(1)
