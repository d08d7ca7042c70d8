"""What goes first when room is needed."""

from __future__ import annotations

from server.kvcache.block_pool import BlockPool
from server.kvcache.prompt_cache import BlockChain, PromptCache
from server.kvcache.resident_prefixes import ResidentPrefixes
from server.kvcache.room import Room
from server.types import PrefixRef


def test_prompts_that_nobody_reads_go_before_any_idle_prefix() -> None:
    """Also those used later: a flood of prompts must not cost a task its place on the device."""
    blocks = BlockPool(7, 4)
    prefixes, prompt_cache = ResidentPrefixes(blocks), PromptCache(blocks)
    room = Room(blocks, prefixes, prompt_cache)
    prefixes.reserve(PrefixRef("task", 1, "sha256:a", 8, 8))
    chain, table = BlockChain.begin("", None, 0), blocks.allocate(3)
    prompt_cache.enter(chain, table, lambda start, stop: tuple(range(start, stop)), 3)
    assert (room.num_blocks, blocks.num_free) == (3, 1), "what is read is no room"
    prompt_cache.give_back(chain, table)
    assert room.num_blocks == 6

    room.make(4)
    assert (prompt_cache.num_blocks, len(prefixes)) == (0, 1)
    room.make(5)
    assert len(prefixes) == 0
