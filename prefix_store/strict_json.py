"""JSON as a file format needs it: one text, one meaning.

Python's parser accepts duplicate keys (the last wins: a spoofed field), NaN and Infinity, numbers of any
size and nesting of any depth. This one refuses them all. Pure functions on any thread; called by `header` and `manifest`.
"""

from __future__ import annotations

import json
import math
import re
from typing import Final, NoReturn

from pydantic import JsonValue

MAX_INT: Final = 2**53
"""Larger integers change their value in readers that hold numbers as doubles."""

_LONG_INT: Final = re.compile(r"[0-9]{16}")
"""Without one, and without a minus zero, no integer is refused; so thirty thousand need no call each."""


def parse(text: str, *, max_depth: int) -> JsonValue:
    """The value of `text`, at most `max_depth` containers deep; raises `ValueError` with a sentence that is safe to show to the caller."""
    try:
        value: JsonValue = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_int=_bounded_int if "-0" in text or _LONG_INT.search(text) else int,
            parse_float=_finite_float,
            parse_constant=_no_constant,
        )
    except RecursionError:
        raise ValueError(f"nested deeper than {max_depth} levels") from None
    if _is_deeper(value, max_depth):
        raise ValueError(f"nested deeper than {max_depth} levels")
    _no_lone_surrogates(text, value)
    return value


def _unique_keys(pairs: list[tuple[str, JsonValue]]) -> dict[str, JsonValue]:
    result: dict[str, JsonValue] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"duplicate key {key[:64]!r}")
        result[key] = value
    return result


def _bounded_int(digits: str) -> int:
    # Length first: int() of thousands of digits is slow. "-0" is an integer here and a float elsewhere.
    if len(digits) > 17 or digits == "-0" or abs(int(digits)) > MAX_INT:
        raise ValueError(f"integer {digits[:20]} is outside of -2^53 to 2^53")
    return int(digits)


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"number {digits[:20]} is too large")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _is_deeper(value: JsonValue, limit: int) -> bool:
    """Whether there are more than `limit` levels of containers; goes down by levels, so it can not recurse."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(limit):
        level = [
            child
            for container in level
            for child in (container.values() if type(container) is dict else container)
            if type(child) is dict or type(child) is list  # of json.loads, so of no subclass
        ]
    return bool(level)


def _no_lone_surrogates(text: str, value: JsonValue) -> None:
    # Only a \u escape can make one; Python keeps it, and then fails where the text is first encoded.
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("a string holds half of a surrogate pair") from None
