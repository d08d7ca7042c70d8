"""Which attention backend a device gets, and what is said where one can not be had."""

from __future__ import annotations

import logging
import sys

import pytest
import torch

from server.errors import ConfigError
from server.model.attention import make_attention_backend
from server.model.attention.sdpa import SdpaAttention
from tests.kernel_support import needs_triton

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith("server.kernels.") or name == "server.model.attention.triton":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)


def test_the_cpu_gets_torchs_own_kernels() -> None:
    assert isinstance(make_attention_backend("auto"), SdpaAttention)
    assert isinstance(make_attention_backend("auto", CPU), SdpaAttention)


@pytest.mark.usefixtures("without_triton")
def test_triton_that_is_not_installed_is_refused_with_where_to_get_it() -> None:
    with pytest.raises(ConfigError, match=r"needs the package triton.*prefixd\[kernels\]"):
        make_attention_backend("triton", CUDA)


@pytest.mark.usefixtures("without_triton")
def test_a_gpu_without_triton_gets_sdpa_and_a_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        backend = make_attention_backend("auto", CUDA)

    assert isinstance(backend, SdpaAttention)
    assert "attention falls back to sdpa" in caplog.text
    assert "prefixd[kernels]" in caplog.text


@needs_triton
def test_triton_on_a_cpu_is_refused_unless_it_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.model.attention import triton

    monkeypatch.setattr(triton, "is_interpreted", lambda: False)
    with pytest.raises(ConfigError, match="needs a CUDA device, got cpu"):
        make_attention_backend("triton", CPU)

    monkeypatch.setattr(triton, "is_interpreted", lambda: True)
    assert isinstance(make_attention_backend("triton", CPU), triton.TritonAttention)


@needs_triton
@pytest.mark.parametrize(
    ("capability", "served"), [((7, 5), False), ((8, 0), True), ((9, 0), True)]
)
def test_a_gpu_older_than_ampere_gets_sdpa(
    capability: tuple[int, int],
    served: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from server.model.attention.triton import TritonAttention

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    with caplog.at_level(logging.WARNING):
        backend = make_attention_backend("auto", CUDA)

    assert isinstance(backend, TritonAttention if served else SdpaAttention)
    assert ("got 7.5; use sdpa" in caplog.text) is not served
