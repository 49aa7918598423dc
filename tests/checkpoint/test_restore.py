"""Restore puts the converted bytes on the device and nothing else: no other shape, dtype, model or place."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.checkpoint.manifest import Manifest, read_manifest, tensor_bytes
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore, restore_problems
from orcd_jax.checkpoint.verify import verify_files
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.config import RopeScaling, WeightDtype
from orcd_jax.models.registry import abstract_params
from tests.checkpoint.tiny import CONFIG, MemorySource, config, convert, copied, edit_manifest, list_files

Json = dict[str, Any]

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's, see below


@pytest.fixture(autouse=True)
def _collected_here() -> Iterator[None]:
    """What Orbax leaves half done complains when it is collected: after its own test, not within another."""
    yield
    gc.collect()


def refusal(directory: Path, device: jax.Device, manifest: Manifest | None = None) -> str:
    """Why a checkpoint whose files are those it lists is refused."""
    manifest = manifest or read_manifest(directory)
    verify_files(directory, manifest, lambda _: None)
    with pytest.raises(OrcdError) as caught:
        restore(directory, manifest, device)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert "convert the model again" in caught.value.message
    assert caught.value.message.isprintable()
    return caught.value.message


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_restored_arrays_are_the_converted_ones_bit_for_bit(
    tmp_path: Path, device: jax.Device, dtype: WeightDtype
) -> None:
    source = MemorySource(config=config(dtype=dtype))
    odd = [0.0, -0.0, 1e-45, -1e-38, 3e38, -3e38, float(np.float32(1) / 3)]
    source.weights["lm_head.weight"].reshape(-1)[: len(odd)] = odd
    convert(source, tmp_path / "m")
    params = restore(tmp_path / "m", read_manifest(tmp_path / "m"), device)
    for path, leaf in leaves(source.config).items():
        expected = leaf.build({name: source.weights[name] for name in leaf.sources}).astype(params[path].dtype)
        assert np.asarray(params[path]).tobytes() == expected.tobytes(), path
    assert params.keys() == leaves(source.config).keys()


@pytest.mark.requirement("WORKER-4000")
@pytest.mark.requirement("WORKER-4100")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_arrays_have_the_models_shapes_and_dtypes_and_lie_on_the_device_asked_for(
    tmp_path: Path, dtype: WeightDtype
) -> None:
    made = config(dtype=dtype)
    convert(MemorySource(config=made), tmp_path / "m")
    device = jax.local_devices()[-1]
    params = restore(tmp_path / "m", read_manifest(tmp_path / "m"), device)
    assert {path: (a.shape, a.dtype) for path, a in params.items()} == {
        path: (leaf.shape, leaf.dtype) for path, leaf in abstract_params(made).items()
    }
    assert {a.device for a in params.values()} == {device}


def test_progress_begins_at_nothing_and_ends_at_all_bytes(checkpoint: Path, device: jax.Device) -> None:
    manifest = read_manifest(checkpoint)
    points: list[Progress] = []
    restore(checkpoint, manifest, device, points.append)
    assert points == [
        Progress("restore", 0, manifest.weight_bytes),
        Progress("restore", manifest.weight_bytes, manifest.weight_bytes),
    ]


@pytest.mark.requirement("WORKER-4102")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_array_may_be_as_large_as_the_staging_memory_and_no_larger(
    tmp_path: Path, device: jax.Device, dtype: WeightDtype
) -> None:
    convert(MemorySource(config=config(dtype=dtype)), tmp_path / "m")
    manifest = read_manifest(tmp_path / "m")
    largest = max(map(tensor_bytes, manifest.tensors))
    assert restore(tmp_path / "m", manifest, device, staging_bytes=largest)
    with pytest.raises(OrcdError) as refused:
        restore(tmp_path / "m", manifest, device, staging_bytes=largest - 1)
    error = refused.value
    assert (error.code, error.needed_bytes, error.available_bytes) == (ErrorCode.HOST_OOM, largest, largest - 1)


# -- a manifest that is not of its configuration -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "path"),
    [
        (lambda m: m["tensors"].pop(0), "embed"),
        (lambda m: m["tensors"].pop(), "rope_frequencies"),
        (lambda m: m["tensors"].append({**m["tensors"][-1], "path": "zzz"}), "zzz"),
        (lambda m: m["tensors"][0].update(shape=[16, 24]), "embed"),
        (lambda m: m["tensors"][0].update(dtype="bfloat16"), "embed"),
        (lambda m: m["tensors"][0].update(shards=4), "embed"),
        (lambda m: m["tensors"][0].update(shard_axis=1), "embed"),
        (lambda m: m["config"].update(tied_embeddings=True), "head"),
        (lambda m: m["config"].update(dtype="bfloat16"), "embed"),
    ],
)
@pytest.mark.requirement("WORKER-4310")
@pytest.mark.requirement("WORKER-4412")
def test_a_table_of_other_tensors_than_the_configuration_has_is_refused(
    checkpoint: Path, tmp_path: Path, device: jax.Device, edit: Callable[[Json], object], path: str
) -> None:
    copy = copied(checkpoint, tmp_path)
    edit_manifest(copy, edit)
    assert f"lists other tensors than its configuration has, {path} for one" in refusal(copy, device)


@pytest.mark.parametrize(
    ("field", "other"),
    [
        ("positional", "rope_yarn"),
        ("attention", "mha"),
        ("architecture", "other"),
        ("quant", "int4"),
        ("tokenizer", "sentencepiece"),
    ],
)
@pytest.mark.requirement("WORKER-4600")
def test_a_description_that_is_not_of_the_configuration_is_refused(
    checkpoint: Path, tmp_path: Path, device: jax.Device, field: str, other: str
) -> None:
    """A worker's capabilities are compared with the description; it must not promise less than the model needs."""
    copy = copied(checkpoint, tmp_path)
    edit_manifest(copy, lambda value: value["model"].update({field: other}))  # type: ignore[attr-defined]
    assert "describes another model than its configuration" in refusal(copy, device)


