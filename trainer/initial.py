"""What a prefix begins as. Main thread, once before training; called by `session`.

The choice of the start decides more than any other setting: keys and values that a text leaves in the cache are
keys and values as the base knows them, random numbers are not.

    text         the given text; step 0 answers exactly as if it stood in the prompt
    examples     training examples, one after the other, as if they had been shown in the prompt
    vocabulary   tokens drawn from the vocabulary
    random       normal numbers of the size that the base's own keys and values have
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from server.engine.tokenizer import Tokenizer
from trainer.base import FrozenBase
from trainer.config import DEFAULT_NUM_VIRTUAL_TOKENS, TrainConfig
from trainer.encoding import EncodedExample, opening_tokens, without_opening
from trainer.errors import BadSetting
from trainer.prefix_cache import KeyValues

_SIZE_SAMPLE: Final = 64  # random tokens that show how large keys, values and embeddings are


@dataclass(frozen=True, slots=True, eq=False)
class InitialPrefix:
    """`embeddings` [P, hidden] are what gives `key_values`; for `random` both are drawn on their own.

    `token_ids`: what it was made of, if of tokens.
    """

    key_values: KeyValues
    embeddings: Tensor
    token_ids: tuple[int, ...] | None


def text_token_ids(
    tokenizer: Tokenizer, text: str, num_virtual_tokens: int | None
) -> tuple[int, ...]:
    """P tokens of `text`, encoded as a prompt is; None takes as many as it has. Raises `BadSetting`.

    A shorter text is repeated, of a longer one the end is taken. Special tokens in front stay there, once.
    """
    whole = tokenizer.encode(text)
    if not whole:
        raise BadSetting("init_text: the text has no tokens")
    if num_virtual_tokens is None or num_virtual_tokens == len(whole):
        return whole
    body = tokenizer.encode(text, special_tokens=False)
    return _filled(opening_tokens(tokenizer), body or whole, num_virtual_tokens)


def example_token_ids(
    tokenizer: Tokenizer, examples: Sequence[EncodedExample], num_virtual_tokens: int
) -> tuple[int, ...]:
    """The end of a run of solved examples, P tokens, behind the special tokens that a prompt begins with."""
    head = opening_tokens(tokenizer)
    body: list[int] = []
    for example in examples:
        body += without_opening(head, example.prompt_token_ids)
        body += example.completion_token_ids
        if len(body) >= num_virtual_tokens:
            break
    return _filled(head, tuple(body), num_virtual_tokens)


def _filled(head: tuple[int, ...], body: tuple[int, ...], count: int) -> tuple[int, ...]:
    room = count - len(head)
    if room <= 0:
        return head[:count]
    repeats = -(-room // len(body))
    return head + (body * repeats)[-room:]


@torch.no_grad()
def from_tokens(base: FrozenBase, token_ids: Sequence[int]) -> InitialPrefix:
    """Exactly what these tokens leave in the cache."""
    ids = torch.tensor(token_ids)
    return InitialPrefix(base.key_values(ids), base.embeddings(ids), tuple(token_ids))


def from_vocabulary(base: FrozenBase, num_virtual_tokens: int, seed: int) -> InitialPrefix:
    """Tokens drawn evenly from the vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    size = base.spec.vocab_size
    ids: list[int] = torch.randint(size, (num_virtual_tokens,), generator=generator).tolist()
    return from_tokens(base, ids)


def num_virtual_tokens(tokenizer: Tokenizer, config: TrainConfig) -> int:
    """P: what `config` asks for, or as many as the initial text has, or 16. Raises `BadSetting`."""
    if config.num_virtual_tokens is not None:
        return config.num_virtual_tokens
    if config.init_text is not None:
        return len(text_token_ids(tokenizer, config.init_text, None))
    return DEFAULT_NUM_VIRTUAL_TOKENS


def initial_prefix(
    base: FrozenBase, config: TrainConfig, examples: Sequence[EncodedExample]
) -> InitialPrefix:
    """What `config` says that the prefix begins as; `examples` are the training examples."""
    count = num_virtual_tokens(base.tokenizer, config)
    match config.init_kind:
        case "text":
            assert config.init_text is not None, "the configuration has checked this"
            return from_tokens(base, text_token_ids(base.tokenizer, config.init_text, count))
        case "examples":
            return from_tokens(base, example_token_ids(base.tokenizer, examples, count))
        case "vocabulary":
            return from_vocabulary(base, count, config.seed)
        case "random":
            return from_noise(base, count, config.seed)


def from_noise(base: FrozenBase, num_virtual_tokens: int, seed: int) -> InitialPrefix:
    """Normal numbers around 0, as large as the base's own keys, values and embeddings are on random tokens."""
    like = from_vocabulary(base, _SIZE_SAMPLE, seed)
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        shape = (num_virtual_tokens, *tensor.shape[1:])
        size = tensor.float().square().mean().sqrt()
        return torch.randn(shape, generator=generator).to(tensor.device) * size

    tensors = [drawn(tensor) for tensor in like.key_values.tensors]
    return InitialPrefix(KeyValues.of(tensors), drawn(like.embeddings), None)
