"""Whatever Commit would refuse, Plan says before, in the same words; and what Plan calls feasible loads."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orcd_jax.checkpoint.manifest import read_manifest, read_manifest_bytes, tensor_bytes
from orcd_jax.checkpoint.signature import PublicKey, sign_manifest
from orcd_jax.engine.request import Ended
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.keys import IdentityKey
from orcd_jax.worker import commits as commits_module
from orcd_jax.worker.lifecycle import State
from orcd_jax.worker.loader import ResidentModel, load
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import CommitParams, PlanParams
from tests.checkpoint.tiny import edit_manifest
from tests.conftest import PLATFORM
from tests.worker.running import WAIT_S, HeldLoad, Running, commit_of, config_of, events_of, job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.requirement("WORKER-4213"),
    pytest.mark.skipif(PLATFORM != "cpu", reason="a simulated device; the real one is in test_sealed_gpu"),
]

Json = dict[str, Any]
Edit = Callable[[Json], object]
KEY = Ed25519PrivateKey.generate()
TRUSTED = (PublicKey(KEY.public_key()),)
CASES = 40
"""One in six is feasible, and then really loaded: that compiles for seconds."""


def without(name: str) -> Edit:
    return lambda m: m.update(files=[file for file in m["files"] if file["path"] != name])


def whole(m: Json) -> None:
    """Takes a tensor that is cut for a tensor-parallel split as one piece."""
    next(tensor for tensor in m["tensors"] if tensor["shards"] > 1).update(shard_axis=None, shards=1)


def enlarged(name: str) -> Edit:
    return lambda m: next(file for file in m["files"] if file["path"] == name).update(size_bytes=2**40)


EDITS: dict[str, tuple[Edit, str]] = {
    "a tensor too few": (lambda m: m["tensors"].pop(0), "lists other tensors than its configuration has, embed"),
    "a tensor of another shape": (lambda m: m["tensors"][0]["shape"].reverse(), "lists other tensors"),
    "a tensor that cannot be proved": (lambda m: m["tensors"][-1].update(shape=[2**31]), "at most"),
    "another shard grid": (whole, "lists other tensors"),
    "another architecture": (lambda m: m["model"].update(architecture="mamba"), "requires architecture mamba"),
    "a false description": (lambda m: m["model"].update(attention="mha"), "describes another model"),
    "another tokenizer than it says": (lambda m: m["tokenizer"].update(kind="sentencepiece"), "describes another"),
    "no tokenizer": (without("tokenizer.json"), "lists no tokenizer.json"),
    "a tokenizer without end": (enlarged("tokenizer.json"), "tokenizer.json has 1099511627776 bytes"),
    "a template without end": (enlarged("chat_template.jinja"), "chat_template.jinja has 1099511627776 bytes"),
}
"""What is wrong with a manifest that has the digest of its own content, and what is said of it."""


def changed(checkpoint: Path, folder: Path, edit: Edit) -> Path:
    copy = shutil.copytree(checkpoint, folder / "changed")
    edit_manifest(copy, edit)
    return copy


def signature_of(checkpoint: Path) -> bytes:
    return sign_manifest(IdentityKey(KEY), read_manifest_bytes(checkpoint))


@dataclass(kw_only=True)
class Case:
    """A worker that awaits its Commit, and what is asked of it."""

    checkpoint: Path
    wishes: Json = field(default_factory=dict)
    flags: dict[str, str | bool] = field(default_factory=dict)
    staging_bytes: int | None = None
    signature: bytes = b""

    def start(self) -> Running:
        config = config_of(self.checkpoint, await_commit=True, **self.flags)
        if self.staging_bytes is not None:  # less than may be configured, as the model is less than any other
            config = config.model_copy(update={"max_staging_bytes": self.staging_bytes})
        running = Running(config, Services(signature=self.signature, trusted_keys=TRUSTED))
        running.run(running.worker.start())
        return running

    def reasons(self) -> list[OrcdError]:
        """All of Plan's, after Commit has said the first of them; or none, after it has loaded the model."""
        running = self.start()
        plan = PlanParams(**self.wishes)
        info = running.run(running.worker.plan(plan))
        if info.feasible:  # a refusal ends the test here
            assert running.run(commit_of(running.worker, CommitParams(plan=plan))).sealed
            assert isinstance(running.run(events_of(running.worker, job("a")))[-1], Ended)
        else:
            with pytest.raises(OrcdError) as refused:
                running.run(commit_of(running.worker, CommitParams(plan=plan)))
            first, error = info.reasons[0], refused.value
            assert (first.code, first.field, first.message) == (error.code, error.field, error.message)
            assert running.worker.lifecycle.state is State.STARTING
        running.close()
        return list(info.reasons)


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """What was begun to be loaded."""
    begun: list[Path] = []

    def counted(*arguments: Any, **named: Any) -> ResidentModel:
        begun.append(arguments[1].directory)
        return load(*arguments, **named)

    monkeypatch.setattr(commits_module, "load", counted)
    return begun


