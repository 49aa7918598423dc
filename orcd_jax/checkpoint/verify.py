"""Proves a checkpoint: every file before it is parsed, every array after it lies on the device.

Orbax does not notice corrupt array data, so neither check can be left out: the first finds what changed on disk before
anything is loaded, the second what changed on the way.
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from orcd_jax.checkpoint.digest import entry_digest, file_digest
from orcd_jax.checkpoint.manifest import MANIFEST_FILE, MAX_FILES, FileEntry, Manifest, tensor_bytes
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.errors import ErrorCode, OrcdError

if TYPE_CHECKING:  # it imports JAX, which a check of files does without
    from orcd_jax.models.registry import Params

OnProgress = Callable[[Progress], None]


def verify_files(
    directory: Path, manifest: Manifest, on_progress: OnProgress, on_file: Callable[[FileEntry], None] = lambda _: None
) -> None:
    """Compares every file with the manifest: nothing missing, nothing unlisted, no links, each SHA-256 equal.

    A link, symbolic or hard, is refused even where its content is right: under its other name the content can be
    changed from outside the directory, after it was checked.

    Args:
      directory: the checkpoint.
      manifest: what must be there.
      on_progress: called with the bytes hashed so far.
      on_file: called with each file that is as listed, from several threads.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, naming the first file that differs.
    """
    listed = {entry.path: entry for entry in manifest.files}
    present = _files_below(directory)
    for path in sorted(listed.keys() - present):
        raise _differs(path, "is missing")
    for path in sorted(present - listed.keys() - {MANIFEST_FILE}):
        raise _differs(path, "is not listed in manifest.json")
    total, done, lock = sum(entry.size_bytes for entry in manifest.files), 0, threading.Lock()

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            on_progress(Progress("verify_files", done, total))

    def check(entry: FileEntry) -> None:
        try:
            size = (directory / entry.path).stat().st_size
            if size != entry.size_bytes:
                raise _differs(entry.path, f"has {size} bytes instead of {entry.size_bytes}")
            if file_digest(directory / entry.path, advance) != (entry.size_bytes, entry.sha256):
                raise _differs(entry.path, "has another SHA-256")
            on_file(entry)
        except OSError as error:
            raise _differs(entry.path, f"cannot be read ({error.strerror})") from None

    on_progress(Progress("verify_files", 0, total))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="verify") as pool:
        try:
            list(pool.map(check, manifest.files))
        finally:
            pool.shutdown(cancel_futures=True)  # after one that differs, the others need no reading


def read_verified(directory: Path, manifest: Manifest, name: str, most: int) -> bytes | None:
    """The bytes of a listed file, compared with the manifest as they are; None when it lists no such file.

    What is used are the bytes that were compared: a file that is exchanged after ``verify_files`` is found here.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when there are more than ``most``, they differ, or they cannot be read.
    """
    entry = next((entry for entry in manifest.files if entry.path == name), None)
    if entry is None:
        return None
    if entry.size_bytes > most:
        raise _differs(name, f"has {entry.size_bytes} bytes, over the limit of {most}")
    try:
        with (directory / name).open("rb") as file:
            raw = file.read(entry.size_bytes + 1)
    except OSError as error:
        raise _differs(name, f"cannot be read ({error.strerror})") from None
    if len(raw) != entry.size_bytes or hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise _differs(name, "was changed while the model was loaded")
    return raw


def verify_arrays(manifest: Manifest, params: Params, on_progress: OnProgress) -> None:
    """Recomputes the digest of every array from the device's own bytes and compares it with the manifest.

    Raises:
      OrcdError: SEAL_VERIFICATION_FAILED, naming the first tensor that differs.
    """
    total, done = manifest.weight_bytes, 0
    on_progress(Progress("verify_arrays", 0, total))
    for entry in manifest.tensors:
        try:
            same = entry_digest(entry, np.asarray(params[entry.path])) == entry.digest
        except ValueError:
            same = False
        if not same:
            raise OrcdError(
                ErrorCode.SEAL_VERIFICATION_FAILED,
                f"tensor {entry.path} on the device is not the one in manifest.json",
                field=entry.path,
            )
        done += tensor_bytes(entry)
        on_progress(Progress("verify_arrays", done, total))


def _files_below(directory: Path) -> set[str]:
    """Relative paths of all files.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, at a link or anything else that is not a plain file, and at too many of them.
    """
    found: set[str] = set()
    folders = [directory]
    try:
        while folders:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    path, status = Path(entry.path), entry.stat(follow_symlinks=False)
                    name = path.relative_to(directory).as_posix()
                    if stat.S_ISDIR(status.st_mode):
                        folders.append(path)
                    elif not stat.S_ISREG(status.st_mode):
                        raise _differs(name, "is a link or a special file")
                    elif status.st_nlink > 1:
                        raise _differs(name, f"has {status.st_nlink} names (hard links), and may have one")
                    elif len(found) > MAX_FILES:  # the listed ones and the manifest
                        raise _differs(name, f"is one too many: there may be {MAX_FILES}")
                    else:
                        found.add(name)
    except OSError as error:
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            f"the model directory cannot be read ({error.strerror}): check its permissions",
            field="model_path",
        ) from None
    return found


def _differs(path: str, how: str) -> OrcdError:
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in path[:120])
    return OrcdError(
        ErrorCode.MODEL_LOAD_FAILED,
        f"the checkpoint's file {shown} {how}: copy or convert it again",
        field="model_path",
    )
