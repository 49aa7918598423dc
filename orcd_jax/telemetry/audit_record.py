r"""An audit record: its events, its fields, and how its line is bound to the one before (WORKER-4160).

A line is the canonical JSON of a record (UTF-8, keys sorted, no white space) with its hash added as the last key:

    {"event":"sealed", …, "prev":"<64 hex>","seq":7,"ts":"…Z","worker_id":"…","hash":"<64 hex>"}\n

``hash`` is SHA-256 over the bytes of that JSON without ``hash``; ``prev`` is the hash of record ``seq - 1``, 64 zeros
for the first.
"""

from __future__ import annotations

import enum
import hashlib
import json
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import NamedTuple

from orcd_jax.telemetry.log import neutral

MAX_LINE_BYTES = 128 * 1024
LONGEST_TEXT = 512
"""Characters of one text value."""

Value = str | int | bool

_LARGEST_INTEGER = 2**63 - 1
_CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
_TAIL = re.compile(rb',"hash":"([0-9a-f]{64})"\}\n')
_TAIL_BYTES = 76
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")


class AuditEvent(enum.StrEnum):
    """Stable names of what is audited."""

    WORKER_STARTED = "worker_started"
    WORKER_STOPPED = "worker_stopped"
    LOAD_STARTED = "load_started"
    LOAD_HASHED = "load_hashed"  # one file of the checkpoint
    LOAD_VERIFIED = "load_verified"
    LOAD_FAILED = "load_failed"
    LOAD_COMPLETED = "load_completed"
    MEMORY_ALLOCATED = "memory_allocated"
    MEMORY_RELEASED = "memory_released"
    SEALED = "sealed"
    DIGEST_RECOMPUTED = "digest_recomputed"
    DIGEST_AGE_CHECKED = "digest_age_checked"  # sampled
    VERIFICATION_FAILED = "verification_failed"  # critical
    POLICY_VIOLATION = "policy_violation"  # critical
    AUTH_SUCCEEDED = "auth_succeeded"  # sampled
    AUTH_FAILED = "auth_failed"
    AUTH_LIMITED = "auth_limited"  # sampled
    TOKENS_ROTATED = "tokens_rotated"
    TLS_ROTATED = "tls_rotated"
    ROTATION_REFUSED = "rotation_refused"
    PATH_REFUSED = "path_refused"
    # of the log itself
    LOG_OPENED = "log_opened"  # the first record of every file
    LOG_RECOVERED = "log_recovered"  # an unfinished last line was set aside
    RECORDS_LOST = "records_lost"


# Every field a record may have besides seq, ts, event, worker_id, prev and hash. None of them can hold what a user
# wrote, what a model answered, or a secret; ``file`` is a name inside the checkpoint or the audit directory.
FIELDS = frozenset(
    {
        # what and where
        "correlation_id",
        "device",
        "emulated",
        "field",
        "file",
        "handle_id",
        "job_id",
        "kind",
        "method",
        "model_ref",
        "peer",
        "pid",
        "platform",
        "role",
        "rule",
        "signer",
        "stage",
        "tensor",
        "token_fingerprint",
        "version",
        # how it went
        "age_ms",
        "available_bytes",
        "bytes",
        "code",
        "count",
        "digest",
        "duration_ms",
        "exit_code",
        "needed_bytes",
        "pinned",
        "reason",
        "restarts",
        "vram_bytes",
        # added by the log
        "aside",  # the file an unfinished line was moved to
        "continues",  # the file before
        "records",  # how many were lost
        "times",  # how many occurrences a sampled record stands for
    }
)


class Head(NamedTuple):
    """The newest record of a chain. Kept elsewhere, it proves that nothing up to it was cut off or rewritten."""

    seq: int
    hash: str


GENESIS = Head(0, "0" * 64)


class Record(NamedTuple):
    """What the chain needs to know of one intact line.

    Attributes:
      lost: how many records a ``records_lost`` record says were lost; else 0.
    """

    seq: int
    prev: str
    hash: str
    ts: str
    lost: int


def known_fields(fields: Mapping[str, object]) -> dict[str, Value]:
    """What may be recorded: known names, texts made harmless and short, integers of 64 bits; the rest is left out."""
    kept: dict[str, Value] = {}
    for name in FIELDS & fields.keys():
        value = fields[name]
        if isinstance(value, str):
            kept[name] = neutral(_inside(value) if name == "file" else value, LONGEST_TEXT)
        elif isinstance(value, bool):
            kept[name] = value
        elif isinstance(value, int) and abs(value) <= _LARGEST_INTEGER:
            kept[name] = int(value)
    return kept


def timestamp(at: datetime) -> str:
    """UTC with microseconds: ``2026-01-31T23:59:59.000001Z``."""
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"


def chained(
    head: Head, event: AuditEvent, at: datetime, worker_id: str, fields: Mapping[str, Value]
) -> tuple[bytes, Head]:
    """The line of the record that follows ``head``, and the head it makes."""
    record = {
        **fields,
        "event": str(event),
        "prev": head.hash,
        "seq": head.seq + 1,
        "ts": timestamp(at),
        "worker_id": worker_id,
    }
    body = _CANONICAL.encode(record).encode()
    digest = hashlib.sha256(body).hexdigest()
    return body[:-1] + b',"hash":"' + digest.encode() + b'"}\n', Head(head.seq + 1, digest)


def read_record(line: bytes) -> Record | None:
    """The record of one whole line; None when its bytes are not exactly what its hash was taken over."""
    found = _TAIL.fullmatch(line[-_TAIL_BYTES:])
    if found is None:
        return None
    body = line[:-_TAIL_BYTES] + b"}"
    digest = found.group(1).decode()
    if hashlib.sha256(body).hexdigest() != digest:
        return None
    try:
        value = json.loads(body.decode())  # an object: nothing else ends with that brace
    except (ValueError, RecursionError):
        return None
    seq, prev, ts = value.get("seq"), value.get("prev"), value.get("ts")
    if type(seq) is not int or not 1 <= seq <= _LARGEST_INTEGER:
        return None
    if not (isinstance(prev, str) and isinstance(ts, str) and _TIME.fullmatch(ts)):
        return None
    lost = value.get("records") if value.get("event") == AuditEvent.RECORDS_LOST else 0
    return Record(seq, prev, digest, ts, lost if type(lost) is int and lost > 0 else 0)


def _inside(path: str) -> str:
    """A relative path that stays where it is; anything else is not shown."""
    return path if not path.startswith("/") and ".." not in PurePosixPath(path).parts else "(outside)"
