"""What is said to be exact is; what is said to be a bound is one, for the programs that XLA really compiles."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from orcd_jax.engine.prefill_call import PrefillCallBuilder
from orcd_jax.engine.programs import Programs
from orcd_jax.engine.state import kv_groups, zero_state
from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.registry import abstract_params
from orcd_jax.residency.bounds import (
    Platform,
    Sizes,
    call_bytes,
    float32_copies,
    program_bounds,
    state_bytes,
    workspace_peak,
)
from orcd_jax.residency.budget import DeviceMemory, plan_memory
from orcd_jax.residency.recorded import Analysis
from tests.residency.shapes import LLAMA_8B, TINY, config, engine_shape, sizes, tensors

GRID = [
    (TINY, sizes(1, 128, 128)),
    (config(dtype="bfloat16", num_kv_heads=4), sizes(16, 640, 512)),
    (config(vocab_size=128_256, hidden_size=256, tied_embeddings=True), sizes(64, 128, 128)),
    (config(num_layers=8, attention_bias=True, mlp_bias=True), sizes(4, 8192, 2048)),
    (config(mlp_size=4096, num_heads=1, num_kv_heads=1, head_dim=128), sizes(16, 1000, 2048)),
    (config(hidden_size=1024, num_heads=8, num_kv_heads=8, head_dim=128, vocab_size=49_152), sizes(64, 2048, 1024)),
    (config(dtype="bfloat16", hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64), sizes(64, 4096, 128)),
]
"""GQA, MHA and MQA, tied and untied, vocabularies of 1k to 128k, 1 to 64 rows, calls of 128 to 2 048 tokens.