@pytest.mark.requirement("WORKER-4310")
@pytest.mark.parametrize("name", EDITS)
def test_a_manifest_that_would_not_load_is_not_feasible(
    tiny_checkpoint: Path, tmp_path: Path, loads: list[Path], name: str
) -> None:
    edit, says = EDITS[name]
    reasons = Case(checkpoint=changed(tiny_checkpoint, tmp_path, edit)).reasons()
    assert any(says in reason.message for reason in reasons), [reason.message for reason in reasons]
    assert not loads


def test_a_folder_that_holds_no_model_is_not_feasible(tmp_path: Path) -> None:
    (reason,) = Case(checkpoint=tmp_path).reasons()
    assert "no manifest.json" in reason.message


@pytest.mark.requirement("WORKER-4102")
@pytest.mark.parametrize("less", [0, 1])
def test_a_tensor_that_no_staging_memory_holds_is_not_feasible(tiny_checkpoint: Path, less: int) -> None:
    largest = max(map(tensor_bytes, read_manifest(tiny_checkpoint).tensors))
    reasons = Case(checkpoint=tiny_checkpoint, staging_bytes=largest - less).reasons()
    told = [(reason.code, reason.field, reason.needed_bytes, reason.available_bytes) for reason in reasons]
    assert told == ([(ErrorCode.HOST_OOM, "max_staging_bytes", largest, largest - 1)] if less else [])


@pytest.mark.requirement("WORKER-4220")
@pytest.mark.requirement("WORKER-4224")
@pytest.mark.parametrize(
    ("flags", "code"),
    [
        ({"expected_digest": "0" * 64}, ErrorCode.MODEL_LOAD_FAILED),
        ({"expected_digest": "0" * 64, "require_pinned": True}, ErrorCode.MODEL_LOAD_FAILED),
        ({"require_pinned": True}, ErrorCode.POLICY_VIOLATION),
    ],
)
def test_a_model_that_nobody_vouches_for_as_asked_is_not_feasible(
    tiny_checkpoint: Path, loads: list[Path], flags: dict[str, str | bool], code: ErrorCode
) -> None:
    (reason,) = Case(checkpoint=tiny_checkpoint, flags=flags).reasons()
    assert (reason.code, reason.field) == (code, "expected_digest")
    assert not loads


@pytest.mark.requirement("WORKER-4223")
def test_a_signature_given_at_start_is_verified_by_plan_too(
    tiny_checkpoint: Path, tmp_path: Path, loads: list[Path]
) -> None:
    renamed = changed(tiny_checkpoint, tmp_path, lambda m: m["tokenizer"].update(add_bos=True))
    (reason,) = Case(checkpoint=tiny_checkpoint, signature=signature_of(renamed)).reasons()
    assert (reason.code, reason.field) == (ErrorCode.MODEL_LOAD_FAILED, "signature")
    assert not loads
    assert Case(checkpoint=tiny_checkpoint, signature=signature_of(tiny_checkpoint)).reasons() == []


@pytest.mark.requirement("WORKER-4211")
def test_all_reasons_are_told_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    def spoil(m: Json) -> None:
        m["model"].update(architecture="mamba")
        without("tokenizer.json")(m)
        m["tensors"][-1].update(shape=[2**31])

    reasons = Case(
        checkpoint=changed(tiny_checkpoint, tmp_path, spoil),
        wishes={"layout": "tensor_parallel", "tp_degree": 2, "slots": 3, "max_context": 10**6},
        flags={"expected_digest": "0" * 64, "emulated_memory": "4096", "max_model_bytes": "1"},
        staging_bytes=1,
    ).reasons()
    assert [(reason.code.value, reason.field) for reason in reasons] == [
        ("MODEL_LOAD_FAILED", "expected_digest"),
        ("CAPABILITY_MISMATCH", "model"),
        ("MODEL_LOAD_FAILED", "tokenizer"),
        ("MODEL_LOAD_FAILED", "model_path"),  # the description
        ("MODEL_LOAD_FAILED", "model_path"),  # the table
        ("HOST_OOM", "max_staging_bytes"),
        ("MODEL_LOAD_FAILED", "rope_frequencies"),
        ("CAPABILITY_MISMATCH", "shard_layout"),
        ("INVALID_PARAMS", "max_context"),
        ("INVALID_PARAMS", "slots"),
        ("INSUFFICIENT_VRAM", "model_path"),
        ("POLICY_VIOLATION", "max_model_bytes"),
    ]


