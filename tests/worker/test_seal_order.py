"""Sealed means resident, immutable, compiled, warmed up and digested, in that order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orcd_jax.engine.programs import Programs
from orcd_jax.residency.prover import WeightProver
from orcd_jax.worker import loader
from tests.worker.running import Running, config_of


@pytest.mark.requirement("WORKER-4112")
@pytest.mark.requirement("WORKER-4031")
def test_each_stage_comes_after_the_one_before(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    running = Running(config_of(tiny_checkpoint))

    def noted(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def call(*arguments: Any, **named: Any) -> Any:
            result = real(*arguments, **named)
            order.append(f"{name} {running.worker.lifecycle.state}")
            return result

        monkeypatch.setattr(owner, name, call)

    for name in ("verify_files", "restore", "warm_up", "check_residency", "seal", "Engine"):
        noted(loader, name)
    noted(Programs, "__init__")
    noted(WeightProver, "prove_all")
    running.run(running.worker.start())
    stages = ("verify_files", "restore", "__init__", "warm_up", "prove_all", "check_residency", "seal", "Engine")
    assert order == [f"{stage} LOADING" for stage in stages]
    (handle,) = running.worker.ready().handles
    assert handle.sealed
    running.close()
