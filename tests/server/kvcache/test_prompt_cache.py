"""The prompt cache against a dictionary from tokens to blocks, and the rules one by one."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest

from server.kvcache.block_pool import BlockPool
from server.kvcache.prompt_cache import BlockChain, PromptCache

SIZE = 2
# Everything that a block's K/V depend on, and whose it is: salt, digest, first position, all tokens to its end.
Key = tuple[str, str | None, int, tuple[int, ...]]


@dataclass(eq=False)
class Reader:
    """A sequence as far as the cache knows it."""

    tokens: tuple[int, ...]
    salt: str = ""
    digest: str | None = None
    first_position: int = 0
    table: list[int] = field(default_factory=list)
    chain: BlockChain = field(init=False)

    def __post_init__(self) -> None:
        self.chain = BlockChain.begin(self.salt, self.digest, self.first_position)

    @property
    def num_full(self) -> int:
        return len(self.tokens) // SIZE

    def read(self, start: int, stop: int) -> tuple[int, ...]:
        return self.tokens[start:stop]

    def key(self, index: int) -> Key:
        return self.salt, self.digest, self.first_position, self.tokens[: (index + 1) * SIZE]


class Desk:
    """A cache with its pool, used as the scheduler uses it."""

    def __init__(self, num_blocks: int = 40, *, enabled: bool = True) -> None:
        self.pool = BlockPool(num_blocks, SIZE)
        self.cache = PromptCache(self.pool, enabled=enabled)

    def admit(self, reader: Reader, num_blocks: int | None = None) -> int:
        """Leases what there is, takes own blocks for the rest; returns how many were leased."""
        wanted = reader.num_full if num_blocks is None else num_blocks
        leased = self.cache.reuse(reader.chain, reader.table, reader.read, wanted)
        reader.table += self.pool.allocate(reader.num_full - len(reader.table))
        return leased

    def compute(self, reader: Reader) -> Reader:
        self.admit(reader)
        self.cache.enter(reader.chain, reader.table, reader.read, reader.num_full)
        return reader

    def leave(self, reader: Reader) -> None:
        self.cache.give_back(reader.chain, reader.table)

    def finds(self, reader: Reader) -> int:
        """How many blocks of a newcomer are cached; it reads and leaves."""
        leased = self.admit(reader)
        self.leave(reader)
        return leased


@dataclass(eq=False)
class Record:
    block_id: int
    num_leases: int = 1


class Twin:
    """The rules as one would explain them: blocks by their tokens, and a list of those that nobody reads."""

    def __init__(self) -> None:
        self.records: dict[Key, Record] = {}
        self.dropped: list[Record] = []
        self.idle: list[Key] = []  # least recently used first
        self.leased: dict[Reader, list[tuple[Key, Record]]] = {}

    def admit(self, reader: Reader, num_blocks: int) -> int:
        self.leased[reader] = []
        hits = 0
        while hits < num_blocks and reader.key(hits) in self.records:
            self.lease(reader, hits)
            hits += 1
        return hits

    def enter(self, reader: Reader, num_blocks: int) -> None:
        for index in range(len(self.leased[reader]), num_blocks):
            if self.is_cut_off(reader):
                break
            if reader.key(index) in self.records:
                self.lease(reader, index)
            else:
                record = Record(reader.table[index])
                self.records[reader.key(index)] = record
                self.leased[reader].append((reader.key(index), record))

    def lease(self, reader: Reader, index: int) -> None:
        key = reader.key(index)
        record = self.records[key]
        record.num_leases += 1
        if key in self.idle:
            self.idle.remove(key)
        self.leased[reader].append((key, record))

    def leave(self, reader: Reader) -> None:
        for key, record in reversed(self.leased.pop(reader)):
            record.num_leases -= 1
            if record.num_leases == 0 and record in self.dropped:
                self.dropped.remove(record)
            elif record.num_leases == 0:
                self.idle.append(key)

    def is_cut_off(self, reader: Reader) -> bool:
        return any(record in self.dropped for _, record in self.leased[reader])

    def drop(self, reader: Reader) -> None:
        nothing_known = not self.leased[reader] and len(reader.chain.keys) == 1
        if nothing_known or self.is_cut_off(reader):
            return
        *whose, first = reader.key(0)
        fallen = [k for k in self.records if [*k[:3]] == whose and k[3][:SIZE] == first]
        for key in fallen:
            record = self.records.pop(key)
            if key in self.idle:
                self.idle.remove(key)
            else:
                self.dropped.append(record)

    def make_room(self, num_blocks: int) -> None:
        for key in self.idle[:num_blocks]:
            self.idle.remove(key)
            del self.records[key]


def random_reader(rng: random.Random) -> Reader:
    """Few tokens and few owners, so that beginnings come again."""
    tokens = tuple(rng.randrange(2) for _ in range(rng.randint(1, 12)))
    return Reader(tokens, rng.choice(["", "a"]), rng.choice([None, "d"]), rng.choice([0, 0, 3]))


@pytest.mark.parametrize("seed", range(30))
def test_random_histories_agree_with_a_dictionary_of_tokens(seed: int) -> None:
    rng = random.Random(seed)
    desk, twin = Desk(num_blocks=rng.randint(20, 60)), Twin()
    readers: list[Reader] = []
    for _ in range(300):
        match rng.randrange(5):
            case 0 if len(readers) < 5 and desk.pool.num_free >= 6:
                reader = random_reader(rng)
                limit = rng.randint(0, reader.num_full)
                readers.append(reader)
                assert desk.admit(reader, limit) == twin.admit(reader, limit)
            case 1 if readers:
                reader = rng.choice(readers)
                num_full = rng.randint(0, reader.num_full)
                twin.enter(reader, num_full)
                desk.cache.enter(reader.chain, reader.table, reader.read, num_full)
            case 2 if readers:
                reader = readers.pop(rng.randrange(len(readers)))
                desk.leave(reader)
                twin.leave(reader)
            case 3 if readers and rng.random() < 0.3:
                reader = rng.choice(readers)
                desk.cache.drop(reader.chain)
                twin.drop(reader)
            case 4:
                wanted = rng.randint(0, desk.pool.capacity)
                twin.make_room(max(0, wanted - desk.pool.num_free))
                desk.cache.make_room(wanted)
        desk.cache.check_invariants(reader.chain for reader in readers)
        desk.pool.check_invariants()
        held = [*twin.records.values(), *twin.dropped]
        assert desk.cache.block_ids() == {record.block_id for record in held}
        assert desk.cache.num_blocks == len(held)
        assert desk.cache.num_evictable_blocks == len(twin.idle)
        own = sum(len(r.table) - len(r.chain.blocks) for r in readers)
        assert desk.pool.num_used == len(held) + own
        for reader in readers:
            leased = [record.block_id for _, record in twin.leased[reader]]
            assert reader.table[: len(reader.chain.blocks)] == leased


TOKENS = (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(
    "other",
    [
        Reader(TOKENS, salt="b", digest="d", first_position=3),
        Reader(TOKENS, salt="a", digest="e", first_position=3),
        Reader(TOKENS, salt="a", digest=None, first_position=3),
        Reader(TOKENS, salt="a", digest="d", first_position=4),
        Reader((9, *TOKENS[1:]), salt="a", digest="d", first_position=3),
        Reader(TOKENS, salt="ad", digest="", first_position=3),
    ],
    ids=[
        "salt",
        "prefix",
        "no prefix",
        "position",
        "first token",
        "salt that ends as the digest begins",
    ],
)
def test_nothing_is_shared_unless_all_that_it_depends_on_is_equal(other: Reader) -> None:
    desk = Desk()
    desk.leave(desk.compute(Reader(TOKENS, salt="a", digest="d", first_position=3)))

    assert desk.finds(other) == 0
    assert desk.finds(Reader(TOKENS, salt="a", digest="d", first_position=3)) == 3


def test_a_salt_that_is_no_unicode_is_a_salt_like_others() -> None:
    desk = Desk()
    desk.leave(desk.compute(Reader(TOKENS, salt="\ud800")))

    assert desk.finds(Reader(TOKENS, salt="\ud800")) == 3
    assert desk.finds(Reader(TOKENS, salt="\udfff")) == 0


def test_the_same_tokens_behind_another_beginning_are_other_blocks() -> None:
    desk = Desk()
    desk.leave(desk.compute(Reader((1, 2, 7, 7))))

    assert desk.finds(Reader((3, 4, 7, 7))) == 0
    assert desk.finds(Reader((7, 7))) == 0


def test_readers_of_one_beginning_hold_its_blocks_once() -> None:
    desk = Desk()
    first = desk.compute(Reader(TOKENS))
    second = Reader((*TOKENS[:4], 9, 9))
    desk.admit(second)

    assert second.table[:2] == first.table[:2]
    assert desk.pool.num_used == 4
    desk.leave(first)
    assert desk.cache.num_evictable_blocks == 1, "what is still read does not count as room"


def test_what_two_computed_at_once_is_kept_once() -> None:
    desk = Desk()
    twins = [Reader(TOKENS), Reader(TOKENS)]
    for reader in twins:
        desk.admit(reader)
    assert desk.pool.num_used == 6
    for reader in twins:
        desk.cache.enter(reader.chain, reader.table, reader.read, 3)

    assert twins[0].table == twins[1].table
    assert desk.pool.num_used == 3


def test_the_end_of_a_beginning_makes_room_before_its_start_and_old_before_new() -> None:
    desk = Desk(num_blocks=8)
    old, new = Reader((1, 1, 2, 2, 3, 3)), Reader((5, 5, 6, 6))
    desk.leave(desk.compute(old))
    desk.leave(desk.compute(new))

    desk.cache.make_room(4)
    assert (desk.finds(Reader(old.tokens)), desk.finds(Reader(new.tokens))) == (1, 2)


def test_a_block_that_is_used_again_goes_later() -> None:
    desk = Desk(num_blocks=7)
    for tokens in ((1, 1), (2, 2), (3, 3)):
        desk.leave(desk.compute(Reader(tokens)))
    assert desk.finds(Reader((1, 1))) == 1

    desk.cache.make_room(4)
    assert [desk.finds(Reader(t)) for t in ((1, 1), (2, 2), (3, 3))] == [1, 0, 1]


def test_what_a_failed_row_read_is_given_to_nobody_and_freed_with_its_last_reader() -> None:
    desk = Desk()
    failing = desk.compute(Reader(TOKENS))
    desk.leave(desk.compute(Reader((*TOKENS[:2], 8, 8))))  # idle, behind the block that falls
    reading = Reader((*TOKENS, 7, 7))
    desk.admit(reading)

    desk.cache.drop(failing.chain)
    desk.leave(failing)
    assert desk.finds(Reader(TOKENS)) == 0
    assert desk.finds(Reader((*TOKENS[:2], 8, 8))) == 0
    desk.cache.enter(reading.chain, reading.table, reading.read, reading.num_full)
    assert len(reading.chain.blocks) == 3, "nothing is cached behind what was dropped"
    desk.cache.check_invariants([reading.chain])
    desk.leave(reading)
    assert desk.pool.num_used == 0


def test_a_drop_frees_blocks_in_the_same_order_wherever_they_lie_in_memory() -> None:
    """Else the same messages would give other plans, and a simulated failure could not be replayed."""
    desks: list[Desk] = []  # kept, so that each has its objects elsewhere

    def freed() -> tuple[int, ...]:
        desk = Desk()
        desks.append(desk)
        failed, *others = [desk.compute(Reader((1, 2, n, n))) for n in range(9)]
        for reader in others:
            desk.leave(reader)
        desk.cache.drop(failed.chain)
        return tuple(desk.pool.allocate(desk.pool.num_free))

    assert len({freed() for _ in range(20)}) == 1


def test_after_a_drop_the_same_tokens_can_be_cached_anew() -> None:
    desk = Desk()
    failing = desk.compute(Reader(TOKENS))
    desk.cache.drop(failing.chain)
    fresh = desk.compute(Reader(TOKENS))

    assert fresh.table != failing.table
    desk.leave(failing)
    assert desk.finds(Reader(TOKENS)) == 3


def test_switched_off_it_holds_nothing_and_waits_for_nothing() -> None:
    desk = Desk(enabled=False)
    desk.leave(desk.compute(Reader(TOKENS)))
    newcomer = Reader(TOKENS)

    assert desk.cache.missing_key(newcomer.chain, newcomer.read, 3) is None
    assert desk.finds(newcomer) == 0
    assert desk.pool.num_used == 0


def test_the_missing_key_is_that_of_the_first_block_to_compute() -> None:
    desk = Desk()
    desk.leave(desk.compute(Reader(TOKENS[:4])))
    newcomer = Reader(TOKENS)

    missing = desk.cache.missing_key(newcomer.chain, newcomer.read, 3)
    assert missing == newcomer.chain.keys[3]
    assert desk.cache.missing_key(newcomer.chain, newcomer.read, 2) is None
