"""What compiled programs said of their memory, kept on disk for the next plan of the same programs.

A record is a JSON file of its own in a directory that only its owner can use, named by the plan key: the SHA-256 of
all that decides compilation and is known without compiling. What is read is checked as a stranger's would be; a file
that is not right is ignored, with a reason, and the plan falls back to the bound.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from orcd_jax import __version__
from orcd_jax.checkpoint.manifest import canonical_json
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.config import LlamaConfig
from orcd_jax.residency.bounds import Sizes, workspace_peak

if TYPE_CHECKING:  # a plan that is only read needs no JAX
    import jax

MAX_FILE_BYTES = 64 * 1024
MAX_FILES = 64
"""Records that are kept; beyond them the oldest go."""
STEPS = frozenset({"prefill", "decode"})
"""Programs of which two may be in flight at a time."""
STALE_PART_S = 3600.0
"""Age at which a file that was never finished is removed."""

_DISTRIBUTIONS = ("jax", "jaxlib", "flax", *(f"jax-cuda{n}-{part}" for n in (12, 13) for part in ("plugin", "pjrt")))
_KEY = re.compile(r"[0-9a-f]{64}")

Bytes = Annotated[int, Field(ge=0, lt=2**53)]
ProgramName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:/-]{1,64}$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ProgramMemory(_Strict):
    """What one compiled program says of its memory. The ``host_`` fields must be 0 wherever residency is claimed.

    Attributes:
      temp_bytes: temporaries, while it runs.
      output_bytes: results, those that reuse a donated input included.
      argument_bytes: inputs.
      alias_bytes: results that reuse a donated input.
      code_bytes: the code itself.
    """

    temp_bytes: Bytes
    output_bytes: Bytes
    argument_bytes: Bytes
    alias_bytes: Bytes
    code_bytes: Bytes
    host_temp_bytes: Bytes
    host_output_bytes: Bytes
    host_argument_bytes: Bytes
    host_alias_bytes: Bytes
    host_code_bytes: Bytes

    @classmethod
    def of(cls, program: jax.stages.Compiled) -> ProgramMemory:
        """What ``program`` says.

        Raises:
          OrcdError: INTERNAL, when the backend has no such analysis.
        """
        said = program.memory_analysis()
        if said is None:
            raise OrcdError(ErrorCode.INTERNAL, "the compiler says nothing of a program's memory")
        return cls(
            temp_bytes=said.temp_size_in_bytes,
            output_bytes=said.output_size_in_bytes,
            argument_bytes=said.argument_size_in_bytes,
            alias_bytes=said.alias_size_in_bytes,
            code_bytes=said.generated_code_size_in_bytes,
            host_temp_bytes=said.host_temp_size_in_bytes,
            host_output_bytes=said.host_output_size_in_bytes,
            host_argument_bytes=said.host_argument_size_in_bytes,
            host_alias_bytes=said.host_alias_size_in_bytes,
            host_code_bytes=said.host_generated_code_size_in_bytes,
        )

    @property
    def host_bytes(self) -> int:
        """Host memory it asks for, in all."""
        return (
            self.host_temp_bytes
            + self.host_output_bytes
            + self.host_argument_bytes
            + self.host_alias_bytes
            + self.host_code_bytes
        )


class Analysis(_Strict):
    """What all programs of a worker say of their memory, by name."""

    programs: Annotated[dict[ProgramName, ProgramMemory], Field(max_length=64)]

    @model_validator(mode="after")
    def _has_the_steps(self) -> Analysis:
        if missing := STEPS - self.programs.keys():
            raise ValueError(f"without {', '.join(sorted(missing))}")
        return self

    @classmethod
    def of(cls, programs: Mapping[str, jax.stages.Compiled]) -> Analysis:
        """The analysis of compiled programs."""
        return cls(programs={name: ProgramMemory.of(program) for name, program in programs.items()})

    def workspace_bytes(self, sizes: Sizes) -> int:
        """Workspace of all programs together: ``recorded_bytes`` of :func:`budget.plan_memory`.

        Args:
          sizes: those the programs were compiled for.
        """
        transient = {name: _transient(name, program) for name, program in self.programs.items()}
        return workspace_peak(
            sizes,
            steps=[size for name, size in transient.items() if name in STEPS],
            others=[size for name, size in transient.items() if name not in STEPS],
            code_bytes=sum(program.code_bytes for program in self.programs.values()),
        )


def _transient(name: str, program: ProgramMemory) -> int:
    """What it takes beside its arguments. The output of ``init`` is the decode state, which the plan counts itself."""
    made = 0 if name == "init" else max(0, program.output_bytes - program.alias_bytes)
    return program.temp_bytes + made


def plan_key(
    config: LlamaConfig,
    sizes: Sizes,
    *,
    device_kind: str,
    xla_flags: str,
    versions: Mapping[str, str] | None = None,
) -> str:
    r"""The key under which an analysis is recorded: 64 hex digits.

    SHA-256 of ``"orcd-plan-v1\0"`` and the canonical JSON of everything below and of this package's version.

    Args:
      config: the model.
      sizes: of the worker.
      device_kind: the vendor's name of the device.
      xla_flags: the value of ``XLA_FLAGS``, with which the programs are compiled.
      versions: of what compiles; None: :func:`installed_versions`.
    """
    decides = {
        "config": config.model_dump(mode="json"),
        "sizes": asdict(sizes),
        "device_kind": device_kind,
        "xla_flags": xla_flags.split(),
        "versions": dict(installed_versions() if versions is None else versions),
        "orcd-jax": __version__,
    }
    return hashlib.sha256(b"orcd-plan-v1\0" + canonical_json(decides)).hexdigest()


def installed_versions() -> dict[str, str]:
    """Versions of the libraries that trace and compile, as they are installed. Imports none of them."""
    versions = {}
    for name in _DISTRIBUTIONS:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


class _Record(_Strict):
    """The content of a file. It repeats its key, so that a file under another's name is found out."""

    format: Literal["orcd-memory-analysis"] = "orcd-memory-analysis"
    format_version: Literal[1] = 1
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    analysis: Analysis


