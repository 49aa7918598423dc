"""The convert tools as a person meets them: one line on success or failure, an exit code, and never half a result."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from orcd_jax.checkpoint.convert import command
from orcd_jax.checkpoint.convert.gguf import open_gguf
from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from orcd_jax.checkpoint.convert.source import Dtype, WeightSource
from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.checkpoint.verify import verify_files
from orcd_jax.errors import ExitCode
from tests.checkpoint.convert import tiny_gguf, tiny_huggingface
from tests.checkpoint.tiny import config, random_weights

TOOLS = Path(__file__).resolve().parent.parent.parent / "tools"
BROKEN_TEMPLATE = "{% for m in messages %}"


def gguf(path: Path) -> Path:
    return tiny_gguf.write_model(path)


@pytest.fixture(scope="module")
def slow_source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 34 MB: large enough to be interrupted on its way."""
    sizes = {"hidden_size": 256, "num_layers": 8, "mlp_size": 1024, "num_heads": 8, "head_dim": 32}
    made = random_weights(config(vocab_size=263, **sizes))
    return tiny_huggingface.write_model(
        tmp_path_factory.mktemp("slow") / "source",
        made,
        hidden_size=256,
        num_hidden_layers=8,
        intermediate_size=1024,
        num_attention_heads=8,
        head_dim=32,
    )


# -- in this process: every way to fail --------------------------------------------------------------------------------

Convert = Callable[..., tuple[ExitCode, str]]
OPENERS: dict[str, Callable[[Path, Dtype], WeightSource]] = {"gguf": open_gguf, "hf": open_huggingface}


@pytest.fixture
def convert(capsys: pytest.CaptureFixture[str]) -> Convert:
    """Runs the command; its exit code and all it said, none of it on stdout."""

    def run(kind: str, *arguments: object) -> tuple[ExitCode, str]:
        argv = [f"convert_{kind}.py", *map(str, arguments)]
        code = command.run(argv, open_source=OPENERS[kind], source="a model", example="an example")
        shown = capsys.readouterr()
        assert shown.out == ""
        return code, shown.err

    return run


def failure(done: tuple[ExitCode, str], code: ExitCode = ExitCode.MODEL) -> str:
    """The one error line of a failed run; what comes before it is progress."""
    assert done[0] is code
    *before, last = done[1].splitlines()
    assert all(line.endswith("%") for line in before)
    assert last.startswith("error: ")
    assert last.isprintable()
    return last.removeprefix("error: ")


