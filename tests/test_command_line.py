"""The command line: every flag, every problem, and a help that names them all."""

from __future__ import annotations

import pytest

from orcd_jax import main
from orcd_jax.command_line import parse
from orcd_jax.config import ConfigError, WorkerConfig
from orcd_jax.errors import ExitCode

REQUIRED = (
    "--worker_id=w1",
    "--pool_id=p1",
    "--model_path=/models/tiny",
    "--rpc_port=50051",
    "--api_token_file=/run/token",
)


def parsed(*given: str) -> WorkerConfig:
    config = parse(["orcd-worker", *REQUIRED, *given])
    assert config is not None
    return config


def problems(*given: str) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse(["orcd-worker", *given])
    return caught.value.problems


@pytest.mark.requirement("WORKER-4980")
def test_every_field_of_the_configuration_is_a_flag() -> None:
    config = parsed("--standalone", "--platform=cpu", "--slots_total", "2", "--noallow_root", "--log_format=console")
    assert (config.platform, config.slots_total, config.allow_root, config.log_format) == ("cpu", 2, False, "console")


def test_a_misspelt_flag_is_one_line_with_the_likely_name() -> None:
    assert problems(*REQUIRED, "--standalon") == ("--standalon: there is no such flag; did you mean --standalone?",)


def test_an_unknown_flag_points_to_the_help() -> None:
    assert problems("--zzz=1") == ("--zzz: there is no such flag; see --help",)


def test_a_word_that_is_no_flag_is_refused() -> None:
    assert problems(*REQUIRED, "--standalone", "model") == ("'model': only flags are taken; write --flag=value",)


def test_a_wrong_boolean_is_listed_with_the_other_problems() -> None:
    found = problems("--standalone=perhaps", "--worker_id=w", "--pool_id=p", "--model_path=m", "--rpc_port=1")
    assert [line.split(":")[0] for line in found] == ["--rpc_port", "--api_token_file", "--standalone"]


def test_a_flag_without_its_value_is_refused() -> None:
    (line,) = problems("--worker_id")
    assert "worker_id" in line


@pytest.mark.requirement("WORKER-4304")
def test_a_hostile_flag_name_reaches_the_terminal_harmless() -> None:
    assert "\x1b" not in problems("--\x1b[31mred")[0]


def test_help_names_every_flag_and_no_library_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["orcd-worker", "--help"]) is ExitCode.OK
    shown = capsys.readouterr().out
    listed = [line.strip() for line in shown.splitlines() if line.startswith("  --")]
    assert sorted(listed) == sorted(f"--{name}" for name in WorkerConfig.model_fields)
    assert max(map(len, shown.splitlines())) <= 110


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["orcd-worker", "--version"]) is ExitCode.OK
    assert capsys.readouterr().out.startswith("orcd-worker 0.")
