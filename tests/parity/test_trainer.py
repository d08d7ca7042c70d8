"""What is trained is what is served, and what PEFT would have trained from the same beginning."""

from __future__ import annotations

import copy
import random
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from prefix_store.artifact import decode, digest_of
from tests.real_app import real_app
from tests.tiny_models import VOCAB
from tests.trainer.runs import (
    ARCHITECTURES,
    Recorder,
    random_examples,
    random_prefix,
    small_run,
    tiny_base,
)
from trainer.base import FrozenBase, load_base
from trainer.batches import DataOrder, make_batch
from trainer.checkpoint import Origin
from trainer.config import TrainConfig
from trainer.encoding import EncodedExample
from trainer.export import Export
from trainer.initial import from_tokens
from trainer.loop import ADAM_BETAS, Hooks, Loop
from trainer.prefix_cache import KeyValues
from trainer.prefix_encoder import DirectEncoder, MlpEncoder, PrefixEncoder, build_encoder
from trainer.run_folder import RunFolder
from trainer.schedule import Schedule
from trainer.session import train

PROMPT = [random.Random(3).randrange(3, VOCAB) for _ in range(11)]
NUM_TOKENS = 6
NUM_STEPS = 30
RATE = 0.02


def logits_behind(base: FrozenBase, prefix: KeyValues | None, tokens: list[int]) -> Tensor:
    """Logits [n, V] at each of the tokens, by the training's forward pass."""
    asked = EncodedExample((tokens[0],), (*tokens[1:], 0), "")
    with torch.no_grad():
        return base.logits(prefix, make_batch([asked], base.device))


def prefix_of(path: Path) -> KeyValues:
    data = path.read_bytes()
    stored = decode(data, digest_of(data))
    return KeyValues(stored.keys, stored.values)


