"""The configuration: rules, defaults, and all problems at once."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from orcd_jax.config import ConfigError, WorkerConfig, flag_of

GIVEN: dict[str, str | bool] = {
    "worker_id": "worker-1",
    "pool_id": "pool_1",
    "model_path": "/models/tiny",
    "rpc_port": "50051",
    "api_token_file": "/run/token",
    "standalone": True,
}


def problems(**changes: str | bool | None) -> tuple[str, ...]:
    """The problems of a good configuration with some values changed (None: not given)."""
    values = {name: value for name, value in {**GIVEN, **changes}.items() if value is not None}
    with pytest.raises(ConfigError) as caught:
        WorkerConfig.from_flags(values)
    return caught.value.problems


def config(**changes: str | bool) -> WorkerConfig:
    return WorkerConfig.from_flags({**GIVEN, **changes})


def test_what_is_required_is_enough() -> None:
    assert config().model_path == Path("/models/tiny")


def test_numbers_given_as_text_become_numbers() -> None:
    assert config(rpc_port="6000", callback_deadline="2.5").rpc_port == 6000


def test_the_defaults_are_the_documented_ones() -> None:
    made = config()
    assert (made.platform, made.gpu_device, made.bind_address) == ("cuda", 0, "127.0.0.1")
    assert (made.max_context, made.max_tokens, made.max_prompt_chars) == (4096, 4096, 100_000)
    assert (made.execution_timeout_ms, made.drain_timeout_ms, made.callback_deadline) == (300_000, 30_000, 60.0)


@pytest.mark.parametrize(("platform", "slots", "prefill"), [("cpu", 4, 128), ("cuda", 64, 1024)])
def test_capacity_follows_the_platform_unless_given(platform: str, slots: int, prefill: int) -> None:
    made = config(platform=platform)
    assert (made.slots_total, made.prefill_tokens) == (slots, prefill)
    made = config(platform=platform, slots_total="7", prefill_tokens="256")
    assert (made.slots_total, made.prefill_tokens) == (7, 256)


@pytest.mark.requirement("WORKER-4980")
def test_every_problem_is_listed_at_once() -> None:
    found = problems(worker_id=None, rpc_port="80", platform="tpu", readiness_callback_url="ftp://x", standalone=False)
    assert [line.split(":")[0] for line in found] == [
        "--worker_id",
        "--platform",
        "--rpc_port",
        "--readiness_callback_url",
    ]


def test_a_problem_names_the_flag_the_value_and_the_rule() -> None:
    (line,) = problems(rpc_port="80")
    assert line == "--rpc_port: '80' is not allowed; it must be an integer from 1024 to 65535"


def test_a_missing_flag_says_what_it_must_be() -> None:
    (line,) = problems(api_token_file=None)
    assert line == "--api_token_file: missing; it must be a file that only its owner can read"


@pytest.mark.requirement("WORKER-4990")
@pytest.mark.parametrize("port", ["1023", "65536", "-1", "http", "", "1e4"])
def test_a_port_outside_the_range_is_refused(port: str) -> None:
    assert problems(rpc_port=port)[0].startswith("--rpc_port:")


@pytest.mark.parametrize("port", ["1024", "65535"])
def test_the_ends_of_the_port_range_are_allowed(port: str) -> None:
    assert config(rpc_port=port).rpc_port == int(port)


@pytest.mark.requirement("WORKER-4300")
@pytest.mark.parametrize("name", ["", "a b", "a/b", "../x", "a;b", "é", "a\n", "x" * 257])
def test_an_identifier_outside_its_alphabet_or_length_is_refused(name: str) -> None:
    assert problems(worker_id=name)[0].startswith("--worker_id:")
    assert problems(pool_id=name)[0].startswith("--pool_id:")


@pytest.mark.requirement("WORKER-4300")
def test_an_identifier_of_256_characters_is_allowed() -> None:
    assert len(config(worker_id="x" * 256).worker_id) == 256


@pytest.mark.requirement("WORKER-4304")
def test_a_refused_value_is_shown_short_and_harmless() -> None:
    (line,) = problems(worker_id="\x1b[31m" + "evil" * 100)
    assert "\x1b" not in line
    assert len(line) < 120


@pytest.mark.requirement("WORKER-4920")
@pytest.mark.parametrize("address", ["0.0.0.0", "::", "192.168.1.1"])
def test_an_address_that_others_reach_needs_consent(address: str) -> None:
    (line,) = problems(bind_address=address)
    assert "--allow_insecure_bind" in line
    assert config(bind_address=address, allow_insecure_bind=True).bind_address == address


@pytest.mark.parametrize(("given", "used"), [("localhost", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("::1", "::1")])
def test_loopback_needs_no_consent(given: str, used: str) -> None:
    assert config(bind_address=given).bind_address == used


def test_a_bind_address_that_is_a_host_name_is_refused() -> None:
    assert problems(bind_address="example.com") == (
        "--bind_address: 'example.com' is not allowed; it must be an IP address",
    )


@pytest.mark.requirement("WORKER-4023")
def test_a_worker_of_a_pool_needs_a_callback() -> None:
    (line,) = problems(standalone=False)
    assert "--standalone" in line
    assert config(standalone=False, readiness_callback_url="https://pool:8443/ready").readiness_callback_url


def test_a_standalone_worker_takes_no_callback() -> None:
    (line,) = problems(readiness_callback_url="http://127.0.0.1:9000/ready")
    assert "--standalone" in line


@pytest.mark.parametrize(
    "url",
    [
        "ftp://host/x",
        "file:///etc/passwd",
        "http://",
        "http://user:secret@host/x",
        "http://host/x#part",
        "http://host:99999/",
        "http://host/a b",
        "http://host/\r\nX: y",
        "host/x",
    ],
)
def test_a_callback_url_that_is_not_plain_http_is_refused(url: str) -> None:
    (line,) = problems(standalone=False, readiness_callback_url=url)
    assert "secret" not in line
    assert line.startswith("--readiness_callback_url:")


@pytest.mark.parametrize("tokens", ["64", "127", "129", "-128"])
def test_prefill_goes_in_whole_blocks(tokens: str) -> None:
    assert "a multiple of 128" in problems(prefill_tokens=tokens)[0]


@pytest.mark.parametrize("seconds", ["nan", "inf", "0", "-1", "soon"])
def test_a_callback_deadline_must_be_a_sensible_number(seconds: str) -> None:
    assert problems(callback_deadline=seconds)[0].startswith("--callback_deadline:")


def test_an_unknown_name_is_refused() -> None:
    assert problems(rpc_prot="1") == ("--rpc_prot: there is no such flag; see --help",)


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 5000])
def test_a_path_that_cannot_be_one_is_refused(path: str) -> None:
    assert problems(model_path=path)[0].startswith("--model_path:")


def test_a_configuration_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        config().rpc_port = 1


def test_every_field_has_a_group_a_rule_and_a_description() -> None:
    for name, field in WorkerConfig.model_fields.items():
        assert flag_of(name).group, name
        assert flag_of(name).rule, name
        assert field.description, name
        assert field.description.endswith("."), name
