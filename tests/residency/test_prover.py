"""The weights are proved from the bytes in device memory: what changes there is found and named, at every pass."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout

from orcd_jax.checkpoint.digest import roots_digest
from orcd_jax.checkpoint.manifest import Manifest, TensorEntry, read_manifest, tensor_bytes
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.kernels.sha256 import forest_roots
from orcd_jax.models.config import WeightDtype
from orcd_jax.residency import prover as prover_module
from orcd_jax.residency.prover import MAX_SLICE_TENSORS, Slice, WeightProver, plan_slices
from tests.checkpoint.tiny import root_by_hand, tensor_by_hand
from tests.residency.bitflip import flip_bit
from tests.tiny_checkpoint import tiny_checkpoint

__all__ = ["tiny_checkpoint"]

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")

FLIPS = 200
LAYER_BYTES = 45_000  # a layer of the tiny model is one slice, and both are alike


@pytest.fixture(scope="module")
def manifest(tiny_checkpoint: Path) -> Manifest:
    return read_manifest(tiny_checkpoint)


@pytest.fixture(scope="module")
def params(tiny_checkpoint: Path, manifest: Manifest, device: jax.Device) -> dict[str, jax.Array]:
    """The weights of this file's tests: who flips a bit flips it back."""
    return dict(restore(tiny_checkpoint, manifest, device))


@pytest.fixture(scope="module")
def prover(manifest: Manifest, params: dict[str, jax.Array], device: jax.Device) -> WeightProver:
    return WeightProver(manifest, params, device, slice_bytes=LAYER_BYTES)


def pass_over(prover: WeightProver) -> None:
    """One slice after the other, as between the steps of running jobs."""
    for index in range(len(prover.slices)):
        prover.finish(prover.begin(index))


def suspect(check: Callable[[], object]) -> str | None:
    """The tensor an error names."""
    with pytest.raises(OrcdError) as caught:
        check()
    assert caught.value.code is ErrorCode.SEAL_VERIFICATION_FAILED
    assert caught.value.message == f"tensor {caught.value.field} on the device is not the one in manifest.json"
    return caught.value.field


# -- proofs ------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4113")
def test_unchanged_weights_are_proved_at_every_pass_and_all_bytes_are_reported(
    prover: WeightProver, manifest: Manifest
) -> None:
    points: list[Progress] = []
    assert prover.prove_all(points.append) == manifest.digest
    assert {(point.stage, point.total) for point in points} == {("verify_arrays", manifest.weight_bytes)}
    assert [point.done for point in points] == [
        sum(one.size_bytes for one in prover.slices[:count]) for count in range(len(prover.slices) + 1)
    ]
    pass_over(prover)
    assert prover.prove_all() == manifest.digest


@pytest.mark.requirement("WORKER-4113")
def test_the_digest_is_computed_from_what_was_read_and_not_the_manifests_own(
    manifest: Manifest, params: dict[str, jax.Array], device: jax.Device
) -> None:
    other = manifest.model_copy(update={"digest": "0" * 64})
    assert WeightProver(other, params, device).prove_all() == manifest.digest


def flip_everywhere(prover: WeightProver, params: dict[str, jax.Array]) -> None:
    """Each flip must be found, and the tensor named; put back, the next pass must not find it."""
    rng = np.random.default_rng(4113)
    paths = sorted(params)
    for number in range(FLIPS):
        path = paths[number % len(paths)]
        bit = int(rng.integers(params[path].nbytes * 8))
        flip_bit(params[path], bit)
        assert suspect(prover.prove_all if number % 2 else lambda: pass_over(prover)) == path
        flip_bit(params[path], bit)
    pass_over(prover)


@pytest.mark.requirement("WORKER-4122")
def test_a_flipped_bit_in_a_live_array_is_found_and_named_wherever_it_is(
    prover: WeightProver, params: dict[str, jax.Array]
) -> None:
    """The same arrays are proved again and again: a prover that kept a copy of them would see none of this."""
    flip_everywhere(prover, params)


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4113")
@pytest.mark.requirement("WORKER-4122")
def test_a_flipped_bit_in_vram_is_found_and_named_wherever_it_is(
    prover: WeightProver, params: dict[str, jax.Array], manifest: Manifest, device: jax.Device
) -> None:
    """By compiled programs, from the device's memory: no copy of a weight was kept on the host on the way."""
    assert device.platform == "gpu"
    assert list(prover.programs) == ["digest_0", "digest_1"]
    flip_everywhere(prover, params)
    assert prover.prove_all() == manifest.digest
    assert all(array._npy_value is None for array in params.values())  # type: ignore[attr-defined]


