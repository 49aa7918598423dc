"""What a call carries besides its message: a name that the logs know it by, a deadline, headers that may be wrong."""

from __future__ import annotations

import base64
import uuid
from collections.abc import AsyncIterator, Callable

import grpc
import pytest
from h2.errors import ErrorCodes

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.call import current_call
from orcd_jax.worker.types import ExecuteParams, WorkerEvent
from tests.server.fake_worker import STARTED, STORY, WAIT_S, Served, flood, hang_after, play
from tests.server.peer import (
    SERVICE,
    Metadata,
    Peer,
    bearer,
    error_detail,
    execute_request,
    failure,
    outcome,
)
from tests.server.raw import END_HEADERS, PING_FRAME, SETTINGS, Answer, Raw, call_headers, frame, framed

NAME = "x-correlation-id"
JOB: bytes = execute_request().SerializeToString()
READY = f"/{SERVICE.full_name}/Ready"
CODE = {code.name: code.value[0] for code in grpc.StatusCode}


def named(*names: str) -> Metadata:
    return (*bearer(), *((NAME, name) for name in names))


def name_in(metadata: Metadata) -> str:
    (found,) = [value for key, value in metadata if key == NAME]
    return found


# -- the correlation id ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4800")
@pytest.mark.requirement("WORKER-4802")
@pytest.mark.parametrize("name", ["a", "A-9", "x" * 64, "0af7651916cd43dd8448eb211c80319c"])
def test_a_name_that_the_client_gives_comes_back_before_and_after_the_answer(peer: Peer, name: str) -> None:
    job = peer.execute(metadata=named(name))
    assert outcome(job)[1] is None
    assert name_in(job.initial_metadata()) == name_in(job.trailing_metadata()) == name


@pytest.mark.requirement("WORKER-4800")
@pytest.mark.requirement("WORKER-4802")
@pytest.mark.parametrize(
    "names", [(), ("",), ("x" * 65,), ("a b",), ("a_b",), ("../x",), ("one", "two"), ("same", "same")]
)
def test_without_one_that_is_well_formed_a_call_gets_a_fresh_one(peer: Peer, names: tuple[str, ...]) -> None:
    found = set()
    for _ in range(2):
        job = peer.execute(metadata=named(*names))
        outcome(job)
        name = name_in(job.initial_metadata())
        assert str(uuid.UUID(name)) == name
        found.add(name)
    assert len(found) == 2


@pytest.mark.requirement("WORKER-4800")
@pytest.mark.requirement("WORKER-4802")
@pytest.mark.parametrize(
    ("path", "metadata"),
    [
        (READY, ((NAME, "c-1"),)),
        (READY, (*bearer("x" * 32), (NAME, "c-1"))),
        (f"/{SERVICE.full_name}/Drain", named("c-1")),
        (f"/{SERVICE.full_name}/Execute", named("c-1")),
    ],
    ids=["no token", "a wrong token", "a wrong role", "a bad message"],
)
def test_it_is_in_the_metadata_and_in_the_details_of_an_error(peer: Peer, path: str, metadata: Metadata) -> None:
    error = peer.refusal_of(path, metadata=metadata, body=b"\xff")
    assert name_in(error.trailing_metadata()) == "c-1"
    assert error_detail(error).correlation_id == "c-1"


@pytest.mark.requirement("WORKER-4800")
@pytest.mark.requirement("WORKER-4802")
def test_it_is_in_the_error_event_of_a_job_and_in_the_log_of_a_bug(
    served: Served, peer: Peer, log_lines: Callable[[], list[dict[str, object]]]
) -> None:
    served.worker.script = play(STARTED, ValueError("a bug"))
    events, error = outcome(peer.execute(metadata=named("c-1")))
    assert error is not None
    assert events[-1].error.correlation_id == error_detail(error).correlation_id == "c-1"
    assert [line["correlation_id"] for line in log_lines()] == ["c-1"]


@pytest.mark.requirement("WORKER-4800")
def test_calls_at_once_keep_their_names_apart(served: Served, peer: Peer) -> None:
    served.worker.script = hang_after(STARTED)
    jobs = [peer.execute(metadata=named(f"c-{number}"), job_id=f"job-{number}") for number in range(5)]
    for number, job in enumerate(jobs):
        next(job)
        assert name_in(job.initial_metadata()) == f"c-{number}"
    for job in jobs:
        job.cancel()


@pytest.mark.requirement("WORKER-4820")
@pytest.mark.parametrize(("given", "seen"), [((), ""), (("00-ab-cd-01",), "00-ab-cd-01")])
def test_a_trace_that_the_client_is_in_reaches_the_handler(
    served: Served, peer: Peer, given: tuple[str, ...], seen: str
) -> None:
    found: list[str] = []

    async def look(params: ExecuteParams) -> AsyncIterator[WorkerEvent]:
        found.append(current_call().traceparent)
        async for event in play(*STORY)(params):
            yield event

    served.worker.script = look
    assert outcome(peer.execute(metadata=(*bearer(), *(("traceparent", value) for value in given))))[1] is None
    assert found == [seen]


