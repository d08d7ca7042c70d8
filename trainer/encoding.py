"""Examples as tokens: the same tokens that the server would make of the same prompt. Pure, on any thread.

A prefix is learned for the tokens it sees. So prompts are encoded by the server's own tokenizer call or the model's
chat template, and a completion by what follows the prompt when both are encoded together. Where training and
serving could still differ, a `Notice` says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from server.engine.tokenizer import Tokenizer
from server.errors import InvalidParameter
from trainer.data import Example, Message
from trainer.errors import BadData


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """One example as tokens, and the text that a right answer is."""

    prompt_token_ids: tuple[int, ...]
    completion_token_ids: tuple[int, ...]
    reference: str

    @property
    def num_tokens(self) -> int:
        """Of prompt and completion."""
        return len(self.prompt_token_ids) + len(self.completion_token_ids)


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that the user should know: a word for programs and a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class EncodingSettings:
    """How completions begin and end.

    `separator`: put before each completion; None: a space, if neither side of any joint has white space.
    `end_token_ids`: what ends a text for the server; one of them is learned as the end. `stop`: where the model has
    none, the first of these is. `max_tokens`: longer examples are left out, None for no limit.
    """

    separator: str | None
    end_token_ids: frozenset[int]
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None


@dataclass(slots=True)
class _Found:
    """What was noticed along the way: lines of examples."""

    joined_otherwise: list[int] = field(default_factory=list)
    too_long: list[int] = field(default_factory=list)
    other_template: list[int] = field(default_factory=list)


class ExampleEncoder:
    """Encodes examples for one tokenizer. `separator` is decided by the first examples it gets, and told once."""

    def __init__(self, tokenizer: Tokenizer, settings: EncodingSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        self._separator = settings.separator
        self._end = self._end_of_text(settings.end_token_ids)
        self._told = False

    @property
    def separator(self) -> str | None:
        """What stands before each completion; None before that is decided."""
        return self._separator

    def encode(self, examples: Sequence[Example]) -> tuple[list[EncodedExample], list[Notice]]:
        """The examples that are short enough, in order, and what is worth knowing. Raises `BadData` for none."""
        notices: list[Notice] = []
        if not self._told:
            notices = [*self._decide_separator(examples), *self._notices_of_tokenizer(examples)]
            self._told = True
        found = _Found()
        encoded = []
        for example in examples:
            one = self._encode(example, found)
            limit = self._settings.max_tokens
            if limit is not None and one.num_tokens > limit:
                found.too_long.append(example.line)
            else:
                encoded.append(one)
        if not encoded:
            raise BadData(
                f"all {len(examples)} examples are longer than the {self._settings.max_tokens} tokens that there is "
                "room for behind the prefix"
            )
        return encoded, notices + self._notices_of(found, len(examples))

    def _encode(self, example: Example, found: _Found) -> EncodedExample:
        if isinstance(example.prompt, str):
            prompt, completion = self._text(example.prompt, example.completion, found, example.line)
        else:
            prompt, completion = self._chat(example.prompt, example.completion, found, example.line)
        if not prompt:
            raise BadData(f"line {example.line}: the prompt has no tokens")
        return EncodedExample(prompt, completion, example.completion)

    def _text(
        self, prompt: str, completion: str, found: _Found, line: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        continued = (self._separator or "") + completion
        if not self._settings.end_token_ids and self._settings.stop:
            continued += self._settings.stop[0]
        ids = self._tokenizer.encode(prompt)
        joint = self._tokenizer.encode(prompt + continued)
        if len(joint) > len(ids) and joint[: len(ids)] == ids:
            return ids, (*joint[len(ids) :], *self._end)
        found.joined_otherwise.append(line)
        return ids, (*self._tokenizer.encode(continued, special_tokens=False), *self._end)

    def _chat(
        self, turns: tuple[Message, ...], answer: str, found: _Found, line: int
    ) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The template's own tokens for the answer, up to and with its end of turn."""
        history = [{"role": turn.role, "content": turn.content} for turn in turns]
        whole = [*history, {"role": "assistant", "content": answer}]
        try:
            ids = self._tokenizer.encode_chat(history, add_generation_prompt=True)
            joint = self._tokenizer.encode_chat(whole)
        except InvalidParameter as error:
            raise BadData(f"line {line}: {error}") from None
        rest = joint[len(ids) :]
        ends = [place for place, token in enumerate(rest) if token in self._settings.end_token_ids]
        if joint[: len(ids)] != ids or not rest:
            found.other_template.append(line)
            rest, ends = self._tokenizer.encode(answer, special_tokens=False), []
        return ids, rest[: ends[0] + 1] if ends else (*rest, *self._end)

    def _end_of_text(self, end_token_ids: frozenset[int]) -> tuple[int, ...]:
        """The end that is learned: the tokenizer's own if the server stops at it, else the first that does."""
        own = self._tokenizer.eos_token_id
        return (own,) if own in end_token_ids else tuple(sorted(end_token_ids)[:1])

    def _decide_separator(self, examples: Sequence[Example]) -> list[Notice]:
        if self._separator is not None:
            return []
        joints = [(e.prompt[-1:], e.completion[:1]) for e in examples if isinstance(e.prompt, str)]
        self._separator = ""
        if not joints or any(side.isspace() for joint in joints for side in joint):
            return []
        self._separator = " "
        return [
            Notice(
                "separator",
                "no prompt ends and no completion begins with white space: a space is learned before each completion; "
                "--separator '' learns none",
            )
        ]

    def _notices_of_tokenizer(self, examples: Sequence[Example]) -> list[Notice]:
        notices = []
        bare = self._tokenizer.encode("a", special_tokens=False)
        whole = self._tokenizer.encode("a")
        if whole[-len(bare) :] != bare:
            notices.append(
                Notice(
                    "special_token_behind_prompt",
                    "the tokenizer puts a special token behind each prompt, in serving too: completions follow it",
                )
            )
        chats = [e for e in examples if not isinstance(e.prompt, str)]
        if chats and whole[0] != bare[0]:
            notices.append(
                Notice(
                    "chat_and_begin_token",
                    "prompts are written by the chat template; a client that renders it to text itself would get the "
                    f"tokenizer's first token ({whole[0]}) once more: send the template's token ids",
                )
            )
        if not self._end and not self._settings.stop:
            notices.append(
                Notice(
                    "no_end",
                    "the model names no end-of-text token, so answers end at max_tokens only; --stop gives them an end",
                )
            )
        return notices

    def _notices_of(self, found: _Found, num_examples: int) -> list[Notice]:
        told = [
            (
                "joined_otherwise",
                found.joined_otherwise,
                "have other tokens where prompt and completion meet than a text of both; they are encoded apart, as in serving",
            ),
            (
                "too_long",
                found.too_long,
                f"are longer than the {self._settings.max_tokens} tokens that there is room for; they are left out",
            ),
            (
                "other_template",
                found.other_template,
                "are written otherwise by the chat template once they are answered; the answer's plain tokens are learned",
            ),
        ]
        return [
            Notice(code, f"{len(lines)} of {num_examples} examples {what} ({_lines(lines)})")
            for code, lines, what in told
            if lines
        ]


