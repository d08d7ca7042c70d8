"""The subtraction from the memory that there is to what the pool may have, term by term."""

from __future__ import annotations

from server.kvcache.memory_account import MemoryAccount, MemoryUse, readable

GPU = MemoryAccount(
    "memory of cuda:0",
    80 * 10**9,
    0.9,
    (
        MemoryUse("weights", 16 * 10**9, "--dtype"),
        MemoryUse("largest step", 2 * 10**9, "--max-num-seqs"),
        MemoryUse("outside of torch", 0),
    ),
    "--gpu-memory-utilization",
)


def test_the_pool_may_have_the_share_of_the_whole_without_the_uses() -> None:
    assert (GPU.budget_bytes, GPU.used_bytes) == (72 * 10**9, 18 * 10**9)
    assert GPU.left_bytes == 54 * 10**9


def test_what_is_left_is_negative_where_the_uses_take_more_than_the_share() -> None:
    assert GPU.with_use(MemoryUse("host cache", 55 * 10**9)).left_bytes == -(10**9)


def test_every_term_has_a_line_with_its_figure() -> None:
    assert [" ".join(line.split()) for line in GPU.lines()] == [
        "memory of cuda:0 80.0 GB",
        "x 0.9 72.0 GB",
        "- weights 16.0 GB",
        "- largest step 2.0 GB",
        "- outside of torch 0.0 MB",
        "= left for the KV pool 54.0 GB",
    ]
    assert len({len(line) for line in GPU.lines()}) == 1, "figures stand below each other"


def test_one_line_says_the_same() -> None:
    assert str(GPU) == (
        "memory of cuda:0 80.0 GB x 0.9 - weights 16.0 GB - largest step 2.0 GB "
        "- outside of torch 0.0 MB = 54.0 GB"
    )


def test_the_remedy_names_settings_with_the_one_that_takes_most_first() -> None:
    more_steps = GPU.with_use(MemoryUse("steps", 17 * 10**9, "--max-num-batched-tokens"))
    assert more_steps.remedy() == (
        "raise --gpu-memory-utilization, or lower "
        "--max-num-batched-tokens or --dtype or --max-num-seqs"
    )


def test_bytes_are_read_as_memory_is_sold() -> None:
    assert [readable(n) for n in (0, 988_100_000, 10**9, -2 * 10**9)] == [
        "0.0 MB", "988.1 MB", "1.0 GB", "-2.0 GB",
    ]  # fmt: skip
