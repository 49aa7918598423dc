"""An array on the device that is not the manifest's is named before it is used."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.checkpoint.manifest import Manifest, read_manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import verify_files
from orcd_jax.errors import ErrorCode, OrcdError
from tests.checkpoint.damages import files_below
from tests.checkpoint.proof import proved
from tests.checkpoint.tiny import MemorySource, convert, list_files, tensor_by_hand


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
        proved(manifest, params)
    assert caught.value.code is ErrorCode.SEAL_VERIFICATION_FAILED
    assert f"tensor {caught.value.field} on the device" in caught.value.message
    return caught.value.field


def test_the_arrays_of_a_whole_checkpoint_pass_and_all_bytes_are_reported(
    manifest: Manifest, params: dict[str, jax.Array]
) -> None:
    points: list[Progress] = []
    assert proved(manifest, params, points.append) == manifest.digest
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
    for other in (embed.reshape(16, 24), embed.astype("bfloat16")):
        with pytest.raises(OrcdError, match=r"tensor embed is .*, not float32") as caught:
            proved(manifest, params | {"embed": other})
        assert (caught.value.code, caught.value.field) == (ErrorCode.MODEL_LOAD_FAILED, "embed")


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
    proved(with_nans, params | {"norm": placed})
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
