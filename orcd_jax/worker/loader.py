"""From a checkpoint directory to a sealed model, in stages of which each has its own type.

    assess → LoadPlan → load → ResidentModel → seal → SealedModel

Each stage is cheaper than the next, so that a bad model fails before anything large happens: manifest, trust,
capabilities, memory; file hashes; restore; compilation; warm-up; the digests of what lies on the device; the seal.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax

from orcd_jax.checkpoint.manifest import CHAT_TEMPLATE_FILE, TOKENIZER_FILE, FileEntry, Manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore, restore_problems
from orcd_jax.checkpoint.verify import read_verified, verify_files
from orcd_jax.config import WorkerConfig
from orcd_jax.device import faults
from orcd_jax.device.discovery import DeviceInfo
from orcd_jax.engine.engine import Deliver, Engine, warm_up
from orcd_jax.engine.fingerprint import executable_fingerprint
from orcd_jax.engine.programs import Programs
from orcd_jax.engine.state import DecodeState, EngineShape
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import Params
from orcd_jax.residency import policy
from orcd_jax.residency.bounds import Sizes
from orcd_jax.residency.budget import MemoryPlan
from orcd_jax.residency.guard import SealGuard
from orcd_jax.residency.keys import SealKey
from orcd_jax.residency.prover import Pending, WeightProver, proof_problems
from orcd_jax.residency.recorded import Analysis, record
from orcd_jax.residency.seal import Seal, SealRecord, seal, verify
from orcd_jax.telemetry.log import EventCode, get_logger
from orcd_jax.tokenizer.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate
from orcd_jax.tokenizer.tokenizer import MAX_FILE_BYTES, Tokenizer
from orcd_jax.worker.types import Handle

OnProgress = Callable[[Progress], None]

_TEXT_FILES = {
    TOKENIZER_FILE: ("tokenizer", MAX_FILE_BYTES),
    CHAT_TEMPLATE_FILE: ("chat_template", MAX_TEMPLATE_BYTES),
}
"""By name: the field of a refusal, and most bytes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPlan:
    """A model that was read, trusted as far as was asked, able to run here, and fits. Nothing is allocated yet.

    Attributes:
      manifest_bytes: the ``manifest.json`` that was read: what a signature is over.
      key: under which the analysis of its programs is recorded.
      pinned: its digest was given from outside, or signed by a trusted key.
    """

    directory: Path
    manifest_bytes: bytes
    manifest: Manifest
    sizes: Sizes
    shape: EngineShape
    memory: MemoryPlan
    key: str
    pinned: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentModel:
    """A model whose weights lie on the device, with its programs compiled. Not proved yet.

    Attributes:
      fingerprint: of the compiled programs and what made them, 64 hex digits.
      load_seconds: seconds spent in each stage, by name.
    """

    plan: LoadPlan
    device: DeviceInfo
    params: Params
    programs: Programs
    prover: WeightProver
    fingerprint: str
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    load_seconds: dict[str, float]

    @property
    def manifest(self) -> Manifest:
        """What the checkpoint holds."""
        return self.plan.manifest

    @property
    def shape(self) -> EngineShape:
        """The sizes the programs were compiled for."""
        return self.plan.shape

    @property
    def vram_bytes(self) -> int:
        """Device memory that the weights and the decode state hold; none on an emulated device."""
        memory = self.plan.memory
        return 0 if self.device.emulated else memory.weights_bytes + memory.kv_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedModel:
    """A model that is resident, immutable, compiled, warmed up, digested and sealed, in that order (WORKER-4112)."""

    resident: ResidentModel
    handle: Handle
    seal: Seal
    engine: Engine
    guard: SealGuard[Pending, DecodeState]


@dataclass(frozen=True, slots=True, kw_only=True)
class Listeners:
    """Who is told what a sealed model does. All of them are called on the engine thread.

    Attributes:
      deliver: a step's events of all jobs.
      on_fatal: why the engine cannot go on; once.
      on_pass: seconds that a whole proof of the weights took.
      on_late: age of the oldest proof, when tokens have to wait for a new one.
    """

    deliver: Deliver
    on_fatal: Callable[[OrcdError], None]
    on_pass: Callable[[float], None]
    on_late: Callable[[float], None]


