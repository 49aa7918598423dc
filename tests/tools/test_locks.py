"""The locks: everything pinned by hash, and no word about where or on which machine they were made."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

REQUIREMENTS = Path(__file__).parents[2] / "requirements"
LOCKS = sorted(REQUIREMENTS.glob("*.txt"))


def entries(lock: Path) -> list[str]:
    """The lock's requirements, each with its hashes on one line."""
    text = re.sub(r"#.*", "", lock.read_text(encoding="utf-8")).replace("\\\n", " ")
    return [line for line in text.splitlines() if line.strip()]


def versions(lock: Path) -> set[str]:
    return {entry.split(" --hash")[0].strip() for entry in entries(lock)}


def test_the_locks_are_the_documented_ones() -> None:
    assert [lock.name for lock in LOCKS] == ["demo-model.txt", "dev.txt", "runtime.txt"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_every_requirement_has_one_version_and_its_hashes(lock: Path) -> None:
    for entry in entries(lock):
        assert re.match(r"[a-z0-9._-]+(\[[a-z0-9,]+\])?==[^ ]+ .*--hash=sha256:[0-9a-f]{64}", entry), entry[:80]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_no_address_and_no_path_is_in_a_lock(lock: Path) -> None:
    text = lock.read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*(--?(index|extra-index|find-links|trusted)|-[if] )", text, re.MULTILINE)
    assert not re.search(r"(^|\s)(/|~/|\.\./)\w", text)


def test_what_is_tested_is_what_is_installed() -> None:
    assert versions(REQUIREMENTS / "runtime.txt") <= versions(REQUIREMENTS / "dev.txt")


def test_the_locks_hold_what_an_install_without_isolation_needs() -> None:
    names = {entry.split("==")[0] for entry in entries(REQUIREMENTS / "runtime.txt")}
    assert {"hatchling", "editables"} <= names


def test_torch_is_not_locked() -> None:
    names = {entry.split("==")[0] for entry in entries(REQUIREMENTS / "dev.txt")}
    assert "torch" not in names
    assert not {name for name in names if name.startswith("nvidia")}
