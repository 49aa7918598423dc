"""``orcd plan`` and ``commit`` at a worker, ``ready --wait``, and a token of the wrong role."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orcd_jax.checkpoint.manifest import ModelCapabilities
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.cli import show
from orcd_jax.cli.arguments import Target
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.residency.bounds import Sizes
from orcd_jax.residency.budget import MemoryPlan, Suggestion
from orcd_jax.worker.types import CommitEvent, CommitParams, PlanInfo, PlanParams, ReadyInfo
from tests.cli.conftest import Orcd, table
from tests.server.fake_worker import CAPABILITIES, HANDLE, PLAN, WAIT_S, Served

GB = 10**9
MODEL = ModelCapabilities(
    model_id="llama-tiny",
    architecture="llama",
    positional="rope_neox",
    attention="gqa",
    quant="bf16",
    context_max=4096,
    vocab_size=1000,
    tokenizer="byte_level_bpe",
)
MEMORY = MemoryPlan(
    sizes=Sizes(slots_total=9, max_context=6, prefill_tokens=1024),
    weights_bytes=16 * GB,
    kv_bytes=2 * GB,
    workspace_bytes=GB,
    workspace="bound",
    reserve_bytes=GB // 2,
    headroom_bytes=GB // 4,
    total_bytes=19_750_000_000,
    available_bytes=80 * GB,
    foreign_bytes=0,
)
FITS = dataclasses.replace(PLAN, memory=MEMORY, reasons=(), model=MODEL)
ROWS = ["sizes", "weights", "KV cache", "workspace", "reserve", "headroom", "total", "available"]
SMALL = dataclasses.replace(
    MEMORY, available_bytes=10 * GB, foreign_bytes=3 * GB, suggestions=(Suggestion("--slots_total", 4),)
)
TOO_LARGE = OrcdError(
    ErrorCode.INSUFFICIENT_VRAM,
    "the model needs 19.8 GB and the device has 10.0 GB available: --slots_total=4 would fit",
    field="model_path",
)


def answer_plan(served: Served, monkeypatch: pytest.MonkeyPatch, info: PlanInfo) -> None:
    async def plan(params: PlanParams) -> PlanInfo:
        served.worker.planned.append(params)
        return info

    monkeypatch.setattr(served.worker, "plan", plan)


# -- plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4210")
def test_a_plan_that_fits_is_a_table_that_ends_with_the_verdict(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_plan(served, monkeypatch, FITS)
    shown = orcd("plan", "models/x", "--max_context=6", "--slots=9")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    assert served.worker.planned == [PlanParams(model_ref="models/x", max_context=6, slots=9)]
    rows = table(shown.out)
    assert list(rows) == ["model", "device 1", *ROWS, "feasible"]
    assert rows["model"] == "llama-tiny"
    assert rows["device 1"] == "GPU-1"
    assert rows["sizes"] == "9 slots, 6 tokens each"
    assert rows["weights"] == "16.0 GB"
    assert rows["workspace"] == "1.0 GB (an upper bound)"
    assert (rows["total"], rows["available"], rows["feasible"]) == ("19.8 GB", "80.0 GB", "yes")


@pytest.mark.requirement("WORKER-4213")
def test_a_plan_that_does_not_fit_says_every_reason_and_exits_with_1(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_plan(served, monkeypatch, dataclasses.replace(FITS, memory=SMALL, reasons=(TOO_LARGE, *PLAN.reasons)))
    shown = orcd("plan")
    assert (shown.code, shown.err) == (ExitCode.FAILED, "")
    assert served.worker.planned == [PlanParams()]
    rows = table(shown.out)
    assert list(rows)[-4:] == ["available", "feasible", "why not 1", "why not 2"]
    assert (rows["available"], rows["feasible"]) == ("10.0 GB (others hold 3.0 GB)", "no")
    assert rows["why not 1"] == f"INSUFFICIENT_VRAM: {TOO_LARGE.message}"
    assert rows["why not 2"] == "NOT_FOUND: there is no such model"


@pytest.mark.requirement("WORKER-4213")
def test_a_model_that_is_not_there_is_the_verdict_and_its_reason_alone(orcd: Orcd) -> None:
    shown = orcd("plan", "nowhere")
    assert shown.code is ExitCode.FAILED
    assert table(shown.out) == {"feasible": "no", "why not": "NOT_FOUND: there is no such model"}


@pytest.mark.requirement("WORKER-4210")
def test_a_plan_as_json_is_one_object_with_every_byte(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_plan(served, monkeypatch, dataclasses.replace(FITS, memory=SMALL, reasons=(TOO_LARGE,)))
    shown = orcd("plan", "--json")
    assert (shown.code, shown.err, shown.out.count("\n")) == (ExitCode.FAILED, "", 1)
    told = json.loads(shown.out)
    assert told["feasible"] is False
    assert told["vram_available_bytes"] == 10 * GB
    assert told["vram_required"] == {
        "weights_bytes": 16 * GB,
        "kv_bytes": 2 * GB,
        "workspace_bytes": GB,
        "headroom_bytes": GB // 4,
        "total_bytes": 19_750_000_000,
        "reserve_bytes": GB // 2,
        "workspace_source": "bound",
    }
    assert told["suggestions"] == [{"flag": "--slots_total", "value": "4"}]
    assert (told["reasons"][0]["code"], told["reasons"][0]["field"]) == ("INSUFFICIENT_VRAM", "model_path")
    assert told["model"]["model_id"] == "llama-tiny"
    answer_plan(served, monkeypatch, FITS)
    assert orcd("plan", "--json").code is ExitCode.OK


# -- commit ------------------------------------------------------------------------------------------------------------


def answer_commit(served: Served, monkeypatch: pytest.MonkeyPatch, *events: CommitEvent | OrcdError) -> None:
    async def commit(params: CommitParams) -> AsyncIterator[CommitEvent]:
        served.worker.committed.append(params)
        for event in events:
            if isinstance(event, OrcdError):
                raise event
            yield event

    monkeypatch.setattr(served.worker, "commit", commit)


STEPS = tuple(Progress("verify_files", done, 8) for done in range(9))
IN_VRAM = dataclasses.replace(
    HANDLE, emulated=False, vram_bytes=16 * GB, pinned=False, sealed_at_ms=1_700_000_000_000, device_uuid="GPU-1"
)


@pytest.mark.requirement("WORKER-4221")
def test_a_commit_tells_its_progress_on_stderr_and_the_handle_on_stdout(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_commit(served, monkeypatch, *STEPS, Progress("later", 1, 1), IN_VRAM)
    shown = orcd("commit")
    assert shown.code is ExitCode.OK
    percents = [f"checking the files: {percent} %" for percent in (0, 25, 50, 75, 100)]
    assert shown.err.splitlines() == [*percents, "later: 100 %"]
    assert table(shown.out) == {
        "handle": "h-1",
        "model": "tiny",
        "digest": "d" * 64 + " (not pinned)",
        "memory": "16.0 GB in VRAM",
        "sealed": "2023-11-14 22:13:20 UTC",
    }


@pytest.mark.requirement("WORKER-4221")
def test_the_worker_is_asked_to_load_what_the_flags_say(orcd: Orcd, served: Served, tmp_path: Path) -> None:
    signature = tmp_path / "m.sig"
    signature.write_bytes(b"signed")
    flags = [f"--expected_digest={'D' * 64}", f"--signature_file={signature}", "--shard_id=s-7"]
    assert orcd("commit", "models/x", "--max_context=32", "--slots=2", *flags).code is ExitCode.OK
    (asked,) = served.worker.committed
    assert asked == CommitParams(
        plan=PlanParams(model_ref="models/x", max_context=32, slots=2),
        shard_id="s-7",
        expected_digest="d" * 64,
        signature=b"signed",
    )


@pytest.mark.requirement("WORKER-4221")
def test_a_commit_as_json_is_one_line_for_each_event(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_commit(served, monkeypatch, Progress("restore", 1, 4), IN_VRAM)
    shown = orcd("commit", "--json")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    progress, committed = map(json.loads, shown.out.splitlines())
    assert progress == {
        "event": "progress",
        "stage": "restore",
        "done_bytes": 1,
        "total_bytes": 4,
        "progress_percent": 25,
    }
    assert committed == {"event": "committed", **dataclasses.asdict(IN_VRAM)}


@pytest.mark.requirement("WORKER-4220")
def test_a_commit_that_fails_half_way_is_an_error_with_its_code(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    failure = OrcdError(ErrorCode.MODEL_LOAD_FAILED, "a file differs", field="model_path")
    answer_commit(served, monkeypatch, Progress("restore", 1, 4), failure)
    shown = orcd("commit")
    assert (shown.code, shown.out) == (ExitCode.FAILED, "")
    progress, told = shown.err.splitlines()
    assert (progress, told) == ("restoring onto the device: 25 %", "error: MODEL_LOAD_FAILED: a file differs")
    events = [json.loads(line) for line in orcd("commit", "--json").out.splitlines()]
    assert [event["event"] for event in events] == ["progress", "error"]
    assert (events[1]["code"], events[1]["field"]) == ("MODEL_LOAD_FAILED", "model_path")


def test_a_commit_without_a_handle_is_a_failure(orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_commit(served, monkeypatch, Progress("restore", 4, 4))
    shown = orcd("commit")
    assert (shown.code, shown.out) == (ExitCode.FAILED, "")
    assert "without a handle" in shown.err


# -- ready --wait ------------------------------------------------------------------------------------------------------

LOADING = ReadyInfo(
    ready=False,
    state="LOADING",
    handles=(),
    capabilities=CAPABILITIES,
    last_digest_age_ms=None,
    identity_public_key=b"k" * 32,
)
LONG = f"--wait={WAIT_S:g}"  # only a failing test waits that long


@pytest.fixture
def states(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[ReadyInfo]:
    """What the worker answers, one after the other; the last one for ever."""
    answers: list[ReadyInfo] = []
    monkeypatch.setattr(served.worker, "ready", lambda: answers.pop(0) if len(answers) > 1 else answers[0])
    monkeypatch.setattr(show, "WAIT_PAUSE_S", 0.01)
    return answers


def test_a_worker_that_becomes_ready_is_waited_for(orcd: Orcd, states: list[ReadyInfo]) -> None:
    states += [LOADING, LOADING, dataclasses.replace(LOADING, ready=True, state="READY")]
    shown = orcd("ready", LONG)
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    assert table(shown.out)["state"] == "ready"
    assert len(states) == 1


def test_a_worker_that_does_not_become_ready_is_shown_as_it_is_after_the_wait(
    orcd: Orcd, states: list[ReadyInfo]
) -> None:
    states += [LOADING] * 4
    shown = orcd("ready", "--wait=0.5")
    assert (shown.code, table(shown.out)["state"]) == (ExitCode.FAILED, "loading")
    assert len(states) == 1  # it was asked more than once


def test_a_worker_that_never_will_be_ready_is_not_waited_for(orcd: Orcd, states: list[ReadyInfo]) -> None:
    states += [dataclasses.replace(LOADING, state="DRAINING"), LOADING, LOADING, LOADING]
    shown = orcd("ready", LONG)
    assert shown.code is ExitCode.FAILED
    assert len(states) == 2  # asked once while waiting, and once to show it


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What each look at the worker found while it was waited for."""
    found: list[bool] = []
    settled = show._settled

    async def look(target: Target) -> bool:
        found.append(await settled(target))
        return found[-1]

    monkeypatch.setattr(show, "_settled", look)
    monkeypatch.setattr(show, "WAIT_PAUSE_S", 0.01)
    return found


