"""What every gRPC tool knows how to ask: is it well, and what does it speak?"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from orcd_jax.worker.lifecycle import State
from tests.server.fake_worker import TOKEN, WAIT_S, Served
from tests.server.peer import SERVICE, descriptor

WORKER = SERVICE.full_name
_ROOT = Path(__file__).parents[2]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "tests.server.official_client", *map(str, arguments)]


def official(*arguments: object) -> str:
    """What the official client prints."""
    done = subprocess.run(
        command(*arguments), cwd=_ROOT, capture_output=True, text=True, timeout=WAIT_S * 2, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@contextlib.contextmanager
def watching(served: Served, service: str) -> Iterator[IO[str]]:
    """The statuses that an official client sees, a line each."""
    with subprocess.Popen(
        command("watch", served.port, service), cwd=_ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout
        finally:
            process.kill()


@pytest.mark.requirement("WORKER-4257")
@pytest.mark.parametrize("service", ["", WORKER])
def test_a_worker_that_is_not_ready_is_not_serving(served: Served, service: str) -> None:
    assert official("check", served.port, service) == "NOT_SERVING"


@pytest.mark.requirement("WORKER-4257")
@pytest.mark.parametrize("service", ["", WORKER])
def test_a_worker_that_is_ready_or_busy_is_serving(served: Served, service: str) -> None:
    served.move(State.LOADING, State.READY, State.EXECUTING)
    assert official("check", served.port, service) == "SERVING"


def test_a_check_of_an_unknown_service_is_not_found(served: Served) -> None:
    assert official("check", served.port, "some.Service") == "NOT_FOUND"


def test_a_watch_of_an_unknown_service_says_so(served: Served) -> None:
    with watching(served, "some.Service") as statuses:
        assert statuses.readline() == "SERVICE_UNKNOWN\n"


@pytest.mark.requirement("WORKER-4257")
@pytest.mark.requirement("WORKER-4970")
@pytest.mark.parametrize("service", ["", WORKER])
def test_a_watch_follows_the_lifecycle(served: Served, service: str) -> None:
    with watching(served, service) as statuses:
        assert statuses.readline() == "NOT_SERVING\n"
        served.move(State.LOADING, State.READY)
        assert statuses.readline() == "SERVING\n"
        served.move(State.EXECUTING, State.READY, State.DRAINING)  # working is no change of health
        assert statuses.readline() == "NOT_SERVING\n"


@pytest.mark.requirement("WORKER-4257")
@pytest.mark.requirement("WORKER-4996")
def test_the_official_reflection_client_learns_the_whole_contract(served: Served) -> None:
    told = json.loads(official("reflect", served.port, TOKEN))
    assert told["services"] == ["grpc.health.v1.Health", WORKER]
    assert told["methods"] == {
        method.name: [method.input_type.name, method.output_type.name] for method in SERVICE.methods
    }
    assert told["fields"] == [field.name for field in descriptor("ExecuteRequest").fields]
    assert told["status"] == ["code", "message", "details"]
    assert told["retry"] == "google.protobuf.Duration"
    assert told["health"] == ["Check", "Watch"]
