"""A bit of the newest checkpoint flips."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from esper.safety.faults.disks import newest_files, replaced_content
from esper.safety.faults.fault import FAULTS, Expectation, Fault, Moment, Strikes, Subject


@FAULTS.register("corrupt_checkpoint")
class CorruptCheckpoint(Fault):
    """Found before anything of it is used; the one before is gone on from, and that is said."""

    does = "one bit in the middle of the newest checkpoint's largest file is the other one, all else is the same"
    moment, expects = Moment.SAVING, Expectation.REPORTED
    leaves_no_trace = True

    @contextmanager
    def inject(self, subject: Subject) -> Generator[Strikes]:
        files = newest_files(subject)
        if not files:
            yield Strikes()
            return
        path = max(files, key=lambda file: file.stat().st_size)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1 << (len(content) % 8)
        with replaced_content(path, bytes(content)):
            yield Strikes(1)