def test_every_kind_of_position_and_attention_is_described_as_it_is(tmp_path: Path, device: jax.Device) -> None:
    for number, (scaling, kv_heads) in enumerate([(RopeScaling(kind="linear", factor=2.0), 1), (None, 4)]):
        made = config(rope_scaling=scaling, num_kv_heads=kv_heads)
        convert(MemorySource(config=made), tmp_path / str(number))
        restore(tmp_path / str(number), read_manifest(tmp_path / str(number)), device)


@pytest.mark.requirement("WORKER-4211")
def test_every_problem_of_a_manifest_is_told_at_once_and_a_good_one_has_none(checkpoint: Path, tmp_path: Path) -> None:
    assert restore_problems(read_manifest(checkpoint), staging_bytes=2**20) == []
    copy = copied(checkpoint, tmp_path)

    def spoil(value: Json) -> None:
        value["model"].update(attention="mha")
        value["tensors"].pop(0)

    edit_manifest(copy, spoil)
    problems = restore_problems(read_manifest(copy), staging_bytes=1)
    assert [problem.code.value for problem in problems] == ["MODEL_LOAD_FAILED", "MODEL_LOAD_FAILED", "HOST_OOM"]


# -- arrays that are not of the manifest -------------------------------------------------------------------------------


def with_arrays_of(other: MemorySource, checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose arrays were replaced by another model's, its table of files told to match."""
    copy = copied(checkpoint, tmp_path)
    convert(other, tmp_path / "other")
    shutil.rmtree(copy / "arrays")
    (tmp_path / "other" / "arrays").rename(copy / "arrays")
    list_files(copy)
    return copy


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"vocab_size": 25}, "embed"),
        ({"hidden_size": 8}, "embed"),
        ({"dtype": "bfloat16"}, "embed"),  # Orbax alone would convert it and say nothing
        ({"num_layers": 2}, "layers.1.attention.norm"),
        ({"tied_embeddings": True}, "head"),
        ({"attention_bias": True}, "layers.0.attention.out_bias"),
    ],
)
@pytest.mark.requirement("WORKER-4310")
@pytest.mark.requirement("WORKER-4412")
def test_the_arrays_of_another_model_are_refused(
    checkpoint: Path, tmp_path: Path, device: jax.Device, changes: dict[str, object], path: str
) -> None:
    copy = with_arrays_of(MemorySource(config=config(**changes)), checkpoint, tmp_path)
    assert f"arrays are not those of manifest.json, {path} for one" in refusal(copy, device)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "_CHECKPOINT_METADATA", "commit_success.txt"])
@pytest.mark.parametrize("content", [None, b"", b"{", b"\0" * 300])
@pytest.mark.requirement("WORKER-4310")
def test_a_foreign_file_among_the_arrays_is_one_error_or_changes_nothing(
    checkpoint: Path, tmp_path: Path, device: jax.Device, name: str, content: bytes | None
) -> None:
    """The manifest lists it, digest and all: somebody wrote both."""
    copy = copied(checkpoint, tmp_path)
    if content is None:
        (copy / "arrays" / name).unlink()
    else:
        (copy / "arrays" / name).write_bytes(content)
    list_files(copy)
    try:
        params = restore(copy, read_manifest(copy), device)
    except OrcdError:
        refusal(copy, device)
        return
    whole = restore(checkpoint, read_manifest(checkpoint), device)
    assert {p: np.asarray(a).tobytes() for p, a in params.items()} == {
        p: np.asarray(a).tobytes() for p, a in whole.items()
    }


def test_a_checkpoint_without_its_arrays_is_one_error(checkpoint: Path, tmp_path: Path, device: jax.Device) -> None:
    copy = copied(checkpoint, tmp_path)
    shutil.rmtree(copy / "arrays")
    list_files(copy)
    assert "arrays cannot be restored" in refusal(copy, device)


def test_a_missing_array_file_is_one_error(checkpoint: Path, tmp_path: Path, device: jax.Device) -> None:
    copy = copied(checkpoint, tmp_path)
    largest = max((path for path in (copy / "arrays").rglob("*") if path.is_file()), key=lambda p: p.stat().st_size)
    largest.unlink()
    list_files(copy)
    assert "arrays cannot be restored" in refusal(copy, device)


def test_the_tiny_model_has_every_kind_of_array() -> None:
    """So that the tests above speak for all."""
    assert not CONFIG.tied_embeddings
    assert len(leaves(CONFIG)) == 10
