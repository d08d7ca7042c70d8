"""The demo's text generator: same seed, same text; held-out names stay out."""

from itertools import islice

import pytest

from demo.build.corpus import documents
from demo.build.tasks import TASKS, Task, examples
from demo.build.vocabulary import FIELDS, is_held_out, make_name, make_record, seeded


def test_same_seed_gives_the_same_documents() -> None:
    assert list(islice(documents(3), 200)) == list(islice(documents(3), 200))
    assert list(islice(documents(3), 200)) != list(islice(documents(4), 200))


def test_first_document_does_not_change_between_machines() -> None:
    """The stream is part of what the shipped model is: a change here means a new base."""
    assert next(documents(1)) == FIRST_DOCUMENT


def test_names_are_on_their_side_of_the_split() -> None:
    rng = seeded(0)
    assert not any(is_held_out(make_name(rng, "train")) for _ in range(200))
    assert all(is_held_out(make_name(rng, "test")) for _ in range(50))


def test_records_hold_their_first_field_and_keep_the_canonical_order() -> None:
    rng = seeded(0)
    for domain, fields in FIELDS.items():
        record = make_record(domain, rng, "train")
        assert next(iter(fields)) in record
        assert list(record) == [key for key in fields if key in record]


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_no_document_holds_a_task_item(task: Task) -> None:
    """Neither prompt and answer in a row, nor, where it is a whole text, the answer alone."""
    items = examples(task, 5, 200, "train")
    for text in islice(documents(6), 3_000):
        assert not any(f"{item.prompt} {item.answer}" in text for item in items)


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS.keys())
def test_answers_say_their_slots(task: Task) -> None:
    for item in examples(task, 5, 50, "test"):
        assert all(slot in item.answer for slot in item.slots)


FIRST_DOCUMENT = "material : bamboo, item : lamp, maker : Voskam\n - hey, Voskam goes with bamboo and does a lamp!"
