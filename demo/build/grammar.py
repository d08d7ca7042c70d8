"""How the closed world is put into words: notations, sentences in three styles, questions.

Called by the corpus, and by the tasks for their inputs. A sentence is either a hand-written
template over several fields, or a chain of verb phrases, one per field, in any order. Every value
stands after a space wherever it occurs: a byte-level BPE gives ``Cuban`` and `` Cuban`` different
tokens, and a small model copies badly between the two.
"""

import random
from collections.abc import Callable, Sequence
from typing import Final, Literal

from demo.build.vocabulary import Record

Style = Literal["plain", "formal", "casual"]
STYLES: Final[tuple[Style, ...]] = ("plain", "formal", "casual")
Notation = Callable[[Sequence[tuple[str, str]]], str]

# Formal and casual text say the price in other words than the record does.
PRICE_WORDS: Final[dict[Style, dict[str, str]]] = {
    "plain": {"cheap": "cheap", "moderate": "moderate", "expensive": "expensive"},
    "formal": {"cheap": "inexpensive", "moderate": "reasonable", "expensive": "costly"},
    "casual": {"cheap": "cheap", "moderate": "okay", "expensive": "pricey"},
}

NOTATIONS: Final[tuple[Notation, ...]] = (
    lambda items: " | ".join(f"{key} = {value}" for key, value in items),
    lambda items: " ; ".join(f"{key} = {value}" for key, value in items),
    lambda items: ", ".join(f"{key} : {value}" for key, value in items),
    lambda items: " ".join(f"[ {key} : {value} ]" for key, value in items),
    lambda items: " / ".join(f"{key} is {value}" for key, value in items),
    lambda items: "{ " + ", ".join(f'"{key}" : {value}' for key, value in items) + " }",
)

SUBJECT_KEY: Final = {
    "restaurant": "name",
    "person": "name",
    "product": "maker",
    "trip": "name",
    "weather": "city",
}

VERB_PHRASES: Final[dict[str, dict[Style, dict[str, tuple[str, ...]]]]] = {
    "restaurant": {
        "plain": {
            "kind": ("is a {kind}", "is known as a {kind}"),
            "food": ("serves {food} food", "offers {food} dishes", "cooks {food} meals"),
            "area": ("is in the {area} area", "lies near the {area}", "is by the {area}"),
            "price": ("is {price}", "has {price} prices"),
            "rating": ("is rated {rating} out of 5", "has a rating of {rating} out of 5"),
        },
        "formal": {
            "kind": ("operates as a {kind}", "presents itself as a {kind}"),
            "food": ("specialises in {food} cuisine", "provides {food} cuisine"),
            "area": ("is located in the {area} area", "is situated near the {area}"),
            "price": ("maintains {price} prices", "is considered {price}"),
            "rating": ("has received a rating of {rating} out of 5",),
        },
        "casual": {
            "kind": ("is just a {kind}", "is this {kind}"),
            "food": ("does {food} food", "has got {food} stuff"),
            "area": ("is over by the {area}", "is down at the {area}"),
            "price": ("is pretty {price}", "feels {price}"),
            "rating": ("gets a {rating} out of 5", "got {rating} out of 5"),
        },
    },
    "person": {
        "plain": {
            "job": ("works as a {job}", "is a {job}"),
            "city": ("lives in {city}", "comes from {city}"),
            "age": ("is {age} years old", "turned {age} this year"),
            "hobby": ("likes {hobby}", "enjoys {hobby}", "spends weekends on {hobby}"),
        },
        "formal": {
            "job": ("is employed as a {job}", "practises as a {job}"),
            "city": ("resides in {city}", "is a resident of {city}"),
            "age": ("is {age} years of age",),
            "hobby": ("takes an interest in {hobby}", "pursues {hobby}"),
        },
        "casual": {
            "job": ("does the {job} thing", "is a {job} now"),
            "city": ("hangs out in {city}", "is over in {city}"),
            "age": ("is like {age}", "just hit {age}"),
            "hobby": ("is into {hobby}", "loves {hobby}"),
        },
    },
    "product": {
        "plain": {
            "item": ("makes this {item}", "sells a {item}"),
            "colour": ("has it in {colour}", "paints it {colour}"),
            "material": ("uses {material}", "builds it from {material}"),
            "cost": ("asks {cost} dollars", "sells it for {cost} dollars"),
        },
        "formal": {
            "item": ("manufactures the {item}", "supplies the {item}"),
            "colour": ("provides it in {colour}",),
            "material": ("manufactures it from {material}", "selects {material}"),
            "cost": ("requests {cost} dollars", "charges {cost} dollars"),
        },
        "casual": {
            "item": ("does a {item}", "has got a {item}"),
            "colour": ("does it in {colour}",),
            "material": ("goes with {material}", "is all {material}"),
            "cost": ("wants {cost} bucks", "takes {cost} bucks"),
        },
    },
    "trip": {
        "plain": {
            "origin": ("leaves from {origin}", "starts in {origin}"),
            "goal": ("travels to {goal}", "goes to {goal}", "arrives in {goal}"),
            "vehicle": ("takes the {vehicle}", "goes by {vehicle}"),
            "day": ("travels on {day}", "leaves on {day}"),
            "hour": ("leaves at {hour}", "sets off at {hour}"),
        },
        "formal": {
            "origin": ("shall depart from {origin}", "will depart from {origin}"),
            "goal": ("shall proceed to {goal}", "will be travelling to {goal}"),
            "vehicle": ("shall travel by {vehicle}", "intends to use the {vehicle}"),
            "day": ("shall travel on {day}", "will depart on {day}"),
            "hour": ("shall depart at {hour}", "will depart at {hour}"),
        },
        "casual": {
            "origin": ("is coming from {origin}", "heads out from {origin}"),
            "goal": ("is off to {goal}", "heads to {goal}", "is going to {goal}"),
            "vehicle": ("grabs the {vehicle}", "is taking the {vehicle}"),
            "day": ("is off on {day}", "goes on {day}"),
            "hour": ("heads out at {hour}", "is off at {hour}"),
        },
    },
    "weather": {
        "plain": {
            "day": ("expects this on {day}", "has this forecast for {day}"),
            "sky": ("will be {sky}", "has {sky} skies"),
            "wind": ("gets a {wind} wind", "has a {wind} wind"),
            "high": ("reaches {high} degrees", "has a high of {high} degrees"),
        },
        "formal": {
            "day": ("anticipates this on {day}",),
            "sky": ("is expected to be {sky}",),
            "wind": ("is subject to a {wind} wind",),
            "high": ("will attain {high} degrees",),
        },
        "casual": {
            "day": ("is looking at this on {day}",),
            "sky": ("is gonna be {sky}", "looks {sky}"),
            "wind": ("has got a {wind} breeze",),
            "high": ("hits {high} degrees",),
        },
    },
}

