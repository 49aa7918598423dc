"""The proof of the arrays on a device, as a worker makes it before it seals them."""

from __future__ import annotations

from collections.abc import Callable

from orcd_jax.checkpoint.manifest import Manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.models.registry import Params
from orcd_jax.residency.prover import WeightProver


def proved(manifest: Manifest, params: Params, on_progress: Callable[[Progress], None] = lambda _: None) -> str:
    """The model digest of what lies on the device, each array equal to the manifest's.

    Raises:
      OrcdError: SEAL_VERIFICATION_FAILED, naming the first array that differs; MODEL_LOAD_FAILED, naming the first of
        another shape, dtype or place.
    """
    device = next(iter(params.values())).device
    return WeightProver(manifest, params, device).prove_all(on_progress)
