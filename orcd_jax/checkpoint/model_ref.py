"""What a caller may name as a model, and the directory it stands for (WORKER-4300, WORKER-4320).

    relative/name            below one of the directories that models may be loaded from
    file:relative/name       the same
    file:/absolute/path      a directory, inside one of those; also without ``file:``
    hf:org/repo@rev::file=x  a repository of Hugging Face, pinned: a name, not a thing that a worker loads

A reference is checked in form before the file system is asked, and the place it leads to, links resolved, before
anything there is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from orcd_jax.errors import ErrorCode, OrcdError

MAX_CHARS = 512

_ALLOWED = re.compile(r"[A-Za-z0-9\-_/:.@=]+")
_SCHEME = re.compile(r"([A-Za-z0-9\-_.]+):(.*)")  # a colon further down is a character like another
_HF = re.compile(
    r"(?P<path>[A-Za-z0-9\-_.]+/[A-Za-z0-9\-_.]+)"
    r"(@(?P<revision>(?!/)[A-Za-z0-9\-_./]+))?"
    r"(::file=(?P<file>(?!/)[A-Za-z0-9\-_./]+))?"
)


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A reference that is well formed.

    Attributes:
      scheme: where it leads: the worker's own file system or Hugging Face.
      path: a path without ``.``, ``..`` or empty parts, absolute or relative; for ``hf`` organisation/repository.
      revision: of a repository; None where none is pinned.
      file: in a repository; None where none is named.
    """

    scheme: Literal["file", "hf"]
    path: str
    revision: str | None = None
    file: str | None = None


def parse_model_ref(text: str) -> ModelRef:
    """Reads a reference. The file system is not asked.

    Raises:
      OrcdError: INVALID_PARAMS, with the rule that it breaks.
    """
    if not 1 <= len(text) <= MAX_CHARS:
        raise _invalid(f"{len(text)} characters; it must have 1 to {MAX_CHARS}")
    if not _ALLOWED.fullmatch(text):
        raise _invalid("not all of its characters are allowed; they may be A-Z a-z 0-9 - _ / : . @ =")
    named = _SCHEME.fullmatch(text)
    scheme, rest = named.groups() if named else ("file", text)
    if scheme == "file":
        _check_parts(rest)
        return ModelRef("file", rest)
    if scheme == "hf":
        if (match := _HF.fullmatch(rest)) is None:
            raise _invalid("of Hugging Face it must be hf:org/repo, with @revision or ::file=name after it")
        for path in filter(None, match.groupdict().values()):
            _check_parts(path)
        return ModelRef("hf", **match.groupdict())
    raise _invalid("its scheme is not known; it must be a path, file:path or hf:org/repo")


def resolve(ref: ModelRef, *, allowed: Sequence[Path]) -> Path:
    """The directory that a reference stands for, canonical, inside one of ``allowed``.

    Where it leads is decided once, here; what is there is opened later, under the path returned. Whoever may rename
    folders inside an allowed directory can put another model there in between, or a link to one outside. Such a
    model still has to prove itself: links among its files are refused, and every byte is compared with its manifest.
    So what a race can win is a model that is whole; that it is the one meant, ``expected_digest`` tells.

    Args:
      ref: the reference.
      allowed: directories that models may be loaded from: each a model's own, or a folder of models. A relative
        reference is looked for in each, in this order.

    Raises:
      OrcdError: POLICY_VIOLATION, when it leads out of all of them, whether anything is there or not;
        MODEL_LOAD_FAILED, when there is no directory, or it is one of Hugging Face.
    """
    if ref.scheme == "hf":
        raise OrcdError(
            ErrorCode.MODEL_LOAD_FAILED,
            "model_ref: this worker loads converted checkpoints: download the repository, convert it with "
            "tools/convert_hf.py and name the directory",
            field="model_ref",
        )
    roots = [_canonical(root) for root in allowed]
    if not roots:
        raise _outside()
    for root in roots:  # all alike, for an absolute path
        place = _canonical(root / ref.path)
        if not any(place.is_relative_to(inside) for inside in roots):
            raise _outside()
        if os.path.isdir(place):  # noqa: PTH112 - pathlib's raises for a name that is too long
            return place
    raise OrcdError(
        ErrorCode.MODEL_LOAD_FAILED,
        "model_ref: no such directory where models may be loaded from: check the name, and that the model is converted",
        field="model_ref",
    )


def _canonical(path: Path) -> Path:
    """Absolute, links resolved as far as there is anything. A loop of links stays as it is: no directory."""
    return Path(os.path.realpath(path))


def _check_parts(path: str) -> None:
    if any(part in ("", ".", "..") for part in path.removeprefix("/").split("/")):
        raise _invalid("a part of its path is empty, . or ..; write the path without")


def _invalid(problem: str) -> OrcdError:
    return OrcdError(ErrorCode.INVALID_PARAMS, f"model_ref: {problem}", field="model_ref")


def _outside() -> OrcdError:
    return OrcdError(
        ErrorCode.POLICY_VIOLATION,
        "model_ref: it must lead, links resolved, into a directory that models may be loaded from "
        "(--model_path, --model_root)",
        field="model_ref",
    )
