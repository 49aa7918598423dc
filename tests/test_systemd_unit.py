"""The service unit: every directive is commented and explained, its flags are real, and it forbids what it must."""

from __future__ import annotations

import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from orcd_jax.command_line import parse
from orcd_jax.config import WorkerConfig
from orcd_jax.errors import ExitCode

ROOT = Path(__file__).parent.parent
UNIT = ROOT / "configs" / "systemd" / "orcd-worker@.service"
# What the manager puts in their place, for instance 3.
SPECIFIERS = {"%i": "3", "%l": "host", "%d": "/run/credentials/orcd-worker@3.service", "%C": "/var/cache"}
EXIT_SLACK_S = 30  # beyond the drain, as docs/operations.md says


def directives() -> list[tuple[str, str]]:
    """Every directive with its value, in order; lines that go on are joined."""
    text = UNIT.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    pairs = [line.partition("=") for line in lines if line and line[0] not in "#["]
    return [(key, value) for key, _, value in pairs]


def values(name: str) -> list[str]:
    return [value for key, value in directives() if key == name]


def command() -> list[str]:
    (text,) = values("ExecStart")
    for specifier, value in SPECIFIERS.items():
        text = text.replace(specifier, value)
    assert "%" not in text
    return shlex.split(text)


def config(folder: Path) -> WorkerConfig:
    """What the real parser makes of ExecStart, with the example in place of the installed file."""
    copy = Path(shutil.copy(ROOT / "configs" / "worker.toml", folder))
    copy.chmod(0o644)
    argv = [part.replace("/etc/orcd/worker.toml", str(copy)) for part in command()]
    parsed = parse(argv, {})
    assert parsed is not None
    return parsed


def test_every_directive_has_a_comment_of_its_own() -> None:
    lines = UNIT.read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    for before, line in itertools.pairwise(lines):
        if re.match(r"[A-Z]\w+=", line):
            assert before.startswith("# "), line


@pytest.mark.requirement("WORKER-4903")
def test_every_directive_is_explained_and_nothing_else_is() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    section = text.split("## The service unit")[1].split("\n## ")[0]
    explained = re.findall(r"^\| `(\w+)` \| (.+) \|$", section, re.MULTILINE)
    assert [name for name, _ in explained] == list(dict.fromkeys(key for key, _ in directives()))
    assert all(why.strip() for _, why in explained)


def test_only_lists_are_given_more_than_once() -> None:
    given = [key for key, _ in directives()]
    assert {key for key in given if given.count(key) > 1} == {"LoadCredential", "DeviceAllow", "SystemCallFilter"}


@pytest.mark.requirement("WORKER-4903")
def test_its_flags_are_the_worker_s(tmp_path: Path) -> None:
    made = config(tmp_path)
    assert (made.worker_id, made.gpu_device, made.rpc_port, made.metrics_port) == ("host-gpu3", 0, 50053, 9463)
    assert made.compile_cache_dir == Path("/var/cache/orcd-jax/3")


@pytest.mark.requirement("WORKER-4910")
def test_every_token_comes_from_the_credential_directory(tmp_path: Path) -> None:
    made, loaded = config(tmp_path), {value.split(":")[0] for value in values("LoadCredential")}
    files = [made.api_token_file, made.control_token_file, made.callback_token_file]
    assert {file.name for file in files if file is not None} == loaded
    assert {str(file.parent) for file in files if file is not None} == {SPECIFIERS["%d"]}


