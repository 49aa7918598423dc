"""Tiny loud Llamas: the same logits as ``transformers``, from its saved files through our converter and programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.engine.state import EngineShape
from orcd_jax.models.config import LlamaConfig, WeightDtype
from orcd_jax.models.registry import Params
from tests.engine.tiny import LogitsDriver
from tests.parity import transformers_llama
from tests.parity.conversion import convert_and_restore
from tests.parity.transformers_llama import VARIANTS

pytestmark = pytest.mark.parity

SHAPE = EngineShape(rows=2, block_tokens=16, prefill_blocks=2, page_tokens=8, pages=12, pages_per_job=6)
TOKENS = [int(t) for t in np.random.default_rng(5).integers(0, 256, 45)]
PREFILLED = 29  # one whole block and a part of the next; the other tokens are decoded one by one
FLOAT32_TOLERANCE = 2e-5  # of the largest logit; the largest difference measured is 3e-6
BFLOAT16_TOLERANCE = 0.045  # root mean square, of the logits' own; measured: ours 0.010 to 0.029, theirs 0.011 to 0.033


@dataclass(frozen=True, slots=True)
class Pair:
    """One random model on both sides."""

    theirs: Path
    config: LlamaConfig
    params: Params

    def logits(self) -> NDArray[np.float32]:
        return LogitsDriver(self.config, SHAPE, self.params).sequence(TOKENS, [7, 3, 9, 1, 5, 0], prefill=PREFILLED)

    def reference(self, dtype: WeightDtype) -> NDArray[np.float32]:
        return transformers_llama.logits(transformers_llama.load(self.theirs, dtype), TOKENS)


Build = Callable[[str, WeightDtype], Pair]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, device: jax.Device) -> Build:
    """Builds a variant of one dtype, saves it with transformers, converts and restores it; once each."""

    @functools.cache
    def build(name: str, dtype: WeightDtype) -> Pair:
        config = VARIANTS[name].model_copy(update={"dtype": dtype})
        theirs = tmp_path_factory.mktemp(name) / "source"
        theirs.mkdir()
        transformers_llama.save_loud_model(config, theirs)
        manifest, params = convert_and_restore(theirs, theirs.parent / "checkpoint", device)
        return Pair(theirs, manifest.config, params)

    return build


def rms(values: NDArray[np.float32]) -> float:
    return float(np.sqrt(np.mean(np.square(values, dtype=np.float64))))


@pytest.mark.requirement("WORKER-4700")
@pytest.mark.requirement("WORKER-4997")
@pytest.mark.parametrize("name", VARIANTS)
def test_float32_logits_equal_those_of_transformers(name: str, pair: Build) -> None:
    model = pair(name, "float32")
    expected = model.reference("float32")
    limit = FLOAT32_TOLERANCE * float(np.abs(expected).max())
    np.testing.assert_allclose(model.logits(), expected, rtol=0, atol=limit)


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4700")
@pytest.mark.parametrize("name", VARIANTS)
def test_bfloat16_logits_are_as_near_to_float32_as_those_of_transformers(name: str, pair: Build) -> None:
    """The reference is the same bfloat16 weights run in float32; both sides round to bfloat16, in different places."""
    model = pair(name, "bfloat16")
    exact = model.reference("float32")
    theirs, ours = rms(model.reference("bfloat16") - exact) / rms(exact), rms(model.logits() - exact) / rms(exact)
    assert ours < BFLOAT16_TOLERANCE
    assert ours < 1.25 * theirs


@pytest.mark.requirement("WORKER-4701")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", VARIANTS)
def test_the_converter_keeps_the_configuration_and_every_bit(name: str, dtype: WeightDtype, pair: Build) -> None:
    """Against weights placed by hand from the definition of the layout."""
    model = pair(name, dtype)
    assert model.config == VARIANTS[name].model_copy(update={"dtype": dtype})
    expected = transformers_llama.placed(transformers_llama.load(model.theirs, dtype), model.config)
    assert {path: (a.shape, a.dtype) for path, a in model.params.items()} == {
        path: (a.shape, a.dtype) for path, a in expected.items()
    }
    for path, array in expected.items():
        np.testing.assert_array_equal(np.asarray(model.params[path]), array, err_msg=path)
