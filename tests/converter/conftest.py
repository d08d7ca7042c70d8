"""A base model's directory, and a way to run the converter on what a test has written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from converter.__main__ import main
from prefix_store.artifact import Prefix, decode, digest_of
from tests.tiny_model_dir import save_tiny_model


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with 2 key/value heads of 8, in 3 layers."""
    return save_tiny_model(tmp_path_factory.mktemp("base"))


@pytest.fixture
def convert(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Prefix]:
    """The artifact that `prefixd convert` writes from a source."""

    def run(source: Path, *flags: object) -> Prefix:
        target = tmp_path / "converted.safetensors"
        code = main([str(source), str(target), *map(str, flags)])
        assert code == 0, capsys.readouterr().err
        data = target.read_bytes()
        return decode(data, digest_of(data))

    return run


@pytest.fixture
def refusal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Why a source was refused; nothing was written then."""

    def run(source: Path, *flags: object) -> str:
        target = tmp_path / "refused.safetensors"
        assert main([str(source), str(target), *map(str, flags)]) == 1
        assert not target.exists()
        return capsys.readouterr().err

    return run
