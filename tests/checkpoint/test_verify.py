"""A checkpoint whose files are not those of its manifest is refused before anything of it is parsed."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from orcd_jax.checkpoint import verify as verify_module
from orcd_jax.checkpoint.manifest import Manifest, read_manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import verify_files
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker.capability import check_capabilities
from tests.checkpoint.damages import files_below, flip_bit, make_link, make_socket, replaced

FLIPS_PER_FILE = 9


def refusal(directory: Path, manifest: Manifest) -> str:
    """Why a checkpoint's files are refused: one typed error that can be shown."""
    with pytest.raises(OrcdError) as caught:
        verify_files(directory, manifest, lambda _: None)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert caught.value.message.isprintable()
    return caught.value.message


def test_a_whole_checkpoint_passes_and_every_byte_is_reported(checkpoint: Path, manifest: Manifest) -> None:
    points: list[Progress] = []
    verify_files(checkpoint, manifest, points.append)
    total = sum(entry.size_bytes for entry in manifest.files)
    assert [points[0].done, points[-1].done] == [0, total]
    assert {(p.stage, p.total) for p in points} == {("verify_files", total)}
    assert [p.done for p in points] == sorted(p.done for p in points)


@pytest.mark.requirement("WORKER-4310")
@pytest.mark.requirement("WORKER-4313")
def test_one_flipped_bit_in_any_file_is_refused_by_name(copy: Path, manifest: Manifest) -> None:
    rng = np.random.default_rng(4310)
    tried = 0
    for path in files_below(copy):
        if path.name == "manifest.json":
            continue
        name, whole = path.relative_to(copy).as_posix(), path.read_bytes()
        for bit in rng.integers(0, len(whole) * 8, FLIPS_PER_FILE):
            flip_bit(path, int(bit))
            assert f"file {name} has another SHA-256" in refusal(copy, manifest), bit
            path.write_bytes(whole)
            tried += 1
    assert tried >= 200
    verify_files(copy, manifest, lambda _: None)


class OrbaxWasAsked(BaseException):
    """Raised where restoring begins; no handler of errors catches it."""


def deciding_part(manifest: bytes) -> object:
    """All of a manifest but the model's name and history, which decide nothing; None when it is not JSON."""
    try:
        value = json.loads(manifest)
        model = {key: told for key, told in value["model"].items() if key != "model_id"}
    except (ValueError, KeyError):
        return None
    return value | {"model": model, "source": None}


@pytest.mark.requirement("WORKER-4310")
@pytest.mark.requirement("WORKER-4313")
def test_one_flipped_bit_in_the_manifest_is_refused_before_anything_is_restored(
    copy: Path, device: jax.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> None:
        raise OrbaxWasAsked

    monkeypatch.setattr(ocp, "Checkpointer", asked)
    path = copy / "manifest.json"
    whole, refused = path.read_bytes(), 0
    for bit in np.random.default_rng(4304).integers(0, len(whole) * 8, 400):
        flip_bit(path, int(bit))
        try:
            damaged = read_manifest(copy)
            check_capabilities(damaged.model)
            verify_files(copy, damaged, lambda _: None)
            restore(copy, damaged, device)
        except OrcdError:
            refused += 1
        except OrbaxWasAsked:
            assert deciding_part(path.read_bytes()) == deciding_part(whole), f"bit {bit} was not noticed"
        path.write_bytes(whole)
    assert refused > 350


def test_the_first_of_several_damaged_files_is_one_error(copy: Path, manifest: Manifest) -> None:
    for path in files_below(copy):
        if path.name != "manifest.json":
            flip_bit(path, 3)
    assert f"file {manifest.files[0].path} has another SHA-256" in refusal(copy, manifest)


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "arrays/_METADATA"])
def test_a_missing_file_is_named(copy: Path, manifest: Manifest, name: str) -> None:
    (copy / name).unlink()
    assert f"file {name} is missing" in refusal(copy, manifest)


@pytest.mark.parametrize("name", ["more", ".hidden", "arrays/d/more", "new/folder/more", "manifest.json.old"])
def test_an_additional_file_is_named(copy: Path, manifest: Manifest, name: str) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_bytes(b"")
    assert f"file {name} is not listed" in refusal(copy, manifest)


def test_the_name_of_an_additional_file_cannot_steer_a_terminal(copy: Path, manifest: Manifest) -> None:
    (copy / "\x1b[2J\n\u202e").write_bytes(b"")
    Path(os.fsdecode(os.fsencode(copy) + b"/\xff\xfe")).write_bytes(b"")
    assert "file ?[2J?? is not listed" in refusal(copy, manifest)


