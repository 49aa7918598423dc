"""Orbax straight onto the device: the model's abstract tree is the target, and nothing is converted on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from orcd_jax.checkpoint.manifest import ARRAYS_DIRECTORY, Manifest, tensor_bytes
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import Params, abstract_params, attention_kind, positional_kind, shard_grid

_GB = 10**9  # Orbax's unit
DEFAULT_STAGING_BYTES = 8 * 2**30


def restore(
    directory: Path,
    manifest: Manifest,
    device: jax.Device,
    on_progress: Callable[[Progress], None] = lambda _: None,
    *,
    staging_bytes: int = DEFAULT_STAGING_BYTES,
) -> Params:
    """Restores every array of a checkpoint whose files were verified.

    Args:
      directory: the checkpoint directory.
      manifest: its manifest.
      device: where the arrays will lie.
      on_progress: called before and after.
      staging_bytes: host memory that may hold weights on their way at once (WORKER-4102).

    Raises:
      OrcdError: the first of :func:`restore_problems`; MODEL_LOAD_FAILED, when the arrays are not those of the
        manifest or cannot be read.
    """
    for problem in restore_problems(manifest, staging_bytes=staging_bytes):
        raise problem
    here = jax.sharding.SingleDeviceSharding(device)
    target = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for path, leaf in abstract_params(manifest.config).items()
    }
    arrays = (directory / ARRAYS_DIRECTORY).resolve()
    on_progress(Progress("restore", 0, manifest.weight_bytes))
    try:
        # Orbax wants more than it hands out at once.
        handler = ocp.PyTreeCheckpointHandler(restore_concurrent_gb=(staging_bytes + 1) / _GB)
        with ocp.Checkpointer(handler) as checkpointer:
            _check_stored(checkpointer.metadata(arrays), target)
            params: Params = checkpointer.restore(
                arrays,
                args=ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)),
            )
        jax.block_until_ready(params)
    except (OrcdError, jax.errors.JaxRuntimeError, MemoryError):  # ours, the device's, the host's
        raise
    except Exception as error:  # a bare one is what Orbax makes of a file that cannot be read
        raise _failed(f"the checkpoint's arrays cannot be restored ({type(error).__name__})") from error
    on_progress(Progress("restore", manifest.weight_bytes, manifest.weight_bytes))
    return params


def restore_problems(manifest: Manifest, *, staging_bytes: int) -> list[OrcdError]:
    """Every reason why arrays with this manifest cannot be restored, whatever its files hold. Allocates nothing.

    MODEL_LOAD_FAILED, where the manifest does not describe its own configuration; HOST_OOM, where one array alone is
    larger than ``staging_bytes``.
    """
    problems = (_model_problem(manifest), _table_problem(manifest), _staging_problem(manifest, staging_bytes))
    return [problem for problem in problems if problem is not None]


def _model_problem(manifest: Manifest) -> OrcdError | None:
    """What the manifest says of its model, and a worker's capabilities were compared with, is true of its content."""
    model, config = manifest.model, manifest.config
    said = (model.architecture, model.positional, model.attention, model.quant, model.tokenizer)
    true = (config.architecture, positional_kind(config), attention_kind(config), "none", manifest.tokenizer.kind)
    return None if said == true else _failed("manifest.json describes another model than its configuration")


def _table_problem(manifest: Manifest) -> OrcdError | None:
    """The manifest's table of tensors, shard grid included, is that of its own configuration."""
    config = manifest.config
    listed = {entry.path: (entry.shape, entry.dtype, entry.shard_axis, entry.shards) for entry in manifest.tensors}
    wanted = {
        path: (leaf.shape, leaf.dtype.name, *shard_grid(config, path)) for path, leaf in abstract_params(config).items()
    }
    return _difference(listed, wanted, "manifest.json lists other tensors than its configuration has")


def _staging_problem(manifest: Manifest, staging_bytes: int) -> OrcdError | None:
    largest = max(manifest.tensors, key=tensor_bytes)
    if (needed := tensor_bytes(largest)) <= staging_bytes:
        return None
    return OrcdError(
        ErrorCode.HOST_OOM,
        f"tensor {largest.path} has {needed} bytes, and at most {staging_bytes} may be on their way through host "
        f"memory at once: raise --max_staging_bytes to {needed}",
        field="max_staging_bytes",
        needed_bytes=needed,
        available_bytes=staging_bytes,
    )


def _check_stored(metadata: ocp.checkpoint_manager.StepMetadata, target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """The arrays on disk are those of the table: Orbax would convert the dtype of one that differs."""
    stored = {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in metadata.item_metadata.tree.items()}
    wanted = {path: (leaf.shape, leaf.dtype) for path, leaf in target.items()}
    if (problem := _difference(stored, wanted, "the checkpoint's arrays are not those of manifest.json")) is not None:
        raise problem


def _difference(found: Mapping[str, object], wanted: Mapping[str, object], problem: str) -> OrcdError | None:
    differing = [path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path)]
    return _failed(f"{problem}, {ascii(min(differing))[1:-1]:.80} for one") if differing else None


def _failed(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"{problem}: convert the model again", field="model_path")
