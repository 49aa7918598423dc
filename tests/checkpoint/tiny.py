"""A source of weights in memory, converted in a moment, and the digests of ``docs/checkpoint.md`` by hand.

Nothing in the second half imports the code under test: it is what anyone could write from the document.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.checkpoint.convert.write import write_checkpoint
from orcd_jax.checkpoint.manifest import Manifest, TokenizerEntry
from orcd_jax.models.config import LlamaConfig

CONFIG = LlamaConfig(
    vocab_size=24,
    hidden_size=16,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    mlp_size=12,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    tied_embeddings=False,
    context_max=64,
    dtype="float32",
)
TOKENIZER = TokenizerEntry(kind="bpe_byte_level", bos_id=1, eos_ids=(2,), add_bos=False)
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def config(**changes: object) -> LlamaConfig:
    """``CONFIG`` with some fields changed, validated again."""
    return LlamaConfig.model_validate({**dict(CONFIG), **changes})


def random_weights(config: LlamaConfig, seed: int = 0) -> dict[str, NDArray[np.generic]]:
    """Float32 arrays under Hugging Face's names."""
    rng = np.random.default_rng(seed)
    shapes = {name: shape for leaf in leaves(config).values() for name, shape in leaf.sources.items()}
    return {name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}


@dataclass(kw_only=True)
class MemorySource:
    """Implements ``WeightSource`` over arrays in memory. Each tensor asked for is a new copy."""

    config: LlamaConfig = CONFIG
    weights: Mapping[str, NDArray[np.generic]] = field(default_factory=dict)
    format: Literal["gguf", "safetensors"] = "gguf"
    model_id: str = "tiny"
    tokenizer: TokenizerEntry = TOKENIZER
    tokenizer_json: bytes = b'{"model": "tiny"}'
    chat_template: str | None = TEMPLATE
    tensor_types: tuple[str, ...] = ("F32",)
    paths: tuple[Path, ...] = ()
    on_tensor: Callable[[str, NDArray[np.generic]], None] = lambda _, __: None

    def __post_init__(self) -> None:
        self.weights = self.weights or random_weights(self.config)

    def names(self) -> frozenset[str]:
        return frozenset(self.weights)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.weights[name].shape

    def tensor(self, name: str) -> NDArray[np.generic]:
        made = self.weights[name].copy()
        self.on_tensor(name, made)
        return made


def convert(source: MemorySource, destination: Path) -> Manifest:
    """Writes a checkpoint of it, template included."""
    return write_checkpoint(source, destination, lambda _: None, chat_template=source.chat_template)


def copied(checkpoint: Path, parent: Path) -> Path:
    """A copy of a shared checkpoint, to damage."""
    return shutil.copytree(checkpoint, parent / "copy")


# -- docs/checkpoint.md, by hand ---------------------------------------------------------------------------------------


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def root_by_hand(data: bytes) -> bytes:
    """Step 1: the tree root of some bytes."""
    while True:
        chunks = [data[start : start + 4096].ljust(4096, b"\0") for start in range(0, max(len(data), 1), 4096)]
        data = b"".join(map(sha256, chunks))
        if len(data) == 32:
            return data


def bytes_by_hand(array: NDArray[np.generic]) -> bytes:
    """The elements in C order, little-endian; a bfloat16 is the upper half of its float32."""
    wide = [np.float32(value).tobytes() for value in array.flat]
    order = slice(None, None, 1 if np.little_endian else -1)
    low = 2 if array.dtype == ml_dtypes.bfloat16 else 0
    return b"".join(raw[order][low:] for raw in wide)


def tensor_by_hand(
    array: NDArray[np.generic], path: str, kind: str = "dense", axis: int | None = None, shards: int = 1
) -> str:
    """Step 2: the tensor digest."""
    shape = ",".join(map(str, array.shape))
    header = (
        f'{{"chunk_bytes":4096,"dtype":"{array.dtype.name}","kind":"{kind}","path":"{path}","shape":[{shape}],'
        f'"shard_axis":{"null" if axis is None else axis},"shards":{shards}}}'
    )
    slices = [array]
    if axis is not None:
        size = array.shape[axis] // shards
        slices = [np.take(array, range(n * size, (n + 1) * size), axis=axis) for n in range(shards)]
    roots = b"".join(root_by_hand(bytes_by_hand(piece)) for piece in slices)
    return sha256(b"orcd-tensor-v1\0" + sha256(header.encode()) + roots).hex()


def model_by_hand(manifest: Mapping[str, object]) -> str:
    """Step 3: the model digest of a manifest.json, as parsed."""
    files, tensors = manifest["files"], manifest["tensors"]
    assert isinstance(files, list)
    assert isinstance(tensors, list)
    header = {
        "config": manifest["config"],
        "tokenizer": manifest["tokenizer"],
        "files": {f["path"]: f["sha256"] for f in files if not f["path"].startswith("arrays/")},
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    digests = b"".join(bytes.fromhex(t["digest"]) for t in sorted(tensors, key=lambda t: str(t["path"])))
    return sha256(b"orcd-model-v1\0" + sha256(text.encode()) + digests).hex()


def edit_manifest(checkpoint: Path, edit: Callable[[dict[str, object]], object], *, repair: bool = True) -> None:
    """Changes a manifest.json; then gives it the model digest it should have, unless told not to."""
    path = checkpoint / "manifest.json"
    value = json.loads(path.read_text())
    edit(value)
    if repair:
        value["digest"] = model_by_hand(value)
    path.write_text(json.dumps(value))


def list_files(checkpoint: Path) -> None:
    """Lets a checkpoint's manifest tell the truth about its files again, whoever changed them."""
    found = sorted((path.relative_to(checkpoint).as_posix(), path) for path in checkpoint.rglob("*") if path.is_file())
    files = [
        {"path": name, "size_bytes": path.stat().st_size, "sha256": sha256(path.read_bytes()).hex()}
        for name, path in found
        if name != "manifest.json"
    ]
    edit_manifest(checkpoint, lambda value: value.update(files=files))
