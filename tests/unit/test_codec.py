"""The journal's text form: what goes in comes out, and what is not ours is refused with a reason."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nodeservice.core import model
from nodeservice.errors import ConfigError, InvariantError, NodeFaultError
from nodeservice.journal.codec import VERSION, RecordWriter, decode_record, encode_record

NAIVE_MIN, NAIVE_MAX = (datetime(year, 1, 1, tzinfo=UTC).replace(tzinfo=None) for year in (1971, 2200))
INSTANTS = st.datetimes(min_value=NAIVE_MIN, max_value=NAIVE_MAX, timezones=st.just(UTC))
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | FLOATS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
st.register_type_strategy(datetime, INSTANTS)
st.register_type_strategy(float, FLOATS)

RECORDS = st.builds(
    model.TaskRecord,
    limits=st.dictionaries(st.text(), JSON_VALUES, max_size=4),
)
NOW = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def a_record(**changes: Any) -> model.TaskRecord:
    record = model.TaskRecord(
        spec=model.TaskSpec(
            id=model.AttemptId("task-1"),
            image="busybox",
            request=model.Resources(cpu_milli=500),
            pids_limit=64,
            fingerprint="f" * 64,
        ),
        lease=model.Lease(granted=model.Resources(cpu_milli=500)),
        trace=model.TraceIds(trace_id="a" * 32, span_id="b" * 16),
        accepted_at=NOW,
        phase=model.Phase.PULLING,
        timings=(model.PhaseTiming(name="admit", started_at=NOW),),
    )
    return dataclasses.replace(record, **changes)


def edited(**changes: Any) -> str:
    """The text of a record with members of `record` replaced; None removes one."""
    envelope = json.loads(encode_record(a_record()))
    envelope["record"].update(changes)
    envelope["record"] = {name: value for name, value in envelope["record"].items() if value is not ...}
    return json.dumps(envelope)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(RECORDS)
def test_every_record_comes_back_equal_and_of_the_same_types(record: model.TaskRecord) -> None:
    decoded = decode_record(encode_record(record))
    assert decoded == record
    assert type(decoded.phase) is model.Phase
    assert type(decoded.spec.sla_multiplier) is float
    assert decoded.accepted_at.tzinfo is not None


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(st.lists(RECORDS, min_size=2, max_size=3), st.randoms(use_true_random=False))
def test_records_of_an_attempt_that_share_parts_are_written_as_each_alone_would_be(
    parents: list[model.TaskRecord], random: Any
) -> None:
    """Children of several parents: parts that are the same objects as in the last record, as in one before, and others."""
    writer = RecordWriter()
    names = [field.name for field in dataclasses.fields(model.TaskRecord) if field.name != "spec"]
    for _ in range(8):
        changes = {name: getattr(random.choice(parents), name) for name in names}
        timings = random.choice(parents).timings
        record = dataclasses.replace(
            parents[0], **(changes | {"timings": (*timings, *parents[0].timings), "remarks": (str(random.random()),)})
        )
        assert writer.encode(record) == encode_record(record)
        assert decode_record(writer.encode(record)) == record


def test_the_writer_lets_go_of_attempts_that_are_over_and_of_too_many() -> None:
    writer = RecordWriter()
    for number in range(3000):
        spec = dataclasses.replace(a_record().spec, id=model.AttemptId(f"task-{number}"))
        writer.encode(a_record(spec=spec))
        if number % 2:
            writer.encode(a_record(spec=spec, phase=model.Phase.FINISHED))
    assert 0 < len(writer._parts) <= 1024


def test_the_text_is_one_line_of_ascii_whatever_the_strings_hold() -> None:
    text = encode_record(a_record(remarks=("line\nbreak", "ünïcode", "\ud800 lone surrogate", "\x00")))
    assert text.isascii()
    assert "\n" not in text
    assert decode_record(text).remarks[2] == "\ud800 lone surrogate"


def test_an_instant_of_another_zone_is_the_same_instant_afterwards() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert decode_record(encode_record(a_record(started_at=there))).started_at == NOW


def test_a_record_written_before_a_field_existed_takes_its_default() -> None:
    decoded = decode_record(edited(remarks=..., retained=..., usage=..., escalation=...))
    assert decoded == a_record()


def test_a_newer_version_is_refused_with_the_remedy() -> None:
    with pytest.raises(ConfigError, match=f"format {VERSION + 1}.*newer nodeservice"):
        decode_record(json.dumps({"v": VERSION + 1, "record": {"anything": 1}}))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"v": 1}', "not a JSON object"),
        ('{"v": "1", "record": {}}', "valid version"),
        ('{"v": 0, "record": {}}', "valid version"),
        ('{"v": true, "record": {}}', "valid version"),
        (edited(phase=99), "at phase: int is no Phase"),
        (edited(spec=...), "missing field 'spec'"),
        (edited(surprise=1), "unknown field 'surprise'"),
        (edited(accepted_at="yesterday"), "at accepted_at"),
        (edited(accepted_at="2026-01-01T00:00:00"), "no time zone"),
        (edited(retained=1), "at retained: expected bool, found int"),
        (edited(timings=[{"name": "admit", "started_at": None}]), r"at timings\.0\.started_at"),
        (edited(lease={"granted": {"cpu_milli": "many"}}), r"at lease\.granted\.cpu_milli"),
        (edited(limits=[]), "at limits"),
    ],
)
def test_text_that_is_no_record_is_refused_and_the_place_is_named(text: str, told: str) -> None:
    with pytest.raises(NodeFaultError, match=told) as caught:
        decode_record(text)
    assert caught.value.reason == "JOURNAL_CORRUPT"
    assert caught.value.hint


def test_an_error_never_shows_a_value_since_a_record_holds_environment_values() -> None:
    envelope = json.loads(encode_record(a_record()))
    envelope["record"]["spec"]["env"] = [["TOKEN", {"hunter2": "hunter2"}]]
    with pytest.raises(NodeFaultError) as caught:
        decode_record(json.dumps(envelope))
    assert "hunter2" not in str(caught.value)


def test_what_json_cannot_hold_is_our_bug() -> None:
    with pytest.raises(InvariantError, match=r"task-1\.1"):
        encode_record(a_record(limits={"asked": object()}))
    with pytest.raises(InvariantError, match="no time zone"):
        encode_record(a_record(started_at=NOW.replace(tzinfo=None)))
