"""The digest bench measures what a worker does, and says what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from orcd_jax.errors import OrcdError
from orcd_jax.residency.prover import WeightProver
from tools import bench_digest
from tools.bench_digest import Figure, main, model_config, random_model

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated:DeprecationWarning")


def test_a_figure_is_compared_with_the_time_at_the_goals_rate() -> None:
    figure = Figure(what="x", bytes=6 * 10**9, seconds=0.02)
    assert (figure.gb_s, figure.floor_seconds, figure.ratio) == (300.0, 0.01, 0.5)
    assert figure.row().split() == ["x", "20.000", "10.000", "0.50", "300.0", "0.0", "0.0"]


def test_the_bench_prints_a_line_for_each_figure_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: jax.Device
) -> None:
    file = tmp_path / "figures.json"
    flags = ["--sizes_mb=1", "--dtypes=float32", "--model=small", "--layers=1", "--slice_mb=1", "--repeats=1"]
    main([*flags, f"--json={file}"])
    printed = capsys.readouterr().out.splitlines()
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["device"] == device.device_kind
    assert (result["required_gb_s"], result["goal_gb_s"]) == (400, 600)
    assert [line[:44].rstrip() for line in printed[2:]] == [figure["what"] for figure in result["figures"]]
    assert any(figure["what"].startswith("small, ") for figure in result["figures"])
    for figure in result["figures"]:
        assert figure["gb_s"] == pytest.approx(figure["bytes"] / figure["seconds"] / 1e9)


def test_the_model_of_the_bench_is_proved_for_real(device: jax.Device) -> None:
    """Its digests are those of its weights: with another weight, the pass that is timed would fail."""
    manifest, params = random_model(model_config("small", 1), device)
    assert WeightProver(manifest, params, device).prove_all() == manifest.digest
    other = jax.device_put(np.zeros(params["norm"].shape, params["norm"].dtype), device)
    with pytest.raises(OrcdError, match="tensor norm on the device"):
        WeightProver(manifest, {**params, "norm": other}, device).prove_all()


def test_a_wrong_root_ends_the_bench(device: jax.Device, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"in_place": lambda array, lanes: np.zeros((1, 8), np.uint32)}
    monkeypatch.setattr(bench_digest, "VARIANTS", wrong)
    with pytest.raises(SystemExit, match="in_place with 128 lanes: the root of 614400 bfloat16 is wrong"):
        bench_digest.check_arrays(device, [128], ["in_place"])


@pytest.mark.parametrize("flag", ["--sizes_mb=0", "--slice_mb=x", "--model=other"])
def test_a_bad_flag_is_a_usage_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert caught.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err
