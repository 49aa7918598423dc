"""Writes a checkpoint from any source of weights, all or nothing, with at most one array in memory at a time.

Everything happens in ``.NAME.partial`` beside the destination, which one rename makes visible when every file is on
disk. A conversion that is killed leaves at most that folder, and the next one removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from numpy.typing import NDArray

from orcd_jax import __version__
from orcd_jax.checkpoint.convert.layout import Leaf, leaves
from orcd_jax.checkpoint.convert.source import WeightSource
from orcd_jax.checkpoint.digest import file_digest, tensor_digest
from orcd_jax.checkpoint.manifest import (
    ARRAYS_DIRECTORY,
    CHAT_TEMPLATE_FILE,
    MANIFEST_FILE,
    TOKENIZER_FILE,
    FileEntry,
    Manifest,
    ModelCapabilities,
    Provenance,
    SourceFile,
    TensorEntry,
    model_digest,
)
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.regular_file import open_regular
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.config import WeightDtype
from orcd_jax.models.registry import abstract_params, attention_kind, positional_kind, shard_grid

OnProgress = Callable[[Progress], None]

_LOOK_EVERY_S = 0.02
_QUIET_LOOKS = 5
_REMOVE_TIMEOUT_S = 5.0


def write_checkpoint(
    source: WeightSource, destination: Path, on_progress: OnProgress, *, chat_template: str | None
) -> Manifest:
    """Converts ``source`` into a checkpoint directory.

    Args:
      source: an opened model.
      destination: a directory that does not exist yet, or is empty.
      on_progress: called often, with the stages ``hash_source``, ``convert`` and ``hash_files``.
      chat_template: the source's own, or None to leave it out.

    Returns:
      The manifest that was written.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when the source's tensors are not those of its configuration, cannot be read or
        changed meanwhile; HOST_OOM, when one of them does not fit the memory; INVALID_PARAMS, when the destination
        cannot be used.
    """
    destination = destination.absolute()
    plan = leaves(source.config)
    _check_tensors(source, plan)
    abstract = abstract_params(source.config)
    with _partial_folder(destination, sum(_bytes(leaf) for leaf in abstract.values())) as partial:
        found = _identities(source)
        provenance = _provenance(source, on_progress)
        tensors = _write_arrays(source, plan, abstract, partial / ARRAYS_DIRECTORY, on_progress)
        if _identities(source) != found:  # the provenance would name other bytes than were converted
            raise _refuse("its files were changed meanwhile: convert it again when nothing writes to them")
        _write_new(partial / TOKENIZER_FILE, source.tokenizer_json)
        if chat_template is not None:
            _write_new(partial / CHAT_TEMPLATE_FILE, chat_template.encode())
        manifest = _manifest(source, tensors, _hash_files(partial, on_progress), provenance)
        _write_new(partial / MANIFEST_FILE, manifest.model_dump_json(indent=1).encode() + b"\n")
        _sync_tree(partial)
        partial.rename(destination)
        _sync(destination.parent)
    return manifest


# -- arrays --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Lazy:
    """An array that is made when it is written. The first three fields are what Orbax plans with."""

    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    size: int
    make: Callable[[], NDArray[np.generic]]


class _LazyHandler(ocp.type_handlers.NumpyHandler):  # type: ignore[misc]  # untyped base
    """Writes lazy arrays one after the other: the next is made when the last is on disk."""

    async def serialize(
        self, values: Sequence[_Lazy], infos: Sequence[object], args: Sequence[object] | None = None
    ) -> list[object]:
        for value, info, arg in zip(values, infos, args or [ocp.SaveArgs()] * len(values), strict=True):
            for written in await super().serialize([value.make()], [info], [arg]):
                written.result()
        return []


def _write_arrays(
    source: WeightSource,
    plan: Mapping[str, Leaf],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    directory: Path,
    on_progress: OnProgress,
) -> tuple[TensorEntry, ...]:
    """Writes every array and returns its entry, digest included."""
    total, done = sum(_bytes(leaf) for leaf in abstract.values()), 0
    entries: dict[str, TensorEntry] = {}

    def make(path: str) -> NDArray[np.generic]:
        nonlocal done
        wanted, leaf = abstract[path], plan[path]
        try:
            made = leaf.build({name: source.tensor(name) for name in leaf.sources})
        except (OSError, ValueError):  # ValueError: a file that was cut short cannot be mapped
            raise _refuse(f"{next(iter(leaf.sources), path):.80} can no longer be read: did its file change?") from None
        except MemoryError:
            raise OrcdError(
                ErrorCode.HOST_OOM,
                f"{path} takes {_bytes(wanted)} bytes and about as much again while it is made, which this machine has "
                "not got free: convert the model on a larger one",
                field=path,
            ) from None
        with np.errstate(over="ignore"):  # an infinity is found below
            array = np.ascontiguousarray(made.astype(wanted.dtype, copy=False))
        if not np.isfinite(array).all():
            raise OrcdError(
                ErrorCode.MODEL_LOAD_FAILED,
                f"{' or '.join(leaf.sources) or path} has a value that is not finite as {wanted.dtype}: "
                "the source is damaged, or needs --dtype=float32",
                field=path,
            )
        axis, shards = shard_grid(source.config, path)
        dtype: WeightDtype = "bfloat16" if wanted.dtype.name == "bfloat16" else "float32"
        digest = tensor_digest(
            array, path=path, shape=wanted.shape, dtype=dtype, kind="dense", shard_axis=axis, shards=shards
        )
        entries[path] = TensorEntry(
            path=path, shape=wanted.shape, dtype=dtype, shard_axis=axis, shards=shards, digest=digest
        )
        done += _bytes(wanted)
        on_progress(Progress("convert", done, total))
        return array

    lazy = {
        path: _Lazy(leaf.shape, np.dtype(leaf.dtype), math.prod(leaf.shape), lambda path=path: make(path))  # type: ignore[misc]
        for path, leaf in abstract.items()
    }
    on_progress(Progress("convert", 0, total))
    registry = ocp.type_handlers.create_type_handler_registry((_Lazy, _LazyHandler(deepcopy_host_arrays=False)))
    # Weights barely compress, and a load that decompresses is slower than the disk.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    try:
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory.resolve(), args=ocp.args.PyTreeSave(lazy))
    except ValueError as error:  # TensorStore's word for anything a disk does
        raise _unusable("the arrays cannot be written: check that the disk is not full") from error
    return tuple(entries[path] for path in sorted(entries))


def _check_tensors(source: WeightSource, plan: Mapping[str, Leaf]) -> None:
    """Each tensor of the source is used, each needed one is there, and its shape is that of the configuration."""
    wanted = {name: shape for leaf in plan.values() for name, shape in leaf.sources.items()}
    have = source.names()
    for problem, names in (("are missing", wanted.keys() - have), ("belong to no part of it", have - wanted.keys())):
        if names:
            some = ", ".join(f"{name:.80}" for name in sorted(names)[:5]) + (", …" if len(names) > 5 else "")
            raise _refuse(f"{len(names)} tensors of this {source.config.architecture} model {problem}: {some}")
    for name, shape in wanted.items():
        if source.shape(name) != shape:
            raise _refuse(f"{name} has the shape {source.shape(name)}; by the model's configuration it must be {shape}")


# -- files ---------------------------------------------------------------------------------------------------------


def _remove(folder: Path) -> None:
    """Removes a folder and whatever Orbax's threads, which an interrupt does not reach, still put there meanwhile."""
    quiet, end = 0, time.monotonic() + _REMOVE_TIMEOUT_S
    while quiet < _QUIET_LOOKS and time.monotonic() < end:
        quiet = 0 if folder.exists() else quiet + 1
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(_LOOK_EVERY_S)


