"""Kernels that are launched again by a key."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from esper.kasmina.ops import launches
from esper.kasmina.ops.launches import Launches, alignment

pytestmark = pytest.mark.unit


class Kernel:
    """Compiles to something that notes what it is called with; or, as in the interpreter, to nothing."""

    def __init__(self, *, interpreted: bool = False) -> None:
        self.interpreted = interpreted
        self.ordinary: list[tuple[Any, ...]] = []
        self.again: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launch(*args: Any, **options: Any) -> Any:
            self.ordinary.append((grid, args, options))
            return None if self.interpreted else Compiled(self)

        return launch


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, int, int]) -> Callable[..., None]:
        return lambda *args: self.kernel.again.append((grid, args))


def test_the_second_launch_of_a_key_is_the_compiled_kernels() -> None:
    kernel, known = Kernel(), Launches()
    for value in (1.5, 2.5, 3.5):
        known.launch(("one", 3), kernel, (3,), value, 16, num_warps=4)
    known.launch(("one", 4), kernel, (4,), 4.5, 16, num_warps=4)
    assert kernel.ordinary == [((3,), (1.5, 16), {"num_warps": 4}), ((4,), (4.5, 16), {"num_warps": 4})]
    assert kernel.again == [((3, 1, 1), (2.5, 16)), ((3, 1, 1), (3.5, 16))]
    assert len(known) == 2


def test_what_is_not_compiled_is_not_kept() -> None:
    kernel, known = Kernel(interpreted=True), Launches()
    for _ in range(2):
        known.launch("key", kernel, (1,), 7)
    assert len(kernel.ordinary) == 2 and not known


def test_what_is_kept_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_MOST", 2)
    kernel, known = Kernel(), Launches()
    for key in (1, 2, 3, 3, 1):
        known.launch(key, kernel, (1,), key)
    assert len(known) == 2 and [args for _, args, _ in kernel.ordinary] == [(1,), (2,), (3,), (3,)]


def test_alignment_tells_views_from_whole_tensors() -> None:
    whole = torch.zeros(64)
    base = whole.data_ptr() % 16
    assert alignment((whole, whole[1:], whole[4:])) == (base, (base + 4) % 16, base)
