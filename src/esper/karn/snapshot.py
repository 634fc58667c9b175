"""What Karn knew at one moment, as one file: a run draws its proposals from that, whatever others file meanwhile."""

from __future__ import annotations

import hashlib
from pathlib import Path

import msgspec

from esper.errors import StateError
from esper.files import replace_file
from esper.karn.database import Database
from esper.karn.design import DESIGN_VERSION, Design
from esper.karn.report import REPORT_VERSION, FieldReport

SNAPSHOT_VERSION = 1

SHIPPED = Path(__file__).parent / "shipped.json"
"""Experience that comes with Esper: cohorts on small fully connected hosts (``benchmarks/controller/ship.py``)."""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Reports by id and designs by name; also the form in which they are exported."""

    v: int = SNAPSHOT_VERSION
    reports: tuple[FieldReport, ...] = ()
    designs: tuple[Design, ...] = ()

    @classmethod
    def of(cls, database: Database) -> Snapshot:
        """All that a database holds now."""
        return cls(reports=tuple(database.reports()), designs=tuple(database.designs()))

    def encoded(self) -> bytes:
        """JSON; the same content gives the same bytes."""
        ordered = msgspec.structs.replace(
            self, reports=tuple(sorted(self.reports, key=lambda r: r.id)),
            designs=tuple(sorted(self.designs, key=lambda d: d.name)),
        )  # fmt: skip
        return msgspec.json.encode(ordered) + b"\n"

    @property
    def digest(self) -> str:
        """SHA-256 of :meth:`encoded`."""
        return hashlib.sha256(self.encoded()).hexdigest()

    def write(self, path: Path) -> None:
        """Write it so that a reader never sees half of it."""
        content = self.encoded()
        replace_file(path, lambda temporary: temporary.write_bytes(content))


def read_snapshot(path: Path) -> Snapshot:
    """Read what :meth:`Snapshot.write` has written.

    Raises
    ------
    StateError
        There is none, it is damaged, or a newer Esper has written it.
    """
    try:
        content = path.read_bytes()
        snapshot = msgspec.json.decode(content, type=Snapshot)
        written = msgspec.json.decode(content, type=dict[str, msgspec.Raw])
    except FileNotFoundError as error:
        raise StateError(f"an export of Karn is a file, got none at {str(path)!r}; check the path") from error
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StateError(f"{str(path)!r} must be an export of Karn, got: {error}; export it again") from error
    newest = [
        ("export", snapshot.v, SNAPSHOT_VERSION), *(("report", r.v, REPORT_VERSION) for r in snapshot.reports),
        *(("design", d.v, DESIGN_VERSION) for d in snapshot.designs),
    ]  # fmt: skip
    for what, version, known in newest:
        if version > known:
            raise StateError(f"this Esper reads a Karn {what} up to version {known}, got {version}; update esper-morph")
    missing = [name for name in Snapshot.__struct_fields__ if name not in written]
    if missing:  # all have defaults, so any object would do
        raise StateError(
            f"{str(path)!r} must be an export of Karn, got JSON without {', '.join(missing)}; name what esper karn "
            "export wrote"
        )
    return snapshot
