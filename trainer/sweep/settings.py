"""The settings of a sweep: those that all its runs share, and lists of values for those that it varies.

Each field is a flag of `prefixd sweep` and a key of its TOML or JSON file. Built by `cli_sweep` or by a program; pure.
"""

from __future__ import annotations

import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeAlias

from cyclopts import Group, Parameter
from pydantic import Field, field_validator, model_validator

from trainer.config import LOSS, MAX_SEED, InitKind, RunSettings, TrainConfig
from trainer.errors import BadSetting
from trainer.metrics import require_known

VARIED: Final = (
    "num_virtual_tokens", "encoder", "init", "init_text", "learning_rate", "seed",
)  # fmt: skip
_JUDGING: Final = ("metric", "pick_by")
_VARIANTS: Final = "variants"
_PATHS: Final = ("data", "held_out", "output", "model")

_VALUES: Final = Group.create_ordered("What is varied (each takes several values)")
_JUDGED: Final = Group.create_ordered("How it is judged")
_SWEEP: Final = Group.create_ordered("Sweep")

Length: TypeAlias = Annotated[int, Field(ge=1, le=1_000_000)]
Text: TypeAlias = Annotated[str, Field(min_length=1)]
Rate: TypeAlias = Annotated[float, Field(gt=0)]
Seed: TypeAlias = Annotated[int, Field(ge=0, lt=MAX_SEED)]

_several: Final = Parameter(group=_VALUES, consume_multiple=True, negative=())


@Parameter(name="*")
class SweepConfig(RunSettings):
    """The settings of `prefixd sweep`. A list that is left out has one value: what `prefixd train` would take.

    Raises `BadSetting`.
    """

    num_virtual_tokens: Annotated[tuple[Length, ...], _several] = Field(
        default=(), description="Lengths P"
    )
    encoder: Annotated[tuple[Literal["direct", "mlp", "soft"], ...], _several] = Field(
        default=("direct",), min_length=1, description="What the prefix is trained as"
    )
    init: Annotated[tuple[InitKind, ...], _several] = Field(
        default=(), description="What it begins as, beside the texts of --init-text"
    )
    init_text: Annotated[tuple[Text, ...], _several] = Field(
        default=(), description="Texts that it begins as; each is one more beginning"
    )
    learning_rate: Annotated[tuple[Rate, ...], _several] = Field(
        default=(), description="Peaks; by the encoder if left out"
    )
    seed: Annotated[tuple[Seed, ...], _several] = Field(
        default=(0,), min_length=1, description="Seeds; scores are means over them"
    )
    metric: Annotated[
        tuple[str, ...], Parameter(group=_JUDGED, consume_multiple=True, negative=())
    ] = Field(
        default=(),
        description="Metrics of answers generated for the held-out prompts: exact_match, accuracy, token_f1, bleu, rouge_l",
    )
    pick_by: Annotated[str, Parameter(group=_JUDGED)] = Field(
        default=LOSS, description="What a prefix is picked by: loss, or one of these metrics"
    )
    output: Annotated[Path, Parameter(group=_SWEEP)] = Field(
        description="Sweep folder; one that holds this sweep already is gone on with"
    )

    @field_validator(*VARIED, "metric", mode="before")
    @classmethod
    def _each_once(cls, given: Any) -> Any:
        """A single value is a list of one."""
        values = given if isinstance(given, list | tuple) else [given]
        return tuple(dict.fromkeys(values))

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        require_known(self.metric)
        if self.pick_by not in (LOSS, *self.metric):
            known = ", ".join((LOSS, *self.metric))
            raise ValueError(
                f"pick_by: {self.pick_by!r} is not measured; expected one of {known}, or one more metric"
            )
        if "text" in self.init and not self.init_text:
            raise ValueError("init: text needs init_text")
        return self

    def runs(self) -> Iterator[TrainConfig]:
        """One run for each combination, the seed varied last; their `output` is still the sweep's."""
        shared = self.model_dump(include=set(RunSettings.model_fields))
        lengths, rates = self.num_virtual_tokens or (None,), self.learning_rate or (None,)
        combinations = itertools.product(lengths, self.encoder, self._inits(), rates, self.seed)
        for length, encoder, (init, text), rate, seed in combinations:
            yield TrainConfig(
                **shared,
                num_virtual_tokens=length,
                encoder=encoder,
                init=init,
                init_text=text,
                learning_rate=rate,
                seed=seed,
            )

    def _inits(self) -> list[tuple[InitKind | None, str | None]]:
        found: list[tuple[InitKind | None, str | None]] = [
            (kind, None) for kind in self.init if kind != "text"
        ]
        return [*found, *(("text", text) for text in self.init_text)] or [(None, None)]


def read_sweep_file(path: Path) -> tuple[SweepConfig, ...]:
    """The sweep in a TOML or JSON file. Raises `BadSetting`.

    Keys are the fields above. `variants` is a list of tables with lists of their own for what is varied: each is a
    product by itself, over the values above it. Paths are relative to the file.
    """
    found = _parsed(path)
    variants = found.pop(_VARIANTS, [{}])
    if not isinstance(variants, list) or not all(isinstance(v, dict) for v in variants):
        raise BadSetting(f"{path}: {_VARIANTS}: expected a list of tables")
    strange = sorted({name for variant in variants for name in variant} - set(VARIED))
    if strange:
        raise BadSetting(
            f"{path}: {_VARIANTS}: {', '.join(strange)}: expected only {', '.join(VARIED)}"
        )
    for name in _PATHS:
        if isinstance(found.get(name), str):
            found[name] = _beside(path, name, found[name])
    return tuple(SweepConfig(**(found | variant)) for variant in variants or [{}])


def _parsed(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            return tomllib.loads(text)
        if path.suffix == ".json":
            found = json.loads(text)
            if isinstance(found, dict):
                return found
            raise BadSetting(f"{path}: expected a JSON object")
    except OSError as error:
        raise BadSetting(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadSetting(f"{path}: {error}") from None
    raise BadSetting(f"{path}: expected a file that ends in .toml or .json")


def _beside(path: Path, name: str, value: str) -> str:
    """A model that is no folder there is a hub id."""
    there = path.parent / Path(value).expanduser()
    return value if name == "model" and not there.is_dir() else str(there)


def shared_settings(config: RunSettings) -> Mapping[str, Any]:
    """What all runs have in common, as JSON has it, but for where they are."""
    return config.model_dump(mode="json", include=set(RunSettings.model_fields), exclude={"output"})
