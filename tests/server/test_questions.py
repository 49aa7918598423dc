"""Ready, GetStatus, Tokenize, Detokenize: answers carry everything the worker tells, and nothing is forgotten."""

from __future__ import annotations

import dataclasses
from typing import Any

import grpc
import pytest

from orcd_jax.worker import types
from orcd_jax.worker.lifecycle import State
from tests.server.fake_worker import CAPABILITIES, HANDLE, STATUS, Served
from tests.server.peer import PACKAGE, POOL, Peer, as_json, descriptor, enum_name, error_detail, message

# Fields of answers that nothing in the worker tells yet.
NOT_YET = {
    "ReadyResponse": {"collective_group_id", "identity_public_key"},
    "GetStatusResponse": {"cuda_version", "driver_version"},
}


@pytest.mark.parametrize(
    ("told", "answer"),
    [
        (types.ReadyInfo, "ReadyResponse"),
        (types.Handle, "ModelShardHandle"),
        (types.EngineCapabilities, "EngineCapabilityProfile"),
        (types.StatusInfo, "GetStatusResponse"),
    ],
)
def test_what_the_worker_tells_and_what_the_contract_answers_have_the_same_fields(told: Any, answer: str) -> None:
    assert {field.name for field in dataclasses.fields(told)} | NOT_YET.get(answer, set()) == {
        field.name for field in descriptor(answer).fields
    }


@pytest.mark.requirement("WORKER-4230")
def test_ready_tells_state_and_age_of_the_digest(peer: Peer) -> None:
    answer = peer.unary("Ready")
    assert answer.ready is True
    assert enum_name(answer, "state") == "WORKER_STATE_EXECUTING"
    assert answer.last_digest_age_ms == 15


@pytest.mark.requirement("WORKER-4110")
def test_ready_tells_every_field_of_a_handle(peer: Peer) -> None:
    (handle,) = peer.unary("Ready").handles
    assert as_json(handle) == dataclasses.asdict(HANDLE)


@pytest.mark.requirement("WORKER-4610")
def test_ready_tells_every_capability(peer: Peer) -> None:
    told = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(CAPABILITIES).items()
    }
    assert as_json(peer.unary("Ready").capabilities) == told


@pytest.mark.requirement("WORKER-4257")
def test_the_status_tells_every_field(peer: Peer) -> None:
    answer = peer.unary("GetStatus")
    assert enum_name(answer, "status") == "WORKER_STATUS_BUSY"
    assert enum_name(answer, "state") == "WORKER_STATE_EXECUTING"
    numbers = {"status": answer.status, "state": answer.state, "cuda_version": "", "driver_version": ""}
    assert as_json(answer) == dataclasses.asdict(STATUS) | numbers


def test_every_state_and_every_status_word_is_in_the_contract() -> None:
    states = {value.name for value in POOL.FindEnumTypeByName(f"{PACKAGE}.WorkerState").values}
    assert states == {"WORKER_STATE_UNSPECIFIED"} | {f"WORKER_STATE_{state}" for state in State}
    status_words = {"UNSPECIFIED", "STARTING", "READY", "BUSY", "DRAINING", "FAILED"}
    words = {value.name for value in POOL.FindEnumTypeByName(f"{PACKAGE}.WorkerStatus").values}
    assert words == {f"WORKER_STATUS_{word}" for word in status_words}


# -- Tokenize, Detokenize ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("add_special", "given"), [(None, True), (True, True), (False, False)])
def test_special_tokens_are_added_unless_refused(
    served: Served, peer: Peer, add_special: bool | None, given: bool
) -> None:
    fields = {} if add_special is None else {"add_special": add_special}
    answer = peer.unary("Tokenize", message("TokenizeRequest", text="ab", **fields))
    assert list(answer.token_ids) == [97, 98]
    assert served.worker.tokenized == [("ab", given)]


def test_a_text_of_the_largest_size_and_an_empty_one_are_tokenized(peer: Peer) -> None:
    assert len(peer.unary("Tokenize", message("TokenizeRequest", text="x" * 100)).token_ids) == 100
    assert len(peer.unary("Tokenize", message("TokenizeRequest")).token_ids) == 0


def test_ids_become_text(served: Served, peer: Peer) -> None:
    assert peer.unary("Detokenize", message("DetokenizeRequest", token_ids=[104, 105])).text == "hi"
    assert served.worker.detokenized == [(104, 105)]


def test_the_largest_id_of_the_vocabulary_and_the_most_ids_pass(peer: Peer) -> None:
    assert peer.unary("Detokenize", message("DetokenizeRequest", token_ids=[999])).text == "\u03e7"
    assert len(peer.unary("Detokenize", message("DetokenizeRequest", token_ids=[65] * 2**20)).text) == 2**20


@pytest.mark.parametrize(
    ("method", "fields", "named"),
    [
        ("Tokenize", {"text": "x" * 101}, "text"),
        ("Tokenize", {"text": "a\0"}, "text"),
        ("Detokenize", {"token_ids": [1000]}, "token_ids"),
        ("Detokenize", {"token_ids": [1] * (2**20 + 1)}, "token_ids"),
    ],
)
def test_what_is_beyond_the_limits_is_refused_by_name(
    served: Served, peer: Peer, method: str, fields: dict[str, Any], named: str
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        peer.unary(method, message(f"{method}Request", **fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_detail(caught.value).field == named
    assert served.worker.calls == 0
