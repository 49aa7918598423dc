"""Chat templates: rendered as trained, and bounded in time and memory whatever they contain."""

from __future__ import annotations

import resource
import time

import pytest

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.tokenizer.chat_template import MAX_TEMPLATE_BYTES, ChatTemplate
from orcd_jax.worker.types import ChatMessage

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'].strip() + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, bos_token="<s>", eos_token="</s>")


def user(content: str = "hi") -> list[ChatMessage]:
    return [ChatMessage(role="user", content=content)]


@pytest.mark.requirement("WORKER-4248")
def test_a_conversation_is_rendered_as_the_template_says() -> None:
    assert template(CHATML).render(user(" hi ")) == (
        "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert not template(CHATML).render(user(), add_generation_prompt=False).endswith("assistant\n")


def test_content_is_never_escaped_or_evaluated() -> None:
    assert "<b>{{ 7 * 7 }}</b>" in template(CHATML).render(user("<b>{{ 7 * 7 }}</b>"))


def test_special_tokens_and_json_are_at_hand() -> None:
    source = "{{ bos_token }}{{ messages[0] | tojson }}{{ eos_token }}"
    assert template(source).render(user("é")) == '<s>{"role": "user", "content": "é"}</s>'


BOMBS = [
    "{{ 'x' * 1000000000 }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{% set ns = namespace(x='ab') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}{{ ns.x }}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{{ '%099999999d' | format(1) }}",
    "{{ messages.__class__.__mro__ }}{{ undefined.attribute }}",
    "{{ raise_exception('roles must alternate') }}",
]


@pytest.mark.requirement("WORKER-4248")
@pytest.mark.parametrize("source", BOMBS)
def test_a_hostile_template_fails_quickly_and_cheaply(source: str) -> None:
    bomb = template(source)
    before, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(OrcdError, match="the model's chat template") as caught:
        bomb.render(user())
    assert caught.value.code is ErrorCode.INVALID_PARAMS
    assert time.process_time() - before < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 512 * 1024  # KiB


def test_a_template_cannot_include_a_file() -> None:
    with pytest.raises(OrcdError):
        template("{% include '/etc/passwd' %}").render(user())


@pytest.mark.parametrize("source", ["{% for %}", "x" * (MAX_TEMPLATE_BYTES + 1)])
def test_a_template_that_cannot_be_used_is_refused_at_load(source: str) -> None:
    with pytest.raises(OrcdError, match="the chat template cannot be used") as caught:
        template(source)
    assert caught.value.code is ErrorCode.MODEL_LOAD_FAILED
