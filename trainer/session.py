"""One run from its settings to its folder: `train` begins one, `resume` goes on with one.

The composition root of training: reads the data, loads the base, builds encoder and loop, and stores what comes out.
Main thread; called by `cli_train`, by sweeps and by programs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import JsonValue

from server import __version__
from trainer.base import FrozenBase, load_base
from trainer.blind_spots import require_sight
from trainer.checkpoint import Checkpoint, Origin, Progress, load_checkpoint
from trainer.config import RunSettings, TrainConfig
from trainer.data import Example, Fields, digest_of_file, num_shared_prompts, read_examples, split
from trainer.encoding import (
    EncodedExample,
    EncodingSettings,
    ExampleEncoder,
    Notice,
    length_summary,
)
from trainer.errors import BadData, BadSetting, CannotResume
from trainer.export import Export
from trainer.held_out_loss import mean_loss
from trainer.initial import InitialPrefix, initial_prefix, num_virtual_tokens
from trainer.loop import HeldOutMetrics, Hooks, Loop
from trainer.loss import Objective, next_token_loss
from trainer.memory_shortage import memory_shortage_named
from trainer.prefix_cache import KeyValues
from trainer.prefix_encoder import build_encoder
from trainer.records import Observer
from trainer.run_folder import RunFolder

MetricsFor = Callable[[FrozenBase, Sequence[EncodedExample], Export], HeldOutMetrics]
"""Makes the metrics of a run once its base and held-out examples are there."""


@dataclass(frozen=True, slots=True)
class Attachments:
    """What a caller adds to a run: who is told, what is measured beside the loss, when to stop, what is minimised."""

    observers: Sequence[Observer] = ()
    metrics_for: MetricsFor | None = None
    should_stop: Callable[[], bool] = lambda: False
    objective: Objective = next_token_loss


@dataclass(frozen=True, slots=True)
class Material:
    """What a run works on: the base, both sets of examples, and what was noticed while they were read.

    `initial`: what the prefix begins as, if not what the settings say. `record`: entries of the artifact's training record
    beside, or in place of, those that follow from the settings.
    """

    base: FrozenBase
    training: Sequence[EncodedExample]
    held_out: Sequence[EncodedExample]
    notices: Sequence[Notice]
    initial: InitialPrefix | None = None
    record: Mapping[str, JsonValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TrainResult:
    """`reason`: finished, no improvement, interrupted. `prefix`: the artifact of the best step. Equal results have
    the same outcome; the material is for whoever goes on with it.
    """

    material: Material = field(repr=False, compare=False)
    folder: Path
    reason: str
    num_steps: int
    best_step: int
    best_loss: float

    @property
    def prefix(self) -> Path:
        return RunFolder(self.folder).prefix


def train(
    config: TrainConfig,
    attachments: Attachments = Attachments(),
    material: Material | None = None,
) -> TrainResult:
    """A new run. Raises `TrainerError`, `ModelRefused` or `ConfigError`; nothing is written before all is read.

    `material`: what `gather` gave for the same data and base, where several runs share it.
    """
    config = absolute(config)
    RunFolder(config.output).require_free()  # before a base is loaded for minutes
    material = material or gather(config)
    folder = RunFolder.create(config.output, config.model_dump(mode="json"))
    with folder.in_use():
        return run(config, material, folder, None, attachments)


def resume(
    path: Path,
    attachments: Attachments = Attachments(),
    material: Material | None = None,
) -> TrainResult:
    """Goes on with the run in `path` from its last checkpoint. Raises `CannotResume` if what it was begun with changed."""
    folder = RunFolder.reopen(path)
    with folder.in_use():
        folder.mend_log()
        config = TrainConfig(**folder.read_config()).model_copy(update={"output": path})
        material = material or gather(config)
        return run(config, material, folder, folder.checkpoint, attachments)


def absolute(config: TrainConfig) -> TrainConfig:
    """The same with paths that mean the same from wherever the run is resumed."""
    changed: dict[str, Any] = {"data": config.data.absolute(), "output": config.output.absolute()}
    if config.held_out is not None:
        changed["held_out"] = config.held_out.absolute()
    if config.model is not None and Path(config.model).expanduser().is_dir():
        changed["model"] = str(Path(config.model).expanduser().absolute())
    return config.model_copy(update=changed)


def gather(config: TrainConfig, base: FrozenBase | None = None) -> Material:
    """Reads data and base, unless `open_base` gave that before. Raises `BadData`, `BadSetting` or `ModelRefused`."""
    training, held_out = _examples(config)
    require_sight(config.select_by, [example.completion for example in held_out], "select_by")
    base = base or open_base(config)
    encoder = ExampleEncoder(base.tokenizer, encoding_settings(config, base))
    encoded, notices = encoder.encode(training)
    encoded_held_out, more = encoder.encode(held_out)
    notices += [Notice(n.code, f"held-out data: {n.message}") for n in more]
    if shared := num_shared_prompts(training, held_out):
        told = f"{shared} of {len(held_out)} held-out prompts are trained on too: the held-out loss flatters"
        notices.append(Notice("shared_prompts", told))
    record: dict[str, JsonValue] = {"separator": encoder.separator}
    return Material(base, encoded, encoded_held_out, notices, record=record)


def open_base(config: RunSettings) -> FrozenBase:
    """The base as these settings want it. Raises `BadSetting` or `ModelRefused`."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    base = load_base(
        config.model, revision=config.revision, dtype=config.dtype, device=config.device
    )
    if config.activation_checkpointing:
        base.recompute_activations()
    return base


