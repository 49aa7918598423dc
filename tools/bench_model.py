"""Models for the benches, with their manifests: random weights of a shape, made on the device, or a checkpoint."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import jax
import numpy as np

from orcd_jax.checkpoint.digest import roots_digest, tree_root
from orcd_jax.checkpoint.manifest import (
    Manifest,
    ModelCapabilities,
    Provenance,
    TensorEntry,
    TokenizerEntry,
    model_digest,
    read_manifest,
)
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import verify_files
from orcd_jax.models.config import LlamaConfig
from orcd_jax.models.registry import Params, abstract_params, attention_kind, shard_grid

SHAPES = {
    # Llama-3.1-8B's shape, and one that a CPU hashes in a moment.
    "8b": {"vocab_size": 128_256, "hidden_size": 4096, "num_layers": 32, "num_heads": 32, "mlp_size": 14_336},
    "small": {"vocab_size": 8192, "hidden_size": 256, "num_layers": 4, "num_heads": 8, "mlp_size": 768},
}

_SCALE = 0.02
"""Standard deviation of the weights: what models begin their training with, so that nothing overflows."""

_LAYER = re.compile(r"^layers\.\d+\.")


def model_config(name: str, layers: int | None = None) -> LlamaConfig:
    """A model of this shape, in bfloat16, with as many layers as the shape has or as given."""
    shape = SHAPES[name] | ({} if layers is None else {"num_layers": layers})
    rest: dict[str, object] = {
        "num_kv_heads": 8,
        "head_dim": shape["hidden_size"] // shape["num_heads"],
        "context_max": 2048,
    }
    rest |= {"norm_eps": 1e-5, "rope_theta": 500_000.0, "tied_embeddings": False, "dtype": "bfloat16"}
    return LlamaConfig.model_validate({**shape, **rest})


def load_model(name: str, layers: int | None, device: jax.Device) -> tuple[Manifest, Params]:
    """The model of a shape's name, or of a checkpoint directory whose files are verified as a worker does.

    Raises:
      OrcdError: the checkpoint is damaged, or does not fit.
    """
    if name in SHAPES:
        return random_model(model_config(name, layers), device)
    manifest = read_manifest(Path(name))
    verify_files(Path(name), manifest, lambda _: None)
    return manifest, restore(Path(name), manifest, device)


def random_model(config: LlamaConfig, device: jax.Device) -> tuple[Manifest, Params]:
    """Random weights on the device, and a manifest whose digests are by ``hashlib``, of every byte.

    All layers hold the same numbers, each in arrays of its own: so the host has to hash one of them.
    """
    leaves = sorted(abstract_params(config).items())
    seeds = {name: seed for seed, name in enumerate(sorted({_alike(path) for path, _ in leaves}))}
    roots: dict[str, list[bytes]] = {}
    params: dict[str, jax.Array] = {}
    tensors = []
    for path, leaf in leaves:
        name, (axis, shards) = _alike(path), shard_grid(config, path)
        make = functools.partial(random_weights, seeds[name], leaf.shape, leaf.dtype.name, device)
        if name not in roots:
            # Of an array that is dropped then: one that was read on the host keeps its copy there.
            roots[name] = _roots(np.asarray(make()), axis, shards)
        params[path] = make()
        entry = TensorEntry(
            path=path,
            shape=leaf.shape,
            dtype=config.dtype if leaf.dtype.name == config.dtype else "float32",
            shard_axis=axis,
            shards=shards,
            digest="0" * 64,
        )
        tensors.append(entry.model_copy(update={"digest": roots_digest(entry, roots[name])}))
    return _manifest(config, tuple(tensors)), params


def random_weights(seed: int, shape: tuple[int, ...], dtype: str, device: jax.Device) -> jax.Array:
    """Normal numbers, the same for the same seed, made on the device."""
    with jax.default_device(device):
        numbers: jax.Array = _normal(jax.random.key(seed), shape, dtype)
    return numbers


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: str) -> jax.Array:
    return jax.random.normal(key, shape, dtype) * _SCALE


def _alike(path: str) -> str:
    """One name for a tensor of all layers."""
    return _LAYER.sub("layers.", path)


def _roots(array: np.ndarray, axis: int | None, shards: int) -> list[bytes]:
    pieces = [array] if axis is None else np.split(array, shards, axis)
    return [tree_root(np.ascontiguousarray(piece).reshape(-1).view(np.uint8).data) for piece in pieces]


def _manifest(config: LlamaConfig, tensors: tuple[TensorEntry, ...]) -> Manifest:
    tokenizer = TokenizerEntry(kind="none", bos_id=None, eos_ids=(), add_bos=False)
    return Manifest(
        model=ModelCapabilities(
            model_id="random",
            architecture=config.architecture,
            positional="rope",
            attention=attention_kind(config),
            quant="none",
            context_max=config.context_max,
            vocab_size=config.vocab_size,
            tokenizer=tokenizer.kind,
        ),
        config=config,
        tokenizer=tokenizer,
        tensors=tensors,
        files=(),
        digest=model_digest(config, tokenizer, (), tensors),
        source=Provenance(format="random", files=(), tensor_types=(), converter="bench_model", converter_version="0"),
    )
