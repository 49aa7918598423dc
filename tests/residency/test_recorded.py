"""What compiled programs said of their memory: kept whole, read with suspicion, never more than so many."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency import recorded
from orcd_jax.residency.bounds import call_bytes
from orcd_jax.residency.recorded import (
    MAX_FILE_BYTES,
    MAX_FILES,
    STALE_PART_S,
    Analysis,
    ProgramMemory,
    installed_versions,
    plan_key,
    recall,
    record,
)
from tests.residency.shapes import TINY, config, sizes

AT = sizes(4, 256, 128)
KEY = "ab" * 32
FIELDS = tuple(ProgramMemory.model_fields)


def memory(**fields: int) -> ProgramMemory:
    return ProgramMemory(**{name: fields.get(name, 0) for name in FIELDS})


ANALYSIS = Analysis(
    programs={
        "init": memory(temp_bytes=3, output_bytes=900),
        "prefill": memory(temp_bytes=500, output_bytes=940, alias_bytes=900, argument_bytes=5000, code_bytes=2),
        "decode": memory(temp_bytes=300, output_bytes=1100, alias_bytes=900, argument_bytes=5000, code_bytes=4),
        "digest": memory(temp_bytes=70, output_bytes=8, code_bytes=1),
    }
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of records with one in it."""
    record(tmp_path / "plans", KEY, ANALYSIS)
    return tmp_path / "plans"


def refused(folder: Path, key: str = KEY) -> str:
    """Why the record is not used."""
    reasons: list[str] = []
    assert recall(folder, key, reasons.append) is None
    (reason,) = reasons
    assert reason.endswith(": the plan uses the bound")
    return reason


@pytest.mark.requirement("WORKER-4210")
def test_what_was_recorded_is_recalled(folder: Path) -> None:
    reasons: list[str] = []
    assert recall(folder, KEY, reasons.append) == ANALYSIS
    assert reasons == []


def test_what_was_never_recorded_is_no_news(folder: Path, tmp_path: Path) -> None:
    reasons: list[str] = []
    assert recall(folder, "cd" * 32, reasons.append) is None
    assert recall(tmp_path / "nowhere", KEY, reasons.append) is None
    assert reasons == []


def test_a_later_record_replaces_an_earlier_one(folder: Path) -> None:
    later = Analysis(programs={**ANALYSIS.programs, "decode": memory(temp_bytes=1)})
    record(folder, KEY, later)
    assert recall(folder, KEY) == later
    assert len(list(folder.iterdir())) == 1


@pytest.mark.requirement("WORKER-4210")
def test_the_workspace_is_two_of_the_largest_step_one_other_program_and_all_code() -> None:
    # decode: 300 and 200 of outputs that are not its donated input; digest: 70 and 8; init's output is the state.
    step, other, code = 2 * (540 + call_bytes(AT)), 78, 7
    assert ANALYSIS.workspace_bytes(AT) == step + other + code
    heavier = Analysis(programs={**ANALYSIS.programs, "decode": memory(temp_bytes=600, output_bytes=9, alias_bytes=9)})
    assert heavier.workspace_bytes(AT) == 2 * (600 + call_bytes(AT)) + other + 3


@pytest.mark.parametrize("name", FIELDS)
def test_an_analysis_is_what_the_compiler_says(name: str, device: jax.Device) -> None:
    here = jax.sharding.SingleDeviceSharding(device)
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32, sharding=here)
    program = jax.jit(lambda x, y: (x + 1, (x @ y) @ (y @ x)), donate_argnums=0).lower(x, x).compile()
    said = program.memory_analysis()
    assert said is not None
    theirs = name.replace("code_bytes", "generated_code_bytes").replace("_bytes", "_size_in_bytes")
    assert getattr(ProgramMemory.of(program), name) == getattr(said, theirs)
    if name == "alias_bytes":
        assert getattr(ProgramMemory.of(program), name) == 64 * 64 * 4
    assert Analysis.of({"prefill": program, "decode": program}).programs["decode"] == ProgramMemory.of(program)