@pytest.mark.parametrize("encoder", ["direct", "mlp", "soft"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_at_step_0_a_text_as_prefix_gives_the_logits_of_the_text_in_the_prompt(
    architecture: str, encoder: str
) -> None:
    base = tiny_base(architecture)
    text = "many tasks, one model. the quick fox"
    config = TrainConfig(data="d.jsonl", output="run", encoder=encoder, init_text=text)
    ids = base.tokenizer.encode(text)
    begun = build_encoder(base, config, from_tokens(base, ids))

    with torch.no_grad():
        behind_prefix = logits_behind(base, begun(), PROMPT)
    behind_text = logits_behind(base, None, [*ids, *PROMPT])[len(ids) :]

    assert float((behind_prefix - behind_text).abs().max()) <= 1e-5


@pytest.mark.parametrize("encoder", ["direct", "mlp", "soft"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_trained_artifact_is_served_with_the_logits_and_tokens_of_the_training(
    architecture: str, encoder: str, tmp_path: Path
) -> None:
    config = small_run(tmp_path, architecture=architecture, encoder=encoder)
    artifact = train(config).prefix
    base = load_base(config.model, device="cpu")
    prefix = prefix_of(artifact)
    tokens = list(PROMPT)
    for _ in range(12):
        tokens.append(int(logits_behind(base, prefix, tokens)[-1].argmax()))

    with real_app(tmp_path / "model", tmp_path / "store") as app:
        answer = app.put("task", artifact.read_bytes())
        served = app.logits("task", PROMPT)
        served_tokens = app.tokens("task", PROMPT, 12)

    assert answer.status_code == 201, answer.text
    assert "warnings" not in answer.json() or answer.json()["warnings"] == []
    assert float((served - logits_behind(base, prefix, PROMPT)).abs().max()) <= 1e-4
    assert served_tokens == tokens[len(PROMPT) :]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_folded_mlp_gives_the_logits_of_the_mlp(architecture: str) -> None:
    base = tiny_base(architecture)
    encoder = MlpEncoder(
        random_prefix(base, NUM_TOKENS),
        1,
        0.5,
        torch.Generator(),
        embedding_size=8,
        hidden_size=9,
        seed=0,
    ).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    config = TrainConfig(data="d.jsonl", output="run")

    with torch.no_grad():
        unfolded = logits_behind(base, encoder(), PROMPT)
        data = Export(base, config, 8, tuple(PROMPT)).artifact(encoder(), {})

    folded = decode(data, digest_of(data))
    behind_folded = logits_behind(base, KeyValues(folded.keys, folded.values), PROMPT)
    assert float((behind_folded - unfolded).abs().max()) <= 1e-6
    assert float((logits_behind(base, None, PROMPT) - unfolded).abs().max()) > 0.1


# ---- PEFT ------------------------------------------------------------------------------------------


def loop_of(
    base: FrozenBase, encoder: PrefixEncoder, directory: Path, **settings: Any
) -> tuple[Loop, Recorder]:
    """A run of an encoder that is there already."""
    recorder = Recorder()
    config = TrainConfig(
        data="data.jsonl",
        output=directory / "run",
        batch_size=4,
        num_steps=NUM_STEPS,
        learning_rate=RATE,
        **settings,
    )
    folder = RunFolder.create(config.output, {})
    hooks = Hooks(observers=(recorder,), keep=lambda *_: None)
    examples = random_examples(20)
    loop = Loop(base, encoder, config, examples, examples[:4], folder, Origin("", "", None), hooks)
    return loop, recorder


def peft_losses(module: nn.Module, examples: list[EncodedExample]) -> list[float]:
    """What PEFT's own model gives, trained by a plain loop: right padding, transformers' own loss."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, betas=ADAM_BETAS, weight_decay=0.0)
    schedule = Schedule(RATE, NUM_STEPS, 2, "cosine")  # 6 % of 30 steps, rounded up
    order = DataOrder([e.num_tokens for e in examples], 4, seed=0)
    losses = []
    for step in range(NUM_STEPS):
        optimizer.param_groups[0]["lr"] = schedule.learning_rate(step)
        batch = [examples[index] for index in order.indices(step)]
        width = max(e.num_tokens for e in batch)
        ids = torch.zeros(len(batch), width, dtype=torch.int64)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, example in enumerate(batch):
            begin, end = len(example.prompt_token_ids), example.num_tokens
            tokens = (*example.prompt_token_ids, *example.completion_token_ids)
            ids[row, :end] = torch.tensor(tokens)
            labels[row, begin:end] = ids[row, begin:end]
            mask[row, :end] = 1
        loss = module(input_ids=ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def peft_model(base: FrozenBase, hidden_size: int | None = None) -> Any:
    """Prefix tuning on a copy of the base; with an MLP of that hidden size, if one is given."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=NUM_TOKENS,
        prefix_projection=hidden_size is not None,
        encoder_hidden_size=hidden_size,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(copy.deepcopy(base.module), config)
    model.eval()
    return model


def interleaved(prefix: KeyValues) -> Tensor:
    """[P, 2 L H D] as PEFT has it: key and value of each layer in turn."""
    pairs = zip(prefix.keys, prefix.values, strict=True)
    return torch.cat([tensor.flatten(1) for pair in pairs for tensor in pair], dim=1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_follows_the_same_loss_curve_from_the_same_prefix(
    architecture: str, tmp_path: Path
) -> None:
    base = tiny_base(architecture)
    initial = random_prefix(base, NUM_TOKENS)
    model = peft_model(base)
    with torch.no_grad():
        model.prompt_encoder["default"].embedding.weight.copy_(interleaved(initial))
    encoder = DirectEncoder(initial, 0, 0.0, torch.Generator(), in_units=False)
    loop, recorder = loop_of(base, encoder, tmp_path)

    loop.run()

    expected = peft_losses(model, list(loop.training))
    assert recorder.losses() == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.3, "a curve that goes nowhere proves nothing"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_peft_follows_the_same_loss_curve_from_the_same_mlp(
    architecture: str, tmp_path: Path
) -> None:
    base = tiny_base(architecture)
    initial = random_prefix(base, NUM_TOKENS)
    model = peft_model(base, hidden_size=12)
    theirs = model.prompt_encoder["default"]
    encoder = MlpEncoder(
        initial,
        0,
        0.0,
        torch.Generator(),
        embedding_size=theirs.embedding.embedding_dim,
        hidden_size=12,
        seed=0,
        from_scratch=True,
    )
    columns = columns_in_our_order(initial)
    with torch.no_grad():
        encoder.embedding.copy_(theirs.embedding.weight)
        encoder.inner.load_state_dict(theirs.transform[0].state_dict())
        encoder.outer.weight.copy_(theirs.transform[2].weight[columns])
        encoder.outer.bias.copy_(theirs.transform[2].bias[columns])
    loop, recorder = loop_of(base, encoder, tmp_path)

    loop.run()

    expected = peft_losses(model, list(loop.training))
    assert recorder.losses() == pytest.approx(expected, abs=1e-4)
    assert expected[-1] < expected[0] - 0.3, "a curve that goes nowhere proves nothing"


def columns_in_our_order(prefix: KeyValues) -> Tensor:
    """Where PEFT has what we have: all keys, then all values."""
    count = interleaved(prefix).shape[1]
    places = torch.arange(count).view(len(prefix.keys), 2, -1)
    return torch.cat([places[:, 0].flatten(), places[:, 1].flatten()])
