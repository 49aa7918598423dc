"""The settings of a Hugging Face model: read in every form they had, or refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from orcd_jax.models.config import RopeScaling
from tests.checkpoint.convert.refusals import opening_refusal
from tests.checkpoint.convert.tiny_huggingface import write_model

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
    told = opening_refusal(write_model(tmp_path / "m", **settings))  # type: ignore[arg-type]  # none is called tensors
    assert told.startswith("config.json: ")
    assert message in told