def test_success_says_what_was_made_and_where(tmp_path: Path, convert: Convert) -> None:
    code, said = convert("gguf", gguf(tmp_path / "m.gguf"), tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    assert code is ExitCode.OK
    for fact in (
        manifest.digest,
        "Tiny-Test",
        "llama",
        "float32",
        "bpe_byte_level",
        "512 tokens",
        str(tmp_path / "out"),
    ):
        assert fact in said


def test_progress_is_a_line_for_every_quarter_of_a_stage(tmp_path: Path, convert: Convert) -> None:
    _, said = convert("gguf", gguf(tmp_path / "m.gguf"), tmp_path / "out")
    lines = [line for line in said.splitlines() if line.endswith("%")]
    assert len(lines) <= 15
    for stage in ("hashing the source", "converting", "hashing the result"):
        assert [line for line in lines if line.startswith(stage)][-1] == f"{stage}: 100 %"


@pytest.mark.parametrize(("dtype", "stored"), [("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")])
def test_the_dtype_is_the_one_asked_for(tmp_path: Path, convert: Convert, dtype: str, stored: str) -> None:
    convert("gguf", gguf(tmp_path / "m.gguf"), tmp_path / "out", f"--dtype={dtype}")
    assert read_manifest(tmp_path / "out").config.dtype == stored


def cut(source: Path) -> None:
    source.write_bytes(source.read_bytes()[:-1000])


def replace_by_folder(source: Path) -> None:
    source.unlink()
    source.mkdir()


def replace_by_pipe(source: Path) -> None:
    source.unlink()
    os.mkfifo(source)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (cut, "it is truncated"),
        (lambda path: path.write_bytes(b"GGML"), "magic at byte 0"),
        (lambda path: path.write_bytes(b""), "truncated"),
        (Path.unlink, "cannot be read: No such file"),
        (replace_by_folder, "cannot be read: not a regular file"),
        (replace_by_pipe, "cannot be read: not a regular file"),
    ],
)
@pytest.mark.requirement("WORKER-4310")
def test_a_gguf_file_that_cannot_be_read_is_one_line(
    tmp_path: Path, convert: Convert, change: Callable[[Path], object], message: str
) -> None:
    change(gguf(tmp_path / "m.gguf"))
    assert message in failure(convert("gguf", tmp_path / "m.gguf", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir() if path.name != "m.gguf"] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"architecture": "mamba"}, "mamba is not supported"),
        ({"tokenizer": False}, "tokenizer.ggml.model: the file has no such text"),
        ({"extra": {"llama.expert_count": 8}}, "llama.expert_count"),
        ({"tensors": {k: v for k, v in tiny_gguf.weights().items() if "ffn_up" not in k}}, "mlp.up_proj.weight"),
        (
            {"tensors": tiny_gguf.weights() | {"output_norm.weight": np.full(32, np.nan, np.float32)}},
            "model.norm.weight has a value that is not finite",
        ),
    ],
)
@pytest.mark.requirement("WORKER-4310")
def test_a_gguf_model_that_is_not_supported_is_one_line(
    tmp_path: Path, convert: Convert, options: dict[str, object], message: str
) -> None:
    tiny_gguf.write_model(tmp_path / "m.gguf", **options)  # type: ignore[arg-type]
    assert message in failure(convert("gguf", tmp_path / "m.gguf", tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shutil.rmtree, "it is not a directory with config.json"),
        (lambda path: (path / "config.json").unlink(), "config.json: it cannot be read"),
        (lambda path: (path / "tokenizer.json").unlink(), "tokenizer.json: it cannot be read"),
        (lambda path: (path / "model.safetensors").unlink(), "neither model.safetensors nor"),
        (lambda path: cut(path / "model.safetensors"), "truncated or not safetensors"),
    ],
)
@pytest.mark.requirement("WORKER-4310")
def test_a_directory_that_cannot_be_converted_is_one_line(
    tmp_path: Path, convert: Convert, change: Callable[[Path], object], message: str
) -> None:
    change(tiny_huggingface.write_model(tmp_path / "source"))
    assert message in failure(convert("hf", tmp_path / "source", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_the_library_does_not_read_is_found_before_the_conversion(tmp_path: Path, convert: Convert) -> None:
    source = tiny_huggingface.write_model(tmp_path / "source")
    value = json.loads((source / "tokenizer.json").read_text())
    value["model"]["type"] = "Mystery"
    (source / "tokenizer.json").write_text(json.dumps(value))
    done = convert("hf", source, tmp_path / "out")
    assert "not one the tokenizers library reads" in failure(done)
    assert len(done[1].splitlines()) == 1


def test_a_broken_template_is_one_line_that_names_the_way_out(tmp_path: Path, convert: Convert) -> None:
    source = tiny_huggingface.write_model(tmp_path / "source")
    (source / "chat_template.jinja").write_text(BROKEN_TEMPLATE)
    done = convert("hf", source, tmp_path / "out")
    assert "--no_chat_template converts the model without it" in failure(done)
    assert len(done[1].splitlines()) == 1
    code, _ = convert("hf", source, tmp_path / "out", "--no_chat_template")
    assert code is ExitCode.OK
    assert not (tmp_path / "out" / "chat_template.jinja").exists()


def test_a_destination_that_exists_is_a_usage_error_and_stays(tmp_path: Path, convert: Convert) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("content")
    done = convert("gguf", gguf(tmp_path / "m.gguf"), tmp_path / "out")
    assert "exists: choose another destination" in failure(done, ExitCode.USAGE)
    assert (tmp_path / "out" / "mine").read_text() == "content"


def test_a_destination_cannot_steer_the_terminal(tmp_path: Path, convert: Convert) -> None:
    destination = tmp_path / "\x1b[2J\u202e[red]"
    destination.write_text("content")
    message = failure(convert("gguf", gguf(tmp_path / "m.gguf"), destination), ExitCode.USAGE)
    assert "?[2J?[red] exists" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "the following arguments are required: SOURCE, DESTINATION"),
        (("source",), "the following arguments are required: DESTINATION"),
        (("source", "out", "more"), "unrecognized arguments: more"),
        (("source", "out", "--dtype=int8"), "argument --dtype: invalid choice: 'int8'"),
        (("source", "out", "--dtyp=auto"), "unrecognized arguments: --dtyp=auto"),
        (("source", "out", "--dtype"), "argument --dtype: expected one argument"),
    ],
)
def test_bad_arguments_are_a_usage_error(convert: Convert, arguments: tuple[str, ...], message: str) -> None:
    code, said = convert("gguf", *arguments)
    assert code is ExitCode.USAGE
    assert said.splitlines()[-1].startswith(f"convert_gguf.py: error: {message}")


def test_an_interrupt_is_an_exit_code_of_its_own(
    tmp_path: Path, convert: Convert, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "write_checkpoint", interrupted)
    code, said = convert("gguf", gguf(tmp_path / "m.gguf"), tmp_path / "out")
    assert code is ExitCode.INTERRUPTED
    assert said == "interrupted: nothing that looks finished was left behind\n"


