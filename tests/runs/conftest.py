"""Small data for the presets: images whose class shows, and a source tree of files that can be told apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest


def images(num_train: int = 400, num_test: int = 60, size: int = 8) -> dict[str, np.ndarray]:
    """Noise with a bright row at the height that the label names; four classes."""
    rng = np.random.default_rng(0)
    arrays: dict[str, np.ndarray] = {}
    for part, num in (("train", num_train), ("test", num_test)):
        labels = rng.integers(0, 4, num)
        x = rng.integers(0, 120, (num, size, size, 3), dtype=np.uint8)
        x[np.arange(num), 2 * labels] = 250
        arrays |= {f"x_{part}": x, f"y_{part}": labels}
    return arrays


@pytest.fixture(scope="session")
def image_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "small.npz"
    np.savez(path, **images())
    return path


NUM_SOURCES = 60


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """Sixty modules; module ``i`` holds the byte ``i + 1`` only, so a byte tells its file."""
    for number in range(NUM_SOURCES):
        (tmp_path / f"m{number:02d}.py").write_bytes(bytes([number + 1]) * 300)
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_bytes(bytes([255]) * 300)
    return tmp_path
