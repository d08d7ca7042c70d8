"""What a model's own keys and values look like on ordinary text: the measure for learned ones.

Called by `prefixd inspect`, on the main thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from prefix_store.norms import LayerNorms, layer_norms
from server.model.attention.base import AttentionBackend
from server.model.baker import Baker
from server.model.loader import LoadedModel

# The first tokens of a text are attention sinks in many models, with keys and values unlike all others.
_SINKS: Final = 4

TEXT: Final = """The harbour was quiet in the early morning. Two boats had come in during the night, and their \
crews were still asleep. A woman from the market asked the guard when the fish would be sold, and he told her to \
come back at seven. She bought bread instead, at the small shop near the station, for 3.20 in coins, and waited. \
By noon the price had fallen by half, the square was full of people, and nobody remembered the storm."""


def natural_norms(
    model: LoadedModel, backend: AttentionBackend, token_ids: Sequence[int]
) -> tuple[LayerNorms, ...]:
    """Per layer, over the keys and values of these tokens but the first four."""
    bake = Baker(model, backend).start(tuple(token_ids))
    while not bake.step():
        pass
    keys, values = bake.result()
    start = _SINKS if len(token_ids) > 2 * _SINKS else 0
    return layer_norms([key[start:] for key in keys], [value[start:] for value in values])
