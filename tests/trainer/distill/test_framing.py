"""How prompts are written: what the teacher sees ends with exactly what is served."""

from __future__ import annotations

import pytest

from server.engine.tokenizer import Tokenizer
from tests.tiny_model_dir import tiny_tokenizer
from tests.trainer.distill.material import CHAT_TEMPLATE, chat_tokenizer
from trainer.distill.framing import ChatFraming, PlainFraming, framing_for
from trainer.distill.seed_prompts import SeedPrompts

FORM = SeedPrompts(
    seeds={"a": ("what",)}, between=" over ", prompt="the {message} dog", message_end="."
)

REFUSES_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn') }}{% endif %}"
    + CHAT_TEMPLATE
)
DROPS_SYSTEM = CHAT_TEMPLATE.replace(
    "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
)


def test_a_plain_model_goes_on_with_a_message_and_answers_behind_the_document() -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    framing = framing_for(tokenizer, FORM)

    assert isinstance(framing, PlainFraming)
    assert framing.message_stop == (".",)
    assert tokenizer.decode(framing.eliciting("lazy fox", "what")) == "lazy fox over the what"
    assert framing.message("what", " is quick ") == "what is quick"
    teacher, served = framing.teacher("lazy fox", "what is"), framing.served("what is")
    assert tokenizer.decode(served) == "the what is dog"
    assert tokenizer.decode(teacher) == "lazy fox over the what is dog"
    assert teacher[-len(served) :] == served
    document = framing.document("lazy fox jumps over the dog")
    assert framing.teacher("lazy fox jumps over the dog", "x")[:5] == document[:5]


def test_a_chat_model_has_the_document_in_its_system_turn() -> None:
    tokenizer = chat_tokenizer()
    framing = framing_for(tokenizer, FORM)

    teacher, served = framing.teacher("the lazy fox", "what."), framing.served("what.")

    assert framing == ChatFraming(tokenizer, system=True)
    assert tokenizer.decode(served) == "user\nwhat.assistant\n"
    assert teacher[-len(served) :] == served
    assert tokenizer.decode(teacher).startswith("system\n")
    assert "the lazy fox" in tokenizer.decode(teacher)
    assert framing.message("ignored", " what. \n") == "what."
    assert "ask about it" in tokenizer.decode(framing.eliciting("the lazy fox", "ask about it"))
    text = "the lazy fox"
    assert framing.document(text)[:8] == framing.teacher(text, "what.")[:8]


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM], ids=["refuses", "drops"])
def test_without_a_system_turn_the_document_stands_in_the_users(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    framing = framing_for(tokenizer, FORM)

    told = tokenizer.decode(framing.teacher("the lazy fox", "what."))

    assert framing == ChatFraming(tokenizer, system=False)
    assert told.startswith("user\n")
    assert "the lazy fox" in told
    assert told.endswith("what.assistant\n")
