"""Stop strings, held-back text, times and choices."""

from __future__ import annotations

import itertools
import random

import pytest

from server.engine.messages import SequenceOutput
from server.engine.output_processor import OutputProcessor, StopStringMatcher
from server.engine.tokenizer import Tokenizer
from server.types import (
    FinishReason,
    GenerationRequest,
    PrefixTier,
    RequestOutput,
    SamplingParams,
)


def push_all(stop: tuple[str, ...], parts: list[str]) -> tuple[str, str | None]:
    matcher, text = StopStringMatcher(stop), ""
    for part in parts:
        gained, found = matcher.push(part)
        text += gained
        if found is not None:
            return text, found
    return text + matcher.flush(), None


@pytest.mark.parametrize(
    ("stop", "parts", "expected"),
    [
        (("\n\n",), ["a", "\n", "\n", "b"], ("a", "\n\n")),
        (("ab",), ["ab", "c"], ("", "ab")),
        (("ab",), ["a", "b"], ("", "ab")),
        (("END",), ["xE", "N", "Dy"], ("x", "END")),
        (("aab",), ["a", "a", "a", "b"], ("a", "aab")),
        (("abab", "bc"), ["ab", "a", "c", "bc"], ("abac", "bc")),
        (("abcd", "bc"), ["a", "b", "c", "d"], ("a", "bc")),
        (("xyz",), ["x", "y"], ("xy", None)),
        (("xyz",), ["xy", "xy", "z"], ("xy", "xyz")),
        ((), ["a", "b"], ("ab", None)),
    ],
)
def test_text_ends_before_the_stop_string(
    stop: tuple[str, ...], parts: list[str], expected: tuple[str, str | None]
) -> None:
    assert push_all(stop, parts) == expected


@pytest.mark.parametrize("seed", range(10))
def test_one_stop_string_is_found_where_find_finds_it(seed: int) -> None:
    """And no letter of it is given out before it is whole, however the text is cut."""
    rng = random.Random(seed)
    for _ in range(200):
        text = "".join(rng.choices("ab", k=rng.randint(1, 14)))
        stop = "".join(rng.choices("ab", k=rng.randint(1, 5)))
        cuts = sorted({0, len(text), *rng.choices(range(len(text) + 1), k=4)})
        parts = [text[a:b] for a, b in itertools.pairwise(cuts)]
        at = text.find(stop)

        assert push_all((stop,), parts) == ((text, None) if at < 0 else (text[:at], stop))


def test_of_two_stop_strings_the_one_that_is_whole_first_ends_the_text() -> None:
    rng = random.Random(1)
    for _ in range(500):
        text = "".join(rng.choices("abc", k=12))
        stops = tuple("".join(rng.choices("abc", k=rng.randint(1, 3))) for _ in range(2))
        end = min((text.find(s) + len(s) for s in stops if s in text), default=None)
        given, found = push_all(stops, list(text))

        if end is None:
            assert (given, found) == (text, None)
        else:
            assert found in stops
            assert given + found == text[:end]


def test_what_can_not_be_a_stop_string_is_given_out_at_once() -> None:
    matcher = StopStringMatcher(("STOP",))

    assert matcher.push("hello") == ("hello", None)
    assert matcher.push(" S") == (" ", None)
    assert matcher.push("o") == ("So", None)
    assert matcher.flush() == ""


# ---- the processor ---------------------------------------------------------------------------------


def output(
    token_id: int | None,
    finish: FinishReason | None = None,
    *,
    index: int = 0,
    stop_token_id: int | None = None,
    error: str | None = None,
    queue_seconds: float = 0.5,
) -> SequenceOutput:
    return SequenceOutput(
        "r", index, token_id, finish, stop_token_id, error, PrefixTier.HOST, queue_seconds
    )


def processor(tokenizer: Tokenizer, **sampling: object) -> OutputProcessor:
    params = SamplingParams(max_tokens=99, **sampling)  # type: ignore[arg-type]
    return OutputProcessor(GenerationRequest("r", (1,), params), tokenizer, submitted=10.0)


def feed(p: OutputProcessor, token_ids: tuple[int, ...], last: FinishReason) -> list[RequestOutput]:
    reasons = [*(None for _ in token_ids[1:]), last]
    outputs = [
        p.process(output(t, reason), 11.0) for t, reason in zip(token_ids, reasons, strict=True)
    ]
    return [o for o in outputs if o is not None]


def test_a_stop_string_split_over_tokens_ends_the_choice_and_is_named(tokenizer: Tokenizer) -> None:
    p = processor(tokenizer, stop=("x y",))
    outputs = feed(p, tokenizer.encode("the fox you"), FinishReason.LENGTH)

    assert "".join(o.text for o in outputs) == "the fo"
    assert outputs[-1].finish_reason is FinishReason.STOP
    assert outputs[-1].stop_reason == "x y"
    assert p.finished
    assert p.process(output(5), 12.0) is None, "the engine had not heard of it yet"


