"""JSON of a stranger is one thing to every reader, and small when it is parsed."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orcd_jax.checkpoint import untrusted_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def count(value: object) -> int:
    inner = value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return 1 + sum(map(count, inner))


@given(VALUES)
def test_json_is_read_as_it_was_written(value: object) -> None:
    raw = json.dumps(value, ensure_ascii=False).encode(errors="replace")
    assert untrusted_json.load(raw, most=10**6) == json.loads(raw)


@given(VALUES)
@pytest.mark.requirement("WORKER-4312")
def test_no_value_escapes_the_count(value: object) -> None:
    with pytest.raises(ValueError, match="more than"):
        untrusted_json.load(json.dumps(value).encode(), most=count(value) - 1)


@pytest.mark.parametrize("text", ["[1,2,3]", '{"a":1,"b":2}', "[[[]]]", "1"])
def test_as_many_values_as_the_limit_are_read(text: str) -> None:
    most = 1 + sum(text.count(c) for c in ",[{")
    assert untrusted_json.load(text.encode(), most=most) == json.loads(text)
    with pytest.raises(ValueError, match=f"more than {most - 1} values"):
        untrusted_json.load(text.encode(), most=most - 1)


@pytest.mark.requirement("WORKER-4312")
def test_an_object_has_as_many_fields_as_the_limit_and_no_more() -> None:
    value = {str(n): {"a": n} for n in range(64)}
    assert untrusted_json.load(json.dumps([value, value]).encode(), most=1_000) == [value, value]
    with pytest.raises(ValueError, match="more than 64 fields"):
        untrusted_json.load(json.dumps([value, value | {"more": 0}]).encode(), most=1_000)


@pytest.mark.parametrize(
    ("raw", "problem"),
    [
        (b"", "Expecting value"),
        (b"{", "Expecting property name"),
        (b"[1,]", "Expecting value|trailing comma"),
        (b'{"a": 1, "a": 1}', "a field twice"),
        (b'[{"b": {"a": 1, "a": 2}}]', "a field twice"),
        (b'{"a": 1, "\\u0061": 2}', "a field twice"),
        (b"NaN", "NaN is not JSON"),
        (b"[Infinity]", "Infinity is not JSON"),
        (b'{"a": -Infinity}', "-Infinity is not JSON"),
        (b"\xff", "can't decode"),
        (b"\xef\xbb\xbf{}", "BOM"),
        ('{"a": 1}'.encode("utf-16"), "can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"7" * 5_000, "4300 digits"),
    ],
    ids=lambda value: ascii(value[:20]),
)
@pytest.mark.requirement("WORKER-4310")
def test_what_readers_may_see_differently_is_refused(raw: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        untrusted_json.load(raw, most=10**6)
