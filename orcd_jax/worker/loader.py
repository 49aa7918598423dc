"""From a checkpoint directory to a model that is ready to run: verified, restored onto the device, compiled.

Each stage is cheaper than the next, so that a bad model fails before anything large happens: manifest, capabilities,
file hashes, restore, digests of what lies on the device, compilation.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orcd_jax.checkpoint.manifest import Manifest, read_manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import verify_arrays, verify_files
from orcd_jax.config import BLOCK_TOKENS, WorkerConfig
from orcd_jax.device import faults
from orcd_jax.device.discovery import DeviceInfo, describe, select_device
from orcd_jax.engine.programs import Programs
from orcd_jax.engine.state import EngineShape, kv_bytes
from orcd_jax.models.registry import Params
from orcd_jax.tokenizer.chat_template import ChatTemplate
from orcd_jax.tokenizer.tokenizer import Tokenizer
from orcd_jax.worker.capability import check_capabilities

PAGE_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentModel:
    """A model whose weights lie on the device, proved equal to the manifest, with its programs compiled.

    Attributes:
      shape: the sizes the programs were compiled for.
      kv_bytes: KV pages the engine will allocate.
      load_seconds: seconds spent in each stage, by name.
      digested_s: monotonic time at which the digests of the arrays on the device began.
    """

    manifest: Manifest
    device: DeviceInfo
    shape: EngineShape
    params: Params
    programs: Programs
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    kv_bytes: int
    load_seconds: dict[str, float]
    digested_s: float


def engine_shape(config: WorkerConfig, context_max: int) -> EngineShape:
    """The sizes a worker with this configuration runs a model at.

    Every row can hold a job of full context: pages = rows x pages per job.
    """
    context = min(config.max_context or context_max, context_max)
    pages_per_job = -(-context // PAGE_TOKENS)
    return EngineShape(
        rows=config.slots_total,
        block_tokens=BLOCK_TOKENS,
        prefill_blocks=max(1, config.prefill_tokens // BLOCK_TOKENS),
        page_tokens=PAGE_TOKENS,
        pages=config.slots_total * pages_per_job,
        pages_per_job=pages_per_job,
        context=context,
    )


def load_model(config: WorkerConfig, progress: Callable[[Progress], None]) -> ResidentModel:
    """Loads the checkpoint at ``config.model_path``. Blocks for as long as it takes; call it off the event loop.

    Raises:
      OrcdError: NoDevice, MODEL_LOAD_FAILED, CAPABILITY_MISMATCH, SEAL_VERIFICATION_FAILED or VRAM_OOM.
    """
    seconds: dict[str, float] = {}
    started = time.perf_counter()

    def lap(stage: str) -> None:
        nonlocal started
        now = time.perf_counter()
        seconds[stage] = round(now - started, 3)
        started = now

    device = select_device(config.platform, config.gpu_device)
    directory = Path(config.model_path)
    manifest = read_manifest(directory)
    check_capabilities(manifest.model)
    verify_files(directory, manifest, progress)
    tokenizer, chat_template = _load_text(directory, manifest)
    lap("verify_files")
    with faults.translated():
        params = restore(directory, manifest, device, progress)
        lap("restore")
        digested_s = time.monotonic()
        verify_arrays(manifest, params, progress)
        lap("verify_arrays")
    shape = engine_shape(config, manifest.config.context_max)
    done = 0

    def compiling(_: str) -> None:
        nonlocal done
        progress(Progress("compile", done, len(Programs.NAMES)))
        done += 1

    with faults.translated():
        programs = Programs(manifest.config, shape, device, compiling)
    lap("compile")
    return ResidentModel(
        manifest=manifest,
        device=describe(device, config.gpu_device),
        shape=shape,
        params=params,
        programs=programs,
        tokenizer=tokenizer,
        chat_template=chat_template,
        kv_bytes=kv_bytes(manifest.config, shape),
        load_seconds=seconds,
        digested_s=digested_s,
    )


def _load_text(directory: Path, manifest: Manifest) -> tuple[Tokenizer, ChatTemplate | None]:
    """Tokenizer and chat template, from files that were verified."""
    entry = manifest.tokenizer
    tokenizer = Tokenizer.load(
        directory,
        vocab_size=manifest.config.vocab_size,
        bos_id=entry.bos_id,
        eos_ids=entry.eos_ids,
        add_bos=entry.add_bos,
    )
    end = entry.eos_ids[0] if entry.eos_ids else None
    template = ChatTemplate.load(directory, bos_token=tokenizer.token(entry.bos_id), eos_token=tokenizer.token(end))
    return tokenizer, template
