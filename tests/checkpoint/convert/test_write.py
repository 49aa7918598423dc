"""Writing a checkpoint: all or nothing, the same every time, and with one array in memory at a time."""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from pathlib import Path

import jax
import numpy as np
import pytest
from numpy.typing import NDArray

from orcd_jax.checkpoint.convert import write as module
from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.checkpoint.convert.write import write_checkpoint
from orcd_jax.checkpoint.digest import tensor_digest
from orcd_jax.checkpoint.manifest import read_manifest
from orcd_jax.checkpoint.progress import Progress
from orcd_jax.checkpoint.restore import restore
from orcd_jax.checkpoint.verify import verify_files
from tests.checkpoint.convert.refusals import conversion_refusal
from tests.checkpoint.proof import proved
from tests.checkpoint.tiny import (
    CONFIG,
    TEMPLATE,
    MemorySource,
    config,
    convert,
    random_weights,
    sha256,
    tensor_by_hand,
)

# -- what is written ---------------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_what_its_document_says_and_nothing_else(tmp_path: Path) -> None:
    source = MemorySource()
    convert(source, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert {path.name for path in (tmp_path / "m").iterdir()} == {
        "manifest.json",
        "arrays",
        "tokenizer.json",
        "chat_template.jinja",
    }
    assert (tmp_path / "m" / "tokenizer.json").read_bytes() == source.tokenizer_json
    assert (tmp_path / "m" / "chat_template.jinja").read_text() == TEMPLATE


def test_a_model_without_a_template_has_no_file_of_it(tmp_path: Path) -> None:
    write_checkpoint(MemorySource(), tmp_path / "m", lambda _: None, chat_template=None)
    assert not (tmp_path / "m" / "chat_template.jinja").exists()


def test_what_was_written_is_what_the_worker_verifies(tmp_path: Path, device: jax.Device) -> None:
    returned = convert(MemorySource(), tmp_path / "m")
    manifest = read_manifest(tmp_path / "m")
    assert manifest == returned
    verify_files(tmp_path / "m", manifest, lambda _: None)
    assert proved(manifest, restore(tmp_path / "m", manifest, device)) == manifest.digest


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_digest_is_the_one_by_hand(tmp_path: Path, dtype: str) -> None:
    source = MemorySource(config=config(dtype=dtype))
    for entry in convert(source, tmp_path / "m").tensors:
        leaf = leaves(source.config)[entry.path]
        array = leaf.build({name: source.weights[name] for name in leaf.sources}).astype(entry.dtype)
        assert entry.digest == tensor_by_hand(array, entry.path, axis=entry.shard_axis, shards=entry.shards), entry.path


@pytest.mark.requirement("WORKER-4710")
def test_the_same_source_has_the_same_digests_twice(tmp_path: Path) -> None:
    """The files of the arrays may differ, and so may their own digests; neither is part of the model's."""
    one, two = (convert(MemorySource(), tmp_path / name) for name in ("one", "two"))
    assert (one.digest, one.tensors) == (two.digest, two.tensors)


def test_the_provenance_is_the_sources_name_size_and_sha256(tmp_path: Path) -> None:
    (tmp_path / "weights.gguf").write_bytes(b"content")
    (file,) = convert(MemorySource(paths=(tmp_path / "weights.gguf",)), tmp_path / "m").source.files
    assert (file.name, file.size_bytes, file.sha256) == ("weights.gguf", 7, sha256(b"content").hex())


def test_a_source_whose_name_is_not_unicode_can_be_converted(tmp_path: Path) -> None:
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.gguf"))
    path.write_bytes(b"content")
    (file,) = convert(MemorySource(paths=(path,)), tmp_path / "m").source.files
    assert file.name == "�.gguf"


def test_every_stage_reports_from_nothing_to_all(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"content")
    points: list[Progress] = []
    write_checkpoint(MemorySource(paths=(tmp_path / "weights",)), tmp_path / "m", points.append, chat_template=None)
    stages = list(dict.fromkeys(point.stage for point in points))
    assert stages == ["hash_source", "convert", "hash_files"]
    for stage in stages:
        done = [point.percent for point in points if point.stage == stage]
        assert (done[0], done[-1], done) == (0, 100, sorted(done))


# -- numbers -----------------------------------------------------------------------------------------------------------


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even(tmp_path: Path, device: jax.Device) -> None:
    ties = [0x3F80_8000, 0x3F81_8000, 0x3F80_8001, 0x3F81_7FFF, 0xBF80_8000, 0xBF81_8000, 0x0000_0001, 0x8000_8000]
    expected = [0x3F80, 0x3F82, 0x3F81, 0x3F81, 0xBF80, 0xBF82, 0x0000, 0x8000]
    source = MemorySource(config=config(dtype="bfloat16"))
    embed = source.weights["model.embed_tokens.weight"]
    bits = embed.view(np.uint32).reshape(-1)
    bits[: len(ties)] = ties
    manifest = convert(source, tmp_path / "m")
    stored = np.asarray(restore(tmp_path / "m", manifest, device)["embed"]).view(np.uint16).reshape(-1)
    assert stored[: len(ties)].tolist() == expected
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    np.testing.assert_array_equal(stored, rounded.astype(np.uint16))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.down_proj.weight"]
)
@pytest.mark.requirement("WORKER-4310")
def test_a_value_that_is_not_finite_is_refused_by_name(tmp_path: Path, name: str, dtype: str, value: float) -> None:
    source = MemorySource(config=config(dtype=dtype))
    source.weights[name].reshape(-1)[-1] = value
    message = conversion_refusal(source, tmp_path / "m")
    assert name in message
    assert "not finite" in message


