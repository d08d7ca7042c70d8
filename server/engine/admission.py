"""What a single request may ask for: refused at the door, before anything is queued or streamed.

Called by `AsyncEngine.submit` on the event loop. Pure.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from server.errors import ContextTooLong, EngineOverloaded, InvalidParameter
from server.types import GenerationRequest, PrefixRef


@dataclass(frozen=True, slots=True)
class EngineLimits:
    """What a single request may ask for. `max_model_len` counts prefix, prompt and output tokens.

    `position_limit`: positions that the model has. `max_num_queued`, in sequences, and `max_num_queued_tokens` bound what all
    of them together may wait for. `pool_blocks`: blocks that can be handed out in all.
    """

    max_model_len: int
    position_limit: int | None
    pool_blocks: int
    block_size: int
    vocab_size: int
    max_num_queued: int
    max_num_queued_tokens: int = 2**20

    def check_queue(
        self, request: GenerationRequest, num_waiting: int, num_waiting_tokens: int
    ) -> None:
        """Raises `EngineOverloaded` if too much is before it: sequences that wait, tokens of prompts without an answer.

        A prompt before which nothing waits is taken, whatever its length.
        """
        if num_waiting + request.sampling.n > self.max_num_queued:
            raise EngineOverloaded(
                f"{num_waiting} sequences are waiting; at most {self.max_num_queued} may (max_num_queued)"
            )
        if num_waiting_tokens + len(request.prompt_token_ids) > max(
            self.max_num_queued_tokens, len(request.prompt_token_ids)
        ):
            raise EngineOverloaded(
                f"{num_waiting_tokens} prompt tokens are waiting; with this prompt's "
                f"{len(request.prompt_token_ids)} it would be more than {self.max_num_queued_tokens} "
                "(max_num_queued_tokens)"
            )

    def room(self, prefix: PrefixRef | None, num_prompt_tokens: int) -> int:
        """The most tokens that an answer to such a prompt may have; 0 or less if there may be none."""
        virtual = prefix.num_virtual_tokens if prefix else 0
        blocks = self.pool_blocks - -(-virtual // self.block_size)
        ends = [self.max_model_len - virtual, blocks * self.block_size]
        if self.position_limit is not None:
            ends.append(self.position_limit - (prefix.first_position if prefix else 0))
        return min(ends) - num_prompt_tokens

    def check(self, request: GenerationRequest) -> None:
        """Raises `InvalidParameter` or `ContextTooLong` for a request that could never finish."""
        prompt = request.prompt_token_ids
        if not prompt:
            raise InvalidParameter("prompt: expected at least one token", param="prompt")
        check_token_ids("prompt", prompt, self.vocab_size)
        check_token_ids("stop_token_ids", request.sampling.stop_token_ids, self.vocab_size)
        bias = [token_id for token_id, _ in request.sampling.logit_bias]
        check_token_ids("logit_bias", bias, self.vocab_size)
        virtual = request.prefix.num_virtual_tokens if request.prefix else 0
        first = request.prefix.first_position if request.prefix else 0
        own = len(prompt) + request.sampling.max_tokens
        counts = f"prompt {len(prompt)} + max_tokens {request.sampling.max_tokens}"
        if virtual + own > self.max_model_len:
            raise ContextTooLong(
                f"prefix {virtual} + {counts} tokens: expected at most {self.max_model_len}",
                param="prompt",
            )
        if self.position_limit is not None and first + own > self.position_limit:
            raise ContextTooLong(
                f"{counts} tokens from position {first}: the model has {self.position_limit} positions",
                param="prompt",
            )
        needed = -(-virtual // self.block_size) - (-own // self.block_size)
        if needed > self.pool_blocks:
            raise ContextTooLong(
                f"prefix {virtual} + {counts} tokens need {needed} KV blocks; the pool has "
                f"{self.pool_blocks} (kv_cache_bytes)",
                param="prompt",
            )


def check_token_ids(param: str, token_ids: Iterable[int], vocab_size: int) -> None:
    """Raises `InvalidParameter` for the first that the model has no embedding of; `param` names the field."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidParameter(
                f"{param}: token id {token_id}, expected 0 to {vocab_size - 1}", param=param
            )
