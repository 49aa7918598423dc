"""Orbax straight onto the device: the model's abstract tree is the target, and nothing is converted on the way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from orcd_jax.checkpoint.manifest import ARRAYS_DIRECTORY, Manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import Params, abstract_params


def restore(
    directory: Path, manifest: Manifest, device: jax.Device, on_progress: Callable[[Progress], None] = lambda _: None
) -> Params:
    """Restores every array of a checkpoint whose files were verified.

    Args:
      directory: the checkpoint directory.
      manifest: its manifest.
      device: where the arrays will lie.
      on_progress: called before and after.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when the arrays are not those of the configuration or cannot be read.
    """
    here = jax.sharding.SingleDeviceSharding(device)
    target = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here)
        for path, leaf in abstract_params(manifest.config).items()
    }
    _check_table(manifest, target)
    on_progress(Progress("restore", 0, manifest.weight_bytes))
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            params: Params = checkpointer.restore(
                (directory / ARRAYS_DIRECTORY).resolve(),
                args=ocp.args.PyTreeRestore(target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)),
            )
        jax.block_until_ready(params)
    except (ValueError, KeyError, TypeError, OSError) as error:  # what Orbax and TensorStore raise on foreign data
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            f"the checkpoint's arrays cannot be restored ({type(error).__name__}): convert the model again",
            field="model_path",
        ) from error
    on_progress(Progress("restore", manifest.weight_bytes, manifest.weight_bytes))
    return params


def _check_table(manifest: Manifest, target: dict[str, jax.ShapeDtypeStruct]) -> None:
    """The manifest's table of tensors is that of its own configuration: Orbax would convert what differs."""
    listed = {entry.path: (entry.shape, entry.dtype) for entry in manifest.tensors}
    wanted = {path: (leaf.shape, leaf.dtype.name) for path, leaf in target.items()}
    if listed != wanted:
        wrong = sorted(path for path in listed.keys() | wanted.keys() if listed.get(path) != wanted.get(path))
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            f"manifest.json lists other tensors than its configuration has, {wrong[0]:.80} for one: "
            "convert the model again",
            field="model_path",
        )
