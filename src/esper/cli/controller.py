"""``esper controller``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from esper.cli.command import Context, Outcome, UsageError, unknown_name
from esper.cli.parsing import JsonPath, Option
from esper.cli.terminal import columns, labelled, table, write_lines
from esper.learning.options import TrainOptions

if TYPE_CHECKING:
    from esper.learning import contest


@dataclass(frozen=True, kw_only=True)
class Controller:
    """Serve, train and compare what decides where to grow.

    serve: steer every training on a bus that was started with esper run --bus URL --controller remote.

    train: learn by PPO in an environment; the same command goes on where it was interrupted. evaluate: play episodes
    with one controller or policy. compare: several of them on the same episodes, differences paired.

    A player is a registered controller, never, random, or the folder of a policy.
    """

    word: Annotated[
        str,
        Option(
            is_positional=True, metavar="WORD", help="serve, train, evaluate or compare.",
            completes=("serve", "train", "evaluate", "compare"),
        ),
    ]  # fmt: skip
    environment: Annotated[str, Option(metavar="NAME", help="Where to learn or play.")] = "planted"
    run_dir: Annotated[
        Path, Option(metavar="DIR", help="train: where curves, checkpoints and policy go.", completes="directory")
    ] = Path("runs/controller")
    updates: Annotated[int, Option(metavar="N", help="train: updates of the policy.")] = TrainOptions.updates
    steps: Annotated[int, Option(metavar="N", help="train: decision points of an episode an update.")] = (
        TrainOptions.steps
    )
    side_by_side: Annotated[int, Option(metavar="N", help="Episodes at a time.")] = TrainOptions.episodes
    size: Annotated[str, Option(metavar="{small,plan}", help="train: of the network.", completes=("small", "plan"))] = (
        TrainOptions.size
    )
    lr: Annotated[float, Option(metavar="X", help="train: learning rate at first.")] = TrainOptions.lr
    clone: Annotated[
        str | None, Option(metavar="NAME", help="train: begin by imitating this controller.", default="nobody")
    ] = None
    checkpoint_every: Annotated[int, Option(metavar="N", help="train: updates between checkpoints.")] = (
        TrainOptions.checkpoint_every
    )
    workers: Annotated[
        int, Option(metavar="N", help="train: parts that the episodes are dealt to, each with its own random stream.")
    ] = TrainOptions.workers
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS", help="train: run the parts in a Ray cluster: HOST:PORT, auto, or local.",
            default="in this process",
        ),
    ] = None  # fmt: skip
    fresh: Annotated[bool, Option(help="train: forget an earlier training in that folder.", default="no")] = False
    players: Annotated[
        tuple[str, ...],
        Option(metavar="PLAYER", help="evaluate, compare: who plays.", default="never random heuristic"),
    ] = ("never", "random", "heuristic")
    episodes: Annotated[int, Option(metavar="N", help="Episodes to score each player on.")] = 200
    sampled: Annotated[bool, Option(help="Policies draw their actions instead of the likeliest.", default="no")] = False
    seed: Annotated[int, Option(metavar="N", help="Of everything that is drawn.")] = 0
    bus: Annotated[str, Option(metavar="URL", help="serve: over which bus.")] = "redis://localhost:6379"
    controller: Annotated[str, Option(metavar="NAME", help="serve: who decides.")] = "heuristic"
    temper: Annotated[
        str | None,
        Option(
            metavar="NAME", help="serve: conservative, balanced, aggressive or exploratory.", default="balanced",
            completes=("conservative", "balanced", "aggressive", "exploratory"),
        ),
    ] = None  # fmt: skip
    settings: Annotated[
        tuple[str, ...],
        Option(metavar="NAME=VALUE", name="--set", help="serve: settings of the controller: tamiyo.last_share=0.6."),
    ] = ()
    seconds: Annotated[float | None, Option(metavar="S", help="serve: end after so long.", default="never")] = None
    unsigned: Annotated[bool, Option(help="serve: without ESPER_BUS_KEY.", default="no")] = False
    json: JsonPath = None

    def execute(self, context: Context) -> Outcome:
        """Do what the word says."""
        if self.word not in WORDS:
            raise unknown_name("word", self.word, WORDS)
        return WORDS[self.word](self, context)


def _check_counts(command: Controller) -> None:
    """Refuse counts by the names that they have here."""
    for option, number in (("--side-by-side", command.side_by_side), ("--episodes", command.episodes)):
        if number < 1:
            raise UsageError(f"{option} must be at least 1, got {number}; leave it out for the default")


def _train(command: Controller, context: Context) -> Outcome:
    _check_counts(command)
    options = TrainOptions(
        environment=command.environment, run_dir=command.run_dir, updates=command.updates, steps=command.steps,
        episodes=command.side_by_side, size=command.size, seed=command.seed, lr=command.lr, clone=command.clone,
        checkpoint_every=command.checkpoint_every, fresh=command.fresh, test_episodes=command.episodes,
        workers=command.workers, ray=command.ray,
    )  # fmt: skip
    from esper.learning.job import train  # imports torch
    from esper.runs.interrupt import obey, remembered

    def tell(line: dict[str, Any]) -> None:
        obey()
        earned = "-" if line["mean_return"] is None else f"{line['mean_return']:.4f}"
        write_lines([f"update {line['update']}: {line['episodes']:,} episodes, return {earned}"], sys.stderr)

    with remembered():
        context.run_dir, context.goes_on_by = command.run_dir, "the same command goes on from its last checkpoint"
        result = train(options, tell)
    _draw_curves(options.run_dir)
    best = "" if result["best"] is None else f"; the best possible is {result['best']:.4f}"
    lines = [
        labelled("trained", f"{result['updates']} updates, {result['episodes']:,} episodes"),
        labelled("scores", ", ".join(f"{mode} {score:.4f}" for mode, score in result["scores"].items()) + best),
        *(labelled("problem", text) for text in result["problems"]),
        labelled("policy", result["policy"]),
        labelled("curves", str(options.run_dir / "curves.html")),
        labelled(
            "next", f"esper controller compare --environment {options.environment} "
            f"--players {result['policy']} heuristic never random",
        ),
    ]  # fmt: skip
    return Outcome(result=result, lines=lines)


def _draw_curves(folder: Path) -> None:
    """What ``curves.jsonl`` holds, as a page."""
    from esper.files import replace_text
    from esper.observe.report.training import training_page

    lines = [json.loads(line) for line in (folder / "curves.jsonl").read_text(encoding="utf-8").splitlines()]
    replace_text(folder / "curves.html", training_page(lines, f"training in {folder}"))


def _serve(command: Controller, context: Context) -> Outcome:
    from esper.cli.serving import controller_config, serve  # imports torch

    if command.seconds is not None and not 0 < command.seconds < float("inf"):
        raise UsageError(f"--seconds must be above 0, got {command.seconds:g}; leave it out for no end")
    config = controller_config(command.temper, command.settings)
    return serve(command.bus, command.controller, config, command.seconds, unsigned=command.unsigned)


def _evaluate(command: Controller, context: Context) -> Outcome:
    if len(command.players) != 1:
        raise UsageError(f"evaluate takes one player, got {len(command.players)}; say: --players heuristic")
    return _compare(command, context)


def _compare(command: Controller, context: Context) -> Outcome:
    from esper.learning import contest  # imports torch
    from esper.learning.environment import make_environment
    from esper.tamiyo.neural.threads import one_thread

    _check_counts(command)
    environment = make_environment(command.environment, command.side_by_side)
    players = {name: _player(name, sampled=command.sampled) for name in command.players}
    with one_thread():
        entries = contest.contest(environment, players, command.episodes, seed=command.seed)
    result = {"environment": command.environment, "seed": command.seed}
    result |= contest.summary(entries, environment.best)
    return Outcome(result=result, lines=_contest_lines(result))


def _player(name: str, *, sampled: bool) -> contest.Player:
    """A policy's folder, or a name."""
    from esper.learning import contest
    from esper.tamiyo.neural import policy_file

    folder = Path(name)
    if (folder / policy_file.CARD).is_file():
        return contest.Following(policy_file.load(name)[0], sampled=sampled)
    if folder.exists() or len(folder.parts) > 1:
        inside = folder / "policy"
        there = f"name {str(inside)!r}" if (inside / policy_file.CARD).is_file() else "esper controller train makes one"
        raise UsageError(
            f"a player is a controller's name or the folder of a policy, got {name!r} without a "
            f"{policy_file.CARD} in it; {there}"
        )
    return contest.named(name)


def _contest_lines(result: dict[str, Any]) -> list[str]:
    first = next(iter(result["players"]))
    differences = result[f"{first}_minus"]
    rows = [
        [name, *_shown(found), *(_shown(differences[name]) if name in differences else ["", ""] if differences else [])]
        for name, found in result["players"].items()
    ]
    head = ["player", "return", "95%", *([f"{first} minus it", "95%"] if differences else [])]
    lines = table(head, rows, width=columns(sys.stdout), numbers=(1, 3) if differences else (1,))
    best = [] if result["best"] is None else [labelled("best", f"{result['best']:.4f} is the most there is")]
    return [*lines, labelled("episodes", f"{result['episodes']} each, the same for all"), *best]


def _shown(found: dict[str, float]) -> list[str]:
    return [f"{found['mean']:.4f}", f"{found['low']:.4f} to {found['high']:.4f}"]


WORDS: dict[str, Callable[[Controller, Context], Outcome]] = {
    "serve": _serve,
    "train": _train,
    "evaluate": _evaluate,
    "compare": _compare,
}
"""What ``esper controller`` can do; each is given the whole command."""
