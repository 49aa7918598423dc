"""The command line: every flag, every problem, and a help that names them all."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orcd_jax import main
from orcd_jax.command_line import parse
from orcd_jax.config import ConfigError, WorkerConfig, flag_of
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
    answers = ["--config=FILE", "--print_config", "--help", "--version"]
    assert listed == [*(f"--{name}" for name in by_group()), *answers]
    assert max(map(len, shown.splitlines())) <= 110


def by_group() -> list[str]:
    """Every field, groups in the order in which they begin."""
    groups = list(dict.fromkeys(flag_of(name).group for name in WorkerConfig.model_fields))
    return sorted(WorkerConfig.model_fields, key=lambda name: groups.index(flag_of(name).group))


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["orcd-worker", "--version"]) is ExitCode.OK
    assert capsys.readouterr().out.startswith("orcd-worker 0.")


# -- sources -----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4982")
def test_a_file_and_the_environment_fill_in_what_flags_leave_out(tmp_path: Path) -> None:
    file = tmp_path / "worker.json"
    file.write_text('{"standalone": true, "max_tokens": 1, "platform": "cpu"}')
    file.chmod(0o600)
    config = parse(["orcd-worker", *REQUIRED, f"--config={file}", "--platform=cuda"], {"WORKER_MAX_TOKENS": "2"})
    assert config is not None
    assert (config.standalone, config.max_tokens, config.platform) == (True, 2, "cuda")


def test_a_misspelt_secret_flag_shows_its_name_and_not_its_value() -> None:
    (line,) = problems(*REQUIRED, "--standalone", "--api_token=0123456789abcdef0123456789abcdef")
    assert line == "--api_token: there is no such flag; did you mean --api_token_file?"


# -- --print_config ----------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4983")
def test_the_configuration_is_printed_with_where_each_value_came_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "worker.toml"
    file.write_text("slots_total = 2\n")
    file.chmod(0o600)
    given = ["orcd-worker", *REQUIRED, "--standalone", f"--config={file}", "--print_config"]
    assert parse(given, {"WORKER_LOG_LEVEL": "debug"}) is None
    header, *lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    assert header == ["flag", "value", "from"]
    assert [line[0] for line in lines] == list(WorkerConfig.model_fields)
    shown = {name: (value, origin) for name, value, origin in lines}
    assert shown["rpc_port"] == ("50051", "flag")
    assert shown["log_level"] == ("debug", "environment WORKER_LOG_LEVEL")
    assert shown["slots_total"] == ("2", "file worker.toml")
    assert shown["await_commit"] == ("false", "default")
    assert shown["expected_digest"] == ('""', "default")
    assert shown["state_dir"] == ("none", "default")


@pytest.mark.requirement("WORKER-4983")
def test_the_configuration_is_printed_as_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["orcd-worker", *REQUIRED, "--standalone", "--print_config=json"], {"WORKER_MAX_TOKENS": "7"}) is None
    shown = json.loads(capsys.readouterr().out)
    assert list(shown) == list(WorkerConfig.model_fields)
    assert shown["max_tokens"] == {"value": 7, "from": "environment WORKER_MAX_TOKENS"}
    assert shown["model_path"] == {"value": "/models/tiny", "from": "flag"}
    assert shown["tls_cert_file"] == {"value": None, "from": "default"}


@pytest.mark.requirement("WORKER-4983")
@pytest.mark.parametrize("style", ["--print_config", "--print_config=json"])
def test_what_may_hold_a_password_is_not_printed(style: str, capsys: pytest.CaptureFixture[str]) -> None:
    hidden = ["--readiness_callback_url=http://pool/?key=marked", "--otlp_endpoint=http://traces/?key=marked"]
    assert parse(["orcd-worker", *REQUIRED, *hidden, style]) is None
    shown = capsys.readouterr().out
    assert "marked" not in shown
    if style.endswith("json"):
        assert json.loads(shown)["otlp_endpoint"] == {"from": "flag"}
    else:
        assert shown.count("(not shown)") == 2


@pytest.mark.requirement("WORKER-4983")
@pytest.mark.parametrize("given", [("--print_config",), ("--print_config=yaml", "--standalone")])
def test_a_configuration_that_is_not_valid_is_not_printed(
    given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert problems(*REQUIRED, *given)[0].startswith(("--readiness_callback_url:", "--print_config: 'yaml'"))
    assert capsys.readouterr().out == ""


def test_a_printed_value_reaches_the_terminal_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["orcd-worker", *REQUIRED, "--standalone", "--state_dir=/a\x1b[31m", "--print_config"]) is None
    assert "\x1b" not in capsys.readouterr().out