@pytest.mark.requirement("WORKER-4950")
@pytest.mark.requirement("WORKER-4152")
def test_amounts_that_did_not_fit_are_in_the_details(served: Served, peer: Peer) -> None:
    served.worker.script = play(OrcdError(ErrorCode.VRAM_OOM, "why", needed_bytes=2**40, available_bytes=0))
    detail = error_detail(failure(peer.execute()))
    assert (detail.needed_bytes, detail.available_bytes) == (2**40, 0)
    served.worker.script = play(OrcdError(ErrorCode.BUSY, "why"))
    detail = error_detail(failure(peer.execute()))
    assert not detail.HasField("needed_bytes")
    assert not detail.HasField("available_bytes")


# -- the deadline ------------------------------------------------------------------------------------------------------


def details_of(answer: Answer) -> bytes:
    text = answer.headers["grpc-status-details-bin"]
    return base64.b64decode(text + "=" * (-len(text) % 4))


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.parametrize("timeout", ["0n", "0m", "00000000H", "1n"])
def test_a_call_whose_deadline_has_passed_on_arrival_does_no_work(served: Served, timeout: str) -> None:
    with Raw(served.port) as raw:
        raw.call("Execute", timeout=timeout)
        raw.send(framed(JOB), end=True)
        answer = raw.answer()
    assert (answer.status, answer.said) == (
        CODE["DEADLINE_EXCEEDED"],
        "the call's deadline had passed when it arrived",
    )
    assert b"TIMEOUT" in details_of(answer)
    assert served.worker.calls == 0


