"""The tree roots from the device equal those of plain ``hashlib``, for every dtype, size and cut."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.checkpoint import digest as reference
from orcd_jax.kernels import sha256, sha256_rounds
from orcd_jax.kernels.sha256 import CHUNK_BYTES, Grid, forest_roots, tree_roots
from tests.checkpoint.tiny import root_by_hand

WHOLE: Grid = (None, 1)
DTYPES = ["float32", "bfloat16", "float16", "uint8", "int8", "uint16", "uint32", "int32", "float8_e4m3fn"]
QUICK: dict[str, str | bool] = {"xla_backend_optimization_level": "0", "xla_disable_hlo_passes": "fusion"}
"""To compile the interpreted kernel takes a hundred times longer than to run it."""
Case = tuple[str, tuple[int, ...], Grid]

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


CHUNKS: dict[str, int] = {dtype: CHUNK_BYTES // jnp.dtype(dtype).itemsize for dtype in DTYPES}
"""Elements of a chunk."""

CASES: dict[str, Case] = {
    "one element": ("float32", (), WHOLE),
    "a chunk but one element": ("float32", (1023,), WHOLE),
    "a chunk": ("float32", (1024,), WHOLE),
    "a chunk and one element": ("float32", (1025,), WHOLE),
    **{f"two chunks of {dtype}": (dtype, (2 * CHUNKS[dtype],), WHOLE) for dtype in DTYPES},
    **{f"odd {dtype}": (dtype, (9 * CHUNKS[dtype] + 51,), WHOLE) for dtype in ("float32", "bfloat16", "uint8")},
    # Along the first axis a slice is one run: of whole chunks, of whole blocks, of anything.
    "slices of whole chunks": ("float32", (4, 1024), (0, 4)),
    "slices of whole blocks": ("bfloat16", (6, 16, 96), (0, 3)),
    "odd slices": ("float16", (10, 1027), (0, 5)),
    # Along others it is many: of whole chunks, of whole blocks, across chunks, of anything.
    "runs of whole chunks": ("bfloat16", (3, 2, 2048), (1, 2)),
    "runs of whole blocks": ("float32", (2, 8, 320), (1, 4)),
    "runs of whole blocks across chunks": ("bfloat16", (2, 6, 2080), (1, 3)),
    "odd runs": ("float32", (50, 3, 7), (1, 3)),
    "odd runs of bytes": ("int8", (128, 64, 2), (2, 2)),
    "runs of three elements": ("float16", (5, 5, 600), (2, 200)),
    "one slice along an axis": ("bfloat16", (3, 1, 1500), (1, 1)),
    "one odd slice along an axis": ("float32", (7, 30), (1, 1)),
    # Up to 128 chunks have one level above them; one chunk has none.
    "a whole node": ("uint32", (128 * 1024,), WHOLE),
    "a node and a chunk": ("bfloat16", (129 * 2048,), WHOLE),
    "three levels in slices": ("bfloat16", (2, 130 * 2048 + 1), (0, 2)),
}


GROUPS = [list(CASES)[start : start + 8] for start in range(0, len(CASES), 8)]


def random_array(dtype: str, shape: tuple[int, ...], seed: int = 0) -> NDArray[np.generic]:
    """Any bits: NaNs of every kind, infinities and subnormal numbers among them."""
    wanted = jnp.dtype(dtype)
    raw = np.random.default_rng(seed).bytes(math.prod(shape) * wanted.itemsize)
    return np.frombuffer(raw, wanted).reshape(shape)


def interpretable(array: NDArray[np.generic]) -> NDArray[np.generic]:
    """Without NaNs, where the CPU backend would touch them: it moves narrow floats as float32, which sets a bit."""
    narrow = jnp.issubdtype(array.dtype, jnp.floating) and array.dtype.itemsize < 4
    with np.errstate(invalid="ignore"):
        return np.where(np.isnan(array), np.ones((), array.dtype), array) if narrow else array


def by_hand(array: NDArray[np.generic], grid: Grid) -> list[bytes]:
    """The roots of the slices, by ``hashlib`` alone."""
    axis, slices = grid
    bits = array.view(f"u{array.dtype.itemsize}")
    return [root_by_hand(piece.tobytes()) for piece in (np.split(bits, slices, axis) if axis is not None else [bits])]


def interpreted(arrays: Sequence[NDArray[np.generic]], grids: Sequence[Grid], *, lanes: int = 4) -> list[bytes]:
    """The roots by the kernel's own steps, on any platform."""
    traced = jax.jit(lambda *given: forest_roots(given, grids, lanes=lanes, interpret=True))
    program = traced.lower(*arrays).compile(QUICK)
    return [row.tobytes() for row in np.asarray(program(*arrays))]


