"""The digest bench measures what a worker does, says what it measured, and gives no figure of what is wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from orcd_jax.checkpoint.digest import entry_digest, tree_root
from orcd_jax.errors import OrcdError
from orcd_jax.kernels.sha256 import Grid
from orcd_jax.models.registry import abstract_params
from orcd_jax.residency import prover
from orcd_jax.residency.prover import WeightProver
from tools import bench_digest
from tools.bench_digest import Figure, main
from tools.bench_model import model_config, random_model

SMALL = ("--sizes_mb=1", "--dtypes=float32", "--model=small", "--layers=1", "--slice_mb=1", "--repeats=1")


def stand_in(arrays: Sequence[jax.Array], grids: Sequence[Grid], **_: object) -> jax.Array:
    """The kernel's roots, by ``hashlib`` on the host in the middle of a compiled program."""

    def roots(*given: np.ndarray) -> np.ndarray:
        pieces = itertools.chain.from_iterable(
            [array] if axis is None else np.split(np.asarray(array), slices, axis)
            for array, (axis, slices) in zip(given, grids, strict=True)
        )
        found = b"".join(tree_root(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data) for piece in pieces)
        return np.frombuffer(found, "<u4").reshape(-1, 8)

    shape = jax.ShapeDtypeStruct((sum(slices for _, slices in grids), 8), jnp.uint32)
    found: jax.Array = jax.pure_callback(roots, shape, *arrays)
    return found


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The way that the tool takes on a GPU, with a stand-in for the kernel."""
    monkeypatch.setattr(bench_digest, "is_gpu", lambda _: True)
    monkeypatch.setattr(
        bench_digest, "tree_roots", lambda array, axis, slices, lanes: stand_in([array], [(axis, slices)])
    )
    monkeypatch.setattr(prover, "_reads_on_host", lambda _: False)
    monkeypatch.setattr(prover, "forest_roots", stand_in)


def as_fast_as(gb_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures of models of one layer of the small shape, as if they had been proved at this rate."""
    size: int = sum(leaf.size * leaf.dtype.itemsize for leaf in abstract_params(model_config("small", 1)).values())

    def seconds(run: Callable[[], object], _: int) -> float:
        run()
        return size / gb_s / 1e9

    monkeypatch.setattr(bench_digest, "median_seconds", seconds)


def result_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def test_a_figure_is_compared_with_the_time_at_the_goals_rate() -> None:
    figure = Figure(what="x", bytes=6 * 10**9, seconds=0.02)
    assert (figure.gb_s, figure.floor_seconds, figure.ratio) == (300.0, 0.01, 0.5)
    assert figure.row().split() == ["x", "20.000", "10.000", "0.50", "300.0", "0.0", "0.0"]


def test_the_bench_prints_a_line_for_each_figure_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: jax.Device
) -> None:
    file = tmp_path / "figures.json"
    main([*SMALL, f"--json={file}"])
    printed, result = capsys.readouterr().out.splitlines(), result_of(file)
    assert (result["device"], result["jax"]) == (device.device_kind, jax.__version__)
    assert {"python", "jax", "jaxlib", "orcd-jax", "platform"} <= result["versions"].keys()
    assert (result["required_gb_s"], result["goal_gb_s"]) == (400, 600)
    assert (result["complete"], result["errors"]) == (True, [])
    assert [line[:44].rstrip() for line in printed[2:-1]] == [figure["what"] for figure in result["figures"]]
    assert result["figures"][0]["what"].startswith("small, "), "what the claim is about comes first"
    for figure in result["figures"]:
        assert figure["gb_s"] == pytest.approx(figure["bytes"] / figure["seconds"] / 1e9)


# -- the model ---------------------------------------------------------------------------------------------------------


def test_every_digest_of_the_model_is_that_of_its_weights(device: jax.Device) -> None:
    manifest, params = random_model(model_config("small", 2), device)
    for entry in manifest.tensors:
        assert entry_digest(entry, np.asarray(params[entry.path])) == entry.digest, entry.path
    assert manifest.weight_bytes == sum(array.nbytes for array in params.values())


