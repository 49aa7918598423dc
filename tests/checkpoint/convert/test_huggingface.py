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

from orcd_jax.checkpoint.convert import huggingface as module
from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from orcd_jax.checkpoint.convert.layout import leaves
from orcd_jax.checkpoint.convert.write import write_checkpoint
from orcd_jax.checkpoint.manifest import TokenizerEntry
from orcd_jax.checkpoint.restore import restore
from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.models.config import RopeScaling
from tests.checkpoint.convert.tiny_huggingface import (
    CONFIG,
    SETTINGS,
    safetensors,
    split,
    weights,
    write_index,
    write_model,
)


def refusal(directory: Path) -> str:
    """Why a directory is refused: one typed error that can be shown."""
    with pytest.raises(OrcdError) as caught:
        open_huggingface(directory, "auto")
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()
    assert len(caught.value.message) < 600
    return caught.value.message.removeprefix("the model cannot be converted: ")


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


def test_a_tied_head_is_left_out_whether_stored_or_not(tmp_path: Path) -> None:
    plain = weights()
    del plain["lm_head.weight"]
    repeated = plain | {"lm_head.weight": plain["model.embed_tokens.weight"]}
    for name, tensors in (("plain", plain), ("repeated", repeated)):
        source = open_huggingface(write_model(tmp_path / name, tensors, tie_word_embeddings=True), "auto")
        assert source.config.tied_embeddings
        assert source.names() == plain.keys()


def test_a_tied_head_of_its_own_is_refused(tmp_path: Path) -> None:
    message = refusal(write_model(tmp_path / "m", tie_word_embeddings=True))
    assert message == "config.json: tie_word_embeddings is true, but lm_head.weight is not the embedding"


def test_rotary_tables_of_old_versions_are_left_out(tmp_path: Path) -> None:
    old = {f"model.{part}rotary_emb.inv_freq": np.ones(2, np.float32) for part in ("", "layers.0.self_attn.")}
    source = open_huggingface(write_model(tmp_path / "m", weights() | old), "auto")
    assert source.names() == weights().keys()


LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8,
    "low_freq_factor": 1,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 16, "truncate": False}


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({"rope_type": "default"}, None),
        ({"rope_type": "linear", "factor": 2}, RopeScaling(kind="linear", factor=2.0)),
        ({"type": "linear", "factor": 2.0}, RopeScaling(kind="linear", factor=2.0)),
        (LLAMA3, RopeScaling(kind="llama3", factor=8.0, original_context=32)),
        (YARN, RopeScaling(kind="yarn", factor=4.0, original_context=16, beta_fast=16.0, truncate=False)),
        (
            YARN | {"attention_factor": 0.5, "beta_slow": 2},
            RopeScaling(
                kind="yarn",
                factor=4.0,
                original_context=16,
                beta_fast=16.0,
                beta_slow=2.0,
                attention_factor=0.5,
                truncate=False,
            ),
        ),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_rope_scaling_is_read_in_its_old_and_its_new_form(
    tmp_path: Path, told: dict[str, object], expected: RopeScaling | None, old: bool
) -> None:
    if old:
        directory = write_model(tmp_path / "m", without=("rope_parameters",), rope_scaling=told, rope_theta=500_000)
    else:
        directory = write_model(tmp_path / "m", rope_parameters=told | {"rope_theta": 500_000.0})
    made = open_huggingface(directory, "auto").config
    assert (made.rope_scaling, made.rope_theta) == (expected, 500_000.0)


# -- settings that are refused -----------------------------------------------------------------------------------------

