"""The scrub bench as a command: what it prints and writes, and how it ends."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.registry import abstract_params
from tests.tiny_checkpoint import tiny_checkpoint
from tests.tools.windows import window
from tools import bench_scrub
from tools.bench_cost import HEADER
from tools.bench_model import model_config
from tools.bench_scrub import main
from tools.bench_streams import BenchGuard, Unguarded, Window

__all__ = ["tiny_checkpoint"]
WEIGHT_BYTES: int = sum(x.size * x.dtype.itemsize for x in abstract_params(model_config("small", 1)).values())
JOBS = ("--context=64", "--prompt_tokens=16", "--window=0.05", "--seconds=280")
SMALL = ("--model=small", "--layers=1", "--streams=2", *JOBS)


def result_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.slow
def test_the_bench_measures_every_age_prints_a_table_and_writes_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], device: jax.Device
) -> None:
    file = tmp_path / "figures.json"
    flags = ["--seal_max_age=0.3,0.2", "--rounds=2", "--slice_mb=1", f"--json={file}"]
    assert main([*SMALL, *flags]) == 0
    result, said = result_of(file), capsys.readouterr()
    assert (result["complete"], result["errors"], result["verdict"]) == (True, [], "no claim")
    assert (result["tool"], result["device"], result["jax"]) == ("bench_scrub", device.device_kind, jax.__version__)
    assert {"python", "jaxlib", "orcd-jax"} <= result["versions"].keys()
    ages = [(figure["seal_max_age_s"], figure["detection_bound_s"]) for figure in result["figures"]]
    assert ages == [(0.3, 0.3), (0.2, 0.2)]
    for figure in result["figures"]:
        assert (figure["streams"], figure["rounds"], figure["verdict"]) == (2, 2, "no claim")
        assert figure["proved_gb_s"] > 0
        assert figure["due_gb_s"] == pytest.approx(figure["expected_percent"] / 100 * figure["alone_gb_s"])
    table = said.out.splitlines()
    assert table[1:2] == HEADER.splitlines()
    assert [line.split()[0] for line in table[2:-1:2]] == ["small", "small"]
    assert table[-1].startswith("no claim: ")
    assert "small, 2 streams: round 2 of at most 2: " in said.err


class Scripted:
    """Stands in for the engine: windows without and with a guard, as told, and no compiling."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, lost: Sequence[float]) -> None:
        self.runs: list[str] = []
        self._lost = itertools.cycle(lost)
        monkeypatch.setattr(bench_scrub, "is_gpu", lambda _: True)
        monkeypatch.setattr(bench_scrub, "Programs", lambda *_: type("Compiled", (), {"compiled": {}})())
        monkeypatch.setattr(bench_scrub, "Streams", lambda *_, **__: self)

    def run(self, guard: BenchGuard, _: object) -> Window:
        if isinstance(guard, Unguarded):
            self.runs.append("off")
            return window(0.01)
        self.runs.append("on")
        token_s = 0.01 / (1 - next(self._lost))
        return window(token_s, proved_bytes=round(window(token_s).seconds * WEIGHT_BYTES / 4))


@pytest.mark.parametrize(
    ("lost", "limit", "code", "word"),
    [(0.01, 2, 0, "pass"), (0.03, 2, 1, "fail"), (0.03, 4, 0, "pass")],
)
@pytest.mark.requirement("WORKER-4121")
def test_the_exit_code_says_whether_the_claim_is_shown(
    lost: float, limit: int, code: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Scripted(monkeypatch, [lost])
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--rounds=5", f"--limit={limit}", f"--json={file}"]) == code
    assert engine.runs == ["off", *["off", "on"] * 5, "off"], "one to calibrate, then by turns"
    result = result_of(file)
    assert (result["verdict"], result["figures"][0]["verdict"]) == (word, word)
    assert result["figures"][0]["cost_percent"] == pytest.approx(100 * lost)


def test_a_cost_on_both_sides_of_the_limit_shows_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, [0.01, 0.03])
    assert main([*SMALL, "--rounds=5"]) == 1
    assert "unclear: proofs cost 1.00 %, at most 3.00 % (small, 2 streams); 2 % are allowed" in capsys.readouterr().out


