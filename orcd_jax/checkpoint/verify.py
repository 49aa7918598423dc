"""Proves a checkpoint's files before anything of them is parsed.

Orbax does not notice corrupt array data. What changes on the way from these files to the device, and whatever is done
to them after they were looked at, the proof of the arrays finds (``residency.prover``).
"""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from orcd_jax.checkpoint.digest import file_digest
from orcd_jax.checkpoint.manifest import MANIFEST_FILE, MAX_FILES, FileEntry, Manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.regular_file import open_listed
from orcd_jax.errors import ErrorCode, OrcdError

MAX_OVERHEAD_BYTES = 16 * 2**30
"""What all files may have beyond twice the weights. What is written takes some 140 bytes times the square of the number
of arrays, and a tokenizer; a sparse file may claim petabytes, and would be read to its end."""

OnProgress = Callable[[Progress], None]


def verify_files(
    directory: Path, manifest: Manifest, on_progress: OnProgress, on_file: Callable[[FileEntry], None] = lambda _: None
) -> None:
    """Compares every file with the manifest: nothing missing, nothing unlisted, no links, each SHA-256 equal.

    A link, symbolic or hard, is refused even where its content is right: under its other name the content can be
    changed from outside the directory, after it was checked. A folder is listed when a file in it is.

    Args:
      directory: the checkpoint.
      manifest: what must be there.
      on_progress: called with the bytes hashed so far.
      on_file: called with each file that is as listed, from several threads.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, naming the first file that differs.
    """
    total, done, lock = sum(entry.size_bytes for entry in manifest.files), 0, threading.Lock()
    if total > (most := 2 * manifest.weight_bytes + MAX_OVERHEAD_BYTES):
        largest = max(manifest.files, key=lambda entry: entry.size_bytes)
        raise _differs(
            largest.path, f"makes them {total} bytes; {manifest.weight_bytes} of weights take at most {most}"
        )
    listed = {entry.path for entry in manifest.files}
    files, folders = _below(directory)
    for path in sorted(listed - files):
        raise _differs(path, "is missing")
    for path in *sorted(files - listed - {MANIFEST_FILE}), *sorted(folders - _folders_of(listed)):
        raise _differs(path, "is not listed in manifest.json")

    def advance(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            on_progress(Progress("verify_files", done, total))

    def check(entry: FileEntry) -> None:
        try:
            with open_listed(directory, entry.path) as file:
                size = os.fstat(file.fileno()).st_size
                if size != entry.size_bytes:
                    raise _differs(entry.path, f"has {size} bytes instead of {entry.size_bytes}")
                if file_digest(file, advance) != (entry.size_bytes, entry.sha256):
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
        with open_listed(directory, name) as file:
            raw = file.read(entry.size_bytes + 1)
    except OSError as error:
        raise _differs(name, f"cannot be read ({error.strerror})") from None
    if len(raw) != entry.size_bytes or hashlib.sha256(raw).hexdigest() != entry.sha256:
        raise _differs(name, "was changed while the model was loaded")
    return raw


def _below(directory: Path) -> tuple[set[str], set[str]]:
    """Relative paths of all files, and of all folders.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, at a link or anything else that is not a regular file, and at too many of them.
    """
    files: set[str] = set()
    folders: set[str] = set()
    left = [directory]
    try:
        while left:
            with os.scandir(left.pop()) as entries:
                for entry in entries:
                    path, status = Path(entry.path), entry.stat(follow_symlinks=False)
                    name = path.relative_to(directory).as_posix()
                    if stat.S_ISDIR(status.st_mode):
                        folders.add(name)
                        left.append(path)
                    elif not stat.S_ISREG(status.st_mode):
                        raise _differs(name, "is a link or a special file")
                    elif status.st_nlink > 1:
                        raise _differs(name, f"has {status.st_nlink} names (hard links), and may have one")
                    else:
                        files.add(name)
                    if max(len(files) - 1, len(folders)) > MAX_FILES:  # the manifest is not among those listed
                        raise _differs(name, f"is one too many: there may be {MAX_FILES}")
    except OSError as error:
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            f"the model directory cannot be read ({error.strerror}): check its permissions",
            field="model_path",
        ) from None
    return files, folders


def _folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder above these files."""
    found: set[str] = set()
    for path in paths:
        above = path.rpartition("/")[0]
        while above and above not in found:
            found.add(above)
            above = above.rpartition("/")[0]
    return found


def _differs(path: str, how: str) -> OrcdError:
    shown = "".join(c if c.isascii() and c.isprintable() else "?" for c in path[:120])
    return OrcdError(
        ErrorCode.MODEL_LOAD_FAILED,
        f"the checkpoint's file {shown} {how}: copy or convert it again",
        field="model_path",
    )
