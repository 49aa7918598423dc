#!/usr/bin/env python3
"""How fast weights are proved where they lie: GB/s of one array's tree root, and of a whole model, slice by slice.

    python tools/bench_digest.py                                   # an 8B model on a GPU, a small one on a CPU
    python tools/bench_digest.py --slice_mb=256,512,1024 --json=digest.json
    python tools/bench_digest.py --model=none --sizes_mb=1024 --lanes=32,64,128 --variants=in_place,bitcast

Everything that is measured is compared with ``hashlib``, to the last byte. On a GPU the kernel is measured; on the CPU
backend, the host's hashing, which is what a worker does there. The floor of each figure is the time at the goal's rate.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orcd_jax.checkpoint.digest import tree_root
from orcd_jax.checkpoint.manifest import Manifest
from orcd_jax.kernels.sha256 import CHUNK_BYTES, LANES, tree_roots
from orcd_jax.models.registry import Params
from orcd_jax.residency.prover import WeightProver
from tools.bench_figures import GOAL_GB_S, REQUIRED_GB_S, median_seconds
from tools.bench_model import SHAPES, model_config, random_model
from tools.bench_report import BenchError, Report, first_device, integers, is_gpu, json_file

DTYPES = ("bfloat16", "float32", "uint8")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured rate.

    Attributes:
      seconds: median of a pass.
      floor_seconds: of a pass at the goal's rate.
      compile_seconds: of the programs, 0 where nothing is compiled.
      temp_bytes: the most that a program needs besides the weights.
      judged: the required rate is that of this.
    """

    what: str
    bytes: int
    seconds: float
    compile_seconds: float = 0.0
    temp_bytes: int = 0
    judged: bool = False

    @property
    def gb_s(self) -> float:
        return self.bytes / self.seconds / 1e9

    @property
    def floor_seconds(self) -> float:
        return self.bytes / GOAL_GB_S / 1e9

    @property
    def ratio(self) -> float:
        return self.floor_seconds / self.seconds

    def json(self) -> dict[str, object]:
        """Everything, for JSON."""
        return asdict(self) | {"gb_s": self.gb_s, "floor_seconds": self.floor_seconds, "ratio": self.ratio}

    def row(self) -> str:
        """A line of the table."""
        return (
            f"{self.what:<44}{self.seconds * 1e3:>10.3f}{self.floor_seconds * 1e3:>10.3f}{self.ratio:>7.2f}"
            f"{self.gb_s:>10.1f}{self.compile_seconds:>10.1f}{self.temp_bytes / 1e6:>9.1f}"
        )


HEADER = f"{'what':<44}{'ms':>10}{'floor ms':>10}{'ratio':>7}{'GB/s':>10}{'compile s':>10}{'temp MB':>9}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 2**20 else f"{size_bytes} B"


# -- one array ---------------------------------------------------------------------------------------------------------


def in_place(array: jax.Array, lanes: int) -> jax.Array:
    """As the worker does it: the kernel reads the elements as they are."""
    return tree_roots(array, None, 1, lanes=lanes)