A CPU does not keep what every layer added to the residual stream: only a GPU can test that term.
"""
BIG_GRID = [
    (LLAMA_8B, sizes(64, 2048, 1024)),  # all layers: what they added to the residual stream is most of it
    (LLAMA_8B.model_copy(update={"num_layers": 2, "num_kv_heads": 32}), sizes(8, 4096, 2048)),
    (config(dtype="bfloat16", vocab_size=128_000), sizes(64, 1024, 1024)),
]
IDS = [f"{i}" for i in range(len(GRID))]


def transient(programs: Programs) -> dict[str, int]:
    """What each program takes beside its arguments, as compiled: the decode state is counted by itself."""
    found = {}
    for name, program in programs.compiled.items():
        said = program.memory_analysis()
        assert said is not None
        made = 0 if name == "init" else said.output_size_in_bytes - said.alias_size_in_bytes
        found[name] = said.temp_size_in_bytes + said.generated_code_size_in_bytes + made
    return found


def bounds_of(model: LlamaConfig, at: Sizes, device: jax.Device) -> dict[str, int]:
    """Of each program, with what only a CPU takes."""
    copies = float32_copies(model, tensors(model), at, platform(device))
    return {name: copies + bound for name, bound in program_bounds(model, tensors(model), at, platform(device)).items()}


def platform(device: jax.Device) -> Platform:
    return "cpu" if device.platform == "cpu" else "cuda"


@pytest.mark.requirement("WORKER-4210")
@pytest.mark.parametrize(
    "model", [TINY, LLAMA_8B, config(dtype="bfloat16", num_kv_heads=4)], ids=["tiny", "8b", "bfloat16"]
)
@pytest.mark.parametrize("at", [sizes(1, 128, 128), sizes(7, 1000, 384), sizes(64, 8192, 2048)], ids=str)
def test_the_decode_state_is_exact(model: LlamaConfig, at: Sizes) -> None:
    state = jax.eval_shape(lambda: zero_state(model, engine_shape(at)))
    assert state_bytes(model, at) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("at", [sizes(1, 128, 128), sizes(7, 1000, 384), sizes(1024, 128, 128)], ids=str)
def test_what_a_step_brings_is_exact(at: Sizes) -> None:
    call = PrefillCallBuilder(engine_shape(at), len(kv_groups(TINY))).build()
    prefill = sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(call))
    assert call_bytes(at) == max(prefill, np.zeros((at.slots_total,), np.bool_).nbytes)


@pytest.mark.requirement("WORKER-4103")
@pytest.mark.slow
@pytest.mark.parametrize(("model", "at"), GRID, ids=IDS)
def test_no_program_takes_more_than_its_bound(model: LlamaConfig, at: Sizes, device: jax.Device) -> None:
    bounds, found = bounds_of(model, at, device), transient(Programs(model, engine_shape(at), device))
    for name, needed in found.items():
        # init and wipe have no bound of their own: they run when no step does.
        assert needed <= bounds.get(name, bounds["decode"]), name
    if model.dtype == "float32" and device.platform == "cpu":
        # Not absurd: at most four times as much, where it is more than what any program may take.
        for name in ("prefill", "decode"):
            assert bounds[name] <= 4 * found[name] + 2**20, name


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4103")
@pytest.mark.parametrize(("model", "at"), BIG_GRID, ids=["8b", "mha", "vocabulary"])
def test_the_bounds_hold_for_large_models_on_a_gpu(model: LlamaConfig, at: Sizes, device: jax.Device) -> None:
    bounds, found = bounds_of(model, at, device), transient(Programs(model, engine_shape(at), device))
    for name, needed in found.items():
        assert needed <= bounds.get(name, bounds["decode"]), name
    for name in ("prefill", "decode"):
        assert bounds[name] <= 4 * found[name] + 64 * 2**20, name


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")
@pytest.mark.requirement("WORKER-4113")
def test_the_digest_takes_no_more_than_its_bound(device: jax.Device) -> None:
    from orcd_jax.kernels.sha256 import forest_roots

    model = LLAMA_8B.model_copy(update={"num_layers": 1})
    here = jax.sharding.SingleDeviceSharding(device)
    arrays = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here) for x in abstract_params(model).values()]
    said = jax.jit(lambda xs: forest_roots(xs, [(None, 1)] * len(xs))).lower(arrays).compile().memory_analysis()
    assert said is not None
    needed = said.temp_size_in_bytes + said.output_size_in_bytes + said.generated_code_size_in_bytes
    assert needed <= bounds_of(model, sizes(1, 128, 128), device)["digest"]


@pytest.mark.gpu
@pytest.mark.requirement("WORKER-4210")
def test_the_device_holds_what_the_plan_says(device: jax.Device) -> None:
    model, at = LLAMA_8B.model_copy(update={"num_layers": 6}), sizes(64, 2048, 1024)
    before = device.memory_stats()["bytes_in_use"]
    params = {name: jax.numpy.zeros(x.shape, x.dtype) for name, x in abstract_params(model).items()}
    programs = Programs(model, engine_shape(at), device)
    state = programs.init()
    builder = PrefillCallBuilder(engine_shape(at), len(state.tables))
    for row in range(8):
        builder.add(range(128), 0, range(row * 32, row * 32 + 32), row=row)
    call, run = builder.build(), np.ones((64,), np.bool_)
    for _ in range(4):
        state, _ = programs.prefill(params, state, call)
        state, tokens = programs.decode(params, state, run)
    jax.block_until_ready(tokens)
    used = device.memory_stats()["peak_bytes_in_use"] - before
    memory = DeviceMemory(kind=device.device_kind, total_bytes=device.memory_stats()["bytes_limit"])
    recorded = Analysis.of(programs.compiled).workspace_bytes(at)
    bound = plan_memory(model, tensors(model), at, memory)
    known = plan_memory(model, tensors(model), at, memory, recorded_bytes=recorded)
    for plan in (bound, known):
        assert used <= plan.weights_bytes + plan.kv_bytes + plan.workspace_bytes
    assert known.weights_bytes + known.kv_bytes + known.workspace_bytes - used <= memory.total_bytes // 100


def test_two_steps_and_one_other_program_are_counted_together() -> None:
    at = sizes(4, 256, 128)
    peak = workspace_peak(at, steps=(300, 100), others=(50, 20), code_bytes=7)
    assert peak == 2 * (300 + call_bytes(at)) + 50 + 7
    assert workspace_peak(at, steps=(300,), others=()) == 2 * (300 + call_bytes(at))


def test_only_a_cpu_without_bfloat16_is_expected_to_widen_anything() -> None:
    at, wide, narrow = sizes(4, 256, 128), TINY, config(dtype="bfloat16")
    assert float32_copies(narrow, tensors(narrow), at, "cpu") == 2 * (state_bytes(narrow, at) + sum(tensors(narrow)))
    assert float32_copies(narrow, tensors(narrow), at, "cuda") == 0
    assert float32_copies(wide, tensors(wide), at, "cpu") == 0
