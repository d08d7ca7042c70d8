"""The queue between threads: nothing lost, order kept, no waiting for a poll."""

from __future__ import annotations

import threading
import time

from server.engine.inbox import Inbox


def test_all_that_came_is_taken_at_once_and_in_order() -> None:
    inbox: Inbox[int] = Inbox()
    for i in range(5):
        inbox.put(i)

    assert inbox.drain(0.0) == [0, 1, 2, 3, 4]
    assert inbox.drain(0.0) == []


def test_a_message_wakes_the_reader() -> None:
    inbox: Inbox[str] = Inbox()
    threading.Timer(0.02, inbox.put, ["x"]).start()
    started = time.monotonic()

    assert inbox.drain(20.0) == ["x"]
    assert time.monotonic() - started < 10.0


def test_closing_wakes_the_reader_and_lets_it_never_wait_again() -> None:
    inbox: Inbox[str] = Inbox()
    threading.Timer(0.02, inbox.close).start()
    started = time.monotonic()

    assert inbox.drain(20.0) == []
    assert inbox.drain(20.0) == []
    assert time.monotonic() - started < 10.0


def test_it_returns_empty_when_nothing_comes_in_time() -> None:
    assert Inbox[str]().drain(0.01) == []


def test_messages_of_many_threads_all_arrive_each_threads_in_order() -> None:
    inbox: Inbox[tuple[int, int]] = Inbox()

    def post(thread: int) -> None:
        for i in range(200):
            inbox.put((thread, i))

    threads = [threading.Thread(target=post, args=[t]) for t in range(4)]
    for thread in threads:
        thread.start()
    got: list[tuple[int, int]] = []
    while len(got) < 800:
        part = inbox.drain(5.0)
        assert part, "a message was lost"
        got += part

    assert all([i for t, i in got if t == n] == list(range(200)) for n in range(4))
    for thread in threads:
        thread.join()
