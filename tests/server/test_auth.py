"""Default deny: nothing but health checks is answered without a token, whatever is added to the service."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from orcd_jax.server.limits import Limits
from tests.server.fake_worker import OTHER_TOKEN, TOKEN, WAIT_S, Served, serving
from tests.server.peer import SERVICE, Metadata, Peer, bearer, details, enum_name, outcome

NAMED = ("x-correlation-id", "of-this-test")

METHODS = [f"/{SERVICE.full_name}/{method.name}" for method in SERVICE.methods]
CLOSED = [
    *METHODS,
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.health.v1.Health/List",
    "/orcd.worker.v1.Worker/Nothing",
    "/nothing.at.All/Is",
    "/grpc.health.v1.Health/Check/",
    "/",
]
REFUSED: dict[str, Metadata] = {
    "no token": (),
    "a wrong token": bearer("x" * 32),
    "a part of the token": bearer(TOKEN[:-1]),
    "more than the token": bearer(TOKEN + "t"),
    "the token in capitals": bearer(TOKEN.upper()),
    "no scheme": (("authorization", TOKEN),),
    "another scheme": (("authorization", f"Basic {TOKEN}"),),
    "an empty token": (("authorization", "Bearer "),),
    "an empty header": (("authorization", ""),),
    "both tokens in one header": (("authorization", f"Bearer {TOKEN} {OTHER_TOKEN}"),),
    "two headers": (*bearer(), *bearer(OTHER_TOKEN)),
    "the same header twice": (*bearer(), *bearer()),
    "another header": (("x-authorization", f"Bearer {TOKEN}"),),
}


@pytest.fixture
def served() -> Iterator[Served]:
    """A server that does not count failures, unless a million come."""
    with serving(limits=Limits(auth_failures=1e6)) as started:
        yield started


@pytest.mark.requirement("WORKER-4200")
@pytest.mark.requirement("WORKER-4203")
@pytest.mark.parametrize("metadata", REFUSED.values(), ids=REFUSED.keys())
def test_every_method_there_is_or_not_refuses_a_call_without_a_valid_token(
    served: Served, peer: Peer, metadata: Metadata
) -> None:
    for path in CLOSED:
        error = peer.refusal_of(path, metadata=metadata)
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED, path
    assert served.worker.calls == 0


def test_the_refusal_tells_what_to_send_and_not_what_was_wrong(peer: Peer) -> None:
    errors = [peer.refusal_of(METHODS[0], metadata=(*metadata, NAMED)) for metadata in REFUSED.values()]
    assert len({(error.details(), tuple(error.trailing_metadata())) for error in errors}) == 1
    assert "authorization: Bearer" in errors[0].details()
    assert enum_name(details(errors[0])["orcd.worker.v1.ErrorDetail"], "code") == "ERROR_CODE_AUTH_FAILED"


def test_the_token_is_asked_for_before_the_message_is_read(served: Served, peer: Peer) -> None:
    for path in METHODS:
        assert peer.refusal_of(path, metadata=(), body=b"\xff").code() is grpc.StatusCode.UNAUTHENTICATED
    assert served.worker.calls == 0


@pytest.mark.requirement("WORKER-4201")
@pytest.mark.parametrize("token", [TOKEN, OTHER_TOKEN])
def test_either_token_of_a_rotation_opens_the_worker(peer: Peer, token: str) -> None:
    events, error = outcome(peer.execute(metadata=bearer(token)))
    assert error is None
    assert len(events) == 5


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
def test_the_scheme_is_not_case_sensitive(peer: Peer, scheme: str) -> None:
    assert peer.unary("Ready", metadata=(("authorization", f"{scheme} {TOKEN}"),)).ready


@pytest.mark.requirement("WORKER-4200")
def test_health_is_checked_and_watched_without_a_token(peer: Peer) -> None:
    not_serving = b"\x08\x02"  # field 1, the status: 2
    assert peer.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=WAIT_S) == not_serving
    watch = peer.channel.unary_stream("/grpc.health.v1.Health/Watch")(b"", timeout=WAIT_S)
    assert next(watch) == not_serving
    watch.cancel()


@pytest.mark.parametrize(
    "path", ["/orcd.worker.v1.Worker/Nothing", "/nothing.at.All/Is", "/grpc.health.v1.Health/List"]
)
def test_with_a_token_an_unknown_method_is_unimplemented(peer: Peer, path: str) -> None:
    assert peer.refusal_of(path, metadata=bearer()).code() is grpc.StatusCode.UNIMPLEMENTED
