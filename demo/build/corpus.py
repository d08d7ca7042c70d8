"""The pretraining text: a seeded generator of documents about the closed world.

Called by the tokenizer and base steps. A document puts two or three views of the same facts side
by side (a record, sentences in some style, questions with answers in prose) so that a small model
learns to read, to copy and to rephrase. It holds no instructions, and no document has the exact
form of a downstream task: what a prefix adds must not be in the base already.
"""

import random
from collections.abc import Callable, Iterator
from typing import Final

from demo.build.grammar import (
    NOTATIONS,
    QUESTIONS,
    STYLES,
    SUBJECT_KEY,
    chain,
    describe,
)
from demo.build.vocabulary import DAYS, FIELDS, Record, Split, make_name, make_record, seeded

SEPARATORS: Final = (" => ", " -- ", " // ", "\n - ")
DOMAIN_WEIGHTS: Final = {"restaurant": 30, "person": 18, "trip": 24, "product": 16, "weather": 12}

REVIEW_THINGS: Final = (
    "soup", "service", "waiter", "room", "dessert", "music", "bread", "wine", "menu", "terrace",
)  # fmt: skip
GOOD_WORDS: Final = (
    "lovely", "great", "friendly", "superb", "fresh", "charming", "wonderful", "delightful",
)  # fmt: skip
BAD_WORDS: Final = (
    "dreadful", "cold", "rude", "stale", "dirty", "terrible", "boring", "horrible",
)  # fmt: skip
GOOD_CLOSINGS: Final = (
    "We will come back soon.", "I would go again.", "We left happy.", "Worth the money.",
)  # fmt: skip
BAD_CLOSINGS: Final = (
    "We will never come back.", "I want my money back.", "We left hungry.", "Stay away.",
)  # fmt: skip


def pick_domain(rng: random.Random) -> str:
    return rng.choices(list(DOMAIN_WEIGHTS), list(DOMAIN_WEIGHTS.values()))[0]


def notate(record: Record, rng: random.Random) -> str:
    """The record in a random notation, its fields in random order."""
    items = list(record.items())
    if rng.random() < 0.5:
        rng.shuffle(items)
    return rng.choice(NOTATIONS)(items)


def record_then_text(rng: random.Random, split: Split) -> str:
    domain = pick_domain(rng)
    record = make_record(domain, rng, split)
    views = [notate(record, rng)]
    views += [describe(domain, record, rng.choice(STYLES), rng) for _ in range(rng.randint(1, 2))]
    return rng.choice(SEPARATORS).join(views)


def text_then_record(rng: random.Random, split: Split) -> str:
    domain = pick_domain(rng)
    record = make_record(domain, rng, split)
    text = describe(domain, record, rng.choice(STYLES), rng)
    views = [text] + [notate(record, rng) for _ in range(rng.randint(1, 2))]
    return rng.choice(SEPARATORS).join(views)


def one_text_in_styles(rng: random.Random, split: Split) -> str:
    domain = pick_domain(rng)
    record = make_record(domain, rng, split)
    styles = rng.sample(STYLES, rng.randint(2, 3))
    return rng.choice(SEPARATORS).join(describe(domain, record, style, rng) for style in styles)


def record_in_notations(rng: random.Random, split: Split) -> str:
    record = make_record(pick_domain(rng), rng, split)
    return rng.choice(SEPARATORS).join(notate(record, rng) for _ in range(rng.randint(2, 3)))


def questions_and_answers(rng: random.Random, split: Split) -> str:
    """A record or a text, then two or three questions, each answered by a whole sentence."""
    domain = pick_domain(rng)
    record = make_record(domain, rng, split, min_fields=4)
    facts = notate(record, rng)
    if rng.random() < 0.4:
        facts = describe(domain, record, "plain", rng)
    keys = [key for key in record if key in QUESTIONS[domain]]
    asked = rng.sample(keys, min(len(keys), rng.randint(2, 3)))
    turns = [
        rng.choice(QUESTIONS[domain][key]).format_map(record)
        + rng.choice((" ", " => ", " -- "))
        + chain(domain, [key], record, "plain", rng)
        for key in asked
    ]
    return facts + rng.choice(SEPARATORS) + " ".join(turns)


def review_text(name: str, rng: random.Random, *, good: bool) -> str:
    """Two or three opinions that all point the same way."""
    words, closings = (GOOD_WORDS, GOOD_CLOSINGS) if good else (BAD_WORDS, BAD_CLOSINGS)
    first, second, third = rng.sample(REVIEW_THINGS, 3)
    one, two, three = rng.sample(words, 3)
    opening = rng.choice(
        (
            f"We went to {name} on {rng.choice(DAYS)}.",
            f"I had dinner at {name}.",
            f"My friends took me to {name} on {rng.choice(DAYS)}.",
            f"Last {rng.choice(DAYS)} we ate at {name}.",
        )
    )
    body = rng.choice(
        (
            f"The {first} was {one} and the {second} was {two}.",
            f"The {first} was {one}, the {second} was {two} and the {third} was {three}.",
            f"What a {one} {first}, and a {two} {second} too.",
            f"I found the {first} {one}. The {second} was {two}.",
        )
    )
    closing = f" {rng.choice(closings)}" if rng.random() < 0.6 else ""
    return f"{opening} {body}{closing}"


def review_summary(name: str, rng: random.Random, *, good: bool) -> str:
    word, stars = ("positive", rng.choice("45")) if good else ("negative", rng.choice("12"))
    return rng.choice(
        (
            f"The review of {name} is {word}, with {stars} out of 5.",
            f"In short, a {word} visit to {name}.",
            f"So {name} got a {word} review, {stars} out of 5.",
            f"A rather {word} opinion of {name}.",
        )
    )


def reviews(rng: random.Random, split: Split) -> str:
    parts: list[str] = []
    for _ in range(rng.randint(1, 2)):
        name, good = make_name(rng, split), rng.random() < 0.5
        parts += [review_text(name, rng, good=good), review_summary(name, rng, good=good)]
    return rng.choice(SEPARATORS).join(parts)


def roster(rng: random.Random, split: Split) -> str:
    """A list of names said twice: the shortest lesson in copying."""
    names = [make_name(rng, split) for _ in range(rng.randint(3, 8))]
    again = list(names)
    if rng.random() < 0.4:
        again.reverse()
    return ", ".join(names) + rng.choice(SEPARATORS) + ", ".join(again)


DocumentMaker = Callable[[random.Random, Split], str]
DOCUMENT_WEIGHTS: Final[dict[DocumentMaker, int]] = {
    record_then_text: 26,
    text_then_record: 22,
    one_text_in_styles: 18,
    record_in_notations: 7,
    questions_and_answers: 16,
    reviews: 8,
    roster: 3,
}


def documents(seed: int, split: Split = "train") -> Iterator[str]:
    """An endless stream of documents, the same for the same seed."""
    rng = seeded(seed)
    makers, weights = list(DOCUMENT_WEIGHTS), list(DOCUMENT_WEIGHTS.values())
    while True:
        yield rng.choices(makers, weights)[0](rng, split)


def known_fields() -> list[tuple[str, str]]:
    """Every (domain, field) pair that the copying gate has to cover."""
    return [
        (domain, key)
        for domain, fields in FIELDS.items()
        for key in fields
        if key != SUBJECT_KEY[domain]
    ]
