"""Ragged prefill: what torch's CUDA function is given, checked with its rules written out on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from server.model.attention import varlen
from server.model.attention.reference import ReferenceAttention
from tests.kernel_support import needs_gpu
from tests.server.model.test_attention import SHAPES, Case, Row, params_for

# Chunks with and without a prefix, a decode row between them, a prefix of which two chunks are run at once.
ROWS = [
    Row(0, 0, 5),
    Row(37, 3, 1),
    Row(37, 0, 20),
    Row(130, 17, 40, "a"),
    Row(0, 9, 1),
    Row(130, 2, 3, "a"),
]


def written_out(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
) -> Tensor:
    """Flash attention's rules: queries are the last of their keys; `window_size` counts neighbours on each side."""
    rows = []
    left, right = window_size
    assert right == 0, "causal"
    for r in range(len(cu_seq_q) - 1):
        q = query[int(cu_seq_q[r]) : int(cu_seq_q[r + 1])]
        k = key[int(cu_seq_k[r]) : int(cu_seq_k[r + 1])]
        v = value[int(cu_seq_k[r]) : int(cu_seq_k[r + 1])]
        assert len(q) <= max_q
        assert len(k) <= max_k
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("nhd,lhd->hnl", q, k.repeat_interleave(group, 1)) * scale
        distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
        seen = distance >= 0
        if left >= 0:
            seen &= distance <= left
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        rows.append(torch.einsum("hnl,lhd->nhd", weights, v.repeat_interleave(group, 1)))
    return torch.cat(rows)


@pytest.mark.parametrize("feature", ["plain", "window", "window of one"])
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_ragged_rows_equal_attention_written_out(
    shape: tuple[int, int, int, int], feature: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, params = Case(ROWS, shape), params_for(shape, feature)
    function: Callable[..., Tensor] = written_out
    monkeypatch.setattr(varlen, "_varlen_attn", lambda: function)
    queries = torch.cat(case.queries)
    out = torch.full((*queries.shape[:2], shape[3]), torch.nan)

    varlen.attend_ragged(queries, case.layer, params, case.batch, out)

    for row, ours, expected in zip(
        ROWS, torch.split(out, [r.n for r in ROWS]), case.expected(params), strict=True
    ):
        if row.n == 1:
            assert bool(ours.isnan().all()), "decode rows are the kernels'"
        else:
            torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-5)


def test_what_torch_can_not_do_is_left_to_others() -> None:
    case = Case(ROWS[:1], SHAPES[1])
    params = params_for(SHAPES[1], "plain")

    assert not varlen.can_attend(torch.cat(case.queries), case.layer, params), "on the CPU"


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("feature", ["plain", "window", "window of one"])
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[2]], ids=str)
def test_torchs_function_equals_the_reference_on_a_gpu(
    shape: tuple[int, int, int, int], feature: str
) -> None:
    case, params = Case(ROWS, shape, device=torch.device("cuda")), params_for(shape, feature)
    layer = replace(case.layer, keys=case.layer.keys.half(), values=case.layer.values.half())
    queries = torch.cat(case.queries).cuda().half()
    assert varlen.can_attend(queries, layer, params)
    out = torch.zeros_like(queries)

    varlen.attend_ragged(queries, layer, params, case.batch, out)

    expected = ReferenceAttention().attend(queries, layer, params, case.batch)
    several = torch.cat([torch.full((r.n,), r.n > 1) for r in ROWS]).cuda()
    torch.testing.assert_close(out[several], expected[several], rtol=5e-3, atol=5e-3)