def _lines(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:5]))
    return f"line {shown}" if len(numbers) == 1 else f"lines {shown}{', ...' * (len(numbers) > 5)}"


def opening_tokens(tokenizer: Tokenizer) -> tuple[int, ...]:
    """The special tokens that the tokenizer puts before any text; often none."""
    bare, whole = tokenizer.encode("a", special_tokens=False), tokenizer.encode("a")
    places = range(len(whole) - len(bare) + 1)
    return whole[: next((at for at in places if whole[at : at + len(bare)] == bare), 0)]


def with_text(tokenizer: Tokenizer, text: str, prompt: tuple[int, ...]) -> tuple[int, ...]:
    """`text` before a prompt: a beginning-of-text token stands once, at the very front."""
    opening = opening_tokens(tokenizer)
    body = tokenizer.encode(text, special_tokens=False)  # no end of text between the two
    return opening + body + without_opening(opening, prompt)


def without_opening(opening: tuple[int, ...], tokens: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens behind the opening, if they begin with it."""
    return tokens[len(opening) :] if tokens[: len(opening)] == opening else tokens


def length_summary(examples: Sequence[EncodedExample]) -> dict[str, dict[str, int]]:
    """Least, median, 95th percentile and most tokens of prompts and completions."""

    def summary(lengths: list[int]) -> dict[str, int]:
        lengths = sorted(lengths)
        return {
            "min": lengths[0],
            "median": lengths[len(lengths) // 2],
            "p95": lengths[min(len(lengths) - 1, round(0.95 * len(lengths)))],
            "max": lengths[-1],
        }

    return {
        "prompt": summary([len(e.prompt_token_ids) for e in examples]),
        "completion": summary([len(e.completion_token_ids) for e in examples]),
    }
