"""`evaluate` as a command: what it prints, and how it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

import demo
from tests.tiny_model_dir import save_tiny_model
from tests.trainer.demo_data import write_jsonl
from trainer.__main__ import main

Run = Callable[..., tuple[int, str, str]]
PREFIX = demo.PREFIXES_DIR / "sentiment.safetensors"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the trainer's command line in this process: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    monkeypatch.setenv("COLUMNS", "200")
    return call


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "held-out.jsonl", "sentiment", 6)


def test_the_demo_is_judged_with_nothing_but_a_prefix_and_data(run: Run, data: Path) -> None:
    code, out, err = run("evaluate", PREFIX, "--data", data, "--metric", "accuracy", "--json")

    assert code == 0, err
    found = json.loads(out)
    assert found["conditions"]["prefix"]["scores"]["accuracy"]["value"] == 100
    assert found["conditions"]["no_prefix"]["scores"]["accuracy"]["value"] == 0
    assert found["forgetting"]["source"] == "the demo's own corpus"


def test_a_person_gets_a_table_with_the_baselines(run: Run, data: Path, tmp_path: Path) -> None:
    text = tmp_path / "general.txt"
    text.write_text("Lomu is a diner.\n\nLomu serves Greek food.")
    flags = ["--metric", "accuracy", "--metric", "token_f1", "--forgetting-text", text]

    code, out, _ = run("evaluate", PREFIX, "--data", data, *flags, "--text-prompt", "positive?")

    assert code == 0
    assert all(name in out for name in ("no prefix", "text prompt", "accuracy ↑", "loss ↓"))
    assert "general.txt" in out


def test_another_model_has_no_general_text_of_its_own(run: Run, data: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copy"
    copied.mkdir()
    for file in demo.MODEL_DIR.iterdir():
        (copied / file.name).write_bytes(file.read_bytes())

    code, out, err = run("evaluate", PREFIX, "--data", data, "--model", copied)

    assert code == 0, err
    assert "note: no probe for forgetting" in out


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--metric", "blue"], 2, "expected one of exact_match"),
        (["--forgetting-text", "/nowhere"], 1, "/nowhere: No such file"),
        (["--max-tokens", "600"], 1, "max_tokens 600"),
        (["--device", "tpu"], 2, "tpu"),
        (["--wishful"], 2, "--wishful"),
    ],
)
def test_what_can_not_work_is_refused_by_name(
    run: Run, data: Path, flags: list[str], code: int, said: str
) -> None:
    got, out, err = run("evaluate", PREFIX, "--data", data, *flags)
    assert (got, said in err) == (code, True), out + err


def test_a_prefix_of_another_base_is_refused_with_every_fault(
    run: Run, data: Path, tmp_path: Path
) -> None:
    model = save_tiny_model(tmp_path / "tiny", "gpt2")
    code, _, err = run("evaluate", PREFIX, "--data", data, "--model", model)
    assert code == 1
    assert "model_type is 'llama'" in err
