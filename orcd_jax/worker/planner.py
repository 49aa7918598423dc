"""Would a model load here? Reads its manifest, compares what it needs with what there is, and allocates nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from orcd_jax.checkpoint.manifest import Manifest, parse_manifest, read_manifest_bytes, tensor_bytes
from orcd_jax.checkpoint.model_ref import parse_model_ref, resolve
from orcd_jax.checkpoint.signature import verify_signature
from orcd_jax.config import BLOCK_TOKENS, WorkerConfig
from orcd_jax.device.discovery import DeviceInfo
from orcd_jax.device.gpu_health import foreign_bytes
from orcd_jax.engine.state import EngineShape
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.residency.bounds import PAGE_TOKENS, Sizes
from orcd_jax.residency.budget import DeviceMemory, MemoryPlan, plan_memory
from orcd_jax.residency.recorded import plan_key, recall
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.telemetry.narration import size
from orcd_jax.worker.capability import check_capabilities
from orcd_jax.worker.loader import LoadPlan, SealedModel, manifest_problems
from orcd_jax.worker.services import Services
from orcd_jax.worker.types import CommitParams, PlanInfo, PlanParams


def engine_shape(sizes: Sizes) -> EngineShape:
    """The sizes a worker runs a model at: a row for each slot, and every row's pages."""
    return EngineShape(
        rows=sizes.slots_total,
        block_tokens=BLOCK_TOKENS,
        prefill_blocks=sizes.prefill_blocks,
        page_tokens=PAGE_TOKENS,
        pages=sizes.pages,
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
        """What a model would take, and every reason why a Commit of the same wishes, and no more, would not load it."""
        plan, reasons = self._judge(CommitParams(plan=params))
        return self.info(plan, reasons)

    def commit_plan(self, params: CommitParams) -> LoadPlan:
        """The plan that a Commit carries out: trusted as far as was asked, and feasible.

        Raises:
          OrcdError: the first reason why not.
        """
        plan, reasons = self._judge(params)
        for reason in reasons:
            raise reason
        assert plan is not None  # noqa: S101 - there would be a reason
        return plan

    def resident_problems(self, params: CommitParams, sealed: SealedModel) -> list[OrcdError]:
        """Why a Commit is not answered with the handle that is there: it means another, or its signature is no good."""
        handle, plan = sealed.handle, sealed.resident.plan
        problems = []
        if params.expected_digest and params.expected_digest != handle.digest:
            problems.append(_other_model("expected_digest"))
        if params.shard_id and params.shard_id != handle.shard_id:
            problems.append(_other_model("shard_id"))
        if not params.expected_digest:
            problems += _refused(lambda: self._same_directory(params.plan, plan))
        for field, wanted, there in (
            ("max_context", params.plan.max_context, plan.shape.max_context),
            ("slots", params.plan.slots, plan.shape.rows),
        ):
            if wanted is not None and wanted != there:
                problem = (
                    f"{field}: the model was loaded for {there}, not {wanted}: ask for that, or start another worker"
                )
                problems.append(OrcdError(ErrorCode.POLICY_VIOLATION, problem, field=field))
        problems += _layout_problems(params.plan)
        problems += _refused(lambda: self._verify(plan.manifest_bytes, params.signature))
        return problems

    def resident_info(self, plan: LoadPlan) -> PlanInfo:
        """What the model that is resident takes. Feasible: a Commit of it is answered with its handle."""
        memory = replace(self._memory(plan.manifest, plan.sizes)[0], reasons=(), suggestions=())
        return self.info(replace(plan, memory=memory), [])

    def info(self, plan: LoadPlan | None, reasons: Sequence[OrcdError]) -> PlanInfo:
        """The answer to Plan; without a plan where the manifest could not be used."""
        return PlanInfo(
            memory=None if plan is None else plan.memory,
            reasons=tuple(reasons),
            model=None if plan is None else plan.manifest.model,
            max_context=0 if plan is None else plan.sizes.max_context,
            slots=0 if plan is None else plan.sizes.slots_total,
            device_index=self._device.index,
            device_uuid=self._device.uuid,
        )

    def _judge(self, params: CommitParams) -> tuple[LoadPlan | None, list[OrcdError]]:
        """The plan of a Commit, and every reason why it cannot be carried out, the first of them first (WORKER-4223).

        There is no plan where the manifest is not there, not signed as it should be, or not to be understood.
        """
        reasons = _layout_problems(params.plan)
        try:
            directory = self.find(params.plan)
            raw = read_manifest_bytes(directory)
            signed = self._verify(raw, params.signature or (b"" if params.plan.model_ref else self._services.signature))
            manifest = parse_manifest(raw)
        except OrcdError as error:
            return None, [error, *reasons]
        pinned, problems = self._pinned(params, manifest, signed=signed)
        sizes, too_large = self._sizes(params.plan, manifest)
        memory, no_room = self._memory(manifest, sizes)
        plan = LoadPlan(
            directory=directory,
            manifest_bytes=raw,
            manifest=manifest,
            sizes=sizes,
            shape=engine_shape(sizes),
            memory=memory,
            key=self._key(manifest, sizes),
            pinned=pinned,
        )
        unable = [*_refused(lambda: check_capabilities(manifest.model)), *manifest_problems(manifest, self._config)]
        return plan, [*problems, *unable, *reasons, *too_large, *no_room]

    def _same_directory(self, params: PlanParams, plan: LoadPlan) -> None:
        if self.find(params).resolve() != plan.directory.resolve():
            raise _other_model("model_ref")

    def _verify(self, manifest_bytes: bytes, signature: bytes) -> bool:
        """Whether there is a signature over a manifest. Raises when there is one that is not good."""
        if signature:
            verify_signature(manifest_bytes, signature, self._services.trusted_keys)
        return bool(signature)

    def _pinned(self, params: CommitParams, manifest: Manifest, *, signed: bool) -> tuple[bool, list[OrcdError]]:
        """Whether somebody outside vouches for these weights (WORKER-4220), and why they are not those wanted."""
        wanted = [digest for digest in (params.expected_digest, self._config.expected_digest) if digest]
        problems = []
        if any(digest != manifest.digest for digest in wanted):
            problems.append(
                OrcdError(
                    ErrorCode.MODEL_LOAD_FAILED,
                    f"the model's digest is {manifest.digest}, not the one expected: load the model that was meant",
                    field="expected_digest",
                )
            )
        if not wanted and not signed and self._config.require_pinned:
            problems.append(
                OrcdError(
                    ErrorCode.POLICY_VIOLATION,
                    "this worker loads only pinned models: give Commit the expected digest, or a signature by a "
                    "trusted key",
                    field="expected_digest",
                )
            )
        return bool(wanted) or signed, problems

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

    def _memory(self, manifest: Manifest, sizes: Sizes) -> tuple[MemoryPlan, list[OrcdError]]:
        """The memory plan, and why there is not enough of it, or not for certain."""
        recorded = None
        if self._services.plans_directory is not None:
            recorded = recall(self._services.plans_directory, self._key(manifest, sizes), _ignored)
        device, uncertain = self._device_memory()
        memory = plan_memory(
            manifest.config,
            [tensor_bytes(entry) for entry in manifest.tensors],
            sizes,
            device,
            recorded_bytes=None if recorded is None else recorded.workspace_bytes(sizes),
            max_model_bytes=self._config.max_model_bytes,
        )
        problems = [reason.error() for reason in memory.reasons]
        if uncertain and self._config.allow_shared_gpu:
            _ignored(f"for --allow_shared_gpu this is no reason: {uncertain}")
        elif uncertain:
            problems.append(OrcdError(ErrorCode.POLICY_VIOLATION, uncertain, field="allow_shared_gpu"))
        return memory, problems

    def _device_memory(self) -> tuple[DeviceMemory, str]:
        """What this process can get of its device, and why that is not certain; empty: it is.

        XLA's pool and what lies outside of it; and no more than the device has, less what other processes hold.
        """
        device = self._device
        memory = DeviceMemory(
            kind=device.kind, total_bytes=device.memory_bytes, platform="cpu" if device.emulated else "cuda"
        )
        if device.emulated:
            return memory, ""
        own, now = device.memory_bytes + memory.reserve_bytes, self._services.gpu_health()
        foreign, usable = foreign_bytes(device.before, now), now.usable_memory_bytes
        if foreign is None or usable is None:
            return replace(memory, total_bytes=own), (
                "the driver does not tell what other processes hold of the GPU, so no plan is certain: see whether "
                "nvidia-smi answers (a container needs NVIDIA_DRIVER_CAPABILITIES=compute,utility) and start again, or "
                "start the worker with --allow_shared_gpu"
            )
        memory = replace(memory, total_bytes=min(usable, own + foreign), foreign_bytes=foreign)
        if not foreign:
            return memory, ""
        return memory, (
            f"other processes hold {size(foreign)} of the GPU, so no plan is certain: stop them, or start the worker "
            "with --allow_shared_gpu"
        )

    def _key(self, manifest: Manifest, sizes: Sizes) -> str:
        flags = os.environ.get("XLA_FLAGS", "")
        return plan_key(manifest.config, sizes, device_kind=self._device.kind, xla_flags=flags)


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


def _refused(check: Callable[[], object]) -> list[OrcdError]:
    """What a check raises."""
    try:
        check()
    except OrcdError as error:
        return [error]
    return []


def _other_model(field: str) -> OrcdError:
    return OrcdError(
        ErrorCode.POLICY_VIOLATION,
        "a worker holds one model for its life, and this one holds another: start another",
        field=field,
    )


def _ignored(problem: str) -> None:
    get_logger().warning(EventCode.PLAN, human=problem[:1].upper() + problem[1:] + ".")
