"""Settings are checked together, and come back from JSON as they were."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trainer.config import DEFAULT_LEARNING_RATES, TrainConfig
from trainer.errors import BadSetting


def config(**settings: Any) -> TrainConfig:
    return TrainConfig(**({"data": "d.jsonl", "output": "run"} | settings))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"num_steps": 3, "num_epochs": 2}, "num_steps: expected either"),
        ({"init": "text"}, "init: text needs init_text"),
        ({"init": "random", "init_text": "a"}, "init_text: expected no text with init random"),
        ({"micro_batch_size": 9, "batch_size": 8}, r"at most batch_size \(8\)"),
        ({"learning_rate": -1.0}, r"learning_rate: .*greater than 0 \(got '-1.0'\)"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"encoder": "lora"}, "encoder: .*'direct', 'mlp' or 'soft'"),
        ({"speed": 3}, "speed"),
        ({"num_epochs": 1e308}, "num_epochs"),  # times the steps of an epoch it was infinite
        ({"mlp_hidden_size": 10**12}, "mlp_hidden_size"),
        ({"mlp_embedding_size": 10**12}, "mlp_embedding_size"),
        ({"separator": "\udcff"}, "separator"),  # a byte of the command line that is no UTF-8
        ({"seed": 2**53}, "seed"),  # what a manifest's integers end at
    ],
)
def test_settings_that_can_not_work_are_named(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(BadSetting, match=told):
        config(**settings)


def test_settings_survive_json() -> None:
    given = config(stop=("\n",), init_text="be brief", num_epochs=2.5, model="demo/model")

    assert TrainConfig(**json.loads(json.dumps(given.model_dump(mode="json")))) == given


def test_what_is_left_out_follows_from_the_rest() -> None:
    assert config().init_kind == "examples"
    assert config(init_text="a").init_kind == "text"
    assert config(encoder="mlp").peak_learning_rate == DEFAULT_LEARNING_RATES["mlp"]
    assert config(encoder="mlp", learning_rate=0.5).peak_learning_rate == 0.5
    assert config(num_epochs=2.5).num_steps_for(10) == 25
    assert config().num_steps_for(10) == 800
    assert config().num_steps_for(300) == 900
    assert config(num_steps=7).num_steps_for(10) == 7
    assert config(num_epochs=0.001).num_steps_for(10) == 1
