"""What a worker can run is derived from its code, and a model's needs are compared with it before anything is read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from orcd_jax.checkpoint.manifest import ModelCapabilities, read_manifest
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import ATTENTION, MODELS, POSITIONAL
from orcd_jax.worker.capability import SUPPORTED, check_capabilities
from orcd_jax.worker.types import CommitParams, PlanParams
from tests.worker.running import Running, config_of

NEEDS = ModelCapabilities(
    model_id="m",
    architecture="mamba",
    positional="absolute",
    attention="mla",
    quant="int3",
    context_max=8,
    vocab_size=9,
    tokenizer="wordpiece",
)


@pytest.mark.requirement("WORKER-4611")
def test_the_profile_is_what_the_registry_holds(running: Running) -> None:
    profile = running.worker.ready().capabilities
    assert set(profile.architectures) == set(MODELS) == set(SUPPORTED.architectures)
    assert profile.positional == POSITIONAL
    assert profile.attention == ATTENTION


@pytest.mark.requirement("WORKER-4620")
@pytest.mark.requirement("WORKER-4621")
def test_every_mismatch_is_listed_at_once_and_the_same_each_time() -> None:
    messages = set()
    for _ in range(3):
        with pytest.raises(OrcdError) as caught:
            check_capabilities(NEEDS)
        assert caught.value.code is ErrorCode.CAPABILITY_MISMATCH
        messages.add(caught.value.message)
    (message,) = messages
    wanted = ("architecture mamba", "positional absolute", "attention mla", "quant int3", "tokenizer wordpiece")
    assert all(f"requires {one}; this worker has " in message for one in wanted)


@pytest.mark.requirement("WORKER-4003")
def test_plan_and_commit_compare_before_a_file_is_read(tiny_checkpoint: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(tiny_checkpoint, other)
    manifest = json.loads((other / "manifest.json").read_text())
    manifest["model"]["attention"] = "mla"  # under no digest: a claim, which is compared first
    (other / "manifest.json").write_text(json.dumps(manifest))
    shutil.rmtree(other / "arrays")
    assert read_manifest(other).model.attention == "mla"
    awaiting = Running(config_of(other, await_commit=True))
    awaiting.run(awaiting.worker.start())
    info = awaiting.run(awaiting.worker.plan(PlanParams()))
    assert info.reasons[0].code is ErrorCode.CAPABILITY_MISMATCH
    assert info.memory is not None, "all else is told, too"

    async def commit() -> None:
        async for _ in awaiting.worker.commit(CommitParams(plan=PlanParams())):
            pass

    with pytest.raises(OrcdError) as caught:
        awaiting.run(commit())
    assert caught.value.code is ErrorCode.CAPABILITY_MISMATCH
    assert "mla" in caught.value.message
    awaiting.close()
