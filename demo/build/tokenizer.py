"""The demo's tokenizer: byte-level BPE of 2,048 tokens, digits one by one, no BOS.

A space is put before the first word, so that a value at the start of a text has the same tokens as
anywhere else. ``tokenizer(prompt)`` gives exactly the ids used in training: nothing is added.
"""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from demo.build.corpus import documents

VOCAB_SIZE: Final = 2048
MAX_POSITIONS: Final = 512
END_OF_TEXT: Final = "<|endoftext|>"
NUM_DOCUMENTS: Final = 20_000
SEED: Final = 11


def training_text() -> Iterator[str]:
    return islice(documents(SEED), NUM_DOCUMENTS)


def build_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    """Learn the merges from the corpus and write the tokenizer files into ``model_dir``."""
    bpe = Tokenizer(models.BPE())
    # ByteLevel first: after it a leading space is part of the word, and Digits cannot add another.
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.ByteLevel(add_prefix_space=True),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(training_text(), trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )
    wrapped.save_pretrained(model_dir)
    return load_tokenizer(model_dir)


def load_tokenizer(model_dir: Path) -> PreTrainedTokenizerBase:
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(model_dir)
    return tokenizer


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text, by the same default call that a server makes."""
    ids: list[int] = tokenizer(text)["input_ids"]
    return ids