def test_another_age_than_the_workers_default_is_no_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [0.5])
    assert main([*SMALL, "--rounds=5", "--seal_max_age=4"]) == 0


def test_a_drift_is_no_cost_of_any_age(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run is slower than the one before by as much, whatever guards it: its place between those without counts."""
    engine = Scripted(monkeypatch, [])
    runs = itertools.count()
    monkeypatch.setattr(engine, "run", lambda *_: window(0.01 + 0.001 * next(runs), proved_bytes=1))
    file = tmp_path / "figures.json"
    main([*SMALL, "--rounds=5", "--seal_max_age=5,2,1", f"--json={file}"])
    for figure in result_of(file)["figures"]:
        assert figure["costs_percent"] == pytest.approx([0] * 5, abs=1e-9)


def test_rounds_end_with_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run takes 10 s of a clock of the test's own: of 85 s the calibration leaves three rounds and a half."""
    engine = Scripted(monkeypatch, [0.01])
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    real = engine.run

    def slow(guard: BenchGuard, enough: object) -> Window:
        now[0] += 10
        return real(guard, enough)

    monkeypatch.setattr(engine, "run", slow)
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--rounds=8", "--seconds=85", f"--json={file}"]) == 1
    assert engine.runs.count("on") == 3
    assert result_of(file)["verdict"] == "unclear"


def test_what_has_no_time_left_is_an_error_and_not_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Scripted(monkeypatch, [0.01])
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--seconds=0", f"--json={file}"]) == 1
    result = result_of(file)
    assert result["errors"] == [
        {"section": "small, 2 streams", "error": "there was no time left: raise --seconds"},
    ]
    assert (result["complete"], result["verdict"]) == (True, "fail")


def test_a_case_that_fails_leaves_its_rounds_and_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(monkeypatch, [0.01])
    real, runs = engine.run, itertools.count()

    def failing(guard: BenchGuard, enough: object) -> Window:
        if next(runs) == 6:
            raise OrcdError(ErrorCode.VRAM_OOM, "the device ran out of memory")
        return real(guard, enough)

    monkeypatch.setattr(engine, "run", failing)
    file = tmp_path / "figures.json"
    assert main([*SMALL, "--streams=1,2", "--rounds=5", f"--json={file}"]) == 1
    result = result_of(file)
    assert result["errors"] == [{"section": "small, 1 stream", "error": "the device ran out of memory"}]
    assert [(figure["streams"], figure["rounds"]) for figure in result["figures"]] == [(1, 2), (2, 5)]
    assert result["verdict"] == "fail"


@pytest.mark.slow
def test_a_checkpoint_is_restored_and_measured_as_a_shape_is(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "figures.json"
    flags = [*JOBS, "--streams=1", "--rounds=1", "--seal_max_age=0.2"]
    assert main([f"--model={tiny_checkpoint}", *flags, f"--json={file}"]) == 0
    (figure,) = result_of(file)["figures"]
    assert (figure["model"], figure["streams"]) == (str(tiny_checkpoint), 1)
    assert capsys.readouterr().out.splitlines()[2].split()[0] == "tiny"


def test_a_damaged_checkpoint_is_an_error_and_the_next_model_is_measured(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Scripted(monkeypatch, [0.01])
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "manifest.json").write_bytes((tiny_checkpoint / "manifest.json").read_bytes())
    file = tmp_path / "figures.json"
    assert main([*SMALL, f"--model={damaged},small", "--rounds=5", f"--json={file}"]) == 1
    result = result_of(file)
    assert [error["section"] for error in result["errors"]] == [str(damaged)]
    assert [figure["model"] for figure in result["figures"]] == ["small"]


@pytest.mark.parametrize(
    "flag",
    [
        "--model=/nowhere",
        "--model=8b,other",
        "--streams=0",
        "--seal_max_age=0",
        "--seal_max_age=5.1",
        "--seal_max_age=nan",
        "--seal_max_age=1,1",
        "--prompt_tokens=1024",
        "--rounds=0",
        "--json=/nowhere/x.json",
    ],
)
def test_a_bad_flag_is_a_usage_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([flag])
    assert caught.value.code == 2
    assert flag.split("=")[0] in capsys.readouterr().err
