"""A Hugging Face directory as a source: its exact values, or one sentence that names the file and the field."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from orcd_jax.checkpoint.convert import huggingface_files as module
from orcd_jax.checkpoint.convert import safetensors_weights
from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.checkpoint.convert.write import write_checkpoint
from orcd_jax.checkpoint.manifest import TokenizerEntry
from orcd_jax.checkpoint.restore import restore
from tests.checkpoint.convert.refusals import opening_refusal
from tests.checkpoint.convert.tiny_huggingface import (
    CONFIG,
    SETTINGS,
    split,
    weights,
    write_extra,
    write_model,
)

# -- configuration and weights -----------------------------------------------------------------------------------------


def test_the_configuration_is_read(tmp_path: Path) -> None:
    source = open_huggingface(write_model(tmp_path / "Tiny Model"), "auto")
    assert source.config == CONFIG
    assert (source.model_id, source.format, source.tensor_types) == ("Tiny-Model", "safetensors", ("F32",))
    assert source.tokenizer == TokenizerEntry(kind="bpe_byte_level", bos_id=256, eos_ids=(256,), add_bos=False)
    assert source.chat_template is None


def test_what_old_files_leave_out_has_the_familys_value(tmp_path: Path) -> None:
    left_out = ("rope_parameters", "num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings")
    made = open_huggingface(write_model(tmp_path / "m", without=(*left_out, "hidden_act")), "auto").config
    assert (made.num_kv_heads, made.head_dim, made.norm_eps) == (4, 4, 1e-6)
    assert (made.rope_theta, made.context_max) == (10_000.0, 2048)


@pytest.mark.parametrize(
    ("dtype", "asked", "stored"),
    [
        ("float32", "auto", "float32"),
        ("float16", "auto", "float32"),
        ("bfloat16", "auto", "bfloat16"),
        ("bfloat16", "float32", "float32"),
        ("float16", "bfloat16", "bfloat16"),
        ("float32", "bfloat16", "bfloat16"),
    ],
)
@pytest.mark.requirement("WORKER-4701")
def test_every_value_arrives_on_the_device(
    tmp_path: Path, device: jax.Device, dtype: str, asked: str, stored: str
) -> None:
    """``auto`` never rounds."""
    tensors = weights(dtype)
    source = open_huggingface(write_model(tmp_path / "source", tensors), asked)  # type: ignore[arg-type]
    assert source.config.dtype == stored
    manifest = write_checkpoint(source, tmp_path / "m", lambda _: None, chat_template=None)
    params = restore(tmp_path / "m", manifest, device)
    for path, leaf in leaves(source.config).items():
        exact = leaf.build({name: tensors[name].astype(np.float32) for name in leaf.sources})
        assert np.asarray(params[path]).tobytes() == exact.astype(params[path].dtype).tobytes(), path


def test_norms_kept_in_float32_do_not_make_a_bfloat16_model_larger(tmp_path: Path) -> None:
    tensors = {name: a.astype("float32") if a.ndim == 1 else a for name, a in weights("bfloat16").items()}
    assert open_huggingface(write_model(tmp_path / "m", tensors), "auto").config.dtype == "bfloat16"


def test_one_matrix_in_float32_keeps_the_model_in_float32(tmp_path: Path) -> None:
    tensors = weights("bfloat16")
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype("float32")
    assert open_huggingface(write_model(tmp_path / "m", tensors), "auto").config.dtype == "float32"


def test_shards_are_the_same_model_as_one_file(tmp_path: Path) -> None:
    one = open_huggingface(write_model(tmp_path / "one" / "m"), "auto")
    split(write_model(tmp_path / "many" / "m"), 3)
    many = open_huggingface(tmp_path / "many" / "m", "auto")
    assert {path.name for path in many.paths if path.suffix == ".safetensors"} == {
        f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)
    }
    digests = [
        write_checkpoint(source, tmp_path / name, lambda _: None, chat_template=None).digest
        for name, source in (("a", one), ("b", many))
    ]
    assert digests[0] == digests[1]


def test_a_tied_head_is_left_out_whether_stored_or_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_weights, "COMPARED_ELEMENTS", 100 * 16)
    plain = weights()
    del plain["lm_head.weight"]
    repeated = plain | {"lm_head.weight": plain["model.embed_tokens.weight"]}
    for name, tensors in (("plain", plain), ("repeated", repeated)):
        source = open_huggingface(write_model(tmp_path / name, tensors, tie_word_embeddings=True), "auto")
        assert source.config.tied_embeddings
        assert source.names() == plain.keys()


@pytest.mark.parametrize("row", [0, 99, 100, 199, 200, 262])
def test_a_tied_head_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: int) -> None:
    """Compared some rows at a time: a file may claim an embedding that no memory holds."""
    monkeypatch.setattr(safetensors_weights, "COMPARED_ELEMENTS", 100 * 16)
    head = weights()["model.embed_tokens.weight"].copy()
    head[row, 3] += 1
    message = opening_refusal(
        write_model(tmp_path / "m", weights() | {"lm_head.weight": head}, tie_word_embeddings=True)
    )
    assert message == "config.json: tie_word_embeddings is true, but lm_head.weight is not the embedding"


@pytest.mark.requirement("WORKER-4312")
def test_a_tied_head_of_another_shape_is_refused_unread(tmp_path: Path) -> None:
    """Of a terabyte of zeros that takes no room on the disk, twice."""
    directory = write_model(tmp_path / "m", tie_word_embeddings=True)
    size = 2**40
    header = {
        name: {"dtype": "F32", "shape": [size // 4], "data_offsets": [size * place, size * (place + 1)]}
        for place, name in enumerate(("lm_head.weight", "model.embed_tokens.weight"))
    }
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2 * size)
    assert "lm_head.weight is not the embedding" in opening_refusal(directory)


def test_rotary_tables_of_old_versions_are_left_out(tmp_path: Path) -> None:
    old = {f"model.{part}rotary_emb.inv_freq": np.ones(2, np.float32) for part in ("", "layers.0.self_attn.")}
    source = open_huggingface(write_model(tmp_path / "m", weights() | old), "auto")
    assert source.names() == weights().keys()


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "nowhere"):
        assert opening_refusal(tmp_path / name).startswith(f"{name}: it is not a directory with config.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path / "m") / name).unlink()
    assert opening_refusal(tmp_path / "m") == f"{name}: it cannot be read (No such file or directory)"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "m") / name
    path.unlink()
    os.mkfifo(path)
    assert opening_refusal(tmp_path / "m") == f"{name}: it cannot be read (not a regular file)"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe\x00", b'{"a":' * 100_000, b"[" * 100_000, b"1" * 5_000])
@pytest.mark.requirement("WORKER-4310")
def test_what_is_not_json_is_named(tmp_path: Path, name: str, raw: bytes) -> None:
    (write_model(tmp_path / "m") / name).write_bytes(raw)
    assert opening_refusal(tmp_path / "m") == f"{name}: it is not valid JSON"


@pytest.mark.parametrize("raw", ["[]", "null", "1", '"text"'])
def test_json_that_is_no_object_is_named(tmp_path: Path, raw: str) -> None:
    (write_model(tmp_path / "m") / "config.json").write_text(raw)
    assert opening_refusal(tmp_path / "m") == "config.json: it is not a JSON object"


@pytest.mark.parametrize("raw", ["", "{", "[]", "[" * 100_000, '{"decoder": {"type": "Other"}}'])
@pytest.mark.requirement("WORKER-4310")
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, raw: str) -> None:
    (write_model(tmp_path / "m") / "tokenizer.json").write_text(raw)
    assert opening_refusal(tmp_path / "m").startswith("tokenizer.json cannot be used: ")


def test_a_file_that_is_too_large_is_named_with_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "m")
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 10)
    assert opening_refusal(tmp_path / "m") == "config.json: it is larger than 10 bytes"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.requirement("WORKER-4312")
def test_json_of_more_values_than_the_limit_is_refused_unparsed(tmp_path: Path, name: str) -> None:
    """Three bytes each in the file; parsed, up to a kilobyte."""
    (write_model(tmp_path / "m") / name).write_bytes(b'{"a": [' + b"{}," * 400_000 + b"0]}")
    assert opening_refusal(tmp_path / "m") == f"{name}: it holds more than 500000 values"


@pytest.mark.requirement("WORKER-4312")
def test_a_tokenizer_of_more_values_than_the_limit_is_refused_unparsed(tmp_path: Path) -> None:
    (write_model(tmp_path / "m") / "tokenizer.json").write_bytes(b'{"model": [' + b"[]," * 1_600_000 + b"0]}")
    assert opening_refusal(tmp_path / "m") == "tokenizer.json: it holds more than 3000000 values"


# -- provenance --------------------------------------------------------------------------------------------------------


def change_nothing(_: Path) -> None:
    """The directory as it was written."""


@pytest.mark.parametrize("change", [change_nothing, lambda path: split(path, 2)], ids=["one file", "shards"])
def test_every_file_that_was_read_is_in_the_provenance(tmp_path: Path, change: Callable[[Path], object]) -> None:
    directory = write_extra(write_model(tmp_path / "m"))
    write_extra(directory, "generation_config.json")
    change(directory)
    source = open_huggingface(directory, "auto")
    assert {path.name for path in source.paths} == {path.name for path in directory.iterdir()}
    assert all(path.is_file() for path in source.paths)


def test_the_settings_of_these_tests_are_the_model_of_their_weights() -> None:
    assert SETTINGS["vocab_size"] == CONFIG.vocab_size == weights()["lm_head.weight"].shape[0]
