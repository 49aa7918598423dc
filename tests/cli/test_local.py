"""The commands that ask no worker, through ``main``: what they show and how they exit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.checkpoint.signature import load_public_keys
from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.audit_chain import verify_audit
from tests.checkpoint.tiny import copied
from tests.cli.conftest import Orcd, table
from tests.telemetry.audit_samples import files, write_days
from tests.tiny_checkpoint import tiny_checkpoint

__all__ = ["tiny_checkpoint"]


@pytest.fixture
def offline(alone: Orcd, monkeypatch: pytest.MonkeyPatch) -> Orcd:
    """``orcd`` without tokens, address or worker."""
    for name in ("ORCD_TOKEN_FILE", "ORCD_CONTROL_TOKEN_FILE"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("ORCD_ADDRESS", "not an address")
    return alone


@pytest.fixture
def model(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    return copied(tiny_checkpoint, tmp_path)


@pytest.fixture
def key(offline: Orcd, tmp_path: Path) -> Path:
    assert offline("keygen", str(tmp_path / "key")).code is ExitCode.OK
    return tmp_path / "key"


# -- keys and signatures -----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4314")
def test_keygen_sign_and_verify_go_together(offline: Orcd, model: Path, key: Path) -> None:
    signed = offline("sign", str(model), f"--key_file={key}")
    assert (signed.code, signed.err) == (ExitCode.OK, "")
    assert table(signed.out)["written to"] == f"{model}.sig"
    verified = offline("verify", str(model), f"--public_key_file={key}.pub")
    assert (verified.code, verified.err) == (ExitCode.OK, "")
    assert list(table(verified.out)) == ["model", "digest", "files", "signature"]
    told = json.loads(offline("verify", str(model), f"--public_key_file={key}.pub", "--json").out)
    assert told["signature"]["key"] == load_public_keys(Path(f"{key}.pub"))[0].fingerprint


@pytest.mark.requirement("WORKER-4314")
def test_a_bundle_goes_the_same_way(offline: Orcd, model: Path, tmp_path: Path) -> None:
    assert offline("keygen", str(tmp_path / "k"), "--bundle").code is ExitCode.OK
    out = tmp_path / "bundle"
    assert offline("sign", str(model), f"--key_file={tmp_path / 'k'}", f"--out={out}", "--bundle").code is ExitCode.OK
    flags = (f"--public_key_file={tmp_path / 'k.pub'}", f"--signature_file={out}")
    assert "OpenSSF bundle" in table(offline("verify", str(model), *flags).out)["signature"]


@pytest.mark.requirement("WORKER-4314")
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_the_exit_code_says_what_is_wrong(
    offline: Orcd, model: Path, key: Path, tmp_path: Path, form: tuple[str, ...]
) -> None:
    offline("sign", str(model), f"--key_file={key}")
    offline("keygen", str(tmp_path / "other"))

    def assert_told(code: ExitCode, name: str, *argv: str) -> None:
        shown = offline(*argv, *form)
        assert shown.code is code
        assert shown.err.startswith(f"error: {name}: ")
        assert shown.err.count("\n") == 1
        assert [json.loads(line)["code"] for line in shown.out.splitlines()] == ([name] if form else [])

    mine = f"--public_key_file={key}.pub"
    assert_told(
        ExitCode.FAILED, "POLICY_VIOLATION", "verify", str(model), f"--public_key_file={tmp_path / 'other'}.pub"
    )
    assert_told(ExitCode.USAGE, "INVALID_PARAMS", "keygen", str(key))
    assert_told(ExitCode.USAGE, "INVALID_PARAMS", "sign", str(model), f"--key_file={tmp_path / 'none'}")
    assert_told(ExitCode.USAGE, "INVALID_PARAMS", "verify", str(model), f"--signature_file={model}.sig")
    assert_told(ExitCode.MODEL, "MODEL_LOAD_FAILED", "verify", str(tmp_path), mine, f"--signature_file={model}.sig")
    (model / "tokenizer.json").write_text("{}")
    assert_told(ExitCode.MODEL, "MODEL_LOAD_FAILED", "verify", str(model), mine)
    assert_told(ExitCode.MODEL, "MODEL_LOAD_FAILED", "sign", str(model), f"--key_file={key}")


# -- plan of a folder --------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4214")
def test_a_folder_is_planned_for_a_gpu_that_is_not_there(offline: Orcd, tiny_checkpoint: Path) -> None:
    where = (str(tiny_checkpoint), "--device_memory=24GiB", "--device=NVIDIA H200", "--slots=16", "--max_context=32")
    shown = offline("plan", *where)
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    rows = table(shown.out)
    assert rows["device"] == "NVIDIA H200"
    assert rows["sizes"].startswith("16 slots, 32 tokens each")
    assert (rows["available"], rows["feasible"]) == ("25.8 GB", "yes")
    told = json.loads(offline("plan", *where, "--json").out)
    assert (told["feasible"], told["available_bytes"]) == (True, 24 * 2**30)
    assert told["digest"] == read_manifest(tiny_checkpoint).digest


@pytest.mark.requirement("WORKER-4214")
def test_a_plan_that_does_not_fit_exits_with_1_and_no_model_with_4(
    offline: Orcd, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shown = offline("plan", str(tiny_checkpoint), "--device_memory=1MiB")
    assert (shown.code, table(shown.out)["feasible"]) == (ExitCode.FAILED, "no")
    shown = offline("plan", str(tmp_path), "--device_memory=24GiB")
    assert (shown.code, shown.out) == (ExitCode.MODEL, "")
    assert shown.err.startswith("error: MODEL_LOAD_FAILED: ")


# -- audit -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """An unbroken log of three files with four records each."""
    write_days(tmp_path / "log")
    return tmp_path / "log"


@pytest.mark.requirement("WORKER-4162")
def test_a_whole_log_is_told_with_what_was_checked(offline: Orcd, log: Path) -> None:
    head = verify_audit(log).head
    shown = offline("audit", str(log), f"--head={head.seq}:{head.hash}")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    rows = table(shown.out)
    assert list(rows) == ["records", "first", "last", "lost", "head", "whole"]
    assert rows["records"] == "12 records in 3 files"
    assert rows["first"].startswith("1, 2026-03-01")
    assert rows["last"].startswith("12, 2026-03-03")
    assert rows["head"] == f"12:{head.hash}"
    assert rows["whole"] == "yes, up to head 12"
    assert "see --head" in table(offline("audit", str(log)).out)["whole"]


@pytest.mark.requirement("WORKER-4162")
def test_a_log_whose_oldest_files_are_gone_says_so(offline: Orcd, log: Path) -> None:
    files(log)[0].unlink()
    shown = offline("audit", str(log))
    assert shown.code is ExitCode.OK
    assert table(shown.out)["first"].endswith(" (older ones are not here)")


@pytest.mark.requirement("WORKER-4162")
def test_a_break_is_named_and_exits_with_1(offline: Orcd, log: Path) -> None:
    files(log)[1].unlink()
    shown = offline("audit", str(log))
    assert (shown.code, shown.err) == (ExitCode.FAILED, "")
    rows = table(shown.out)
    assert rows["whole"] == "no: audit-000000000009.jsonl, line 1: record 5 is missing (removed)"
    assert rows["records"] == "4 records in 2 files"
    shown = offline("audit", str(log), "--json")
    assert shown.code is ExitCode.FAILED
    told = json.loads(shown.out)
    assert told["broken"] == {"file": "audit-000000000009.jsonl", "line": 1, "why": "removed", "seq": 5}
    assert told["head"]["seq"] == 4


@pytest.mark.requirement("WORKER-4162")
def test_an_end_that_was_cut_off_shows_against_a_published_head(offline: Orcd, log: Path) -> None:
    head = verify_audit(log).head
    files(log)[-1].unlink()
    assert offline("audit", str(log)).code is ExitCode.OK
    shown = offline("audit", str(log), f"--head={head.seq}:{head.hash}")
    assert (shown.code, "(truncated)" in table(shown.out)["whole"]) == (ExitCode.FAILED, True)


@pytest.mark.requirement("WORKER-4162")
def test_what_is_no_log_is_not_whole(offline: Orcd, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    shown = offline("audit", str(tmp_path / "empty"))
    assert shown.code is ExitCode.FAILED
    assert list(table(shown.out)) == ["whole"]
    assert "there are no audit records" in shown.out
    shown = offline("audit", str(tmp_path / "absent"))
    assert (shown.code, shown.out) == (ExitCode.USAGE, "")
    assert "cannot be read (No such file or directory)" in shown.err
