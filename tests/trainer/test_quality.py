"""The default settings learn a real task of the demo, on names that no training text holds.

A quarter of the steps that the default is: what the whole takes and reaches is in docs/lab-log.md.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from demo import MODEL_DIR
from demo.build.base import load_base
from demo.build.decoding import load_prefix
from demo.build.scores import evaluate
from demo.build.tasks import TASKS, examples
from demo.build.tokenizer import load_tokenizer
from trainer.config import TrainConfig
from trainer.session import train

TASK = TASKS["record-to-sentence"]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["direct", "mlp"])
def test_a_hundred_steps_on_the_demo_learn_a_task_that_the_base_can_not_do(
    encoder: str, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    rows = [{"prompt": e.prompt, "completion": e.answer} for e in examples(TASK, 41, 800, "train")]
    data.write_text("\n".join(map(json.dumps, rows)))

    result = train(
        TrainConfig(
            data=data,
            output=tmp_path / "run",
            device="cpu",
            encoder=encoder,
            init_text=TASK.init_text,
            num_virtual_tokens=16,
            num_steps=100,
            evaluate_every=50,
        )
    )

    model, tokenizer = load_base(MODEL_DIR), load_tokenizer(MODEL_DIR)
    fresh = examples(TASK, 90_211, 40, "test")
    assert evaluate(model, tokenizer, fresh, None).exact_match == 0.0
    assert result.best_loss <= 0.25, "it begins at 3.5"
    assert evaluate(model, tokenizer, fresh, load_prefix(result.prefix)).exact_match >= 20.0