def test_its_layers_are_alike_and_each_has_arrays_of_its_own(device: jax.Device) -> None:
    """A proof of one layer must not be a proof of another one's memory."""
    _, params = random_model(model_config("small", 2), device)
    places = [array.unsafe_buffer_pointer() for array in params.values()]
    assert len(set(places)) == len(params)
    np.testing.assert_array_equal(params["layers.0.mlp.down"], params["layers.1.mlp.down"])
    others = [params["embed"], params["head"], params["layers.0.mlp.down"]]
    assert len({np.asarray(array).tobytes()[:64] for array in others}) == 3


def test_the_model_of_the_bench_is_proved_for_real(device: jax.Device) -> None:
    """With another weight, the pass that is timed would fail."""
    manifest, params = random_model(model_config("small", 1), device)
    assert WeightProver(manifest, params, device).prove_all() == manifest.digest
    other = jax.device_put(np.zeros(params["norm"].shape, params["norm"].dtype), device)
    with pytest.raises(OrcdError, match="tensor norm on the device"):
        WeightProver(manifest, {**params, "norm": other}, device).prove_all()


# -- as on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("as_on_a_gpu")
def test_on_a_gpu_kernels_are_measured_in_every_way_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    main([*SMALL, "--variants=in_place,bitcast", "--lanes=64,128", f"--json={file}"])
    result = result_of(file)
    assert result["errors"] == []
    named = [figure["what"] for figure in result["figures"]]
    assert len(named) == len(set(named)) == 2 + 2 + 4
    assert named[2:4] == ["float32 4096 B in_place, 64 lanes", "float32 4096 B in_place, 128 lanes"]
    assert named[-1] == "float32 1 MiB bitcast, 128 lanes"


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize(("gb_s", "code", "word"), [(401.0, 0, "pass"), (399.0, 1, "fail")])
def test_a_model_that_is_proved_too_slowly_fails(
    gb_s: float,
    code: int,
    word: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    as_fast_as(gb_s, monkeypatch)
    file = tmp_path / "figures.json"
    assert main([*SMALL, f"--json={file}"]) == code
    assert result_of(file)["verdict"] == word
    assert f"{word}: the model is proved at {gb_s:.0f} GB/s; 400 are required" in capsys.readouterr().out


def test_nothing_is_claimed_of_a_cpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    as_fast_as(1.0, monkeypatch)
    assert main(SMALL) == 0
    assert "no claim: " in capsys.readouterr().out


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("wrong_from", [0, 2], ids=["in the check", "in what is measured"])
def test_a_wrong_root_is_no_figure_and_the_others_are_still_measured(
    wrong_from: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = itertools.count()

    def sometimes_wrong(array: jax.Array, lanes: int) -> jax.Array:
        root: jax.Array = stand_in([array], [(None, 1)]) + jnp.uint32(next(calls) == wrong_from)
        return root

    monkeypatch.setitem(bench_digest.VARIANTS, "in_place", sometimes_wrong)
    file = tmp_path / "figures.json"
    as_fast_as(500.0, monkeypatch)
    assert main([*SMALL, f"--json={file}"]) == 1
    result, said = result_of(file), capsys.readouterr()
    (error,) = result["errors"]
    assert "float32" in error["error"]
    assert "is wrong" in error["error"]
    assert error["error"] in said.err
    assert "fail: a section failed" in said.out
    assert (result["complete"], result["verdict"]) == (True, "fail")
    wanted = {0: 4, 2: 3}[wrong_from]
    assert len(result["figures"]) == wanted


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_wrong_digest_of_the_model_is_no_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prover, "forest_roots", lambda *given: stand_in(*given) ^ jnp.uint32(1))
    file = tmp_path / "figures.json"
    assert main([*SMALL, f"--json={file}"]) == 1
    result = result_of(file)
    assert [error["section"] for error in result["errors"]] == ["small"]
    assert not [figure for figure in result["figures"] if figure["judged"]]
    assert result["figures"]


def test_what_was_measured_before_an_interrupt_is_in_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_digest, "measure_host", interrupted)
    file = tmp_path / "figures.json"
    with pytest.raises(KeyboardInterrupt):
        main([*SMALL, f"--json={file}"])
    result = result_of(file)
    assert result["complete"] is False
    assert [figure["judged"] for figure in result["figures"]] == [True, False]
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


@pytest.mark.parametrize(
    "flag",
    [
        "--sizes_mb=0",
        "--slice_mb=x",
        "--model=other",
        "--dtypes=float64",
        "--variants=x",
        "--repeats=0",
        "--json=/nowhere/x.json",
    ],
)
def test_a_bad_flag_is_a_usage_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert caught.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err
