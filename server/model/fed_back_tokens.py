"""The tokens that the step before sampled, where the device has them: the next step reads them there.

Owned by the engine thread, held by `ModelRunner`. So a step can be launched before the host knows what the one before gave.
"""

from __future__ import annotations

from collections.abc import Sequence as Sequence_

import torch
from torch import Tensor

from server.engine.messages import ScheduledRow
from server.engine.sequence import PENDING, Sequence
from server.kvcache.to_device import to_device


class FedBackTokens:
    """Of one step: which sequences sampled, and the tokens [number of them] that they got."""

    def __init__(self) -> None:
        self._places: dict[Sequence, int] = {}
        self._tokens = torch.empty(0, dtype=torch.int64)

    def keep(self, sequences: Sequence_[Sequence], tokens: Tensor) -> None:
        """`tokens` [len(sequences)] as `sampler.next_tokens` gives them; read by the next step only."""
        self._places = {seq: place for place, seq in enumerate(sequences)}
        self._tokens = tokens

    def fill(self, rows: Sequence_[ScheduledRow], input_ids: Tensor) -> None:
        """Puts the tokens where `input_ids` [>= all tokens of `rows`, which stand one after another] has `PENDING`.

        A row that failed gets token 0: nobody will see what comes of it.
        """
        ends, places, end = [], [], 0
        for row in rows:
            end += len(row.token_ids)
            if row.token_ids[-1] == PENDING:
                ends.append(end - 1)
                places.append(self._places[row.sequence])
        if ends:
            where, which = to_device(torch.tensor([ends, places]), input_ids.device)
            input_ids.index_copy_(0, where, self._tokens.index_select(0, which).clamp_min(0))
