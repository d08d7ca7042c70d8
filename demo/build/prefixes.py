"""Prefix-Tuning of the frozen base: one small set of keys and values per task.

Called by ``python -m demo.build prefixes``. The keys and values are those of an initial text plus
``W2 tanh(W1 e)``, with W2 zero at the start: step 0 equals the text. After training the MLP is
folded away and only its output is kept.

Shapes: L layers, B rows, P prefix tokens, H key/value heads, D head size, T tokens.
"""

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import nn
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedTokenizerBase

from demo.build.base import IGNORED
from demo.build.decoding import prefix_cache
from demo.build.tasks import Example, Task, examples
from demo.build.tokenizer import encode
from demo.build.vocabulary import seeded

log = logging.getLogger(__name__)

NUM_VIRTUAL_TOKENS: Final = 16
EMBEDDING: Final = 64
HIDDEN: Final = 128
LEARNING_RATE: Final = 5e-3
WARMUP_FRACTION: Final = 0.06
BATCH: Final = 16
BUCKET_BATCHES: Final = 8
CLIP_NORM: Final = 1.0
TRAIN_SEED: Final = 41
VALIDATION_SEED: Final = 42
NUM_TRAIN: Final = 2_000
NUM_VALIDATION: Final = 100
LOG_STEPS: Final = 100

Item = tuple[list[int], list[int]]


class PrefixEncoder(nn.Module):
    """``[L, 2, P, H, D]`` from an initial text and a small MLP."""

    text_kv: torch.Tensor

    def __init__(self, text_kv: torch.Tensor) -> None:
        super().__init__()
        layers, two, length, heads, size = text_kv.shape
        self.register_buffer("text_kv", text_kv)
        self.embedding = nn.Parameter(torch.randn(length, EMBEDDING))
        self.inner = nn.Linear(EMBEDDING, HIDDEN)
        self.outer = nn.Linear(HIDDEN, layers * two * heads * size)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self) -> torch.Tensor:
        layers, two, length, heads, size = self.text_kv.shape
        delta = self.outer(torch.tanh(self.inner(self.embedding)))  # [P, L * 2 * H * D]
        shaped = delta.view(length, layers, two, heads, size).permute(1, 2, 0, 3, 4)
        prefix: torch.Tensor = self.text_kv + shaped
        return prefix


@torch.no_grad()
def text_key_values(model: LlamaForCausalLM, ids: list[int]) -> torch.Tensor:
    """``[L, 2, P, H, D]``: what the base's cache holds after reading ``ids``."""
    cache = DynamicCache()
    model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True)
    pairs = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]
    return torch.stack(pairs).transpose(2, 3).contiguous()


def init_ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The text's last P tokens, the text being repeated where it is shorter."""
    ids = encode(tokenizer, text)
    repeats = math.ceil(NUM_VIRTUAL_TOKENS / len(ids))
    return (ids * repeats)[-NUM_VIRTUAL_TOKENS:]


def items(tokenizer: PreTrainedTokenizerBase, data: Sequence[Example], eos: int) -> list[Item]:
    """(prompt ids, answer ids with EOS) of every example."""
    return [
        (encode(tokenizer, item.prompt), [*encode(tokenizer, item.answer), eos]) for item in data
    ]


def collate(batch: Sequence[Item], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels ``[B, T]``, padded on the right; only the answers carry a label."""
    width = max(len(prompt) + len(answer) for prompt, answer in batch)
    ids = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    for row, (prompt, answer) in enumerate(batch):
        ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    return ids, labels


def bucketed(data: list[Item], num_batches: int, seed: int) -> list[list[Item]]:
    """Batches of similar lengths, in random order, over as many epochs as needed."""
    rng = seeded(seed)
    batches: list[list[Item]] = []
    while len(batches) < num_batches:
        pool = rng.sample(data, min(len(data), BATCH * BUCKET_BATCHES))
        pool.sort(key=lambda item: len(item[0]) + len(item[1]))
        fresh = [pool[start : start + BATCH] for start in range(0, len(pool), BATCH)]
        rng.shuffle(fresh)
        batches += fresh
    return batches[:num_batches]


def answer_loss(
    model: LlamaForCausalLM, prefix: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Mean loss of the labelled tokens. Padding stands on the right, so causality hides it."""
    cache = prefix_cache(prefix, ids.shape[0])
    output = model(input_ids=ids, labels=labels, past_key_values=cache, use_cache=True)
    loss: torch.Tensor = output.loss
    return loss


def learning_rate(step: int, num_steps: int, peak: float) -> float:
    warmup = max(1, round(WARMUP_FRACTION * num_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


@dataclass(frozen=True, slots=True)
class TrainedPrefix:
    """The folded prefix ``[L, 2, P, H, D]`` and what training it was like."""

    prefix: torch.Tensor
    validation_loss: float
    first_token_probability: float
    seconds: float


def train_prefix(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, task: Task, seed: int = 0
) -> TrainedPrefix:
    """Train one task's prefix; the base stays as it is."""
    torch.manual_seed(seed)
    started = time.monotonic()
    eos = model.generation_config.eos_token_id
    encoder = PrefixEncoder(text_key_values(model, init_ids(tokenizer, task.init_text)))
    optimizer = torch.optim.AdamW(
        encoder.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0
    )
    data = items(tokenizer, examples(task, TRAIN_SEED, NUM_TRAIN, "train"), eos)
    recent: list[float] = []
    for step, batch in enumerate(bucketed(data, task.steps, TRAIN_SEED + seed)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, task.steps, LEARNING_RATE)
        loss = answer_loss(model, encoder(), *collate(batch, eos))
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(encoder.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        recent.append(float(loss.detach()))
        if (step + 1) % LOG_STEPS == 0:
            log.info("%s step %d  loss %.4f", task.name, step + 1, sum(recent) / len(recent))
            recent = []
    prefix = encoder().detach()
    held = items(tokenizer, examples(task, VALIDATION_SEED, NUM_VALIDATION, "train"), eos)
    loss_value, first = validate(model, prefix, held, eos)
    return TrainedPrefix(prefix, loss_value, first, time.monotonic() - started)


@torch.inference_mode()
def validate(
    model: LlamaForCausalLM, prefix: torch.Tensor, held: list[Item], eos: int
) -> tuple[float, float]:
    """Teacher-forced loss per token, and the mean probability of the answers' first tokens."""
    losses, firsts = [], []
    for start in range(0, len(held), BATCH):
        batch = held[start : start + BATCH]
        ids, labels = collate(batch, eos)
        losses.append(float(answer_loss(model, prefix, ids, labels)))
        cache = prefix_cache(prefix, len(batch))
        chances = model(input_ids=ids, past_key_values=cache, use_cache=True).logits.softmax(-1)
        for row, (prompt, answer) in enumerate(batch):
            firsts.append(float(chances[row, len(prompt) - 1, answer[0]]))
    return sum(losses) / len(losses), sum(firsts) / len(firsts)