TEMPLATES: Final[dict[str, dict[Style, tuple[str, ...]]]] = {
    "restaurant": {
        "plain": (
            "{name} is a {kind} near the {area} with {food} dishes and {price} prices.",
            "There is a {kind} called {name} in the {area} area.",
            "The {kind} {name} serves {food} food at {price} prices.",
            "In the {area} area, {name} serves {food} food.",
            "A {kind} with {food} food and {price} prices is {name}, by the {area}.",
            "For {food} food try {name}, a {kind} rated {rating} out of 5.",
            "{name}, a {kind} in the {area} area, has a rating of {rating} out of 5.",
        ),
        "formal": (
            "We recommend {name}, a {kind} that specialises in {food} cuisine.",
            "Guests will find {name} in the {area} area, where prices are {price}.",
            "Please note that the {kind} {name} has received a rating of {rating} out of 5.",
        ),
        "casual": (
            "hey, {name} is a {kind} and they do {food} food!",
            "so {name} is {price}, down at the {area}!",
            "you should try {name}, they do {food} stuff over by the {area}!",
        ),
    },
    "person": {
        "plain": (
            "{name}, {age} years old, is a {job} from {city}.",
            "The {job} {name} lives in {city} and likes {hobby}.",
            "In {city} lives a {job} called {name}.",
            "Aged {age}, {name} enjoys {hobby} in {city}.",
        ),
        "formal": (
            "We are pleased to present {name}, a {job} residing in {city}.",
            "It should be noted that {name} is {age} years of age and pursues {hobby}.",
        ),
        "casual": (
            "hey, meet {name}, a {job} from {city}!",
            "so {name} is {age} and is into {hobby}!",
        ),
    },
    "product": {
        "plain": (
            "The {colour} {item} by {maker} costs {cost} dollars.",
            "This {item} is made of {material} by {maker}.",
            "A {colour} {item} of {material} is sold by {maker}.",
        ),
        "formal": (
            "We are pleased to offer the {item} manufactured by {maker} from {material}.",
            "The {item} in {colour} is available from {maker} at {cost} dollars.",
        ),
        "casual": (
            "check out the {colour} {item} from {maker}!",
            "{cost} bucks for the {maker} {item}, all {material}!",
        ),
    },
    "trip": {
        "plain": (
            "{name} travels from {origin} to {goal} by {vehicle}.",
            "On {day}, {name} takes the {vehicle} to {goal}.",
            "The {vehicle} takes {name} from {origin} to {goal} at {hour}.",
            "At {hour} on {day} {name} leaves {origin}.",
        ),
        "formal": (
            "We would like to inform you that {name} shall travel to {goal} by {vehicle}.",
            "Please note that {name} will depart from {origin} on {day} at {hour}.",
            "It should be noted that on {day} {name} shall proceed from {origin} to {goal}.",
            "Kindly be informed that {name} intends to use the {vehicle} to {goal} at {hour}.",
        ),
        "casual": (
            "hey, {name} is off to {goal} on {day}!",
            "so {name} grabs the {vehicle} from {origin} to {goal}!",
            "guess what, {name} heads out from {origin} at {hour} on {day}!",
            "{name} is taking the {vehicle} to {goal}, off at {hour}!",
        ),
    },
    "weather": {
        "plain": (
            "{day} will be {sky} in {city}, with a {wind} wind.",
            "In {city} it will be {sky}, with a high of {high} degrees.",
            "A {wind} wind blows in {city} on {day}.",
        ),
        "formal": (
            "Residents of {city} should note that {day} is expected to be {sky}.",
            "A maximum of {high} degrees is anticipated in {city}.",
        ),
        "casual": (
            "hey, {city} is gonna be {sky} on {day}!",
            "so {city} hits {high} degrees, looks {sky}!",
        ),
    },
}

