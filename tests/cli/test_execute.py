"""``orcd execute``: what the worker is asked, how an answer is shown, and how a job can end."""

from __future__ import annotations

import asyncio
import io
import json
import re
import threading
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from orcd_jax.cli.arguments import Arguments, parse
from orcd_jax.cli.connection import Connection
from orcd_jax.cli.execute import request
from orcd_jax.cli.main import main
from orcd_jax.engine.request import Ended, Failed, FinishReason, Tokens
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.worker.types import ChatMessage, ChatPrompt, ExecuteParams, WorkerEvent
from tests.cli.conftest import Orcd
from tests.server.fake_worker import ENDED, OTHER_TOKEN, STARTED, STORY, WAIT_S, Served, hang_after, play

ASK = ("execute", "--max_tokens=8", "hello")
BUSY = OrcdError(ErrorCode.BUSY, "all 4 slots are taken", retry_after_ms=250)
FAULT = OrcdError(ErrorCode.CUDA_ERROR, "the device failed")

# What could steer: colour, screen, title, link, a C1 escape, bell, backspace, return, delete, direction, separators.
STEERING = (
    "\x1b[31m \x1b[2J \x1b]0;t\x07 \x1b]8;;http://x\x1b\\ \x9b31m \b \r \x7f \0 \u202e \u2066 \u200f \u2028 \u2029"
)
PLAIN = "[bold]not markup[/bold] :smile: {x} \\ \t tab\n\n" + "long " * 100


def asked(served: Served) -> ExecuteParams:
    """What the worker was asked, once."""
    ((params, _),) = served.worker.executed
    return params


def events(out: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in out.splitlines()]


# -- what the worker is asked ------------------------------------------------------------------------------------------


def test_the_worker_is_asked_for_what_the_flags_say(orcd: Orcd, served: Served) -> None:
    flags = "--temperature=0.5 --top_p=0.25 --top_k=40 --min_p=0.125 --max_tokens=7 --seed=18446744073709551615"
    assert orcd("execute", *flags.split(), "--stop=a", "--stop=b ", "--ignore_eos", "--job_id=j-1", "hello").code == 0
    assert asked(served) == ExecuteParams(
        job_id="j-1",
        prompt="hello",
        max_tokens=7,
        temperature=0.5,
        top_p=0.25,
        top_k=40,
        min_p=0.125,
        seed=2**64 - 1,
        stop=("a", "b "),
        ignore_eos=True,
    )


def test_without_flags_of_sampling_the_job_is_greedy_and_the_seed_is_the_workers(orcd: Orcd, served: Served) -> None:
    assert orcd(*ASK).code is ExitCode.OK
    params = asked(served)
    assert (params.temperature, params.top_p, params.top_k, params.min_p, params.seed) == (0.0, 1.0, 0, 0.0, None)
    assert params.timeout_ms is None


def test_each_job_gets_a_name_of_its_own(orcd: Orcd, served: Served) -> None:
    orcd(*ASK)
    orcd(*ASK)
    first, second = (params.job_id for params, _ in served.worker.executed)
    assert first != second
    assert re.fullmatch(r"[A-Za-z0-9_-]{1,256}", first)


def test_chat_makes_the_prompt_the_users_turn(orcd: Orcd, served: Served) -> None:
    orcd(*ASK, "--chat")
    assert asked(served).prompt == ChatPrompt(messages=(ChatMessage(role="user", content="hello"),))


def test_the_systems_turn_goes_before_the_users(orcd: Orcd, served: Served) -> None:
    orcd(*ASK, "--chat", "--system=be brief")
    assert asked(served).prompt == ChatPrompt(
        messages=(ChatMessage(role="system", content="be brief"), ChatMessage(role="user", content="hello"))
    )


def test_the_prompt_comes_from_stdin(orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("größer\n".encode())))
    orcd("execute", "--max_tokens=8", "-")
    assert asked(served).prompt == "größer\n"


def test_the_timeout_is_the_deadline_of_the_call(orcd: Orcd, served: Served) -> None:
    orcd(*ASK, "--timeout=8")
    timeout_ms = asked(served).timeout_ms
    assert timeout_ms is not None
    assert 0 < timeout_ms <= 8000


# -- how the answer is shown -------------------------------------------------------------------------------------------


def test_the_answer_is_on_stdout_and_the_summary_on_stderr(orcd: Orcd) -> None:
    shown = orcd(*ASK)
    assert shown.code is ExitCode.OK
    assert shown.out == "abcd\n"
    # 4 tokens in 5.5 ms: the first is of the prompt's time, so 3 / 5.5 ms.
    assert shown.err == "3 tokens in, 4 out · first after 6 ms · 545.5 tokens/s · finish: stop\n"


def test_a_sampled_answer_comes_with_its_seed(orcd: Orcd) -> None:
    shown = orcd(*ASK, "--temperature=0.5")
    assert shown.err.endswith(" · finish: stop · seed 18446744073709551615\n")


