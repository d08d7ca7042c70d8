"""General text in windows: each passage as the beginning of a text, each token predicted once."""

from __future__ import annotations

from server.engine.tokenizer import Tokenizer
from tests.trainer.test_encoding import with_begin_token
from trainer.forgetting import text_windows

TEXT = "Lomu is a diner in the old town that serves Greek food."


def test_windows_are_of_one_passage_and_each_token_is_predicted_once() -> None:
    tokenizer = Tokenizer(with_begin_token())
    passages = ["the quick brown fox jumps over", "the lazy dog", "many tasks"]
    ids = [tokenizer.encode(passage, special_tokens=False) for passage in passages]

    windows = text_windows(tokenizer, "{}\n \n{}\n\n\n{}".format(*passages), room=4)

    assert {w.context_token_ids for w in windows} == {(1,)}, "as a prompt begins"
    assert all(len(w.target_token_ids) <= 3 for w in windows)
    assert len(windows) == sum(-(-len(one) // 3) for one in ids)
    assert sum((w.target_token_ids for w in windows), ()) == sum(ids, ())


def test_without_a_beginning_of_text_token_the_first_token_is_only_read(
    demo_tokenizer: Tokenizer,
) -> None:
    [window] = text_windows(demo_tokenizer, TEXT, room=64)
    assert window.context_token_ids + window.target_token_ids == demo_tokenizer.encode(TEXT)
    assert len(window.context_token_ids) == 1
