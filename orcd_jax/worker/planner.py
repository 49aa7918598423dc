"""Would a model load here? Reads its manifest, compares what it needs with what there is, and allocates nothing."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from orcd_jax.checkpoint.manifest import Manifest, parse_manifest, read_manifest_bytes, tensor_bytes
from orcd_jax.checkpoint.model_ref import parse_model_ref, resolve
from orcd_jax.checkpoint.signature import verify_signature
from orcd_jax.config import BLOCK_TOKENS, WorkerConfig
from orcd_jax.device.discovery import DeviceInfo
from orcd_jax.engine.state import EngineShape
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.bounds import PAGE_TOKENS, Sizes
from orcd_jax.residency.budget import DeviceMemory, MemoryPlan, plan_memory
from orcd_jax.residency.recorded import plan_key, recall
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.telemetry.narration import size
from orcd_jax.worker.capability import check_capabilities
from orcd_jax.worker.loader import LoadPlan
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import CommitParams, PlanInfo, PlanParams


def engine_shape(sizes: Sizes) -> EngineShape:
    """The sizes a worker runs a model at. Every row can hold a job of full context: pages = rows x pages per job."""
    return EngineShape(
        rows=sizes.slots_total,
        block_tokens=BLOCK_TOKENS,
        prefill_blocks=sizes.prefill_blocks,
        page_tokens=PAGE_TOKENS,
        pages=sizes.slots_total * sizes.pages_per_job,
        pages_per_job=sizes.pages_per_job,
        context=sizes.max_context,
    )


class Planner:
    """Answers Plan, and makes the plan that Commit carries out. Touches no device; call it off the event loop."""

    def __init__(self, config: WorkerConfig, services: Services, device: DeviceInfo) -> None:
        """Plans for ``device``, as it was before anything was allocated."""
        self._config, self._services, self._device = config, services, device

    def find(self, params: PlanParams) -> Path:
        """The directory of a model that may be loaded here.

        Raises:
          OrcdError: INVALID_PARAMS, POLICY_VIOLATION or MODEL_LOAD_FAILED.
        """
        if not params.model_ref:
            return self._config.model_path
        roots = [root for root in (self._config.model_path, self._config.model_root) if root is not None]
        return resolve(parse_model_ref(params.model_ref), allowed=roots)

    def assess(self, params: PlanParams) -> PlanInfo:
        """What a model would take, and every reason why it cannot be loaded."""
        reasons = _layout_problems(params)
        manifest = None
        try:
            manifest = parse_manifest(read_manifest_bytes(self.find(params)))
            check_capabilities(manifest.model)
        except OrcdError as error:
            return self._info([*reasons, error], manifest)
        sizes, problems = self._sizes(params, manifest)
        memory = self._memory(manifest, sizes)
        return self._info([*reasons, *problems, *self._memory_problems(memory)], manifest, sizes, memory)

    def commit_plan(self, params: CommitParams) -> LoadPlan:
        """The plan that a Commit carries out: trusted as far as was asked, and feasible.

        Raises:
          OrcdError: the first reason why not.
        """
        directory = self.find(params.plan)
        raw = read_manifest_bytes(directory)
        signature = params.signature or (b"" if params.plan.model_ref else self._services.signature)
        if signature:
            verify_signature(raw, signature, self._services.trusted_keys)
        manifest = parse_manifest(raw)
        pinned = self._pinned(params, manifest, signed=bool(signature))
        check_capabilities(manifest.model)
        sizes, problems = self._sizes(params.plan, manifest)
        memory = self._memory(manifest, sizes)
        for problem in (*_layout_problems(params.plan), *problems, *self._memory_problems(memory)):
            raise problem
        return LoadPlan(
            directory=directory,
            manifest=manifest,
            sizes=sizes,
            shape=engine_shape(sizes),
            memory=memory,
            key=self._key(manifest, sizes),
            pinned=pinned,
        )

    def _pinned(self, params: CommitParams, manifest: Manifest, *, signed: bool) -> bool:
        """Whether somebody outside vouches for these weights (WORKER-4220). Raises when they are not those wanted."""
        wanted = [digest for digest in (params.expected_digest, self._config.expected_digest) if digest]
        if any(digest != manifest.digest for digest in wanted):
            raise OrcdError(
                ErrorCode.MODEL_LOAD_FAILED,
                f"the model's digest is {manifest.digest}, not the one expected: load the model that was meant",
                field="expected_digest",
            )
        if not wanted and not signed and self._config.require_pinned:
            raise OrcdError(
                ErrorCode.POLICY_VIOLATION,
                "this worker loads only pinned models: give the expected digest, or a signature by a trusted key",
                field="expected_digest",
            )
        return bool(wanted) or signed

    def _sizes(self, params: PlanParams, manifest: Manifest) -> tuple[Sizes, list[OrcdError]]:
        """The sizes to plan for: the wishes, the worker's own where there is none; and which of them it cannot have."""
        config, model = self._config, manifest.config.context_max
        own = min(config.max_context or model, model)
        problems = [
            OrcdError(
                ErrorCode.INVALID_PARAMS, f"{field}: {wanted} is over this worker's {most}: ask for less", field=field
            )
            for field, wanted, most in (
                ("max_context", params.max_context, own),
                ("slots", params.slots, config.slots_total),
            )
            if wanted is not None and wanted > most
        ]
        sizes = Sizes(
            slots_total=min(params.slots or config.slots_total, config.slots_total),
            max_context=min(params.max_context or own, own),
            prefill_tokens=config.prefill_tokens,
        )
        return sizes, problems

    def _memory(self, manifest: Manifest, sizes: Sizes) -> MemoryPlan:
        recorded = None
        if self._services.plans_directory is not None:
            recorded = recall(self._services.plans_directory, self._key(manifest, sizes), _ignored)
        return plan_memory(
            manifest.config,
            [tensor_bytes(entry) for entry in manifest.tensors],
            sizes,
            self._device_memory(),
            recorded_bytes=None if recorded is None else recorded.workspace_bytes(sizes),
            max_model_bytes=self._config.max_model_bytes,
        )

    def _device_memory(self) -> DeviceMemory:
        """What this process can get: the pool that XLA has, and what lies outside of it."""
        device = self._device
        pool = DeviceMemory(kind=device.kind, total_bytes=0, platform="cpu" if device.emulated else "cuda")
        foreign = self._services.gpu_health().other_memory_bytes or 0
        total = device.memory_bytes + pool.reserve_bytes
        return replace(pool, total_bytes=total + foreign, foreign_bytes=foreign)

    def _memory_problems(self, memory: MemoryPlan) -> list[OrcdError]:
        problems = [reason.error() for reason in memory.reasons]
        if memory.foreign_bytes and not self._config.allow_shared_gpu:
            problems.append(
                OrcdError(
                    ErrorCode.POLICY_VIOLATION,
                    f"other processes hold {size(memory.foreign_bytes)} of the GPU, so no plan is certain: stop them, "
                    "or start the worker with --allow_shared_gpu",
                    field="allow_shared_gpu",
                )
            )
        return problems

    def _key(self, manifest: Manifest, sizes: Sizes) -> str:
        flags = os.environ.get("XLA_FLAGS", "")
        return plan_key(manifest.config, sizes, device_kind=self._device.kind, xla_flags=flags)

    def _info(
        self,
        reasons: list[OrcdError],
        manifest: Manifest | None,
        sizes: Sizes | None = None,
        memory: MemoryPlan | None = None,
    ) -> PlanInfo:
        return PlanInfo(
            memory=memory,
            reasons=tuple(reasons),
            model=None if manifest is None else manifest.model,
            max_context=0 if sizes is None else sizes.max_context,
            slots=0 if sizes is None else sizes.slots_total,
            device_index=self._device.index,
            device_uuid=self._device.uuid,
        )


def _layout_problems(params: PlanParams) -> list[OrcdError]:
    if params.layout == "single" and params.tp_degree == 1:
        return []
    return [
        OrcdError(
            ErrorCode.CAPABILITY_MISMATCH,
            f"requires tensor_parallel over {params.tp_degree} devices; this worker has single, on one",
            field="shard_layout",
        )
    ]


def _ignored(problem: str) -> None:
    get_logger().warning(EventCode.PLAN, human=problem[:1].upper() + problem[1:] + ".")
