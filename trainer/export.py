"""A trained prefix as the artifact that servers take: tensors, training record, fingerprints, probe.

Called by `session` for each best prefix, on the main thread. The result is proved against the base by the store's
own rules before anything is written, so a run folder never holds a `prefix.safetensors` that a server would refuse
for its form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from pydantic import JsonValue

from prefix_store.artifact import TORCH_DTYPES, encode
from prefix_store.spec import (
    GenerationDefaults,
    PrefixManifest,
    Probe,
    digest_of,
)
from prefix_store.validation import Limits, accept
from trainer.base import FrozenBase
from trainer.batches import make_batch
from trainer.config import TrainConfig
from trainer.encoding import EncodedExample
from trainer.loss import widened
from trainer.prefix_cache import KeyValues

_ANY_LENGTH: Final = Limits(max_num_virtual_tokens=1_000_000)
_PROBE_TOKENS: Final = 64  # of a probe's prompt, at most: the format's limit
_PROBE_TOP: Final = 8
_SPARE_TOKENS: Final = (
    8  # beyond the longest completion trained on, so that going on after it shows
)


@dataclass(frozen=True, slots=True)
class Export:
    """What does not change during a run. `probe_prompt`: tokens that the artifact's probe asks with."""

    base: FrozenBase
    config: TrainConfig
    max_tokens: int
    probe_prompt: tuple[int, ...]

    @classmethod
    def of(
        cls,
        base: FrozenBase,
        config: TrainConfig,
        training: Sequence[EncodedExample],
        held_out: Sequence[EncodedExample],
    ) -> Export:
        """For a run on these examples."""
        longest = max(len(example.completion_token_ids) for example in training)
        return cls(
            base, config, longest + _SPARE_TOKENS, held_out[0].prompt_token_ids[:_PROBE_TOKENS]
        )

    def artifact(self, prefix: KeyValues, training: dict[str, JsonValue]) -> bytes:
        """The bytes of `prefix.safetensors`. Raises `PrefixRejected` for values that no server computes with."""
        stored = KeyValues.of(
            [tensor.detach().to(self._dtype()).cpu() for tensor in prefix.tensors]
        )
        manifest = self._manifest(stored, training)
        data = encode(manifest, stored.keys, stored.values)
        accept(bytearray(data), digest_of(data), self.base.spec, _ANY_LENGTH)
        return data

    def _manifest(self, stored: KeyValues, training: dict[str, JsonValue]) -> PrefixManifest:
        spec = self.base.spec
        return PrefixManifest(
            num_virtual_tokens=stored.num_virtual_tokens,
            k_space="post_rope" if spec.position_scheme == "rope" else "none",
            model_type=spec.model_type,
            rope_theta=spec.rope_theta,
            base_model=spec.as_ref().model_copy(update={"revision": self.config.revision}),
            generation=GenerationDefaults(
                max_tokens=self.max_tokens, temperature=0.0, stop=self.config.stop
            ),
            probe=self._probe(stored),
            description=self.config.description,
            training=training,
        )

    @torch.no_grad()
    def _probe(self, stored: KeyValues) -> Probe:
        """What the base says behind the stored prefix: a server that says otherwise has got something wrong."""
        asked = EncodedExample(self.probe_prompt, (0,), "")
        on_device = KeyValues.of([tensor.to(self.base.device) for tensor in stored.tensors])
        logits = widened(self.base.logits(on_device, make_batch([asked], self.base.device)))[0]
        top = logits.log_softmax(-1).topk(min(_PROBE_TOP, len(logits)))
        return Probe(
            input_ids=self.probe_prompt,
            top_ids=tuple(top.indices.tolist()),
            top_logprobs=tuple(min(0.0, value) for value in top.values.tolist()),
        )

    def _dtype(self) -> torch.dtype:
        chosen = self.config.artifact_dtype
        return self.base.dtype if chosen == "auto" else TORCH_DTYPES[chosen]
