"""Which tokens begin and end a text, and its template, from wherever a Hugging Face directory says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from orcd_jax.checkpoint.convert.huggingface import open_huggingface
from tests.checkpoint.convert.refusals import opening_refusal
from tests.checkpoint.convert.tiny_huggingface import (
    write_extra,
    write_model,
)


def test_ends_are_those_of_both_configurations(tmp_path: Path) -> None:
    directory = write_extra(
        write_model(tmp_path / "m", eos_token_id=7), "generation_config.json", eos_token_id=[256, 7, 3]
    )
    assert open_huggingface(directory, "auto").tokenizer.eos_ids == (3, 7, 256)


def test_an_end_may_stand_in_the_generation_configuration_alone(tmp_path: Path) -> None:
    directory = write_extra(write_model(tmp_path / "m", eos_token_id=None), "generation_config.json", eos_token_id=5)
    assert open_huggingface(directory, "auto").tokenizer.eos_ids == (5,)


@pytest.mark.parametrize(
    ("told", "bos", "expected"),
    [(None, 256, False), (False, 256, False), (True, 256, True), (True, None, False)],
)
def test_text_begins_with_bos_when_the_tokenizer_says_so(
    tmp_path: Path, told: bool | None, bos: int | None, expected: bool
) -> None:
    directory = write_extra(write_model(tmp_path / "m", bos_token_id=bos), add_bos_token=told)
    assert open_huggingface(directory, "auto").tokenizer.add_bos is expected


def test_a_wrong_setting_names_the_file_it_stands_in(tmp_path: Path) -> None:
    directory = write_extra(write_model(tmp_path / "a"), add_bos_token="yes")
    assert opening_refusal(directory) == "tokenizer_config.json: add_bos_token must be of type bool"
    directory = write_extra(write_model(tmp_path / "b"), "generation_config.json", eos_token_id=999)
    assert opening_refusal(directory).startswith("generation_config.json: eos_token_id must be a token id below 263")


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
    directory = write_extra(write_model(tmp_path / "m"), chat_template=told)
    assert open_huggingface(directory, "auto").chat_template == expected


def test_a_template_of_its_own_file_comes_first(tmp_path: Path) -> None:
    directory = write_extra(write_model(tmp_path / "m"), chat_template="{{ old }}")
    (directory / "chat_template.jinja").write_text("{{ é }}", encoding="utf-8")
    source = open_huggingface(directory, "auto")
    assert source.chat_template == "{{ é }}"
    assert "chat_template.jinja" in {path.name for path in source.paths}


def test_a_template_that_is_not_unicode_is_refused(tmp_path: Path) -> None:
    (write_model(tmp_path / "a") / "chat_template.jinja").write_bytes(b"\xff")
    assert opening_refusal(tmp_path / "a") == "chat_template.jinja: it is not UTF-8"
    half = write_extra(write_model(tmp_path / "b"), chat_template="\ud800")
    assert opening_refusal(half) == "tokenizer_config.json: chat_template is not valid Unicode"
