"""The closed world the demo talks about: names, fields and their values.

Used by the corpus (pretraining text) and by the tasks. Names are built from syllables so that a
model cannot memorise them and has to copy. One name in ten, chosen by hash, is held out: it occurs
in test sets only, never in pretraining, training or validation text.
"""

import hashlib
import random
from collections.abc import Callable
from typing import Final, Literal

Split = Literal["train", "test"]
Record = dict[str, str]
ValueMaker = Callable[[random.Random, Split], str]

ONSETS: Final = (
    "b", "d", "f", "g", "h", "j", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z",
    "br", "dr", "kr", "tr", "st", "sh",
)  # fmt: skip
VOWELS: Final = ("a", "e", "i", "o", "u", "ia", "ei")
CODAS: Final = ("", "", "", "n", "l", "r", "s", "m", "k", "nd")
HELD_OUT_ONE_IN: Final = 10

KINDS: Final = ("pub", "bistro", "diner", "tavern", "canteen", "grill", "teahouse", "brasserie")
FOODS: Final = (
    "Cuban", "French", "Thai", "Indian", "Greek", "Polish", "Korean", "Turkish", "Mexican",
    "Persian", "Italian", "Moroccan", "vegan", "seafood",
)  # fmt: skip
AREAS: Final = (
    "riverside", "harbour", "castle", "market", "station", "old town", "university", "garden",
    "city centre",
)  # fmt: skip
PRICES: Final = ("cheap", "moderate", "expensive")
JOBS: Final = (
    "doctor", "baker", "painter", "lawyer", "teacher", "pilot", "farmer", "nurse", "writer",
    "chemist", "tailor", "singer",
)  # fmt: skip
HOBBIES: Final = (
    "chess", "sailing", "cooking", "cycling", "gardening", "tennis", "poetry", "fishing",
    "dancing", "hiking",
)  # fmt: skip
ITEMS: Final = (
    "lamp", "chair", "kettle", "jacket", "backpack", "clock", "table", "blanket", "bottle", "desk",
)  # fmt: skip
COLOURS: Final = ("red", "blue", "green", "black", "white", "yellow", "grey", "purple", "brown")
MATERIALS: Final = ("steel", "wool", "oak", "glass", "leather", "cotton", "bamboo", "copper")
VEHICLES: Final = ("train", "bus", "ferry", "car", "plane", "tram", "bicycle")
DAYS: Final = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
SKIES: Final = ("sunny", "cloudy", "rainy", "foggy", "stormy", "snowy", "clear")
WINDS: Final = ("northern", "southern", "western", "coastal")


def seeded(seed: int) -> random.Random:
    """The only place where a generator is made, so that every stream has a visible seed."""
    return random.Random(seed)


def is_held_out(name: str) -> bool:
    """True for the one name in ten that only test sets may use."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_ONE_IN == 0


def make_name(rng: random.Random, split: Split) -> str:
    """One capitalised name of two or three syllables from the wanted side of the split."""
    while True:
        syllables = [
            rng.choice(ONSETS) + rng.choice(VOWELS) + rng.choice(CODAS)
            for _ in range(rng.choice((2, 2, 3)))
        ]
        name = "".join(syllables).capitalize()
        if is_held_out(name) == (split == "test"):
            return name


def one_of(values: tuple[str, ...]) -> ValueMaker:
    return lambda rng, _split: rng.choice(values)


def number(low: int, high: int) -> ValueMaker:
    return lambda rng, _split: str(rng.randint(low, high))


def clock_hour(rng: random.Random, _split: Split) -> str:
    return f"{rng.randint(1, 12)} {rng.choice(('am', 'pm'))}"


FIELDS: Final[dict[str, dict[str, ValueMaker]]] = {
    "restaurant": {
        "name": make_name,
        "kind": one_of(KINDS),
        "food": one_of(FOODS),
        "area": one_of(AREAS),
        "price": one_of(PRICES),
        "rating": number(1, 5),
    },
    "person": {
        "name": make_name,
        "job": one_of(JOBS),
        "city": make_name,
        "age": number(18, 90),
        "hobby": one_of(HOBBIES),
    },
    "product": {
        "maker": make_name,
        "item": one_of(ITEMS),
        "colour": one_of(COLOURS),
        "material": one_of(MATERIALS),
        "cost": number(5, 200),
    },
    "trip": {
        "name": make_name,
        "origin": make_name,
        "goal": make_name,
        "vehicle": one_of(VEHICLES),
        "day": one_of(DAYS),
        "hour": clock_hour,
    },
    "weather": {
        "city": make_name,
        "day": one_of(DAYS),
        "sky": one_of(SKIES),
        "wind": one_of(WINDS),
        "high": number(10, 35),
    },
}


def make_record(domain: str, rng: random.Random, split: Split, *, min_fields: int = 3) -> Record:
    """A record of ``domain``: the first field always, the others often, in canonical order."""
    fields = FIELDS[domain]
    keys = list(fields)
    optional = keys[1:]
    count = rng.randint(min(min_fields - 1, len(optional)), len(optional))
    kept = {keys[0], *rng.sample(optional, count)}
    return {key: make(rng, split) for key, make in fields.items() if key in kept}
