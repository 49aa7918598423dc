"""Reads what ``tools/make_goldens.py`` wrote: prompts, greedy tokens, margins, prefill logits of a real model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

DIRECTORY = Path(__file__).resolve().parent.parent / "goldens"
NAME = "smollm2_135m_q4_1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Golden:
    """One prompt and what the independent implementation made of it in float32.

    Attributes:
      text: the prompt, after the chat template if it is a chat.
      user_message: what the chat template was given, or None when the prompt is plain text.
      ids: the prompt's token ids.
      tokens: greedy tokens, end of sequence ignored.
      margins: difference of the two highest logits at each step.
      text_out: the tokens as text.
      logit_ids, logits: the logits of the prompt's last position for the 50 likeliest and 512 fixed random ids.
      logsumexp: over the whole vocabulary of that position.
    """

    name: str
    text: str
    user_message: str | None
    ids: tuple[int, ...]
    tokens: tuple[int, ...]
    margins: NDArray[np.float64]
    text_out: str
    logit_ids: NDArray[np.int32]
    logits: NDArray[np.float32]
    logsumexp: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goldens:
    """All prompts of one model, and the file they were made from."""

    source_sha256: str
    steps: int
    prompts: tuple[Golden, ...]


def read_goldens(name: str = NAME) -> Goldens:
    """The stored goldens of one model."""
    document = json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))
    with np.load(DIRECTORY / f"{name}.npz") as stored:
        arrays = {key: stored[key] for key in stored.files}
    prompts = tuple(
        Golden(
            name=prompt["name"],
            text=prompt["text"],
            user_message=prompt.get("user_message"),
            ids=tuple(prompt["ids"]),
            tokens=tuple(prompt["tokens"]),
            margins=np.asarray(prompt["margins"], np.float64),
            text_out=prompt["text_out"],
            logit_ids=np.concatenate([arrays["top_ids"][i], arrays["sampled_ids"]]),
            logits=np.concatenate([arrays["top_logits"][i], arrays["sampled_logits"][i]]),
            logsumexp=float(arrays["logsumexp"][i]),
        )
        for i, prompt in enumerate(document["prompts"])
    )
    return Goldens(source_sha256=document["source"]["sha256"], steps=document["steps"], prompts=prompts)
