"""Whose turn it is, by hand; the bound over random histories is the simulation's (`tests/simulation`)."""

from __future__ import annotations

from server.engine.fair_shares import FairShares, by_turns
from server.engine.messages import AddRequest
from server.engine.sequence import Sequence
from server.types import GenerationRequest, SamplingParams
from tests.server.engine.test_scheduler import Driver, ids, ref

WEIGHTS = {"gold": 3.0}


def sequence(name: str, tenant: str) -> Sequence:
    weight = WEIGHTS.get(tenant, 1.0)
    request = GenerationRequest(name, (1,), SamplingParams(), tenant=tenant, tenant_weight=weight)
    return Sequence(request, 0, 0, 0.0)


def ask(driver: Driver, name: str, tenant: str, prompt: int = 4, max_tokens: int = 4) -> None:
    request = GenerationRequest(
        name,
        (9,) * prompt,
        SamplingParams(max_tokens=max_tokens),
        tenant=tenant,
        tenant_weight=WEIGHTS.get(tenant, 1.0),
    )
    driver.inbox.append(AddRequest(request, 0, driver.now))


def tokens_by_tenant(driver: Driver, num_steps: int) -> dict[str, int]:
    """Output tokens of each tenant in so many steps."""
    found: dict[str, int] = {}
    for _ in range(num_steps):
        for row in driver.step().rows:
            tenant = row.sequence.request.tenant
            found[tenant] = found.get(tenant, 0) + row.sample
    return found


def test_one_request_does_not_wait_behind_another_tenants_many() -> None:
    driver = Driver(max_num_seqs=2)
    for i in range(20):
        ask(driver, f"many{i}", "greedy")
    driver.step()
    driver.step()
    ask(driver, "one", "modest")
    while len(driver.ended) < 2:
        driver.step()
    assert "one" in ids(driver.step()), "it is next, before 18 that came earlier"


def test_tenants_that_always_wait_get_work_by_their_weights() -> None:
    driver = Driver(max_num_seqs=4, num_blocks=40)
    for i in range(150):
        ask(driver, f"g{i}", "gold", prompt=3 + i % 5, max_tokens=2 + i % 7)
        ask(driver, f"s{i}", "silver", prompt=6, max_tokens=8)
    found = tokens_by_tenant(driver, 200)

    assert 2.6 < found["gold"] / found["silver"] < 3.4


def test_the_size_of_requests_buys_nothing() -> None:
    driver = Driver(max_num_seqs=4, num_blocks=60)
    for i in range(400):
        ask(driver, f"long{i}", "a", prompt=12, max_tokens=20)
        ask(driver, f"short{i}", "b", prompt=2, max_tokens=2)
    found = tokens_by_tenant(driver, 300)

    # Of equal work, short requests have more of it in their prompts, which cost too.
    work = {"a": found["a"] * (2 + 12 / 20), "b": found["b"] * (2 + 2 / 2)}
    assert 0.85 < work["a"] / work["b"] < 1.15


def test_who_asked_for_nothing_has_saved_up_nothing() -> None:
    driver = Driver(max_num_seqs=2)
    for i in range(60):
        ask(driver, f"a{i}", "a")
    tokens_by_tenant(driver, 80)
    for i in range(60):
        ask(driver, f"b{i}", "b")
    found = tokens_by_tenant(driver, 60)

    assert abs(found["a"] - found["b"]) <= 12, "from now on they share; b has no arrears to claim"


def test_one_tenant_alone_is_served_first_come_first_served() -> None:
    shares = FairShares()
    waiting = [sequence(name, "a") for name in "xyz"]
    shares.join(["a"])
    order = []
    for seq in shares.in_turn(waiting):
        shares.serve(seq.request, 5.0)
        order.append(seq)
    assert order == waiting


def test_turns_follow_the_counters_as_they_grow() -> None:
    shares = FairShares()
    names = [("a", 2), ("gold", 6)]
    waiting = [sequence(f"{tenant[0]}{i}", tenant) for tenant, n in names for i in range(n)]
    shares.join(["a", "gold"])
    order = []
    for seq in shares.in_turn(waiting):
        shares.serve(seq.request, 9.0)
        order.append(seq.request.request_id)
    assert order == ["a0", "g0", "g1", "g2", "a1", "g3", "g4", "g5"]


def test_everybody_is_equal_again_when_nothing_is_left_to_do() -> None:
    driver = Driver()
    ask(driver, "a", "a")
    for _ in range(8):
        driver.step()
    assert driver.scheduler._shares.counter("a") == 0.0


def test_prefixes_are_loaded_ahead_for_every_tenant() -> None:
    """However many wait, the next of each tenant finds its prefix."""
    driver = Driver(max_num_seqs=4)
    for i in range(6):
        ask(driver, f"busy{i}", "greedy", max_tokens=40)
    driver.step()
    for i in range(6):
        driver.add(f"cold{i}", prefix=ref(f"p{i}"))
    request = GenerationRequest("other", (9,), SamplingParams(), ref("q"), tenant="modest")
    driver.inbox.append(AddRequest(request, 0, 0.0))
    plan = driver.step()

    assert {r.task for r in plan.prefix_requests} == {"p0", "q"}


def test_ahead_of_their_turns_tenants_alternate() -> None:
    waiting = [sequence("a0", "a"), sequence("a1", "a"), sequence("a2", "a"), sequence("b0", "b")]
    assert [s.request.request_id for s in by_turns(waiting)] == ["a0", "b0", "a1", "a2"]


def test_who_had_the_most_gives_way_first() -> None:
    """Though the other's sequence is younger: its tenant has more to come."""
    driver = Driver(num_blocks=1 + 8, max_num_seqs=4)
    ask(driver, "old", "greedy", prompt=8, max_tokens=20)
    for _ in range(4):
        driver.step()
    ask(driver, "young", "gold", prompt=4, max_tokens=20)
    num_preemptions = 0
    while not num_preemptions:
        num_preemptions = driver.step().num_preemptions
    statuses = {s.request.request_id: str(s.status) for s in driver.scheduler._order}
    assert statuses == {"old": "preempted", "young": "running"}


def test_prompts_that_are_told_hold_no_places_in_vain() -> None:
    """A step tells 64 tokens, so one such prompt keeps it busy; the others wait for it, and a plain request does not."""
    driver = Driver(num_blocks=300, max_num_seqs=2, max_num_batched_tokens=256)
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=1)
    for name in ("told0", "told1", "told2"):
        request = GenerationRequest(name, tuple(range(200)), sampling, tenant="scores")
        driver.inbox.append(AddRequest(request, 0, 0.0))
    ask(driver, "plain", "other")
    assert ids(driver.step()) == ["told0", "plain"]


def test_a_token_that_is_told_costs_as_much_of_a_step_as_it_takes() -> None:
    driver = Driver(num_blocks=300, max_num_seqs=4, max_num_batched_tokens=256)
    sampling = SamplingParams(max_tokens=2, prompt_logprobs=1)
    driver.inbox.append(AddRequest(GenerationRequest("t", (9,) * 65, sampling, tenant="t"), 0, 0.0))
    driver.step()
    assert driver.scheduler._shares.counter("t") == 65 + 64 * (256 / 64 - 1)
