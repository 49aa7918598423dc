"""Execute's fields, one by one: what is at a limit passes, what is beyond it is refused by name, before it runs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
import pytest

from orcd_jax.worker.types import ChatMessage, ChatPrompt, ExecuteParams
from tests.server.fake_worker import Served
from tests.server.peer import Peer, descriptor, error_detail, execute_request, failure, outcome

MOST_CHARS, MOST_TOKENS = 100, 64  # as the fake worker is configured
LARGEST_ID = 2**31 - 1
LARGEST_SEED = 2**64 - 1
NAN, INF = math.nan, math.inf
LEAST_FLOAT = float(np.finfo(np.float32).smallest_subnormal)
OFF = "off"  # passes, and reaches the worker in no form


def above(value: float) -> float:
    """The next number that a float field can hold."""
    return float(np.nextafter(np.float32(value), np.float32(INF)))


def chat(*messages: tuple[str, str], **fields: bool) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in messages], **fields}


def chat_prompt(*messages: tuple[str, str], add: bool = True) -> ChatPrompt:
    turns = tuple(ChatMessage(role=role, content=content) for role, content in messages)
    return ChatPrompt(messages=turns, add_generation_prompt=add)


@dataclass
class Rule:
    """What one field takes.

    Attributes:
      param: the attribute of ExecuteParams that it becomes; None: none.
      passes: value, and what the worker gets. None as the value: the field is not set.
      fails: values; or value and the part of the field that is named.
    """

    param: str | None
    passes: list[tuple[Any, Any]]
    fails: list[Any] = field(default_factory=list)


def identifier(param: str | None, *, empty: object) -> Rule:
    passes = [("a", "a"), ("A-z_09", "A-z_09"), ("x" * 256, "x" * 256)]
    bad = ["x" * 257, "a b", "a/b", "é", "a\n", "a\0"]
    if empty == OFF:
        return Rule(None, [(value, OFF) for value in ("", "a", "x" * 256)], bad)
    return Rule(param, passes, ["", *bad]) if empty is None else Rule(param, [("", empty), *passes], bad)


def number(param: str, *, least: float, most: float, absent: float, fails: list[float]) -> Rule:
    passes = [(None, absent), (least, least), (most, most)]
    return Rule(param, passes, [*fails, above(most), NAN, INF, -INF])


def unsupported(*, off: list[Any], fails: list[Any]) -> Rule:
    return Rule(None, [(value, OFF) for value in (None, *off)], fails)


RULES: dict[str, Rule] = {
    "job_id": identifier("job_id", empty=None),
    "handle_id": Rule("handle_id", [("", None), ("h-1", "h-1"), ("x" * 256, "x" * 256)], ["x" * 257, "h 1", "h\0"]),
    "tenant": identifier("tenant", empty=""),
    "cache_salt": identifier(None, empty=OFF),
    "prompt_text": Rule(
        "prompt",
        [("x", "x"), ("x" * MOST_CHARS, "x" * MOST_CHARS), ("é" * MOST_CHARS, "é" * MOST_CHARS), (" \n", " \n")],
        ["", "x" * (MOST_CHARS + 1), "a\0b", "\0"],
    ),
    "prompt_token_ids": Rule(
        "prompt",
        [({"ids": [0]}, (0,)), ({"ids": [LARGEST_ID] * MOST_CHARS}, (LARGEST_ID,) * MOST_CHARS)],
        [{"ids": []}, {"ids": [1] * (MOST_CHARS + 1)}, {"ids": [1, LARGEST_ID + 1]}],
    ),
    "chat": Rule(
        "prompt",
        [
            (chat(("user", "hi")), chat_prompt(("user", "hi"))),
            (chat(("user", "hi"), add_generation_prompt=True), chat_prompt(("user", "hi"))),
            (chat(("user", "hi"), add_generation_prompt=False), chat_prompt(("user", "hi"), add=False)),
            (chat(("system", ""), ("user", "x" * MOST_CHARS)), chat_prompt(("system", ""), ("user", "x" * MOST_CHARS))),
            (chat(*[("user", "")] * 1023, ("user", "x")), chat_prompt(*[("user", "")] * 1023, ("user", "x"))),
        ],
        [
            chat(),
            chat(*[("user", "")] * 1024, ("user", "x")),
            chat(("user", "")),
            chat(("user", "x" * MOST_CHARS), ("user", "x")),
            (chat(("", "hi")), "chat.messages.role"),
            (chat(("a user", "hi")), "chat.messages.role"),
            (chat(("user", "a\0b")), "chat.messages.content"),
        ],
    ),
    "max_tokens": Rule("max_tokens", [(1, 1), (MOST_TOKENS, MOST_TOKENS)], [0, MOST_TOKENS + 1, 2**32 - 1]),
    "min_tokens": unsupported(off=[0], fails=[1]),
    "stop": Rule(
        "stop",
        [([], ()), (["x"], ("x",)), ([".", "x" * 256], (".", "x" * 256)), (["ab"] * 16, ("ab",) * 16)],
        [["x"] * 17, [""], ["a", "x" * 257], ["a\0"]],
    ),
    "stop_token_ids": Rule(
        "stop_ids",
        [([], frozenset()), ([0, LARGEST_ID], {0, LARGEST_ID}), (list(range(256)), set(range(256)))],
        [list(range(257)), [LARGEST_ID + 1]],
    ),
    "ignore_eos": Rule("ignore_eos", [(False, False), (True, True)]),
    "deadline_ms": Rule("timeout_ms", [(0, None), (1, 1), (2**64 - 1, 2**64 - 1)]),
    "temperature": number("temperature", least=0, most=2, absent=0, fails=[-LEAST_FLOAT, -1]),
    "top_p": number("top_p", least=LEAST_FLOAT, most=1, absent=1, fails=[0, -LEAST_FLOAT]),
    "top_k": Rule("top_k", [(None, 0), (0, 0), (1, 1), (LARGEST_ID, LARGEST_ID)], [LARGEST_ID + 1]),
    "min_p": number("min_p", least=0, most=1, absent=0, fails=[-LEAST_FLOAT]),
    "seed": Rule("seed", [(None, None), (0, 0), (LARGEST_SEED, LARGEST_SEED)]),
    "n": unsupported(off=[1], fails=[0, 2]),
    "repetition_penalty": unsupported(off=[1], fails=[0, above(1), NAN]),
    "presence_penalty": unsupported(off=[0], fails=[LEAST_FLOAT, -1, NAN]),
    "frequency_penalty": unsupported(off=[0], fails=[LEAST_FLOAT, -1, NAN]),
    "logit_bias": unsupported(off=[{}], fails=[{0: 0.0}, {1: 0.5}]),
    "grammar": unsupported(off=[], fails=[{}, {"json_schema": "{}"}, {"regex": ""}]),
    "logprobs": unsupported(off=[], fails=[{}, {"top": 1, "raw": True}]),
    "prompt_logprobs": unsupported(off=[], fails=[{}, {"processed": True}]),
    "receipt": unsupported(off=[], fails=[{}, {"mode": 1}]),
}
PASSES = [(name, *case) for name, rule in RULES.items() for case in rule.passes]
FAILS = [
    (name, *(case if isinstance(case, tuple) else (case, name))) for name, rule in RULES.items() for case in rule.fails
]


def shown(value: object) -> str:
    return repr(value)[:24]


def test_every_field_of_a_request_has_a_rule_here() -> None:
    assert list(RULES) == [field.name for field in descriptor("ExecuteRequest").fields]


def test_everything_the_worker_is_given_comes_from_a_field() -> None:
    from_metadata = {"traceparent"}
    assert {rule.param for rule in RULES.values() if rule.param} == {
        field.name for field in dataclasses.fields(ExecuteParams)
    } - from_metadata


@pytest.mark.requirement("WORKER-4302")
@pytest.mark.requirement("WORKER-4301")
@pytest.mark.requirement("WORKER-4421")
@pytest.mark.parametrize(("name", "value", "given"), PASSES, ids=shown)
def test_a_value_within_the_limits_reaches_the_worker(
    served: Served, peer: Peer, name: str, value: object, given: object
) -> None:
    _, error = outcome(peer.stream("Execute", execute_request(**{name: value}), timeout=None))
    assert error is None, error.details()
    ((params, _),) = served.worker.executed
    if given == OFF:
        assert params == ExecuteParams(job_id="job", prompt="hello", max_tokens=8)
    else:
        param = RULES[name].param
        assert param is not None
        assert getattr(params, param) == given


@pytest.mark.requirement("WORKER-4240")
@pytest.mark.requirement("WORKER-4302")
@pytest.mark.requirement("WORKER-4241")
@pytest.mark.requirement("WORKER-4301")
@pytest.mark.requirement("WORKER-4421")
@pytest.mark.parametrize(("name", "value", "named"), FAILS, ids=shown)
def test_a_value_beyond_the_limits_is_refused_by_name(
    served: Served, peer: Peer, name: str, value: object, named: str
) -> None:
    error = failure(peer.stream("Execute", execute_request(**{name: value})))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_detail(error).field == named
    assert error.details().startswith(f"{named}: ")
    assert served.worker.calls == 0


def test_a_job_without_any_prompt_is_refused(served: Served, peer: Peer) -> None:
    error = failure(peer.execute(prompt_text=None))
    assert error.details() == "input: missing; give prompt_text, prompt_token_ids or chat"
    assert error_detail(error).field == "input"
    assert served.worker.calls == 0


@pytest.mark.requirement("WORKER-4304")
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt_text": "hunter2\0"},
        {"chat": chat(("user", "hunter2\0"))},
        {"job_id": "hunter2 "},
        {"stop": ["hunter2\0"]},
    ],
)
def test_a_refusal_never_repeats_what_a_person_wrote(peer: Peer, fields: dict[str, Any]) -> None:
    error = failure(peer.execute(**fields))
    assert "hunter2" not in f"{error.details()}{error.trailing_metadata()}"


@pytest.mark.requirement("WORKER-4304")
def test_a_refusal_tells_the_value_and_the_limit(peer: Peer) -> None:
    assert failure(peer.execute(max_tokens=65)).details() == "max_tokens: 65 is not allowed; it must be 1 to 64"
    assert failure(peer.execute(temperature=2.5)).details() == "temperature: 2.5 is not allowed; it must be 0 to 2"
    assert failure(peer.execute(top_p=0)).details() == "top_p: 0 is not allowed; it must be above 0 and at most 1"
    assert (
        failure(peer.execute(prompt_text="x" * 101)).details() == "prompt_text: 101 characters; it must have 1 to 100"
    )
