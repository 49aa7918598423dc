"""``orcd plan``: whether a model would fit on a GPU, here or not, what it would take, and what would fit instead.

Asks no worker and no device: the manifest of a converted model and some arithmetic are enough.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from orcd_jax.cli.terminal import Output, complain
from orcd_jax.errors import ExitCode
from orcd_jax.telemetry.narration import count, size

if TYPE_CHECKING:  # they take a while to import, and help needs none of them
    from orcd_jax.checkpoint.manifest import Manifest
    from orcd_jax.residency.bounds import Sizes
    from orcd_jax.residency.budget import DeviceMemory, MemoryPlan

MOST_BYTES = 2**50

_UNITS = {"": 1, "b": 1}
_UNITS |= {f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", 1)}
_UNITS |= {f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", 1)}


def parse_size(text: str) -> int:
    """Bytes from ``24GiB`` (powers of 1024), ``80GB`` (powers of 1000), ``1.5TiB`` or a plain number of bytes.

    Raises:
      argparse.ArgumentTypeError: it is nothing of the kind, less than a byte, or more than 2^50.
    """
    found = re.fullmatch(r"([0-9]{1,16}(?:\.[0-9]{1,6})?) ?([A-Za-z]{0,3})", text)
    unit = None if found is None else _UNITS.get(found[2].lower())
    value = 0 if found is None or unit is None else int(Fraction(found[1]) * unit)
    if not 1 <= value <= MOST_BYTES:
        raise argparse.ArgumentTypeError(
            f"{ascii(text)[:40]} is not a size up to 2^50 bytes; write it like 24GiB, 80GB, or in bytes"
        )
    return value


def plan(
    directory: Path,
    output: Output,
    *,
    device_memory: int,
    device: str = "",
    slots_total: int = 0,
    max_context: int | None = None,
    prefill_tokens: int = 0,
    max_model_bytes: int | None = None,
    recorded: Path | None = None,
    xla_flags: str = "",
    as_json: bool = False,
) -> ExitCode:
    """Shows the memory plan of a model on a GPU; FAILED when it would not fit. Sizes default to the worker's.

    Args:
      directory: the converted checkpoint; only its manifest is read.
      output: where the plan is shown.
      device_memory: bytes that a worker would have of the GPU.
      device: the vendor's name of the GPU, for what its driver takes; empty: unknown.
      slots_total: jobs that run together; 0: the worker's default.
      max_context: most tokens of a job, up to the model's own; 0: the model's own; None: the worker's default.
      prefill_tokens: prompt tokens computed in one call; 0: the worker's default.
      max_model_bytes: largest model that the worker would load; None: the worker's default.
      recorded: folder in which a worker on such a device has recorded its plans.
      xla_flags: ``XLA_FLAGS`` of that worker.
      as_json: show one JSON object instead of a table.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when the manifest cannot be used.
    """
    from orcd_jax.checkpoint.manifest import read_manifest, tensor_bytes
    from orcd_jax.config import DEFAULT_PREFILL_TOKENS, DEFAULT_SLOTS, WorkerConfig
    from orcd_jax.residency.bounds import Sizes
    from orcd_jax.residency.budget import DeviceMemory, plan_memory

    manifest = read_manifest(directory)
    defaults = WorkerConfig.model_fields
    context = defaults["max_context"].default if max_context is None else max_context
    sizes = Sizes(
        slots_total=slots_total or DEFAULT_SLOTS["cuda"],
        max_context=min(context or manifest.config.context_max, manifest.config.context_max),
        prefill_tokens=prefill_tokens or DEFAULT_PREFILL_TOKENS["cuda"],
    )
    gpu = DeviceMemory(kind=device, total_bytes=device_memory)
    memory = plan_memory(
        manifest.config,
        [tensor_bytes(entry) for entry in manifest.tensors],
        sizes,
        gpu,
        recorded_bytes=None if recorded is None else _recorded(recorded, manifest, sizes, device, xla_flags),
        max_model_bytes=defaults["max_model_bytes"].default if max_model_bytes is None else max_model_bytes,
    )
    if as_json:
        output.json(plan_fields(manifest, gpu, memory))
    else:
        output.rows(plan_rows(manifest, gpu, memory))
    return ExitCode.OK if memory.feasible else ExitCode.FAILED


def _recorded(folder: Path, manifest: Manifest, sizes: Sizes, device: str, xla_flags: str) -> int | None:
    from orcd_jax.residency.recorded import plan_key, recall

    key = plan_key(manifest.config, sizes, device_kind=device, xla_flags=xla_flags)
    analysis = recall(folder, key, complain)
    return None if analysis is None else analysis.workspace_bytes(sizes)


def plan_fields(manifest: Manifest, device: DeviceMemory, plan: MemoryPlan) -> dict[str, object]:
    """The plan as JSON shows it: the verdict on top."""
    fields = dataclasses.asdict(plan)
    return {
        "feasible": plan.feasible,
        "model": manifest.model.model_id,
        "digest": manifest.digest,
        "device": device.kind,
        **fields.pop("sizes"),
        **fields,
    }


def plan_rows(manifest: Manifest, device: DeviceMemory, plan: MemoryPlan) -> dict[str, str]:
    """The plan as a person reads it."""
    sizes = plan.sizes
    rows = {
        "model": manifest.model.model_id,
        "device": device.kind,
        "sizes": f"{count(sizes.slots_total, 'slot')}, {count(sizes.max_context, 'token')} each; "
        f"{count(sizes.prefill_tokens, 'prompt token')} a call",
        "weights": f"{size(plan.weights_bytes)} in {count(len(manifest.tensors), 'array')}",
        "KV cache": size(plan.kv_bytes),
        "workspace": f"{size(plan.workspace_bytes)} ({plan.workspace})",
        "reserve": f"{size(plan.reserve_bytes)} for the driver and its libraries",
        "headroom": f"{size(plan.headroom_bytes)} left free",
        "total": size(plan.total_bytes),
        "available": size(plan.available_bytes),
        "feasible": "yes" if plan.feasible else "no",
    }
    # A reason says what would fit instead.
    for name, reason in zip(("why not", "nor"), plan.reasons, strict=False):
        rows[name] = f"{reason.code}: {reason.message}"
    return {name: value for name, value in rows.items() if value}