def test_a_value_that_is_not_finite_as_bfloat16_only_says_which_dtype_it_needs(tmp_path: Path) -> None:
    weights = random_weights(CONFIG)
    weights["model.norm.weight"][3] = np.finfo(np.float32).max
    convert(MemorySource(weights=weights), tmp_path / "float32")
    message = conversion_refusal(MemorySource(config=config(dtype="bfloat16"), weights=weights), tmp_path / "bfloat16")
    assert "--dtype=float32" in message


# -- tensors that are not the model's ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(random_weights(CONFIG)))
@pytest.mark.requirement("WORKER-4310")
def test_a_missing_tensor_is_named(tmp_path: Path, name: str) -> None:
    weights = random_weights(CONFIG)
    del weights[name]
    assert f"1 tensors of this llama model are missing: {name}" in conversion_refusal(
        MemorySource(weights=weights), tmp_path / "m"
    )


@pytest.mark.parametrize("name", ["model.layers.1.input_layernorm.weight", "model.layers.0.self_attn.q_proj.bias", "x"])
@pytest.mark.requirement("WORKER-4310")
def test_an_additional_tensor_is_named(tmp_path: Path, name: str) -> None:
    source = MemorySource(weights=random_weights(CONFIG) | {name: np.zeros(16, np.float32)})
    assert f"belong to no part of it: {name}" in conversion_refusal(source, tmp_path / "m")


@pytest.mark.parametrize("name", sorted(random_weights(CONFIG)))
@pytest.mark.requirement("WORKER-4310")
def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path, name: str) -> None:
    weights = random_weights(CONFIG)
    wanted = weights[name].shape
    weights[name] = weights[name][:-1]
    message = conversion_refusal(MemorySource(weights=weights), tmp_path / "m")
    assert f"{name} has the shape {weights[name].shape}; by the model's configuration it must be {wanted}" in message


def test_many_missing_tensors_are_one_short_sentence(tmp_path: Path) -> None:
    message = conversion_refusal(MemorySource(weights={"x" * 1000: np.zeros(1, np.float32)}), tmp_path / "m")
    assert "12 tensors" in message
    assert message.endswith("…")
    assert len(message) < 600


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.requirement("WORKER-4701")
def test_one_array_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str) -> None:
    """When the next array's first tensor is asked for, no tensor and no array of those before stays alive.

    TensorStore lets go of what it has written in a thread of its own, a moment later: that moment is waited for.
    """
    made = config(dtype=dtype, num_layers=3)
    leaf_of = {name: path for path, leaf in leaves(made).items() for name in leaf.sources}
    alive: dict[int, str] = {}
    numbers = itertools.count()
    changed = threading.Condition()

    def gone(number: int) -> None:
        with changed:
            del alive[number]
            changed.notify_all()

    def track(path: str, array: NDArray[np.generic]) -> None:
        with changed:
            alone = changed.wait_for(lambda: set(alive.values()) <= {path}, timeout=10)
            assert alone, f"{set(alive.values())} is still there when {path} is made"
            number = next(numbers)
            alive[number] = path
        weakref.finalize(array, gone, number)

    def tracked_digest(array: NDArray[np.generic], *, path: str, **rest: object) -> str:
        track(path, array)
        return tensor_digest(array, path=path, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "tensor_digest", tracked_digest)
    convert(MemorySource(config=made, on_tensor=lambda name, array: track(leaf_of[name], array)), tmp_path / "m")
    assert next(numbers) == len(leaf_of) + len(leaves(made))
