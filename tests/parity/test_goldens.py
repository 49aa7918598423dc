"""The stored goldens are what the other tests take them for."""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity.goldens import DIRECTORY, Golden, read_goldens

GOLDENS = read_goldens()


def named(prompt: Golden) -> str:
    return prompt.name


def test_there_are_at_least_ten_prompts_of_32_tokens() -> None:
    assert len(GOLDENS.prompts) >= 10
    assert {len(p.tokens) for p in GOLDENS.prompts} == {32}


def test_prompts_reach_from_one_token_to_past_two_blocks_of_128() -> None:
    lengths = sorted(len(p.ids) for p in GOLDENS.prompts)
    assert lengths[0] == 1
    assert lengths[-1] > 256


def test_a_chat_prompt_holds_its_special_tokens() -> None:
    chats = [p for p in GOLDENS.prompts if p.user_message]
    assert chats
    assert all((p.user_message or "") in p.text and p.ids[0] == 1 and p.ids.count(2) == 2 for p in chats)


@pytest.mark.parametrize("prompt", GOLDENS.prompts, ids=named)
def test_no_step_is_decided_by_rounding(prompt: Golden) -> None:
    assert prompt.margins.min() >= 1e-3


@pytest.mark.parametrize("prompt", GOLDENS.prompts, ids=named)
def test_the_likeliest_logit_is_the_first_token(prompt: Golden) -> None:
    assert prompt.logit_ids[np.argmax(prompt.logits)] == prompt.tokens[0]
    top = np.sort(prompt.logits[:50])
    assert top[-1] - top[-2] == pytest.approx(prompt.margins[0], abs=2e-6)


def test_the_goldens_stay_small() -> None:
    assert sum(f.stat().st_size for f in DIRECTORY.iterdir()) < 1_000_000