@pytest.mark.requirement("WORKER-4122")
def test_the_first_and_the_last_bit_of_every_tensor_count(prover: WeightProver, params: dict[str, jax.Array]) -> None:
    for path, array in params.items():
        for bit in (0, array.nbytes * 8 - 1):
            flip_bit(array, bit)
            assert suspect(lambda: pass_over(prover)) == path
            flip_bit(array, bit)
    pass_over(prover)


def test_a_slice_answers_for_its_own_tensors(prover: WeightProver, params: dict[str, jax.Array]) -> None:
    for index, one in enumerate(prover.slices):
        flip_bit(params[one.paths[-1]], 9)
        for other in range(len(prover.slices)):
            if other != index:
                prover.finish(prover.begin(other))
        assert suspect(functools.partial(prover.finish, prover.begin(index))) == one.paths[-1]
        flip_bit(params[one.paths[-1]], 9)


def test_the_first_of_several_changed_tensors_is_named(prover: WeightProver, params: dict[str, jax.Array]) -> None:
    first, *_, last = (path for one in prover.slices for path in one.paths)
    for path in (first, last):
        flip_bit(params[path], 3)
    assert suspect(prover.prove_all) == first
    for path in (first, last):
        flip_bit(params[path], 3)


def test_slices_may_be_in_flight_together(prover: WeightProver) -> None:
    pending = [prover.begin(index) for index in range(len(prover.slices))]
    for one in reversed(pending):
        prover.finish(one)


@pytest.mark.requirement("WORKER-4113")
@pytest.mark.slow
def test_compiled_programs_read_the_weights_again_and_find_the_same(
    manifest: Manifest, params: dict[str, jax.Array], device: jax.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The path of a GPU; on the CPU backend the kernel's steps are interpreted. Layers share a program."""
    monkeypatch.setattr(prover_module, "_reads_on_host", lambda _: False)
    if device.platform == "cpu":
        monkeypatch.setattr(prover_module, "forest_roots", functools.partial(forest_roots, lanes=4, interpret=True))
    prover = WeightProver(manifest, params, device, slice_bytes=LAYER_BYTES)
    assert len(prover.slices) == 3
    assert list(prover.programs) == ["digest_0", "digest_1"]
    shards = [sum(entry.shards for entry in manifest.tensors if entry.path in one.paths) for one in prover.slices]
    roots = [prover.begin(index).roots for index in range(3)]
    assert [array.shape for array in roots if array is not None] == [(count, 8) for count in shards]
    assert prover.prove_all() == manifest.digest
    for path, array in params.items():
        flip_bit(array, array.nbytes * 4 + 5)
        assert suspect(prover.prove_all) == path
        flip_bit(array, array.nbytes * 4 + 5)
    pass_over(prover)


def test_a_worker_compiles_programs_on_a_gpu_only(prover: WeightProver, device: jax.Device) -> None:
    assert bool(prover.programs) == (device.platform == "gpu")


def test_the_digest_of_roots_is_the_one_by_hand() -> None:
    array = np.random.default_rng(0).normal(size=(4, 6, 300)).astype(np.float32)
    entry = TensorEntry(path="a.b", shape=(4, 6, 300), dtype="float32", shard_axis=1, shards=3, digest="0" * 64)
    roots = [root_by_hand(piece.tobytes()) for piece in np.split(array, 3, axis=1)]
    assert roots_digest(entry, roots) == tensor_by_hand(array, "a.b", axis=1, shards=3)
    assert roots_digest(entry, roots[::-1]) != tensor_by_hand(array, "a.b", axis=1, shards=3)


# -- what is refused ---------------------------------------------------------------------------------------------------


def refusal(manifest: Manifest, params: dict[str, jax.Array], device: jax.Device) -> OrcdError:
    with pytest.raises(OrcdError) as caught:
        WeightProver(manifest, params, device)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    return caught.value


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda array: array.reshape(-1), r"tensor embed is float32\(\d+,\), not float32\(\d+, 32\)"),
        (lambda array: array.astype(jnp.bfloat16), r"tensor embed is bfloat16\(\d+, 32\), not float32"),
        (lambda array: jax.device_put(array, Format(Layout((1, 0)), array.sharding)), "embed is not in C order"),
    ],
    ids=["shape", "dtype", "order"],
)
def test_an_array_that_is_not_the_manifests_is_refused(
    manifest: Manifest,
    params: dict[str, jax.Array],
    device: jax.Device,
    change: Callable[[jax.Array], jax.Array],
    problem: str,
) -> None:
    error = refusal(manifest, params | {"embed": change(params["embed"])}, device)
    assert error.field == "embed"
    with pytest.raises(OrcdError, match=problem):
        raise error


