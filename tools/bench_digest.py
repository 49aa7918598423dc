#!/usr/bin/env python3
"""How fast weights are proved where they lie: GB/s of one array's tree root, and of a whole model, slice by slice.

    python tools/bench_digest.py                                   # an 8B model on a GPU, a small one on a CPU
    python tools/bench_digest.py --slice_mb=256,512,1024 --json=digest.json
    python tools/bench_digest.py --model=none --sizes_mb=1024 --lanes=32,64,128

Everything is compared with ``hashlib`` first. On a GPU the kernel is measured; on the CPU backend, the host's hashing,
which is what a worker does there. The floor of each figure is the time at the goal's rate.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from orcd_jax.checkpoint.digest import entry_digest, roots_digest, tree_root
from orcd_jax.checkpoint.manifest import (
    Manifest,
    ModelCapabilities,
    Provenance,
    TensorEntry,
    TokenizerEntry,
    model_digest,
)
from orcd_jax.kernels.sha256 import CHUNK_BYTES, LANES, forest_roots, tree_roots
from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.registry import Params, abstract_params, attention_kind, shard_grid
from orcd_jax.residency.prover import WeightProver

REQUIRED_GB_S, GOAL_GB_S = 400.0, 600.0
DTYPES = ("bfloat16", "float32", "uint8")

MODELS = {
    # Llama-3.1-8B's shape, and one that a CPU hashes in a moment.
    "8b": {"vocab_size": 128_256, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "mlp_size": 14_336},
    "small": {"vocab_size": 8192, "hidden_size": 256, "num_layers": 4, "num_heads": 8, "mlp_size": 768},
}


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured rate.

    Attributes:
      seconds: median of a pass.
      floor_seconds: of a pass at the goal's rate.
      compile_seconds: of the programs, 0 where nothing is compiled.
      temp_bytes: the most that a program needs besides the weights.
    """

    what: str
    bytes: int
    seconds: float
    compile_seconds: float = 0.0
    temp_bytes: int = 0

    @property
    def gb_s(self) -> float:
        return self.bytes / self.seconds / 1e9

    @property
    def floor_seconds(self) -> float:
        return self.bytes / GOAL_GB_S / 1e9

    @property
    def ratio(self) -> float:
        return self.floor_seconds / self.seconds

    def row(self) -> str:
        """A line of the table."""
        return (
            f"{self.what:<44}{self.seconds * 1e3:>10.3f}{self.floor_seconds * 1e3:>10.3f}{self.ratio:>7.2f}"
            f"{self.gb_s:>10.1f}{self.compile_seconds:>10.1f}{self.temp_bytes / 1e6:>9.1f}"
        )


HEADER = f"{'what':<44}{'ms':>10}{'floor ms':>10}{'ratio':>7}{'GB/s':>10}{'compile s':>10}{'temp MB':>9}"