def _examples(config: TrainConfig) -> tuple[list[Example], list[Example]]:
    fields = Fields(config.prompt_field, config.completion_field)
    examples = read_examples(config.data, fields)
    if config.held_out is not None:
        return examples, read_examples(config.held_out, fields)
    if len(examples) < 2:
        raise BadData(f"{config.data}: one example; expected at least two, to hold one out")
    return split(examples, config.held_out_fraction, config.split_seed)


def encoding_settings(config: TrainConfig, base: FrozenBase) -> EncodingSettings:
    """What fits behind the prefix, and how completions end. Raises `BadSetting` for a prefix that this base can not have."""
    limit, count = base.spec.position_limit, num_virtual_tokens(base.tokenizer, config)
    if config.num_frozen_tokens >= count:
        raise BadSetting(
            f"num_frozen_tokens: {config.num_frozen_tokens} of {count} leave nothing to train"
        )
    if limit is not None and count + 2 > limit:
        raise BadSetting(f"num_virtual_tokens: {count}, but the base has {limit} positions")
    room = None if limit is None else limit - count
    lengths = [length for length in (room, config.max_length) if length is not None]
    return EncodingSettings(
        separator=config.separator,
        end_token_ids=base.model.eos_token_ids,
        stop=config.stop,
        max_tokens=min(lengths, default=None),
    )


def run(
    config: TrainConfig,
    material: Material,
    folder: RunFolder,
    checkpoint_file: Path | None,
    attachments: Attachments,
) -> TrainResult:
    """Trains on what was gathered, from the checkpoint if there is one. Raises `CannotResume` if it is of another run,
    and what the loop raises.
    """
    with memory_shortage_named():
        return _run(config, material, folder, checkpoint_file, attachments)


def _run(
    config: TrainConfig,
    material: Material,
    folder: RunFolder,
    checkpoint_file: Path | None,
    attachments: Attachments,
) -> TrainResult:
    base, origin = material.base, origin_of(config, material.base)
    checkpoint: Checkpoint | None = None
    if checkpoint_file is not None:
        checkpoint = load_checkpoint(checkpoint_file, base.device)
        require_same(checkpoint.origin, origin)
    initial = material.initial or initial_prefix(base, config, material.training)
    encoder = build_encoder(base, config, initial)
    hooks = _hooks(config, material, folder, origin, initial, attachments)
    loop = Loop(base, encoder, config, material.training, material.held_out, folder, origin, hooks)
    if checkpoint is not None:
        loop.restore(checkpoint)
    _announce(material, loop, hooks.observers, resumed=checkpoint is not None)
    reason = loop.run()
    progress = loop.progress
    assert progress.best_loss is not None, "a run evaluates before its first step"
    return TrainResult(
        material, folder.path, reason, progress.step, progress.best_step, progress.best_loss
    )


