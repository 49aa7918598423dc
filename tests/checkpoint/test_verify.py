"""A damaged checkpoint is refused before anything of it is parsed, and a damaged array before it is used."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from numpy.typing import NDArray

from orcd_jax.checkpoint import verify as verify_module
from orcd_jax.checkpoint.manifest import Manifest, read_manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import read_verified, verify_arrays, verify_files
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.worker.capability import check_capabilities
from tests.checkpoint.tiny import MemorySource, config, convert, copied, list_files, tensor_by_hand

FLIPS_PER_FILE = 9


def flip_bit(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def refusal(directory: Path, manifest: Manifest) -> str:
    """Why a checkpoint's files are refused: one typed error that can be shown."""
    with pytest.raises(OrcdError) as caught:
        verify_files(directory, manifest, lambda _: None)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert caught.value.message.isprintable()
    return caught.value.message


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return copied(checkpoint, tmp_path)


@pytest.fixture
def manifest(checkpoint: Path) -> Manifest:
    return read_manifest(checkpoint)


# -- files -------------------------------------------------------------------------------------------------------------


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
    for path in files_below(copy):
        if path.name not in ("tokenizer.json", "manifest.json"):
            path.unlink()
    monkeypatch.setattr(verify_module, "file_digest", None)
    assert f"has {len(change)} bytes instead of {before}" in refusal(copy, only)


def make_link(path: Path) -> None:
    kept = path.rename(path.with_name("kept"))
    path.symlink_to(kept)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def replaced(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace


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


# -- arrays ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def params(checkpoint: Path, manifest: Manifest, device: jax.Device) -> dict[str, jax.Array]:
    return dict(restore(checkpoint, manifest, device))


def flipped(array: jax.Array, bit: int) -> jax.Array:
    raw = np.array(array)
    raw.view(np.uint8).reshape(-1)[bit // 8] ^= 1 << bit % 8
    placed: jax.Array = jax.device_put(raw, array.device)
    return placed


def suspect(manifest: Manifest, params: dict[str, jax.Array]) -> str | None:
    """The tensor an error names."""
    with pytest.raises(OrcdError) as caught:
        verify_arrays(manifest, params, lambda _: None)
    assert caught.value.code is ErrorCode.SEAL_VERIFICATION_FAILED
    assert f"tensor {caught.value.field} on the device" in caught.value.message
    return caught.value.field


def test_the_arrays_of_a_whole_checkpoint_pass_and_all_bytes_are_reported(
    manifest: Manifest, params: dict[str, jax.Array]
) -> None:
    points: list[Progress] = []
    verify_arrays(manifest, params, points.append)
    assert [p.percent for p in (points[0], points[-1])] == [0, 100]
    assert {(p.stage, p.total) for p in points} == {("verify_arrays", manifest.weight_bytes)}


@pytest.mark.requirement("WORKER-4310")
def test_one_flipped_bit_in_any_array_names_its_tensor(manifest: Manifest, params: dict[str, jax.Array]) -> None:
    rng = np.random.default_rng(1)
    for path, array in params.items():
        for bit in (0, array.nbytes * 8 - 1, *rng.integers(0, array.nbytes * 8, 5)):
            assert suspect(manifest, params | {path: flipped(array, int(bit))}) == path


def test_two_arrays_in_each_others_place_are_found(manifest: Manifest, params: dict[str, jax.Array]) -> None:
    attention, mlp = "layers.0.attention.norm", "layers.0.mlp.norm"
    assert params[attention].shape == params[mlp].shape
    assert suspect(manifest, params | {attention: params[mlp], mlp: params[attention]}) == attention


def test_another_shape_or_dtype_is_found(manifest: Manifest, params: dict[str, jax.Array]) -> None:
    embed = params["embed"]
    assert suspect(manifest, params | {"embed": embed.reshape(16, 24)}) == "embed"
    assert suspect(manifest, params | {"embed": embed.astype("bfloat16")}) == "embed"


def test_the_payload_of_a_nan_is_compared_too(manifest: Manifest, params: dict[str, jax.Array]) -> None:
    """One NaN never equals another; their bits do or do not."""
    bits: NDArray[np.generic] = np.full(16, 0x7FC0_1234, np.uint32)
    nans = bits.view(np.float32)
    entries = tuple(
        entry.model_copy(update={"digest": tensor_by_hand(nans, entry.path)}) if entry.path == "norm" else entry
        for entry in manifest.tensors
    )
    with_nans = manifest.model_copy(update={"tensors": entries})
    placed = jax.device_put(nans, params["norm"].device)
    verify_arrays(with_nans, params | {"norm": placed}, lambda _: None)
    assert suspect(with_nans, params | {"norm": flipped(placed, 5)}) == "norm"


def test_files_that_were_listed_anew_do_not_make_the_arrays_those_of_the_manifest(
    copy: Path, device: jax.Device
) -> None:
    """The digests beside the arrays were repaired, as somebody might who edits a checkpoint; a tensor was not."""
    weights = MemorySource().weights
    changed = {**weights, "model.norm.weight": np.ones(16, np.float32)}
    other = copy.with_name("other")
    convert(MemorySource(weights=changed), other)
    for path in files_below(copy / "arrays"):
        path.unlink()
    for path in files_below(other / "arrays"):
        target = copy / path.relative_to(other)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    list_files(copy)
    manifest = read_manifest(copy)
    verify_files(copy, manifest, lambda _: None)
    assert suspect(manifest, dict(restore(copy, manifest, device))) == "norm"


@pytest.mark.requirement("WORKER-4310")
def test_what_is_read_after_the_check_is_compared_once_more(tmp_path: Path) -> None:
    """A file exchanged between its hash and its use is found by the bytes that are used."""
    convert(MemorySource(config=config()), tmp_path / "m")
    manifest = read_manifest(tmp_path / "m")
    whole = (tmp_path / "m" / "tokenizer.json").read_bytes()
    assert read_verified(tmp_path / "m", manifest, "tokenizer.json", 10**6) == whole
    assert read_verified(tmp_path / "m", manifest, "nothing.json", 10**6) is None
    for changed in (whole[:-1], whole + b" ", whole[:-2] + b"?" + whole[-1:]):
        (tmp_path / "m" / "tokenizer.json").write_bytes(changed)
        with pytest.raises(OrcdError, match=r"tokenizer\.json was changed while the model was loaded"):
            read_verified(tmp_path / "m", manifest, "tokenizer.json", 10**6)
    with pytest.raises(OrcdError, match="over the limit of 3"):
        read_verified(tmp_path / "m", manifest, "tokenizer.json", 3)
