"""Bytes of the tensors that live at once."""

from __future__ import annotations

import torch

from server.model.tensor_bytes import TensorBytes

KB = torch.zeros(250)  # 1,000 bytes


def test_the_peak_is_what_lived_together_and_not_the_sum() -> None:
    with torch.inference_mode(), TensorBytes() as counted:
        for _ in range(5):
            first = KB + 1
            second = first * 2
            del first, second

    assert (counted.peak_bytes, counted.live_bytes) == (2000, 0)


def test_a_view_takes_nothing_and_keeps_its_storage_alive() -> None:
    with torch.inference_mode(), TensorBytes() as counted:
        made = KB + 1
        view = made[:10].view(2, 5)
        del made
        assert counted.live_bytes == 1000
        del view
        assert counted.live_bytes == 0


def test_what_was_there_before_is_not_counted() -> None:
    there = torch.zeros(10, 25)
    with torch.inference_mode(), TensorBytes() as counted:
        there.index_fill_(0, torch.tensor([1]), 3.0)
        there[2:].t()

    assert counted.peak_bytes < 100, "only the index"


def test_what_outlives_the_counting_does_not_disturb_the_next() -> None:
    with torch.inference_mode(), TensorBytes() as counted:
        kept = KB + 1
    with torch.inference_mode(), TensorBytes() as again:
        kept += 1

    assert (counted.live_bytes, again.peak_bytes) == (1000, 0)
    del kept
    assert counted.live_bytes == 0
