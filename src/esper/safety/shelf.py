"""Where one run keeps its checkpoints: a writer for each folder, opened once and held until it is let go."""

from __future__ import annotations

from pathlib import Path

from esper.safety.checkpoint import Checkpoints, Loaded, Saved, load
from esper.safety.tree import Tree

KIND = "grower"


class Shelf:
    """Folders of checkpoints of one run. Holding them keeps a second run from writing into the same."""

    def __init__(self) -> None:
        self._writers: dict[Path, Checkpoints] = {}

    def save(self, folder: str | Path, tree: Tree, *, step: int, keep: int) -> Saved:
        """Write a checkpoint; see :meth:`esper.safety.checkpoint.Checkpoints.save`."""
        path = Path(folder).absolute()
        if path not in self._writers:
            self._writers[path] = Checkpoints(path, kind=KIND, keep=keep)
        self._writers[path].keep = keep
        return self._writers[path].save(tree, step=step)

    def load(self, folder: str | Path) -> tuple[Loaded, str | None]:
        """The newest intact checkpoint, and in words which newer ones were passed over."""
        loaded = load(folder, kind=KIND)
        told = "; ".join(f"checkpoint {damage.number}: {damage.reason}" for damage in loaded.passed_over)
        if not told:
            return loaded, None
        return loaded, f"went back to checkpoint {loaded.manifest.number}, step {loaded.step}; newer ones: {told}"

    def close(self) -> None:
        """Let other runs write."""
        for writer in self._writers.values():
            writer.close()
        self._writers.clear()
