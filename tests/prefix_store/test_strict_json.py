"""JSON with one meaning per text."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefix_store.strict_json import MAX_INT, parse

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | st.integers(-MAX_INT, MAX_INT) | FLOATS | TEXTS
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_plain_json_reads_as_python_reads_it(value: object) -> None:
    text = json.dumps(value)
    assert parse(text, max_depth=20) == json.loads(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 1}', "duplicate key 'a'"),
        ('[{"b": {"a": 1, "a": 1}}]', "duplicate key 'a'"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[1e999]", "too large"),
        (str(MAX_INT + 1), "outside of"),
        (str(-MAX_INT - 1), "outside of"),
        ("9" * 5000, "outside of"),
        ("-0", "outside of"),
        ("[[[[1]]]]", "deeper than 3"),
        ("[" * 50_000 + "]" * 50_000, "deeper than 3"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "deeper than 3"),
        ('"\\ud800"', "surrogate"),
        ('{"\\udfff": 1}', "surrogate"),
        ("[1,]", "Illegal trailing comma|Expecting value"),
        ("{'a': 1}", "Expecting property name"),
        ('"\n"', "control character"),
        ("", "Expecting value"),
    ],
)
def test_anything_else_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, max_depth=3)


def test_the_deepest_allowed_value_is_read() -> None:
    assert parse("[[[1]]]", max_depth=3) == [[[1]]]
    assert parse(str(MAX_INT), max_depth=0) == MAX_INT


@pytest.mark.parametrize("element", ["1", "-1", "[]", "{}", "1.5", '""'])
def test_a_full_header_of_small_values_costs_a_few_times_what_python_takes(element: str) -> None:
    """A header is read three times on its way in. Beside each other, so that a busy machine slows both."""
    text = f"[{','.join([element] * (65_000 // (len(element) + 1)))}]"
    ours, theirs = [], []
    for _ in range(9):
        started = time.thread_time()
        parse(text, max_depth=8)
        ours.append(time.thread_time() - started)
        started = time.thread_time()
        json.loads(text)
        theirs.append(time.thread_time() - started)
    assert min(ours) < 12 * min(theirs)
