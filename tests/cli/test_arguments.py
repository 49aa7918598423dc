"""What ``orcd`` takes on its command line, and what it refuses before anything is sent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orcd_jax.cli.arguments import Arguments, Target, parse
from orcd_jax.cli.job import MAX_PROMPT_BYTES, Job
from orcd_jax.cli.values import Address, UsageError
from orcd_jax.errors import ExitCode
from tests.cli.conftest import Orcd
from tests.server.fake_worker import CONTROL_TOKEN, OTHER_TOKEN, TOKEN

HELLO = Job(
    prompt="hello",
    chat=False,
    system=None,
    max_tokens=256,
    temperature=None,
    top_p=None,
    top_k=None,
    min_p=None,
    seed=None,
    stop=(),
    ignore_eos=False,
    timeout_s=None,
    job_id=None,
)


@pytest.fixture
def environment(token_file: Path) -> dict[str, str]:
    return {"ORCD_TOKEN_FILE": str(token_file)}


def parsed(environment: dict[str, str], *argv: str) -> Arguments:
    """A call of a worker."""
    found = parse(argv, environment)
    assert isinstance(found, Arguments)
    return found


def job(environment: dict[str, str], *argv: str) -> Job:
    found = parsed(environment, "execute", *argv).job
    assert found is not None
    return found


# -- what is taken -----------------------------------------------------------------------------------------------------


def test_a_prompt_alone_is_a_greedy_job_of_at_most_256_tokens_at_the_local_worker(
    environment: dict[str, str], token_file: Path
) -> None:
    local = Target(address=Address("127.0.0.1", 50051), token=TOKEN, token_file=str(token_file), tls=None)
    assert parsed(environment, "execute", "hello") == Arguments(command="execute", target=local, json=False, job=HELLO)


ALL_FLAGS = {
    "--temperature": "0.5",
    "--top_p": "0.25",
    "--top_k": "40",
    "--min_p": "0.125",
    "--max_tokens": "7",
    "--seed": "18446744073709551615",
    "--system": "be brief",
    "--timeout": "1.5",
    "--job_id": "j-1",
}
ALL = Job(
    prompt="hello",
    chat=True,
    system="be brief",
    max_tokens=7,
    temperature=0.5,
    top_p=0.25,
    top_k=40,
    min_p=0.125,
    seed=2**64 - 1,
    stop=("a", "b"),
    ignore_eos=True,
    timeout_s=1.5,
    job_id="j-1",
)
SWITCHES = ("--chat", "--ignore_eos", "--stop=a", "--stop", "b")


def test_every_flag_is_taken_with_an_equals_sign(environment: dict[str, str]) -> None:
    flags = [f"{flag}={value}" for flag, value in ALL_FLAGS.items()]
    assert job(environment, *flags, *SWITCHES, "hello") == ALL


def test_every_flag_is_taken_with_a_blank_and_after_the_prompt(environment: dict[str, str]) -> None:
    flags = [word for pair in reversed(ALL_FLAGS.items()) for word in pair]
    assert job(environment, "hello", *SWITCHES, *flags) == ALL


@pytest.mark.parametrize("prompt", ["--seed=1", "-x", "--", "-5", "--no such flag", "- a list"])
def test_what_follows_two_dashes_is_the_prompt_even_when_it_begins_with_dashes(
    environment: dict[str, str], prompt: str
) -> None:
    assert job(environment, "--max_tokens=3", "--", prompt).prompt == prompt


def test_a_dash_reads_the_prompt_from_stdin_as_it_is(
    environment: dict[str, str], stdin: Callable[[bytes], None]
) -> None:
    stdin("  drei Zeilen\nüber\r\nGPUs 🚀\n".encode())
    assert job(environment, "-").prompt == "  drei Zeilen\nüber\r\nGPUs 🚀\n"


def test_flags_go_before_the_environment(environment: dict[str, str], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_text(OTHER_TOKEN, encoding="ascii")
    environment["ORCD_ADDRESS"] = "127.0.0.1:1"
    there = Target(address=Address("127.0.0.1", 2), token=OTHER_TOKEN, token_file=str(other))
    found = parsed(environment, "ready", "--address=127.0.0.1:2", f"--token_file={other}", "--json")
    assert found == Arguments(command="ready", target=there, json=True)


def test_the_environment_goes_before_the_default(environment: dict[str, str]) -> None:
    environment["ORCD_ADDRESS"] = "worker-1.example:7"
    assert parsed(environment, "status").target.address == Address("worker-1.example", 7)


def test_an_ipv6_address_is_in_brackets(environment: dict[str, str]) -> None:
    address = parsed(environment, "ready", "--address=[::1]:50051").target.address
    assert (address, str(address)) == (Address("::1", 50051), "[::1]:50051")


def test_of_two_tokens_of_a_rotation_the_first_is_used(environment: dict[str, str], token_file: Path) -> None:
    token_file.write_text(f"\n{OTHER_TOKEN} \r\n{TOKEN}\n", encoding="ascii")
    assert parsed(environment, "ready").target.token == OTHER_TOKEN


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "a command is missing: execute, ready, status, plan, commit, attest, keygen, sign, verify, audit"),
        (("generate",), "'execute', 'ready', 'status'"),
        (("execute",), "PROMPT is missing"),
        (("execute", ""), "PROMPT is empty"),
        (("execute", "--", ""), "PROMPT is empty"),
        (("execute", "two", "words"), "put it in quotes"),
        (("ready", "now"), "only flags"),
        (("plan", "one", "two"), "'two' is too much: only flags are taken after the first"),
        (("sign",), "DIRECTORY, --key_file are missing"),
        (("sign", "model"), "--key_file is missing"),
        (("verify",), "DIRECTORY is missing"),
        (("keygen",), "FILE is missing"),
        (("audit",), "DIRECTORY is missing"),
        (("plan", "--model=x"), "--model: there is no such flag"),
        (("plan", "--slots=-1"), "--slots: '-1' is not a whole number"),
        (("plan", "--device_memory=24GiB"), "MODEL is missing: with --device_memory it is the directory"),
        (("plan", "model", "--device_memory=much"), "--device_memory: 'much' is not a size"),
        (("plan", "--device=NVIDIA H200"), "--device goes with --device_memory"),
        (("commit", "--expected_digest=abc"), "--expected_digest: it must be 64 hex digits"),
        (("commit", "--signature_file=/no/where"), "--signature_file: '/no/where' cannot be read (No such file"),
        (("attest", "--identity=abc"), "--identity: it must be 64 hex digits"),
        (("attest", "--expected_digest=" + "g" * 64), "--expected_digest"),
        (("ready", "--wait=0"), "--wait: '0' is not allowed"),
        (("ready", "--tls_cert_file=x"), "--tls_cert_file goes with --tls_ca_file"),
        (("ready", "--tls_key_file=x"), "--tls_key_file goes with --tls_ca_file"),
        (("audit", "folder", "--head=12"), "--head: it must be SEQ:HASH"),
        (("execute", "--max_tok=1", "x"), "did you mean --max_tokens?"),
        (("execute", "--temprature", "1", "x"), "did you mean --temperature?"),
        (("execute", "--max-tokens=1", "x"), "did you mean --max_tokens?"),
        (("ready", "--chat"), "no such flag"),
        (("--json", "ready"), "--json: write it after the command"),
        (("execute", "--seed=-1", "x"), "--seed: '-1' is not a whole number from 0 to 18446744073709551615"),
        (("execute", "--seed=18446744073709551616", "x"), "from 0 to 18446744073709551615"),
        (("execute", "--seed=1_0", "x"), "--seed"),
        (("execute", "--max_tokens=-1", "x"), "--max_tokens"),
        (("execute", "--max_tokens=4294967296", "x"), "--max_tokens"),
        (("execute", "--max_tokens=many", "x"), "--max_tokens"),
        (("execute", "--top_k=1.5", "x"), "--top_k"),
        (("execute", "--temperature=nan", "x"), "--temperature: 'nan' is not a number that can be sent"),
        (("execute", "--top_p=inf", "x"), "--top_p"),
        (("execute", "--min_p=1e39", "x"), "--min_p"),
        (("execute", "--temperature=warm", "x"), "--temperature"),
        (("execute", "--temperature"), "--temperature: expected one argument"),
        (("execute", "--timeout=0", "x"), "--timeout: '0' is not allowed; it must be above 0"),
        (("execute", "--timeout=-1", "x"), "--timeout"),
        (("execute", "--timeout=1e9", "x"), "--timeout"),
        (("execute", "--system=be brief", "x"), "add --chat"),
        (("execute", "\udcff"), "not valid UTF-8"),
        (("execute", "--stop=\udcff", "x"), "not valid UTF-8"),
    ],
)
def test_what_cannot_be_sent_is_one_line_that_says_what_to_do(alone: Orcd, argv: tuple[str, ...], said: str) -> None:
    shown = alone(*argv)
    assert (shown.code, shown.out) == (ExitCode.USAGE, "")
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert said in shown.err


@pytest.mark.parametrize(
    "address",
    [
        "localhost",
        "50051",
        ":50051",
        "127.0.0.1:",
        "127.0.0.1:0",
        "127.0.0.1:65536",
        "127.0.0.1:５００５１",
        "::1:50051",
        "[::1]",
        "[::g]:1",
        "[1]:1",
        "grpc://127.0.0.1:1",
        "a b:1",
        "a:1\n",
    ],
)
def test_an_address_that_is_none_is_refused_with_an_example(alone: Orcd, address: str) -> None:
    shown = alone("ready", f"--address={address}")
    assert shown.code is ExitCode.USAGE
    assert "127.0.0.1:50051" in shown.err
    assert shown.err.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("ready",), "there is no token: give --token_file=FILE or set ORCD_TOKEN_FILE\n"),
        (("execute", "x"), "there is no token: give --token_file=FILE or set ORCD_TOKEN_FILE\n"),
        *(
            ((name,), "there is no control token: give --token_file=FILE or set ORCD_CONTROL_TOKEN_FILE\n")
            for name in ("plan", "commit", "attest", "status")
        ),
    ],
)
def test_no_token_file_is_refused_with_the_way_to_give_the_right_one(
    alone: Orcd, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], said: str
) -> None:
    monkeypatch.delenv("ORCD_TOKEN_FILE")
    monkeypatch.delenv("ORCD_CONTROL_TOKEN_FILE")
    shown = alone(*command)
    assert (shown.code, shown.err) == (ExitCode.USAGE, f"error: {said}")


def test_the_control_token_is_for_what_needs_it_and_for_nothing_else(
    environment: dict[str, str], token_file: Path, tmp_path: Path
) -> None:
    control = tmp_path / "mine"
    control.write_text(CONTROL_TOKEN, encoding="ascii")
    environment["ORCD_CONTROL_TOKEN_FILE"] = str(control)
    for command in ("plan", "commit", "attest", "status"):
        target = parsed(environment, command).target
        assert (target.token, target.token_file) == (CONTROL_TOKEN, str(control))
        assert parsed(environment, command, f"--token_file={token_file}").target.token == TOKEN
    assert parsed(environment, "ready").target.token == TOKEN
    assert parsed(environment, "execute", "x").target.token == TOKEN


def test_a_call_does_not_show_its_token(environment: dict[str, str]) -> None:
    assert TOKEN not in repr(parsed(environment, "ready"))


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "empty"), (b" \n\n", "empty"), (b"x" * 4097, "4096"), (b"two words", "blank"), (b"\xff\xfe", "ASCII")],
)
def test_a_token_file_without_a_token_is_refused_and_not_shown(
    alone: Orcd, token_file: Path, content: bytes, said: str
) -> None:
    token_file.write_bytes(content)
    shown = alone("ready")
    assert shown.code is ExitCode.USAGE
    assert str(token_file) in shown.err
    assert said in shown.err
    assert "two words" not in shown.err


def test_a_token_file_that_is_not_there_is_refused_with_the_reason(alone: Orcd, tmp_path: Path) -> None:
    shown = alone("ready", f"--token_file={tmp_path / 'nowhere'}")
    assert shown.code is ExitCode.USAGE
    assert "No such file or directory" in shown.err


@pytest.mark.parametrize(
    ("data", "said"),
    [(b"", "empty"), (b"ab\xff", "byte 2"), (b"x" * (MAX_PROMPT_BYTES + 1), str(MAX_PROMPT_BYTES))],
    ids=["empty", "not UTF-8", "too long"],
)
def test_stdin_that_holds_no_prompt_is_refused(
    environment: dict[str, str], stdin: Callable[[bytes], None], data: bytes, said: str
) -> None:
    stdin(data)
    with pytest.raises(UsageError, match=said):
        job(environment, "-")


def test_a_refused_value_cannot_steer_the_terminal(alone: Orcd) -> None:
    shown = alone("execute", "--se\x1b[2Jed=1\u202e", "x")
    assert shown.code is ExitCode.USAGE
    assert "\x1b" not in shown.err
    assert "\u202e" not in shown.err
