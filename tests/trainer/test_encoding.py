"""Training sees the tokens that serving will see, and says where it can not."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import processors

from server.engine.tokenizer import Tokenizer
from tests.tiny_model_dir import tiny_tokenizer
from trainer.data import Example, Message
from trainer.encoding import (
    EncodingSettings,
    ExampleEncoder,
    length_summary,
    opening_tokens,
    with_text,
)
from trainer.errors import BadData

EOS = 2
CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}</s>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def encoder(tokenizer: Any = None, **settings: Any) -> ExampleEncoder:
    defaults: dict[str, Any] = {"separator": None, "end_token_ids": frozenset({EOS})}
    return ExampleEncoder(
        Tokenizer(tokenizer or tiny_tokenizer()), EncodingSettings(**(defaults | settings))
    )


def test_prompt_tokens_are_the_servers_and_both_together_are_the_texts() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())

    (one,), notices = encoder().encode([Example("the quick fox", " jumps over", 1)])

    assert one.prompt_token_ids == tokenizer.encode("the quick fox")
    whole = (*one.prompt_token_ids, *one.completion_token_ids)
    assert whole == (*tokenizer.encode("the quick fox jumps over"), EOS)
    assert one.reference == " jumps over"
    assert notices == []


def test_a_space_is_learned_where_no_joint_has_white_space_and_the_user_is_told() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    given = [Example("the quick fox", "jumps", 1), Example("lazy", "dog", 2)]

    encoded, (notice,) = encoder().encode(given)

    assert tokenizer.decode(encoded[0].completion_token_ids) == " jumps"
    assert encoded[0].reference == "jumps"
    assert notice.code == "separator"
    assert "--separator" in notice.message


@pytest.mark.parametrize("other", [Example("lazy ", "dog", 2), Example("lazy", "\ndog", 2)])
def test_no_space_is_added_where_a_joint_has_one(other: Example) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())

    encoded, notices = encoder().encode([Example("the", "fox", 1), other])

    assert tokenizer.decode(encoded[0].completion_token_ids) == "fox"
    assert [n.code for n in notices if n.code == "separator"] == []


def test_a_given_separator_is_taken_as_it_is() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())

    (one,), notices = encoder(separator="\n").encode([Example("the", "fox", 1)])

    assert tokenizer.decode(one.completion_token_ids) == "\nfox"
    assert notices == []


def test_held_out_examples_get_the_separator_that_training_examples_decided() -> None:
    same = encoder()
    same.encode([Example("the", "fox", 1)])

    (one,), notices = same.encode([Example("the ", "fox", 1)])

    assert Tokenizer(tiny_tokenizer()).decode(one.completion_token_ids) == " fox"
    assert notices == []


def test_a_joint_within_a_token_is_encoded_apart_and_counted() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    given = [Example("the qu", "ick fox", 7), Example("the quick ", "fox", 8)]
    joint = tokenizer.encode("the quick fox")
    assert joint[: len(tokenizer.encode("the qu"))] != tokenizer.encode("the qu")

    encoded, notices = encoder(separator="").encode(given)

    assert encoded[0].prompt_token_ids == tokenizer.encode("the qu")
    assert encoded[0].completion_token_ids == (*tokenizer.encode("ick fox"), EOS)
    (notice,) = [n for n in notices if n.code == "joined_otherwise"]
    assert notice.message.startswith("2 of 2 examples") or "line 7" in notice.message


def with_begin_token(*, also_behind: bool = False) -> Any:
    tokenizer = tiny_tokenizer()
    template = "<s> $A </s>" if also_behind else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_a_begin_token_stands_before_the_prompt_and_nowhere_else() -> None:
    (one,), notices = encoder(with_begin_token(), separator=" ").encode([Example("the", "fox", 1)])

    assert one.prompt_token_ids[0] == 1
    assert 1 not in (*one.prompt_token_ids[1:], *one.completion_token_ids)
    assert notices == []


def test_a_token_that_the_tokenizer_puts_behind_prompts_is_learned_from_and_told() -> None:
    (one,), notices = encoder(with_begin_token(also_behind=True), separator=" ").encode(
        [Example("the", "fox", 1)]
    )

    assert one.prompt_token_ids[-1] == EOS
    assert Tokenizer(tiny_tokenizer()).decode(one.completion_token_ids) == " fox"
    assert "special_token_behind_prompt" in {n.code for n in notices}


def chat(tokenizer: Any = None, template: str = CHAT) -> Any:
    tokenizer = tokenizer or tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


CONVERSATION = Example((Message("user", "the quick fox"),), "jumps over", 1)


def test_a_conversation_is_the_templates_and_ends_with_its_end_of_turn() -> None:
    tokenizer = chat()
    served = Tokenizer(tokenizer).encode_chat(
        [{"role": "user", "content": "the quick fox"}], add_generation_prompt=True
    )

    (one,), notices = encoder(tokenizer).encode([CONVERSATION])

    assert one.prompt_token_ids == served
    assert one.completion_token_ids[-1] == EOS
    assert one.completion_token_ids.count(EOS) == 1
    assert Tokenizer(tokenizer).decode(one.completion_token_ids) == "jumps over"
    assert notices == []


def test_a_template_that_writes_answered_turns_otherwise_is_told() -> None:
    """As templates do that cut the reasoning out of earlier answers."""
    template = CHAT.replace("<assistant>{% endif %}", "<assistant><think>{% endif %}")

    (one,), notices = encoder(chat(template=template)).encode([CONVERSATION])

    assert Tokenizer(tiny_tokenizer()).decode(one.completion_token_ids) == "jumps over"
    assert [n.code for n in notices] == ["other_template"]


def test_a_begin_token_beside_a_chat_template_is_told() -> None:
    _, notices = encoder(chat(with_begin_token())).encode([CONVERSATION])

    assert [n.code for n in notices] == ["chat_and_begin_token"]


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(BadData, match=r"line 1: .*no chat template"):
        encoder().encode([CONVERSATION])


def test_the_end_that_is_learned_is_one_that_the_server_stops_at() -> None:
    example = Example("the ", "fox", 1)
    (own,), _ = encoder(end_token_ids=frozenset({2, 50})).encode([example])
    (other,), _ = encoder(end_token_ids=frozenset({60, 50})).encode([example])

    assert own.completion_token_ids[-1] == 2
    assert other.completion_token_ids[-1] == 50


def test_without_an_end_token_the_stop_string_is_learned_or_the_user_is_told() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    example = Example("the", " fox", 1)

    (one,), none = encoder(end_token_ids=frozenset(), stop=("\n",)).encode([example])
    (other,), notices = encoder(end_token_ids=frozenset()).encode([example])

    assert tokenizer.decode(one.completion_token_ids) == " fox\n"
    assert none == []
    assert tokenizer.decode(other.completion_token_ids) == " fox"
    assert [n.code for n in notices] == ["no_end"]


@pytest.mark.parametrize("also_behind", [False, True])
def test_a_begin_token_stands_once_at_the_front_of_text_and_prompt(also_behind: bool) -> None:
    tokenizer = Tokenizer(with_begin_token(also_behind=also_behind))
    text = tokenizer.encode("the quick", special_tokens=False)

    assert opening_tokens(tokenizer) == (1,)
    assert with_text(tokenizer, "the quick", (1, 12, 13)) == (1, *text, 12, 13)
    assert with_text(tokenizer, "the quick", (12, 13)) == (1, *text, 12, 13)


def test_without_a_begin_token_text_and_prompt_stand_side_by_side() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())

    assert opening_tokens(tokenizer) == ()
    assert with_text(tokenizer, "the quick", (12,)) == (*tokenizer.encode("the quick"), 12)


def test_what_concerns_the_tokenizer_is_told_once() -> None:
    twice = encoder(end_token_ids=frozenset())
    _, notices = twice.encode([Example("the", "fox", 1)])
    _, again = twice.encode([Example("lazy", "dog", 1)])

    assert [n.code for n in notices] == ["separator", "no_end"]
    assert again == []


def test_long_examples_are_left_out_and_named() -> None:
    given = [Example("the", " fox", 1), Example("the quick brown fox " * 9 + "the", " fox", 2)]

    encoded, notices = encoder(max_tokens=20).encode(given)

    assert len(encoded) == 1
    assert [n.code for n in notices] == ["too_long"]
    assert "1 of 2 examples are longer than the 20 tokens" in notices[0].message
    assert "line 2" in notices[0].message
    with pytest.raises(BadData, match="all 2 examples are longer"):
        encoder(max_tokens=2).encode(given)


def test_lengths_are_summarised() -> None:
    encoded, _ = encoder(separator="").encode(
        [Example("the " * n, "fox", n) for n in range(1, 101)]
    )

    summary = length_summary(encoded)

    lengths = sorted(len(e.prompt_token_ids) for e in encoded)
    assert summary["prompt"]["min"] == lengths[0]
    assert summary["prompt"]["max"] == lengths[-1]
    assert summary["prompt"]["median"] == lengths[50]
    assert summary["completion"]["min"] == summary["completion"]["max"]
