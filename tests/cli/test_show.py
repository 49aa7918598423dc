"""``orcd ready`` and ``orcd status``."""

from __future__ import annotations

import dataclasses
import json

import pytest

from orcd_jax.errors import ExitCode
from orcd_jax.worker.types import ReadyInfo
from tests.cli.conftest import Orcd
from tests.cli.conftest import table as rows_of
from tests.server.fake_worker import CAPABILITIES, HANDLE, STATUS, Served

KEY = b"k" * 32
LOADING = ReadyInfo(
    ready=False,
    state="LOADING",
    handles=(),
    capabilities=CAPABILITIES,
    last_digest_age_ms=None,
    identity_public_key=KEY,
)


def answer_ready(served: Served, monkeypatch: pytest.MonkeyPatch, info: ReadyInfo) -> None:
    monkeypatch.setattr(served.worker, "ready", lambda: info)


def test_a_ready_worker_is_told_by_exit_code_and_by_a_table(orcd: Orcd) -> None:
    shown = orcd("ready")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    table = rows_of(shown.out)
    assert table["ready"] == "yes"
    assert table["model"] == "tiny"
    assert table["digest"] == "d" * 64 + " (pinned)"
    assert table["memory"] == "emulated on the CPU"
    assert table["proved"] == "every byte, within the last 15 ms"


def test_values_are_aligned_and_lines_end_without_blanks(orcd: Orcd) -> None:
    lines = orcd("status").out.splitlines()
    assert len({len(line) - len(line.split(maxsplit=1)[1]) for line in lines}) == 1
    assert all(line == line.rstrip() for line in lines)


def test_ready_as_json_is_one_object(orcd: Orcd) -> None:
    shown = orcd("ready", "--json")
    assert (shown.code, shown.err, shown.out.count("\n")) == (ExitCode.OK, "", 1)
    capabilities = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(CAPABILITIES).items()
    }
    assert json.loads(shown.out) == {
        "ready": True,
        "state": "EXECUTING",
        "digest": HANDLE.digest,
        "model": HANDLE.model_ref,
        "handles": [dataclasses.asdict(HANDLE)],
        "capabilities": capabilities,
        "last_digest_age_ms": 15,
        "identity_public_key": KEY.hex(),
    }


def test_a_worker_that_is_not_ready_still_answers_and_is_told_by_the_exit_code(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer_ready(served, monkeypatch, LOADING)
    shown = orcd("ready")
    assert (shown.code, shown.err) == (ExitCode.FAILED, "")
    assert shown.out.splitlines()[:2] == ["ready    no", "state    loading"]


def test_not_ready_as_json_has_the_same_fields(orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    answer_ready(served, monkeypatch, LOADING)
    shown = orcd("ready", "--json")
    assert shown.code is ExitCode.FAILED
    told = json.loads(shown.out)
    del told["capabilities"]
    assert told == {
        "ready": False,
        "state": "LOADING",
        "digest": "",
        "model": "",
        "handles": [],
        "last_digest_age_ms": None,
        "identity_public_key": KEY.hex(),
    }


def test_memory_and_time_are_told_as_a_person_says_them(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = dataclasses.replace(HANDLE, emulated=False, vram_bytes=16_100_000_000, pinned=False)
    info = dataclasses.replace(LOADING, ready=True, state="READY", handles=(handle,), last_digest_age_ms=125_000)
    answer_ready(served, monkeypatch, info)
    table = rows_of(orcd("ready").out)
    assert table["memory"] == "16.1 GB in VRAM"
    assert table["proved"] == "every byte, within the last 2 min 5 s"
    assert table["digest"].endswith(" (not pinned)")


def test_status_is_a_table(orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    info = dataclasses.replace(
        STATUS, emulated=False, vram_used_bytes=16_100_000_000, vram_planned_bytes=20_000_000_000, slots_used=3
    )
    monkeypatch.setattr(served.worker, "status", lambda: info)
    shown = orcd("status")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    table = rows_of(shown.out)
    assert table["status"] == "busy"
    assert table["jobs"] == "3 of 9"
    assert table["uptime"] == "13 ms"
    assert table["memory"] == "16.1 GB of 20.0 GB planned"
    assert table["loading"] == "compiling: 14 %"
    assert table["detection"] == "a changed bit stops the worker within 18 ms"
    assert table["metrics"] == "http://127.0.0.1:19/metrics, on its host"
    assert table["audit"] == f"20:{STATUS.audit_hash}"
    assert "driver" not in table


def test_status_of_a_worker_that_holds_nothing_claims_nothing(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing = dict.fromkeys(("model_ref", "digest", "quant", "tokenizer", "load_stage", "audit_hash"), "")
    numbers = ("max_context", "slots_total", "slots_used", "vram_used_bytes", "vram_planned_bytes", "audit_seq")
    info = dataclasses.replace(
        STATUS,
        status="starting",
        state="STARTING",
        resident=False,
        emulated=False,
        seal_age_ms=None,
        metrics_port=0,
        **nothing,  # type: ignore[arg-type]
        **dict.fromkeys(numbers, 0),  # type: ignore[arg-type]
    )
    monkeypatch.setattr(served.worker, "status", lambda: info)
    table = rows_of(orcd("status").out)
    assert list(table) == ["status", "state", "worker", "pool", "version", "uptime", "memory", "device", "compute"]
    assert table["memory"] == "no model is resident"


def test_status_as_json_holds_every_field(orcd: Orcd) -> None:
    shown = orcd("status", "--json")
    assert (shown.code, shown.err, shown.out.count("\n")) == (ExitCode.OK, "", 1)
    told = json.loads(shown.out)
    assert told.items() >= (dataclasses.asdict(STATUS) | {"status": "busy", "state": "executing"}).items()
    assert {"cuda_version", "driver_version"} <= told.keys()


def test_a_name_that_the_worker_tells_cannot_steer_the_terminal(
    orcd: Orcd, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = dataclasses.replace(STATUS, model_ref="[red]a\x1b[2J\u202e\nb[/red]")
    monkeypatch.setattr(served.worker, "status", lambda: info)
    assert "model         [red]a\ufffd[2J\ufffd b[/red]\n" in orcd("status").out