@pytest.mark.requirement("WORKER-4101")
def test_host_memory_is_seen_whatever_it_is_for() -> None:
    assert memory(temp_bytes=5, code_bytes=5).host_bytes == 0
    for name in FIELDS:
        assert memory(**{name: 7}).host_bytes == (7 if name.startswith("host_") else 0)


def test_a_backend_that_says_nothing_is_an_error() -> None:
    class Silent:
        def memory_analysis(self) -> None:
            return None

    with pytest.raises(OrcdError) as caught:
        ProgramMemory.of(Silent())  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.INTERNAL


def key_of(**changes: object) -> str:
    given: dict[str, object] = {"config": TINY, "sizes": AT, "device_kind": "GPU", "xla_flags": "", "versions": {}}
    given.update(changes)
    model, at = given.pop("config"), given.pop("sizes")
    return plan_key(model, at, **given)  # type: ignore[arg-type]


@pytest.mark.requirement("WORKER-4210")
def test_whatever_decides_compilation_changes_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    changed = [
        key_of(),
        *(
            key_of(config=config(**{name: 2 * getattr(TINY, name)}))
            for name in ("vocab_size", "num_layers", "mlp_size")
        ),
        key_of(config=config(dtype="bfloat16")),
        key_of(sizes=replace(AT, slots_total=5)),
        key_of(sizes=replace(AT, max_context=320)),
        key_of(sizes=replace(AT, prefill_tokens=256)),
        key_of(device_kind="other"),
        key_of(xla_flags="--xla_gpu_autotune_level=0"),
        key_of(versions={"jax": "0.10.2"}),
        key_of(versions={"jaxlib": "0.10.2"}),
    ]
    monkeypatch.setattr(recorded, "__version__", "another")
    changed.append(key_of())
    assert len(set(changed)) == len(changed)
    assert all(len(key) == 64 and int(key, 16) >= 0 for key in changed)


def test_the_key_is_the_same_in_every_process() -> None:
    assert key_of() == key_of(xla_flags="  ")
    assert key_of(versions={"a": "1", "b": "2"}) == key_of(versions={"b": "2", "a": "1"})
    assert key_of(versions=None) == key_of(versions=installed_versions()) != key_of()
    assert installed_versions()["jax"] == jax.__version__


@pytest.mark.requirement("WORKER-4210")
def test_a_record_is_private_and_nothing_else_is_left_behind(folder: Path) -> None:
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert [path.name for path in folder.iterdir()] == [f"{KEY}.json"]
    assert stat.S_IMODE((folder / f"{KEY}.json").stat().st_mode) == 0o600


def test_a_write_that_fails_leaves_the_old_record_and_no_part(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OrcdError, match="cannot be written \\(No space left on device\\)") as caught:
        record(folder, KEY, Analysis(programs={**ANALYSIS.programs, "digest": memory()}))
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_PARAMS, "state_dir")
    monkeypatch.undo()
    assert recall(folder, KEY) == ANALYSIS
    assert len(list(folder.iterdir())) == 1


def test_a_folder_that_others_can_use_is_neither_written_nor_read(folder: Path) -> None:
    folder.chmod(0o750)
    with pytest.raises(OrcdError, match="can be used by others \\(mode 0750; run `chmod 700` on it\\)"):
        record(folder, KEY, ANALYSIS)
    assert "can be used by others" in refused(folder)


def test_a_folder_of_another_user_is_neither_written_nor_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    with pytest.raises(OrcdError, match="belongs to another user"):
        record(folder, KEY, ANALYSIS)
    assert "belongs to another user" in refused(folder)


def test_a_file_in_the_folders_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "plans").write_text("")
    with pytest.raises(OrcdError, match="cannot be written"):
        record(tmp_path / "plans", KEY, ANALYSIS)


def spoil_link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to(path.with_name("elsewhere"))


def spoil_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def spoil_size(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b" " * MAX_FILE_BYTES)


