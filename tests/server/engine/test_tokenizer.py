"""Increments of text, when characters and tokens do not end at the same place."""

from __future__ import annotations

import copy
import random

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from server.engine.tokenizer import Detokenizer, Tokenizer
from server.errors import InvalidParameter
from server.types import TokenText

TEXTS = [
    "the quick brown fox",
    "naïve café — 100 €",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈!",
    "  two  spaces\n\nand\ttabs ",
    "mixed 漢字 and 𝔘𝔫𝔦𝔠𝔬𝔡𝔢",
    "a\ufffdb",  # a replacement character that the text really has
    "é",
]


def increments(tokenizer: Tokenizer, token_ids: tuple[int, ...]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push([t]) for t in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_joined_increments_are_the_whole_text(tokenizer: Tokenizer, text: str) -> None:
    assert "".join(increments(tokenizer, tokenizer.encode(text))) == text


def test_joined_increments_are_the_decoding_of_any_tokens(tokenizer: Tokenizer) -> None:
    """A model may emit bytes that are no text at all."""
    rng = random.Random(0)
    for _ in range(300):
        token_ids = tuple(rng.randrange(1, 300) for _ in range(rng.randint(1, 40)))

        assert "".join(increments(tokenizer, token_ids)) == tokenizer.decode(token_ids)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_tokens_may_come_several_at_once(tokenizer: Tokenizer, size: int) -> None:
    text = "".join(TEXTS)
    token_ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    parts = [detokenizer.push(token_ids[i : i + size]) for i in range(0, len(token_ids), size)]

    assert "".join(parts) + detokenizer.flush() == text


def test_half_a_character_is_held_back(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("語")
    assert len(token_ids) == 3, "the character was to be split"

    assert increments(tokenizer, token_ids) == ["", "", "語", ""]


def test_half_a_character_at_the_end_is_flushed_as_what_it_is(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("a語")[:-1]

    assert increments(tokenizer, token_ids)[-1] == "\ufffd"


def test_text_is_given_out_as_soon_as_it_is_certain(tokenizer: Tokenizer) -> None:
    token_ids = tokenizer.encode("the quick brown fox")

    assert all(increments(tokenizer, token_ids)[:-1])


def test_special_tokens_have_no_text(tokenizer: Tokenizer) -> None:
    the, eos = tokenizer.encode("the"), tokenizer.encode("<eos>")
    assert len(eos) == 1

    assert "".join(increments(tokenizer, (*the, *eos, *eos, *the))) == "thethe"


def test_a_long_run_of_special_tokens_is_forgotten_and_costs_no_text(tokenizer: Tokenizer) -> None:
    the, (eos,) = tokenizer.encode("the"), tokenizer.encode("<eos>")
    detokenizer = Detokenizer(tokenizer)
    for token in (*the, *[eos] * 500):
        detokenizer.push([token])

    assert len(detokenizer._tokens) < 100
    assert detokenizer.push(tokenizer.encode(" dog")) + detokenizer.flush() == " dog"


def test_the_first_word_keeps_its_space_where_a_decoder_drops_it_at_the_start() -> None:
    raw = RawTokenizer(models.WordLevel({"▁hello": 0, "▁world": 1}, unk_token="▁hello"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    metaspace = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))
    assert metaspace.decode([1]) == "world"

    assert Detokenizer(metaspace, prompt=[0]).push([1]) == " world"


def test_special_tokens_are_added_by_default_and_left_out_on_request() -> None:
    raw = RawTokenizer(models.WordLevel({"<s>": 0, "a": 1, "</s>": 2}, unk_token="</s>"))
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"))

    assert tokenizer.encode("a") == (0, 1)
    assert tokenizer.encode("a", special_tokens=False) == (1,)
    assert tokenizer.eos_token_id == 2


CHAT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


def with_template(tokenizer: Tokenizer, template: object) -> Tokenizer:
    raw = copy.deepcopy(tokenizer._tokenizer)
    raw.chat_template = template
    return Tokenizer(raw)


def test_a_conversation_is_written_in_the_template_that_the_tokenizer_came_with(
    tokenizer: Tokenizer,
) -> None:
    turns = [{"role": "user", "content": "the fox"}]
    expected = tokenizer.encode("user: the fox\n", special_tokens=False)

    template: object
    for template in (CHAT, {"default": CHAT, "tool_use": "no"}):
        assert with_template(tokenizer, template).encode_chat(turns) == expected
    for template in (None, "", {"tool_use": CHAT}):
        with pytest.raises(InvalidParameter, match="no chat template"):
            with_template(tokenizer, template).encode_chat(turns)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('only one turn') }}", "only one turn"),
        ("{{ messages[7].content }}", "has no element 7"),
        ("{{ 1 // 0 }}", "fails on them"),
        ("{{ messages + 1 }}", "fails on them"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_a_template_that_fails_or_leaves_its_sandbox_refuses_the_messages(
    tokenizer: Tokenizer, template: str, said: str
) -> None:
    with pytest.raises(InvalidParameter, match=said):
        with_template(tokenizer, template).encode_chat([{"role": "user", "content": "x"}])


def test_a_content_is_data_and_not_a_part_of_the_template(tokenizer: Tokenizer) -> None:
    turns = [{"role": "user", "content": "{{ 7 * 7 }}"}]
    tokens = with_template(tokenizer, CHAT).encode_chat(turns)

    assert tokenizer.decode(tokens) == "user: {{ 7 * 7 }}\n"


def test_a_token_by_itself_has_a_text_bytes_and_whether_it_is_special(tokenizer: Tokenizer) -> None:
    first, *_ = tokenizer.encode("語")
    (fox,) = tokenizer.encode(" fox")

    assert tokenizer.token_text(fox) == TokenText(" fox", b" fox", False)
    assert tokenizer.token_text(first) == TokenText("bytes:\\xe8", "語".encode()[:1], False)
    assert tokenizer.token_text(0) == TokenText("<eos>", b"<eos>", True)
    assert tokenizer.token_text(10**6).text == "", "a model may have more tokens than its tokenizer"


def test_texts_of_tokens_are_those_of_a_text_also_where_a_decoder_drops_a_space() -> None:
    raw = RawTokenizer(
        models.WordLevel({"\u2581hello": 0, "\u2581world": 1}, unk_token="\u2581hello")
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    raw.decoder = decoders.Metaspace()
    metaspace = Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw))

    assert [metaspace.token_text(token).text for token in (0, 1)] == [" hello", " world"]


def test_special_tokens_have_a_text_if_they_are_not_skipped(tokenizer: Tokenizer) -> None:
    tokens = (*tokenizer.encode("the fox"), 0)

    assert tokenizer.decode(tokens, special_tokens=True) == "the fox<eos>"
    detokenizer = Detokenizer(tokenizer, special_tokens=True)
    assert detokenizer.push(tokens) + detokenizer.flush() == "the fox<eos>"


def test_the_facts_name_what_a_client_needs_to_tokenize(tokenizer: Tokenizer) -> None:
    facts = with_template(tokenizer, CHAT).facts()

    assert (facts.eos_token, facts.bos_token, facts.vocab_size) == ("<eos>", None, 300)
    assert facts.chat_template == CHAT
