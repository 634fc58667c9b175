"""The growth benchmark protocol: does growing pay on a task, against controls of every kind, everything counted?

What holds for every task:

- Arms are paired by seed: the same data, the same order of batches, the same number of optimizer steps.
- Every arm has a learning-rate grid of its own. The rate is chosen on the first seed and held-out loss; while the best
  lies at an end of the grid, the grid is extended by a factor of 1.5 on that side. A training that diverged is worse
  than any other.
- What a control takes from growth (final shape, FLOPs, schedule) comes from the grown training of the same seed.
- A finished training is one JSON file in the folder of cells. Its test score is computed at its end and kept *sealed*:
  no choice is made by it, and only the summary opens it, for the chosen rates alone.

::

    task ──> Plan ──ready()──> Cell ──train──> Record ──> CellStore (one file each)
              ^                                             │
              └───────────── read(), without scores ────────┤
                                                            └─ unseal(), chosen rates ──> summary
"""

from benchmarks.training.protocol.arms import ARMS, Arm, Result, register_arm
from benchmarks.training.protocol.cells import Cell, CellStore, Outcome, Record
from benchmarks.training.protocol.command import command
from benchmarks.training.protocol.plan import Plan
from benchmarks.training.protocol.runner import run
from benchmarks.training.protocol.summary import summarise
from benchmarks.training.protocol.task import TASKS, Source, Task, register_task

__all__ = [
    "ARMS",
    "TASKS",
    "Arm",
    "Cell",
    "CellStore",
    "Outcome",
    "Plan",
    "Record",
    "Result",
    "Source",
    "Task",
    "command",
    "register_arm",
    "register_task",
    "run",
    "summarise",
]
