"""The example configurations are read by the parser that a worker uses, and each key is a flag."""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from pathlib import Path

import pytest

from orcd_jax.command_line import parse
from orcd_jax.config import WorkerConfig

CONFIGS = Path(__file__).parent.parent / "configs"
TOML, JSON = CONFIGS / "worker.toml", CONFIGS / "worker.json"


def parsed(file: Path, folder: Path) -> WorkerConfig:
    """As ``orcd-worker --config=FILE`` reads it, whatever the umask of this checkout was."""
    copy = Path(shutil.copy(file, folder))
    copy.chmod(0o644)
    config = parse(["orcd-worker", f"--config={copy}"], {})
    assert config is not None
    return config


def keys(file: Path) -> set[str]:
    text = file.read_text(encoding="utf-8")
    return set(tomllib.loads(text) if file.suffix == ".toml" else json.loads(text))


@pytest.mark.requirement("WORKER-4982")
@pytest.mark.parametrize("file", [TOML, JSON], ids=lambda file: file.name)
def test_an_example_is_valid_and_has_no_key_but_flags(file: Path, tmp_path: Path) -> None:
    parsed(file, tmp_path)
    assert keys(file) <= set(WorkerConfig.model_fields)


def test_there_is_an_example_for_a_pool_and_one_for_a_desk(tmp_path: Path) -> None:
    pool, desk = parsed(TOML, tmp_path), parsed(JSON, tmp_path)
    assert (pool.platform, pool.standalone) == ("cuda", False)
    assert (desk.platform, desk.standalone, desk.emulated_memory) == ("cpu", True, 8 * 2**30)


def test_what_is_commented_out_is_a_flag_too() -> None:
    found = re.findall(r"^# (\w+) = ", TOML.read_text(encoding="utf-8"), re.MULTILINE)
    assert found
    assert set(found) <= set(WorkerConfig.model_fields)


def test_an_example_holds_no_secret_and_no_default_that_is_not_the_worker_s(tmp_path: Path) -> None:
    config = parsed(TOML, tmp_path)
    for name in ("callback_deadline", "drain_timeout_ms", "watchdog_timeout", "max_restarts", "audit_fsync"):
        assert getattr(config, name) == WorkerConfig.model_fields[name].default, name
    assert not re.search(r"[0-9a-fA-F]{32}", TOML.read_text(encoding="utf-8"))
