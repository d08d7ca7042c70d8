"""Self-study: the base asks itself about parts of the document and answers with the part before its eyes.

Runs on the main thread with the engine in process; called by `distillation`. In rounds: the messages of a round, then
their answers, then the file. Each conversation has a seed of its own, from the run's and its number.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from server.types import SamplingParams
from trainer.distill.config import DistillConfig
from trainer.distill.conversations import (
    Conversation,
    append_conversations,
    read_conversations,
)
from trainer.distill.document import Chunk, Document, draw_chunks
from trainer.distill.framing import Framing
from trainer.distill.plan import Plan
from trainer.distill.seed_prompts import SeedPrompts
from trainer.engine_in_process import EngineInProcess, Progress, Prompt

NO_MESSAGE: Final = "no message came"
TOO_LONG: Final = "longer than the model's positions"

_SEED_STEP: Final = 1_000_003  # a prime, so that neighbouring runs share no conversation


@dataclass(frozen=True, slots=True)
class SelfStudy:
    """What conversations are made of. `chunks`: one for each conversation."""

    engine: EngineInProcess
    config: DistillConfig
    framing: Framing
    form: SeedPrompts
    plan: Plan
    chunks: Sequence[Chunk]

    @classmethod
    def of(
        cls,
        engine: EngineInProcess,
        config: DistillConfig,
        document: Document,
        framing: Framing,
        form: SeedPrompts,
        plan: Plan,
    ) -> SelfStudy:
        """Of this document."""
        chunks = draw_chunks(
            document, config.num_conversations, plan.min_chunk, plan.max_chunk, config.seed
        )
        return cls(engine, config, framing, form, plan, chunks)

    def converse(
        self, path: Path, on_progress: Progress, should_stop: Callable[[], bool]
    ) -> list[Conversation] | None:
        """All conversations: those that `path` holds, and the others, which it then holds too.

        None when it was asked to stop. Raises `RunFolderFailed`, and what the engine raises.
        """
        total, size = len(self.chunks), 2 * self.config.max_num_seqs
        found = read_conversations(path, total, size)
        on_progress(len(found), total)
        while len(found) < total:
            if should_stop():
                return None
            numbers = range(len(found), min(len(found) + size, total))
            new = self._round(numbers)
            append_conversations(path, new)
            found += new
            on_progress(len(found), total)
        return found

    def _round(self, numbers: Sequence[int]) -> list[Conversation]:
        messages = self._messages(numbers)
        prompts = [
            self.framing.teacher(self.chunks[number].text, message)
            for number, message in zip(numbers, messages, strict=True)
        ]
        problems = [
            NO_MESSAGE if not message else "" if self.plan.fits(len(prompt)) else TOO_LONG
            for message, prompt in zip(messages, prompts, strict=True)
        ]
        asked = [
            Prompt(prompt, seed=self._seed(number, 1))
            for number, prompt, problem in zip(numbers, prompts, problems, strict=True)
            if not problem
        ]
        answers = iter(self.engine.generate(asked, self.answering(self.config.answer_temperature)))
        made = []
        for number, message, prompt, problem in zip(
            numbers, messages, prompts, problems, strict=True
        ):
            answer = None if problem else next(answers)
            chunk = self.chunks[number]
            made.append(
                Conversation(
                    number=number,
                    kind=self._seed_prompt(number)[0],
                    chunk=(chunk.start, chunk.start + chunk.num_pieces),
                    message=message,
                    answer=answer.text if answer else "",
                    prompt_token_ids=() if problem else self.framing.served(message),
                    teacher_token_ids=() if problem else prompt,
                    answer_token_ids=answer.token_ids if answer else (),
                    left_out=problem,
                )
            )
        return made

    def _messages(self, numbers: Sequence[int]) -> list[str]:
        seeds = [self._seed_prompt(number)[1] for number in numbers]
        prompts = [
            Prompt(
                self.framing.eliciting(self.chunks[number].text, seed), seed=self._seed(number, 0)
            )
            for number, seed in zip(numbers, seeds, strict=True)
        ]
        sampling = SamplingParams(
            max_tokens=self.plan.max_message,
            temperature=self.config.message_temperature,
            stop=self.framing.message_stop,
        )
        came = self.engine.generate(prompts, sampling)
        return [
            self.framing.message(seed, completion.text)
            for seed, completion in zip(seeds, came, strict=True)
        ]

    def answering(self, temperature: float) -> SamplingParams:
        """How answers are decoded: with the stop strings that the prefix will be served with."""
        return SamplingParams(
            max_tokens=self.plan.max_answer, temperature=temperature, stop=self.config.stop
        )

    def _seed_prompt(self, number: int) -> tuple[str, str]:
        """Kind and text, all of them in turn."""
        flat = self.form.flat
        return flat[number % len(flat)]

    def _seed(self, number: int, stage: int) -> int:
        """Of one generation; the same in a resumed run."""
        return (self.config.seed * _SEED_STEP + 2 * number + stage) % 2**63