def test_a_refused_token_is_not_waited_for(orcd: Orcd, token_file: Path, looks: list[bool]) -> None:
    token_file.write_text("w" * 32, encoding="ascii")
    shown = orcd("ready", "--wait=1")
    assert (shown.code, looks) == (ExitCode.UNAUTHENTICATED, [True])
    assert f"(the token is from '{token_file}')" in shown.err


def test_a_worker_that_is_not_there_yet_is_waited_for(alone: Orcd, looks: list[bool]) -> None:
    assert alone("ready", "--wait=0.5", "--address=127.0.0.1:1").code is ExitCode.UNREACHABLE
    assert len(looks) > 1
    assert not any(looks)


# -- roles -------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4200")
@pytest.mark.parametrize("command", ["plan", "commit", "attest", "status"])
def test_an_execute_token_for_control_is_told_which_file_to_give(
    orcd: Orcd, served: Served, token_file: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.delenv("ORCD_CONTROL_TOKEN_FILE")
    shown = orcd(command)
    assert (shown.code, shown.out) == (ExitCode.FAILED, "")
    assert shown.err.startswith("error: POLICY_VIOLATION: ")
    assert shown.err.endswith(
        f" (the token is from '{token_file}'; name the file of the control token with --token_file or "
        "ORCD_CONTROL_TOKEN_FILE)\n"
    )
    assert served.worker.calls == 0


@pytest.mark.requirement("WORKER-4200")
def test_a_control_token_for_a_job_is_told_which_file_to_give(orcd: Orcd, control_file: Path) -> None:
    shown = orcd("execute", f"--token_file={control_file}", "--max_tokens=8", "x")
    assert shown.code is ExitCode.FAILED
    assert shown.err.endswith(
        f" (the token is from '{control_file}'; name the file of the execute token with --token_file or "
        "ORCD_TOKEN_FILE)\n"
    )


def test_another_policy_says_nothing_of_tokens(orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_commit(served, monkeypatch, OrcdError(ErrorCode.POLICY_VIOLATION, "another model is here"))
    assert orcd("commit").err == "error: POLICY_VIOLATION: another model is here\n"
