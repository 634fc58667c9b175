from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.runs.conftest import images

from esper.errors import DataError
from esper.runs.presets.vision import Vision, load_images

pytestmark = pytest.mark.component

CPU = torch.device("cpu")


def changed(**arrays: Any) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        kept = {key: value for key, value in {**images(40, 20), **arrays}.items() if value is not None}
        np.savez(folder / "x.npz", **kept)
        return folder / "x.npz"

    return write


def text(folder: Path) -> Path:
    (folder / "x.npz").write_text("not an archive", encoding="utf-8")
    return folder / "x.npz"


MISTAKES: list[tuple[Callable[[Path], Path | None], str]] = [
    (lambda folder: None, "vision needs --data FILE.npz .*, got no path; pass one"),
    (lambda folder: folder / "none.npz", "none.npz', which is not a file; check the path"),
    (lambda folder: folder, "which is not a file"),
    (text, "cannot be read .*; write it with np.savez"),
    (changed(x_train=np.array([object()])), "cannot be read"),
    (changed(x_test=None, y_test=None), "lacks x_test, y_test; save all four arrays"),
    (changed(x_train=np.zeros((40, 3), np.uint8)), r"x_train must be uint8 \(N, H, W, C\).*got uint8 \(40, 3\)"),
    (changed(x_test=np.zeros((20, 8, 8, 3))), r"x_test must be uint8.*got float64.*convert the arrays"),
    (changed(y_train=np.zeros((40, 1), np.int64)), r"with one label each in y_train \(N,\)"),
    (changed(y_test=np.zeros(19, np.int64)), r"one label each in y_test"),
]


@pytest.mark.parametrize(("make", "message"), MISTAKES)
def test_files_that_cannot_be_used(tmp_path: Path, make: Callable[[Path], Path | None], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_images(make(tmp_path))


def test_too_few_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", **images(319, 20))
    with pytest.raises(DataError, match="at least 320 training images, got 319"):
        Vision(CPU, size="cpu", data=tmp_path / "few.npz")


@pytest.fixture
def preset(image_file: Path) -> Vision:
    return Vision(CPU, size="cpu", data=image_file)


def test_a_tenth_is_held_out_in_enough_batches(preset: Vision) -> None:
    held = preset.held_out()
    assert sum(len(y) for _, y in held) == 40 and len(preset.x) == 360
    assert len(held) >= 14, "fewer batches could accept nothing"
    assert preset.num_classes == 4 and preset.spec((1,) * 6)["in_channels"] == 3


def test_parts_share_no_image(preset: Vision) -> None:
    parts = {
        "train": {image.numpy().tobytes() for image in preset.x},
        "held_out": {image.numpy().tobytes() for x, _ in preset.held_out() for image in x},
        "test": {image.numpy().tobytes() for image in preset.test_x},
    }
    assert {part: len(found) for part, found in parts.items()} == {"train": 360, "held_out": 40, "test": 60}
    assert not parts["train"] & parts["held_out"]
    assert not (parts["train"] | parts["held_out"]) & parts["test"]


def test_training_images_are_shifted_and_mirrored_copies_of_the_training_part(preset: Vision) -> None:
    x, y = preset.train_batch(0, 0)
    found = 0
    for image, label in zip(x, y, strict=True):
        same = preset.padded[preset.y == label]
        windows = same.unfold(2, 8, 1).unfold(3, 8, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        found += bool(((windows == image) | (windows == image.flip(2))).flatten(1).all(1).any())
    assert found == len(x) == 32


def test_grey_images_have_one_channel(tmp_path: Path) -> None:
    arrays = {key: value[..., 0] if key[0] == "x" else value for key, value in images().items()}
    np.savez(tmp_path / "grey.npz", **arrays)
    grey = Vision(CPU, size="cpu", data=tmp_path / "grey.npz")
    assert grey.train_batch(0, 0)[0].shape == (32, 1, 8, 8) and grey.spec((1,) * 6)["in_channels"] == 1


def test_schedule_warms_up_and_ends_near_zero(preset: Vision) -> None:
    values = [preset.schedule(step / 100) for step in range(100)]
    assert values[0] < 0.02 and max(values) == pytest.approx(1.0, abs=0.02) and 0 < values[-1] < 0.02
    assert values.index(max(values)) == 10
