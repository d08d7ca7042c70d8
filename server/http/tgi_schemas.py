"""The bodies of Text Generation Inference (TGI) and LoRAX, and what they mean in our own fields. Pure.

`adapter_id` names the task. As on all routes there is no silent fallback to the base model, which has an id of its own.
"""

from __future__ import annotations

from typing import Any, Final

from pydantic import Field

from server.http.schemas import Body, Int, SamplingFields
from server.http.targets import Defaults

TGI_DEFAULTS: Final = Defaults(max_tokens=100, temperature=0.0)
"""TGI's own: it is greedy unless sampling is asked for."""


class TgiParameters(Body):
    """`parameters`, by the names of TGI and LoRAX."""

    adapter_id: str | None = Field(
        default=None, description="A task, task@v3, or the base model's id"
    )
    max_new_tokens: Int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: Int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: Int | None = None
    stop: list[str] | None = None
    ignore_eos_token: bool | None = None
    truncate: Int | None = Field(default=None, gt=0)
    return_full_text: bool | None = None
    details: bool | None = None
    decoder_input_details: bool | None = None
    top_n_tokens: Int | None = None
    watermark: bool | None = Field(default=None, description="Without effect")

    def sampling_fields(self) -> SamplingFields:
        """The same in the names of our own routes."""
        return SamplingFields(
            max_tokens=self.max_new_tokens,
            temperature=self._temperature(),
            top_k=self.top_k,
            top_p=self.top_p,
            repetition_penalty=self.repetition_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=self.seed,
            stop=self.stop,
            ignore_eos=self.ignore_eos_token,
        )

    def _temperature(self) -> float | None:
        """A filter or a temperature asks for sampling too; a plain `do_sample: false` for none. None: the defaults."""
        if self.temperature is not None:
            return self.temperature
        if self.do_sample or self.top_k or (self.top_p or 1.0) < 1.0:
            return 1.0
        return None if self.do_sample is None else 0.0


class TgiRequest(Body):
    """One prompt."""

    inputs: str
    parameters: TgiParameters | None = None
    stream: bool | None = None


# Parameter -> the values that ask for nothing.
NOT_IN_TGI: Final[dict[str, tuple[Any, ...]]] = {
    "adapter_parameters": (),
    "apply_chat_template": (False,),
    "best_of": (1,),
    "grammar": (),
    "merged_adapters": (),
    "response_format": (),
    "return_k_alternatives": (),
    "schema": (),
    "typical_p": (1, 1.0),
}
