"""Once a model is resident: Plan and Commit mean that one, or say that it is another; a signature is verified again."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from orcd_jax.checkpoint.manifest import read_manifest, read_manifest_bytes
from orcd_jax.checkpoint.signature import PublicKey, sign_manifest
from orcd_jax.engine.request import Ended
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.keys import IdentityKey
from orcd_jax.worker.types import CommitParams, Handle, PlanParams
from tests.checkpoint.tiny import edit_manifest
from tests.worker.running import SLOTS, Running, commit_of, config_of, events_of, job, services_of

pytestmark = pytest.mark.slow

KEY, STRANGER = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
BARE = CommitParams(plan=PlanParams())


def sign(checkpoint: Path, key: Ed25519PrivateKey = KEY) -> bytes:
    return sign_manifest(IdentityKey(key), read_manifest_bytes(checkpoint))


@pytest.fixture(scope="module")
def root(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models: the one that is loaded, and one that differs in a setting."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(tiny_checkpoint, folder / "mine")
    edit_manifest(
        shutil.copytree(tiny_checkpoint, folder / "other"),
        lambda m: m["tokenizer"].update(add_bos=True),  # type: ignore[attr-defined]
    )
    return folder


def awaiting(root: Path, *, trusting: bool = True) -> Running:
    trusted = (PublicKey(KEY.public_key()),) if trusting else ()
    config = config_of(root / "mine", model_root=str(root), await_commit=True)
    running = Running(config, services_of(trusted_keys=trusted))
    running.run(running.worker.start())
    return running


@pytest.fixture(scope="module")
def loaded(root: Path) -> Iterator[Running]:
    """A worker whose model was committed under a name of its own."""
    running = awaiting(root)
    running.run(commit_of(running.worker, CommitParams(plan=PlanParams(), shard_id="s")))
    yield running
    running.close()


def handle_of(running: Running) -> Handle:
    (handle,) = running.worker.ready().handles
    return handle


def refusal(running: Running, params: CommitParams) -> OrcdError:
    with pytest.raises(OrcdError) as refused:
        running.run(commit_of(running.worker, params))
    return refused.value


@pytest.mark.requirement("WORKER-4213")
@pytest.mark.requirement("WORKER-4022")
@pytest.mark.parametrize(
    "wishes", list(itertools.product(("", "mine", "other", "nothing"), (None, 64), (None, SLOTS, 9)))
)
def test_plan_is_feasible_exactly_when_commit_answers_with_the_handle(
    loaded: Running, wishes: tuple[str, int | None, int | None]
) -> None:
    model_ref, context, slots = wishes
    plan = PlanParams(model_ref=model_ref, max_context=context, slots=slots)
    info, handle = loaded.run(loaded.worker.plan(plan)), handle_of(loaded)
    assert info.feasible is (model_ref in ("", "mine") and context is None and slots in (None, SLOTS))
    if info.feasible:
        assert loaded.run(commit_of(loaded.worker, CommitParams(plan=plan))) == handle
    else:
        error = refusal(loaded, CommitParams(plan=plan))
        assert (error.code, error.message) == (info.reasons[0].code, info.reasons[0].message)
        messages = [reason.message for reason in info.reasons]
        assert len(messages) == len(set(messages)), "a reason twice"
    assert handle_of(loaded) == handle


@pytest.mark.requirement("WORKER-4213")
def test_another_layout_is_refused_whether_or_not_the_model_is_there(loaded: Running, root: Path) -> None:
    split = PlanParams(layout="tensor_parallel", tp_degree=2)
    (reason,) = loaded.run(loaded.worker.plan(split)).reasons
    assert reason.code is ErrorCode.CAPABILITY_MISMATCH
    assert refusal(loaded, CommitParams(plan=split)).message == reason.message
    empty = awaiting(root)
    assert refusal(empty, CommitParams(plan=split)).message == reason.message
    empty.close()


@pytest.mark.requirement("WORKER-4210")
def test_the_plan_of_what_is_resident_is_at_the_sizes_it_was_loaded_for(root: Path) -> None:
    running = awaiting(root)
    running.run(commit_of(running.worker, CommitParams(plan=PlanParams(slots=1, max_context=64))))
    info = running.run(running.worker.plan(PlanParams()))
    assert (info.feasible, info.slots, info.max_context) == (True, 1, 64)
    assert info.model == read_manifest(root / "mine").model
    assert info.memory is not None
    assert info.memory.suggestions == ()
    assert not running.run(running.worker.plan(PlanParams(slots=SLOTS))).feasible
    running.close()


# -- who vouches for it ------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4222")
@pytest.mark.requirement("WORKER-4223")
@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        ("of another model", ErrorCode.MODEL_LOAD_FAILED),
        ("changed", ErrorCode.MODEL_LOAD_FAILED),
        ("by a stranger", ErrorCode.POLICY_VIOLATION),
        ("no signature at all", ErrorCode.INVALID_PARAMS),
    ],
)
def test_a_wrong_signature_is_the_error_that_it_is_at_load_and_changes_nothing(
    loaded: Running, root: Path, wrong: str, code: ErrorCode
) -> None:
    good = sign(root / "mine")
    at = good.index(b'"signature": "') + len(b'"signature": "')
    signature = {
        "of another model": sign(root / "other"),
        "changed": good[:at] + (b"0" if good[at : at + 1] != b"0" else b"1") + good[at + 1 :],
        "by a stranger": sign(root / "mine", STRANGER),
        "no signature at all": b"\0",
    }[wrong]
    params, handle = CommitParams(plan=PlanParams(), shard_id="s", signature=signature), handle_of(loaded)
    error = refusal(loaded, params)
    assert (error.code, error.field) == (code, "signature")
    empty = awaiting(root)
    at_load = refusal(empty, params)
    empty.close()
    assert (error.code, error.field, error.message) == (at_load.code, at_load.field, at_load.message)
    assert handle_of(loaded) == handle
    assert isinstance(loaded.run(events_of(loaded.worker, job(f"after-{wrong.replace(' ', '-')}")))[-1], Ended)


@pytest.mark.requirement("WORKER-4222")
def test_a_good_signature_gets_the_handle_as_it_is(loaded: Running, root: Path) -> None:
    handle = handle_of(loaded)
    params = CommitParams(plan=PlanParams(), shard_id="s", signature=sign(root / "mine"), expected_digest=handle.digest)
    assert loaded.run(commit_of(loaded.worker, params)) == handle
    assert not handle.pinned


@pytest.mark.requirement("WORKER-4223")
def test_a_signature_that_nobody_could_check_is_refused(root: Path) -> None:
    running = awaiting(root, trusting=False)
    running.run(commit_of(running.worker, BARE))
    error = refusal(running, CommitParams(plan=PlanParams(), signature=sign(root / "mine")))
    assert (error.code, error.field) == (ErrorCode.INVALID_PARAMS, "signature")
    assert "no key is trusted" in error.message
    running.close()


@pytest.mark.requirement("WORKER-4223")
def test_a_signature_is_over_what_was_loaded_whatever_lies_there_now(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "mine")
    running = awaiting(tmp_path)
    running.run(commit_of(running.worker, BARE))
    old = sign(tmp_path / "mine")
    edit_manifest(
        tmp_path / "mine",
        lambda m: m["tokenizer"].update(add_bos=True),  # type: ignore[attr-defined]
    )
    new = sign(tmp_path / "mine")
    assert running.run(commit_of(running.worker, CommitParams(plan=PlanParams(), signature=old))) == handle_of(running)
    assert refusal(running, CommitParams(plan=PlanParams(), signature=new)).field == "signature"
    running.close()


@pytest.mark.requirement("WORKER-4022")
@pytest.mark.parametrize("asked", [{"expected_digest": "0" * 64}, {"shard_id": "other"}])
def test_another_digest_or_shard_is_another_model(loaded: Running, asked: dict[str, str]) -> None:
    error = refusal(loaded, CommitParams(plan=PlanParams(), **asked))  # type: ignore[arg-type]
    assert (error.code, error.field) == (ErrorCode.POLICY_VIOLATION, *asked)
    assert loaded.worker.lifecycle.serving
