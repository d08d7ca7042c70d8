"""`prefixd verify` and `prefixd inspect` on real files and the bundled model, without a server."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import demo
from prefix_store.artifact import decode, encode
from prefix_store.norms import layer_norms
from prefix_store.spec import digest_of
from server.cli import main
from tests.prefix_store.builders import make_artifact
from tests.prefix_store.importers.peft_files import peft_file

SENTIMENT = demo.PREFIXES_DIR / "sentiment.safetensors"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert isinstance(caught.value.code, int)
        return caught.value.code, out, err

    return call


def swapped(tmp_path: Path) -> Path:
    """The bundled prefix with the keys of its layers in another order: same shape, other function."""
    data = SENTIMENT.read_bytes()
    prefix = decode(data, digest_of(data))
    path = tmp_path / "swapped.safetensors"
    path.write_bytes(encode(prefix.manifest, prefix.keys[::-1], prefix.values))
    return path


def test_every_bundled_prefix_reproduces_its_probe_on_the_bundled_model(run: Run) -> None:
    for path in sorted(demo.PREFIXES_DIR.glob("*.safetensors")):
        code, out, _ = run("verify", path, "--json")
        report = json.loads(out)
        assert code == 0
        assert report["unverified"] == []
        assert report["proof"]["probe"]["max_difference_nats"] < 0.001
        assert report["digest"] == digest_of(path.read_bytes())


def test_a_report_is_a_few_lines_for_a_terminal(run: Run) -> None:
    code, out, _ = run("verify", SENTIMENT)
    assert code == 0
    assert out.startswith("recognised: native artifact, format version 1\nsmoke:      passed")
    assert "\nprobe:      reproduced, off by " in out


def test_a_prefix_that_does_something_else_here_is_refused(run: Run, tmp_path: Path) -> None:
    code, out, err = run("verify", swapped(tmp_path))
    assert code == 1
    assert out == ""
    assert "the probe is not reproduced" in err


def test_nothing_is_stored_by_verifying(run: Run, tmp_path: Path) -> None:
    store = tmp_path / "store"
    assert run("verify", SENTIMENT, "--store", store)[0] == 0
    assert not store.exists()


def test_a_peft_file_is_verified_as_what_it_becomes(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(peft_file(prompt_embeddings=torch.randn(4, 192)))
    code, out, _ = run("verify", path)
    assert code == 0
    assert out.startswith("recognised: PEFT prompt tuning, p-tuning or CPT")
    assert "unverified: base model" in out


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_what_can_not_be_read_is_an_error_that_names_it(
    run: Run, tmp_path: Path, command: str
) -> None:
    code, _, err = run(command, tmp_path / "nowhere")
    assert code == 1
    assert "nowhere: " in err
    junk = tmp_path / "junk"
    junk.write_bytes(b"not a safetensors file at all")
    code, _, err = run(command, junk)
    assert code == 1
    assert "the header claims" in err


def test_inspecting_draws_sizes_origin_and_norms(run: Run) -> None:
    code, out, _ = run("inspect", SENTIMENT)
    data = SENTIMENT.read_bytes()
    prefix = decode(data, digest_of(data))
    assert code == 0
    assert digest_of(data) in out
    assert "16; requests start at position 16" in out
    assert "6 layers, 3 kv heads of 32, bfloat16" in out
    assert "fingerprint of weights, config, tokenizer" in out
    assert "training.init_text" in out
    rows = [line for line in out.splitlines() if "█" in line]
    for row, norms in zip(rows, layer_norms(prefix.keys, prefix.values), strict=True):
        assert f"{norms.key:.3g}" in row
        assert f"{norms.value:.3g}" in row
        assert f"{norms.largest:.3g}" in row


def test_norms_are_compared_with_those_of_the_models_own_keys(run: Run) -> None:
    code, out, _ = run("inspect", SENTIMENT, "--model", demo.MODEL_DIR)
    assert code == 0
    rows = [line for line in out.splitlines() if "█" in line]
    assert len(rows) == 6
    assert all("|" in row for row in rows)
    # layer, bar, norm, ratio, bar, norm, ratio, largest; a bar may have a gap before its mark
    figures = [[float(word) for word in row.split() if word[0].isdigit()] for row in rows]
    assert [len(figure) for figure in figures] == [6] * 6
    assert all(0.05 < ratio < 50 for figure in figures for ratio in (figure[2], figure[4]))


def test_a_file_of_another_format_is_listed_by_its_tensors(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(peft_file(prompt_embeddings=torch.randn(4, 192)))
    code, out, _ = run("inspect", path)
    assert code == 0
    assert "not a native artifact: no manifest" in out
    assert "prompt_embeddings" in out
    assert "[4, 192]" in out


def test_what_a_file_says_of_itself_can_not_steer_the_terminal(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "evil.safetensors"
    training = {"note": "\x1b]0;owned\x07\x1b[2J[red]text", "\x1b[2J": "\u202e\u009b31m"}
    path.write_bytes(make_artifact(description="\x1b[31mred", training=training))
    code, out, _ = run("inspect", path)
    assert code == 0
    assert {c for c in out if not c.isprintable()} == {"\n"}
    assert "\\x1b[2J[red]text" in out


@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_only_regular_files_are_read(run: Run, tmp_path: Path, command: str) -> None:
    """A device may never end, and a pipe never begin."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (Path("/dev/zero"), pipe, tmp_path):
        code, _, err = run(command, path)
        assert code == 1
        assert path.name in err
