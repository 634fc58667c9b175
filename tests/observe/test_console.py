"""Progress lines, word for word."""

from __future__ import annotations

import io

import pytest
from tests.observe.synthetic import events

from esper import protocol as p
from esper.observe.console import Console
from esper.protocol import Lifecycle

pytestmark = pytest.mark.unit

SNAPSHOT = """\
run digits-01 | preset digits
step 0     held-out 2.291 | 20.2k params (+0%)
step 270   KEPT     layers.0-2 bottleneck x24: -0.017 +/-0.005 for 1.5k params
step 460   REJECTED layers.2-4, layers.6-8: gain not above zero (p = .41); removed
step 730   KEPT     layers.4-6 bottleneck x16: -0.014 +/-0.003 for 1k params
step 800   REJECTED layers.6-8, layers.10-12: fit predicts no gain on other batches (t = 0.4 < 2.0); removed
step 1060  ROLLED BACK layers.2-4: guard: loss 8.1 is 6.2 deviations above its trend; removed
"""


class Stream(io.StringIO):
    def __init__(self, *, terminal: bool = False) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class Clock:
    """Every look at it takes ``tick`` seconds."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def show(stream: Stream, tick: float = 0.0, stop: int | None = None, **options: object) -> str:
    console = Console(stream, Clock(tick), environ=options.pop("environ", {}), **options)  # type: ignore[arg-type]
    for event in events(seeds=1, arms=("grown", "static_small")):
        if stop is not None and event.step > stop and event.arm == "grown":
            break
        console.on_event(event)
    return stream.getvalue()


def test_to_a_file() -> None:
    assert show(Stream(), stop=1100) == SNAPSHOT


def test_what_an_interrupted_run_has_told_is_counted_and_not_told_again() -> None:
    stream = Stream()
    console = Console(stream, Clock(), environ={})
    for event in events(seeds=1, arms=("grown",)):
        if event.step > 1100:
            break
        (console.on_past if event.step <= 500 else console.on_event)(event)
    told = stream.getvalue()
    assert "step 270" not in told and "step 460" not in told and "step 730   KEPT" in told
    assert "1 kept | 1 rejected" in told.splitlines()[0], "the first sign of life counts what was decided before"


def test_the_end_of_a_run() -> None:
    tail = show(Stream()).splitlines()[-4:]
    assert tail[0].startswith("finished  grown seed 0: accuracy 0.97")
    assert tail[2].startswith("done       2.291 -> 0.3") and "; stopped: gain per cost below threshold" in tail[2]
    assert tail[3].startswith("           accuracy: grown 0.97") and "small, no growth 0.97" in tail[3]


@pytest.mark.parametrize("environ", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}, {"TERM": "dumb", "FORCE_COLOR": "1"}])
def test_no_control_characters_off_a_terminal(environ: dict[str, str]) -> None:
    text = show(Stream(), 1.0, environ=environ)
    assert all(" " <= char <= "~" or char == "\n" for char in text)


def test_dumb_terminal_gets_plain_lines() -> None:
    assert show(Stream(terminal=True), environ={"TERM": "dumb"}, stop=1100) == SNAPSHOT


def test_at_most_one_heartbeat_a_minute_in_a_file() -> None:
    console = Console(stream := Stream(), clock := Clock(), environ={})
    for step in range(600):
        clock.now = step * 1.0
        console.on_event(p.HeldOut(step=step, loss=0.5, params=100, flops=1.0))
    assert stream.getvalue().count("held-out") == 10


def test_live_line_fits_sixty_columns_and_decisions_stay() -> None:
    text = show(Stream(terminal=True), 1.0, environ={"NO_COLOR": "1"}, width=60)
    assert "\r\x1b[2K" in text and "\x1b[1;" not in text
    for chunk in text.replace("\r\x1b[2K", "\n").split("\n"):
        assert len(chunk) < 60, chunk
    assert "KEPT     layers.0-2" in text


def test_color_on_a_terminal_or_when_forced() -> None:
    assert "\x1b[1;32mKEPT\x1b[0m" in show(Stream(terminal=True), width=100)
    forced = show(Stream(), environ={"FORCE_COLOR": "1"})
    assert "\x1b[1;33mREJECTED\x1b[0m" in forced and "\r" not in forced
    assert "\x1b" not in show(Stream(), environ={"FORCE_COLOR": "1", "NO_COLOR": "1"})


def test_only_rank_zero_speaks() -> None:
    assert show(Stream(), rank=1) == "" and show(Stream(), environ={"RANK": "3"}) == ""
    assert show(Stream(), environ={"RANK": "3"}, rank=0) != ""


def test_hostile_and_foreign_names_are_spelt_out() -> None:
    console = Console(stream := Stream(), Clock(), environ={})
    console.on_event(p.Warned(step=1, message="caf\u00e9 \x1b[31m red\r\nnext"))
    assert stream.getvalue() == "step 1     warning: caf\\xe9 \\x1b[31m red\\r\\nnext\n"


def test_a_refusal_repeated_is_said_once_and_other_arms_are_named() -> None:
    console = Console(stream := Stream(), Clock(), environ={})
    for step in (1, 2, 3):
        console.on_event(p.Refused(step=step, arm="random_growth", seed=2, command="cull", gate="state", reason="no"))
    assert stream.getvalue() == "[random_growth 2] step 1     refused cull (state): no\n"


def test_a_reader_that_went_away_does_not_end_training() -> None:
    class Gone(Stream):
        def write(self, text: str) -> int:
            raise BrokenPipeError(32, "Broken pipe")

    console = Console(Gone(), Clock(), environ={})
    console.on_event(p.Warned(step=1, message="x"))
    closed = Stream()
    console = Console(closed, Clock(), environ={})
    closed.close()
    console.on_event(p.Warned(step=1, message="x"))
    assert closed.closed, "a closed stream is not opened again"


def test_part_of_a_cohort_names_its_own_sites() -> None:
    console = Console(stream := Stream(), Clock(), environ={})
    console.on_event(p.Germinated(
        step=1, cohort=0, seeds=(1, 2), sites=("a", "b"), blueprints=("bottleneck", "low_rank"),
        starts=("copy", "copy"), widths=(4, 8), added_params=10, reason="",
    ))  # fmt: skip
    console.on_event(p.Transitioned(
        step=2, cohort=0, seeds=(2,), source=Lifecycle.TRAINING, target=Lifecycle.CANCELLED, alpha=0.0, reason="asked",
    ))  # fmt: skip
    assert stream.getvalue() == "step 2     CANCELLED b: asked; removed\n"


def test_a_restore_is_told() -> None:
    stream = Stream()
    console = Console(stream, Clock(), environ={})
    console.on_event(
        p.Restored(
            step=45, to_step=29, cohort=1, verified=True, rewound=True, digest="ab",
            reason="a non-finite loss: taken back to step 29, hash verified; the data went back too",
        )
    )  # fmt: skip
    assert stream.getvalue() == (
        "step 45    RESTORED  a non-finite loss: taken back to step 29, hash verified; the data went back too\n"
    )
