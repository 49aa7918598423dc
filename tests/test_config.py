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


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4170")
@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("2000B", 2000),
        ("80GB", 80_000_000_000),
        ("24GiB", 24 * 2**30),
        ("1.5 TiB", 3 * 2**39),
        ("0.5kB", 500),
        ("7KB", 7000),
        ("3MB", 3_000_000),
        ("4KiB", 4096),
        ("16MiB", 2**24),
        ("1TB", 10**12),
    ],
)
def test_a_size_may_have_a_unit(text: str, size: int) -> None:
    assert config(max_model_bytes=text).max_model_bytes == size


@pytest.mark.requirement("WORKER-4170")
@pytest.mark.parametrize(
    "text",
    ["", "GiB", "-1", "+1", "1e9", "1_000", "24 gib", "24Gi", "24Gb", "0.3B", "1..5GB", "1GB ", "9" * 400, "٣GB"],
)
def test_what_is_no_size_is_refused(text: str) -> None:
    (line,) = problems(max_model_bytes=text)
    assert "such as 80GB or 24GiB" in line


@pytest.mark.requirement("WORKER-4172")
def test_a_size_out_of_its_range_is_refused() -> None:
    assert problems(max_model_bytes="0")[0].startswith("--max_model_bytes:")
    assert problems(max_model_bytes="1025TiB")[0].startswith("--max_model_bytes:")
    assert problems(max_staging_bytes="1MB")[0].startswith("--max_staging_bytes:")


@pytest.mark.requirement("WORKER-4171")
def test_models_of_more_than_100_gb_need_consent() -> None:
    assert config().max_model_bytes == 100_000_000_000


# -- values that must fit each other -----------------------------------------------------------------------------------


@pytest.mark.requirement("WORKER-4170")
def test_only_the_cpu_emulates_memory() -> None:
    (line,) = problems(emulated_memory="24GiB")
    assert "--platform=cpu" in line
    assert config(emulated_memory="24GiB", platform="cpu").emulated_memory == 24 * 2**30


@pytest.mark.requirement("WORKER-4920")
def test_a_certificate_and_its_key_come_together() -> None:
    (line,) = problems(tls_cert_file="/c.pem")
    assert line == "--tls_key_file: missing: --tls_cert_file needs the private key of the certificate"
    (line,) = problems(tls_key_file="/k.pem")
    assert line.startswith("--tls_key_file: '/k.pem' is not allowed: it needs --tls_cert_file")
    made = config(tls_cert_file="/c.pem", tls_key_file="/k.pem", bind_address="0.0.0.0", tls_client_ca_file="/ca.pem")
    assert made.bind_address == "0.0.0.0"


@pytest.mark.requirement("WORKER-4922")
def test_client_certificates_need_tls() -> None:
    (line,) = problems(tls_client_ca_file="/ca.pem")
    assert "--tls_cert_file" in line


@pytest.mark.requirement("WORKER-4920")
def test_a_key_without_its_certificate_does_not_open_the_address() -> None:
    assert [line.split(":")[0] for line in problems(tls_key_file="/k.pem", bind_address="0.0.0.0")] == [
        "--tls_key_file",
        "--bind_address",
    ]


def test_a_certificate_that_is_refused_is_not_asked_for_again() -> None:
    (line,) = problems(tls_cert_file="a\0b", tls_key_file="/k.pem", tls_client_ca_file="/c", bind_address="0.0.0.0")
    assert line.startswith("--tls_cert_file:")


def test_runs_and_control_have_different_tokens() -> None:
    (line,) = problems(control_token_file=str(GIVEN["api_token_file"]))
    assert "--api_token_file" in line
    assert config(control_token_file="/run/other").control_token_file == Path("/run/other")


@pytest.mark.parametrize("port", ["-1", "0", "1024", "65535"])
def test_the_port_of_metrics_may_be_none_free_or_given(port: str) -> None:
    assert config(metrics_port=port).metrics_port == int(port)


@pytest.mark.requirement("WORKER-4991")
@pytest.mark.parametrize("port", ["-2", "1", "80", "1023", "65536", "50051"])
def test_a_port_of_metrics_that_is_low_or_taken_is_refused(port: str) -> None:
    assert problems(metrics_port=port)[0].startswith("--metrics_port:")


def test_a_signature_needs_keys_to_check_it() -> None:
    (line,) = problems(signature_file="/m.sig")
    assert line == "--trusted_keys_file: missing: --signature_file needs the public keys to check it with"
    assert config(signature_file="/m.sig", trusted_keys_file="/keys.pem").signature_file == Path("/m.sig")
    assert config(trusted_keys_file="/keys.pem").signature_file is None  # the signature may come with Commit


@pytest.mark.parametrize(
    "pinned",
    [
        {"expected_digest": "A" * 64},
        {"signature_file": "/m.sig", "trusted_keys_file": "/keys.pem"},
        {"await_commit": True},
    ],
)
def test_a_model_that_must_be_pinned_needs_something_that_pins_it(pinned: dict[str, str | bool]) -> None:
    (line,) = problems(require_pinned=True)
    assert "--expected_digest" in line
    assert config(require_pinned=True, **pinned).require_pinned


@pytest.mark.requirement("WORKER-4303")
def test_a_digest_that_is_wrong_is_one_problem_and_not_two() -> None:
    (line,) = problems(require_pinned=True, expected_digest="abc")
    assert line.startswith("--expected_digest:")


@pytest.mark.parametrize("url", ["collector:4318", "grpc://x", "http://u:secret@x/"])
def test_the_address_of_a_collector_is_checked_and_not_repeated(url: str) -> None:
    (line,) = problems(otlp_endpoint=url)
    assert url not in line
    assert config(otlp_endpoint="http://127.0.0.1:4318/v1/traces").otlp_endpoint


# -- what a refusal says -----------------------------------------------------------------------------------------------


def test_what_a_library_says_of_a_value_is_not_passed_on() -> None:
    (line,) = problems(bind_address="--" + "x" * 300)
    assert len(line) < 120


def test_a_truth_value_is_no_number() -> None:
    assert problems(max_restarts=True) == ("--max_restarts: True is not allowed; it must be an integer from 0 to 1000",)


def test_a_problem_says_where_the_value_was_found() -> None:
    with pytest.raises(ConfigError) as caught:
        WorkerConfig.from_flags({**GIVEN, "rpc_port": "80"}, {"rpc_port": "WORKER_RPC_PORT"})
    assert caught.value.problems[0].startswith("--rpc_port: '80' from WORKER_RPC_PORT is not allowed")
