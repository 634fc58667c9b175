"""The event log: what is written comes back, and damage is told from an unfinished line."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import types
import typing
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper import protocol
from esper.errors import EsperError
from esper.observe.event_log import EventLog, decode_record, encode_record, read_events
from esper.protocol import AnyEvent, HeldOut, Judged, Record, Telemetry, Warned

pytestmark = pytest.mark.unit

EVENT_TYPES = typing.get_args(AnyEvent)
_INTS = st.integers(-(2**53), 2**53)
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_JSON = st.recursive(
    st.none() | st.booleans() | _INTS | st.floats(allow_nan=False, allow_infinity=False) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=6,
)


def strategy_for(hint: object) -> st.SearchStrategy[typing.Any]:
    """Values of a protocol field's type."""
    plain = {int: _INTS, float: st.floats(), str: _TEXT, bool: st.booleans(), type(None): st.none(), typing.Any: _JSON}
    if hint in plain:
        return plain[hint]
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return st.one_of([strategy_for(arg) for arg in args])
    if origin is tuple:
        return st.lists(strategy_for(args[0]), max_size=3).map(tuple)
    if origin is dict:
        return st.dictionaries(strategy_for(args[0]), strategy_for(args[1]), max_size=3)
    assert isinstance(hint, type), hint
    if issubclass(hint, msgspec.Struct):
        return struct_strategy(hint)
    return st.sampled_from(list(hint))


def struct_strategy(kind: type) -> st.SearchStrategy[typing.Any]:
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{name: strategy_for(hints[name]) for name in kind.__struct_fields__})


def beat(step: int = 0) -> HeldOut:
    return HeldOut(step=step, loss=0.5, params=10, flops=1e9)


@pytest.mark.parametrize("kind", EVENT_TYPES)
def test_every_event_survives_the_round_trip(kind: type) -> None:
    @given(event=struct_strategy(kind), time=st.floats(allow_nan=False, allow_infinity=False))
    def check(event: AnyEvent, time: float) -> None:
        record = Record(v=1, seq=3, time=time, event=event)
        line = encode_record(record)
        assert line.endswith(b"\n") and line.count(b"\n") == 1
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
        assert repr(decode_record(line)) == repr(record)  # repr, because NaN does not equal itself

    check()


def test_missing_values_come_back_missing_and_numpy_numbers_as_numbers(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append(
            Telemetry(step=np.int64(4), sites=("a",), activation_mean=(np.float32(0.5),), activation_var=(math.inf,),
                      gradient_energy=(math.nan,), grown=(0,))
        )  # fmt: skip
    [record] = read_events(tmp_path / "events.jsonl")
    assert isinstance(record.event, Telemetry)
    assert record.event.step == 4 and record.event.activation_mean == (0.5,)
    assert math.isnan(record.event.gradient_energy[0]) and record.event.activation_var[0] == math.inf


def test_what_has_no_json_form_is_refused_and_leaves_the_log_alone(tmp_path: Path) -> None:
    with EventLog(tmp_path / "events.jsonl") as log:
        log.append(beat())
        with pytest.raises(EsperError, match="RunFinished could not be written"):
            log.append(protocol.RunFinished(step=1, summary={"model": object()}))
        with pytest.raises(EsperError, match="Warned could not be written"):
            log.append(Warned(step=1, message="lone \ud800 surrogate"))
        log.append(beat(2))
    assert [record.seq for record in read_events(log.path)] == [0, 1]


def test_a_second_writer_is_refused_until_the_first_closes(tmp_path: Path) -> None:
    path = tmp_path / "run" / "events.jsonl"
    with EventLog(path) as first:
        first.append(beat())
        with pytest.raises(EsperError, match="has one writer"):
            EventLog(path)
        first.append(beat(1))
    with EventLog(path) as second:
        assert second.next_seq == 2
    second.close()
    with pytest.raises(EsperError, match="closed one"):
        second.append(beat())


def test_reopening_goes_on_counting(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    for _ in range(3):
        with EventLog(path, clock=lambda: 12.5) as log:
            log.append(beat())
    records = list(read_events(path))
    assert [record.seq for record in records] == [0, 1, 2]
    assert records[0].time == 12.5


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_passed_over_and_cut_off_on_reopening(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        log.append(beat(1))
        log.append(beat(2))
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    survivors = 2 if cut == 1 else 1  # only the newline is missing: the event is whole
    assert len(list(read_events(path))) == survivors
    with EventLog(path) as log:
        log.append(beat(3))
    assert [record.seq for record in read_events(path)] == list(range(survivors + 1))
    assert path.read_bytes().count(b"\n") == survivors + 1


def test_damage_in_the_middle_names_the_line_and_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with EventLog(path) as log:
        for step in range(3):
            log.append(beat(step))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + lines[2])
    with pytest.raises(EsperError, match=r"line 2: .*head -n 1"):
        list(read_events(path))
    with pytest.raises(EsperError, match="line 2"):
        EventLog(path)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(EsperError, match="seq must be 1, got 2"):
        list(read_events(path))


def test_newer_schema_is_refused_and_unknown_fields_are_ignored(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    record = json.loads(encode_record(Record(v=1, seq=0, time=0.0, event=beat())))
    path.write_text(json.dumps(record | {"shard": 1, "event": record["event"] | {"mood": "good"}}) + "\n")
    assert next(read_events(path)).event == beat()
    for text in ('{"v":2,"seq":0,"what":[]}\n', '{"v":2,"seq":0}'):
        path.write_text(text)
        with pytest.raises(EsperError, match=r"line 1: .*schema up to 1, got 2; update"):
            list(read_events(path))


def test_no_log_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(EsperError, match=r"nothing\.jsonl"):
        list(read_events(tmp_path / "nothing.jsonl"))


def test_a_full_disk_leaves_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write

    def half_then_full(fd: int, data: memoryview) -> int:
        if len(data) > 40:
            return real(fd, bytes(data[:40]))
        raise OSError(28, "No space left on device")

    with EventLog(tmp_path / "events.jsonl") as log:
        log.append(beat())
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", half_then_full)
            with pytest.raises(EsperError, match="free disk space"):
                log.append(beat(1))
        log.append(beat(2))
    assert [record.event.step for record in read_events(log.path)] == [0, 2]


@pytest.mark.component
@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL is POSIX")
def test_a_killed_writer_loses_nothing_it_wrote_and_blocks_nobody(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    code = textwrap.dedent(
        """
        import sys, time
        from esper.observe.event_log import EventLog
        from esper.protocol import Warned
        log = EventLog(sys.argv[1])
        for step in range(5):
            log.append(Warned(step=step, message="x"))
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    env = os.environ | {"PYTHONPATH": str(Path(protocol.__file__).parents[2])}
    with subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, env=env) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        with pytest.raises(EsperError, match="another process"):
            EventLog(path)
        child.send_signal(signal.SIGKILL)
    with EventLog(path) as log:
        assert log.next_seq == 5


def test_judged_keeps_an_unreached_confirmation_unknown() -> None:
    fields = dict.fromkeys(("gain", "gain_low", "gain_high", "gain_shrunken", "e_value", "e_threshold", "flops"), 1.0)
    event = Judged(
        step=1, cohort=0, stage="evaluate", sites=(), confirm_p=math.nan, num_batches=3, accepted=False,
        added_params=1, added_flops_share=-math.inf, reason="null", **fields,
    )  # fmt: skip
    back = decode_record(encode_record(Record(v=1, seq=0, time=0.0, event=event))).event
    assert isinstance(back, Judged)
    assert math.isnan(back.confirm_p) and back.added_flops_share == -math.inf and back.reason == "null"
