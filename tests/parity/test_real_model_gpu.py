"""The real model on a GPU, in float32 and bfloat16: the tokens of the same goldens, up to stated departures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.checkpoint.manifest import Manifest
from orcd_jax.engine.state import EngineShape
from orcd_jax.models.config import WeightDtype
from orcd_jax.models.registry import Params
from tests.engine.tiny import LogitsDriver
from tests.parity.conversion import restored
from tests.parity.goldens import read_goldens
from tests.parity.greedy import forced_logits, greedy_tokens
from tests.real_model import Checkpoints

pytestmark = pytest.mark.gpu

GOLDENS = read_goldens()
SHAPE = EngineShape(rows=8, prefill_blocks=4, pages=64, pages_per_job=6)

# In bfloat16 a token may differ where the golden's two highest logits are nearer than this. Rounding weights and
# activations to 8 bits moves logits of up to 36 by at most 0.7, and the margin between the two highest by at most 0.5
# (measured on the CPU backend over all prompts; the largest margin at which a token changed was 0.22).
BFLOAT16_MARGIN = 0.5
BFLOAT16_LOGITS = 1.5
FLOAT32_LOGITS = 1e-3


@dataclass(frozen=True, slots=True)
class RealModel:
    """The restored checkpoint of one dtype, and the logits that decide every golden token."""

    dtype: WeightDtype
    manifest: Manifest
    params: Params
    logits: list[NDArray[np.float32]]


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def model(request: pytest.FixtureRequest, smollm2_checkpoints: Checkpoints, device: jax.Device) -> RealModel:
    dtype: WeightDtype = request.param
    checkpoint: Path = smollm2_checkpoints(dtype)
    manifest, params = restored(checkpoint, device)
    driver = LogitsDriver(manifest.config, SHAPE, params)
    return RealModel(dtype, manifest, params, [forced_logits(driver, p.ids, p.tokens) for p in GOLDENS.prompts])


@pytest.fixture(autouse=True)
def _a_real_gpu(device: jax.Device) -> None:
    if device.platform != "gpu":
        pytest.fail(f"these tests need a GPU; the device is {device.platform}: run them with REQUIRE_REAL_GPU=1")


def allowed_margin(dtype: WeightDtype) -> float:
    return BFLOAT16_MARGIN if dtype == "bfloat16" else 0.0


@pytest.mark.requirement("WORKER-4995")
def test_weights_lie_on_the_gpu_in_the_dtype_asked_for(model: RealModel) -> None:
    for path, array in model.params.items():
        assert {d.platform for d in array.devices()} == {"gpu"}
        assert array.dtype == ("float32" if path == "rope_frequencies" else model.dtype)


@pytest.mark.requirement("WORKER-4995")
def test_greedy_tokens_depart_only_where_rounding_may_decide(model: RealModel, device: jax.Device) -> None:
    """After its first departure a prompt is another text, so the rest of it is not compared."""
    prompts = [p.ids for p in GOLDENS.prompts]
    got = greedy_tokens(model.manifest.config, SHAPE, model.params, device, prompts, GOLDENS.steps)
    departures = {}
    for prompt, tokens in zip(GOLDENS.prompts, got, strict=True):
        different = np.flatnonzero(np.asarray(tokens) != prompt.tokens)
        if different.size:
            departures[prompt.name] = (int(different[0]), float(prompt.margins[different[0]]))
    print(f"{model.dtype}: {len(got) - len(departures)} of {len(got)} prompts equal; (step, margin): {departures}")
    assert {n: d for n, d in departures.items() if d[1] >= allowed_margin(model.dtype)} == {}


@pytest.mark.requirement("WORKER-4995")
def test_each_golden_token_is_chosen_when_all_before_it_were(model: RealModel) -> None:
    """Compares all steps of all prompts, past any departure; at most 1 in 25 may fall to rounding."""
    different, steps = 0, 0
    for prompt, logits in zip(GOLDENS.prompts, model.logits, strict=True):
        wrong = logits.argmax(axis=-1) != prompt.tokens
        assert (prompt.margins[wrong] < allowed_margin(model.dtype)).all(), prompt.name
        different, steps = different + int(wrong.sum()), steps + len(wrong)
    print(f"{model.dtype}: {steps - different} of {steps} forced steps equal")
    assert different <= steps // 25


@pytest.mark.requirement("WORKER-4995")
def test_prefill_logits_are_near_the_goldens(model: RealModel) -> None:
    limit = BFLOAT16_LOGITS if model.dtype == "bfloat16" else FLOAT32_LOGITS
    for prompt, logits in zip(GOLDENS.prompts, model.logits, strict=True):
        np.testing.assert_allclose(logits[0, prompt.logit_ids], prompt.logits, rtol=0, atol=limit, err_msg=prompt.name)