REFUSED: list[tuple[dict[str, object], str]] = [
    ({"model_type": "mamba"}, "model_type mamba is not supported; supported is llama"),
    ({"model_type": None}, "model_type None is not supported"),
    ({"model_type": ["llama"]}, "model_type ['llama'] is not supported"),
    ({"model_type": "\x1b[2J\u202e\ud800"}, "model_type ?[2J?? is not supported"),
    ({"hidden_act": "gelu"}, "hidden_act is gelu; supported is silu"),
    ({"sliding_window": 4096}, "sliding_window is 4096; supported is None"),
    ({"quantization_config": {"bits": 4}}, "quantization_config is {'bits': 4}; supported is None"),
    ({"num_local_experts": 8}, "num_local_experts is 8"),
    ({"final_logit_softcapping": 30.0}, "final_logit_softcapping is 30.0"),
    ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0"),
    ({"logit_scale": 0.5}, "logit_scale is 0.5"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_interleaved": True}, "rope_interleaved is True"),
    ({"vocab_size": None}, "vocab_size is missing"),
    ({"vocab_size": "263"}, "vocab_size must be of type int"),
    ({"vocab_size": 263.0}, "vocab_size must be of type int"),
    ({"vocab_size": True}, "vocab_size must be of type int"),
    ({"vocab_size": -5}, "vocab_size cannot be"),
    ({"vocab_size": 10**30}, "vocab_size cannot be"),
    ({"hidden_size": 0}, "hidden_size cannot be"),
    ({"num_attention_heads": 0}, "num_heads cannot be"),
    ({"num_attention_heads": None}, "num_attention_heads is missing"),
    ({"num_key_value_heads": 3}, "is not a multiple of num_kv_heads 3"),
    ({"head_dim": 5}, "head_dim 5 is odd"),
    ({"rms_norm_eps": 0}, "norm_eps cannot be"),
    ({"rms_norm_eps": 10**400}, "rms_norm_eps must be of type float"),
    ({"tie_word_embeddings": 1}, "tie_word_embeddings must be of type bool"),
    ({"rope_parameters": [1]}, "rope_scaling is not an object"),
    ({"rope_parameters": {"rope_theta": float("inf")}}, "rope_theta cannot be"),
    ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta cannot be"),
    ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type longrope is not supported; supported are linear"),
    ({"rope_parameters": {"rope_type": []}}, "rope_type [] is not supported"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_parameters": YARN | {"mscale": 1.0}}, "rope_scaling: mscale is not supported"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor is not"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "llama3 needs original_context"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": 9}}, "high_freq_factor > low_freq_factor"),
    ({"rope_parameters": YARN | {"truncate": 1}}, "truncate must be of type bool"),
    ({"eos_token_id": None}, "eos_token_id is missing, here and in generation_config.json"),
    ({"eos_token_id": []}, "eos_token_id is missing"),
    ({"eos_token_id": 263}, "eos_token_id must be a token id below 263"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id must be a token id"),
    ({"eos_token_id": True}, "eos_token_id must be a token id"),
    ({"bos_token_id": -1}, "bos_token_id must be a token id"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
@pytest.mark.requirement("WORKER-4310")
def test_a_setting_that_is_not_supported_is_named(tmp_path: Path, settings: dict[str, object], message: str) -> None:
    told = refusal(write_model(tmp_path / "m", **settings))  # type: ignore[arg-type]  # none is called tensors
    assert told.startswith("config.json: ")
    assert message in told


# -- files -------------------------------------------------------------------------------------------------------------


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "nowhere"):
        assert refusal(tmp_path / name).startswith(f"{name}: it is not a directory with config.json")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path / "m") / name).unlink()
    assert refusal(tmp_path / "m") == f"{name}: it cannot be read (No such file or directory)"


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, name: str) -> None:
    path = write_model(tmp_path / "m") / name
    path.unlink()
    os.mkfifo(path)
    assert refusal(tmp_path / "m") == f"{name}: it is not a plain file"


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe\x00", b'{"a":' * 100_000, b"[" * 5_000_000, b"1" * 5_000])
@pytest.mark.requirement("WORKER-4310")
def test_what_is_not_json_is_named(tmp_path: Path, name: str, raw: bytes) -> None:
    (write_model(tmp_path / "m") / name).write_bytes(raw)
    assert refusal(tmp_path / "m") == f"{name}: it is not valid JSON"


@pytest.mark.parametrize("raw", ["[]", "null", "1", '"text"'])
def test_json_that_is_no_object_is_named(tmp_path: Path, raw: str) -> None:
    (write_model(tmp_path / "m") / "config.json").write_text(raw)
    assert refusal(tmp_path / "m") == "config.json: it is not a JSON object"


@pytest.mark.parametrize("raw", ["", "{", "[]", "[" * 100_000, '{"decoder": {"type": "Other"}}'])
@pytest.mark.requirement("WORKER-4310")
def test_a_file_that_is_no_tokenizer_is_named(tmp_path: Path, raw: str) -> None:
    (write_model(tmp_path / "m") / "tokenizer.json").write_text(raw)
    assert refusal(tmp_path / "m").startswith("tokenizer.json cannot be used: ")


def test_a_file_that_is_too_large_is_named_with_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_model(tmp_path / "m")
    monkeypatch.setattr(module, "MAX_JSON_BYTES", 10)
    assert refusal(tmp_path / "m") == "config.json: it is larger than 10 bytes"


# -- weights -----------------------------------------------------------------------------------------------------------


def test_a_directory_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    (write_model(tmp_path / "m") / "model.safetensors").unlink()
    assert refusal(tmp_path / "m") == "m: it has neither model.safetensors nor model.safetensors.index.json"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_a_pickle_is_not_read_and_the_message_says_why(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path / "m") / "model.safetensors").rename(tmp_path / "m" / name)
    assert f"{name} is a pickle, which may run code: save it as safetensors" in refusal(tmp_path / "m")


def header(value: object, data: bytes = b"") -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int, end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HOSTILE: dict[str, bytes] = {
    "empty": b"",
    "a length cut short": b"\0\0\0",
    "a length of nothing": struct.pack("<Q", 0),
    "a length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "a length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "a length of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a length of -8": struct.pack("<q", -8) + b"{}",
    "no JSON": header(b"not JSON"),
    "not UTF-8": header(b'{"\xff": 1}'),
    "deep nesting": header(b'{"a":' * 50_000),
    "a list": header([]),
    "offsets beyond the data": header({"a": entry([4], 0, 16)}, b"\0" * 8),
    "offsets of 2^63": header({"a": entry([4], 2**63, 2**63 + 16)}, b"\0" * 16),
    "offsets backwards": header({"a": entry([4], 16, 0)}, b"\0" * 16),
    "a negative offset": header({"a": entry([4], -16, 0)}, b"\0" * 16),
    "a shape that overflows": header({"a": entry([2**40, 2**40], 0, 16)}, b"\0" * 16),
    "a shape of other bytes": header({"a": entry([5], 0, 16)}, b"\0" * 16),
    "tensors that overlap": header({"a": entry([4], 0, 16), "b": entry([4], 8, 24)}, b"\0" * 24),
    "a hole": header({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
    "data that belongs to nothing": header({"a": entry([1], 0, 4)}, b"\0" * 8),
    "an unknown type": header({"a": entry([4], 0, 16, "F7")}, b"\0" * 16),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.requirement("WORKER-4310")
def test_a_hostile_header_is_one_error(tmp_path: Path, name: str) -> None:
    (write_model(tmp_path / "m") / "model.safetensors").write_bytes(HOSTILE[name])
    assert refusal(tmp_path / "m") == "model.safetensors: it cannot be read (truncated or not safetensors)"


@pytest.mark.requirement("WORKER-4310")
def test_a_file_cut_short_anywhere_is_one_error(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m") / "model.safetensors"
    whole = path.read_bytes()
    for size in (*range(12), *np.random.default_rng(3).integers(12, len(whole), 40), len(whole) - 1):
        path.write_bytes(whole[:size])
        assert "truncated or not safetensors" in refusal(tmp_path / "m"), size


def test_a_file_without_a_tensor_is_refused(tmp_path: Path) -> None:
    (write_model(tmp_path / "m") / "model.safetensors").write_bytes(header({}))
    assert refusal(tmp_path / "m") == "m: its safetensors files hold no tensor"


@pytest.mark.parametrize(("dtype", "kind"), [("float64", "F64"), ("int64", "I64")])
@pytest.mark.requirement("WORKER-4310")
def test_a_tensor_of_another_type_is_named(tmp_path: Path, dtype: str, kind: str) -> None:
    tensors = weights() | {"model.norm.weight": np.ones(16, dtype)}
    message = refusal(write_model(tmp_path / "m", tensors))
    assert message == f"model.safetensors: tensor model.norm.weight is of type {kind}; supported are BF16, F16, F32"


def test_the_name_of_a_tensor_cannot_steer_a_terminal(tmp_path: Path) -> None:
    tensors = weights() | {"\x1b[2J\n\u202e" + "x" * 1000: np.ones(4, np.int64)}
    assert "tensor ?[2J??xxx" in refusal(write_model(tmp_path / "m", tensors))


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (None, "weight_map is missing"),
        ({}, "weight_map is missing"),
        ([1], "weight_map is missing"),
        ({"a": "../secret.safetensors"}, "not NAME.safetensors in the same folder"),
        ({"a": "/etc/secret.safetensors"}, "not NAME.safetensors in the same folder"),
        ({"a": "folder/x.safetensors"}, "not NAME.safetensors in the same folder"),
        ({"a": "x.safetensors\n"}, "not NAME.safetensors in the same folder"),
        ({"a": "pytorch_model.bin"}, "not NAME.safetensors in the same folder"),
        ({"a": 7}, "not NAME.safetensors in the same folder"),
        ({"a": None}, "not NAME.safetensors in the same folder"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing: download the model again"),
        ({str(n): f"{n}.safetensors" for n in range(1001)}, "it names 1001 files; the limit is 1000"),
    ],
)
@pytest.mark.requirement("WORKER-4320")
def test_an_index_that_leads_elsewhere_is_refused(tmp_path: Path, places: object, message: str) -> None:
    (tmp_path / "secret.safetensors").write_bytes(safetensors(weights()))
    (write_model(tmp_path / "m") / "model.safetensors").unlink()
    write_index(tmp_path / "m", places)
    told = refusal(tmp_path / "m")
    assert told.startswith("model.safetensors.index.json: ")
    assert message in told


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    places = split(write_model(tmp_path / "m"), 2)
    first, second = sorted(set(places.values()))
    (tmp_path / "m" / second).write_bytes((tmp_path / "m" / first).read_bytes())
    assert f"{second}: tensor lm_head.weight is in {first} too" in refusal(tmp_path / "m")


def test_a_shard_that_is_damaged_is_named(tmp_path: Path) -> None:
    shard = tmp_path / "m" / max(split(write_model(tmp_path / "m"), 2).values())
    shard.write_bytes(shard.read_bytes()[:-1])
    assert refusal(tmp_path / "m") == f"{shard.name}: it cannot be read (truncated or not safetensors)"


# -- tokenizer and template --------------------------------------------------------------------------------------------


def extra(directory: Path, name: str = "tokenizer_config.json", **settings: object) -> Path:
    (directory / name).write_text(json.dumps(settings))
    return directory


def test_ends_are_those_of_both_configurations(tmp_path: Path) -> None:
    directory = extra(write_model(tmp_path / "m", eos_token_id=7), "generation_config.json", eos_token_id=[256, 7, 3])
    assert open_huggingface(directory, "auto").tokenizer.eos_ids == (3, 7, 256)


def test_an_end_may_stand_in_the_generation_configuration_alone(tmp_path: Path) -> None:
    directory = extra(write_model(tmp_path / "m", eos_token_id=None), "generation_config.json", eos_token_id=5)
    assert open_huggingface(directory, "auto").tokenizer.eos_ids == (5,)


@pytest.mark.parametrize(
    ("told", "bos", "expected"),
    [(None, 256, False), (False, 256, False), (True, 256, True), (True, None, False)],
)
def test_text_begins_with_bos_when_the_tokenizer_says_so(
    tmp_path: Path, told: bool | None, bos: int | None, expected: bool
) -> None:
    directory = extra(write_model(tmp_path / "m", bos_token_id=bos), add_bos_token=told)
    assert open_huggingface(directory, "auto").tokenizer.add_bos is expected


def test_a_wrong_setting_names_the_file_it_stands_in(tmp_path: Path) -> None:
    directory = extra(write_model(tmp_path / "a"), add_bos_token="yes")
    assert refusal(directory) == "tokenizer_config.json: add_bos_token must be of type bool"
    directory = extra(write_model(tmp_path / "b"), "generation_config.json", eos_token_id=999)
    assert refusal(directory).startswith("generation_config.json: eos_token_id must be a token id below 263")


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("{{ one }}", "{{ one }}"),
        ([{"name": "tool_use", "template": "{{ two }}"}, {"name": "default", "template": "{{ one }}"}], "{{ one }}"),
        ([{"name": "tool_use", "template": "{{ two }}"}], None),
        ([{"name": []}, 7, {"template": "x"}], None),
        (None, None),
    ],
)
def test_the_template_of_the_tokenizer_configuration_is_taken(
    tmp_path: Path, told: object, expected: str | None
) -> None:
    directory = extra(write_model(tmp_path / "m"), chat_template=told)
    assert open_huggingface(directory, "auto").chat_template == expected


def test_a_template_of_its_own_file_comes_first(tmp_path: Path) -> None:
    directory = extra(write_model(tmp_path / "m"), chat_template="{{ old }}")
    (directory / "chat_template.jinja").write_text("{{ é }}", encoding="utf-8")
    source = open_huggingface(directory, "auto")
    assert source.chat_template == "{{ é }}"
    assert "chat_template.jinja" in {path.name for path in source.paths}


def test_a_template_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    (write_model(tmp_path / "a") / "chat_template.jinja").write_bytes(b"\xff")
    assert refusal(tmp_path / "a") == "chat_template.jinja: it is not UTF-8"
    half = extra(write_model(tmp_path / "b"), chat_template="\ud800")
    assert refusal(half) == "tokenizer_config.json: chat_template is not valid Unicode"


def change_nothing(_: Path) -> None:
    """The directory as it was written."""


@pytest.mark.parametrize("change", [change_nothing, lambda path: split(path, 2)], ids=["one file", "shards"])
def test_every_file_that_was_read_is_in_the_provenance(tmp_path: Path, change: Callable[[Path], object]) -> None:
    directory = extra(write_model(tmp_path / "m"))
    extra(directory, "generation_config.json")
    change(directory)
    source = open_huggingface(directory, "auto")
    assert {path.name for path in source.paths} == {path.name for path in directory.iterdir()}
    assert all(path.is_file() for path in source.paths)


def test_the_settings_of_these_tests_are_the_model_of_their_weights() -> None:
    assert SETTINGS["vocab_size"] == CONFIG.vocab_size == weights()["lm_head.weight"].shape[0]
