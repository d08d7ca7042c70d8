"""The demo's examples as JSONL, as `prefixd train` reads them."""

import json

import pytest

from demo.build.examples import main
from demo.build.tasks import TASKS, examples


def test_examples_are_printed_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["record-qa", "3", "7", "test"]) == 0

    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = examples(TASKS["record-qa"], 7, 3, "test")
    assert lines == [{"prompt": item.prompt, "completion": item.answer} for item in expected]


@pytest.mark.parametrize("arguments", [[], ["record-qa"], ["cooking", "3"]])
def test_a_wrong_call_says_which_tasks_there_are(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "record-to-sentence" in capsys.readouterr().err