def record(directory: Path, key: str, analysis: Analysis) -> None:
    """Keeps ``analysis`` under ``key``, in the place of what was there. Whole or not at all.

    Raises:
      OrcdError: INVALID_PARAMS, when the directory is not private or cannot be written. The worker can do without.
    """
    path = _path(directory, key)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_private(directory)
        _replace(path, _Record(key=key, analysis=analysis).model_dump_json().encode())
        _tidy(directory, keep=path)
    except OSError as error:
        raise _refusal(f"cannot be written ({error.strerror or type(error).__name__})") from None
    except _Refused as refused:
        raise _refusal(str(refused)) from None


def recall(directory: Path, key: str, on_ignored: Callable[[str], None] = lambda _: None) -> Analysis | None:
    """What is recorded under ``key``; None when nothing is, or nothing that can be trusted.

    Args:
      directory: as :func:`record` left it.
      key: from :func:`plan_key`.
      on_ignored: told why a file that is there is not used, in words for a log.
    """
    path = _path(directory, key)
    try:
        if not os.path.lexists(path):
            return None
        _check_private(directory)
        read = _Record.model_validate_json(_read(path))
        if read.key == key:
            return read.analysis
        problem = "holds the record of other programs under this name"
    except OSError as error:
        problem = f"cannot be read ({error.strerror or type(error).__name__})"
    except _Refused as refused:
        problem = str(refused)
    except ValidationError:
        problem = "holds a record that is not in the known form"
    on_ignored(f"the folder of recorded plans {problem}: the plan uses the bound")
    return None


class _Refused(Exception):
    """What is wrong with the folder or a file in it."""


def _path(directory: Path, key: str) -> Path:
    if not _KEY.fullmatch(key):
        raise ValueError("a plan key has 64 hex digits")
    return directory / f"{key}.json"


def _check_private(directory: Path) -> None:
    status = directory.stat()
    if not stat.S_ISDIR(status.st_mode):
        raise _Refused("is not a directory")
    if status.st_uid != os.geteuid():
        raise _Refused("belongs to another user")
    if status.st_mode & 0o077:
        raise _Refused(f"can be used by others (mode {stat.S_IMODE(status.st_mode):04o}; run `chmod 700` on it)")


def _read(path: Path) -> bytes:
    # Without O_NONBLOCK a named pipe would hold the caller forever.
    opened = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    with os.fdopen(opened, "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise _Refused("holds something that is not a regular file")
        if status.st_uid != os.geteuid() or status.st_mode & 0o022:
            raise _Refused("holds a file that others can write")
        if status.st_size > MAX_FILE_BYTES:
            raise _Refused(f"holds a file of more than {MAX_FILE_BYTES} bytes")
        return file.read(MAX_FILE_BYTES)


def _replace(path: Path, data: bytes) -> None:
    part = path.with_name(f".{secrets.token_hex(8)}.part")
    opened = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(opened, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _tidy(directory: Path, keep: Path) -> None:
    """Removes the oldest records beyond the limit, and what a killed process left unfinished."""
    records: list[tuple[float, Path]] = []
    for path in directory.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another worker tidies too
            changed = path.lstat().st_mtime
            if path.suffix == ".part" and path.name.startswith("."):
                if time.time() - changed > STALE_PART_S:
                    path.unlink()
            elif path.suffix == ".json" and _KEY.fullmatch(path.stem) and path != keep:
                records.append((changed, path))
    for _, path in sorted(records)[: max(0, len(records) + 1 - MAX_FILES)]:
        path.unlink(missing_ok=True)


def _refusal(problem: str) -> OrcdError:
    return OrcdError(
        ErrorCode.INVALID_PARAMS,
        f"--state_dir: the folder of recorded plans {problem}: the worker must own it alone",
        field="state_dir",
    )
