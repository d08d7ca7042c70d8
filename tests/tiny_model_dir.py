"""A tiny random model with its tokenizer as a directory, as `--model DIR` takes it. Called by tests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.tiny_models import VOCAB, tiny_model

_TEXT = "the quick brown fox jumps over the lazy dog. Prefixes are served; many tasks, one model.\n"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Ids 0..2 are pad, bos, eos, and no BOS is added."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(set(_TEXT)),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save_tiny_model(
    directory: Path, architecture: str = "llama", seed: int = 0, **overrides: Any
) -> Path:
    """Writes model and tokenizer to `directory`."""
    tiny_tokenizer().save_pretrained(str(directory))
    module = tiny_model(architecture, seed, **overrides)
    module.save_pretrained(str(directory))  # type: ignore[operator]
    return directory