@pytest.mark.requirement("WORKER-4210")
@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.chmod(0o660), "others can write"),
        (spoil_link, "cannot be read"),
        (spoil_pipe, "not a regular file"),
        (spoil_size, f"more than {MAX_FILE_BYTES} bytes"),
        (lambda path: path.write_bytes(b""), "not in the known form"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "not in the known form"),
        (lambda path: path.write_bytes(b"\xff\xfe"), "not in the known form"),
        (lambda path: path.write_bytes(b"[" * 60_000), "not in the known form"),
        (lambda path: path.rename(path.with_name(f"{'cd' * 32}.json")), "of other programs"),
    ],
    ids=["writable", "link", "pipe", "size", "empty", "cut", "bytes", "nested", "renamed"],
)
def test_a_file_that_is_not_right_is_ignored_with_a_reason(
    folder: Path, spoil: Callable[[Path], None], why: str
) -> None:
    spoil(folder / f"{KEY}.json")
    assert why in refused(folder, KEY if (folder / f"{KEY}.json").exists() else "cd" * 32)


@pytest.mark.parametrize(
    "edit",
    [
        {"format": "other"},
        {"format_version": 2},
        {"extra": 1},
        {"analysis": {"programs": {}}},
        {"analysis": {"programs": {"prefill": ANALYSIS.programs["prefill"].model_dump()}}},
        {"key": "AB" * 32},
    ],
    ids=str,
)
def test_a_record_of_another_form_is_ignored(folder: Path, edit: dict[str, object]) -> None:
    path = folder / f"{KEY}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    assert "not in the known form" in refused(folder)


@pytest.mark.parametrize("value", [-1, 2**53, 1.5, "7", True, None, 1e300, [], float("nan")], ids=repr)
@pytest.mark.parametrize("name", ["temp_bytes", "host_alias_bytes"])
def test_a_number_of_bytes_is_a_whole_number_in_range(folder: Path, name: str, value: object) -> None:
    path = folder / f"{KEY}.json"
    edited = json.loads(path.read_text())
    edited["analysis"]["programs"]["decode"][name] = value
    path.write_text(json.dumps(edited))
    assert "not in the known form" in refused(folder)


@settings(deadline=None)
@given(data=st.binary(max_size=200), at=st.integers(0, 2000), cut=st.booleans())
def test_no_content_raises(data: bytes, at: int, cut: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("records") / "plans"
    record(folder, KEY, ANALYSIS)
    path = folder / f"{KEY}.json"
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + data + (b"" if cut else whole[at:]))
    found, reasons = None, list[str]()
    found = recall(folder, KEY, reasons.append)
    assert (found is None) == (len(reasons) == 1)
    assert all(reason.isascii() and reason.isprintable() for reason in reasons)


def test_only_so_many_records_are_kept_and_the_oldest_go(tmp_path: Path) -> None:
    folder = tmp_path / "plans"
    keys = [f"{index:064x}" for index in range(MAX_FILES + 3)]
    for index, key in enumerate(keys[:-1]):
        record(folder, key, ANALYSIS)
        os.utime(folder / f"{key}.json", (1000 + index, 1000 + index))
    (folder / "note.txt").write_text("not a record")
    record(folder, keys[-1], ANALYSIS)
    kept = {path.stem for path in folder.glob("*.json")}
    assert kept == set(keys[3:])
    assert (folder / "note.txt").exists()


def test_what_a_killed_process_left_is_removed_but_not_what_another_is_writing(folder: Path) -> None:
    stale, fresh = folder / ".aa.part", folder / ".bb.part"
    stale.write_text("")
    fresh.write_text("")
    long_ago = fresh.stat().st_mtime - STALE_PART_S - 60
    os.utime(stale, (long_ago, long_ago))
    record(folder, KEY, ANALYSIS)
    assert not stale.exists()
    assert fresh.exists()


@pytest.mark.parametrize("key", ["", "../x", "ab" * 31, "AB" * 32, f"{KEY}\n"])
def test_a_key_is_never_a_path(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="64 hex digits"):
        recall(tmp_path, key)
    with pytest.raises(ValueError, match="64 hex digits"):
        record(tmp_path / "plans", key, ANALYSIS)
