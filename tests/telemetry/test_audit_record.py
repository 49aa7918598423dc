"""What an audit record may hold, and which lines are records."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.telemetry.audit_record import (
    FIELDS,
    GENESIS,
    LONGEST_TEXT,
    MAX_LINE_BYTES,
    AuditEvent,
    Head,
    Value,
    chained,
    known_fields,
    read_record,
    timestamp,
)
from tests.telemetry.audit_samples import NOON

# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4160")
@pytest.mark.parametrize(
    "name", ["prompt", "output", "token", "tokens", "key", "path", "text", "seq", "prev", "hash", "ts", "worker_id"]
)
def test_a_field_outside_the_list_is_left_out(name: str) -> None:
    assert known_fields({name: "a secret", "code": "BUSY"}) == {"code": "BUSY"}


@pytest.mark.requirement("WORKER-4160")
def test_only_texts_booleans_and_64_bit_integers_are_kept() -> None:
    kept: dict[str, object] = {"code": "BUSY", "pinned": True, "bytes": 2**63 - 1}
    dropped = {"reason": ["a"], "age_ms": 1.5, "count": 2**63, "device": None, "tensor": b"x", "rule": object()}
    assert known_fields(kept | dropped) == kept


@pytest.mark.requirement("WORKER-4160")
@pytest.mark.parametrize("outside", ["/etc/shadow", "../key", "a/../../b", ".."])
def test_a_path_outside_is_not_shown(outside: str) -> None:
    assert known_fields({"file": outside}) == {"file": "(outside)"}
    assert known_fields({"file": "arrays/a..b/0"}) == {"file": "arrays/a..b/0"}


@pytest.mark.requirement("WORKER-4160")
@settings(deadline=None)
@given(text=st.text())
def test_any_text_becomes_a_harmless_line_that_verifies(text: str) -> None:
    line, head = chained(GENESIS, AuditEvent.LOAD_FAILED, NOON, "w1", known_fields({"reason": text}))
    assert line.count(b"\n") == 1
    read = read_record(line)
    assert read is not None
    assert (read.seq, read.hash) == head
    assert not {"Cc", "Cf", "Cs", "Zl", "Zp"} & {unicodedata.category(c) for c in line.decode().rstrip("\n")}


@pytest.mark.requirement("WORKER-4160")
def test_the_largest_record_fits_into_a_line() -> None:
    fields: dict[str, Value] = known_fields(dict.fromkeys(FIELDS, "\U0001f512" * 2 * LONGEST_TEXT))
    line, _ = chained(Head(2**62, "f" * 64), AuditEvent.VERIFICATION_FAILED, NOON + timedelta(1), "w" * 256, fields)
    assert len(line) < MAX_LINE_BYTES
    assert read_record(line) is not None


@pytest.mark.requirement("WORKER-4160")
def test_times_are_utc_with_microseconds_in_any_year() -> None:
    at = datetime(2026, 3, 1, 1, 2, 3, 4, tzinfo=timezone(timedelta(hours=2)))
    assert timestamp(at) == "2026-02-28T23:02:03.000004Z"
    assert timestamp(datetime(1, 1, 1, tzinfo=UTC)) == "0001-01-01T00:00:00.000000Z"


@pytest.mark.requirement("WORKER-4160")
def test_the_event_codes_are_the_documented_ones() -> None:
    documented = """
        worker_started worker_stopped load_started load_hashed load_verified load_failed load_completed
        memory_allocated memory_released sealed digest_recomputed digest_age_checked verification_failed
        policy_violation auth_succeeded auth_failed auth_limited tokens_rotated tls_rotated rotation_refused
        path_refused log_opened log_recovered records_lost
    """
    assert {str(event) for event in AuditEvent} == set(documented.split())


# -- what is read ------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4162")
@pytest.mark.parametrize(
    "change",
    [
        {"seq": "1"},
        {"seq": True},
        {"seq": 0},
        {"seq": 2**63},
        {"seq": 1.0},
        {"seq": None},
        {"prev": 0},
        {"ts": "\u202e2026-03-01"},
        {"ts": 1},
    ],
)
def test_a_record_with_a_right_hash_and_a_wrong_value_is_no_record(change: dict[str, object]) -> None:
    record: dict[str, object] = {"event": "sealed", "prev": "0" * 64, "seq": 1, "ts": "2026-03-01T12:00:00.000000Z"}
    assert read_record(sealed_line(record)) is not None
    assert read_record(sealed_line(record | change)) is None


@pytest.mark.requirement("WORKER-4162")
@pytest.mark.parametrize(
    "body",
    [
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b'{"seq":' + b"9" * 10_000 + b"}",
        b'{"a":"\xff"}',
        b"7}",
        b"}",
        b"{}",
    ],
)
def test_a_body_with_a_right_hash_that_is_no_record_is_not_taken_for_one(body: bytes) -> None:
    assert read_record(hashed(body)) is None


def sealed_line(record: dict[str, object]) -> bytes:
    return hashed(json.dumps(record, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())


def hashed(body: bytes) -> bytes:
    return body[:-1] + b',"hash":"' + hashlib.sha256(body).hexdigest().encode() + b'"}\n'
