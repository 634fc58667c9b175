"""What the documentation says is so: its Python runs, its links and pictures hold, its tables are current."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from esper.cli.entry import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PICTURES = sorted((ROOT / "docs" / "pictures").glob("*.svg"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
RunPython = Callable[..., "subprocess.CompletedProcess[str]"]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def python_blocks(page: Path) -> str:
    """All Python of a page, at the lines where it stands, so that a traceback names them."""
    lines: list[str] = []
    inside = False
    for line in page.read_text(encoding="utf-8").splitlines():
        fence = line.startswith("```")
        lines.append(line if inside and not fence else "")
        inside = line.rstrip() == "```python" if fence else inside
    return "\n".join(lines)


def run_page(page: Path) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile(python_blocks(page), name_of(page), "exec"), namespace)
    return namespace


def script(name: str) -> ModuleType:
    """A generator of docs/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------------------
# Code


@pytest.mark.e2e
def test_the_readme_example_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    after = run_page(ROOT / "README.md")
    plain, host = after["plain"], after["model"]
    assert isinstance(plain, nn.Sequential)
    assert plain[0].out_features > host[0].out_features == 8
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())


@pytest.mark.integration
@pytest.mark.usefixtures("own_registries")
@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name != "README.md" and python_blocks(page).strip()], ids=name_of
)
def test_every_python_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run_page(page)


