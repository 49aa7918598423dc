"""Proves the weights: their digests, computed from the bytes in device memory, against the manifest (WORKER-4113).

The weights are proved in slices, each by one call of a compiled program, so that proving can go on between the steps of
running jobs. Layers are alike, so a handful of programs serves all slices. Nothing but the roots leaves the device.
"""

from __future__ import annotations

import itertools
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from orcd_jax.checkpoint.digest import entry_digest, roots_digest
from orcd_jax.checkpoint.manifest import Manifest, TensorEntry, model_digest, tensor_bytes
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.kernels.sha256 import MAX_ELEMENTS, forest_roots
from orcd_jax.models.registry import Params

GPU_SLICE_BYTES = 512 * 2**20
"""A slice delays the step behind it; a small one spends more of its time on the upper levels of its trees.
``tools/bench_digest.py --slice_mb`` prints both."""

CPU_SLICE_BYTES = 64 * 2**20

MAX_SLICE_TENSORS = 16
"""A program's kernel has a branch for each tensor, and takes the longer to compile."""

Kind = tuple[tuple[int, ...], str, int | None, int]
"""What decides a tensor's part of a program: shape, dtype, shard axis, shards."""

_LAYER = re.compile(r"(?:.*?\.)?\d+\.")


@dataclass(frozen=True, slots=True)
class Slice:
    """Some tensors that are proved together, and their bytes."""

    paths: tuple[str, ...]
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Pending:
    """A slice whose proof has begun.

    Attributes:
      index: of the slice.
      roots: the tree roots, on their way to the host; None on the CPU backend, which reads the bytes at the finish.
    """

    index: int
    roots: jax.Array | None


class WeightProver:
    """Recomputes the digests of the weights from the device's own bytes, slice by slice, and compares them.

    Reads the weights; owns the programs that do. Never changes, donates or copies a weight. One thread calls it.

    Attributes:
      slices: each weight is in exactly one.
      programs: what was compiled, by name; a closed list, empty on the CPU backend, where ``hashlib`` reads the memory.
    """

    slices: tuple[Slice, ...]
    programs: Mapping[str, jax.stages.Compiled]

    def __init__(
        self, manifest: Manifest, params: Params, device: jax.Device, *, slice_bytes: int | None = None
    ) -> None:
        """Compiles one program for each kind of slice.

        Args:
          manifest: what the weights must be.
          params: the weights, on ``device``.
          device: where the programs run.
          slice_bytes: how large a slice should be; a larger tensor is a slice of its own. By default 512 MiB on a GPU.

        Raises:
          OrcdError: MODEL_LOAD_FAILED, naming the first array whose name, shape, dtype or place is wrong.
        """
        self._manifest, self._params = manifest, params
        self._entries = {entry.path: entry for entry in manifest.tensors}
        _check_arrays(manifest.tensors, params, device)
        on_host = _reads_on_host(device)
        self.slices = plan_slices(manifest.tensors, slice_bytes or (CPU_SLICE_BYTES if on_host else GPU_SLICE_BYTES))
        kinds = [tuple(_kind(self._entries[path]) for path in one.paths) for one in self.slices]
        names = {kind: f"digest_{at}" for at, kind in enumerate(dict.fromkeys(kinds))}
        self.programs = {} if on_host else {name: _compile(kind, device, name) for kind, name in names.items()}
        self._calls = [self.programs.get(names[kind]) for kind in kinds]

    def begin(self, index: int) -> Pending:
        """Dispatches the proof of a slice, and returns at once. Its bytes are read after this call."""
        program = self._calls[index]
        if program is None:
            return Pending(index, None)
        roots: jax.Array = program(*(self._params[path] for path in self.slices[index].paths))
        roots.copy_to_host_async()
        return Pending(index, roots)

    def finish(self, pending: Pending) -> None:
        """Waits for the proof of a slice.

        Raises:
          OrcdError: SEAL_VERIFICATION_FAILED, naming the first tensor that is not the manifest's.
        """
        for _ in self._compared(pending):
            pass

    def prove_all(self, on_progress: Callable[[Progress], None] = lambda _: None) -> str:
        """Proves every slice, one ahead of the other. Blocks.

        Args:
          on_progress: called before the first slice and after each, with the bytes proved.

        Returns:
          The model digest, computed from the digests of what was read.

        Raises:
          OrcdError: SEAL_VERIFICATION_FAILED, naming the first tensor that is not the manifest's.
        """
        done, total = 0, sum(one.size_bytes for one in self.slices)
        on_progress(Progress("verify_arrays", 0, total))
        proved: list[TensorEntry] = []
        ahead = (self.begin(index) for index in range(len(self.slices)))
        pending = next(ahead, None)
        while pending is not None:
            following = next(ahead, None)
            proved += self._compared(pending)
            done += self.slices[pending.index].size_bytes
            on_progress(Progress("verify_arrays", done, total))
            pending = following
        manifest = self._manifest
        return model_digest(manifest.config, manifest.tokenizer, manifest.files, proved)

    def _compared(self, pending: Pending) -> Iterator[TensorEntry]:
        """The slice's tensors as entries with the digests just computed, each equal to the manifest's."""
        for entry, digest in self._digests(pending):
            if digest != entry.digest:
                raise OrcdError(
                    ErrorCode.SEAL_VERIFICATION_FAILED,
                    f"tensor {entry.path} on the device is not the one in manifest.json",
                    field=entry.path,
                )
            yield entry.model_copy(update={"digest": digest})

    def _digests(self, pending: Pending) -> Iterator[tuple[TensorEntry, str]]:
        entries = [self._entries[path] for path in self.slices[pending.index].paths]
        if pending.roots is None:
            for entry in entries:
                # A view: on the CPU backend device memory is the host's. Of a GPU's array this would be a copy, made
                # once and kept, and every later proof would read the copy.
                yield entry, entry_digest(entry, np.asarray(self._params[entry.path]))
            return
        rows = iter(np.asarray(pending.roots).astype("<u4"))
        for entry in entries:
            yield entry, roots_digest(entry, (row.tobytes() for row in itertools.islice(rows, entry.shards)))


