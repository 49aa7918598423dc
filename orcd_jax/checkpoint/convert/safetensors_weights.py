"""Weights of a Hugging Face directory: which tensors its safetensors files hold, and their values.

No pickle is read: weights in other files are refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from orcd_jax.checkpoint.convert.huggingface_files import check_values, read_json, refuse, unreadable
from orcd_jax.checkpoint.convert.source import shown
from orcd_jax.checkpoint.regular_file import open_regular

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
MAX_FILES = 1_000
MAX_TENSORS = 10_000
MAX_HEADER_BYTES = 16 * 1024 * 1024  # a tensor takes some 130
MAX_HEADER_VALUES = 250_000  # a tensor takes a dozen
COMPARED_ELEMENTS = 2**22

_TENSOR_NAME = re.compile(r"[A-Za-z0-9_.\-]{1,256}")
# Stored by old versions of transformers; recomputed from the configuration here.
_BUFFERS = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
_DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies.

    Attributes:
      kind: its dtype in safetensors' words, such as ``BF16``.
    """

    path: Path
    shape: tuple[int, ...]
    kind: str


def find_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of ``model.safetensors``, or of the shards that the index names.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, naming the file and the tensor.
    """
    found: dict[str, StoredTensor] = {}
    for path in _weight_files(directory):
        _check_header(path)
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - not a dict
                    if not _TENSOR_NAME.fullmatch(name):
                        raise refuse(path.name, f"tensor {shown(name)}: a name is 1 to 256 of A-Z a-z 0-9 _ . -")
                    if len(found) == MAX_TENSORS:
                        raise refuse(path.name, f"there are more than {MAX_TENSORS} tensors")
                    kind = str(file.get_slice(name).get_dtype())
                    if _BUFFERS.fullmatch(name):
                        continue
                    if name in found:
                        raise refuse(path.name, f"tensor {shown(name)} is in {found[name].path.name} too")
                    if kind not in _DTYPES:
                        raise refuse(
                            path.name,
                            f"tensor {shown(name)} is of type {kind}; supported are {', '.join(sorted(_DTYPES))}",
                        )
                    found[name] = StoredTensor(path, tuple(file.get_slice(name).get_shape()), kind)
        except (SafetensorError, OSError) as error:
            raise unreadable(path, error) from None
    if not found:
        raise refuse(directory.name, "its safetensors files hold no tensor")
    return found


def _weight_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS_FILE).is_file():
        return [directory / WEIGHTS_FILE]
    if not (directory / INDEX_FILE).is_file():
        others = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
        hint = f"; {shown(others[0])} is a pickle, which may run code: save it as safetensors" if others else ""
        raise refuse(directory.name, f"it has neither {WEIGHTS_FILE} nor {INDEX_FILE}{hint}")
    places = read_json(directory / INDEX_FILE).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise refuse(INDEX_FILE, "weight_map is missing")
    names = sorted({str(name) for name in places.values()})
    if len(names) > MAX_FILES:
        raise refuse(INDEX_FILE, f"it names {len(names)} files; the limit is {MAX_FILES}")
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9._-]+\.safetensors", name):
            raise refuse(INDEX_FILE, "weight_map names a file that is not NAME.safetensors in the same folder")
        if not (directory / name).is_file():
            raise refuse(INDEX_FILE, f"{name} is missing: download the model again")
    return [directory / name for name in names]


def _check_header(path: Path) -> None:
    """The library takes a header of 100 MB, with a second and 100 MB for each ten of them."""
    try:
        with open_regular(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, MAX_HEADER_BYTES))
    except OSError as error:
        raise unreadable(path, error) from None
    if length > MAX_HEADER_BYTES and len(header) == MAX_HEADER_BYTES:
        raise refuse(path.name, f"its header has {length} bytes; the limit is {MAX_HEADER_BYTES}")
    check_values(path, header, MAX_HEADER_VALUES)


def read_tensor(tensor: StoredTensor, name: str) -> NDArray[np.generic]:
    """A tensor's values, as stored.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when they can no longer be read.
    """
    try:
        with safe_open(tensor.path, framework="np") as file:
            values: NDArray[np.generic] = file.get_tensor(name)
            return values
    except (SafetensorError, OSError) as error:
        raise unreadable(tensor.path, error) from None


def same_matrices(tensors: Mapping[str, StoredTensor], one: str, other: str, shape: tuple[int, int]) -> bool:
    """Whether two tensors have this shape and equal values. Some rows of them are in memory at a time.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when they can no longer be read.
    """
    if not all(name in tensors and tensors[name].shape == shape for name in (one, other)):
        return False
    rows, columns = shape
    step = -(-COMPARED_ELEMENTS // columns)
    path = tensors[one].path
    try:
        with safe_open(path, framework="np") as first, safe_open(tensors[other].path, framework="np") as second:
            ours, theirs = first.get_slice(one), second.get_slice(other)
            spans = ((start, min(start + step, rows)) for start in range(0, rows, step))
            return all(np.array_equal(ours[start:end], theirs[start:end]) for start, end in spans)
    except (SafetensorError, OSError) as error:
        raise unreadable(path, error) from None
