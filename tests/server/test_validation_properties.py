"""Every rule for a field, driven by whatever could come: accepted exactly where the rule holds, refused by name.

The rules are said here a second time, in other words. A refusal is made of the field's name, numbers and fixed words:
so nothing that a caller wrote is in it.
"""

from __future__ import annotations

import inspect
import math
import re
import string
from collections.abc import Callable
from fractions import Fraction
from typing import ParamSpec, TypeVar

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orcd_jax.errors import ErrorCode, OrcdError
from orcd_jax.server import validation

P = ParamSpec("P")
T = TypeVar("T")

NUMBER = r"-?(\d+(\.\d+)?(e[+-]?\d+)?|inf)|nan"
CHARACTERS = r"\d+ characters?"
HOSTILE = (
    "\x1b[2J",
    "\x1b]0;owned\x07",
    "\u202e",
    "\u2066",
    "\0",
    "\n",
    "\r",
    "\x7f",
    "\x9b31m",
    "\u2028",
    "\ufeff",
    "é",
    "٣",
)

unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""A busy machine is no reason to fail."""

characters = st.characters() | st.characters(categories=["Cs"]) | st.sampled_from("aZ09_-/:.@= ;|&$`")
texts = st.one_of(
    st.text(characters, max_size=40),
    st.lists(st.sampled_from([*HOSTILE, "abc", "f00d", "-", "_"]), max_size=6).map("".join),
)
fields = st.sampled_from(["job_id", "chat.messages.role", "prompt_text", "top_p"])


def long_texts(limit: int, alphabet: str) -> st.SearchStrategy[str]:
    """Texts about as long as a limit, of allowed characters and perhaps one other."""
    return st.builds(
        lambda length, filler, at, other: (filler * length)[:at] + other + (filler * length)[at:],
        st.integers(max(0, limit - 2), limit + 2),
        st.sampled_from(alphabet),
        st.integers(0, limit + 2),
        st.sampled_from(["", "", alphabet[0], *HOSTILE]),
    )


def held(field: str, rule: bool, problem: str, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """What a rule lets pass, checked against whether it should; None when it was refused, as ``problem`` says."""
    try:
        passed = call(*args, **kwargs)
    except OrcdError as error:
        refused = error
    else:
        assert rule, f"{call.__name__} let pass what it must not"
        return passed
    assert not rule, f"{call.__name__} refused what it must let pass: {refused.message}"
    assert refused.code is ErrorCode.INVALID_PARAMS
    assert refused.field == field
    assert re.fullmatch(f"{re.escape(field)}: (?:{problem})", refused.message, re.ASCII), ascii(refused.message)
    assert refused.message.isprintable()
    assert len(refused.message) < 200
    return None


IDENTIFIER = f"(missing|{CHARACTERS} that are not all allowed); it must be 1 to 256 of A-Z a-z 0-9 _ -"


def is_identifier(value: str) -> bool:
    return 0 < len(value) < 257 and not set(value) - set(string.ascii_letters + string.digits + "_-")


@unhurried
@given(fields, texts | long_texts(256, "aZ9_-"))
@example("job_id", "a\n")
@pytest.mark.requirement("WORKER-4300")
@pytest.mark.requirement("WORKER-4304")
def test_identifiers(field: str, value: str) -> None:
    passed = held(field, is_identifier(value), IDENTIFIER, validation.identifier, field, value)
    assert passed in (None, value)
    allowed = value == "" or is_identifier(value)
    passed = held(field, allowed, IDENTIFIER, validation.optional_identifier, field, value)
    assert passed in (None, value)


@unhurried
@given(fields, texts | long_texts(512, "aZ9_-/:.@="))
@example("model_ref", "hf:org/repo@rev::file=x")
@example("model_ref", "a\n")
@pytest.mark.requirement("WORKER-4300")
@pytest.mark.requirement("WORKER-4304")
def test_model_references(field: str, value: str) -> None:
    allowed = len(value) <= 512 and not set(value) - set(string.ascii_letters + string.digits + "-_/:.@=")
    problem = f"{CHARACTERS} that are not all allowed; it must be 1 to 512 of A-Z a-z 0-9 - _ / : \\. @ ="
    passed = held(field, allowed, problem, validation.optional_model_ref, field, value)
    assert passed in (None, value)


@unhurried
@given(fields, texts | long_texts(64, "aF09") | st.binary(min_size=31, max_size=33).map(bytes.hex))
@example("expected_digest", "0" * 64 + "\n")
@example("expected_digest", "０" * 64)
@pytest.mark.requirement("WORKER-4303")
@pytest.mark.requirement("WORKER-4304")
def test_digests(field: str, value: str) -> None:
    allowed = value == "" or (len(value) == 64 and not set(value) - set(string.hexdigits))
    problem = f"{CHARACTERS}, or not all of them hex digits; it must be exactly 64 hex digits"
    passed = held(field, allowed, problem, validation.optional_digest, field, value)
    if allowed:
        assert passed is not None
        assert bytes.fromhex(passed) == bytes.fromhex(value)
        assert passed in (value, value.translate({ord(c): c.lower() for c in "ABCDEF"}))


@unhurried
@given(fields, st.binary(max_size=80))
@example("nonce", bytes(15))
@example("nonce", bytes(16))
@example("nonce", bytes(64))
@example("nonce", bytes(65))
def test_nonces(field: str, value: bytes) -> None:
    allowed = len(value) in range(16, 65)
    passed = held(field, allowed, r"\d+ bytes; it must have 16 to 64", validation.nonce, field, value)
    assert passed in (None, value)


TEXT = (
    f"{CHARACTERS}; it must have \\d+ to \\d+|it holds a NUL character; leave it out|"
    "it holds half a surrogate pair; it must be valid UTF-8"
)


def is_text(value: str, least: int, most: int) -> bool:
    return least <= len(value) <= most and not any(ord(c) == 0 or 0xD800 <= ord(c) < 0xE000 for c in value)


@unhurried
@given(fields, texts | st.text(characters), st.integers(0, 3), st.integers(1, 40))
@example("prompt_text", "\ud83d\ude00", 1, 9)
@pytest.mark.requirement("WORKER-4301")
@pytest.mark.requirement("WORKER-4304")
def test_texts(field: str, value: str, least: int, most: int) -> None:
    rule = is_text(value, least, most)
    passed = held(field, rule, TEXT, validation.text, field, value, least=least, most=most)
    assert passed in (None, value)
    if passed is not None:
        assert passed.encode().decode() == value


@unhurried
@given(fields, st.lists(texts | long_texts(256, "aé"), max_size=18))
@example("stop", ["x"] * 16)
@example("stop", ["x"] * 17)
@pytest.mark.requirement("WORKER-4301")
@pytest.mark.requirement("WORKER-4304")
def test_stop_strings(field: str, values: list[str]) -> None:
    rule = len(values) <= 16 and all(is_text(value, 1, 256) for value in values)
    problem = f"{TEXT}|\\d+ strings; there must be at most 16"
    passed = held(field, rule, problem, validation.stop_strings, field, values)
    assert passed in (None, tuple(values))


whole = st.integers() | st.integers(0, 70) | st.sampled_from([2**31 - 1, 2**31, 2**63, 2**64 - 1, 2**64, 10**5000])


@unhurried
@given(fields, whole, st.integers(0, 64), st.integers(0, 2**64))
@example("seed", 2**64 - 1, 0, 2**64 - 1)
@pytest.mark.requirement("WORKER-4302")
@pytest.mark.requirement("WORKER-4304")
def test_integers(field: str, value: int, least: int, span: int) -> None:
    most = least + span
    problem = rf"({NUMBER}|an integer beyond 64 bits) is not allowed; it must be \d+ to \d+"
    passed = held(field, least <= value <= most, problem, validation.integer, field, value, least=least, most=most)
    assert passed in (None, value)


@unhurried
@given(fields, st.floats() | st.floats(-0.1, 2.1), st.sampled_from([1.0, 2.0]), st.booleans())
@example("top_p", 0.0, 1.0, True)
@example("temperature", -0.0, 2.0, False)
@example("temperature", math.nextafter(2.0, 3.0), 2.0, False)
@example("min_p", -5e-324, 1.0, False)
@example("top_p", math.nan, 1.0, True)
@example("top_p", math.nan, 1.0, False)
@example("top_p", math.inf, 1.0, False)
@example("top_p", -math.inf, 1.0, True)
@pytest.mark.requirement("WORKER-4302")
@pytest.mark.requirement("WORKER-4304")
def test_numbers(field: str, value: float, most: float, least_excluded: bool) -> None:
    rule = False
    if value == value and abs(value) != math.inf:
        exact = Fraction(value)
        rule = (exact > 0 if least_excluded else exact >= 0) and exact <= int(most)
    problem = rf"({NUMBER}) is not allowed; it must be (above 0 and at most|0 to) [12]"
    passed = held(
        field, rule, problem, validation.number, field, value, least=0.0, most=most, least_excluded=least_excluded
    )
    assert passed is None or passed == value


@unhurried
@given(
    fields,
    st.lists(st.integers(-2, 12) | st.integers() | st.sampled_from([2**31 - 1, 2**31, 10**5000]), max_size=9),
    st.integers(0, 2),
    st.integers(2, 8),
    st.sampled_from([0, 1, 8, 263]),
)
@example("stop_token_ids", [2**31 - 1], 0, 8, 0)
@example("stop_token_ids", [2**31], 0, 8, 0)
@example("stop_token_ids", [262], 0, 8, 263)
@example("stop_token_ids", [263], 0, 8, 263)
@example("stop_token_ids", [5, -1], 0, 8, 263)
@pytest.mark.requirement("WORKER-4302")
@pytest.mark.requirement("WORKER-4304")
def test_token_ids(field: str, values: list[int], least: int, most: int, vocab_size: int) -> None:
    rule = least <= len(values) <= most and all(value in range(vocab_size or 2**31) for value in values)
    problem = r"\d+ token ids; there must be \d+ to \d+|a token id is not allowed; each must be 0 to \d+"
    passed = held(
        field, rule, problem, validation.token_ids, field, values, least=least, most=most, vocab_size=vocab_size
    )
    assert passed in (None, tuple(values))


@unhurried
@given(fields, st.booleans())
def test_what_is_not_supported(field: str, is_set: bool) -> None:
    held(field, not is_set, "this worker does not support it; leave it out", validation.absent, field, is_set)


@unhurried
@given(texts.map(lambda value: f"hunter2{value}hunter2"))
@pytest.mark.requirement("WORKER-4304")
def test_no_refusal_repeats_a_text(value: str) -> None:
    """Said again, plainly: nothing that a person wrote is in a message, however it breaks a rule."""
    calls: list[Callable[[], object]] = [
        lambda: validation.identifier("f", f"{value} "),
        lambda: validation.optional_identifier("f", f"{value}\n"),
        lambda: validation.optional_digest("f", f"{value}x"),
        lambda: validation.optional_model_ref("f", f"{value};"),
        lambda: validation.text("f", f"{value}\0", most=1_000),
        lambda: validation.text("f", f"{value}\ud800", most=1_000),
        lambda: validation.text("f", value, most=1),
        lambda: validation.stop_strings("f", [f"{value}\0"]),
        lambda: validation.stop_strings("f", [value] * 17),
    ]
    for call in calls:
        with pytest.raises(OrcdError) as caught:
            call()
        told = f"{caught.value!r} {caught.value.__cause__!r}"
        assert "hunter2" not in told
        assert told.isascii()
        assert told.isprintable()


def test_every_rule_is_driven_here() -> None:
    rules = {
        name for name, of in inspect.getmembers(validation, inspect.isfunction) if of.__module__ == validation.__name__
    }
    source = inspect.getsource(inspect.getmodule(test_identifiers))  # type: ignore[arg-type]
    undriven = {name for name in rules if not name.startswith("_") and f"validation.{name}, field" not in source}
    assert undriven == {"refusal"}  # which is what all of them raise
