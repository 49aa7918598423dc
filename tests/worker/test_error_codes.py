"""Every error code is provoked for real: by a request, a model, or a device that fails."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.checkpoint.restore import restore
from orcd_jax.engine.request import Failed
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server import auth
from orcd_jax.worker.types import CommitParams, PlanParams
from tests.residency.bitflip import flip_bit
from tests.worker.running import BrokenDecode, LongJob, Running, config_of, job, long_job, outcome, refusal

pytestmark = pytest.mark.requirement("WORKER-4950")

Provoke = Callable[["Scene"], ErrorCode | None]


class Scene:
    """A worker that serves, its checkpoint, and what a test may break."""

    def __init__(self, fresh: Running, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.running, self.checkpoint, self.monkeypatch = fresh, checkpoint, monkeypatch

    def refused(self, **changes: object) -> ErrorCode:
        return refusal(self.running, job("a", **changes)).code

    def after_start(self, **flags: str) -> ErrorCode:
        other = Running(config_of(self.checkpoint, **flags))
        with pytest.raises(OrcdError) as caught:
            other.run(other.worker.start())
        other.close()
        return caught.value.code

    def when_the_device_says(self, text: str) -> ErrorCode:
        broken = BrokenDecode(self.running, self.monkeypatch, jax.errors.JaxRuntimeError(text))
        held = LongJob(self.running, long_job("a"))
        broken.failing.set()
        ended = held.end()
        assert isinstance(ended, Failed)
        return ended.error.code


def auth_failed(scene: Scene) -> ErrorCode:
    with pytest.raises(OrcdError) as caught:
        auth.Tokens(["t" * 32]).authenticate(["Bearer " + "x" * 32])
    return caught.value.code


def host_oom(scene: Scene) -> ErrorCode:
    with pytest.raises(OrcdError) as caught:
        restore(scene.checkpoint, read_manifest(scene.checkpoint), jax.devices()[0], staging_bytes=64)
    return caught.value.code


def not_ready(scene: Scene) -> ErrorCode:
    scene.running.run(scene.running.worker.drain(0.0))
    return scene.refused()


def seal_broken(scene: Scene) -> ErrorCode:
    sealed = scene.running.worker.sealed
    assert sealed is not None
    flip_bit(sealed.resident.params["embed"], 3)
    error = scene.running.run(scene.running.worker.wait_failed())
    flip_bit(sealed.resident.params["embed"], 3)
    return error.code


def policy(scene: Scene) -> ErrorCode:
    async def commit_elsewhere() -> None:
        async for _ in scene.running.worker.commit(CommitParams(plan=PlanParams(model_ref="file:/etc"))):
            pass

    with pytest.raises(OrcdError) as caught:
        scene.running.run(commit_elsewhere())
    return caught.value.code


def capability(scene: Scene) -> ErrorCode:
    info = scene.running.run(scene.running.worker.plan(PlanParams(layout="tensor_parallel", tp_degree=4)))
    return info.reasons[0].code


def busy(scene: Scene) -> ErrorCode:
    held = [LongJob(scene.running, long_job(f"b{number}")) for number in range(2)]
    code = scene.refused()
    for one in held:
        one.abandon()
    return code


def cancelled(scene: Scene) -> ErrorCode:
    held = LongJob(scene.running, long_job("c"))
    assert scene.running.run(scene.running.worker.cancel("c", "o"))
    ended = held.end()
    assert isinstance(ended, Failed)
    return ended.error.code


def internal(scene: Scene) -> ErrorCode:
    broken = BrokenDecode(scene.running, scene.monkeypatch, RuntimeError("a bug"))
    held = LongJob(scene.running, long_job("a"))
    broken.failing.set()
    ended = held.end()
    assert isinstance(ended, Failed)
    assert "a bug" not in ended.error.message
    return ended.error.code


PROVOKE: dict[ErrorCode, Provoke] = {
    ErrorCode.INVALID_PARAMS: lambda scene: scene.refused(prompt=(0, 10_000)),
    ErrorCode.AUTH_FAILED: auth_failed,
    ErrorCode.NOT_FOUND: lambda scene: scene.refused(handle_id="h-other"),
    ErrorCode.NOT_READY: not_ready,
    ErrorCode.MODEL_LOAD_FAILED: lambda scene: scene.after_start(expected_digest="0" * 64),
    ErrorCode.INSUFFICIENT_VRAM: lambda scene: scene.after_start(emulated_memory="4096"),
    ErrorCode.VRAM_OOM: lambda scene: scene.when_the_device_says("RESOURCE_EXHAUSTED: out of memory"),
    ErrorCode.HOST_OOM: host_oom,
    ErrorCode.SEAL_VERIFICATION_FAILED: seal_broken,
    ErrorCode.POLICY_VIOLATION: policy,
    ErrorCode.CAPABILITY_MISMATCH: capability,
    ErrorCode.BUSY: busy,
    ErrorCode.TIMEOUT: lambda scene: scene.running.run(outcome(scene.running.worker, long_job("t", timeout_ms=1))),
    ErrorCode.CANCELLED: cancelled,
    ErrorCode.CUDA_ERROR: lambda scene: scene.when_the_device_says("INTERNAL: an illegal address"),
    ErrorCode.INTERNAL: internal,
}
CHANGES_THE_WORKER = {
    ErrorCode.NOT_READY,
    ErrorCode.VRAM_OOM,
    ErrorCode.SEAL_VERIFICATION_FAILED,
    ErrorCode.CUDA_ERROR,
    ErrorCode.INTERNAL,
}


def test_no_code_is_left_out() -> None:
    assert set(PROVOKE) == set(ErrorCode)


@pytest.mark.parametrize("code", sorted(set(ErrorCode) - CHANGES_THE_WORKER))
def test_a_code_that_leaves_the_worker_as_it_was(
    running: Running, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, code: ErrorCode
) -> None:
    assert PROVOKE[code](Scene(running, tiny_checkpoint, monkeypatch)) is code
    assert running.worker.lifecycle.serving


@pytest.mark.parametrize("code", sorted(CHANGES_THE_WORKER))
def test_a_code_that_does_not(
    fresh: Running, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, code: ErrorCode
) -> None:
    assert PROVOKE[code](Scene(fresh, tiny_checkpoint, monkeypatch)) is code