QUESTIONS: Final[dict[str, dict[str, tuple[str, ...]]]] = {
    "restaurant": {
        "kind": ("What kind of place is {name}?",),
        "food": ("What food does {name} serve?", "Which food can I eat at {name}?"),
        "area": ("Where is {name}?", "In which area is {name}?"),
        "price": ("What are the prices at {name}?", "How expensive is {name}?"),
        "rating": ("How is {name} rated?", "What is the rating of {name}?"),
    },
    "person": {
        "job": ("What is the job of {name}?", "What does {name} do?"),
        "city": ("Where does {name} live?", "In which city does {name} live?"),
        "age": ("How old is {name}?", "What is the age of {name}?"),
        "hobby": ("What does {name} like?", "What is the hobby of {name}?"),
    },
    "product": {
        "item": ("What does {maker} make?",),
        "colour": ("Which colour is from {maker}?",),
        "material": ("Which material does {maker} use?",),
        "cost": ("How much does {maker} ask?",),
    },
    "trip": {
        "origin": ("Where does {name} start?",),
        "goal": ("Where does {name} go?",),
        "vehicle": ("How does {name} travel?",),
        "day": ("On which day does {name} travel?",),
        "hour": ("At what hour does {name} leave?",),
    },
    "weather": {
        "sky": ("How is the sky in {city}?",),
        "wind": ("Which wind has {city}?",),
        "high": ("How warm is {city}?",),
    },
}


def in_style(record: Record, style: Style) -> Record:
    """The record with the words that the style uses for a price."""
    if "price" not in record:
        return record
    return record | {"price": PRICE_WORDS[style][record["price"]]}


def verb_phrase(domain: str, key: str, words: Record, style: Style, rng: random.Random) -> str:
    return rng.choice(VERB_PHRASES[domain][style][key]).format_map(words)


def join_phrases(phrases: list[str], rng: random.Random) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    if len(phrases) == 1:
        return phrases[0]
    joint = rng.choice((" and ", ", and "))
    return ", ".join(phrases[:-1]) + joint + phrases[-1]


def chain(domain: str, keys: list[str], record: Record, style: Style, rng: random.Random) -> str:
    """One sentence that says ``keys`` about the subject, as verb phrases in the given order."""
    words = in_style(record, style)
    phrases = [verb_phrase(domain, key, words, style, rng) for key in keys]
    end = "!" if style == "casual" else "."
    opener = {
        "plain": ("", "", ""),
        "formal": ("Please note that ", "We are pleased to say that ", ""),
        "casual": ("hey, ", "so ", ""),
    }[style]
    return rng.choice(opener) + f"{words[SUBJECT_KEY[domain]]} {join_phrases(phrases, rng)}{end}"


def fitting_templates(domain: str, record: Record, style: Style) -> list[tuple[str, set[str]]]:
    """Templates all of whose slots the record fills, each with the keys it says."""
    found = []
    for template in TEMPLATES[domain][style]:
        keys = {key for key in record if "{" + key + "}" in template}
        if template.count("{") == len(keys):
            found.append((template, keys))
    return found


def describe(domain: str, record: Record, style: Style, rng: random.Random) -> str:
    """One to three sentences that say every field of the record."""
    subject = SUBJECT_KEY[domain]
    pending = [key for key in record if key != subject]
    rng.shuffle(pending)
    sentences: list[str] = []
    templates = fitting_templates(domain, record, style)
    if templates and rng.random() < 0.6:
        template, said = rng.choice(templates)
        sentences.append(template.format_map(in_style(record, style)))
        pending = [key for key in pending if key not in said]
    while pending:
        count = rng.randint(1, len(pending))
        sentences.append(chain(domain, pending[:count], record, style, rng))
        pending = pending[count:]
    return " ".join(sentences)