def _hooks(
    config: TrainConfig,
    material: Material,
    folder: RunFolder,
    origin: Origin,
    initial: InitialPrefix,
    attachments: Attachments,
) -> Hooks:
    """What the loop calls: the folder as its first observer, and as the place of the best prefix."""
    export = Export.of(material.base, config, material.training, material.held_out)

    def keep(prefix: KeyValues, progress: Progress) -> None:
        record = training_record(config, material, origin, initial, progress)
        folder.write(folder.prefix, export.artifact(prefix, {**record, **material.record}))

    metrics_for = attachments.metrics_for
    return Hooks(
        observers=(folder, *attachments.observers),
        keep=keep,
        metrics=metrics_for and metrics_for(material.base, material.held_out, export),
        should_stop=attachments.should_stop,
        objective=attachments.objective,
    )


def _announce(
    material: Material,
    loop: Loop,
    observers: Sequence[Observer],
    *,
    resumed: bool,
) -> None:
    """The first records of a run, or of a resumed one: what it works on, and what is worth knowing."""
    records = [_begin(material, loop)]
    if not resumed:
        records += [
            {"kind": "warning", "code": n.code, "message": n.message} for n in material.notices
        ]
    for record in records:
        for observer in observers:
            observer.on_record(record)


def _begin(material: Material, loop: Loop) -> dict[str, Any]:
    training, rows = material.training, loop.config.micro_batch_size or loop.config.batch_size
    return {
        "kind": "begin",
        "step": loop.progress.step,
        "num_steps": loop.num_steps,
        "num_virtual_tokens": num_virtual_tokens(material.base.tokenizer, loop.config),
        "num_parameters": sum(p.numel() for p in loop.encoder.parameters()),
        "num_training": len(training),
        "num_held_out": len(material.held_out),
        "num_prompts": len({example.prompt_token_ids for example in training}),
        "num_completion_tokens": sum(len(example.completion_token_ids) for example in training),
        "training_tokens": length_summary(training),
        "held_out_tokens": length_summary(material.held_out),
        "base_loss": mean_loss(material.base, None, material.held_out, rows, loop.hooks.objective),
    }


def training_record(
    config: TrainConfig,
    material: Material,
    origin: Origin,
    initial: InitialPrefix,
    progress: Progress,
) -> dict[str, JsonValue]:
    """What the artifact says of its training, for people."""
    text = config.init_text
    record: dict[str, JsonValue] = {
        "program": f"prefixd {__version__}",
        "method": config.encoder,
        "init": config.init_kind,
        "init_text": text if text is None or len(text) <= 1000 else text[:1000] + "...",
        "init_token_ids": None if initial.token_ids is None else list(initial.token_ids[:64]),
        "learning_rate": config.peak_learning_rate,
        "schedule": config.schedule,
        "batch_size": config.batch_size,
        "num_steps": config.num_steps_for(math.ceil(len(material.training) / config.batch_size)),
        "seed": config.seed,
        "data": {
            "training": origin.data,
            "held_out": origin.held_out,
            "num_training": len(material.training),
            "num_held_out": len(material.held_out),
        },
        "best": {"step": progress.best_step, "held_out_loss": progress.best_loss},
    }
    if config.encoder == "mlp":
        record["mlp"] = {"embedding": config.mlp_embedding_size, "hidden": config.mlp_hidden_size}
    if config.select_by != "loss":
        record["selected_by"] = {config.select_by: progress.best_score}
    return record


def origin_of(config: TrainConfig, base: FrozenBase) -> Origin:
    """What a run with these settings is begun with."""
    held_out = None if config.held_out is None else digest_of_file(config.held_out)
    return Origin(base.spec.fingerprint, digest_of_file(config.data), held_out)


def require_same(before: Origin, now: Origin) -> None:
    """Raises `CannotResume` where they differ, and says in what."""
    told = {
        "base_fingerprint": "the weights of the base model",
        "data": "the training data",
        "held_out": "the held-out data",
    }
    changed = [what for name, what in told.items() if getattr(before, name) != getattr(now, name)]
    if changed:
        raise CannotResume(f"since the run began, {' and '.join(changed)} changed; begin a new run")