def manifest_problems(manifest: Manifest, config: WorkerConfig) -> list[OrcdError]:
    """Every reason why :func:`load` and :func:`seal_model` would refuse a model, whatever its files hold. Pure.

    Each stage owns its rules and holds to them itself, too. What only bytes can tell is left to the stages: hashes,
    the content of files, the arrays' own description of themselves, and what XLA makes of the programs.
    """
    return [
        *text_problems(manifest),
        *restore_problems(manifest, staging_bytes=config.max_staging_bytes),
        *proof_problems(manifest.tensors),
    ]


def load(
    config: WorkerConfig,
    plan: LoadPlan,
    jax_device: jax.Device,
    info: DeviceInfo,
    *,
    plans_directory: Path | None,
    on: OnProgress,
    on_file: Callable[[FileEntry], None] = lambda _: None,
) -> ResidentModel:
    """Brings the weights onto the device and compiles the programs. Blocks; call it off the event loop.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, POLICY_VIOLATION, VRAM_OOM or HOST_OOM.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage] = round(now - started, 3)
        started = now

    manifest = plan.manifest
    verify_files(plan.directory, manifest, on, on_file)
    tokenizer, chat_template = _load_text(plan.directory, manifest)
    lap("verify_files")
    with faults.translated():
        params = restore(plan.directory, manifest, jax_device, on, staging_bytes=config.max_staging_bytes)
    lap("restore")
    done = 0

    def compiling(_: str) -> None:
        nonlocal done
        on(Progress("compile", done, len(Programs.NAMES) + 1))
        done += 1

    with faults.translated():
        programs = Programs(manifest.config, plan.shape, jax_device, compiling)
        compiling("digest")
        prover = WeightProver(manifest, params, jax_device)
    compiled = {**programs.compiled, **prover.programs}
    policy.check_programs(compiled)
    _check_workspace(plan, Analysis.of(compiled), plans_directory)
    fingerprint = executable_fingerprint(compiled, jax_device)
    lap("compile")
    return ResidentModel(
        plan=plan,
        device=info,
        params=params,
        programs=programs,
        prover=prover,
        fingerprint=fingerprint,
        tokenizer=tokenizer,
        chat_template=chat_template,
        load_seconds=seconds,
    )


def _check_workspace(plan: LoadPlan, analysis: Analysis, plans_directory: Path | None) -> None:
    """Keeps what the programs say of their memory for later plans, and holds them to this one.

    Raises:
      OrcdError: INSUFFICIENT_VRAM, when they need more than was planned and the device has not got it.
    """
    if plans_directory is not None:
        try:
            record(plans_directory, plan.key, analysis)
        except OrcdError as error:  # the worker can do without
            get_logger().warning(EventCode.PLAN, human=error.message)
    more = analysis.workspace_bytes(plan.sizes) - plan.memory.workspace_bytes
    memory = plan.memory
    if memory.total_bytes + more > memory.available_bytes:
        raise OrcdError(
            ErrorCode.INSUFFICIENT_VRAM,
            f"the compiled programs need {more} bytes more than was planned: lower --slots_total or --prefill_tokens",
            needed_bytes=memory.total_bytes + more,
            available_bytes=memory.available_bytes,
        )


def seal_model(
    config: WorkerConfig,
    resident: ResidentModel,
    jax_device: jax.Device,
    *,
    key: SealKey,
    shard_id: str,
    handle_id: str,
    listeners: Listeners,
    on: OnProgress,
) -> SealedModel:
    """Warms the programs up, proves the weights from the device's own bytes, and seals. The engine runs after this.

    Raises:
      OrcdError: SEAL_VERIFICATION_FAILED, naming the tensor; POLICY_VIOLATION, naming the buffer; VRAM_OOM.
    """
    manifest = resident.manifest
    began, proved_s = time.perf_counter(), time.monotonic()
    state = warm_up(resident.programs, resident.params)
    with faults.translated():
        digest = resident.prover.prove_all(on)
        check_residency(resident, jax_device, state)
    if digest != manifest.digest:
        raise OrcdError(ErrorCode.SEAL_VERIFICATION_FAILED, "the digest from the device is not the manifest's")
    resident.load_seconds["prove"] = round(time.perf_counter() - began, 3)
    handle = Handle(
        handle_id=handle_id,
        shard_id=shard_id or f"{manifest.digest[:16]}-0",
        device_index=resident.device.index,
        device_uuid=resident.device.uuid,
        vram_bytes=0 if resident.device.emulated else resident.plan.memory.weights_bytes,
        sealed=True,
        sealed_at_ms=time.time_ns() // 1_000_000,
        digest=digest,
        model_ref=manifest.model.model_id,
        shard_index=0,
        total_shards=1,
        pinned=resident.plan.pinned,
        emulated=resident.device.emulated,
    )
    sealed = seal(key, _record_of(handle, resident))
    guard: SealGuard[Pending, DecodeState] = SealGuard(
        resident.prover,
        max_age_s=config.seal_max_age,
        proved_s=proved_s,
        verify_seal=lambda: verify(key, Seal(_record_of(handle, resident), sealed.mac)),
        check_residency=lambda now: check_residency(resident, jax_device, now),
        on_pass=listeners.on_pass,
        on_late=listeners.on_late,
    )
    engine = Engine(
        resident.programs,
        resident.params,
        guard,
        token_bytes=resident.tokenizer.token_bytes,
        eos_ids=resident.tokenizer.eos_ids,
        deliver=listeners.deliver,
        on_fatal=listeners.on_fatal,
    )
    engine.start(state)
    return SealedModel(resident=resident, handle=handle, seal=sealed, engine=engine, guard=guard)


def _record_of(handle: Handle, resident: ResidentModel) -> SealRecord:
    """What the seal is over, as it is now: a handle or a fingerprint that changed does not verify."""
    return SealRecord(
        shard_id=handle.shard_id,
        digest=handle.digest,
        sealed_at_ms=handle.sealed_at_ms,
        device_uuid=handle.device_uuid,
        executable_fingerprint=resident.fingerprint,
    )


def check_residency(resident: ResidentModel, jax_device: jax.Device, state: DecodeState | None) -> None:
    """Raises POLICY_VIOLATION when a weight or a buffer of the state is not in the device's own memory."""
    policy.check_arrays(resident.params.items(), jax_device)
    leaves = jax.tree_util.tree_flatten_with_path(state)[0]
    policy.check_arrays(((f"state{jax.tree_util.keystr(path)}", leaf) for path, leaf in leaves), jax_device)