def test_a_missing_and_an_additional_array_are_refused(
    manifest: Manifest, params: dict[str, jax.Array], device: jax.Device
) -> None:
    assert refusal(manifest, params | {"more": params["norm"]}, device).field == "more"
    assert refusal(manifest, {path: array for path, array in params.items() if path != "norm"}, device).field == "norm"


def test_an_array_on_another_device_is_refused(manifest: Manifest, params: dict[str, jax.Array]) -> None:
    """Also on a machine with one device: a mask of devices that are not this one."""
    elsewhere = next((other for other in jax.devices() if other not in params["embed"].devices()), None)
    if elsewhere is not None:
        assert refusal(manifest, params, elsewhere).message == "tensor embed is on another device"


# -- slices ------------------------------------------------------------------------------------------------------------


def entry(path: str, *shape: int, dtype: WeightDtype = "bfloat16") -> TensorEntry:
    return TensorEntry(path=path, shape=shape, dtype=dtype, digest="0" * 64)


def model(layers: int, width: int) -> list[TensorEntry]:
    """Layers of ``2 * width * width + 2 * width`` bytes and what is besides, in a manifest's order."""
    entries = [entry("embed", 2 * width, width), entry("norm", width)]
    for layer in range(layers):
        entries += [entry(f"layers.{layer}.mlp.up", width, width), entry(f"layers.{layer}.norm", width)]
    return sorted(entries, key=lambda one: one.path)


def layers_of(one: Slice) -> set[str]:
    return {path.split(".")[1] for path in one.paths if path.startswith("layers.")}


@pytest.mark.parametrize("layers", [1, 2, 11, 32])
@pytest.mark.parametrize("target", [1, 3_000, 9_000, 50_000, 10**9])
def test_every_tensor_is_in_one_slice_and_slices_keep_to_the_target(layers: int, target: int) -> None:
    tensors = model(layers, width=32)
    slices = plan_slices(tensors, target)
    sizes = {one.path: tensor_bytes(one) for one in tensors}
    assert sorted(path for one in slices for path in one.paths) == sorted(sizes)
    for one in slices:
        assert one.size_bytes == sum(sizes[path] for path in one.paths)
        assert one.size_bytes <= target or len(one.paths) == 1
        assert len(one.paths) <= MAX_SLICE_TENSORS


@pytest.mark.parametrize(
    ("target", "counts"),
    [
        (2_112, [1] * 11),  # one layer each
        (5 * 2_112, [3, 4, 4]),  # of up to five, but of few sizes
        (10**9, [5, 6]),  # of up to eight, for the compiler's sake
    ],
)
def test_layers_that_are_alike_share_slices_of_at_most_two_sizes(target: int, counts: list[int]) -> None:
    slices = [one for one in plan_slices(model(11, width=32), target) if layers_of(one)]
    assert sorted(len(layers_of(one)) for one in slices) == counts
    assert all(len(one.paths) == 2 * len(layers_of(one)) for one in slices)


def test_layers_that_differ_do_not_share_a_slice() -> None:
    tensors = [entry("layers.0.up", 32, 32), entry("layers.1.up", 32, 32), entry("layers.2.up", 32, 33)]
    assert [one.paths for one in plan_slices(tensors, 10**9)] == [("layers.0.up", "layers.1.up"), ("layers.2.up",)]


def test_a_large_layer_is_cut_and_a_large_tensor_is_a_slice_of_its_own() -> None:
    tensors = [entry("layers.0.a", 10), entry("layers.0.b", 1000), entry("layers.0.c", 10), entry("layers.0.d", 20)]
    assert [one.paths for one in plan_slices(tensors, 50)] == [
        ("layers.0.a",),
        ("layers.0.b",),
        ("layers.0.c",),
        ("layers.0.d",),
    ]
    assert [one.paths for one in plan_slices(tensors, 60)][-1] == ("layers.0.c", "layers.0.d")
