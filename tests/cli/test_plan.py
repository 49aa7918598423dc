"""``orcd plan``: what a model would take on a GPU that need not be there."""

from __future__ import annotations

import argparse
import io
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_jax.checkpoint.manifest import read_manifest, tensor_bytes
from orcd_jax.cli.plan import MOST_BYTES, parse_size, plan
from orcd_jax.cli.terminal import Output
from orcd_jax.errors import ErrorCode, ExitCode, OrcdError
from orcd_jax.residency.bounds import Sizes
from orcd_jax.residency.budget import DeviceMemory, plan_memory
from orcd_jax.residency.recorded import Analysis, ProgramMemory, plan_key, record
from orcd_jax.telemetry.narration import size
from tests.tiny_checkpoint import tiny_checkpoint

__all__ = ["tiny_checkpoint"]

GIB = 2**30
H100 = "NVIDIA H100 80GB HBM3"


def shown(directory: Path, **given: object) -> tuple[ExitCode, str]:
    out = io.StringIO()
    code = plan(directory, Output(out), **{"device_memory": 80 * GIB, "device": H100, **given})  # type: ignore[arg-type]
    return code, out.getvalue()


def table(text: str) -> dict[str, str]:
    """The rows, as a person reads them: names are set apart by two blanks or more."""
    return {name: value.strip() for name, _, value in (line.partition("  ") for line in text.splitlines())}


def fields(directory: Path, **given: object) -> tuple[ExitCode, Mapping[str, object]]:
    code, text = shown(directory, as_json=True, **given)
    assert text.count("\n") == 1
    return code, json.loads(text)


@pytest.mark.requirement("WORKER-4210")
def test_a_plan_that_fits_is_a_table_of_what_goes_where(tiny_checkpoint: Path) -> None:
    code, text = shown(tiny_checkpoint)
    assert code is ExitCode.OK
    rows = table(text)
    names = ["model", "device", "sizes", "weights", "KV cache", "workspace", "reserve", "headroom", "total"]
    assert list(rows) == [*names, "available", "feasible"]
    manifest = read_manifest(tiny_checkpoint)
    assert rows["device"] == H100
    assert rows["weights"] == f"{size(manifest.weight_bytes)} in {len(manifest.tensors)} arrays"
    assert rows["workspace"].endswith(" MB (bound)")
    assert rows["available"] == "85.9 GB"
    assert rows["feasible"] == "yes"


@pytest.mark.requirement("WORKER-4213")
def test_a_plan_that_does_not_fit_says_why_not_and_what_would(tiny_checkpoint: Path) -> None:
    code, text = shown(tiny_checkpoint, device_memory=1_400_000_000, slots_total=1024)
    rows = table(text)
    assert code is ExitCode.FAILED
    assert rows["feasible"] == "no"
    assert rows["why not"].startswith("INSUFFICIENT_VRAM: the model needs 1.5 GB and NVIDIA H100 80GB HBM3 has 1.4 GB")
    assert "--slots_total=" in rows["why not"]
    assert rows["why not"].endswith(" would fit")


@pytest.mark.requirement("WORKER-4213")
def test_all_reasons_are_shown(tiny_checkpoint: Path) -> None:
    _, text = shown(tiny_checkpoint, device_memory=1000, max_model_bytes=1)
    rows = table(text)
    assert "a larger device is needed" in rows["why not"]
    assert rows["nor"].startswith("POLICY_VIOLATION: ")


@pytest.mark.requirement("WORKER-4214")
def test_json_holds_every_field_of_the_very_plan_a_worker_makes(tiny_checkpoint: Path) -> None:
    code, told = fields(tiny_checkpoint, device_memory=10**9, slots_total=8, max_context=64, prefill_tokens=256)
    manifest = read_manifest(tiny_checkpoint)
    expected = plan_memory(
        manifest.config,
        [tensor_bytes(entry) for entry in manifest.tensors],
        Sizes(slots_total=8, max_context=64, prefill_tokens=256),
        DeviceMemory(kind=H100, total_bytes=10**9),
    )
    assert (code, told["feasible"]) == (ExitCode.FAILED, False)
    (reason,) = expected.reasons
    assert told == {
        "feasible": False,
        "model": manifest.model.model_id,
        "digest": manifest.digest,
        "device": H100,
        "slots_total": 8,
        "max_context": 64,
        "prefill_tokens": 256,
        "weights_bytes": expected.weights_bytes,
        "kv_bytes": expected.kv_bytes,
        "workspace_bytes": expected.workspace_bytes,
        "workspace": "bound",
        "reserve_bytes": expected.reserve_bytes,
        "headroom_bytes": expected.headroom_bytes,
        "total_bytes": expected.total_bytes,
        "available_bytes": 10**9,
        "foreign_bytes": 0,
        "reasons": [
            {
                "code": "INSUFFICIENT_VRAM",
                "message": reason.message,
                "field": "model_path",
                "needed_bytes": expected.total_bytes,
                "available_bytes": 10**9,
            }
        ],
        "suggestions": [{"flag": s.flag, "value": s.value} for s in expected.suggestions],
    }


