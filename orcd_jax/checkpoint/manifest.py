"""The manifest: what a checkpoint directory holds, with every digest needed to prove it.

    DIRECTORY/
      manifest.json          this file's content; written last, so its presence means a finished checkpoint
      arrays/                one Orbax checkpoint of the flat tree {tensor path: array}, in device layout
      tokenizer.json         Hugging Face ``tokenizers`` format
      chat_template.jinja    when the source has one

``digest`` pins everything that decides an answer: the configuration, the tokenizer, the template and each tensor.
``provenance_digest`` covers what decides none, so that no bit of the manifest changes unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from orcd_jax.checkpoint import untrusted_json
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.config import LlamaConfig, WeightDtype

FORMAT = "orcd-checkpoint"
FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
ARRAYS_DIRECTORY = "arrays"
TOKENIZER_FILE = "tokenizer.json"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
MAX_MANIFEST_BYTES = 32 * 1024 * 1024  # what as many files as there may be take
MAX_TENSORS = 10_000
MAX_FILES = 100_000
MAX_MANIFEST_VALUES = 700_000
"""In its JSON: 4 for each file, up to 16 for each tensor, and its history. Unbounded, 32 MB may take 11 GB to parse."""

LEAST_LAYER_TENSORS = 6
"""Of a layer: two norms, and the two matrices each of attention and of the MLP."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Size = Annotated[int, Field(ge=0, lt=2**53)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
Word = Annotated[str, Field(pattern=r"^[a-z0-9_]{1,64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)  # a size is neither "12" nor true


class TensorEntry(_Record):
    """One array of the tree.

    Attributes:
      path: dotted path in the parameter tree, such as ``layers.0.attention.qkv``.
      kind: how the bytes encode weights; ``dense`` is plain elements of ``dtype``.
      shard_axis, shards: the canonical shard grid: the digest is taken over ``shards`` equal slices along
        ``shard_axis`` (None and 1: the whole array), so that any coarser split can be proved shard by shard.
      digest: see ``checkpoint.digest.tensor_digest``.
    """

    path: str = Field(pattern=r"^[a-z0-9_]+(\.[a-z0-9_]+)*$", max_length=256)
    shape: tuple[Annotated[int, Field(ge=1, lt=2**40)], ...] = Field(max_length=8, fail_fast=True)
    dtype: WeightDtype
    kind: Literal["dense"] = "dense"
    shard_axis: int | None = None
    shards: int = Field(default=1, ge=1)
    digest: Sha256

    @model_validator(mode="after")
    def _grid_divides(self) -> TensorEntry:
        if self.shard_axis is None:
            if self.shards != 1:
                raise ValueError("shards needs a shard_axis")
        elif not 0 <= self.shard_axis < len(self.shape) or self.shape[self.shard_axis] % self.shards:
            raise ValueError(f"{self.shards} shards do not divide axis {self.shard_axis} of {self.shape}")
        return self


class FileEntry(_Record):
    """One file below the checkpoint directory (the manifest itself excepted)."""

    path: str = Field(max_length=1024)
    size_bytes: Size
    sha256: Sha256

    @field_validator("path")
    @classmethod
    def _stays_inside(cls, value: str) -> str:
        if "\0" in value or any(part in ("", ".", "..") for part in value.split("/")):
            raise ValueError("a file path must be relative, normalised and inside the checkpoint")
        return value


class ModelCapabilities(_Record):
    """The Model Capability Descriptor (MCD): what a worker must be able to do to run this model (WORKER-4600)."""

    model_id: str = Field(pattern=r"^[A-Za-z0-9\-_/:.@=]{1,512}$")
    architecture: Word
    positional: Word
    attention: Word
    quant: Word
    context_max: int = Field(ge=1)
    vocab_size: int = Field(ge=1)
    tokenizer: Word


class TokenizerEntry(_Record):
    """What the tokenizer file does not say: which ids begin and end a sequence."""

    kind: str
    bos_id: TokenId | None
    eos_ids: tuple[TokenId, ...] = Field(fail_fast=True)
    add_bos: bool


class SourceFile(_Record):
    """One file the checkpoint was converted from."""

    name: str = Field(max_length=1024)
    size_bytes: Size
    sha256: Sha256


class Provenance(_Record):
    """Where the weights came from and what converted them."""

    format: Literal["gguf", "safetensors", "random"]
    files: tuple[SourceFile, ...] = Field(fail_fast=True)
    tensor_types: tuple[str, ...] = Field(fail_fast=True)
    converter: str
    converter_version: str


class Manifest(_Record):
    """The whole content of ``manifest.json``.

    Attributes:
      digest: see ``model_digest``.
      provenance_digest: see ``provenance_digest``; made when it is not given, as in manifests that are older than it.
    """

    format: Literal["orcd-checkpoint"] = "orcd-checkpoint"
    format_version: Annotated[int, Field(ge=FORMAT_VERSION, le=FORMAT_VERSION)] = FORMAT_VERSION  # not true, nor 1.0
    model: ModelCapabilities
    config: LlamaConfig
    tokenizer: TokenizerEntry
    tensors: tuple[TensorEntry, ...] = Field(max_length=MAX_TENSORS, fail_fast=True)
    files: tuple[FileEntry, ...] = Field(max_length=MAX_FILES, fail_fast=True)
    digest: Sha256
    source: Provenance
    provenance_digest: Sha256 = Field(default_factory=lambda given: _made(given))

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        for name, values in (("tensors", [t.path for t in self.tensors]), ("files", [f.path for f in self.files])):
            if values != sorted(set(values)):
                raise ValueError(f"{name} must be unique and sorted by path")
        if any(file.path == MANIFEST_FILE for file in self.files):
            raise ValueError(f"files lists {MANIFEST_FILE}, which cannot hold its own digest")
        if self.model.vocab_size != self.config.vocab_size or self.model.context_max != self.config.context_max:
            raise ValueError("model and config disagree about vocab_size or context_max")
        if any(token >= self.config.vocab_size for token in (*self.tokenizer.eos_ids, self.tokenizer.bos_id or 0)):
            raise ValueError(f"tokenizer names a token that is not below vocab_size {self.config.vocab_size}")
        if self.config.num_layers * LEAST_LAYER_TENSORS > len(self.tensors):  # before each layer is described
            raise ValueError(f"config has {self.config.num_layers} layers and there are {len(self.tensors)} tensors")
        if self.digest != model_digest(self.config, self.tokenizer, self.files, self.tensors):
            raise ValueError("digest does not match the manifest's own content")
        if self.provenance_digest != provenance_digest(self.model, self.source):
            raise ValueError("provenance_digest does not match model_id and source")
        return self

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors together, as they lie in device memory."""
        return sum(tensor_bytes(t) for t in self.tensors)


def tensor_bytes(entry: TensorEntry) -> int:
    """Bytes of one tensor."""
    count = 4 if entry.dtype == "float32" else 2
    for size in entry.shape:
        count *= size
    return count


def canonical_json(value: object) -> bytes:
    """UTF-8 JSON with sorted keys and no white space: the form in which JSON is hashed."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def model_digest(
    config: LlamaConfig, tokenizer: TokenizerEntry, files: Sequence[FileEntry], tensors: Sequence[TensorEntry]
) -> str:
    r"""The model digest: SHA-256 over what decides an answer.

        SHA-256( "orcd-model-v1\0" ‖ SHA-256(canonical JSON of {config, tokenizer, files}) ‖ tensor digests )

    ``files`` maps each file outside ``arrays/`` to its SHA-256; tensor digests are 32 raw bytes each, in path order.
    """
    header = {
        "config": config.model_dump(mode="json"),
        "tokenizer": tokenizer.model_dump(mode="json"),
        "files": {f.path: f.sha256 for f in files if not f.path.startswith(ARRAYS_DIRECTORY + "/")},
    }
    outer = hashlib.sha256(b"orcd-model-v1\0")
    outer.update(hashlib.sha256(canonical_json(header)).digest())
    for tensor in sorted(tensors, key=lambda entry: entry.path):
        outer.update(bytes.fromhex(tensor.digest))
    return outer.hexdigest()


def provenance_digest(model: ModelCapabilities, source: Provenance) -> str:
    """SHA-256 of the canonical JSON of ``{model_id, source}``, which decide no answer and are not in the model digest.

    It shows damage. It shows no tampering: who writes a manifest writes this too.
    """
    named = {"model_id": model.model_id, "source": source.model_dump(mode="json")}
    return hashlib.sha256(canonical_json(named)).hexdigest()


def _made(given: Mapping[str, object]) -> str:
    """The digest of fields that were valid; where one was not, the manifest is refused for that."""
    model, source = given.get("model"), given.get("source")
    if isinstance(model, ModelCapabilities) and isinstance(source, Provenance):
        return provenance_digest(model, source)
    return ""


def read_manifest(directory: Path) -> Manifest:
    """Reads and validates ``manifest.json``.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when it is missing, too large, not JSON, of another version, or inconsistent.
    """
    return parse_manifest(read_manifest_bytes(directory))


def read_manifest_bytes(directory: Path) -> bytes:
    """The content of ``manifest.json``: what a signature is over.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when it is missing or too large.
    """
    path = directory / MANIFEST_FILE
    try:
        # A pipe would wait for its writer, a device may never end.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _failed("manifest.json is not a plain file")
            raw = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        raise _failed(
            "no manifest.json in the model directory: it is not a converted checkpoint (tools/convert_gguf.py or "
            "tools/convert_hf.py makes one)"
        ) from None
    except OSError as error:
        raise _failed(f"the model's manifest.json cannot be read: {error.strerror}") from None
    if len(raw) > MAX_MANIFEST_BYTES:
        raise _failed(f"manifest.json is larger than {MAX_MANIFEST_BYTES} bytes")
    return raw


def parse_manifest(raw: bytes) -> Manifest:
    """Validates the content of ``manifest.json``.

    Raises:
      OrcdError: MODEL_LOAD_FAILED, when it is not JSON, of another version, or inconsistent.
    """
    try:
        value = untrusted_json.load(raw, most=MAX_MANIFEST_VALUES)
    except ValueError:
        raise _failed(
            f"manifest.json is not valid JSON, names a field twice or holds more than {MAX_MANIFEST_VALUES} values: "
            "convert the model again"
        ) from None
    version = value.get("format_version") if isinstance(value, dict) else None
    if isinstance(value, dict) and value.get("format") == FORMAT and version != FORMAT_VERSION:
        raise _failed(
            f"manifest.json has format_version {version!r:.20}; this worker reads {FORMAT_VERSION}: "
            "convert the model again"
        )
    try:
        return Manifest.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        # The name of an additional field is the file's own text: escaped, it cannot steer a terminal.
        where = ascii(".".join(str(part) for part in first["loc"]))[1:-1][:120] or "(whole)"
        raise _failed(f"manifest.json is invalid at {where}: {first['msg']}") from None


def _failed(message: str) -> OrcdError:
    return OrcdError(ErrorCode.MODEL_LOAD_FAILED, message, field="model_path")
