"""Help of ``orcd``: every command, every flag, examples that work, and nothing that takes time to show it."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from orcd_jax import __version__
from orcd_jax.cli.arguments import parse
from orcd_jax.errors import ExitCode
from tests.cli.conftest import Orcd
from tests.server.fake_worker import Served

ROOT = Path(__file__).parents[2]
ONLINE = ("execute", "ready", "status", "plan", "commit", "attest")
LOCAL = ("keygen", "sign", "verify", "audit")
FLAGS = {
    "execute": "chat system max_tokens stop ignore_eos timeout job_id temperature top_p top_k min_p seed",
    "ready": "wait",
    "status": "",
    "plan": "max_context slots device_memory device",
    "commit": "max_context slots expected_digest signature_file shard_id",
    "attest": "expected_digest identity handle_id pool_id",
    "keygen": "bundle",
    "sign": "key_file out bundle",
    "verify": "public_key_file signature_file",
    "audit": "head",
}
OF_A_WORKER = {"address", "token_file", "tls_ca_file", "tls_cert_file", "tls_key_file"}


def test_the_version_is_the_packages(alone: Orcd) -> None:
    shown = alone("--version")
    assert (shown.code, shown.out) == (ExitCode.OK, f"orcd {__version__}\n")


def test_help_names_the_commands_the_environment_and_the_exit_codes(alone: Orcd) -> None:
    shown = alone("--help")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    for command in (*ONLINE, *LOCAL):
        assert re.search(rf"^    {command} +\w", shown.out, re.MULTILINE)
    for wanted in ("example:", "orcd execute --", "ORCD_ADDRESS", "ORCD_TOKEN_FILE", "ORCD_CONTROL_TOKEN_FILE"):
        assert wanted in shown.out
    assert "ORCD_TLS_CA_FILE" in shown.out
    assert "exit codes:" in shown.out


@pytest.mark.parametrize("command", [*ONLINE, *LOCAL])
def test_help_of_a_command_explains_every_flag(alone: Orcd, command: str) -> None:
    shown = alone(command, "--help")
    assert (shown.code, shown.err) == (ExitCode.OK, "")
    entries = re.findall(r"^  (?:-h, )?--(\w+)(?: [A-Z:]+)?(?:\s{2,}|\n\s+)(\S.*)$", shown.out, re.MULTILINE)
    worker = OF_A_WORKER if command in ONLINE else set()
    assert {name for name, _ in entries} == {"help", "json", *worker, *FLAGS[command].split()}
    assert all(len(help_text) > 3 for _, help_text in entries)
    assert max(len(line) for line in shown.out.splitlines()) <= 120


@pytest.mark.parametrize("command", [*ONLINE, *LOCAL])
def test_help_of_a_command_has_examples_that_parse(
    alone: Orcd, tokens: dict[str, str], stdin: Callable[[bytes], None], command: str
) -> None:
    stdin(b"x")
    lines = [line for line in alone(command, "--help").out.splitlines() if line.startswith("  ")]
    examples = [line for line in lines if re.match(rf"  (cat prompt\.txt \| )?orcd {command} ", line)]
    assert examples
    for example in examples:
        text = re.sub(r"\$\(cat \w+(\.pub)?\)", "ab" * 32, example.partition("&&")[0])
        words = shlex.split(re.split(r"\s{4,}", text.strip())[0])
        argv = [word for word in words[words.index("orcd") + 1 :] if word != "--token_file=token"]
        assert parse(argv, tokens) is not None


@pytest.mark.parametrize(("command", "named"), [("ready", False), ("execute", False), ("status", True), ("plan", True)])
def test_help_names_the_variable_of_the_right_token(alone: Orcd, command: str, named: bool) -> None:
    shown = alone(command, "--help").out
    assert "$ORCD_TOKEN_FILE" in shown
    assert ("$ORCD_CONTROL_TOKEN_FILE" in shown) is named


def test_help_needs_neither_grpc_nor_rich_nor_cryptography(tokens: dict[str, str]) -> None:
    script = (
        "import sys\nfrom orcd_jax.cli.main import main\n"
        f"for argv in [[], *([name] for name in {(*ONLINE, *LOCAL)!r})]:\n"
        "    assert main([*argv, '--help']) == 0\n"
        "assert not {'grpclib', 'rich', 'cryptography', 'numpy', 'jax'} & set(sys.modules), sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=tokens, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_nothing_that_asks_a_worker_needs_jax(served: Served, tokens: dict[str, str]) -> None:
    script = (
        "import sys\nfrom orcd_jax.cli.main import main\n"
        "assert main(['execute', '--max_tokens=8', '--json', 'x']) == 0\n"
        "assert not {'rich', 'jax'} & set(sys.modules)\n"
        "for argv in (['ready'], ['status'], ['commit']):\n    assert main(argv) == 0, argv\n"
        "assert main(['plan']) == 1\nmain(['attest'])\n"
        "assert 'jax' not in sys.modules\n"
    )
    environment = tokens | {"ORCD_ADDRESS": f"127.0.0.1:{served.port}"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
