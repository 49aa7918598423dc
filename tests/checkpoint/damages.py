"""What can happen to a file of a checkpoint."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path


def flip_bit(path: Path, bit: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[bit // 8] ^= 1 << bit % 8
    path.write_bytes(raw)


def files_below(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


def make_link(path: Path) -> None:
    kept = path.rename(path.with_name("kept"))
    path.symlink_to(kept)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the path of a socket is at most 108 bytes
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path.name)
    finally:
        os.chdir(here)


def replaced(make: Callable[[Path], None]) -> Callable[[Path], None]:
    """Removes a file and makes something else of its name."""

    def replace(path: Path) -> None:
        path.unlink()
        make(path)

    return replace