def bitcast(array: jax.Array, lanes: int) -> jax.Array:
    """The other way: XLA reinterprets the array as words first, and may have to copy it."""
    words = lax.bitcast_convert_type(array.reshape(-1, 4 // array.dtype.itemsize), jnp.uint32)
    return tree_roots(words, None, 1, lanes=lanes)


VARIANTS = {"in_place": in_place, "bitcast": bitcast}


def random_array(dtype: str, elements: int, device: jax.Device, seed: int = 0) -> jax.Array:
    """Numbers of a usual size, made on the device."""
    with jax.default_device(device):
        key = jax.random.key(seed)
        if jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
            return jax.random.normal(key, (elements,), dtype)
        return jax.random.bits(key, (elements,), dtype)


def require_root(found: jax.Array, array: jax.Array, what: str) -> None:
    """Compares a root with that of ``hashlib``.

    Raises:
      BenchError: it is another.
    """
    if np.asarray(found).tobytes() != tree_root(np.asarray(array).view(np.uint8).data):
        raise BenchError(f"the root of {what} is wrong")


def check_array(dtype: str, variant: str, lanes: int, device: jax.Device) -> list[Figure]:
    """The root of an array of three levels whose last chunk is not whole.

    Raises:
      BenchError: it is not that of ``hashlib``.
    """
    elements = 300 * CHUNK_BYTES // jnp.dtype(dtype).itemsize + 20
    array = random_array(dtype, elements, device, seed=elements)
    found = jax.jit(VARIANTS[variant], static_argnums=1)(array, lanes)
    require_root(found, array, f"{elements} {dtype}, {variant} with {lanes} lanes,")
    return []


def measure_array(
    dtype: str, size_bytes: int, variant: str, lanes: int, device: jax.Device, repeats: int
) -> list[Figure]:
    """The rate of one array's root on a GPU.

    Raises:
      BenchError: the root is not that of ``hashlib``.
    """
    array = random_array(dtype, size_bytes // jnp.dtype(dtype).itemsize, device)
    began = time.perf_counter()
    program = jax.jit(VARIANTS[variant], static_argnums=1).lower(array, lanes).compile()
    compiled = time.perf_counter() - began
    memory = program.memory_analysis()
    figure = Figure(
        what=f"{dtype} {_size(size_bytes)} {variant}, {lanes} lanes",
        bytes=array.nbytes,
        seconds=median_seconds(lambda: program(array).block_until_ready(), repeats),
        compile_seconds=compiled,
        temp_bytes=0 if memory is None else memory.temp_size_in_bytes,
    )
    require_root(program(array), array, figure.what)
    return [figure]


def measure_host(dtype: str, size_bytes: int, device: jax.Device, repeats: int) -> list[Figure]:
    """The rate of one array's root by ``hashlib``, of a view of the array's own memory."""
    array = random_array(dtype, size_bytes // jnp.dtype(dtype).itemsize, device)
    view = np.asarray(array).view(np.uint8).data
    figure = Figure(
        what=f"{dtype} {_size(size_bytes)} hashlib",
        bytes=array.nbytes,
        seconds=median_seconds(lambda: tree_root(view), repeats),
    )
    return [figure]


# -- a model -----------------------------------------------------------------------------------------------------------


def measure_model(
    name: str, layers: int | None, slice_mb: Sequence[int], device: jax.Device, repeats: int
) -> Iterator[Figure]:
    """For each size of the slices a whole pass, and the slowest slice alone: what a step may have to wait for.

    Raises:
      OrcdError: a tensor on the device has another digest than by ``hashlib``.
      BenchError: or the model has.
    """
    manifest, params = random_model(model_config(name, layers), device)
    for size in slice_mb:
        yield from measure_slices(name, manifest, params, size * 2**20, device, repeats)


def measure_slices(
    name: str, manifest: Manifest, params: Params, slice_bytes: int, device: jax.Device, repeats: int
) -> Iterator[Figure]:
    """The figures of one size of the slices."""
    began = time.perf_counter()
    prover = WeightProver(manifest, params, device, slice_bytes=slice_bytes)
    compiled = time.perf_counter() - began

    def prove() -> None:
        if prover.prove_all() != manifest.digest:
            raise BenchError("the model digest is wrong")

    memories = [program.memory_analysis() for program in prover.programs.values()]
    yield Figure(
        what=f"{name}, {len(prover.slices)} slices of {_size(slice_bytes)}",
        bytes=manifest.weight_bytes,
        seconds=median_seconds(prove, repeats),
        compile_seconds=compiled,
        temp_bytes=max((memory.temp_size_in_bytes for memory in memories if memory is not None), default=0),
        judged=True,
    )
    slices = [
        Figure(
            what=f"  slowest of {_size(slice_bytes)}, tensors: {len(one.paths)}",
            bytes=one.size_bytes,
            seconds=median_seconds(lambda index=index: prover.finish(prover.begin(index)), repeats),  # type: ignore[misc]
        )
        for index, one in enumerate(prover.slices)
    ]
    yield max(slices, key=lambda figure: figure.seconds)


# -- the command -------------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None, gpu: bool) -> argparse.Namespace:
    """The flags, with the defaults of the platform."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, default = parser.add_argument, ("8b", [512], [64, 1024]) if gpu else ("small", [64], [16])
    add("--sizes_mb", type=integers, default=default[2], help="MiB of the arrays (GPU: 64,1024; CPU: 16)")
    add("--dtypes", type=names_of(DTYPES), default=DTYPES, help=f"of the arrays: {','.join(DTYPES)}")
    add("--variants", type=names_of(VARIANTS), default=["in_place"], help=f"ways on a GPU: {','.join(VARIANTS)}")
    add("--lanes", type=integers, default=[LANES], help="chunks a program of the kernel hashes")
    add("--model", choices=[*SHAPES, "none"], default=default[0], help="shape of the model (GPU: 8b; CPU: small)")
    add("--layers", type=int, help="layers of the model, instead of the shape's own")
    add("--slice_mb", type=integers, default=default[1], help="MiB of a slice of the model (GPU: 512; CPU: 64)")
    add("--repeats", type=int, default=5, help="passes; their median counts")
    add("--json", type=json_file, help="also write the figures to this file, each as soon as it is there")
    flags = parser.parse_args(arguments)
    for name in ("layers", "repeats"):
        if (value := getattr(flags, name)) is not None and value < 1:
            parser.error(f"--{name}: {value} is not 1 or more")
    return flags


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reads comma-separated names, all of them known."""

    def names(text: str) -> list[str]:
        if unknown := [name for name in text.split(",") if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(known)}")
        return text.split(",")

    return names


def sections(flags: argparse.Namespace, device: jax.Device) -> Iterator[tuple[str, Callable[[], Iterable[Figure]]]]:
    """What the flags ask for, part by part. The model comes before the arrays: the claim is about it."""
    gpu, repeats = is_gpu(device), flags.repeats
    kernels = list(itertools.product(flags.dtypes, flags.variants, flags.lanes))
    if gpu:
        for dtype, variant, lanes in kernels:
            check = functools.partial(check_array, dtype, variant, lanes, device)
            yield f"checking {dtype} {variant}, {lanes} lanes", check
    if flags.model != "none":
        yield flags.model, functools.partial(measure_model, flags.model, flags.layers, flags.slice_mb, device, repeats)
    if gpu:  # a chunk: what any launch takes
        for lanes in flags.lanes:
            one = functools.partial(measure_array, "float32", CHUNK_BYTES, "in_place", lanes, device, repeats)
            yield f"one chunk, {lanes} lanes", one
    for size in flags.sizes_mb:
        if gpu:
            for dtype, variant, lanes in kernels:
                array = functools.partial(measure_array, dtype, size * 2**20, variant, lanes, device, repeats)
                yield f"{size} MiB of {dtype} {variant}, {lanes} lanes", array
        else:
            for dtype in flags.dtypes:
                host = functools.partial(measure_host, dtype, size * 2**20, device, repeats)
                yield f"{size} MiB of {dtype}", host


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes JSON. 1 when a section failed, or the model's rate on a GPU is too low."""
    device = first_device()
    gpu = is_gpu(device)
    flags = parse(arguments, gpu)
    rates = {"required_gb_s": REQUIRED_GB_S, "goal_gb_s": GOAL_GB_S}
    report = Report("bench_digest", device, flags.json, arguments, **rates)
    print(f"{device.device_kind}, jax {jax.__version__}: required {REQUIRED_GB_S:g} GB/s, goal {GOAL_GB_S:g} GB/s")
    print(HEADER, flush=True)
    best = 0.0
    for title, measure in sections(flags, device):
        with report.section(title):
            report.say(title)
            for figure in measure():
                print(figure.row(), flush=True)
                report.put(figure.what, figure.json())
                best = max(best, figure.gb_s if figure.judged else 0.0)
    word, sentence = verdict_of(best, gpu=gpu, failed=report.failed)
    report.finish(verdict=word)
    print(f"{word}: {sentence}")
    return 1 if word == "fail" else 0


def verdict_of(best_gb_s: float, *, gpu: bool, failed: bool) -> tuple[str, str]:
    """The word for all, and a sentence for people. Of 0 GB/s nothing was measured."""
    if failed:
        return "fail", "a section failed: the errors are above"
    if not gpu or not best_gb_s:
        return "no claim", "nothing is claimed of a CPU, or without a model"
    word = "pass" if best_gb_s >= REQUIRED_GB_S else "fail"
    return word, f"the model is proved at {best_gb_s:.0f} GB/s; {REQUIRED_GB_S:g} are required"


if __name__ == "__main__":
    sys.exit(main())