@pytest.mark.timeout(900)
def test_over_generated_cases_plan_and_commit_agree_to_the_word(
    tiny_checkpoint: Path, tmp_path: Path, loads: list[Path]
) -> None:
    """Each case mixes flags, manifests, signatures and wishes, most of them harmless alone."""
    chance = random.Random(7)
    largest = max(map(tensor_bytes, read_manifest(tiny_checkpoint).tensors))
    spoiled = {
        name: changed(tiny_checkpoint, tmp_path / str(number), edit)
        for number, (name, (edit, _)) in enumerate(EDITS.items())
    }
    feasible, codes = 0, set[ErrorCode]()
    for _ in range(CASES):
        directory = spoiled[chance.choice(list(spoiled))] if chance.random() < 0.2 else tiny_checkpoint
        signature = chance.choice([b"", b"", signature_of(tiny_checkpoint), b"{}"])
        flags: dict[str, str | bool] = {"prefill_tokens": "128", "max_context": "128"}
        if chance.random() < 0.3:
            flags["expected_digest"] = chance.choice([read_manifest(tiny_checkpoint).digest, "1" * 64])
        if chance.random() < 0.3:
            flags["require_pinned"] = True
        if chance.random() < 0.3:
            flags["emulated_memory"] = chance.choice(["1000000", "1000000000"])
        if chance.random() < 0.2:
            flags["max_model_bytes"] = chance.choice(["1", "1000000000"])
        wishes: Json = {}
        if chance.random() < 0.4:
            wishes = chance.choice([{"slots": 1}, {"slots": 9}, {"max_context": 64}, {"max_context": 10**6}])
        staging = chance.choice([None, None, largest, largest - 1])
        case = Case(checkpoint=directory, wishes=wishes, flags=flags, staging_bytes=staging, signature=signature)
        reasons = case.reasons()
        feasible += not reasons
        codes |= {reason.code for reason in reasons}
    assert len(loads) == feasible, "something that Plan refused was begun"
    assert feasible > 2
    assert {ErrorCode.INSUFFICIENT_VRAM, ErrorCode.HOST_OOM, ErrorCode.POLICY_VIOLATION} <= codes


# -- what the worker does meanwhile ------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4226")
def test_while_a_model_loads_another_is_not_feasible_and_the_same_is(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldLoad(monkeypatch)
    running = Case(checkpoint=tiny_checkpoint).start()
    begun = running.begin(commit_of(running.worker, CommitParams(plan=PlanParams())))
    held.wait_begun()
    assert running.run(running.worker.plan(PlanParams())).feasible
    other = PlanParams(slots=1)
    (reason,) = running.run(running.worker.plan(other)).reasons
    assert reason.code is ErrorCode.BUSY
    assert reason.retry_after_ms
    with pytest.raises(OrcdError) as refused:
        running.run(commit_of(running.worker, CommitParams(plan=other)))
    assert (refused.value.code, refused.value.message) == (reason.code, reason.message)
    held.go_on()
    assert begun.result(WAIT_S).sealed
    running.close()


@pytest.mark.requirement("WORKER-4226")
def test_a_worker_that_ends_while_it_loads_lets_nobody_join_in(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldLoad(monkeypatch)
    running = Case(checkpoint=tiny_checkpoint).start()
    begun = running.begin(commit_of(running.worker, CommitParams(plan=PlanParams())))
    held.wait_begun()
    running.run(running.worker.drain(0.0))
    assert [reason.code for reason in running.run(running.worker.plan(PlanParams())).reasons] == [ErrorCode.NOT_READY]
    with pytest.raises(OrcdError) as refused:
        running.run(commit_of(running.worker, CommitParams(plan=PlanParams())))
    assert refused.value.code is ErrorCode.NOT_READY
    held.go_on()
    with pytest.raises(OrcdError, match="stopped while it loaded"):
        begun.result(WAIT_S)
    running.close()
