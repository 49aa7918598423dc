"""The memory plan: true in every sum, honest about why not, and full of help that helps."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orcd_jax.config import BLOCK_TOKENS
from orcd_jax.errors import ErrorCode
from orcd_jax.models.config import LlamaConfig
from orcd_jax.residency.bounds import Sizes, program_bounds, state_bytes, workspace_peak
from orcd_jax.residency.budget import (
    LEAST,
    LEAST_CONTEXT,
    UNKNOWN_RESERVE_BYTES,
    DeviceMemory,
    MemoryPlan,
    Suggestion,
    default_headroom,
    plan_memory,
)
from tests.residency.shapes import LLAMA_8B, TINY, config, sizes, tensors

GIB = 2**30
WEIGHTS_8B = tuple(tensors(LLAMA_8B))
WEIGHTS_TINY = tuple(tensors(TINY))
DEFAULT = sizes(64, 4096, 1024)
H100 = DeviceMemory(kind="NVIDIA H100 80GB HBM3", total_bytes=80 * GIB)


def gpu(total: int, foreign: int = 0) -> DeviceMemory:
    return DeviceMemory(kind="GPU", total_bytes=total, foreign_bytes=foreign)


def plan_8b(at: Sizes, device: DeviceMemory, **more: int) -> MemoryPlan:
    return plan_memory(LLAMA_8B, WEIGHTS_8B, at, device, **more)


def with_flag(at: Sizes, suggestion: Suggestion) -> Sizes:
    return replace(at, **{suggestion.flag.removeprefix("--"): suggestion.value})


def message_of(plan: MemoryPlan) -> str:
    (reason,) = plan.reasons
    return reason.message


any_sizes = st.builds(
    Sizes,
    slots_total=st.integers(1, 256),
    max_context=st.integers(64, 131_072),
    prefill_tokens=st.integers(1, 64).map(lambda blocks: blocks * BLOCK_TOKENS),
)
any_gpu = st.builds(gpu, st.integers(0, 200 * GIB), st.integers(0, 40 * GIB))


@pytest.mark.requirement("WORKER-4210")
@pytest.mark.parametrize(
    "device", [H100, DeviceMemory(kind="cpu", total_bytes=200 * GIB, platform="cpu")], ids=["cuda", "cpu"]
)
def test_a_plan_is_the_sum_of_its_parts(device: DeviceMemory) -> None:
    plan = plan_8b(DEFAULT, device)
    assert plan.weights_bytes == sum(WEIGHTS_8B) == 16_060_522_752
    assert plan.kv_bytes == state_bytes(LLAMA_8B, DEFAULT)
    assert plan.workspace == "bound"
    needed = plan.weights_bytes + plan.kv_bytes + plan.workspace_bytes + plan.reserve_bytes
    assert plan.headroom_bytes == default_headroom(needed, device.platform)
    assert plan.total_bytes == needed + plan.headroom_bytes
    assert (plan.available_bytes, plan.foreign_bytes) == (device.total_bytes, 0)
    assert plan.feasible
    assert (plan.reasons, plan.suggestions) == ((), ())


@pytest.mark.requirement("WORKER-4210")
def test_the_workspace_covers_two_steps_and_a_digest_between_them() -> None:
    plan = plan_8b(DEFAULT, H100)
    bounds = program_bounds(LLAMA_8B, WEIGHTS_8B, DEFAULT, "cuda")
    peak = workspace_peak(DEFAULT, steps=(bounds["prefill"], bounds["decode"]), others=(bounds["digest"],))
    arrays = len(WEIGHTS_8B) + 2 * 32 + 16
    assert plan.workspace_bytes == peak + 256 * arrays
    # A few per cent of the device, for a model whose programs were measured at 0.7 GB.
    assert plan.workspace_bytes < 3 * 10**9


@pytest.mark.requirement("WORKER-4210")
def test_tuning_a_matmul_beside_the_weights_is_planned_where_the_state_is_small() -> None:
    at = sizes(1, 128, 128)
    largest = max(WEIGHTS_8B)
    plan = plan_8b(at, H100)
    assert plan.kv_bytes + plan.workspace_bytes >= largest + 256 * 2**20
    on_cpu = plan_8b(at, replace(H100, platform="cpu", kind="cpu"), recorded_bytes=0)
    assert on_cpu.workspace_bytes < 2**20


@pytest.mark.requirement("WORKER-4210")
def test_a_recorded_workspace_takes_the_place_of_the_bound() -> None:
    bound, known = plan_8b(DEFAULT, H100), plan_8b(DEFAULT, H100, recorded_bytes=700_000_000)
    assert known.workspace == "recorded"
    assert known.workspace_bytes - 700_000_000 == 256 * (len(WEIGHTS_8B) + 2 * 32 + 16)
    assert known.total_bytes < bound.total_bytes


@pytest.mark.requirement("WORKER-4210")
def test_the_reserve_is_that_of_the_device_kind() -> None:
    assert plan_8b(DEFAULT, H100).reserve_bytes == 768 * 2**20
    assert plan_8b(DEFAULT, gpu(GIB)).reserve_bytes == UNKNOWN_RESERVE_BYTES
    assert plan_8b(DEFAULT, replace(H100, platform="cpu")).reserve_bytes == 0


@pytest.mark.requirement("WORKER-4103")
@pytest.mark.requirement("WORKER-4212")
@settings(deadline=None)
@given(at=any_sizes, device=any_gpu)
def test_feasible_means_that_the_total_is_available(at: Sizes, device: DeviceMemory) -> None:
    plan = plan_8b(at, device)
    assert plan.feasible == (plan.total_bytes <= plan.available_bytes)
    assert plan.feasible == (not plan.reasons)
    assert plan.available_bytes == max(0, device.total_bytes - device.foreign_bytes)


@pytest.mark.requirement("WORKER-4212")
@pytest.mark.parametrize("off", [-1, 0, 1])
@pytest.mark.parametrize("at", [DEFAULT, LEAST, sizes(7, 1000, 384)], ids=str)
def test_the_limit_is_exact_to_the_byte(at: Sizes, off: int) -> None:
    needed = plan_8b(at, gpu(0)).total_bytes
    plan = plan_8b(at, gpu(needed + off))
    assert plan.feasible == (off >= 0)
    if not plan.feasible:
        (reason,) = plan.reasons
        assert (reason.needed_bytes, reason.available_bytes) == (needed, needed - 1)


@settings(deadline=None)
@given(at=any_sizes, more=any_sizes, device=any_gpu)
def test_more_of_anything_never_needs_less(at: Sizes, more: Sizes, device: DeviceMemory) -> None:
    larger = Sizes(
        slots_total=max(at.slots_total, more.slots_total),
        max_context=max(at.max_context, more.max_context),
        prefill_tokens=max(at.prefill_tokens, more.prefill_tokens),
    )
    assert plan_8b(at, device).total_bytes <= plan_8b(larger, device).total_bytes


@pytest.mark.parametrize(
    "field", ["vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size"]
)
def test_a_larger_model_needs_more(field: str) -> None:
    def total(model: LlamaConfig) -> int:
        return plan_memory(model, tensors(model), DEFAULT, H100).total_bytes

    model = config(num_heads=8)
    assert total(LlamaConfig.model_validate({**dict(model), field: 2 * getattr(model, field)})) > total(model)


@pytest.mark.requirement("WORKER-4103")
@settings(max_examples=200, deadline=None)
@given(at=any_sizes, device=any_gpu)
def test_every_suggestion_fits_and_none_could_be_larger(at: Sizes, device: DeviceMemory) -> None:
    plan = plan_8b(at, device)
    steps = {"--slots_total": 1, "--max_context": 1, "--prefill_tokens": BLOCK_TOKENS}
    least = {"--slots_total": 1, "--max_context": LEAST_CONTEXT, "--prefill_tokens": BLOCK_TOKENS}
    suggested = {suggestion.flag: suggestion for suggestion in plan.suggestions}
    assert not (plan.feasible and suggested)
    for flag, step in steps.items():
        asked = getattr(at, flag.removeprefix("--"))
        if (suggestion := suggested.get(flag)) is not None:
            assert least[flag] <= suggestion.value < asked
            assert plan_8b(with_flag(at, suggestion), device).feasible
            larger = Suggestion(flag, suggestion.value + step)
            assert not plan_8b(with_flag(at, larger), device).feasible
        elif not plan.feasible and asked > least[flag]:
            assert not plan_8b(with_flag(at, Suggestion(flag, least[flag])), device).feasible


@pytest.mark.requirement("WORKER-4103")
@pytest.mark.requirement("WORKER-4152")
def test_a_refusal_says_how_much_is_missing_where_and_what_would_fit() -> None:
    plan = plan_8b(DEFAULT, DeviceMemory(kind="NVIDIA L4", total_bytes=48 * GIB))
    assert not plan.feasible
    message = message_of(plan)
    assert re.match(
        r"the model needs \d\d\.\d GB and NVIDIA L4 has 51\.5 GB available, [\d.]+ GB too little: ", message
    )
    for suggestion in plan.suggestions:
        assert f"{suggestion.flag}={suggestion.value}" in message
    assert [s.flag for s in plan.suggestions] == ["--slots_total", "--max_context"]
    error = plan.reasons[0].error()
    assert error.code is ErrorCode.INSUFFICIENT_VRAM
    assert (error.needed_bytes, error.available_bytes) == (plan.total_bytes, 48 * GIB)


@pytest.mark.requirement("WORKER-4103")
@pytest.mark.parametrize("memory", [plan_8b(LEAST, gpu(0)).total_bytes, 20 * GIB])
def test_when_only_several_flags_together_help_they_are_named_together_and_fit(memory: int) -> None:
    at, device = sizes(256, 131_072, 8192), gpu(memory)
    plan = plan_8b(at, device)
    assert plan.suggestions == ()
    found = re.search(
        r"--slots_total=(\d+) with --max_context=(\d+) and --prefill_tokens=(\d+) would fit$", message_of(plan)
    )
    assert found is not None
    slots, context, prefill = map(int, found.groups())
    assert plan_8b(sizes(slots, context, prefill), device).feasible
    assert not plan_8b(sizes(slots, context + 1, prefill), device).feasible


@pytest.mark.requirement("WORKER-4103")
@settings(deadline=None)
@given(total=st.integers(0, 30 * GIB), at=any_sizes)
def test_no_flag_is_named_exactly_when_not_even_the_smallest_worker_fits(total: int, at: Sizes) -> None:
    at = replace(at, max_context=max(at.max_context, LEAST_CONTEXT))
    plan, least = plan_8b(at, gpu(total)), plan_8b(LEAST, gpu(total))
    helpless = not plan.feasible and "a larger device is needed" in message_of(plan)
    assert helpless == (not least.feasible)
    if helpless:
        assert plan.suggestions == ()
        enough = int(message_of(plan).rpartition("(")[2].removesuffix(" bytes)"))
        assert plan_8b(LEAST, gpu(enough)).feasible
        assert not plan_8b(LEAST, gpu(enough - 1)).feasible


@pytest.mark.requirement("WORKER-4211")
def test_memory_that_others_hold_is_not_available_and_is_told() -> None:
    needed = plan_8b(DEFAULT, gpu(0)).total_bytes
    plan = plan_8b(DEFAULT, gpu(needed + 5, foreign=6))
    assert (plan.foreign_bytes, plan.available_bytes, plan.feasible) == (6, needed - 1, False)
    assert "(other processes hold 6 bytes)" in message_of(plan)
    assert plan_8b(DEFAULT, gpu(needed + 6, foreign=6)).feasible
    assert plan_8b(DEFAULT, gpu(5, foreign=6)).available_bytes == 0


@pytest.mark.requirement("WORKER-4170")
def test_a_model_over_the_limit_is_refused_by_policy_and_the_limit_that_would_do_is_named() -> None:
    weights = sum(WEIGHTS_8B)
    assert plan_8b(DEFAULT, H100, max_model_bytes=weights).feasible
    plan = plan_8b(DEFAULT, H100, max_model_bytes=weights - 1)
    (reason,) = plan.reasons
    assert reason.code is ErrorCode.POLICY_VIOLATION
    assert (reason.needed_bytes, reason.available_bytes) == (weights, weights - 1)
    (suggestion,) = plan.suggestions
    assert suggestion == Suggestion("--max_model_bytes", weights)
    assert plan_8b(DEFAULT, H100, max_model_bytes=suggestion.value).feasible


@pytest.mark.requirement("WORKER-4213")
def test_every_reason_is_told_at_once_and_no_flag_that_would_not_help_alone() -> None:
    plan = plan_8b(DEFAULT, gpu(40 * GIB), max_model_bytes=1)
    assert [reason.code for reason in plan.reasons] == [ErrorCode.INSUFFICIENT_VRAM, ErrorCode.POLICY_VIOLATION]
    assert plan.suggestions == ()


@pytest.mark.requirement("WORKER-4214")
def test_a_device_that_is_not_there_gets_the_same_answer() -> None:
    there = DeviceMemory(kind="NVIDIA H100 80GB HBM3", total_bytes=85_018_542_080)
    assert plan_8b(DEFAULT, there) == plan_8b(DEFAULT, replace(there))
    script = (
        "import sys; from orcd_jax.residency.budget import *; from orcd_jax.models.config import LlamaConfig;"
        "from orcd_jax.residency.bounds import Sizes;"
        f"config = LlamaConfig.model_validate_json({LLAMA_8B.model_dump_json()!r});"
        f"device = DeviceMemory(kind={there.kind!r}, total_bytes={there.total_bytes});"
        "sizes = Sizes(slots_total=64, max_context=4096, prefill_tokens=1024);"
        f"print(plan_memory(config, {WEIGHTS_8B!r}, sizes, device).total_bytes, 'jax' in sys.modules)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    assert told == [str(plan_8b(DEFAULT, there).total_bytes), "False"]


@pytest.mark.requirement("WORKER-4212")
def test_over_a_grid_around_the_limit_of_a_device_a_plan_is_feasible_exactly_when_it_fits() -> None:
    """The simulated device hands out what a plan is made of, piece by piece, and fails when it has no more."""
    verdicts = set()
    for slots, context, prefill in itertools.product((1, 3, 16), (128, 129, 4096), (128, 1024)):
        at = sizes(slots, context, prefill)
        for memory in (5_000_000, 20_000_000, 60_000_000, 200_000_000):
            device = DeviceMemory(kind="cpu", total_bytes=memory, platform="cpu")
            plan = plan_memory(TINY, WEIGHTS_TINY, at, device)
            left = memory
            for piece in (*WEIGHTS_TINY, plan.kv_bytes, plan.workspace_bytes, plan.reserve_bytes, plan.headroom_bytes):
                left -= piece
            assert plan.feasible == (left >= 0)
            verdicts.add(plan.feasible)
    assert verdicts == {True, False}


@pytest.mark.parametrize("wrong", [(0, 128, 128), (1, 0, 128), (1, 128, -128)])
def test_sizes_are_at_least_one(wrong: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        sizes(*wrong)
