"""Structured logs on stderr: one JSON object a line, with a stable ``event`` and a ``human`` sentence (WORKER-4800).

    log = get_logger()
    log.info(EventCode.READY, human=narration.ready(…), model_ref=…)

Prompts, outputs, tokens and secrets are in no log: a field that is not in :data:`FIELDS` is left out, whoever adds it.
"""

from __future__ import annotations

import enum
import logging
import sys
import traceback
import unicodedata
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal, TextIO, cast

import structlog
from structlog.typing import EventDict, FilteringBoundLogger, Processor, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]
Style = Literal["json", "console"]

_LEVELS: dict[Level, int] = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}
_LONGEST_TEXT = 1024


class EventCode(enum.StrEnum):
    """Stable names of what happened; tools and dashboards match on them."""

    STARTUP = "startup"
    MODEL_LOAD_START = "model_load_start"
    MODEL_LOAD_PROGRESS = "model_load_progress"
    MODEL_LOAD_COMPLETE = "model_load_complete"
    SEALED = "sealed"
    SEAL_AT_RISK = "seal_at_risk"  # a proof is overdue: tokens are held back
    SEAL_BROKEN = "seal_broken"
    PLAN = "plan"
    ATTESTED = "attested"
    REQUEST = "request"
    AUTH = "auth"
    AUDIT = "audit"
    WATCHDOG = "watchdog"
    RESTARTS = "restarts"
    METRICS = "metrics"
    READY = "ready"
    EXECUTE_START = "execute_start"
    EXECUTE_END = "execute_end"
    ERROR = "error"
    CALLBACK = "callback"
    DRAIN = "drain"
    SHUTDOWN = "shutdown"
    LIBRARY = "library"  # a warning of a library below us


# Every field a log line may have. None of them can hold what a user wrote or what a model answered.
FIELDS = frozenset(
    {
        # added here
        "event",
        "human",
        "level",
        "ts",
        "worker_id",
        "pool_id",
        # what and where
        "address",
        "correlation_id",
        "handle_id",
        "method",
        "peer",
        "pid",
        "port",
        "tensor",
        "trace_id",
        "device",
        "emulated",
        "job_id",
        "library",
        "model_ref",
        "platform",
        "token_fingerprint",
        "version",
        # how it went
        "age_ms",
        "attempt",
        "available_bytes",
        "bytes",
        "cached_tokens",
        "code",
        "decode_time_ms",
        "digest",
        "duration_ms",
        "exit_code",
        "field",
        "finish_reason",
        "jobs",
        "kv_bytes",
        "load_seconds",
        "needed_bytes",
        "pinned",
        "reason",
        "reasons",
        "records_lost",
        "restarts",
        "percent",
        "slots_total",
        "stage",
        "time_to_first_token_ms",
        "tokens_in",
        "tokens_out",
        "vram_bytes",
        "weights_bytes",
        "where",
    }
)


def configure(
    *, worker_id: str, pool_id: str, style: Style = "json", level: Level = "info", stream: TextIO | None = None
) -> None:
    """Sets up the process's one log; called once, before the first line.

    Args:
      worker_id: on every line.
      pool_id: on every line.
      style: JSON objects, or plain text for a person.
      level: the least level that is written.
      stream: where lines go; stderr by default.
    """
    out = stream if stream is not None else sys.stderr
    identity = {"worker_id": worker_id, "pool_id": pool_id}

    def identify(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
        return {**identity, **event}

    render: Processor = (
        structlog.processors.JSONRenderer(sort_keys=False) if style == "json" else cast("Processor", _plain)
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,  # what the server bound for the call that is answered
            identify,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="ts"),
            _only_known_fields,
            _neutralise,
            render,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=structlog.WriteLoggerFactory(file=out),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    root.handlers = [_LibraryHandler(level=logging.WARNING)]
    root.setLevel(max(_LEVELS[level], logging.WARNING))


def get_logger(**fields: object) -> FilteringBoundLogger:
    """A logger that adds ``fields`` to each of its lines."""
    return cast("FilteringBoundLogger", structlog.get_logger(**fields))


def neutral(text: str, limit: int = _LONGEST_TEXT) -> str:
    """Text that cannot steer a terminal or a reader: control, escape and direction characters become ``?``."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join("?" if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") else c for c in shown)


def where(error: BaseException) -> str:
    """Where an unexpected exception came from, innermost first; not what it says, which may hold a caller's data."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " < ".join(f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in reversed(frames))


def _only_known_fields(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    first = {key: event[key] for key in ("ts", "level", "event", "human") if key in event}
    return first | {key: value for key, value in event.items() if key in FIELDS and value is not None}


def _neutralise(_: WrappedLogger, __: str, event: EventDict) -> EventDict:
    return {key: neutral(str(value)) if isinstance(value, str) else value for key, value in event.items()}


def _plain(_: WrappedLogger, __: str, event: EventDict) -> str:
    """``12:00:00 info  ready: the sentence (job_id=…)`` for a person at a terminal."""
    rest: MutableMapping[str, object] = dict(event)
    for key in ("worker_id", "pool_id"):
        rest.pop(key, None)
    time, level, name = str(rest.pop("ts"))[11:19], rest.pop("level"), rest.pop("event")
    sentence = rest.pop("human", "")
    details = " ".join(f"{key}={value}" for key, value in rest.items())
    return f"{time} {level:<7} {name}: {sentence}" + (f" ({details})" if details else "")


class _LibraryHandler(logging.Handler):
    """Turns the warnings of libraries into lines of our own log. Never shows a traceback: it may hold data."""

    def emit(self, record: logging.LogRecord) -> None:
        level = "error" if record.levelno >= logging.ERROR else "warning"
        raised = record.exc_info[0].__name__ if record.exc_info and record.exc_info[0] else ""
        try:
            said = record.getMessage()
        except Exception:  # a library's own format error must not take the worker down
            said = str(record.msg)
        human = f"{neutral(said, 240)}{f' ({raised})' if raised else ''}"
        getattr(get_logger(), level)(EventCode.LIBRARY, human=human, library=record.name)