def test_a_stop_string_at_the_very_start_gives_an_empty_text(tokenizer: Tokenizer) -> None:
    p = processor(tokenizer, stop=("the",))
    outputs = feed(p, tokenizer.encode("the fox"), FinishReason.LENGTH)

    assert [o.text for o in outputs if o.text] == []
    assert outputs[-1].stop_reason == "the"


@pytest.mark.parametrize("last", [FinishReason.LENGTH, FinishReason.ERROR, FinishReason.ABORT])
def test_held_back_text_is_flushed_at_the_end(tokenizer: Tokenizer, last: FinishReason) -> None:
    p = processor(tokenizer, stop=("fox jumps",))
    for token_id in tokenizer.encode("the fox"):
        p.process(output(token_id), 11.0)
    final = p.process(output(None, last, error="x" if last is FinishReason.ERROR else None), 12.0)

    assert final is not None
    assert final.text == "fox"
    assert final.finish_reason is last


def test_a_stop_token_has_no_text_and_is_named_only_if_the_request_named_it(
    tokenizer: Tokenizer,
) -> None:
    token_ids = tokenizer.encode("the fox")
    for named, reason in [((token_ids[-1],), token_ids[-1]), ((), None)]:
        p = processor(tokenizer, stop_token_ids=named)
        parts = [p.process(output(t), 11.0) for t in token_ids[:-1]]
        last = output(token_ids[-1], FinishReason.STOP, stop_token_id=token_ids[-1])
        parts.append(p.process(last, 11.0))

        assert "".join(o.text for o in parts if o) == tokenizer.decode(token_ids[:-1])
        assert parts[-1] is not None
        assert parts[-1].stop_reason == reason
        assert parts[-1].num_output_tokens == len(token_ids), "it was sampled, so it counts"


def test_choices_have_their_own_text_counts_and_end(tokenizer: Tokenizer) -> None:
    p = processor(tokenizer, n=2, stop=("fox",))
    texts = {0: "", 1: ""}
    token_ids = {0: tokenizer.encode("the fox"), 1: tokenizer.encode("lazy dog")}
    for a, b in itertools.zip_longest(token_ids[0], token_ids[1]):
        for index, token_id in ((0, a), (1, b)):
            gained = None if token_id is None else p.process(output(token_id, index=index), 11.0)
            texts[index] += gained.text if gained else ""
    assert not p.finished
    last = p.process(output(None, FinishReason.ABORT, index=1), 12.0)

    assert texts == {0: "the ", 1: "lazy dog"}
    assert p.finished
    assert last is not None
    assert last.num_output_tokens == len(token_ids[1])
    assert p.num_output_tokens == len(token_ids[0]) + len(token_ids[1])


def test_times_are_seconds_since_the_request_was_submitted(tokenizer: Tokenizer) -> None:
    p = processor(tokenizer, n=2)
    p.process(output(5, index=0), 12.0)
    p.process(output(5, index=1), 12.5)
    p.process(output(6, index=0), 13.0)
    p.process(output(6, index=1), 14.5)
    last = p.process(output(None, FinishReason.ABORT, index=0), 16.0)

    assert last is not None
    assert last.timings.queue_seconds == 0.5
    assert last.timings.first_token_seconds == 2.0
    assert last.timings.finished_seconds == 6.0
    assert p.inter_token_seconds == [1.0, 2.0], "between tokens of one choice, not across choices"


def test_failing_ends_what_has_not_ended_and_nothing_twice(tokenizer: Tokenizer) -> None:
    p = processor(tokenizer, n=3)
    p.process(output(5, FinishReason.LENGTH, index=1), 11.0)
    outputs = p.fail("the engine has failed", FinishReason.ABORT)

    assert [(o.index, o.finish_reason, o.error) for o in outputs] == [
        (0, FinishReason.ABORT, "the engine has failed"),
        (2, FinishReason.ABORT, "the engine has failed"),
    ]
    assert p.finished
    assert p.fail("again", FinishReason.ABORT) == []


def test_a_stop_string_does_not_end_a_choice_before_min_tokens(tokenizer: Tokenizer) -> None:
    (x,) = tokenizer.encode("x")
    p = processor(tokenizer, stop=("x",), min_tokens=2)
    outputs = [p.process(output(x), 11.0) for _ in range(3)]

    assert [o.text for o in outputs if o] == ["x", "x", ""]
    assert [o.finish_reason for o in outputs if o] == [None, None, FinishReason.STOP]