def _size(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 2**20 else f"{size_bytes} B"


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of a call, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


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


def host_bytes(array: jax.Array) -> bytes:
    """The array's bytes, copied to the host."""
    return np.asarray(array).tobytes()


def check_arrays(device: jax.Device, lanes: Sequence[int], variants: Sequence[str]) -> None:
    """Every dtype, with and without a rest, against ``hashlib``. Nothing to check where ``hashlib`` is the way."""
    for dtype in DTYPES:
        chunk = CHUNK_BYTES // jnp.dtype(dtype).itemsize
        for elements in (300 * chunk, 3 * chunk + 20):
            array = random_array(dtype, elements, device, seed=elements)
            expected = tree_root(host_bytes(array))
            for name in variants:
                for width in lanes:
                    found = np.asarray(jax.jit(VARIANTS[name], static_argnums=1)(array, width)).tobytes()
                    if found != expected:
                        raise SystemExit(f"{name} with {width} lanes: the root of {elements} {dtype} is wrong")


def measure_array(dtype: str, size_bytes: int, variant: str, lanes: int, device: jax.Device, repeats: int) -> Figure:
    """The rate of one array's root on a GPU."""
    array = random_array(dtype, size_bytes // jnp.dtype(dtype).itemsize, device)
    began = time.perf_counter()
    program = jax.jit(VARIANTS[variant], static_argnums=1).lower(array, lanes).compile()
    compiled = time.perf_counter() - began
    memory = program.memory_analysis()
    return Figure(
        what=f"{dtype} {_size(size_bytes)} {variant}, {lanes} lanes",
        bytes=array.nbytes,
        seconds=median_seconds(lambda: program(array).block_until_ready(), repeats),
        compile_seconds=compiled,
        temp_bytes=0 if memory is None else memory.temp_size_in_bytes,
    )


def measure_host(dtype: str, size_bytes: int, device: jax.Device, repeats: int) -> Figure:
    """The rate of one array's root by ``hashlib``, of a view of the array's own memory."""
    array = random_array(dtype, size_bytes // jnp.dtype(dtype).itemsize, device)
    view = np.asarray(array).view(np.uint8).data
    return Figure(
        what=f"{dtype} {_size(size_bytes)} hashlib",
        bytes=array.nbytes,
        seconds=median_seconds(lambda: tree_root(view), repeats),
    )


# -- a model -----------------------------------------------------------------------------------------------------------


def model_config(name: str, layers: int | None) -> LlamaConfig:
    """A model of this shape, in bfloat16."""
    shape = MODELS[name] | ({} if layers is None else {"num_layers": layers})
    rest: dict[str, object] = {
        "num_kv_heads": 8,
        "head_dim": shape["hidden_size"] // shape["num_heads"],
        "context_max": 2048,
    }
    rest |= {"norm_eps": 1e-5, "rope_theta": 500_000.0, "tied_embeddings": False, "dtype": "bfloat16"}
    return LlamaConfig.model_validate({**shape, **rest})


def random_model(config: LlamaConfig, device: jax.Device) -> tuple[Manifest, Params]:
    """Random weights on the device, and their manifest. The digests of a few are compared with ``hashlib``."""
    params = {
        path: random_array(leaf.dtype.name, leaf.size, device, seed).reshape(leaf.shape)
        for seed, (path, leaf) in enumerate(sorted(abstract_params(config).items()))
    }
    grids = {path: shard_grid(config, path) for path in params}
    entries = {
        path: TensorEntry(
            path=path,
            shape=array.shape,
            dtype="float32" if array.dtype == jnp.float32 else "bfloat16",
            shard_axis=grids[path][0],
            shards=grids[path][1],
            digest="0" * 64,
        )
        for path, array in params.items()
    }
    if device.platform == "cpu":
        digests = {path: entry_digest(entry, np.asarray(params[path])) for path, entry in entries.items()}
    else:
        digests = digests_on_device(entries, params)
    tensors = tuple(entry.model_copy(update={"digest": digests[path]}) for path, entry in entries.items())
    tokenizer = TokenizerEntry(kind="none", bos_id=None, eos_ids=(), add_bos=False)
    manifest = Manifest(
        model=ModelCapabilities(
            model_id="random",
            architecture=config.architecture,
            positional="rope",
            attention=attention_kind(config),
            quant="none",
            context_max=config.context_max,
            vocab_size=config.vocab_size,
            tokenizer=tokenizer.kind,
        ),
        config=config,
        tokenizer=tokenizer,
        tensors=tensors,
        files=(),
        digest=model_digest(config, tokenizer, (), tensors),
        source=Provenance(format="random", files=(), tensor_types=(), converter="bench_digest", converter_version="0"),
    )
    return manifest, params


def digests_on_device(entries: dict[str, TensorEntry], params: Params) -> dict[str, str]:
    """By the kernel; those of the first layer and of what is in no layer, but for the largest, by ``hashlib`` too."""
    roots = jax.jit(forest_roots_of_one, static_argnums=(1, 2))
    digests = {}
    for path, entry in entries.items():
        rows = np.asarray(roots(params[path], entry.shard_axis, entry.shards))
        digests[path] = roots_digest(entry, (row.tobytes() for row in rows))
        checked = not path.startswith("layers.") or path.startswith("layers.0.")
        if checked and params[path].nbytes < 2**28:
            copy = np.frombuffer(host_bytes(params[path]), params[path].dtype).reshape(entry.shape)
            if entry_digest(entry, copy) != digests[path]:
                raise SystemExit(f"the digest of {path} is wrong")
    return digests


def forest_roots_of_one(array: jax.Array, axis: int | None, shards: int) -> jax.Array:
    """The roots of one tensor's shards."""
    return forest_roots([array], [(axis, shards)])


def measure_model(
    name: str, manifest: Manifest, params: Params, slice_bytes: int, device: jax.Device, repeats: int
) -> list[Figure]:
    """A whole pass, and the slowest slice alone: what a step may have to wait for."""
    began = time.perf_counter()
    prover = WeightProver(manifest, params, device, slice_bytes=slice_bytes)
    compiled = time.perf_counter() - began

    def prove() -> None:
        if prover.prove_all() != manifest.digest:
            raise SystemExit("the model digest is wrong")

    memories = [program.memory_analysis() for program in prover.programs.values()]
    whole = Figure(
        what=f"{name}, {len(prover.slices)} slices of {_size(slice_bytes)}",
        bytes=manifest.weight_bytes,
        seconds=median_seconds(prove, repeats),
        compile_seconds=compiled,
        temp_bytes=max((memory.temp_size_in_bytes for memory in memories if memory is not None), default=0),
    )
    slices = [
        Figure(
            what=f"  slowest slice, tensors: {len(one.paths)}",
            bytes=one.size_bytes,
            seconds=median_seconds(lambda index=index: prover.finish(prover.begin(index)), repeats),  # type: ignore[misc]
        )
        for index, one in enumerate(prover.slices)
    ]
    return [whole, max(slices, key=lambda figure: figure.seconds)]


# -- the command -------------------------------------------------------------------------------------------------------


def integers(text: str) -> list[int]:
    """Comma-separated positive integers."""
    values = [int(part) for part in text.split(",")]
    if min(values) < 1:
        raise ValueError(text)
    return values


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The flags."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes_mb", type=integers, help="MiB of the arrays (GPU: 64,1024; CPU: 16)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="dtypes of the arrays")
    parser.add_argument("--variants", default="in_place,bitcast", help="ways to read an array on a GPU")
    parser.add_argument("--lanes", type=integers, default=[LANES], help="chunks a program of the kernel hashes")
    parser.add_argument("--model", choices=[*MODELS, "none"], help="shape of the model (GPU: 8b; CPU: small)")
    parser.add_argument("--layers", type=int, help="layers of the model, instead of the shape's own")
    parser.add_argument("--slice_mb", type=integers, help="MiB of a slice of the model (GPU: 512; CPU: 64)")
    parser.add_argument("--repeats", type=int, default=5, help="passes; their median counts")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints the table, writes JSON. 1 when the model's rate on a GPU is below what is required."""
    flags = parse(arguments)
    device = jax.local_devices()[0]
    gpu = device.platform == "gpu"
    print(f"{device.device_kind}, jax {jax.__version__}: required {REQUIRED_GB_S:g} GB/s, goal {GOAL_GB_S:g} GB/s")
    print(HEADER)
    figures: list[Figure] = []

    def report(*measured: Figure) -> None:
        figures.extend(measured)
        for figure in measured:
            print(figure.row(), flush=True)

    variants = flags.variants.split(",")
    if gpu:
        check_arrays(device, flags.lanes, variants)
        for lanes in flags.lanes:  # what any launch takes
            report(measure_array("float32", CHUNK_BYTES, "in_place", lanes, device, flags.repeats))
    for size in flags.sizes_mb or ([64, 1024] if gpu else [16]):
        for dtype in flags.dtypes.split(","):
            if not gpu:
                report(measure_host(dtype, size * 2**20, device, flags.repeats))
                continue
            for variant in variants:
                for lanes in flags.lanes:
                    report(measure_array(dtype, size * 2**20, variant, lanes, device, flags.repeats))
    rates = []
    name = flags.model or ("8b" if gpu else "small")
    if name != "none":
        manifest, params = random_model(model_config(name, flags.layers), device)
        for size in flags.slice_mb or ([512] if gpu else [64]):
            measured = measure_model(name, manifest, params, size * 2**20, device, flags.repeats)
            report(*measured)
            rates.append(measured[0].gb_s)
    if flags.json is not None:
        derived = [
            asdict(one) | {"gb_s": one.gb_s, "floor_seconds": one.floor_seconds, "ratio": one.ratio} for one in figures
        ]
        result = {
            "device": device.device_kind,
            "jax": jax.__version__,
            "required_gb_s": REQUIRED_GB_S,
            "goal_gb_s": GOAL_GB_S,
            "figures": derived,
        }
        flags.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if gpu and rates and max(rates) < REQUIRED_GB_S:
        print(f"the model is proved at {max(rates):.0f} GB/s; {REQUIRED_GB_S:g} are required")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
