"""Execute: what the worker tells becomes events; what goes wrong becomes a status, and an event once it started."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from orcd_jax.engine.request import Ended, Failed, FinishReason, Tokens
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.auth import fingerprint
from orcd_jax.worker.types import Started, WorkerEvent
from tests.server.fake_worker import ENDED, STARTED, STORY, TOKEN, WAIT_S, Served, play
from tests.server.peer import Peer, as_json, details, enum_name, error_detail, failure, outcome

BUSY = OrcdError(ErrorCode.BUSY, "all 4 slots are taken", retry_after_ms=1250)
LOST = OrcdError(ErrorCode.CUDA_ERROR, "the device failed")
SECRET = "the prompt was: hunter2"


@pytest.mark.requirement("WORKER-4240")
def test_a_job_streams_started_tokens_metrics_and_one_end(peer: Peer) -> None:
    events, error = outcome(peer.execute())
    assert error is None
    assert [event.WhichOneof("event") for event in events] == ["started", "token", "metrics", "token", "end"]


@pytest.mark.requirement("WORKER-4247")
def test_started_carries_every_field(served: Served, peer: Peer) -> None:
    served.worker.script = play(STARTED, ENDED)
    (started, _), _ = outcome(peer.execute())
    assert as_json(started.started) == {
        "job_id": "job",
        "model": "tiny",
        "started_at_ms": 1_700_000_000_000,
        "seed": 2**64 - 1,
        "prompt_logprobs": [],
    }


@pytest.mark.requirement("WORKER-4243")
def test_tokens_carry_text_index_and_ids(peer: Peer) -> None:
    events, _ = outcome(peer.execute())
    tokens = [as_json(event.token) for event in events if event.WhichOneof("event") == "token"]
    assert tokens == [
        {"text": "ab", "index": 0, "token_ids": [11, 12], "sample_index": 0, "logprobs": []},
        {"text": "cd", "index": 2, "token_ids": [13, 14], "sample_index": 0, "logprobs": []},
    ]


@pytest.mark.requirement("WORKER-4244")
def test_metrics_carry_every_field(peer: Peer) -> None:
    events, _ = outcome(peer.execute())
    assert as_json(events[2].metrics) == {"tokens_out": 2, "decode_time_ms": 1.5, "vram_bytes": 99}


@pytest.mark.requirement("WORKER-4246")
@pytest.mark.requirement("WORKER-4247")
def test_the_end_carries_every_field_and_the_seed_of_the_job(peer: Peer) -> None:
    events, _ = outcome(peer.execute())
    end = events[-1].end
    assert enum_name(end, "finish_reason") == "FINISH_REASON_STOP"
    assert as_json(end) | {"finish_reason": ""} == {
        "finish_reason": "",
        "tokens_in": 3,
        "tokens_out": 4,
        "decode_time_ms": 5.5,
        "time_to_first_token_ms": 6.5,
        "cached_prompt_tokens": 0,
        "seed": 2**64 - 1,
        "sample_index": 0,
        "receipt_id": "",
    }


@pytest.mark.requirement("WORKER-4246")
@pytest.mark.parametrize("reason", FinishReason)
def test_every_finish_reason_has_its_name_on_the_wire(served: Served, peer: Peer, reason: FinishReason) -> None:
    end = Ended(finish_reason=reason, tokens_in=1, tokens_out=1, decode_time_ms=1, time_to_first_token_ms=1)
    served.worker.script = play(STARTED, end)
    events, _ = outcome(peer.execute())
    assert enum_name(events[-1].end, "finish_reason") == f"FINISH_REASON_{reason.name}"


@pytest.mark.requirement("WORKER-4243")
def test_text_beyond_ascii_and_an_empty_text_arrive_as_they_are(served: Served, peer: Peer) -> None:
    served.worker.script = play(STARTED, Tokens(0, (5,), "é\U0001f600"), Tokens(1, (6,), ""), ENDED)
    events, _ = outcome(peer.execute())
    assert [event.token.text for event in events[1:3]] == ["é\U0001f600", ""]


def test_an_event_larger_than_the_flow_control_window_arrives_whole(served: Served, peer: Peer) -> None:
    served.worker.script = play(STARTED, Tokens(0, (5,), "x" * 3_000_000), ENDED)
    events, error = outcome(peer.execute())
    assert error is None
    assert len(events[1].token.text) == 3_000_000


@pytest.mark.requirement("WORKER-4250")
def test_the_job_belongs_to_the_token_and_the_tenant(served: Served, peer: Peer) -> None:
    outcome(peer.execute(tenant="acme"))
    ((params, owner),) = served.worker.executed
    assert (params.tenant, owner) == ("acme", f"{fingerprint(TOKEN)}/acme")


def test_the_workers_generator_is_closed_when_the_job_is_over(served: Served, peer: Peer) -> None:
    outcome(peer.execute())
    assert served.worker.closed.wait(WAIT_S)


# -- what goes wrong before the start ----------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.requirement("WORKER-4245")
def test_a_job_refused_before_it_started_gets_no_event_only_the_status(served: Served, peer: Peer) -> None:
    served.worker.script = play(BUSY)
    error = failure(peer.execute())
    assert (error.code(), error.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "all 4 slots are taken")


def test_a_job_that_fails_before_it_started_gets_no_event_either(served: Served, peer: Peer) -> None:
    served.worker.script = play(Failed(BUSY))
    assert failure(peer.execute()).code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.requirement("WORKER-4950")
@pytest.mark.requirement("WORKER-4952")
def test_the_status_holds_rich_details(served: Served, peer: Peer) -> None:
    served.worker.script = play(BUSY)
    found = details(failure(peer.execute()))
    assert set(found) == {"orcd.worker.v1.ErrorDetail", "google.rpc.ErrorInfo", "google.rpc.RetryInfo"}
    detail = found["orcd.worker.v1.ErrorDetail"]
    assert enum_name(detail, "code") == "ERROR_CODE_BUSY"
    assert (detail.message, detail.retriable, detail.retry_after_ms) == ("all 4 slots are taken", True, 1250)
    info = found["google.rpc.ErrorInfo"]
    assert (info.reason, info.domain, dict(info.metadata)) == ("BUSY", "orcd.worker.v1", {})
    delay = found["google.rpc.RetryInfo"].retry_delay
    assert (delay.seconds, delay.nanos) == (1, 250_000_000)


def test_without_a_time_to_retry_there_is_no_retry_info(served: Served, peer: Peer) -> None:
    served.worker.script = play(LOST)
    found = details(failure(peer.execute()))
    assert "google.rpc.RetryInfo" not in found
    assert not found["orcd.worker.v1.ErrorDetail"].HasField("retry_after_ms")


@pytest.mark.requirement("WORKER-4952")
def test_the_field_at_fault_is_in_both_details(served: Served, peer: Peer) -> None:
    served.worker.script = play(OrcdError(ErrorCode.NOT_FOUND, "no such handle", field="handle_id"))
    found = details(failure(peer.execute()))
    assert found["orcd.worker.v1.ErrorDetail"].field == "handle_id"
    assert dict(found["google.rpc.ErrorInfo"].metadata) == {"field": "handle_id"}


# -- what goes wrong after it ------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.requirement("WORKER-4245")
@pytest.mark.parametrize("how", [Failed(LOST), LOST], ids=["told", "raised"])
def test_a_job_that_fails_after_it_started_gets_an_error_event_and_the_same_status(
    served: Served, peer: Peer, how: WorkerEvent | Exception
) -> None:
    served.worker.script = play(*STORY[:2], how)
    events, error = outcome(peer.execute())
    assert [event.WhichOneof("event") for event in events] == ["started", "token", "error"]
    assert error is not None
    assert error.code() is grpc.StatusCode.INTERNAL
    assert events[-1].error == error_detail(error)
    assert events[-1].error.message == "the device failed"


@pytest.mark.requirement("WORKER-4253")
def test_nothing_follows_an_error(served: Served, peer: Peer) -> None:
    served.worker.script = play(STARTED, Failed(LOST), *STORY[1:])
    events, _ = outcome(peer.execute())
    assert [event.WhichOneof("event") for event in events] == ["started", "error"]


@pytest.mark.requirement("WORKER-4253")
def test_nothing_follows_the_end(served: Served, peer: Peer) -> None:
    served.worker.script = play(*STORY, Tokens(4, (15,), "late"))
    events, error = outcome(peer.execute())
    assert error is None
    assert events[-1].WhichOneof("event") == "end"


@pytest.mark.requirement("WORKER-4240")
def test_a_job_that_just_stops_ends_with_an_error_all_the_same(served: Served, peer: Peer) -> None:
    served.worker.script = play(*STORY[:2])
    events, error = outcome(peer.execute())
    assert events[-1].WhichOneof("event") == "error"
    assert error is not None
    assert error.code() is grpc.StatusCode.INTERNAL


@pytest.mark.requirement("WORKER-4952")
@pytest.mark.parametrize("before", [(), (STARTED,)], ids=["before it started", "after it started"])
def test_a_bug_in_the_worker_is_internal_and_tells_nothing(
    served: Served,
    peer: Peer,
    before: tuple[Started, ...],
    log_lines: Callable[[], list[dict[str, object]]],
) -> None:
    served.worker.script = play(*before, ValueError(SECRET))
    events, error = outcome(peer.execute())
    assert [event.WhichOneof("event") for event in events] == ["started", "error"][: len(before) * 2]
    assert error is not None
    assert (error.code(), error.details()) == (grpc.StatusCode.INTERNAL, "internal error")
    assert enum_name(error_detail(error), "code") == "ERROR_CODE_INTERNAL"
    (line,) = log_lines()
    assert (line["event"], line["code"]) == ("error", "INTERNAL")
    assert "fake_worker.py" in str(line["where"])
    assert SECRET not in f"{events}{error}{error.trailing_metadata()}{line}"


def test_a_bug_in_an_answer_is_internal_and_tells_nothing(served: Served, peer: Peer) -> None:
    served.worker.question_error = ValueError(SECRET)
    with pytest.raises(grpc.RpcError) as caught:
        peer.unary("Ready")
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.INTERNAL, "internal error")
