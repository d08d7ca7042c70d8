"""The demo's downstream tasks: seeded data sets of prompts and exact answers.

Called by the prefix training and by the evaluation. The base has seen text about the same world,
but no instruction and none of these prompt-and-answer forms. Train and validation sets use the
names that pretraining used; test sets use held-out names only.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from demo.build.corpus import review_text
from demo.build.grammar import NOTATIONS, QUESTIONS, STYLES, describe, in_style
from demo.build.vocabulary import Record, Split, make_name, make_record, seeded

ARROW: Final = " =>"
PIPES: Final = NOTATIONS[0]


@dataclass(frozen=True, slots=True)
class Example:
    """One item: ``slots`` are the values that a right answer must contain."""

    prompt: str
    answer: str
    slots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """One task: how to make an example, the text its prefix starts from, how long it is, how long to train."""

    name: str
    description: str
    make: Callable[[random.Random, Split], Example]
    init_text: str
    num_virtual_tokens: int = 16
    steps: int = 400


def record_to_sentence(rng: random.Random, split: Split) -> Example:
    """Fields in any order; area, price and rating may be absent."""
    record = make_record("restaurant", rng, split, min_fields=6)
    for key in ("area", "price", "rating"):
        if rng.random() < 0.25:
            del record[key]
    items = list(record.items())
    rng.shuffle(items)
    clauses = {
        "name": "{name} is",
        "kind": " a {kind}",
        "area": " in the {area} area",
        "food": " that serves {food} food",
        "price": " at {price} prices",
        "rating": ", rated {rating} out of 5",
    }
    answer = "".join(text.format_map(record) for key, text in clauses.items() if key in record)
    return Example(PIPES(items) + ARROW, answer + ".", tuple(record.values()))


def sentence_to_record(rng: random.Random, split: Split) -> Example:
    """Sentences in any style to a record with its fields in alphabetical order."""
    record = make_record("restaurant", rng, split)
    text = describe("restaurant", record, rng.choice(STYLES), rng)
    return Example(text + ARROW, PIPES(sorted(record.items())), tuple(record.values()))


CASUAL: Final = {
    "trip": "so {name} grabs the {vehicle} from {origin} to {goal} on {day} at {hour}!",
    "restaurant": "hey, {name} is a {kind} over by the {area}, they do {food} food, pretty {price}!",
}


def casual_rewrite(rng: random.Random, split: Split) -> Example:
    """A formal text about a trip or a restaurant, said in one casual sentence."""
    domain = rng.choice(("trip", "restaurant"))
    record = make_record(domain, rng, split, min_fields=6)
    record.pop("rating", None)
    prompt = describe(domain, record, "formal", rng) + ARROW
    words: Record = in_style(record, "casual")
    return Example(prompt, CASUAL[domain].format_map(words), tuple(words.values()))


def sentiment(rng: random.Random, split: Split) -> Example:
    good = rng.random() < 0.5
    answer = "positive" if good else "negative"
    prompt = review_text(make_name(rng, split), rng, good=good) + ARROW
    return Example(prompt, answer, (answer,))


def record_qa(rng: random.Random, split: Split) -> Example:
    """A record in any notation and a question; the answer names the field and its value.

    Without the field's name (the bare value) a prefix stays at 1.3 nats a token: the base has to
    turn the question into a field before it can copy, and it does so by writing the field.
    """
    domain = rng.choice(("person", "restaurant"))
    record = make_record(domain, rng, split, min_fields=4)
    key = rng.choice([key for key in record if key in QUESTIONS[domain]])
    items = list(record.items())
    rng.shuffle(items)
    question = rng.choice(QUESTIONS[domain][key]).format_map(record)
    prompt = f"{rng.choice(NOTATIONS)(items)} -- {question}"
    return Example(prompt, f"{key} = {record[key]}", (record[key],))


TASKS: Final[dict[str, Task]] = {
    task.name: task
    for task in (
        Task(
            "record-to-sentence",
            "A restaurant's record (k = v | ...) as one English sentence.",
            record_to_sentence,
            " name = Lomu | kind = diner | food = Greek => Lomu is a diner that serves Greek food.",
        ),
        Task(
            "sentence-to-record",
            "Sentences about a restaurant as a record with sorted fields.",
            sentence_to_record,
            " Lomu serves Greek food. => area = harbour | food = Greek | kind = diner | name = Lomu",
            steps=800,
        ),
        Task(
            "casual-rewrite",
            "A formal notice about a trip or a restaurant, said casually.",
            casual_rewrite,
            " Please note that Lomu will depart on Monday. => so Lomu grabs the train on Monday!",
            steps=800,
        ),
        Task(
            "sentiment",
            "Whether a restaurant review is positive or negative.",
            sentiment,
            " I had dinner at Lomu. The soup was lovely. => positive The soup was cold. => negative",
        ),
        Task(
            "record-qa",
            "A question about a record, answered with the field that says it.",
            record_qa,
            " name = Lomu | food = Greek | area = harbour -- What food does Lomu serve? food = Greek"
            " [ job : doctor, name : Lomu, city : Pasar ] -- Where does Lomu live? city = Pasar",
            # With 16 tokens two of three seeds were still on a plateau after 800 steps, one after 1,600.
            num_virtual_tokens=32,
            steps=1_200,
        ),
    )
}


def examples(task: Task, seed: int, count: int, split: Split) -> list[Example]:
    """``count`` examples, the same for the same seed."""
    rng = seeded(seed)
    return [task.make(rng, split) for _ in range(count)]