# -- as processes ------------------------------------------------------------------------------------------------------


def line_of(kind: str, *arguments: object) -> list[str]:
    return [sys.executable, str(TOOLS / f"convert_{kind}.py"), *map(str, arguments)]


def finished(command_line: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, elsewhere than in the repository."""
    done = subprocess.run(command_line, capture_output=True, text=True, timeout=120, check=False, cwd=cwd)
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gguf", "hf"])
def test_a_tool_converts_prints_the_digest_and_helps(tmp_path: Path, kind: str) -> None:
    if kind == "gguf":
        gguf(tmp_path / "source")
    else:
        tiny_huggingface.write_model(tmp_path / "source")
    done = finished(line_of(kind, "source", "out"), tmp_path)
    assert done.returncode == ExitCode.OK
    assert (done.stdout, f"digest     {read_manifest(tmp_path / 'out').digest}" in done.stderr) == ("", True)
    asked = finished(line_of(kind, "--help"), tmp_path)
    assert asked.returncode == ExitCode.OK
    assert asked.stderr == ""
    for word in ("SOURCE", "DESTINATION", "--dtype", "--no_chat_template", f"example: tools/convert_{kind}.py"):
        assert word in asked.stdout


@pytest.mark.slow
@pytest.mark.requirement("WORKER-4310")
def test_a_tool_that_fails_says_one_line_and_the_code_of_the_reason(tmp_path: Path) -> None:
    cut(gguf(tmp_path / "m.gguf"))
    for source, code in (("m.gguf", ExitCode.MODEL), ("nowhere", ExitCode.MODEL)):
        done = finished(line_of("gguf", source, "out"), tmp_path)
        assert done.returncode == code
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith("error: ")
    assert finished(line_of("gguf", "--what"), tmp_path).returncode == ExitCode.USAGE
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [0, 1, 64, 512], ids=lambda blocks: f"{blocks} KiB")
def test_a_disk_that_is_full_is_one_line_and_nothing_is_left(tmp_path: Path, slow_source: Path, blocks: int) -> None:
    """A limit on the size of a file stands in for it: both make a write fail half way."""
    limited = ["bash", "-c", f'ulimit -f {blocks}; exec "$@"', "-", *line_of("hf", slow_source, tmp_path / "out")]
    done = finished(limited, tmp_path)
    assert done.returncode == ExitCode.USAGE
    *before, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert "cannot be written" in last
    assert all(line.endswith("%") for line in before)
    assert list(tmp_path.iterdir()) == []


def stopped_after(lines: int, number: signal.Signals, source: Path, destination: Path) -> tuple[int, str]:
    """Sends a signal after so many lines of progress; how the process ended, and its last line."""
    command_line = line_of("hf", source, destination)
    with subprocess.Popen(command_line, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for _ in range(lines):
            process.stderr.readline()
        process.send_signal(number)
        rest = process.stderr.read()
        return process.wait(timeout=60), rest


@pytest.mark.slow
def test_a_killed_conversion_never_looks_finished_and_the_next_one_is_whole(tmp_path: Path, slow_source: Path) -> None:
    whole = finished(line_of("hf", slow_source, tmp_path / "whole"), tmp_path)
    lines = whole.stderr.splitlines()
    steps = sum(line.endswith("%") for line in lines)
    digest = read_manifest(tmp_path / "whole").digest
    destination, partial, stopped = tmp_path / "out", tmp_path / ".out.partial", 0
    points = np.random.default_rng(9).choice(np.arange(2, steps), 4, replace=False)
    for point in (1, *points, steps):
        stopped_after(int(point), signal.SIGKILL, slow_source, destination)
        if destination.exists():  # it was faster than the signal
            verify_files(destination, read_manifest(destination), lambda _: None)
            shutil.rmtree(destination)
        else:
            assert partial.is_dir()
            stopped += 1
    assert stopped >= 4
    done = finished(line_of("hf", slow_source, destination), tmp_path)
    assert done.returncode == ExitCode.OK
    manifest = read_manifest(destination)
    verify_files(destination, manifest, lambda _: None)
    assert manifest.digest == digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.slow
@pytest.mark.parametrize("lines", [1, 7, 8])
def test_ctrl_c_leaves_nothing(tmp_path: Path, slow_source: Path, lines: int) -> None:
    code, said = stopped_after(lines, signal.SIGINT, slow_source, tmp_path / "out")
    assert code == ExitCode.INTERRUPTED
    assert said.splitlines()[-1] == "interrupted: nothing that looks finished was left behind"
    assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