@pytest.mark.e2e
@pytest.mark.parametrize("example", EXAMPLES, ids=name_of)
def test_every_example_runs_without_a_warning(example: Path, run_python: RunPython) -> None:
    code = (
        "import runpy, sys, warnings; warnings.simplefilter('error'); runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    ended = run_python(code, str(example), OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    assert ended.returncode == 0, ended.stderr
    assert "stopped: " in ended.stdout, "growth says why it ended"


# ----------------------------------------------------------------------------------------------------------------------
# Links, commands, pictures


@pytest.mark.unit
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        place, _, anchor = target.partition("#")
        if "://" in place:
            continue
        found = (page.parent / place).resolve() if place else page
        assert found.exists(), f"{name_of(page)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", found.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.unit
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_named_files_exist(page: Path) -> None:
    for place in re.findall(r"`((?:src|tests|benchmarks|docs|examples)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / place).exists(), f"{name_of(page)} names {place}"


@pytest.mark.unit
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = set(re.findall(r"`esper ([a-z]+)", text)) | set(re.findall(r"^esper ([a-z]+)", text, re.MULTILINE))
    assert named <= set(COMMANDS)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)


@pytest.mark.unit
def test_there_are_pictures_and_each_is_shown() -> None:
    shown = {target for page in PAGES for target in re.findall(r"pictures/([\w-]+\.svg)", page.read_text("utf-8"))}
    assert shown == {picture.name for picture in PICTURES}


@pytest.mark.unit
@pytest.mark.parametrize("picture", PICTURES, ids=name_of)
def test_pictures_stand_alone(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    title = root.find("{http://www.w3.org/2000/svg}title")
    assert title is not None and title.text, "read out to those who cannot see it"
    assert "prefers-color-scheme: dark" in text
    for outside in ("href=", "url(http", "@import", "<script", "<image"):
        assert outside not in text


# ----------------------------------------------------------------------------------------------------------------------
# Generated parts


@pytest.mark.unit
def test_the_configuration_page_is_current() -> None:
    generator = script("generate_configuration")
    wanted = generator.render(generator.SOURCE.read_text(encoding="utf-8"))
    assert generator.TARGET.read_text(encoding="utf-8") == wanted, "run: python docs/generate_configuration.py"


@pytest.mark.unit
def test_every_setting_is_explained() -> None:
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    unexplained = [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not unexplained, "give the field a docstring in src/esper/config.py"


@pytest.mark.unit
def test_tables_show_the_committed_results() -> None:
    generator = script("generate_results")
    for page, wanted in generator.pages().items():
        assert page.read_text(encoding="utf-8") == wanted, f"{name_of(page)}: run python docs/generate_results.py"


@pytest.mark.unit
def test_the_page_on_speed_shows_the_committed_measurements() -> None:
    generator = script("generate_speed")
    made = generator.pages()
    for page, wanted in made.items():
        assert page.read_text(encoding="utf-8") == wanted, f"{name_of(page)}: run python docs/generate_speed.py"
    assert generator.stale(list(made)) == []


@pytest.mark.unit
def test_what_is_not_measured_yet_is_said_to_be(tmp_path: Path) -> None:
    generator = script("generate_speed")
    (empty,) = generator.pages(tmp_path).values()  # no picture without points
    table = empty.split("## Bars")[1].split("## Roofline")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert len(rows) >= 18 and all(generator.NOT_YET in row for row in rows)


@pytest.mark.unit
def test_a_missed_bar_is_on_the_page_as_well_as_one_that_is_met(tmp_path: Path) -> None:
    generator = script("generate_speed")
    line = {"host": "gpt2", "phase": "default", "added_share": 0.004, "added_quartiles": [0.001, 0.006]}
    lines = [line, line | {"phase": "every_step", "added_share": 0.02}]
    facts = {"torch": "2", "triton": None, "python": "3", "device": "H100", "command": "esper bench step --out x"}
    (tmp_path / "step_gpu.json").write_text(json.dumps(facts | {"rows": lines}))
    page = generator.page(generator.Results.read(tmp_path))
    assert "the same at the default interval | +0.5% | +0.4%, quartiles +0.1% to +0.6% | yes |" in page
    assert "telemetry every step | +1.5% | +2.0%, quartiles +0.1% to +0.6% | **no** |" in page


@pytest.mark.unit
def test_the_tables_of_trials_show_the_committed_results() -> None:
    generator = script("generate_trials")
    page = generator.PAGE.read_text(encoding="utf-8")
    assert page == generator.render(page), "run python docs/generate_trials.py"


@pytest.mark.unit
def test_a_table_replaces_the_one_before_and_nothing_else() -> None:
    generator = script("generate_results")
    page = "above\n<!-- x:begin -->\nold\n<!-- x:end -->\nbelow"
    once = generator._insert(page, "x", "new")
    assert once == "above\n<!-- x:begin -->\nnew\n<!-- x:end -->\nbelow"
    assert generator._insert(once, "x", "new") == once


@pytest.mark.unit
def test_the_overview_marks_what_the_interval_settles_and_says_what_diverged() -> None:
    generator = script("generate_results")

    def difference(score: float | None, low: float | None, high: float | None) -> str:
        return generator._difference({"score": score, "score_interval": [low, high], "flops_ratio": 2.345})

    assert generator._difference(None) == ""
    assert difference(0.02, 0.01, 0.03) == "**+0.020** at 2.3x"
    assert difference(-0.02, -0.03, -0.01) == "**-0.020** at 2.3x"
    assert difference(0.02, -0.01, 0.05) == difference(0.02, None, None) == "+0.020 at 2.3x"
    assert difference(None, None, None) == "diverged"


@pytest.mark.unit
def test_a_picture_leaves_marks_in_place_and_names_what_it_cannot_draw() -> None:
    generator = script("generate_results")
    arm = {"score": 0.5, "score_interval": [0.4, 0.6], "flops": 1e9, "title": "x"}
    arms = {"grown": arm, "static_final": arm, "static_small": arm | {"score": 0.1, "score_interval": [0.0, 0.2]}}
    arms["always"] = arm | {"score": None, "score_interval": [None, None]}
    text = generator._picture("t", {"title": "T < U", "score_name": "accuracy", "arms": arms})
    root = ET.fromstring(text)
    name = "{http://www.w3.org/2000/svg}"
    dots = [(dot.get("cx"), dot.get("cy")) for dot in root.iter(f"{name}circle")]
    assert len(dots) == 3 and dots[1] == dots[2] != dots[0], "what costs and scores the same lies on one spot"
    spots = {(t.get("x"), t.get("y")) for t in root.iter(f"{name}text") if t.get("class") == "num"}
    assert len(spots) == 3, "their numbers do not"
    words = [t.text for t in root.iter(f"{name}text")]
    assert "3  small, no growth (0.100)" in words and "4  grown, every cohort kept (diverged)" in words


def contrast(mean: float, low: float, high: float) -> dict[str, Any]:
    return {"score": mean, "score_interval": [low, high]}


def bars(results: dict[str, Any], folder: Path) -> dict[str, tuple[str, str]]:
    """What was measured and whether it is enough, by bar."""
    lines = script("growth_bars").table(results, folder).splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {bar: (measured, met) for bar, measured, met in rows}


@pytest.mark.unit
def test_bars_of_growing_that_nothing_was_measured_for(tmp_path: Path) -> None:
    found = bars({}, tmp_path)
    assert len(found) >= 13 and set(found.values()) == {("", "not measured")}


@pytest.mark.unit
def test_bars_of_growing_are_met_or_missed_by_their_intervals(tmp_path: Path) -> None:
    tasks = script("growth_bars").TASKS
    good, level, bad = contrast(0.02, 0.01, 0.03), contrast(0.0, -0.01, 0.01), contrast(-0.02, -0.03, -0.01)
    peers = ("gromo_tiny_equal_flops", "gromo_gradmax_equal_flops")

    def met(word: str, *tables: dict[str, Any]) -> str:
        results = {task: {"grown_minus": tables[n % len(tables)], "arms": {}} for n, task in enumerate(tasks)}
        return next(value[1] for bar, value in bars(results, tmp_path).items() if word in bar)

    assert met("never below", {"static_equal_flops": level}) == "yes"
    assert met("never below", {"static_equal_flops": level}, {}).startswith("so far; not measured: ")
    assert met("never below", {"static_equal_flops": good}, {"static_equal_flops": bad}) == "**no**"
    assert met("above TINY", dict.fromkeys(peers, good)) == "yes"
    assert met("above TINY", dict.fromkeys(peers, good), dict.fromkeys(peers, level)) == "yes"  # 5 of 9
    assert met("above TINY", dict.fromkeys(peers, level), dict.fromkeys(peers, good)) == "**no**"  # 4 of 9
    assert met("above TINY", {peers[0]: good, peers[1]: level}) == "**no**"
    assert met("CIFAR-10", {"static_small": contrast(0.0, -0.001, 0.001), "static_final": bad}) == "yes"
    assert met("CIFAR-10", {"static_small": contrast(0.1, -0.002, 0.2), "static_final": good}) == "**no**"
    assert met("CIFAR-10", {"static_final": good}) == "not measured"


@pytest.mark.unit
@pytest.mark.parametrize(
    ("flops", "scores", "met"),
    [
        (75, [0.8, 0.81, 0.79], "yes"),
        (80, [0.8, 0.81, 0.79], "not measured"),
        (60, [0.7, 0.71, 0.69], "**no**"),
        (60, [0.7, 0.81, 0.79], "yes"),
    ],
)
def test_quality_counts_where_it_costs_little_enough(flops: int, scores: list[float], met: str, tmp_path: Path) -> None:
    final = {"score": 0.8, "score_per_seed": [0.8, 0.8, 0.8], "flops": 100}
    grown = {"score": sum(scores) / 3, "score_per_seed": scores, "flops": flops}
    results = {task: {"arms": {"static_final": final, "grown": grown}} for task in ("cifar10", "mnist1d", "code_lm")}
    assert next(value[1] for bar, value in bars(results, tmp_path).items() if "75%" in bar) == met


@pytest.mark.unit
def test_a_task_may_be_measured_twice_with_more_arms_on_fewer_seeds(tmp_path: Path) -> None:
    below, above = contrast(-0.2, -0.3, -0.1), contrast(0.2, 0.1, 0.3)
    results = {
        "code_lm": {"grown_minus": {"static_equal_flops": below}, "arms": {}},
        "code_lm_arms": {"grown_minus": {"static_equal_flops": above, "static_final": above}, "arms": {}},
    }
    found = bars(results, tmp_path)
    assert next(value for bar, value in found.items() if "never below" in bar)[0].startswith("below on 1 of 1")
    minus = script("growth_bars")._minus
    assert minus(results, "code_lm", "static_final") == (0.2, 0.1, 0.3) and minus(results, "code_lm", "always") is None


@pytest.mark.unit
def test_variants_are_shown_and_those_that_diverged_said_to(tmp_path: Path) -> None:
    shown = script("growth_variants")
    line = {
        "settings": [], "lr": 0.1, "held_out": [1.0, 1.2], "minus_shipped": 0.0, "minus_shipped_interval": [0.0, 0.0],
        "flops_ratio": 1.0, "germinated": 2, "accepted": 1, "fits": {"num": 0, "explained": None, "sure": 0},
    }  # fmt: skip
    worse = line | {
        "minus_shipped": 0.2,
        "minus_shipped_interval": [0.1, 0.3],
        "fits": {"num": 4, "explained": 0.05, "sure": 3},
    }
    lost = line | {"held_out": [None, 1.0], "minus_shipped": None, "minus_shipped_interval": [None, None]}
    result = {"title": "Images", "seeds": 2, "command": "run", "base": "random", "variants": {
        "random": line, "fitted": worse, "wild": lost}}  # fmt: skip
    assert len(shown.sections(tmp_path)) == 1, "no section without results"
    (tmp_path / "image_starts_x.json").write_text(json.dumps(result), encoding="utf-8")
    (tmp_path / "image_starts_y.json").write_text(json.dumps(result | {"variants": {}}), encoding="utf-8")
    _, (_, page) = shown.sections(tmp_path)
    assert "| fitted | **+0.200 (+0.100 to +0.300)** | 1.00x | 5.0% | 3 of 4 | 0.1 |" in page
    assert "| wild | diverged | 1.00x |  |  | 0.1 |" in page and page.count("**Images**") == 1
