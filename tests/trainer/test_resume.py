"""A run that was interrupted and resumed is the run that was not: the same losses, the same bytes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer.runs import Recorder, small_run, write_examples
from trainer.errors import BadSetting, CannotResume, RunExists
from trainer.records import read_records
from trainer.run_folder import RunFolder
from trainer.session import Attachments, resume, train


def stop_after(recorder: Recorder, steps: int) -> Attachments:
    """A run that is asked to stop once it has done so many."""
    return Attachments((recorder,), should_stop=lambda: len(recorder.of("step")) >= steps)


def final_state(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "checkpoint" / "last.safetensors")
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {"encoder": "direct", "prefix_dropout": 0.2, "weight_decay": 0.1, "num_frozen_tokens": 1},
        {"encoder": "mlp", "prefix_dropout": 0.2, "micro_batch_size": 3},
        {"encoder": "soft", "schedule": "linear"},
    ],
    ids=lambda settings: settings["encoder"],
)
def test_interrupted_twice_and_resumed_equals_uninterrupted_bit_for_bit(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    whole, parts = Recorder(), Recorder()
    train(small_run(tmp_path, output=tmp_path / "whole", **settings), Attachments((whole,)))

    first = train(small_run(tmp_path, output=tmp_path / "parts", **settings), stop_after(parts, 3))
    second = resume(tmp_path / "parts", stop_after(parts, 8))
    last = resume(tmp_path / "parts", Attachments((parts,)))

    assert (first.reason, first.num_steps) == ("interrupted", 3)
    assert (second.reason, second.num_steps) == ("interrupted", 8)
    assert (last.reason, last.num_steps) == ("finished", 12)
    assert parts.losses() == whole.losses()
    assert len(whole.losses()) == 12
    one, other = final_state(tmp_path / "whole"), final_state(tmp_path / "parts")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert last.prefix.read_bytes() == (tmp_path / "whole" / "prefix.safetensors").read_bytes()


def test_a_run_killed_between_checkpoints_resumes_from_the_last_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"num_steps": 150, "evaluate_every": 10, "prefix_dropout": 0.1}
    whole = train(small_run(tmp_path, output=tmp_path / "whole", num_threads=1, **settings))
    config = small_run(tmp_path, output=tmp_path / "killed", num_threads=1, **settings)
    flags = [
        text
        for name, value in config.model_dump(mode="json", exclude_unset=True).items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    log, deadline = RunFolder(config.output).log, time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if log.exists() and log.read_bytes().count(b'"step", "step"') > 35:
            break
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = [r["step"] for r in read_records(log) if r["kind"] == "step"]
    assert 30 < done[-1] < 150, "it was killed on its way"

    recorder = Recorder()
    result = resume(config.output, Attachments((recorder,)))

    begin = recorder.of("begin")[0]["step"]
    assert begin % 10 == 0
    assert 30 <= begin <= done[-1]
    assert result.num_steps == 150
    assert result.prefix.read_bytes() == whole.prefix.read_bytes()
    kinds = [record["kind"] for record in read_records(log)]
    assert kinds[-1] == "end", "the log stays readable, whatever the kill tore"


def test_resuming_a_run_that_has_ended_changes_nothing(tmp_path: Path) -> None:
    ended = train(small_run(tmp_path))
    before = ended.prefix.read_bytes()

    again = resume(ended.folder)

    assert again == ended
    assert ended.prefix.read_bytes() == before


def test_a_run_does_not_begin_in_a_folder_that_holds_another(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    train(config)

    with pytest.raises(RunExists, match="--resume"):
        train(config)


def test_a_folder_that_is_taken_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    """A base takes minutes to load; the folder can be looked at first."""
    train(small_run(tmp_path))

    with pytest.raises(RunExists, match="--resume"):
        train(small_run(tmp_path, data=tmp_path / "nowhere.jsonl", model="no/such-model"))


def test_what_is_left_of_a_run_without_a_checkpoint_is_named_as_such(tmp_path: Path) -> None:
    config = small_run(tmp_path)
    train(config)
    RunFolder(config.output).checkpoint.unlink()

    with pytest.raises(RunExists, match=r"ended before its first checkpoint.*remove it"):
        train(config)


def test_two_processes_do_not_train_in_one_folder(tmp_path: Path) -> None:
    """They would write one log and one checkpoint between them."""
    told: list[str] = []

    def second() -> bool:
        with pytest.raises(RunExists, match="not empty"):
            train(small_run(tmp_path))
        with pytest.raises(RunExists) as caught:
            resume(tmp_path / "run")
        told.append(str(caught.value))
        return True

    first = train(small_run(tmp_path), Attachments(should_stop=second))

    assert (first.reason, first.num_steps) == ("interrupted", 1)
    assert "run is in use by another process" in told[0]
    assert resume(tmp_path / "run").reason == "finished"


def test_a_run_does_not_go_on_with_other_data(tmp_path: Path) -> None:
    recorder = Recorder()
    train(small_run(tmp_path), stop_after(recorder, 2))
    write_examples(tmp_path / "data.jsonl", 40, seed=9)

    with pytest.raises(CannotResume, match="training data"):
        resume(tmp_path / "run")


def test_a_folder_without_a_checkpoint_can_not_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(CannotResume, match="no checkpoint"):
        resume(tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path: Path) -> None:
    recorder = Recorder()
    train(small_run(tmp_path), stop_after(recorder, 2))
    checkpoint = RunFolder(tmp_path / "run").checkpoint
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])

    with pytest.raises(CannotResume, match="is no checkpoint"):
        resume(tmp_path / "run")


def test_one_flipped_bit_of_a_checkpoint_is_noticed(tmp_path: Path) -> None:
    """The resumed run would end with other bytes, and nobody would know."""
    train(small_run(tmp_path), stop_after(Recorder(), 2))
    checkpoint = RunFolder(tmp_path / "run").checkpoint
    whole = checkpoint.read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")

    for place in (whole.index(b"step") + 8, header_end + 5, len(whole) - 3):
        broken = bytearray(whole)
        broken[place] ^= 1
        checkpoint.write_bytes(broken)
        with pytest.raises(CannotResume, match="is no checkpoint"):
            resume(tmp_path / "run")

    checkpoint.write_bytes(whole)
    assert resume(tmp_path / "run").reason == "finished"


@pytest.mark.parametrize("content", [b"[]", b"{", b'"x"', b'{"data": "d", "colour": 1}'])
def test_settings_that_are_none_are_refused(tmp_path: Path, content: bytes) -> None:
    train(small_run(tmp_path), stop_after(Recorder(), 2))
    RunFolder(tmp_path / "run").config.write_bytes(content)

    with pytest.raises((CannotResume, BadSetting)):
        resume(tmp_path / "run")


def test_a_checkpoint_without_what_the_encoder_needs_is_refused(tmp_path: Path) -> None:
    train(small_run(tmp_path), stop_after(Recorder(), 2))
    folder = RunFolder(tmp_path / "run")
    settings = folder.read_config() | {"encoder": "mlp"}
    folder.write(folder.config, json.dumps(settings).encode())

    with pytest.raises(CannotResume, match="of another encoder"):
        resume(tmp_path / "run")