def plan_slices(tensors: Sequence[TensorEntry], target_bytes: int) -> tuple[Slice, ...]:
    """Cuts a model into slices of up to ``target_bytes``, as many as possible of few kinds.

    The tensors of a layer stay together if they can; layers that are alike share a slice while they fit.
    """
    groups: dict[str, list[TensorEntry]] = {}
    for entry in tensors:
        layer = _LAYER.match(entry.path)
        groups.setdefault(layer.group() if layer else "", []).append(entry)
    packs = [pack for group in groups.values() for pack in _packs(group, target_bytes)]
    slices = []
    for _, alike in itertools.groupby(packs, lambda pack: [_kind(entry) for entry in pack]):
        run = list(alike)
        together = min(target_bytes // sum(map(tensor_bytes, run[0])), MAX_SLICE_TENSORS // len(run[0]))
        parts = -(-len(run) // max(1, together))
        for part in range(parts):
            members = itertools.chain.from_iterable(run[len(run) * part // parts : len(run) * (part + 1) // parts])
            slices.append(_slice(list(members)))
    return tuple(slices)


def _packs(entries: Sequence[TensorEntry], target_bytes: int) -> list[list[TensorEntry]]:
    packs: list[list[TensorEntry]] = []
    size = 0
    for entry in entries:
        size += tensor_bytes(entry)
        if not packs or size > target_bytes or len(packs[-1]) == MAX_SLICE_TENSORS:
            packs.append([])
            size = tensor_bytes(entry)
        packs[-1].append(entry)
    return packs


def _slice(entries: Sequence[TensorEntry]) -> Slice:
    return Slice(tuple(entry.path for entry in entries), sum(map(tensor_bytes, entries)))


def _kind(entry: TensorEntry) -> Kind:
    return entry.shape, entry.dtype, entry.shard_axis, entry.shards


def _reads_on_host(device: jax.Device) -> bool:
    """On the CPU backend the kernel could only be interpreted; its memory is the host's, where ``hashlib`` is fast."""
    return bool(device.platform == "cpu")


def _compile(kinds: Sequence[Kind], device: jax.Device, name: str) -> jax.stages.Compiled:
    here = jax.sharding.SingleDeviceSharding(device)
    grids = [(axis, shards) for _, _, axis, shards in kinds]

    def digest(*arrays: jax.Array) -> jax.Array:
        return forest_roots(arrays, grids)

    digest.__name__ = name
    arrays = (jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype, _, _ in kinds)
    with warnings.catch_warnings():
        # It works, and the other backend of Pallas does not run on every GPU that this one does.
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return jax.jit(digest).lower(*arrays).compile()


def proof_problems(entries: Sequence[TensorEntry]) -> list[OrcdError]:
    """Every tensor that is too large to be proved, by the manifest alone: MODEL_LOAD_FAILED each."""
    elements = ((entry.path, math.prod(entry.shape)) for entry in entries)
    return [
        _unusable(path, f"has {count} elements; at most {MAX_ELEMENTS} can be proved: choose another model")
        for path, count in elements
        if count > MAX_ELEMENTS
    ]


def _check_arrays(entries: Sequence[TensorEntry], params: Params, device: jax.Device) -> None:
    """The arrays are those of the manifest, whole, on this device, in C order."""
    for problem in proof_problems(entries):
        raise problem
    listed = {entry.path: entry for entry in entries}
    for path in sorted(listed.keys() | params.keys()):
        entry, array = listed.get(path), params.get(path)
        if entry is None or array is None:
            raise _unusable(path, "is not both in manifest.json and on the device")
        if (array.shape, array.dtype.name) != (entry.shape, entry.dtype):
            raise _unusable(path, f"is {array.dtype.name}{array.shape}, not {entry.dtype}{entry.shape}")
        if array.devices() != {device}:
            raise _unusable(path, "is on another device")
        layout = array.format.layout  # type: ignore[attr-defined]  # missing in JAX's stubs
        if layout is None or tuple(layout.major_to_minor) != tuple(range(array.ndim)):
            raise _unusable(path, "is not in C order on the device")


def _unusable(path: str, problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"tensor {ascii(path)[1:-1]:.256} {problem}", field=path)
