"""Log lines: stable, complete, and free of what must not be in them."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator

import pytest
import structlog

from orcd_jax.telemetry import log
from orcd_jax.telemetry.log import EventCode, Level, Style

Setup = Callable[..., io.StringIO]


@pytest.fixture
def logged() -> Iterator[Setup]:
    """Configures the log onto a buffer; puts everything back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers, root.level

    def setup(style: Style = "json", level: Level = "info") -> io.StringIO:
        stream = io.StringIO()
        log.configure(worker_id="w1", pool_id="p1", style=style, level=level, stream=stream)
        return stream

    yield setup
    structlog.reset_defaults()
    root.handlers, root.level = handlers, level


@pytest.mark.requirement("WORKER-4800")
def test_a_line_is_one_json_object_with_event_sentence_level_time_and_worker(logged: Setup) -> None:
    stream = logged()
    log.get_logger().info(EventCode.READY, human="Ready.", slots_total=4)
    line = json.loads(stream.getvalue())
    assert line.pop("ts").endswith("Z")
    assert line == {
        "worker_id": "w1",
        "pool_id": "p1",
        "event": "ready",
        "human": "Ready.",
        "slots_total": 4,
        "level": "info",
    }


@pytest.mark.requirement("WORKER-4800")
def test_the_event_codes_are_the_documented_ones() -> None:
    documented = (
        "startup model_load_start model_load_progress model_load_complete sealed ready execute_start execute_end "
        "error drain shutdown"
    )
    assert set(documented.split()) <= {str(code) for code in EventCode}


@pytest.mark.requirement("WORKER-4800")
@pytest.mark.requirement("WORKER-4801")
@pytest.mark.requirement("WORKER-4803")
@pytest.mark.parametrize("name", ["prompt", "text", "output", "token", "tokens", "api_token", "stop", "exception"])
def test_a_field_outside_the_list_is_left_out(logged: Setup, name: str) -> None:
    stream = logged()
    log.get_logger().info(EventCode.EXECUTE_END, human="Done.", **{name: "a secret"})
    assert "a secret" not in stream.getvalue()


def test_a_logger_keeps_the_fields_it_was_made_with(logged: Setup) -> None:
    stream = logged()
    log.get_logger(job_id="j7").info(EventCode.EXECUTE_START, human="Begins.")
    assert json.loads(stream.getvalue())["job_id"] == "j7"


@pytest.mark.parametrize("style", ["json", "console"])
@pytest.mark.requirement("WORKER-4304")
def test_control_and_direction_characters_never_reach_the_stream(logged: Setup, style: Style) -> None:
    stream = logged(style)
    log.get_logger().info(EventCode.ERROR, human="a\x1b[2Jb\u202ec\nd", job_id="x\r\ny")
    written = stream.getvalue()
    assert written.count("\n") == 1
    assert not {"\x1b", "\u202e", "\r"} & set(written)
    assert "\\u" not in written


def test_long_text_is_cut(logged: Setup) -> None:
    stream = logged()
    log.get_logger().info(EventCode.ERROR, human="x" * 10_000)
    assert len(stream.getvalue()) < 1300


@pytest.mark.requirement("WORKER-4800")
def test_the_console_style_is_one_readable_line(logged: Setup) -> None:
    stream = logged("console")
    log.get_logger().warning(EventCode.DRAIN, human="Draining.", jobs=2)
    assert stream.getvalue()[8:] == " warning drain: Draining. (jobs=2)\n"


def test_lines_below_the_level_are_not_written(logged: Setup) -> None:
    stream = logged(level="warning")
    log.get_logger().info(EventCode.READY, human="Ready.")
    assert stream.getvalue() == ""


def test_a_library_warning_becomes_a_line_without_its_traceback(logged: Setup) -> None:
    stream = logged()
    try:
        raise ValueError("the prompt was: my secret")
    except ValueError:
        logging.getLogger("somelib.part").exception("it %s", "broke")
    line = json.loads(stream.getvalue())
    assert (line["event"], line["library"], line["level"]) == ("library", "somelib.part", "error")
    assert line["human"] == "it broke (ValueError)"


def test_what_libraries_say_below_a_warning_is_not_written(logged: Setup) -> None:
    stream = logged()
    logging.getLogger("somelib").info("chatter")
    assert stream.getvalue() == ""


def test_a_library_message_with_a_wrong_format_is_still_written(logged: Setup) -> None:
    stream = logged()
    logging.getLogger("somelib").warning("%d jobs", "many")
    assert json.loads(stream.getvalue())["human"] == "%d jobs"


def test_a_field_without_a_value_is_left_out(logged: Setup) -> None:
    stream = logged()
    log.get_logger().info(EventCode.ERROR, human="No.", field=None)
    assert "field" not in json.loads(stream.getvalue())