def test_one_token_has_no_speed(orcd: Orcd, served: Served) -> None:
    end = Ended(
        finish_reason=FinishReason.LENGTH, tokens_in=1, tokens_out=1, decode_time_ms=0.0, time_to_first_token_ms=40
    )
    served.worker.script = play(STARTED, Tokens(0, (1,), "a"), end)
    assert orcd(*ASK).err == "1 token in, 1 out · first after 40 ms · finish: length\n"


def test_an_answer_that_ends_its_line_gets_no_other_line_end(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(STARTED, Tokens(0, (1,), "a\n"), Tokens(1, (2,), ""), ENDED)
    assert orcd(*ASK).out == "a\n"


def test_an_empty_answer_is_empty(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(STARTED, Tokens(0, (2,), ""), ENDED)
    assert orcd(*ASK).out == ""


def test_text_is_shown_before_the_next_is_made(orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed = threading.Event()

    class Terminal(io.StringIO):
        def flush(self) -> None:
            if "first" in self.getvalue():
                flushed.set()

    async def script(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        del params
        yield STARTED
        yield Tokens(0, (1,), "first ")
        in_time = await asyncio.to_thread(flushed.wait, WAIT_S)
        yield Tokens(1, (2,), "then the next" if in_time else "TOO LATE")
        yield ENDED

    served.worker.script = script
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    assert main(ASK) is ExitCode.OK
    assert terminal.getvalue() == "first then the next\n"


def test_text_of_any_script_is_shown_as_it_is(orcd: Orcd, served: Served) -> None:
    pieces = ["Grüße, ", "日本語 ", "e\u0301 ", "👩\u200d💻 ", "فارسی\u200cها ", "🇺🇳", "\U0010ffff"]
    served.worker.script = play(STARTED, *(Tokens(i, (i,), piece) for i, piece in enumerate(pieces)), ENDED)
    assert orcd(*ASK).out == "".join(pieces) + "\n"


def test_an_answer_is_neither_markup_nor_wrapped(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(STARTED, Tokens(0, (1,), PLAIN), ENDED)
    assert orcd(*ASK).out == PLAIN + "\n"


def test_an_answer_cannot_steer_the_terminal(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(STARTED, *(Tokens(i, (i,), c) for i, c in enumerate(STEERING)), ENDED)
    out = orcd(*ASK).out
    assert out == "".join(c if " " <= c <= "~" else "\ufffd" for c in STEERING) + "\n"


def test_the_line_ends_of_another_system_are_line_ends(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(STARTED, Tokens(0, (1,), "a\r\nb"), ENDED)
    assert orcd(*ASK).out == "a\nb\n"


def test_an_answer_of_many_megabytes_is_shown_whole(orcd: Orcd, served: Served) -> None:
    text = "x" * 2**20
    served.worker.script = play(STARTED, Tokens(0, (1,), text * 6), *(Tokens(i, (i,), text) for i in range(6)), ENDED)
    assert orcd(*ASK).out == text * 12 + "\n"


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_json_is_one_event_a_line_with_exactly_these_fields(orcd: Orcd) -> None:
    shown = orcd(*ASK, "--json")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    assert events(shown.out) == [
        {
            "event": "started",
            "job_id": "job",
            "model": "tiny",
            "started_at_ms": 1_700_000_000_000,
            "seed": 18446744073709551615,
        },
        {"event": "token", "t": "ab", "i": 0, "ids": [11, 12]},
        {"event": "metrics", "tokens_out": 2, "decode_time_ms": 1.5, "vram_bytes": 99},
        {"event": "token", "t": "cd", "i": 2, "ids": [13, 14]},
        {
            "event": "end",
            "finish_reason": "stop",
            "tokens_in": 3,
            "tokens_out": 4,
            "decode_time_ms": 5.5,
            "time_to_first_token_ms": 6.5,
            "cached_prompt_tokens": 0,
            "seed": 18446744073709551615,
        },
    ]


@pytest.mark.parametrize("reason", list(FinishReason))
def test_json_names_the_finish_reason_in_lower_case(orcd: Orcd, served: Served, reason: FinishReason) -> None:
    end = Ended(finish_reason=reason, tokens_in=1, tokens_out=1, decode_time_ms=0.0, time_to_first_token_ms=1.0)
    served.worker.script = play(STARTED, end)
    assert events(orcd(*ASK, "--json").out)[-1]["finish_reason"] == reason.value


def test_json_holds_any_text_exactly_and_harms_no_terminal(orcd: Orcd, served: Served) -> None:
    text = STEERING + PLAIN + "日本語 👩\u200d💻"
    served.worker.script = play(STARTED, Tokens(0, (1,), text), ENDED)
    out = orcd(*ASK, "--json").out
    assert events(out)[1]["t"] == text
    assert out.replace("\n", "").isascii()
    assert out.replace("\n", "").isprintable()


# -- how a job can end otherwise ---------------------------------------------------------------------------------------


def test_a_refusal_is_one_line_with_its_code_and_when_to_try_again(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(BUSY)
    shown = orcd(*ASK)
    assert (shown.code, shown.out) == (ExitCode.FAILED, "")
    assert shown.err == "error: BUSY: all 4 slots are taken (try again in 250 ms)\n"


def test_a_refusal_is_one_json_event(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(BUSY)
    shown = orcd(*ASK, "--json")
    assert shown.code is ExitCode.FAILED
    assert events(shown.out) == [
        {
            "event": "error",
            "code": "BUSY",
            "message": "all 4 slots are taken",
            "retriable": True,
            "retry_after_ms": 250,
            "field": "",
        }
    ]


def test_what_the_worker_checks_is_told_in_its_words(orcd: Orcd, served: Served) -> None:
    shown = orcd(*ASK, "--temperature=2.5", "--json")
    assert shown.code is ExitCode.FAILED
    (error,) = events(shown.out)
    assert (error["code"], error["field"], error["retriable"]) == ("INVALID_PARAMS", "temperature", False)
    assert shown.err == "error: INVALID_PARAMS: temperature: 2.5 is not allowed; it must be 0 to 2\n"
    assert served.worker.executed == []


def test_a_failure_after_some_text_begins_on_a_line_of_its_own(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(STARTED, Tokens(0, (1,), "half an ans"), Failed(FAULT))
    shown = orcd(*ASK)
    assert (shown.code, shown.out) == (ExitCode.FAILED, "half an ans\n")
    assert shown.err == "error: CUDA_ERROR: the device failed (it may succeed later)\n"


def test_a_failure_after_the_start_is_one_json_event_the_last(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(*STORY[:2], Failed(FAULT))
    shown = orcd(*ASK, "--json")
    assert shown.code is ExitCode.FAILED
    told = events(shown.out)
    assert [event["event"] for event in told] == ["started", "token", "error"]
    assert told[-1] == {
        "event": "error",
        "code": "CUDA_ERROR",
        "message": "the device failed",
        "retriable": True,
        "retry_after_ms": None,
        "field": "",
    }


def test_a_message_of_the_worker_cannot_steer_the_terminal(orcd: Orcd, served: Served) -> None:
    served.worker.script = play(OrcdError(ErrorCode.INTERNAL, "a\x1b[2Jb\u202ec\nd"))
    assert orcd(*ASK).err == "error: INTERNAL: a\ufffd[2Jb\ufffdc d\n"


@pytest.mark.parametrize("command", [ASK, ("ready",), ("status",)], ids=lambda command: command[0])
def test_a_wrong_token_has_its_own_exit_code(
    orcd: Orcd, served: Served, tmp_path: Path, command: tuple[str, ...]
) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("w" * 32, encoding="ascii")
    shown = orcd(command[0], f"--token_file={wrong}", *command[1:])
    assert (shown.code, shown.out) == (ExitCode.UNAUTHENTICATED, "")
    assert shown.err.startswith("error: AUTH_FAILED: ")
    assert shown.err.endswith(f" (the token is from '{wrong}')\n")
    assert served.worker.calls == 0


def test_either_token_of_the_worker_opens_it(orcd: Orcd, token_file: Path) -> None:
    token_file.write_text(OTHER_TOKEN, encoding="ascii")
    assert orcd(*ASK).code is ExitCode.OK


def test_the_timeout_ends_a_job_that_takes_longer(orcd: Orcd, served: Served) -> None:
    served.worker.script = hang_after(STARTED, Tokens(0, (1,), "a"))
    shown = orcd(*ASK, "--timeout=0.3")
    assert (shown.code, shown.out) == (ExitCode.FAILED, "a\n")
    assert shown.err.startswith("error: TIMEOUT: ")
    assert "--timeout=0.3" in shown.err
    assert served.worker.closed.wait(WAIT_S)


def test_a_job_that_is_no_longer_read_is_cancelled_while_the_connection_stays(served: Served, token_file: Path) -> None:
    served.worker.script = hang_after(STARTED)
    where = f"--address=127.0.0.1:{served.port}"
    arguments = parse(["execute", where, "--max_tokens=8", "x"], {"ORCD_TOKEN_FILE": str(token_file)})
    assert isinstance(arguments, Arguments)
    assert arguments.job is not None
    target, ask = arguments.target, request(arguments.job)

    async def leave() -> bool:
        async with Connection(target) as worker:
            async with aclosing(worker.execute(ask, None)) as told:
                assert (await anext(told)).started is not None
            closed = await asyncio.to_thread(served.worker.closed.wait, WAIT_S)
            return closed and (await worker.ready()).ready

    assert asyncio.run(leave())
