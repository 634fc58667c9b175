"""Exact snapshots in memory: copies on the CPU that the training step does not wait for, with a hash.

A snapshot is kept for as long as a cohort that was grafted after it may have to be undone.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Any

from esper.kasmina import memory
from esper.safety.tree import Tree, copy_of, digest, split

MOST_STORED_TENSORS = 6_000
"""Of snapshots in a stored state: each has its place in the manifest, whose size is bounded."""


@dataclass
class Snapshot:
    """The whole state of a run after ``step``; read :attr:`tree` and :attr:`digest` through their methods only."""

    step: int
    num_bytes: int
    _tree: Tree
    _copied: list[Any]
    """Events on CUDA streams, one a device, that tell when the copies are complete."""
    _digest: str = ""
    _worker: threading.Thread | None = field(default=None, repr=False)

    @classmethod
    def of(cls, state: Tree, step: int) -> Snapshot:
        """Begin to copy ``state``; its tensors may change again as soon as this returns (on their own streams)."""
        tree = copy_of(state, memory.to_host)
        events = memory.marks(tensor.device for tensor in split(state)[1].values())
        snapshot = cls(step, num_bytes(state), tree, events)
        snapshot._worker = threading.Thread(target=snapshot._hash, name="esper-snapshot")
        snapshot._worker.start()
        return snapshot

    def tree(self) -> Tree:
        """A copy of the state, to be given away."""
        return copy_of(self.peek())

    def peek(self) -> Tree:
        """The state itself, to be read and not to be changed."""
        self._wait()
        return self._tree

    def digest(self) -> str:
        """Hash of the state; waits until it is known."""
        assert self._worker is not None
        self._worker.join()
        return self._digest

    def _wait(self) -> None:
        for event in self._copied:
            event.synchronize()

    def _hash(self) -> None:
        self._wait()
        self._digest = digest(self._tree)


class Snapshots:
    """Snapshots by the cohort that was grafted after them, together within a bound.

    Parameters
    ----------
    max_bytes:
        Most memory all of them may take.
    max_stored:
        Most bytes of them that a stored state carries along.
    """

    def __init__(self, max_bytes: int, max_stored: int = 0) -> None:
        self.max_bytes, self.max_stored = max_bytes, max_stored
        self._by_cohort: dict[int, Snapshot] = {}

    def __len__(self) -> int:
        """Cohorts that have one."""
        return len(self._by_cohort)

    def __contains__(self, cohort: int) -> bool:
        return cohort in self._by_cohort

    @property
    def num_bytes(self) -> int:
        """Memory they take; one that several cohorts share counts once."""
        return sum(snapshot.num_bytes for snapshot in {id(s): s for s in self._by_cohort.values()}.values())

    def fits(self, state: Tree) -> bool:
        """Whether one more of ``state`` stays within the bound."""
        return self.num_bytes + num_bytes(state) <= self.max_bytes

    def put(self, snapshot: Snapshot, cohorts: list[int]) -> None:
        """Keep ``snapshot`` for these cohorts."""
        self._by_cohort.update(dict.fromkeys(cohorts, snapshot))

    def of(self, cohort: int) -> Snapshot | None:
        """The newest snapshot from before a cohort's graft."""
        return self._by_cohort.get(cohort)

    def keep_only(self, cohorts: set[int]) -> None:
        """Let go what only other cohorts needed."""
        for number in set(self._by_cohort) - cohorts:
            del self._by_cohort[number]

    def state(self) -> list[dict[str, Tree]]:
        """The newest ones that fit ``max_stored``, as a state tree; the tensors are their own, not copies.

        A process that goes on from there can take their grafts back exactly, as this one could.
        """
        distinct = {id(snapshot): snapshot for snapshot in self._by_cohort.values()}.values()
        room, tensors, told = self.max_stored, MOST_STORED_TENSORS, list[dict[str, Tree]]()
        for snapshot in sorted(distinct, key=lambda one: -one.step):
            tree = snapshot.peek()
            room, tensors = room - snapshot.num_bytes, tensors - len(split(tree)[1])
            if room < 0 or tensors < 0:
                break
            cohorts = [number for number, other in self._by_cohort.items() if other is snapshot]
            told.append({"step": snapshot.step, "cohorts": cohorts, "tree": tree})
        return told

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Go on with exactly those that :meth:`state` has told of."""
        self._by_cohort.clear()
        for kept in reversed(state):
            self.put(Snapshot.of(kept["tree"], kept["step"]), kept["cohorts"])

    @property
    def oldest_step(self) -> int | None:
        """Step of the oldest snapshot, ``None`` without one."""
        return min((snapshot.step for snapshot in self._by_cohort.values()), default=None)


def num_bytes(state: Tree) -> int:
    """Bytes of all tensors and arrays of a state tree."""
    return sum(tensor.numel() * tensor.element_size() for tensor in split(state)[1].values())
