"""A real byte-level BPE tokenizer, trained here in milliseconds."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from server.engine.tokenizer import Tokenizer

CORPUS = ["the quick brown fox jumps over the lazy dog. stop here, stopping there.\n\n"] * 20
EOS = "<eos>"


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """300 tokens: all bytes, a few merges of English, so that other scripts split into bytes."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(CORPUS, trainer)
    return Tokenizer(PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS))