@contextlib.contextmanager
def _partial_folder(destination: Path, need: int) -> Iterator[Path]:
    """An empty folder beside the destination, held by this process alone; whatever happens, it does not stay."""
    try:
        _check_free(destination)
        parent, partial = destination.parent, destination.with_name(f".{destination.name}.partial")
        partial.mkdir(parents=True, exist_ok=True)
        # Never through a link, whose target would be emptied.
        held = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        raise _unwritable(destination, error) from None
    if os.fstat(held).st_uid != os.geteuid():  # who could put a link in place of what is written there
        os.close(held)
        raise _unusable(f"{partial} belongs to another user: remove it, or choose another destination")
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(held), partial.stat()):
            raise BlockingIOError  # the other conversion has just renamed it
    except OSError:
        os.close(held)
        raise _unusable(f"another conversion into {destination} is running: wait for it") from None
    try:
        _check_free(destination)  # again: the one that held the folder before may have finished
        _empty(partial)  # what a killed conversion left
        if (free := shutil.disk_usage(parent).free) < need + need // 50:
            raise _unusable(
                f"the checkpoint takes {need / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free: make room"
            )
        yield partial
    except OSError as error:
        raise _unwritable(destination, error) from error
    finally:
        if partial.exists() and os.path.samestat(os.fstat(held), partial.stat()):  # not one that came after the rename
            _remove(partial)
        os.close(held)


