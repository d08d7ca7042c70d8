"""Adapters made by PEFT itself, and what PEFT computes with them: the oracle of the import tests."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import peft
import torch
from torch import Tensor, nn

NUM_TOKENS: Final = 7
TASK_INDEX: Final = 2  # of the multitask adapter
_TEXT: Final = {"task_type": "CAUSAL_LM", "num_virtual_tokens": NUM_TOKENS}


def _config(kind: str) -> peft.PeftConfig:
    match kind:
        case "prefix":
            return peft.PrefixTuningConfig(**_TEXT)
        case "prefix with projection":
            return peft.PrefixTuningConfig(**_TEXT, prefix_projection=True, encoder_hidden_size=24)
        case "cartridge":
            return peft.CartridgeConfig(**_TEXT, num_frozen_tokens=1)
        case "prompt":
            return peft.PromptTuningConfig(**_TEXT)
        case "p-tuning MLP" | "p-tuning LSTM":
            return peft.PromptEncoderConfig(
                **_TEXT, encoder_reparameterization_type=kind[-4:].strip(), encoder_hidden_size=24
            )
        case "multitask":
            return peft.MultitaskPromptTuningConfig(**_TEXT, num_tasks=4, num_ranks=2)
        case "CPT":
            ids = list(range(20, 20 + NUM_TOKENS))
            return peft.CPTConfig(
                task_type="CAUSAL_LM",
                cpt_token_ids=ids,
                cpt_mask=[1] * NUM_TOKENS,
                cpt_tokens_type_mask=[1, 2, 2, 3, 3, 4, 4],
            )
    raise ValueError(kind)


PREFIX_KINDS: Final = ("prefix", "prefix with projection", "cartridge")
SOFT_KINDS: Final = ("prompt", "p-tuning MLP", "p-tuning LSTM", "CPT", "multitask")
KINDS: Final = (*PREFIX_KINDS, *SOFT_KINDS)


@dataclass(frozen=True)
class Adapter:
    """A PEFT model with random parameters, loaded back from what it saved to `directory`."""

    kind: str
    model: Any
    directory: Path

    @property
    def file(self) -> bytes:
        return (self.directory / "adapter_model.safetensors").read_bytes()

    @property
    def _task(self) -> dict[str, Tensor]:
        return {"task_ids": torch.tensor([TASK_INDEX])} if self.kind == "multitask" else {}

    @torch.no_grad()
    def logits(self, prompt: list[int]) -> Tensor:
        """PEFT's logits at each token of the prompt."""
        ids = torch.tensor([prompt])
        out = self.model(input_ids=ids, attention_mask=torch.ones_like(ids), **self._task)
        logits: Tensor = out.logits[0, -len(prompt) :]
        return logits

    @torch.no_grad()
    def generate(self, prompt: list[int], count: int) -> list[int]:
        """PEFT's greedy tokens."""
        ids = torch.tensor([prompt])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=count,
                do_sample=False,
                **self._task,
            )
        tokens: list[int] = out[0, len(prompt) :].tolist()
        return tokens


def make_adapter(kind: str, base: nn.Module, directory: Path, seed: int = 0) -> Adapter:
    """Trains nothing: every parameter of the prompt is drawn, saved, and loaded as a user would."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trained = peft.get_peft_model(copy.deepcopy(base), _config(kind))
        with torch.no_grad():
            for parameter in trained.prompt_encoder.parameters():
                parameter.normal_(0, 0.5)
        trained.save_pretrained(str(directory))
        quiet: Any = copy.deepcopy(base)
        quiet.generation_config.eos_token_id = None
        loaded = peft.PeftModel.from_pretrained(quiet, str(directory))
    loaded.eval()
    return Adapter(kind, loaded, directory)