@pytest.mark.requirement("WORKER-4203")
def test_a_token_is_asked_for_even_so(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.call("Execute", timeout="0n", metadata=())
        assert raw.answer().status == CODE["UNAUTHENTICATED"]


@pytest.mark.requirement("WORKER-4240")
def test_a_deadline_that_passes_is_told_with_details_and_ends_the_job(served: Served) -> None:
    served.worker.script = hang_after(STARTED)
    with Raw(served.port) as raw:
        raw.call("Execute", timeout="300m", metadata=named("c-1"))
        raw.send(framed(JOB), end=True)
        answer = raw.answer()
    assert (answer.status, answer.said) == (CODE["DEADLINE_EXCEEDED"], "the call's deadline has passed")
    assert b"TIMEOUT" in details_of(answer)
    assert b"c-1" in details_of(answer)
    assert served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4240")
def test_it_passes_for_a_client_that_gives_no_room_and_for_one_that_sends_no_message(served: Served) -> None:
    served.worker.script = flood("x" * 1000)
    with Raw(served.port) as raw:
        raw.call("Execute", timeout="300m")
        raw.send(framed(JOB), end=True)
        raw.call("Execute", timeout="300m", stream=3)
        for stream in (1, 3):
            assert raw.answer(stream).said == "the call's deadline has passed"
    assert served.worker.closed.wait(WAIT_S)


@pytest.mark.requirement("WORKER-4300")
@pytest.mark.parametrize("timeout", ["", "1", "S", "1s", "-1S", "1.5S", " 1S", "123456789S", "9" * 400 + "S", "1S\n"])
def test_a_timeout_that_is_none_is_refused(served: Served, timeout: str) -> None:
    with Raw(served.port) as raw:
        raw.call("Execute", timeout=timeout)
        answer = raw.answer()
        assert (answer.status, answer.said) == (
            CODE["INVALID_ARGUMENT"],
            "grpc-timeout: it must be 1 to 8 digits and one of H M S m u n",
        )
        raw.ask("Ready", stream=3)
        assert raw.answer(3).status == 0


@pytest.mark.requirement("WORKER-4240")
def test_the_longest_timeout_is_one(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.call("Execute", timeout="99999999H")
        raw.send(framed(JOB), end=True)
        assert raw.answer().status == 0


# -- headers -----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4300")
@pytest.mark.parametrize("value", ["a", "ab!d=", "A" * 5, "=", "A==="])
def test_bytes_that_are_not_base64_are_refused(served: Served, value: str) -> None:
    with Raw(served.port) as raw:
        raw.call("Ready", metadata=(*bearer(), ("trace-bin", value)), end=True)
        answer = raw.answer()
    assert answer.status == CODE["INVALID_ARGUMENT"]


@pytest.mark.parametrize("value", ["", "YQ", "YQ==", "YWI", "YWJj"])
def test_bytes_in_base64_pass_with_their_padding_or_without(served: Served, value: str) -> None:
    with Raw(served.port) as raw:
        raw.call("Ready", metadata=(*bearer(), ("trace-bin", value)))
        raw.send(framed(b""), end=True)
        assert raw.answer().status == 0


@pytest.mark.requirement("WORKER-4300")
@pytest.mark.parametrize(
    "header", [(b"x-name", "é".encode()), (b"x-name", b"\xff"), ("x-né".encode(), b"v"), (b"x-bin", b"\xff")]
)
def test_metadata_that_is_not_ascii_is_refused_and_the_connection_goes_on(
    served: Served, header: tuple[bytes, bytes]
) -> None:
    with Raw(served.port) as raw:
        raw.write(raw.any_headers([*call_headers("Ready", metadata=bearer()), header]))
        answer = raw.answer()
        assert answer.status == CODE["INVALID_ARGUMENT"]
        assert answer.said.startswith("metadata: one is not ASCII")
        raw.ask("Ready", stream=3)
        assert raw.answer(3).status == 0


@pytest.mark.requirement("WORKER-4300")
@pytest.mark.parametrize("lacking", [":method", ":path"])
def test_a_call_without_a_method_or_a_path_is_reset_alone(served: Served, lacking: str) -> None:
    with Raw(served.port) as raw:
        kept = [header for header in call_headers("Ready", metadata=bearer()) if header[0] != lacking]
        raw.write(raw.any_headers(kept))
        assert raw.answer().reset == ErrorCodes.PROTOCOL_ERROR
        raw.ask("Ready", stream=3)
        assert raw.answer(3).status == 0


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [(":method", "GET", "405"), ("content-type", "text/plain", "415"), ("te", "none", "400")],
)
def test_what_is_no_call_of_grpc_is_an_error_of_http(served: Served, name: str, value: str, status: str) -> None:
    with Raw(served.port) as raw:
        headers = [(key, value if key == name else was) for key, was in call_headers("Ready", metadata=bearer())]
        raw.write(raw.any_headers(headers))
        assert raw.answer().headers[":status"] == status
    assert served.worker.calls == 0


# -- frames ------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4305")
def test_frames_and_settings_that_nobody_knows_are_ignored(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.write(frame(0xEE, b"what is this", flags=0xFF, stream=0))
        raw.write(frame(0x0A, b"\x00\x00", stream=1))  # ALTSVC
        raw.write(frame(SETTINGS, b"\xee\xee\x00\x00\x00\x01"))
        raw.ask("Ready")
        assert raw.answer().status == 0


@pytest.mark.requirement("WORKER-4305")
def test_an_empty_frame_within_a_message_is_no_end_of_it(served: Served) -> None:
    message = framed(JOB)
    with Raw(served.port) as raw:
        raw.call("Execute")
        raw.send(message[:3])
        raw.send(b"")
        raw.send(message[3:])
        raw.send(b"", end=True)
        assert raw.answer().status == 0
    assert len(served.worker.executed) == 1


@pytest.mark.requirement("WORKER-4254")
def test_a_client_that_has_said_all_it_had_to_say_still_hears_the_answer(served: Served) -> None:
    with Raw(served.port) as raw:
        raw.call("Execute")
        raw.send(framed(JOB), end=True)  # half-closed from here on
        raw.write(PING_FRAME)
        answer = raw.answer()
    assert answer.status == 0
    assert b"job" in answer.data


@pytest.mark.requirement("WORKER-4305")
@pytest.mark.parametrize(
    "noise",
    [
        frame(0, b"x", stream=0),
        frame(0, b"x", stream=99),
        frame(1, b"\xff\xff\xff", flags=END_HEADERS, stream=1),
        frame(5, b"\x00\x00\x00\x02\x82", flags=END_HEADERS, stream=1),
        frame(8, b"\x00\x00\x00\x00"),
        frame(8, b"\x7f\xff\xff\xff") * 2,
        frame(6, b"short"),
        frame(9, b"\x82", flags=END_HEADERS, stream=1),
        frame(3, b"\x00\x00\x00\x08", stream=99),
        frame(4, b"\x00\x02\x00\x00\x00\x07"),
        frame(0, b"\xff" + b"x", flags=8, stream=1),
    ],
)
def test_a_breach_of_the_protocol_ends_its_connection_and_nobody_elses(
    served: Served, peer: Peer, noise: bytes
) -> None:
    served.worker.script = hang_after(STARTED)
    job = peer.execute()
    next(job)
    with Raw(served.port) as raw:
        raw.write(noise)
        assert raw.read_to_the_end() is not None
    assert not served.worker.closed.is_set()
    assert peer.unary("Ready").ready
    job.cancel()


@pytest.mark.requirement("WORKER-4420")
def test_when_a_connection_is_cut_off_the_log_says_why_and_nothing_of_what_was_sent(
    served: Served, all_log_lines: Callable[[], list[dict[str, object]]]
) -> None:
    with Raw(served.port) as raw:
        raw.write(frame(0xEE, b"secret", size=20_000))
        raw.read_to_the_end()
    (line,) = [line for line in all_log_lines() if line["level"] == "warning"]
    assert line["human"] == "A client's connection was closed: a frame of 20000 bytes; the limit is 16384."
    assert (line["peer"], "secret" in repr(all_log_lines())) == ("127.0.0.1", False)
