"""What every preset promises: batches by seed and step, parts that share nothing, a host and settings that fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from esper.errors import DataError
from esper.runs.hosts import build
from esper.runs.preset import Preset, batch_generator
from esper.runs.presets import code_lm, make_preset, preset_sites
from esper.runs.presets.code_lm import CodeLM, corpus
from esper.runs.presets.digits import Digits
from esper.runs.presets.vision import Vision

pytestmark = pytest.mark.component

CPU = torch.device("cpu")
Make = Callable[[], Preset]


@pytest.fixture(params=["digits", "code-lm", "vision"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, sources: Path, image_file: Path) -> Make:
    """The preset anew each time, code-lm on the sixty small files."""
    if request.param == "digits":
        pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")
    whole = corpus
    monkeypatch.setattr(code_lm, "corpus", lambda: whole(sources))
    return lambda: make_preset(request.param, CPU, data=image_file if request.param == "vision" else None)


def same(one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_batches_follow_from_seed_and_step(make: Make) -> None:
    preset, again = make(), make()
    torch.manual_seed(99)  # the global stream has no say
    for seed, step in ((0, 0), (0, 7), (3, 7)):
        assert same(preset.train_batch(seed, step), again.train_batch(seed, step))
    assert not same(preset.train_batch(0, 0), preset.train_batch(0, 1))
    assert not same(preset.train_batch(0, 0), preset.train_batch(1, 0))
    held, twice = preset.held_out(), again.held_out()
    assert len(held) == len(twice) >= 14 and all(map(same, held, twice))


@pytest.mark.usefixtures("unchanged_rng")
def test_no_global_stream_is_moved(make: Make) -> None:
    preset = make()
    preset.train_batch(0, 0)
    preset.held_out()


def test_host_trains_on_its_batches_and_settings_fit(make: Make) -> None:
    preset = make()
    model = build(preset.spec(preset.small_widths))
    optimizer = preset.optimizer(model, preset.lrs[0])
    loss = preset.loss(model, preset.train_batch(0, 0))
    loss.backward()
    preset.clip(model)
    optimizer.step()
    with torch.no_grad():
        score, lost = preset.test(model.eval())
    assert loss.isfinite() and score == score and lost > 0
    assert preset.config(60).total_steps == 60
    assert all(0 <= preset.schedule(step / 50) <= 1 for step in range(50))
    assert preset.describe_widths(preset.small_widths)["span 1"] == preset.small_widths[1]


def test_small_widths_are_those_of_the_sites_in_order(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = make()
    widths = tuple(width + number for number, width in enumerate(preset.small_widths))
    monkeypatch.setattr("esper.runs.presets.make_preset", lambda *_, **__: preset)
    preset.small_widths = widths
    found, _ = preset_sites(preset.name, "auto")
    assert tuple(info.hidden_features for info in found) == widths


def test_generators_of_neighbouring_runs_and_steps_differ() -> None:
    seeds = {batch_generator(seed, step).initial_seed() for seed in range(5) for step in range(2000)}
    assert len(seeds) == 10_000


def test_digits_parts_are_of_different_images() -> None:
    pytest.importorskip("sklearn", reason="the digits preset needs scikit-learn")
    preset = Digits(CPU)
    preset.x = torch.arange(len(preset.x), dtype=torch.float32)[:, None]  # each image is now its own number
    train = {int(i) for step in range(200) for i in preset.train_batch(0, step)[0]}
    held = {int(i) for x, _ in preset.held_out() for i in x}
    test: set[int] = set()

    def note(x: Tensor) -> Tensor:
        test.update(int(i) for i in x)
        return torch.zeros(len(x), 10)

    preset.test(note)  # type: ignore[arg-type]
    assert train <= set(range(1000)) and held == set(range(1000, 1400)) and test == set(range(1400, 1797))


def test_vision_scores_the_test_images_only(image_file: Path) -> None:
    preset = Vision(CPU, size="cpu", data=image_file)
    seen: list[Tensor] = []

    def note(x: Tensor) -> Tensor:
        seen.append(x)
        return torch.eye(4)[preset.test_y]

    score, loss = preset.test(note)  # type: ignore[arg-type]
    assert torch.equal(torch.cat(seen), preset.test_x)
    assert score == 1.0 and loss == pytest.approx(0.7437, abs=1e-3), "softmax of a one against three zeros"


def test_corpus_is_split_by_file(sources: Path) -> None:
    parts = corpus(sources)
    files = {part: set(data.unique().tolist()) for part, data in parts.items()}
    assert files["held_out"] == {1, 21, 41} and files["test"] == {11, 31, 51}
    assert files["train"] == set(range(1, 61)) - files["held_out"] - files["test"], "no installed package"
    assert {part: len(data) for part, data in parts.items()} == {"train": 16_200, "held_out": 900, "test": 900}


def test_too_few_source_files(tmp_path: Path) -> None:
    (tmp_path / "one.py").write_text("x = 1\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"needs the source of the standard library, got 1 \.py files"):
        corpus(tmp_path)


def test_windows_come_from_their_own_part(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = corpus(sources)
    monkeypatch.setattr(code_lm, "corpus", lambda: parts)
    preset = CodeLM(CPU, size="cpu")
    own = {part: set(data.unique().tolist()) for part, data in parts.items()}
    tokens, targets = preset.train_batch(0, 0)
    assert tokens.shape == targets.shape == (16, 64) and torch.equal(tokens[:, 1:], targets[:, :-1])
    assert {int(b) for step in range(20) for b in preset.train_batch(0, step)[0].unique()} <= own["train"]
    assert {int(b) for x, y in preset.held_out() for b in torch.cat([x, y]).unique()} <= own["held_out"]
    scored: set[int] = set()

    def note(x: Tensor) -> Tensor:
        scored.update(x.unique().tolist())
        return torch.zeros(*x.shape, 256)

    score, loss = preset.test(note)  # type: ignore[arg-type]
    assert scored <= own["test"] and loss == pytest.approx(5.545, abs=1e-3) and score == -loss
