"""What a sweep is asked to vary, from flags and from files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.errors import BadSetting
from trainer.sweep.settings import SweepConfig, read_sweep_file


def config(**given: Any) -> SweepConfig:
    return SweepConfig(**({"data": "d.jsonl", "output": "s"} | given))


def varied(of: SweepConfig) -> list[tuple[Any, ...]]:
    return [
        (r.num_virtual_tokens, r.encoder, r.init, r.init_text, r.learning_rate, r.seed)
        for r in of.runs()
    ]


def test_every_combination_is_a_run_and_the_seed_varies_last() -> None:
    found = varied(
        config(
            num_virtual_tokens=[1, 8],
            encoder=["direct", "mlp"],
            learning_rate=[0.1, 0.2],
            seed=[3, 4],
        )
    )
    assert len(found) == len(set(found)) == 16
    assert found[:3] == [
        (1, "direct", None, None, 0.1, 3),
        (1, "direct", None, None, 0.1, 4),
        (1, "direct", None, None, 0.2, 3),
    ]


def test_what_is_not_varied_is_what_a_single_run_would_have() -> None:
    [run] = config(batch_size=5, prefix_dropout=0.1).runs()
    assert (run.batch_size, run.prefix_dropout, run.seed) == (5, 0.1, 0)
    assert (run.num_virtual_tokens, run.init_kind, run.peak_learning_rate) == (
        None,
        "examples",
        5e-2,
    )


def test_kinds_and_texts_are_beginnings_side_by_side() -> None:
    found = config(init=["random", "text"], init_text=["One.", "Two."])
    assert [(run[2], run[3]) for run in varied(found)] == [
        ("random", None),
        ("text", "One."),
        ("text", "Two."),
    ]


def test_a_value_alone_is_a_list_of_one_and_no_value_counts_twice() -> None:
    found = config(num_virtual_tokens=4, seed=[1, 1, 2], encoder="mlp")
    assert (found.num_virtual_tokens, found.seed, found.encoder) == ((4,), (1, 2), ("mlp",))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_virtual_tokens": [0]}, "num_virtual_tokens.0"),
        ({"encoder": []}, "encoder"),
        ({"init": ["text"]}, "text needs init_text"),
        ({"init": ["best"]}, "init.0"),
        ({"learning_rate": [0.1, -1]}, "learning_rate.1"),
        ({"metric": ["blue"]}, "'blue': expected one of"),
        ({"pick_by": "bleu"}, "pick_by: 'bleu' is not measured"),
        ({"num_steps": 3, "num_epochs": 2}, "num_steps"),
        ({"lengths": [3]}, "lengths"),
    ],
)
def test_what_can_not_be_varied_so_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(BadSetting, match=told):
        config(**given)


def test_a_file_has_the_same_names_and_its_paths_begin_beside_it(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    file = tmp_path / "sweep.toml"
    file.write_text(
        'data = "d.jsonl"\noutput = "out"\nmodel = "model"\nnum_steps = 5\nnum_virtual_tokens = [1, 2]\n'
    )
    [found] = read_sweep_file(file)
    assert (found.data, found.output) == (tmp_path / "d.jsonl", tmp_path / "out")
    assert found.model == str(tmp_path / "model")
    assert len(varied(found)) == 2

    other = tmp_path / "sweep.json"
    other.write_text(json.dumps({"data": "/d.jsonl", "output": "o", "model": "org/name"}))
    [found] = read_sweep_file(other)
    assert (found.data, found.model) == (Path("/d.jsonl"), "org/name")


def test_each_variant_of_a_file_is_a_product_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "sweep.toml"
    file.write_text(
        'data = "d"\noutput = "o"\nseed = [0, 1]\n'
        '[[variants]]\nencoder = "direct"\nlearning_rate = [0.1, 0.2]\n'
        '[[variants]]\nencoder = "mlp"\nlearning_rate = 0.003\n'
    )
    found = [(run[1], run[4], run[5]) for part in read_sweep_file(file) for run in varied(part)]
    assert found == [
        ("direct", 0.1, 0),
        ("direct", 0.1, 1),
        ("direct", 0.2, 0),
        ("direct", 0.2, 1),
        ("mlp", 0.003, 0),
        ("mlp", 0.003, 1),
    ]


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("s.toml", "data = ", "s.toml: "),
        ("s.json", "[1]", "expected a JSON object"),
        ("s.json", "{", "s.json: "),
        ("s.yaml", "", "ends in .toml or .json"),
        ("s.toml", 'data="d"\noutput="o"\nvariants=3', "expected a list of tables"),
        ("s.toml", 'data="d"\noutput="o"\n[[variants]]\nbatch_size=3', "batch_size: expected only"),
        ("s.toml", 'output="o"', "data: Field required"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    tmp_path: Path, name: str, text: str, told: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(BadSetting, match=told):
        read_sweep_file(tmp_path / name)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"none\.toml: No such file"):
        read_sweep_file(tmp_path / "none.toml")
