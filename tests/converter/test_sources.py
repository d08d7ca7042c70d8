"""What the converter does not read, and that nothing in a file is ever run."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from prefix_store.header import read_header
from tests.peft_adapters import make_adapter
from tests.tiny_models import tiny_model

Refusal = Callable[..., str]


class Payload:
    """Unpickled without care, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._path),)


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".ckpt"])
def test_code_in_a_pickled_file_does_not_run(suffix: str, refusal: Refusal, tmp_path: Path) -> None:
    trap = tmp_path / "it-ran"
    plain, archive = tmp_path / f"plain{suffix}", tmp_path / f"archive{suffix}"
    plain.write_bytes(pickle.dumps({"trainable_keys": Payload(trap)}))
    torch.save({"trainable_keys": Payload(trap)}, archive)

    assert "can not be read safely" in refusal(plain)
    assert "can not be read safely" in refusal(archive)
    assert not trap.exists()


def test_what_is_not_there_or_not_known_is_said(refusal: Refusal, tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    assert "expected one of adapter_model.safetensors" in refusal(tmp_path / "empty")
    (tmp_path / "prefix.txt").write_text("x")
    assert "expected a directory or a file" in refusal(tmp_path / "prefix.txt")
    save_file({"lora_A.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors")
    assert "no known format has such tensors (lora_A.weight" in refusal(
        tmp_path / "lora.safetensors"
    )
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    assert "expected a dict of tensors, got list" in refusal(tmp_path / "list.pt")
    (tmp_path / "broken.safetensors").write_bytes(b"\0" * 40)
    assert "can not be read safely" in refusal(tmp_path / "broken.safetensors")


def test_two_adapters_in_one_directory_must_be_named(refusal: Refusal, tmp_path: Path) -> None:
    for name in ("first", "second"):
        (tmp_path / "both" / name).mkdir(parents=True)
        save_file({"x": torch.zeros(2)}, tmp_path / "both" / name / "adapter_model.safetensors")
    assert "several adapters (first, second); name one" in refusal(tmp_path / "both")


def test_the_command_runs_the_converter_in_a_process_of_its_own(base: Path, tmp_path: Path) -> None:
    adapter = make_adapter("prefix", tiny_model("llama"), tmp_path / "adapter")
    target = tmp_path / "out.safetensors"
    command = [sys.executable, "-m", "server", "convert"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    done = subprocess.run(
        [*command, str(adapter.directory), str(target), "--base", str(base), "--dtype", "float16"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )

    assert done.returncode == 0, done.stderr
    assert "recognised: PEFT prefix tuning or cartridge" in done.stdout
    assert f"written:    {target}" in done.stdout
    data = target.read_bytes()
    assert read_header(data, len(data)).dtype == "float16"