@pytest.mark.parametrize("change", [b"", b"longer than it was, and of another content" * 100])
def test_another_size_is_told_without_reading_the_file(
    copy: Path, manifest: Manifest, change: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (copy / "tokenizer.json").stat().st_size
    (copy / "tokenizer.json").write_bytes(change)
    only = manifest.model_copy(update={"files": tuple(f for f in manifest.files if f.path == "tokenizer.json")})
    (copy / "chat_template.jinja").unlink()
    shutil.rmtree(copy / "arrays")
    monkeypatch.setattr(verify_module, "file_digest", None)
    assert f"has {len(change)} bytes instead of {before}" in refusal(copy, only)


@pytest.mark.parametrize(
    "change",
    [make_link, replaced(os.mkfifo), replaced(make_socket), replaced(lambda path: path.symlink_to("/dev/zero"))],
    ids=["link", "fifo", "socket", "link to a device"],
)
@pytest.mark.requirement("WORKER-4320")
def test_what_is_not_a_plain_file_is_refused_unopened(
    copy: Path, manifest: Manifest, change: Callable[[Path], None]
) -> None:
    change(copy / "tokenizer.json")
    assert "file tokenizer.json is a link or a special file" in refusal(copy, manifest)


@pytest.mark.requirement("WORKER-4320")
def test_a_link_in_place_of_a_folder_is_refused(copy: Path, manifest: Manifest, tmp_path: Path) -> None:
    """Even to the true content: what lies outside the folder can change after it was checked."""
    outside = (copy / "arrays").rename(tmp_path / "arrays")
    (copy / "arrays").symlink_to(outside)
    assert "file arrays is a link or a special file" in refusal(copy, manifest)


@pytest.mark.parametrize("name", ["tokenizer.json", "manifest.json", "arrays/_METADATA"])
@pytest.mark.requirement("WORKER-4320")
def test_a_hard_link_is_refused_with_its_count(copy: Path, manifest: Manifest, tmp_path: Path, name: str) -> None:
    os.link(copy / name, tmp_path / "outside")
    assert f"file {name} has 2 names (hard links), and may have one" in refusal(copy, manifest)


@pytest.mark.requirement("WORKER-4312")
def test_files_that_claim_more_than_the_weights_can_take_are_refused_unread(copy: Path, manifest: Manifest) -> None:
    """A sparse file takes no room on the disk, and days to read."""
    most = 2 * manifest.weight_bytes + 16 * 2**30
    rest = sum(entry.size_bytes for entry in manifest.files if entry.path != "tokenizer.json")

    def claiming(size: int) -> Manifest:
        changed = {"tokenizer.json": {"size_bytes": size}}
        files = tuple(entry.model_copy(update=changed.get(entry.path)) for entry in manifest.files)
        return manifest.model_copy(update={"files": files})

    assert "tokenizer.json has 17 bytes instead of" in refusal(copy, claiming(most - rest))
    os.truncate(copy / "tokenizer.json", most - rest + 1)
    assert f"tokenizer.json makes them {most + 1} bytes" in refusal(copy, claiming(most - rest + 1))


@pytest.mark.parametrize("name", ["new", "arrays/d/new", "new/folder", "arrays/ocdbt.process_1"])
@pytest.mark.requirement("WORKER-4310")
def test_a_folder_without_a_listed_file_is_named(copy: Path, manifest: Manifest, name: str) -> None:
    """What reads the arrays may go by the names of folders."""
    (copy / name).mkdir(parents=True)
    assert f"file {name.removesuffix('/folder')} is not listed in manifest.json" in refusal(copy, manifest)


@pytest.mark.requirement("WORKER-4312")
def test_no_more_folders_are_looked_at_than_there_may_be_files(
    copy: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify_module, "MAX_FILES", 50)
    for number in range(50):
        (copy / f"{number}").mkdir()
    assert "is one too many: there may be 50" in refusal(copy, manifest)


def test_a_folder_in_place_of_a_file_is_refused(copy: Path, manifest: Manifest) -> None:
    (copy / "tokenizer.json").unlink()
    (copy / "tokenizer.json").mkdir()
    assert "file tokenizer.json is missing" in refusal(copy, manifest)


def test_a_folder_that_is_gone_is_one_error(tmp_path: Path, manifest: Manifest) -> None:
    assert "the model directory cannot be read (No such file or directory)" in refusal(tmp_path / "no", manifest)


def test_a_folder_without_permission_says_what_to_check(
    copy: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulated: tests may run as root, who may read everything."""
    scandir = os.scandir

    def denied(path: str) -> Iterator[os.DirEntry[str]]:
        if Path(path).name == "arrays":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    message = refusal(copy, manifest)
    assert "cannot be read (Permission denied): check its permissions" in message


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ENOENT])
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    copy: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def failing(*_: object) -> tuple[int, str]:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(verify_module, "file_digest", failing)
    assert f"file {manifest.files[0].path} cannot be read ({os.strerror(number)})" in refusal(copy, manifest)
