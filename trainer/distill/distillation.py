"""One distillation from its settings to its folder: `distill` begins one, `resume` goes on with one.

Document, self-study, teacher, training (the loop of `prefixd train`, with another loss), comparison; what each stage made is in
the run folder, and a run that goes on does not make it again. Main thread; called by `cli_distill` and by programs.

    self_study/plan.json             what the conversations were made with
    self_study/conversations.jsonl   the conversations, with their tokens
    teacher/*.safetensors            the teacher's logits
    comparison.json                  prefix, document and no document
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from trainer import session
from trainer.base import FrozenBase, load_base
from trainer.distill.comparison import Setup, compare
from trainer.distill.comparison_report import COMPARISON, Comparison
from trainer.distill.config import DistillConfig
from trainer.distill.conversations import Conversation
from trainer.distill.document import Document, read_document
from trainer.distill.framing import Framing, framing_for, has_chat_template
from trainer.distill.objective import DistillationLoss
from trainer.distill.plan import Plan, make_plan
from trainer.distill.seed_prompts import SeedPrompts, load_seed_prompts
from trainer.distill.self_study import SelfStudy
from trainer.distill.studied_example import StudiedExample, studied_examples
from trainer.distill.teacher import BYTES_A_LOGIT, teacher_of
from trainer.encoding import Notice
from trainer.engine_in_process import EngineInProcess
from trainer.errors import CannotResume, RunExists, RunFolderFailed
from trainer.initial import InitialPrefix, from_tokens
from trainer.run_folder import RunFolder
from trainer.session import Attachments, Material, TrainResult

INTERRUPTED: Final = "interrupted"
_STUDY: Final = "self_study"
_PLAN: Final = "plan.json"
_CONVERSATIONS: Final = "conversations.jsonl"
_TEACHER: Final = "teacher"
_NOTHING_ADDED: Final = Attachments()

OnStage = Callable[[str, int, int], None]
"""Told which stage is under way, how much of it is done, and of how much."""


@dataclass(frozen=True, slots=True)
class DistillResult:
    """`training`: None if it was interrupted before. `comparison`: None if it was interrupted at all."""

    folder: Path
    training: TrainResult | None
    comparison: Comparison | None


@dataclass(frozen=True, slots=True)
class _Prepared:
    """All that is read before anything is written."""

    config: DistillConfig
    base: FrozenBase
    document: Document
    form: SeedPrompts
    framing: Framing
    plan: Plan

    def record(self) -> dict[str, Any]:
        """What the conversations depend on; a resumed run must find the same."""
        plan, config = self.plan, self.config
        return {
            "document": self.document.digest,
            "base": self.base.spec.fingerprint,
            "seed_prompts": self.form.model_dump(mode="json"),
            "document_tokens": self.document.num_tokens,
            "num_virtual_tokens": plan.num_virtual_tokens,
            "chunk_tokens": [plan.min_chunk, plan.max_chunk],
            "max_message_tokens": plan.max_message,
            "max_answer_tokens": plan.max_answer,
            "teacher_bytes_at_most": config.num_conversations
            * plan.max_answer
            * config.top_k
            * BYTES_A_LOGIT,
        }


def distill(
    config: DistillConfig,
    attachments: Attachments = _NOTHING_ADDED,
    on_stage: OnStage = lambda *_: None,
) -> DistillResult:
    """A new run. Raises `TrainerError`, `ModelRefused` or `ConfigError`; nothing is written before all is read."""
    config = _absolute(config)
    if (config.output / _STUDY / _PLAN).exists():
        raise RunExists(
            f"{config.output} holds a run: choose another --output, or go on with it: "
            f"prefixd distill --resume {config.output}"
        )
    RunFolder(config.output).require_free()  # before a base is loaded for minutes
    prepared = _prepare(config)
    folder = RunFolder.create(config.output, config.model_dump(mode="json"))
    try:
        (folder.path / _STUDY).mkdir()
    except OSError as error:
        raise RunFolderFailed(f"{folder.path / _STUDY}: {error.strerror}") from error
    text = json.dumps(prepared.record(), indent=2, ensure_ascii=False) + "\n"
    with folder.in_use():
        folder.write(folder.path / _STUDY / _PLAN, text.encode())
        return _run(prepared, folder, attachments, on_stage)


def resume(
    path: Path,
    attachments: Attachments = _NOTHING_ADDED,
    on_stage: OnStage = lambda *_: None,
) -> DistillResult:
    """Goes on with the run in `path` from where it is. Raises `CannotResume` if what it was begun with changed."""
    folder = RunFolder(path)
    try:
        before: dict[str, Any] = json.loads((path / _STUDY / _PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise CannotResume(f"{path} holds no distillation to go on with") from None
    known = DistillConfig(**folder.read_config())
    config = _absolute(known.model_copy(update={"output": path}))
    prepared = _prepare(config)
    now = prepared.record()
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise CannotResume(f"since the run began, {', '.join(changed)} changed; begin a new run")
    with folder.in_use():
        folder.mend_log()
        return _run(prepared, folder, attachments, on_stage)


def _absolute(config: DistillConfig) -> DistillConfig:
    """Paths that mean the same from wherever the run is resumed; the data is what the study will write."""
    given = session.absolute(config)
    assert isinstance(given, DistillConfig), "a copy is of the same class"
    update: dict[str, Any] = {
        "document": config.document.absolute(),
        "data": given.output / _STUDY / _CONVERSATIONS,
    }
    if config.seed_prompts is not None:
        update["seed_prompts"] = config.seed_prompts.absolute()
    return given.model_copy(update=update)


def _prepare(config: DistillConfig) -> _Prepared:
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    base = load_base(
        config.model, revision=config.revision, dtype=config.dtype, device=config.device
    )

    def count(text: str) -> int:
        return len(base.tokenizer.encode(text, special_tokens=False))

    document = read_document(config.document, count, config.min_chunk_tokens)
    form = load_seed_prompts(config.seed_prompts, chat=has_chat_template(base.tokenizer))
    framing = framing_for(base.tokenizer, form)
    plan = make_plan(config, document, framing, form, base.spec.position_limit)
    resolved = config.model_copy(update={"num_virtual_tokens": plan.num_virtual_tokens})
    return _Prepared(resolved, base, document, form, framing, plan)


def _run(
    prepared: _Prepared, folder: RunFolder, attachments: Attachments, on_stage: OnStage
) -> DistillResult:
    config, base = prepared.config, prepared.base
    engine = EngineInProcess(
        base.model, base.tokenizer, base=base.spec, max_num_seqs=config.max_num_seqs
    )
    study = SelfStudy.of(
        engine, config, prepared.document, prepared.framing, prepared.form, prepared.plan
    )
    stop = attachments.should_stop
    conversations = study.converse(config.data, _stage(on_stage, "conversations"), stop)
    if conversations is None:
        return DistillResult(folder.path, None, None)
    teacher = teacher_of(
        base,
        conversations,
        folder.path / _TEACHER,
        top_k=config.top_k,
        rows=config.micro_batch_size or config.batch_size,
        on_progress=_stage(on_stage, "teacher"),
        should_stop=stop,
    )
    if teacher is None:
        return DistillResult(folder.path, None, None)
    if config.activation_checkpointing:
        base.recompute_activations()
    objective = DistillationLoss(teacher)
    material = _material(prepared, conversations)
    result = session.run(
        config,
        material,
        folder,
        folder.checkpoint if folder.checkpoint.is_file() else None,
        replace(attachments, objective=objective),
    )
    if result.reason == INTERRUPTED:
        return DistillResult(folder.path, result, None)
    setup = _setup(prepared, study, material, conversations, objective, result.prefix.read_bytes())
    comparison = compare(setup, _stage(on_stage, "comparison"))
    folder.write(folder.path / COMPARISON, (comparison.as_json() + "\n").encode())
    return DistillResult(folder.path, result, comparison)


def _stage(on_stage: OnStage, name: str) -> Callable[[int, int], None]:
    return lambda done, total: on_stage(name, done, total)


def _material(prepared: _Prepared, conversations: list[Conversation]) -> Material:
    config = prepared.config
    training, held_out = studied_examples(
        conversations, config.held_out_fraction, config.split_seed
    )
    return Material(
        prepared.base,
        training,
        held_out,
        _notices(prepared, conversations),
        initial=_initial(prepared),
        record={
            "init": "document",
            "objective": f"distillation of the {config.top_k} most probable tokens and the rest",
            "document": {
                "digest": prepared.document.digest,
                "num_tokens": prepared.document.num_tokens,
            },
            "self_study": {
                "num_conversations": len(conversations),
                "chunk_tokens": [prepared.plan.min_chunk, prepared.plan.max_chunk],
            },
        },
    )


def _initial(prepared: _Prepared) -> InitialPrefix:
    """The keys and values of the document's first P tokens, as they stand in the teacher's prompt."""
    tokens = prepared.framing.document(prepared.document.text)
    return from_tokens(prepared.base, tokens[: prepared.plan.num_virtual_tokens])


def _notices(prepared: _Prepared, conversations: list[Conversation]) -> list[Notice]:
    plan, total = prepared.plan, prepared.document.num_tokens
    notices = []
    if total > plan.min_chunk:
        notices.append(
            Notice(
                "document_in_parts",
                f"the document has {total} tokens; the teacher sees {plan.min_chunk} to {plan.max_chunk} of them at a "
                "time, and answers from these alone",
            )
        )
    left_out = [c.left_out for c in conversations if c.left_out]
    if left_out:
        why = ", ".join(sorted(set(left_out)))
        notices.append(
            Notice("left_out", f"{len(left_out)} of {len(conversations)} conversations: {why}")
        )
    return notices


def _setup(
    prepared: _Prepared,
    study: SelfStudy,
    material: Material,
    conversations: list[Conversation],
    objective: DistillationLoss,
    artifact: bytes,
) -> Setup:
    config, framing, plan = prepared.config, prepared.framing, prepared.plan
    examples = [e for e in material.held_out if isinstance(e, StudiedExample)]
    examples = examples[: config.num_compared]
    asked = [conversations[example.conversation] for example in examples]
    documents = None
    if plan.fits(prepared.document.num_tokens):  # else it would be encoded in vain
        documents = [framing.teacher(prepared.document.text, c.message) for c in asked]
        documents = documents if all(plan.fits(len(prompt)) for prompt in documents) else None
    return Setup(
        base=prepared.base,
        engine=study.engine,
        objective=objective,
        artifact=artifact,
        examples=examples,
        documents=documents,
        chunks=[c.teacher_token_ids for c in asked],
        answering=study.answering(0.0),
        rows=config.micro_batch_size or config.batch_size,
    )
