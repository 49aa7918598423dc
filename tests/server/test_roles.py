"""Two roles with tokens of their own: control loads, inspects and ends the worker; execute runs jobs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import grpc
import pytest

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server.admission import METHOD_ROLES, OPEN_METHODS, AuthOutcome, AuthResult, roles_for
from orcd_jax.server.auth import Access, Role, Tokens, fingerprint
from orcd_jax.server.limits import Limits
from tests.server.fake_worker import CONTROL_TOKEN, OTHER_TOKEN, TOKEN, Served, serving
from tests.server.peer import SERVICE, Metadata, Peer, bearer, enum_name, error_detail, outcome

CONTROL = {"Plan", "Commit", "Drain", "Shutdown", "Attest", "GetStatus"}
EXECUTE = {"Execute", "Cancel", "Tokenize", "Detokenize", "GetReceipt"}
REFLECTION = [f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" for version in ("v1", "v1alpha")]


def path(method: str) -> str:
    return f"/{SERVICE.full_name}/{method}"


def code_of(peer: Peer, called: str, metadata: Metadata) -> grpc.StatusCode:
    """How a call with a body that no method takes ends: INVALID_ARGUMENT is past the door."""
    return peer.refusal_of(called, metadata=metadata, body=b"\xff").code()


@pytest.mark.requirement("WORKER-4200")
def test_every_method_is_in_the_table() -> None:
    methods = {path(method.name) for method in SERVICE.methods} | set(REFLECTION) | OPEN_METHODS
    assert methods == set(METHOD_ROLES) | OPEN_METHODS
    assert not set(METHOD_ROLES) & OPEN_METHODS


@pytest.mark.requirement("WORKER-4200")
def test_everything_that_is_served_is_in_the_table(served: Served) -> None:
    assert set(served.server.gate) == set(METHOD_ROLES) | OPEN_METHODS


@pytest.mark.requirement("WORKER-4200")
def test_a_method_that_nobody_thought_of_is_for_control() -> None:
    assert roles_for(path("Reboot")) == {Role.CONTROL}


@pytest.mark.requirement("WORKER-4200")
@pytest.mark.parametrize("method", sorted(CONTROL | EXECUTE))
def test_a_method_opens_to_its_role_and_to_no_other(served: Served, peer: Peer, method: str) -> None:
    fitting, other = (CONTROL_TOKEN, TOKEN) if method in CONTROL else (TOKEN, CONTROL_TOKEN)
    assert code_of(peer, path(method), bearer(fitting)) is grpc.StatusCode.INVALID_ARGUMENT
    assert code_of(peer, path(method), bearer(other)) is grpc.StatusCode.PERMISSION_DENIED
    assert code_of(peer, path(method), ()) is grpc.StatusCode.UNAUTHENTICATED
    assert served.worker.calls == 0


@pytest.mark.requirement("WORKER-4200")
@pytest.mark.parametrize("token", [TOKEN, OTHER_TOKEN, CONTROL_TOKEN])
def test_ready_and_reflection_open_to_either_role(peer: Peer, token: str) -> None:
    assert peer.unary("Ready", metadata=bearer(token)).ready
    for called in REFLECTION:
        assert code_of(peer, called, bearer(token)) is grpc.StatusCode.INVALID_ARGUMENT
        assert code_of(peer, called, ()) is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.requirement("WORKER-4200")
def test_the_wrong_role_is_told_which_one_is_needed_and_where_its_tokens_are(peer: Peer) -> None:
    error = peer.refusal_of(path("Shutdown"), metadata=bearer(TOKEN))
    assert enum_name(error_detail(error), "code") == "ERROR_CODE_POLICY_VIOLATION"
    assert error.details() == (
        "Shutdown is for the control role; this token is for execute: use a token of --control_token_file"
    )
    error = peer.refusal_of(path("Execute"), metadata=bearer(CONTROL_TOKEN))
    assert error.details() == (
        "Execute is for the execute role; this token is for control: use a token of --api_token_file"
    )


@pytest.fixture
def without_control() -> Iterator[Served]:
    """A server that was started without a file of control tokens."""
    with serving(access=Access({Role.EXECUTE: Tokens([TOKEN])})) as started:
        yield started


@pytest.mark.requirement("WORKER-4200")
@pytest.mark.parametrize("method", sorted(CONTROL))
def test_without_control_tokens_nobody_has_the_role_and_is_told_so(without_control: Served, method: str) -> None:
    with Peer(without_control.port) as peer:
        error = peer.refusal_of(path(method), metadata=bearer(TOKEN))
        assert error.code() is grpc.StatusCode.PERMISSION_DENIED
        assert error.details().endswith("was started without --control_token_file, so nobody can call it")
        error = peer.refusal_of(path(method), metadata=bearer(CONTROL_TOKEN))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert "control" not in error.details()
    assert not without_control.shutdown.is_set()


@pytest.mark.requirement("WORKER-4200")
def test_tokens_of_one_role_alone_are_execute_tokens() -> None:
    with serving(access=Tokens([TOKEN])) as started, Peer(started.port) as peer:
        assert peer.unary("Tokenize", metadata=bearer(TOKEN)).token_ids == []
        assert code_of(peer, path("Drain"), bearer(TOKEN)) is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.requirement("WORKER-4230")
@pytest.mark.requirement("WORKER-4232")
def test_ready_may_be_opened_and_nothing_else_is_opened_with_it() -> None:
    with serving(open_ready=True, limits=Limits(auth_failures=100)) as started, Peer(started.port) as peer:
        assert peer.unary("Ready", metadata=()).ready
        assert peer.unary("Ready", metadata=bearer("wrong" * 10)).ready
        for method in sorted(CONTROL | EXECUTE):
            assert code_of(peer, path(method), ()) is grpc.StatusCode.UNAUTHENTICATED


# -- what others are told ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4160")
def test_every_outcome_is_told_for_the_audit_and_no_token_with_it() -> None:
    told: list[AuthOutcome] = []
    named = ("x-correlation-id", "c-1")
    with serving(on_auth=told.append) as started, Peer(started.port) as peer:
        peer.unary("Ready", metadata=(*bearer(TOKEN), named))
        code_of(peer, path("Drain"), (*bearer(TOKEN), named))
        code_of(peer, path("Execute"), (*bearer("x" * 32), named))
        code_of(peer, "/some\x7fthing/Else", (*bearer(TOKEN), named))
        peer.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
    execute, here = fingerprint(TOKEN), "127.0.0.1"
    assert told == [
        AuthOutcome(AuthResult.OK, path("Ready"), here, execute, "c-1"),
        AuthOutcome(AuthResult.FORBIDDEN, path("Drain"), here, execute, "c-1"),
        AuthOutcome(AuthResult.FAILED, path("Execute"), here, "", "c-1"),
        AuthOutcome(AuthResult.OK, "unknown", here, execute, "c-1"),  # not what a client wrote
    ]
    assert TOKEN not in repr(told)


@pytest.mark.requirement("WORKER-4202")
@pytest.mark.requirement("WORKER-4820")
@pytest.mark.parametrize(
    ("method", "level"),
    [("Execute", "info"), ("GetStatus", "info"), ("Shutdown", "info"), ("Ready", "debug"), ("Tokenize", "debug")],
)
def test_each_call_with_a_token_leaves_a_line_with_its_fingerprint(
    peer: Peer, all_log_lines: Callable[[], list[dict[str, object]]], method: str, level: str
) -> None:
    token = CONTROL_TOKEN if method in CONTROL else TOKEN
    metadata = (*bearer(token), ("x-correlation-id", "c-1"))
    if method == "Execute":
        outcome(peer.execute(metadata=metadata))
    else:
        peer.unary(method, metadata=metadata)
    (line,) = [line for line in all_log_lines() if line["event"] == "request"]
    name = fingerprint(token)
    assert line["level"] == level
    assert (line["method"], line["token_fingerprint"], line["correlation_id"]) == (method, name, "c-1")
    assert line["human"] == f"The holder of token {name} calls {method}."
    assert token not in repr(all_log_lines())


def test_a_call_without_a_token_leaves_no_such_line(
    peer: Peer, all_log_lines: Callable[[], list[dict[str, object]]]
) -> None:
    code_of(peer, path("Execute"), bearer("x" * 32))
    peer.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=10)
    assert [line for line in all_log_lines() if line["event"] == "request"] == []


# -- identity ----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4253")
def test_a_job_belongs_to_token_and_tenant(served: Served, peer: Peer) -> None:
    for token, tenant in [(TOKEN, ""), (TOKEN, "acme"), (OTHER_TOKEN, "acme")]:
        outcome(peer.execute(metadata=bearer(token), tenant=tenant))
    owners = [owner for _, owner in served.worker.executed]
    assert owners == [f"{fingerprint(TOKEN)}/", f"{fingerprint(TOKEN)}/acme", f"{fingerprint(OTHER_TOKEN)}/acme"]


def test_roles_may_not_share_a_token() -> None:
    with pytest.raises(OrcdError) as caught:
        Access({Role.EXECUTE: Tokens([TOKEN, OTHER_TOKEN]), Role.CONTROL: Tokens([OTHER_TOKEN])})
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_PARAMS, "control_token_file")
    assert OTHER_TOKEN not in caught.value.message