@functools.cache
def case_array(name: str) -> NDArray[np.generic]:
    dtype, shape, _ = CASES[name]
    return interpretable(random_array(dtype, shape, list(CASES).index(name)))


@functools.cache
def group_roots(group: int) -> dict[str, list[bytes]]:
    """Of several cases in one forest: few compilations, and most tensors have others before and behind them."""
    names = GROUPS[group]
    rows = iter(interpreted([case_array(name) for name in names], [CASES[name][2] for name in names]))
    found = {name: list(itertools.islice(rows, CASES[name][2][1])) for name in names}
    assert next(rows, None) is None
    return found


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4113")
@pytest.mark.parametrize(("group", "name"), [(at, name) for at, names in enumerate(GROUPS) for name in names])
def test_every_tensor_has_the_roots_by_hand(group: int, name: str) -> None:
    assert group_roots(group)[name] == by_hand(case_array(name), CASES[name][2])


@pytest.mark.requirement("WORKER-4410")
@pytest.mark.parametrize("name", CASES)
def test_every_chunk_is_read_from_its_place_and_none_from_or_to_beyond(name: str) -> None:
    """A GPU stops no load or store that misses its array, and a wide load that is not aligned ends the process."""
    dtype, shape, (axis, slices) = CASES[name]
    size, chunk, lanes = math.prod(shape), CHUNKS[dtype], 64
    at = np.arange(size, dtype=np.int32).reshape(shape)
    places = [part.reshape(-1) for part in (np.split(at, slices, axis) if axis is not None else [at])]
    tensor = sha256._Tensor.cut(0, shape, jnp.dtype(dtype), (axis, slices))
    stored: dict[int, NDArray[np.int32]] = {}
    for segment in sha256._segments([tensor]):
        reader = segment.reader
        for program in range(segment.programs(lanes)):
            chunks = segment.place(jnp.int32(program), lanes)
            element = np.asarray(chunks.first)[:, None] + np.arange(chunk, dtype=np.int32)
            place = np.asarray(reader._place(chunks._replace(origin=chunks.origin[:, None]), jnp.asarray(element)))
            if reader.together:
                loads = place.reshape(lanes, -1, 16 * chunk // CHUNK_BYTES)
                assert not (loads[..., 0] % loads.shape[2]).any()
                assert (np.diff(loads) == 1).all()
                assert (element < tensor.length).all()
            for lane, row in enumerate(np.asarray(chunks.row).tolist()):
                stored[row] = place[lane][element[lane] < int(chunks.length[lane])]
    expected = [part[start : start + chunk] for part in places for start in range(0, len(part), chunk)]
    assert sorted(stored) == list(range(len(expected)))
    for row, wanted in enumerate(expected):
        np.testing.assert_array_equal(stored[row], wanted)


def test_whole_chunks_beside_a_rest_are_read_16_bytes_at_a_time() -> None:
    whole, rest = sha256._segments([sha256._Tensor.cut(0, (9 * 2048 + 1,), jnp.dtype(jnp.bfloat16), WHOLE)])
    assert (whole.chunks, whole.reader.together) == (9, True)
    assert (rest.chunks, rest.reader.together) == (1, False)


def test_the_constants_are_those_of_the_standard() -> None:
    """FIPS 180-4, 4.2.2 and 5.3.3: the first and the last of each."""
    assert [hex(value) for value in sha256_rounds.INITIAL[[0, -1]]] == ["0x6a09e667", "0x5be0cd19"]
    assert [hex(value) for value in sha256_rounds.CONSTANTS[[0, -1]]] == ["0x428a2f98", "0xc67178f2"]
    assert (len(sha256_rounds.INITIAL), len(sha256_rounds.CONSTANTS)) == (8, 64)


def test_the_chunk_is_that_of_the_checkpoint() -> None:
    assert reference.CHUNK == CHUNK_BYTES


def test_no_bytes_are_one_chunk_of_zeros() -> None:
    root = hashlib.sha256(bytes(CHUNK_BYTES)).digest()
    empty = np.zeros((0, 3), np.float32)
    assert interpreted([empty, np.zeros(1024, np.float32)], [(1, 3), WHOLE]) == [root] * 4


def test_one_array_is_a_forest_of_one_whatever_the_lanes() -> None:
    array = random_array("float32", (2, 1024))
    found = jax.jit(lambda given: tree_roots(given, 0, 2, lanes=8, interpret=True))(array)
    assert (found.shape, found.dtype) == ((2, 8), jnp.uint32)
    assert [row.tobytes() for row in np.asarray(found)] == by_hand(array, (0, 2))


@pytest.mark.parametrize(
    ("array", "grid", "problem"),
    [
        (jax.ShapeDtypeStruct((4,), jnp.bool_), WHOLE, "bool is not a dtype of 8, 16 or 32 bits"),
        (jax.ShapeDtypeStruct((4,), jnp.int4), WHOLE, "int4 is not a dtype"),
        (jax.ShapeDtypeStruct((4,), jnp.complex64), WHOLE, "complex64 is not a dtype"),
        (jax.ShapeDtypeStruct((4, 6), jnp.float32), (1, 4), "4 slices do not divide axis 1"),
        (jax.ShapeDtypeStruct((4, 6), jnp.float32), (2, 1), "1 slices do not divide axis 2"),
        (jax.ShapeDtypeStruct((4, 6), jnp.float32), (-1, 2), "2 slices do not divide axis -1"),
        (jax.ShapeDtypeStruct((4, 6), jnp.float32), (0, 0), "0 slices do not divide axis 0"),
        (jax.ShapeDtypeStruct((4, 6), jnp.float32), (None, 2), "2 slices along no axis"),
        (jax.ShapeDtypeStruct((2**31,), jnp.uint8), WHOLE, "2147483648 elements are more than one array may have"),
    ],
)
def test_what_the_kernel_cannot_hash_is_refused(array: jax.ShapeDtypeStruct, grid: Grid, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        jax.eval_shape(lambda given: tree_roots(given, *grid), array)


# -- compiled ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def a_gpu_to_lower_for() -> Iterator[None]:
    """JAX 0.11 lowers a kernel for a described GPU only; 0.10 assumes one."""
    if jax.__version_info__ < (0, 11):
        yield
        return
    described = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=described)):
        yield


