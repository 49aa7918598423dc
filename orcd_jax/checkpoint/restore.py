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
      OrcdError: MODEL_LOAD_FAILED, when the arrays are not those of the configuration or cannot be read; HOST_OOM, when
        one of them alone is larger than ``staging_bytes``.
    """
    here = jax.sharding.SingleDeviceSharding(device)
    target = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for path, leaf in abstract_params(manifest.config).items()
    }
    _check_model(manifest)
    _check_table(manifest, target)
    _check_staging(manifest, staging_bytes)
    arrays = (directory / ARRAYS_DIRECTORY).resolve()
    on_progress(Progress("restore", 0, manifest.weight_bytes))
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(restore_concurrent_gb=staging_bytes / _GB)) as checkpointer:
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


def _check_staging(manifest: Manifest, staging_bytes: int) -> None:
    largest = max(manifest.tensors, key=tensor_bytes)
    if (needed := tensor_bytes(largest)) > staging_bytes:
        raise OrcdError(
            ErrorCode.HOST_OOM,
            f"tensor {largest.path} has {needed} bytes, and at most {staging_bytes} may be on their way through host "
            f"memory at once: raise --max_staging_bytes to {needed}",
            field="max_staging_bytes",
            needed_bytes=needed,
            available_bytes=staging_bytes,
        )


def _check_model(manifest: Manifest) -> None:
    """What the manifest says of its model, and a worker's capabilities were compared with, is true of its content."""
    model, config = manifest.model, manifest.config
    said = (model.architecture, model.positional, model.attention, model.quant, model.tokenizer)
    true = (config.architecture, positional_kind(config), attention_kind(config), "none", manifest.tokenizer.kind)
    if said != true:
        raise _failed("manifest.json describes another model than its configuration")


def _check_table(manifest: Manifest, target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """The manifest's table of tensors, shard grid included, is that of its own configuration."""
    listed = {entry.path: (entry.shape, entry.dtype, entry.shard_axis, entry.shards) for entry in manifest.tensors}
    wanted = {path: (leaf.shape, leaf.dtype.name, *shard_grid(manifest.config, path)) for path, leaf in target.items()}
    _require_same(listed, wanted, "manifest.json lists other tensors than its configuration has")


def _check_stored(metadata: ocp.checkpoint_manager.StepMetadata, target: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """The arrays on disk are those of the table: Orbax would convert the dtype of one that differs."""
    stored = {path: (tuple(leaf.shape), leaf.dtype) for path, leaf in metadata.item_metadata.tree.items()}
    wanted = {path: (leaf.shape, leaf.dtype) for path, leaf in target.items()}
    _require_same(stored, wanted, "the checkpoint's arrays are not those of manifest.json")


def _require_same(found: Mapping[str, object], wanted: Mapping[str, object], problem: str) -> None:
    differing = [path for path in found.keys() | wanted.keys() if found.get(path) != wanted.get(path)]
    if differing:
        raise _failed(f"{problem}, {ascii(min(differing))[1:-1]:.80} for one")


def _failed(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, f"{problem}: convert the model again", field="model_path")
