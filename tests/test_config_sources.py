"""Flags, environment and file: who goes before whom, and what each of them may not hold."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orcd_jax.config import ConfigError, Given, WorkerConfig, flag_of
from orcd_jax.config_sources import MAX_FILE_BYTES, Configured, Origin, configure

GIVEN: dict[str, Given] = {
    "worker_id": "w",
    "pool_id": "p",
    "model_path": "/m",
    "rpc_port": "50051",
    "api_token_file": "/t",
    "standalone": True,
}
SECRET = "0123456789abcdef" * 4


def written(folder: Path, text: str, name: str = "worker.toml") -> Path:
    path = folder / name
    path.write_text(text)
    path.chmod(0o600)
    return path


def merged(environment: dict[str, str] | None = None, file: Path | None = None, **flags: Given) -> Configured:
    return configure({**GIVEN, **flags}, environment or {}, file)


def problems(environment: dict[str, str] | None = None, file: Path | None = None, **flags: Given) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        merged(environment, file, **flags)
    return caught.value.problems


def outcome(environment: dict[str, str], file: Path | None = None, **flags: Given) -> tuple[str, ...]:
    """Every problem; none for a configuration that is valid."""
    try:
        assert isinstance(configure(flags, environment, file).config, WorkerConfig)
    except ConfigError as error:
        return error.problems
    return ()


# -- precedence --------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4980")
def test_a_flag_goes_before_the_environment_before_the_file_before_the_default(tmp_path: Path) -> None:
    file = written(tmp_path, "max_tokens = 1\nlog_level = 'error'\nslots_total = 2\n")
    environment = {"WORKER_MAX_TOKENS": "10", "WORKER_LOG_LEVEL": "warning"}
    made = merged(environment, file, max_tokens="100")
    assert (made.config.max_tokens, made.config.log_level, made.config.slots_total) == (100, "warning", 2)
    assert made.config.drain_timeout_ms == 30_000
    assert {
        name: str(made.origins[name]) for name in ("max_tokens", "log_level", "slots_total", "drain_timeout_ms")
    } == {
        "max_tokens": "flag",
        "log_level": "environment WORKER_LOG_LEVEL",
        "slots_total": "file worker.toml",
        "drain_timeout_ms": "default",
    }


@pytest.mark.requirement("WORKER-4980")
@pytest.mark.parametrize("name", WorkerConfig.model_fields)
def test_every_field_has_a_variable(name: str) -> None:
    environment = {f"WORKER_{other.upper()}": str(value).lower() for other, value in GIVEN.items()}
    variable, value = f"WORKER_{name.upper()}", "a\0b"  # right nowhere: so the refusal shows that it was read
    assert any(f"from {variable} is not allowed" in line for line in outcome({**environment, variable: value}))


@pytest.mark.requirement("WORKER-4990")
def test_the_public_names_are_variables(tmp_path: Path) -> None:
    token = str(tmp_path / "token")
    environment = {
        "WORKER_API_TOKEN_FILE": token,
        "WORKER_BIND_ADDR": "::1",
        "WORKER_GPU_DEVICE": "3",
        "WORKER_LOG_LEVEL": "debug",
    }
    flags = {name: value for name, value in GIVEN.items() if name != "api_token_file"}
    made = configure(flags, environment, None)
    assert (str(made.config.api_token_file), made.config.bind_address) == (token, "::1")
    assert (made.config.gpu_device, made.config.log_level) == (3, "debug")
    assert made.origins["bind_address"] == Origin("environment", "WORKER_BIND_ADDR")


def test_two_variables_for_one_value_must_agree() -> None:
    environment = {"WORKER_BIND_ADDR": "::1", "WORKER_BIND_ADDRESS": "127.0.0.1"}
    assert problems(environment) == ("WORKER_BIND_ADDRESS and WORKER_BIND_ADDR say different things: set one of them",)
    assert merged(dict.fromkeys(environment, "::1")).config.bind_address == "::1"


def test_a_flag_that_says_no_goes_before_a_variable_that_says_yes() -> None:
    assert not merged({"WORKER_ALLOW_ROOT": "true"}, allow_root=False).config.allow_root


def test_an_empty_variable_counts_as_not_given() -> None:
    assert merged({"WORKER_MAX_TOKENS": "", "WORKER_API_TOKEN": ""}).origins["max_tokens"] == Origin("default")


def test_variables_of_other_software_are_ignored() -> None:
    assert (
        merged({"WORKER_THREADS": "x", "WORKER_": "y", "RPC_PORT": "1", "worker_rpc_port": "1"}).config.rpc_port
        == 50051
    )


# -- secrets -----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4910")
@pytest.mark.parametrize(
    "name", ["API_TOKEN", "CONTROL_TOKEN", "CALLBACK_TOKEN", "SEAL_KEY", "IDENTITY_KEY", "TLS_KEY"]
)
def test_a_secret_in_the_environment_is_refused_and_not_repeated(name: str) -> None:
    (line,) = problems({f"WORKER_{name}": SECRET})
    assert f"give WORKER_{name}_FILE" in line
    assert SECRET not in line


@pytest.mark.requirement("WORKER-4911")
def test_a_secret_in_the_file_is_refused_and_not_repeated(tmp_path: Path) -> None:
    (line,) = problems(file=written(tmp_path, f"api_token = '{SECRET}'"))
    assert line == "--config: worker.toml: there is no flag api_token; did you mean --api_token_file?"


# -- all problems at once ----------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4981")
def test_problems_of_every_source_are_listed_at_once_each_with_where_it_came_from(tmp_path: Path) -> None:
    file = written(tmp_path, "slots_totl = 2\nmax_tokens = 0\nlog_level = ['info']\n")
    environment = {"WORKER_API_TOKEN": SECRET, "WORKER_PLATFORM": "tpu"}
    found = problems(environment, file, rpc_port="80", readiness_callback_url="http://u:secret@x/", standalone=False)
    secret, *others = found
    assert secret.startswith("WORKER_API_TOKEN: a secret is not taken from the environment")
    assert others == [
        "--config: worker.toml: there is no flag slots_totl; did you mean --slots_total?",
        "--log_level: what worker.toml gives is not text, a truth value or a 64-bit number",
        "--platform: 'tpu' from WORKER_PLATFORM is not allowed; it must be cuda or cpu",
        "--rpc_port: '80' is not allowed; it must be an integer from 1024 to 65535",
        f"--readiness_callback_url: what was given is not allowed; it must be {flag_of('readiness_callback_url').rule}",
        "--max_tokens: 0 from worker.toml is not allowed; it must be an integer from 1 to 1048576",
    ]


@pytest.mark.requirement("WORKER-4981")
def test_rules_between_values_hold_across_sources(tmp_path: Path) -> None:
    file = written(tmp_path, "tls_cert_file = '/c.pem'\n")
    assert problems(file=file) == ("--tls_key_file: missing: --tls_cert_file needs the private key of the certificate",)
    assert merged({"WORKER_TLS_KEY_FILE": "/k.pem"}, file).config.tls_key_file == Path("/k.pem")


def test_of_a_file_that_cannot_be_read_nothing_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        configure({}, {"WORKER_API_TOKEN": SECRET}, tmp_path / "none.toml")
    secret, missing = caught.value.problems
    assert secret.startswith("WORKER_API_TOKEN:")
    assert missing == "--config: none.toml: it cannot be read (No such file or directory)"


# -- the file ----------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4982")
def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    values = {"max_tokens": 7, "callback_deadline": 2.5, "allow_root": True, "max_model_bytes": "24GiB"}
    toml = written(tmp_path, "max_tokens = 7\ncallback_deadline = 2.5\nallow_root = true\nmax_model_bytes = '24GiB'\n")
    by_toml, by_json = merged(file=toml), merged(file=written(tmp_path, json.dumps(values), "worker.json"))
    assert by_toml.config == by_json.config
    assert by_json.config.max_model_bytes == 24 * 2**30
    assert by_json.origins["allow_root"] == Origin("file", "worker.json")


@pytest.mark.requirement("WORKER-4982")
@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("worker.yaml", "", "must end with .json or .toml"),
        ("worker", "", "must end with .json or .toml"),
        ("worker.json", "[]", "one JSON object"),
        ("worker.json", "{", "line 1"),
        ("worker.json", '{"max_tokens": 1, "max_tokens": 2}', "a key is there twice"),
        ("worker.json", '{"callback_deadline": Infinity}', "Infinity is not JSON"),
        ("worker.json", '{"max_tokens": ' + "9" * 5000 + "}", "4300 digits"),
        ("worker.json", "[" * 60_000, "nested too deeply"),
        ("worker.toml", "x = " + "[" * 60_000, "nested too deeply"),
        ("worker.toml", "max_tokens = 1\nmax_tokens = 2\n", "Cannot overwrite"),
        ("worker.toml", "max_tokens\n", "line 1"),
        ("worker.toml", "#" * (MAX_FILE_BYTES + 1), f"the limit is {MAX_FILE_BYTES}"),
    ],
)
def test_a_file_that_is_not_what_it_says_is_one_problem(tmp_path: Path, name: str, text: str, said: str) -> None:
    (line,) = problems(file=written(tmp_path, text, name))
    assert line.startswith(f"--config: {name}: ")
    assert said in line
    assert len(line) < 200


@pytest.mark.requirement("WORKER-4982")
@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("worker.json", '{"max_tokens": null}'),
        ("worker.json", '{"max_tokens": {"a": 1}}'),
        ("worker.toml", "max_tokens = 2020-01-01"),
        ("worker.toml", "[max_tokens]\na = 1"),
        ("worker.toml", f"max_tokens = 0x{'f' * 60_000}"),
    ],
)
def test_a_value_that_no_flag_can_take_is_refused(tmp_path: Path, name: str, text: str) -> None:
    assert problems(file=written(tmp_path, text, name)) == (
        f"--max_tokens: what {name} gives is not text, a truth value or a 64-bit number",
    )


@pytest.mark.parametrize("value", ["true", "1.5", "nan", "'1e2'"])
def test_a_value_of_the_wrong_kind_is_refused(tmp_path: Path, value: str) -> None:
    (line,) = problems(file=written(tmp_path, f"max_tokens = {value}"))
    assert "from worker.toml is not allowed; it must be an integer" in line


def test_a_file_full_of_unknown_keys_is_answered_shortly(tmp_path: Path) -> None:
    found = problems(file=written(tmp_path, "".join(f"k{i} = 1\n" for i in range(5000))))
    assert len(found) == 21
    assert found[-1] == "--config: worker.toml: and 4980 more that are no flags"


def test_a_pipe_does_not_hold_the_start(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "worker.toml")
    (line,) = problems(file=tmp_path / "worker.toml")
    assert line.endswith("it is not a regular file")


def test_a_file_that_anyone_can_write_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, "max_tokens = 1")
    file.chmod(0o646)
    (line,) = problems(file=file)
    assert line.endswith("anyone can write it: run `chmod o-w` on it")


def test_a_hostile_name_or_key_reaches_the_terminal_harmless(tmp_path: Path) -> None:
    lines = problems(file=written(tmp_path, '{"\\u001b[31m\\u202e": 1}', "\x1b[31m.json"))
    assert all(character.isprintable() for line in lines for character in line)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(max_size=200), suffix=st.sampled_from(["json", "toml"]))
def test_whatever_a_file_holds_the_answer_is_a_configuration_or_problems(
    tmp_path: Path, data: bytes, suffix: str
) -> None:
    file = tmp_path / f"worker.{suffix}"
    file.write_bytes(data)
    file.chmod(0o600)
    assert all(len(line) < 400 for line in outcome({}, file, **GIVEN))


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    found=st.dictionaries(
        st.sampled_from(sorted(WorkerConfig.model_fields)) | st.text(max_size=10), _values, max_size=6
    )
)
def test_whatever_values_a_file_gives_the_answer_is_a_configuration_or_problems(
    tmp_path: Path, found: dict[str, object]
) -> None:
    file = written(tmp_path, json.dumps(found), "worker.json")
    assert all(len(line) < 400 for line in outcome({}, file, **GIVEN))