def _check_free(destination: Path) -> None:
    """There is nothing at the destination, or an empty folder that a rename can replace."""
    taken = destination.exists() and not (destination.is_dir() and not any(destination.iterdir()))
    if taken or destination.is_symlink() or not destination.name:
        raise _unusable(f"{destination} exists: choose another destination or remove it first")


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _write_new(path: Path, content: bytes) -> None:
    """Writes a file that is not there yet, not even as a link."""
    with path.open("xb") as file:
        file.write(content)


def _identities(source: WeightSource) -> list[tuple[int, ...]]:
    """Which files the source is made of, and when each was last written."""
    try:
        found = [path.stat() for path in source.paths]
    except OSError as error:
        raise _refuse(f"the source cannot be read ({error.strerror})") from None
    return [(one.st_dev, one.st_ino, one.st_size, one.st_mtime_ns) for one in found]


def _provenance(source: WeightSource, on_progress: OnProgress) -> Provenance:
    files = []
    try:
        advance = _advance("hash_source", sum(path.stat().st_size for path in source.paths), on_progress)
        for path in source.paths:
            with open_regular(path) as file:
                size, digest = file_digest(file, advance)
            name = os.fsencode(path.name).decode(errors="replace")  # a name may be any bytes, JSON may not
            files.append(SourceFile(name=name, size_bytes=size, sha256=digest))
    except OSError as error:
        raise _refuse(f"the source cannot be read ({error.strerror})") from None
    return Provenance(
        format=source.format,
        files=tuple(files),
        tensor_types=source.tensor_types,
        converter="orcd-jax",
        converter_version=__version__,
    )


def _hash_files(folder: Path, on_progress: OnProgress) -> tuple[FileEntry, ...]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    advance = _advance("hash_files", sum(path.stat().st_size for path in paths), on_progress)
    entries = []
    for path in paths:
        with open_regular(path) as file:
            size, digest = file_digest(file, advance)
        entries.append(FileEntry(path=path.relative_to(folder).as_posix(), size_bytes=size, sha256=digest))
    return tuple(sorted(entries, key=lambda entry: entry.path))


def _advance(stage: str, total: int, on_progress: OnProgress) -> Callable[[int], None]:
    done = 0

    def advance(count: int) -> None:
        nonlocal done
        done += count
        on_progress(Progress(stage, done, total))

    on_progress(Progress(stage, 0, total))
    return advance


def _manifest(
    source: WeightSource, tensors: tuple[TensorEntry, ...], files: tuple[FileEntry, ...], provenance: Provenance
) -> Manifest:
    config, tokenizer = source.config, source.tokenizer
    return Manifest(
        model=ModelCapabilities(
            model_id=source.model_id,
            architecture=config.architecture,
            positional=positional_kind(config),
            attention=attention_kind(config),
            quant="none",
            context_max=config.context_max,
            vocab_size=config.vocab_size,
            tokenizer=tokenizer.kind,
        ),
        config=config,
        tokenizer=tokenizer,
        tensors=tensors,
        files=files,
        digest=model_digest(config, tokenizer, files, tensors),
        source=provenance,
    )


def _sync_tree(folder: Path) -> None:
    """Forces every file and folder below, and the folder itself, to disk."""
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def _bytes(leaf: jax.ShapeDtypeStruct) -> int:
    count: int = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    return count


def _refuse(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"the model cannot be converted: {problem}", field="source")


def _unwritable(destination: Path, error: OSError) -> OrcdError:
    return _unusable(f"{destination} cannot be written ({error.strerror or type(error).__name__})")


def _unusable(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, problem, field="destination")
