"""What is free, what could be, and what goes first when a sequence or a prefix needs blocks.

Owned by the engine thread, asked by the scheduler. Blocks of the prompt cache that nobody reads go before any
idle prefix. Most of them are of prompts that will never come again, and every request leaves some: in one LRU
with the prefixes they would push out, in minutes, tasks that are called every hour. So a prefix is evicted exactly
when it would be without a prompt cache, and nobody's prompts can time or drive out another tenant's prefix.
"""

from __future__ import annotations

from dataclasses import dataclass

from server.kvcache.block_pool import BlockPool
from server.kvcache.prompt_cache import PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes


@dataclass(frozen=True, slots=True)
class Room:
    """The free blocks of `blocks`, and those that `prompt_cache` and `prefixes` would give up."""

    blocks: BlockPool
    prefixes: ResidentPrefixes
    prompt_cache: PromptCache

    @property
    def num_blocks(self) -> int:
        """Blocks that could be handed out now without taking anything from a sequence."""
        evictable = self.prefixes.num_evictable_blocks + self.prompt_cache.num_evictable_blocks
        return self.blocks.num_free + evictable

    def make(self, num_blocks: int) -> None:
        """Evicts until `num_blocks` are free, or nothing is left that may go."""
        self.prompt_cache.make_room(num_blocks)
        self.prefixes.make_room(num_blocks)