@pytest.mark.requirement("WORKER-4210")
def test_sizes_that_are_not_given_are_those_of_a_worker_on_a_gpu(tiny_checkpoint: Path) -> None:
    model = read_manifest(tiny_checkpoint).config.context_max
    assert model < 4096
    _, told = fields(tiny_checkpoint)
    assert (told["slots_total"], told["max_context"], told["prefill_tokens"]) == (64, model, 1024)
    _, told = fields(tiny_checkpoint, max_context=0)
    assert told["max_context"] == model
    _, told = fields(tiny_checkpoint, max_context=32)
    assert told["max_context"] == 32


@pytest.mark.requirement("WORKER-4170")
def test_the_limit_on_models_is_that_of_a_worker(tiny_checkpoint: Path) -> None:
    weights = read_manifest(tiny_checkpoint).weight_bytes
    code, told = fields(tiny_checkpoint, max_model_bytes=weights - 1)
    assert code is ExitCode.FAILED
    assert told["suggestions"] == [{"flag": "--max_model_bytes", "value": weights}]
    assert fields(tiny_checkpoint, max_model_bytes=weights)[0] is ExitCode.OK


@pytest.mark.requirement("WORKER-4210")
def test_what_a_worker_recorded_takes_the_place_of_the_bound(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "plans"
    manifest = read_manifest(tiny_checkpoint)
    sizes = Sizes(slots_total=64, max_context=manifest.config.context_max, prefill_tokens=1024)
    key = plan_key(manifest.config, sizes, device_kind=H100, xla_flags="--xla_flag=1")
    # So large that memory for tuning, which no record holds, does not matter.
    said = dict.fromkeys(ProgramMemory.model_fields, 0) | {"temp_bytes": 10**9}
    analysis = Analysis(programs=dict.fromkeys(("prefill", "decode"), ProgramMemory(**said)))
    record(folder, key, analysis)
    _, told = fields(tiny_checkpoint, recorded=folder, xla_flags="--xla_flag=1")
    assert told["workspace"] == "recorded"
    arrays = len(manifest.tensors) + 2 * manifest.config.num_layers + 16
    assert told["workspace_bytes"] == analysis.workspace_bytes(sizes) + 256 * arrays
    _, told = fields(tiny_checkpoint, recorded=folder)
    assert told["workspace"] == "bound"
    assert capsys.readouterr().err == ""
    (folder / f"{key}.json").write_text("{}")
    _, told = fields(tiny_checkpoint, recorded=folder, xla_flags="--xla_flag=1")
    assert told["workspace"] == "bound"
    assert "not in the known form" in capsys.readouterr().err


def test_what_is_no_checkpoint_is_said_to_be_none(tmp_path: Path) -> None:
    with pytest.raises(OrcdError, match=r"no manifest\.json") as caught:
        shown(tmp_path)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED


def test_names_cannot_steer_the_terminal(tiny_checkpoint: Path) -> None:
    _, text = shown(tiny_checkpoint, device="GPU\x1b[2J", device_memory=1)
    assert "\x1b" not in text


@pytest.mark.requirement("WORKER-4214")
def test_a_plan_needs_no_jax_and_no_device(tiny_checkpoint: Path) -> None:
    script = (
        "import sys; from pathlib import Path;"
        "from orcd_jax.cli.plan import plan; from orcd_jax.cli.terminal import Output;"
        f"code = plan(Path({str(tiny_checkpoint)!r}), Output(), device_memory=2**36);"
        "sys.exit(code or 'jax' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GiB", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("1.5TiB", 3 * 2**39),
        ("80 gb", 80 * 10**9),
        ("512MiB", 2**29),
        ("0.5kib", 512),
        ("85018542080", 85_018_542_080),
        ("7B", 7),
        ("1024TiB", MOST_BYTES),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "0",
        "-1",
        "0.1",
        "GiB",
        "24 G",
        "24GiBs",
        "1e9",
        "1.GiB",
        ".5GiB",
        "24GiB ",
        "1025TiB",
        "2" * 17,
        "²GB",
        "１GB",
    ],
)
def test_what_is_not_a_size_is_refused_with_how_to_write_one(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="write it like 24GiB, 80GB, or in bytes"):
        parse_size(text)


@given(st.text(max_size=60))
def test_no_text_breaks_the_reader_of_sizes(text: str) -> None:
    message = ""
    try:
        assert 1 <= parse_size(text) <= MOST_BYTES
    except argparse.ArgumentTypeError as error:
        message = str(error)
    assert message.isascii()
    assert len(message) < 150
