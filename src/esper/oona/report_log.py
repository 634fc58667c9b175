"""Field reports on their way out of a run: on the disk before they are sent, and each of them once.

They are made when a training is over. Until then its cohorts' fates may change: a graft can be taken back exactly.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec

from esper.errors import EnvelopeError, StateError
from esper.karn import FieldReport
from esper.oona import envelope as wire
from esper.oona.follower import Follower
from esper.oona.outbox import Draft
from esper.oona.schemas import FIELD_REPORT_SCHEMA
from esper.oona.topics import FIELD_REPORTS
from esper.safety.command_log import CommandLog, Entry


class ReportLog:
    """The reports that one link sends.

    Parameters
    ----------
    folder:
        Where the log and the place up to which it was sent are kept.
    """

    def __init__(self, folder: Path) -> None:
        self.path, self._cursor = folder / "reports.jsonl", folder / "reports.cursor"

    def write(self, reports: Iterable[FieldReport]) -> int:
        """Put reports on the disk; returns how many were new. One whose id is there already stays as it is.

        Raises
        ------
        StateError
            The log is damaged, or the disk refused.
        """
        entries = {report.id: _entry(report) for report in reports}
        if not entries:
            return 0
        try:
            with CommandLog(self.path) as log:
                return log.extend([entry for name, entry in entries.items() if name not in log])
        except StateError as error:
            raise StateError(f"field reports are written down before they are sent, got an error ({error})") from error

    def follower(self) -> Follower:
        """A reader that goes on where the last one has got to. A line that a power cut takes back after it was sent is
        written again as it was."""
        return Follower(self.path, self._cursor)


def _entry(report: FieldReport) -> Entry:
    return Entry(id=report.id, step=report.ended, payload=msgspec.to_builtins(report))


def field_report(line: bytes) -> list[Draft]:
    """A line of the log, which holds one report or several, as :class:`~esper.oona.outbox.Outbox` sends it."""
    command: Any = wire.read_json(line, dict[str, Any]).get("command")
    several = cast("list[Any]", command) if isinstance(command, list) else [command]
    try:
        return [_draft(entry["payload"]) for entry in several]
    except (KeyError, TypeError) as error:
        raise EnvelopeError(f"a line must hold field reports ({type(error).__name__}: {error})") from error


def _draft(payload: dict[str, Any]) -> Draft:
    schema = FIELD_REPORT_SCHEMA.rpartition(":")[0] + f":{payload['v']}"
    return Draft(
        topic=FIELD_REPORTS, schema=schema, kind=None, subject=f"{payload['arm']}-seed{payload['seed']}",
        data=wire.write_json(payload),
    )  # fmt: skip