@pytest.mark.requirement("WORKER-4903")
@pytest.mark.parametrize(
    ("directive", "value"),
    [
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("AmbientCapabilities", ""),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("DevicePolicy", "closed"),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("RestrictNamespaces", "yes"),
        ("LockPersonality", "yes"),
        ("ProtectKernelTunables", "yes"),
        ("ProtectKernelModules", "yes"),
        ("ProtectKernelLogs", "yes"),
        ("ProtectControlGroups", "yes"),
        ("RestrictSUIDSGID", "yes"),
        ("RestrictRealtime", "yes"),
        ("UMask", "0077"),
        ("StateDirectoryMode", "0700"),
        ("CacheDirectoryMode", "0700"),
        ("LimitCORE", "0"),
        ("SystemCallArchitectures", "native"),
        ("KillMode", "mixed"),
        ("Restart", "on-failure"),
    ],
)
def test_it_is_hardened(directive: str, value: str) -> None:
    assert values(directive) == [value]


@pytest.mark.requirement("WORKER-4903")
def test_only_one_gpu_is_let_in() -> None:
    assert values("DeviceAllow") == ["/dev/nvidia%i rw", "/dev/nvidiactl rw", "/dev/nvidia-uvm rw"]
    assert values("User") not in (["root"], [])


@pytest.mark.requirement("WORKER-4903")
@pytest.mark.parametrize("directive", ["PrivateDevices", "MemoryDenyWriteExecute"])
def test_what_would_keep_jax_from_running_is_off_and_says_so(directive: str) -> None:
    text = UNIT.read_text(encoding="utf-8")
    assert values(directive) == ["no"]
    assert re.search(rf"^# Deliberately off: .+\n{directive}=no$", text, re.MULTILINE)


@pytest.mark.requirement("WORKER-4021")
def test_what_a_start_cannot_mend_is_not_started_again() -> None:
    (codes,) = values("RestartPreventExitStatus")
    assert [ExitCode(int(code)) for code in codes.split()] == [
        ExitCode.USAGE,
        ExitCode.MODEL,
        ExitCode.RESTARTS,
        ExitCode.INTERRUPTED,
    ]


@pytest.mark.requirement("WORKER-4970")
def test_the_manager_waits_longer_than_a_drain_and_the_watchdog(tmp_path: Path) -> None:
    (seconds,) = values("TimeoutStopSec")
    assert int(seconds) > config(tmp_path).drain_timeout_ms / 1000 + EXIT_SLACK_S


@pytest.mark.requirement("WORKER-4903")
def test_the_manager_itself_finds_nothing_wrong(tmp_path: Path) -> None:
    """By ``systemd-analyze`` where there is one; elsewhere by the form of the file."""
    text = UNIT.read_text(encoding="utf-8")
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        assert re.findall(r"^\[(\w+)\]$", text, re.MULTILINE) == ["Unit", "Service", "Install"]
        assert all(re.fullmatch(r"[A-Z]\w+", key) for key, _ in directives())
        return
    copy = tmp_path / UNIT.name
    copy.write_text(text.replace("/opt/orcd/bin/orcd-worker", sys.executable))  # one that is there
    done = subprocess.run([analyze, "verify", "--man=no", str(copy)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.requirement("WORKER-4903")
def test_the_filter_leaves_what_the_worker_gives_up_privileges_with() -> None:
    filters = values("SystemCallFilter")
    assert filters == ["@system-service", "~@privileged", "capset"]  # in this order: each line amends those before
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        return
    allowed = calls(analyze, "@system-service") - calls(analyze, "@privileged") | {"capset"}
    assert {"capset", "capget", "prctl", "prlimit64", "umask", "flock", "pidfd_open", "pidfd_send_signal"} <= allowed
    assert {"ioctl", "mbind", "sched_setaffinity", "memfd_create", "mprotect", "clone3"} <= allowed
    assert not {"ptrace", "mount", "bpf", "setuid", "chown", "init_module", "kexec_load"} & allowed


def calls(analyze: str, group: str) -> set[str]:
    """The system calls of a group, those of its own groups included."""
    done = subprocess.run([analyze, "syscall-filter", group], capture_output=True, text=True, check=True)
    found: set[str] = set()
    for name in (line.strip() for line in done.stdout.splitlines()[1:]):
        if name and not name.startswith("#"):
            found |= calls(analyze, name) if name.startswith("@") else {name}
    return found
