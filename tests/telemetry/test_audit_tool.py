"""The command that checks an audit log: what it says, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orcd_jax.telemetry.audit_chain import verify_audit
from tests.telemetry.audit_samples import files, write_days
from tools import verify_audit as tool


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """An unbroken log of three files with four records each."""
    write_days(tmp_path / "log")
    return tmp_path / "log"


@pytest.mark.requirement("WORKER-4162")
def test_the_command_says_what_it_checked(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published = verify_audit(log).head
    assert tool.main([str(log), f"--head={published.seq}:{published.hash}"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("whole: 12 records in 3 files, 1 to 12, ")
    assert said.endswith(f"head 12:{published.hash}\n")


@pytest.mark.requirement("WORKER-4162")
def test_the_command_names_the_break_and_fails(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files(log)[1].unlink()
    assert tool.main([str(log)]) == 1
    assert capsys.readouterr().out == (
        "broken after 4 records: audit-000000000009.jsonl, line 1: record 5 is missing (removed)\n"
    )
    assert tool.main([str(log), "--json"]) == 1
    shown = json.loads(capsys.readouterr().out)
    assert shown["broken"] == {"file": "audit-000000000009.jsonl", "line": 1, "why": "removed", "seq": 5}
    assert shown["head"]["seq"] == 4


@pytest.mark.requirement("WORKER-4162")
def test_the_command_refuses_what_is_no_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main([str(tmp_path)]) == 1
    assert "no audit records" in capsys.readouterr().out
    assert tool.main([str(tmp_path / "absent")]) == 2
    assert "cannot be read (No such file or directory)" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        tool.main([str(tmp_path), "--head=12"])
