"""Likely mistakes, from the shell and from Python: each error names the cause, the value and what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from esper import BudgetConfig, Config, EsperError, FitConfig, GraftConfig, Grower, SitesConfig, TamiyoConfig
from esper.cli import main

pytestmark = pytest.mark.integration

QUICK = ["--steps", "20", "--seeds", "1", "--lr", "1e-2", "--no-controls"]

# ----------------------------------------------------------------------------------------------------------------------
# From the shell


def images(folder: Path) -> None:
    """An archive whose images are flat and of the wrong type."""
    np.savez(
        folder / "flat.npz", x_train=np.zeros((4, 3)), y_train=np.zeros(4), x_test=np.zeros((4, 3)), y_test=[0] * 4
    )
    np.savez(folder / "partial.npz", x_train=np.zeros((4, 8, 8, 3), np.uint8))
    (folder / "text.npz").write_text("not an archive", encoding="utf-8")
    (folder / "file").touch()
    (folder / "full").mkdir()
    (folder / "full" / "events.jsonl").touch()
    (folder / "full" / "notes.txt").touch()


FROM_THE_SHELL: list[tuple[list[str], int, list[str]]] = [
    (["run", "digts"], 2, ["no preset is called 'digts'", "did you mean 'digits'?", "known: digits, code-lm, vision"]),
    (["run", "--steps", "0"], 2, ["steps must be at least", "got 0", "use"]),
    (["run", "--steps", "1e3"], 2, ["--steps: must be a whole number", "got '1e3'", "for example 600"]),
    (["run", "--seeds", "0"], 2, ["seeds must be at least 1", "got 0", "use 3"]),
    (["run", "--lr", "0"], 2, ["lr must be positive", "got (0.0,)", "use 3e-3"]),
    (["run", "--lr", "nan"], 2, ["lr must be positive", "nan", "use 3e-3"]),
    (["run", "--lr=-1e-3"], 2, ["lr must be positive", "-0.001", "use 3e-3"]),
    (["run", "--lr", "1e-3,3e-3"], 2, ["--lr: must be numbers", "'1e-3,3e-3'", "for example --lr 1e-3 3e-3"]),
    (["run", "--lr", "inf"], 2, ["lr must be positive and finite", "inf", "use 3e-3"]),
    (["run", "--lr", "-1e-3"], 2, ["lr must be positive", "-0.001", "use 3e-3"]),
    (["run", "--lr"], 2, ["missing value for argument '--lr'", "--lr RATE"]),
    (["run", "--seed", "-1"], 2, ["seed must lie between 0 and", "got -1", "use 0"]),
    (["run", "--device", "gpu"], 2, ["device must be auto, cpu or cuda", "got 'gpu'", "use auto"]),
    (["run", "--size", "big"], 2, ["--size: must be one of auto, cpu, gpu", "got 'big'", "esper run --help"]),
    (["run", "--run_dir", "x"], 2, ["unrecognized options: --run_dir", "perhaps you meant: --run-dir DIR"]),
    (["run", "--jobs", "0"], 2, ["jobs must be at least 1", "got 0", "use 1"]),
    (["run", "--control"], 2, ["--control", "--no-controls", "esper run --help"]),
    (["run", "vision"], 1, ["--data FILE.npz", "x_train, y_train, x_test, y_test"]),
    (["run", "vision", "--data", "none.npz"], 1, ["'none.npz'", "not a file", "check the path"]),
    (["run", "vision", "--data", "text.npz"], 1, ["'text.npz'", "cannot be read", "np.savez"]),
    (["run", "vision", "--data", "partial.npz"], 1, ["partial.npz", "y_train"]),
    (["run", "vision", "--data", "flat.npz"], 1, ["x_train must be uint8 (N, H, W, C)", "(4, 3)", "convert"]),
    (["run", *QUICK, "--run-dir", "full"], 2, ["must be new or empty", "'full'", "choose another --run-dir"]),
    (["run", *QUICK, "--run-dir", "file/x"], 2, ["'file/x' cannot be made", "choose another"]),
    (["run", *QUICK, "--start", "random"], 2, ["no start is called 'random'", "random_zero", "known: "]),
    (["run", *QUICK, "--controller", "heurstic"], 2, ["no controller is called 'heurstic'", "heuristic"]),
    (["run", *QUICK, "--temper", "bold"], 2, ["temper must be conservative, balanced", "got 'bold'", "use 'balanced'"]),
    (["run", *QUICK, "--growth", "0"], 2, ["growth must be positive", "got 0.0", "use None"]),
    (["run", *QUICK, "--budget-params", "10"], 2, ["at least the host's", "got 10", "raise it"]),
    (["run", "--json", "none/x.json"], 2, ["in a folder that exists", "'none/x.json'", "mkdir -p none"]),
    (["sites", "--match", "laers.*"], 2, ["'laers.*' matches none", "near: ", "list all with: esper sites"]),
    (["sites", "vision"], 1, ["--data FILE.npz", "x_train, y_train, x_test, y_test"]),
    (["report", "runs/none"], 1, ["holds events.jsonl", "'runs/none'", "esper run"]),
    (["report", "full"], 1, ["full"]),
    (["export", "full", "-o", "m"], 1, ["structure.json", "'full'", "esper run"]),
    (["export", "full"], 2, ["missing: -o OUT", "esper export --help"]),
    (["export", "full", "-o"], 2, ["missing value for argument '-o/--out'", "say: -o OUT"]),
]


@pytest.mark.parametrize(
    ("words", "status", "told"), FROM_THE_SHELL, ids=[" ".join(words) for words, _, _ in FROM_THE_SHELL]
)
def test_mistake_in_the_shell(
    words: list[str],
    status: int,
    told: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    images(tmp_path)
    if words == ["report", "full"]:
        (tmp_path / "full" / "events.jsonl").write_text("{}\n{}\n", encoding="utf-8")
    assert main(words) == status
    out, err = capsys.readouterr()
    message = err.splitlines()[-1]
    assert message.startswith(f"esper {words[0]}: ") and out == ""
    assert "Traceback" not in err and "unexpected" not in err
    missing = [text for text in told if text not in message]
    assert not missing, message
    assert not list(tmp_path.glob("runs/*")), "a refused command leaves no run directory behind"


# ----------------------------------------------------------------------------------------------------------------------
# From Python


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def batches(num: int = 14) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(5, 6, generator=generator), torch.randint(3, (5,), generator=generator)) for _ in range(num)]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def grow(model: nn.Module | None = None, *, owner: nn.Module | None = None, **arguments: Any) -> Grower:
    model = model or mlp()
    optimizer = torch.optim.SGD((owner or model).parameters(), lr=0.1)
    return Grower(model, optimizer, **{"loss": loss, "evaluate": batches(), **arguments})


def tied() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer)


def frozen() -> nn.Module:
    model = mlp()
    for layer in (model[0], model[2]):  # type: ignore[index]
        layer.requires_grad_(False)
    return model


def twice() -> Grower:
    model = mlp()
    grow(model)
    return grow(model)


def nan_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x * torch.nan, y) for x, y in batches()]


FROM_PYTHON: dict[str, tuple[Callable[[], object], list[str]]] = {
    "no place to grow": (
        lambda: grow(nn.Sequential(nn.Linear(6, 3))),
        ["at least one place", "Linear-activation-Linear"],
    ),
    "pattern without a match": (
        lambda: grow(config=Config(sites=SitesConfig(include=("layers.*",)))),
        ["'layers.*' matches none of 2 sites", "near: ", "grower.sites()"],
    ),
    "no pattern": (lambda: SitesConfig(include=()), ["at least one pattern", "got ()", "('*',)"]),
    "too many chunks": (
        lambda: grow(config=Config(sites=SitesConfig(chunks=100))),
        ["between 1 and out_features=8", "got 100", "chunks=8"],
    ),
    "frozen": (lambda: grow(frozen()), ["frozen"]),
    "attached twice": (twice, ["already"]),
    "another model's optimizer": (lambda: grow(owner=mlp()), ["must own the model's parameters", "model.parameters()"]),
    "no held-out data": (lambda: grow(evaluate=[]), ["held-out batches", "got none", "DataLoader"]),
    "too little held-out data": (
        lambda: grow(evaluate=batches(2)),
        ["at least 14 batches", "got 2", "smaller batches"],
    ),
    "held-out data yields NaN": (lambda: grow(evaluate=nan_batches()), ["finite", "got nan", "check evaluate="]),
    "a loss a row": (
        lambda: grow(loss=lambda model, batch: model(batch[0]).sum(dim=1)),
        ["must return one number", "shape (5,)", "mean"],
    ),
    "budget below the host": (
        lambda: grow(config=Config(budget=BudgetConfig(params=10))),
        ["at least the host's", "got 10", "raise it"],
    ),
    "unknown start": (
        lambda: grow(config=Config(fit=FitConfig(start="random"))),
        ["no start is called 'random'", "known: ", "random_zero"],
    ),
    "unknown strategy": (
        lambda: grow(config=Config(graft=GraftConfig(strategy="ramp"))),
        ["'ramp'", "known: ", "fixed_ramp"],
    ),
    "unknown controller": (
        lambda: grow(config=Config(tamiyo=TamiyoConfig(controller="ppo"))),
        ["no controller is called 'ppo'", "known: ", "heuristic"],
    ),
    "unknown temper": (lambda: TamiyoConfig(temper="bold"), ["must be conservative", "got 'bold'", "'balanced'"]),
    "tied": (lambda: grow(tied()), ["at least one place", "tied to 2.weight"]),
}


@pytest.mark.parametrize("name", list(FROM_PYTHON))
def test_mistake_in_python(name: str) -> None:
    make, told = FROM_PYTHON[name]
    with pytest.raises(EsperError) as caught:
        make()
    message = str(caught.value)
    missing = [text for text in told if text not in message]
    assert not missing, message


def test_the_catalogue_is_long_enough() -> None:
    assert len(FROM_THE_SHELL) + len(FROM_PYTHON) >= 30
