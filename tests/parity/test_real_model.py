"""The real model on the CPU in float32: tokens and logits are those of ``transformers`` (see ``tests/goldens``)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.checkpoint.manifest import Manifest
from orcd_jax.engine.state import EngineShape
from orcd_jax.models.registry import Params
from tests.engine.tiny import LogitsDriver
from tests.parity.conversion import restored
from tests.parity.goldens import read_goldens
from tests.parity.greedy import forced_logits, greedy_tokens

pytestmark = pytest.mark.slow

GOLDENS = read_goldens()
SHAPE = EngineShape(rows=8, prefill_blocks=4, pages=64, pages_per_job=6)


@dataclass(frozen=True, slots=True)
class RealModel:
    """The restored checkpoint, and the logits that decide every golden token."""

    manifest: Manifest
    params: Params
    logits: list[NDArray[np.float32]]


@pytest.fixture(scope="module")
def model(smollm2_checkpoint: Path, device: jax.Device) -> RealModel:
    manifest, params = restored(smollm2_checkpoint, device)
    driver = LogitsDriver(manifest.config, SHAPE, params)
    return RealModel(manifest, params, [forced_logits(driver, p.ids, p.tokens) for p in GOLDENS.prompts])


def test_the_goldens_were_made_from_the_same_file(model: RealModel) -> None:
    assert [f.sha256 for f in model.manifest.source.files] == [GOLDENS.source_sha256]


@pytest.mark.requirement("WORKER-4700")
@pytest.mark.requirement("WORKER-4997")
def test_greedy_tokens_through_the_engine_equal_those_of_transformers(model: RealModel, device: jax.Device) -> None:
    """Sixteen jobs on eight rows, admitted as rows become free."""
    prompts = [p.ids for p in GOLDENS.prompts]
    got = greedy_tokens(model.manifest.config, SHAPE, model.params, device, prompts, GOLDENS.steps)
    assert dict(zip((p.name for p in GOLDENS.prompts), got, strict=True)) == {
        p.name: list(p.tokens) for p in GOLDENS.prompts
    }


@pytest.mark.requirement("WORKER-4700")
def test_prefill_logits_are_within_a_thousandth(model: RealModel) -> None:
    """Logits reach 36; the largest difference measured is 1.1e-4."""
    for prompt, logits in zip(GOLDENS.prompts, model.logits, strict=True):
        first = logits[0].astype(np.float64)
        np.testing.assert_allclose(first[prompt.logit_ids], prompt.logits, rtol=0, atol=1e-3, err_msg=prompt.name)
        assert np.log(np.exp(first - first.max()).sum()) + first.max() == pytest.approx(prompt.logsumexp, abs=1e-3)


def test_every_step_is_decided_by_the_same_margin(model: RealModel) -> None:
    for prompt, logits in zip(GOLDENS.prompts, model.logits, strict=True):
        highest = np.sort(logits, axis=-1)[:, -2:]
        np.testing.assert_allclose(highest[:, 1] - highest[:, 0], prompt.margins, atol=1e-3, err_msg=prompt.name)