def text_problems(manifest: Manifest) -> list[OrcdError]:
    """Why tokenizer and chat template cannot be read, by the manifest's list of files: MODEL_LOAD_FAILED each."""
    sizes = {entry.path: entry.size_bytes for entry in manifest.files}
    problems = [
        (field, f"{name} has {sizes[name]} bytes, over the limit of {most}: choose another model")
        for name, (field, most) in _TEXT_FILES.items()
        if sizes.get(name, 0) > most
    ]
    if TOKENIZER_FILE not in sizes:
        problems.append(("tokenizer", "manifest.json lists no tokenizer.json: convert the model again"))
    return [OrcdError(ErrorCode.MODEL_LOAD_FAILED, problem, field=field) for field, problem in problems]


def _load_text(directory: Path, manifest: Manifest) -> tuple[Tokenizer, ChatTemplate | None]:
    """Tokenizer and chat template, from the very bytes that the manifest vouches for."""
    for problem in text_problems(manifest):
        raise problem
    entry = manifest.tokenizer
    raw = read_verified(directory, manifest, TOKENIZER_FILE, MAX_FILE_BYTES) or b""
    tokenizer = Tokenizer(
        raw,
        vocab_size=manifest.config.vocab_size,
        bos_id=entry.bos_id,
        eos_ids=entry.eos_ids,
        add_bos=entry.add_bos,
    )
    template = read_verified(directory, manifest, CHAT_TEMPLATE_FILE, MAX_TEMPLATE_BYTES)
    if template is None:
        return tokenizer, None
    try:
        source = template.decode()
    except UnicodeDecodeError:
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED, "chat_template.jinja is not UTF-8", field="chat_template"
        ) from None
    end = entry.eos_ids[0] if entry.eos_ids else None
    bos, eos = tokenizer.token(entry.bos_id), tokenizer.token(end)
    return tokenizer, ChatTemplate(source, bos_token=bos, eos_token=eos)