def test_the_kernel_lowers_for_a_gpu_whatever_it_is_given() -> None:
    """What Triton's part of Pallas cannot express fails here, without a GPU. One launch for each level of all trees."""
    given = [jax.ShapeDtypeStruct((2 * CHUNKS[dtype] + 5,), jnp.dtype(dtype)) for dtype in ("float32", "float8_e4m3fn")]
    given += [jax.ShapeDtypeStruct((2, 8, 320), jnp.bfloat16), jax.ShapeDtypeStruct((50, 3, 7), jnp.uint16)]
    grids = [WHOLE, WHOLE, (1, 4), (1, 3)]
    with a_gpu_to_lower_for():
        traced = jax.jit(lambda *arrays: forest_roots(arrays, grids)).trace(*given)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("xla.gpu.triton") == 2


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4113")
@pytest.mark.parametrize("names", GROUPS, ids=lambda names: f"{names[0]} to {names[-1]}")
def test_the_compiled_kernel_has_the_roots_by_hand(device: jax.Device, names: list[str]) -> None:
    arrays = [random_array(*CASES[name][:2], seed) for seed, name in enumerate(names)]
    grids = [CASES[name][2] for name in names]
    found = jax.jit(lambda *given: forest_roots(given, grids))(*(jax.device_put(array, device) for array in arrays))
    rows = (row.tobytes() for row in np.asarray(found))
    wrong = [
        name
        for name, array, grid in zip(names, arrays, grids, strict=True)
        if by_hand(array, grid) != list(itertools.islice(rows, grid[1]))
    ]
    assert not wrong


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4113")
@pytest.mark.parametrize(
    ("dtype", "shape", "grid"),
    [
        ("bfloat16", (128 * 2**20,), WHOLE),
        ("bfloat16", (2, 8192, 8192), (1, 8)),
        ("float32", (8, 8 * 2**20), (0, 8)),
        ("uint8", (256 * 2**20 + 1,), WHOLE),
    ],
)
def test_256_megabytes_on_the_device_are_hashed_where_they_lie(
    device: jax.Device, dtype: str, shape: tuple[int, ...], grid: Grid
) -> None:
    array = random_array(dtype, shape)
    placed = jax.device_put(array, device)
    program = jax.jit(lambda given: tree_roots(given, *grid)).lower(placed).compile()
    assert [row.tobytes() for row in np.asarray(program(placed))] == by_hand(array, grid)
    memory = program.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < array.nbytes // 50, "the digests of the chunks take 1/128; a copy, all of it"
    assert (memory.host_temp_size_in_bytes, memory.host_argument_size_in_bytes) == (0, 0)
