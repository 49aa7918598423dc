"""The memory plan: what a model needs on a device at given sizes, before anything is allocated or compiled.

    total = weights + decode state + workspace + reserve + headroom        feasible: total ≤ available

Pure arithmetic without JAX, so that it also answers for a device that is not there. ``docs/memory.md`` explains every
term and says what was measured; ``bounds`` holds the parts that depend on sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from orcd_jax.config import BLOCK_TOKENS
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.config import LlamaConfig
from orcd_jax.residency.bounds import Platform, Sizes, float32_copies, program_bounds, state_bytes, workspace_peak
from orcd_jax.telemetry.narration import size

LEAST_CONTEXT = 128
"""Tokens of the shortest context that is worth suggesting."""

RESERVE_BYTES: Mapping[str, int] = MappingProxyType(
    {
        "cpu": 0,
        "NVIDIA H100 80GB HBM3": 768 * 2**20,
        "NVIDIA H200": 768 * 2**20,
    }
)
"""By device kind: what the driver's context, libraries and graphs take outside XLA's pool, measured and rounded up."""
UNKNOWN_RESERVE_BYTES = 2**30
"""The same on a GPU that was not measured."""

_ALIGNMENT = 256  # XLA's allocator hands out multiples of it
_TUNING_BYTES = 256 * 2**20  # beside a copy of the matrix, while XLA tunes a matmul on a GPU
_LEAST_HEADROOM_BYTES = 256 * 2**20  # XLA's allocator may leave up to 128 MiB of a hole unused

LEAST = Sizes(slots_total=1, max_context=LEAST_CONTEXT, prefill_tokens=BLOCK_TOKENS)
"""The smallest worker: when even this does not fit, no flag helps."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """The memory of one device, real or imagined.

    Attributes:
      kind: the vendor's name of the model, such as ``NVIDIA H200``; empty when unknown.
      total_bytes: what all processes together can get of it.
      foreign_bytes: what other processes hold.
      platform: ``cpu`` stands in for a GPU.
    """

    kind: str
    total_bytes: int
    foreign_bytes: int = 0
    platform: Platform = "cuda"

    @property
    def available_bytes(self) -> int:
        """What this process can get."""
        return max(0, self.total_bytes - self.foreign_bytes)

    @property
    def reserve_bytes(self) -> int:
        """What the driver and its libraries will take of it outside XLA's pool."""
        return RESERVE_BYTES.get("cpu" if self.platform == "cpu" else self.kind, UNKNOWN_RESERVE_BYTES)


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """Why a plan is not feasible; the attributes are those of :class:`OrcdError`."""

    code: ErrorCode
    message: str
    field: str
    needed_bytes: int
    available_bytes: int

    def error(self) -> OrcdError:
        """The error with which a Commit of the plan is refused."""
        return OrcdError(
            self.code,
            self.message,
            field=self.field,
            needed_bytes=self.needed_bytes,
            available_bytes=self.available_bytes,
        )


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A flag and the largest value, or for a limit the least, at which the plan would be feasible."""

    flag: str
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """What a model needs on a device, by purpose, and whether it fits.

    Attributes:
      sizes: what was planned for.
      weights_bytes: every tensor of the checkpoint; exact.
      kv_bytes: the decode state: KV pages, page tables, rows; exact.
      workspace_bytes: activations and temporaries of the programs, their code, and the allocator's rounding.
      workspace: whether that is the closed-form upper bound, or what the same programs, compiled for such a device,
        said of themselves.
      reserve_bytes: the driver's context, libraries and graphs.
      headroom_bytes: left free on purpose.
      total_bytes: the sum of these.
      available_bytes: what this process can get of the device.
      foreign_bytes: what other processes hold; not in ``available_bytes``.
      reasons: every reason why not.
      suggestions: each alone would make it fit; empty when feasible, or when no single flag would.
    """

    sizes: Sizes
    weights_bytes: int
    kv_bytes: int
    workspace_bytes: int
    workspace: Literal["bound", "recorded"]
    reserve_bytes: int
    headroom_bytes: int
    total_bytes: int
    available_bytes: int
    foreign_bytes: int
    reasons: tuple[Reason, ...] = ()
    suggestions: tuple[Suggestion, ...] = ()

    @property
    def feasible(self) -> bool:
        """Whether a Commit of this plan loads: there is no reason why not."""
        return not self.reasons


def plan_memory(
    config: LlamaConfig,
    tensors: Sequence[int],
    sizes: Sizes,
    device: DeviceMemory,
    *,
    recorded_bytes: int | None = None,
    headroom_bytes: int | None = None,
    max_model_bytes: int | None = None,
) -> MemoryPlan:
    """Plans the device memory of one model on one device. Pure: neither device nor compiler is asked.

    Args:
      config: the model.
      tensors: bytes of each of its arrays, as the manifest lists them.
      sizes: what the worker is to hold.
      device: where.
      recorded_bytes: workspace of the very programs on such a device, from :mod:`residency.recorded`; None: the bound.
      headroom_bytes: left free on purpose; None: :func:`default_headroom`.
      max_model_bytes: the worker's limit on the weights, if there is one.
    """
    workload = _Workload(config, tuple(tensors), device, headroom_bytes)
    plan = workload.plan(sizes, recorded_bytes)
    reasons: list[Reason] = []
    suggestions: tuple[Suggestion, ...] = ()
    if not _fits(plan):
        suggestions = workload.suggestions(sizes)
        reasons.append(_too_large(workload, plan, suggestions))
    if max_model_bytes is not None and plan.weights_bytes > max_model_bytes:
        suggestions = () if reasons else (Suggestion("--max_model_bytes", plan.weights_bytes),)
        reasons.append(_over_limit(plan.weights_bytes, max_model_bytes))
    return replace(plan, reasons=tuple(reasons), suggestions=suggestions)


def default_headroom(needed_bytes: int, platform: Platform) -> int:
    """Bytes left free on purpose: 1 % of what is needed, and on a GPU at least 256 MiB."""
    return max(0 if platform == "cpu" else _LEAST_HEADROOM_BYTES, needed_bytes // 100)


@dataclass(frozen=True, slots=True)
class _Workload:
    """A model on a device: everything of a plan but its sizes."""

    config: LlamaConfig
    tensors: tuple[int, ...]
    device: DeviceMemory
    headroom: int | None

    def plan(self, sizes: Sizes, recorded_bytes: int | None = None) -> MemoryPlan:
        """The plan before it is judged. Its total grows with each size, or stays."""
        device, weights, state = self.device, sum(self.tensors), state_bytes(self.config, sizes)
        running = recorded_bytes
        if running is None:
            bounds = program_bounds(self.config, self.tensors, sizes, device.platform)
            steps = (bounds["prefill"], bounds["decode"])
            running = workspace_peak(sizes, steps=steps, others=(bounds["digest"],))
            running += float32_copies(self.config, self.tensors, sizes, device.platform)
        # Matmuls are tuned on a copy of their matrix when the weights lie there and the state does not yet.
        tuning = 0 if device.platform == "cpu" else max(self.tensors, default=0) + _TUNING_BYTES
        arrays = len(self.tensors) + 2 * self.config.num_layers + 16
        workspace = max(running, tuning - state) + arrays * _ALIGNMENT
        needed = weights + state + workspace + device.reserve_bytes
        headroom = default_headroom(needed, device.platform) if self.headroom is None else self.headroom
        return MemoryPlan(
            sizes=sizes,
            weights_bytes=weights,
            kv_bytes=state,
            workspace_bytes=workspace,
            workspace="bound" if recorded_bytes is None else "recorded",
            reserve_bytes=device.reserve_bytes,
            headroom_bytes=headroom,
            total_bytes=needed + headroom,
            available_bytes=device.available_bytes,
            foreign_bytes=device.foreign_bytes,
        )

    def fits(self, sizes: Sizes) -> bool:
        """Whether the sizes fit under the bound."""
        return _fits(self.plan(sizes))

    def suggestions(self, sizes: Sizes) -> tuple[Suggestion, ...]:
        """For each flag, the largest value below the one asked for that fits, the others as they are."""
        slots = _largest(1, sizes.slots_total - 1, 1, lambda n: self.fits(replace(sizes, slots_total=n)))
        context = _largest(LEAST_CONTEXT, sizes.max_context - 1, 1, lambda n: self.fits(replace(sizes, max_context=n)))
        prefill = _largest(
            BLOCK_TOKENS,
            sizes.prefill_tokens - BLOCK_TOKENS,
            BLOCK_TOKENS,
            lambda n: self.fits(replace(sizes, prefill_tokens=n)),
        )
        found = {"--slots_total": slots, "--max_context": context, "--prefill_tokens": prefill}
        return tuple(Suggestion(flag, value) for flag, value in found.items() if value is not None)

    def together(self, sizes: Sizes) -> Sizes | None:
        """Sizes that fit when no single flag helps; None when not even the least do.

        The smallest prefill call; with it as many slots as the context allows, or one and as much context as it allows.
        """
        smaller = replace(sizes, prefill_tokens=min(sizes.prefill_tokens, BLOCK_TOKENS))
        slots = _largest(1, sizes.slots_total, 1, lambda n: self.fits(replace(smaller, slots_total=n)))
        if slots is not None:
            return replace(smaller, slots_total=slots)
        one = replace(smaller, slots_total=1)
        context = _largest(LEAST_CONTEXT, sizes.max_context, 1, lambda n: self.fits(replace(one, max_context=n)))
        return None if context is None else replace(one, max_context=context)


def _fits(plan: MemoryPlan) -> bool:
    return plan.total_bytes <= plan.available_bytes


def _largest(least: int, most: int, step: int, fits: Callable[[int], bool]) -> int | None:
    """The largest of ``least, least + step, … ≤ most`` that fits, where all below one that fits do too."""
    low, high = -1, (most - least) // step  # low fits, or is none; above high is out of the question
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(least + middle * step) else (low, middle - 1)
    return None if low < 0 else least + low * step


def _over_limit(weights_bytes: int, limit: int) -> Reason:
    return Reason(
        code=ErrorCode.POLICY_VIOLATION,
        message=f"the weights have {size(weights_bytes)}, over the limit --max_model_bytes={limit}: choose another "
        f"model, or raise it to {weights_bytes}",
        field="max_model_bytes",
        needed_bytes=weights_bytes,
        available_bytes=limit,
    )


def _too_large(workload: _Workload, plan: MemoryPlan, suggestions: Sequence[Suggestion]) -> Reason:
    needed, available, device = plan.total_bytes, plan.available_bytes, workload.device
    held = f" (other processes hold {size(device.foreign_bytes)})" if device.foreign_bytes else ""
    return Reason(
        code=ErrorCode.INSUFFICIENT_VRAM,
        message=f"the model needs {size(needed)} and {device.kind or 'the device'} has {size(available)} available"
        f"{held}, {size(needed - available)} too little: {_way_out(workload, plan.sizes, suggestions)}",
        field="model_path",
        needed_bytes=needed,
        available_bytes=available,
    )


def _way_out(workload: _Workload, sizes: Sizes, suggestions: Sequence[Suggestion]) -> str:
    if suggestions:
        return f"{' or '.join(f'{s.flag}={s.value}' for s in suggestions)} would fit"
    if (smaller := workload.together(sizes)) is not None:
        return (
            f"--slots_total={smaller.slots_total} with --max_context={smaller.max_context} and "
            f"--prefill_tokens={smaller.prefill_tokens} would fit"
        )
    least = workload.plan(LEAST).total_bytes
    return (
        f"a larger device is needed, because even one job of {LEAST_CONTEXT} tokens takes {size(least)} ({least} bytes)"
    )
