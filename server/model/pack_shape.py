"""How many tokens a forward pass is padded to, so that no row's bits depend on how many there are.

Read on the engine thread by `build_forward_batch`; `prepacked_linear` says what a model needs. On the CPU two
things depend on the number of tokens T of a pack. A product of one row runs through another kernel than one of
several rows. And an elementwise function works on vectors of lanes and on single values at the end of a
thread's share, which for SiLU and GELU are different approximations: so the shares must end on whole vectors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

# Values that torch's elementwise loops take at once, at most: two vectors of 512 bits in bfloat16.
LANES: Final = 64
# Values for which torch gives one more thread a share (`at::internal::GRAIN_SIZE`).
_GRAIN: Final = 32_768


@dataclass(frozen=True, slots=True)
class PackShape:
    """`widths`: of the activations, the widest of which goes through a nonlinear function."""

    min_tokens: int = 1
    widths: tuple[int, ...] = ()
    num_threads: int = 1

    def padded(self, num_tokens: int) -> int:
        """The fewest tokens >= `num_tokens` that the model may run."""
        multiple = max((LANES // math.gcd(LANES, width) for width in self.widths), default=1)
        padded = -(-max(num_tokens, self.min_tokens) // multiple) * multiple
        while not self._shares_are_whole(padded):
            padded += multiple
        return padded

    def _shares_are_whole(self, num_tokens: int) -> bool:
        if not self.widths:
            return True
        num_values = num_tokens * max(self.widths)
        num_shares = min(self.num_threads, -(-num_values // _GRAIN))
        return num_values % (LANES * num_shares) == 0


AS_IT_IS: Final = PackShape()
