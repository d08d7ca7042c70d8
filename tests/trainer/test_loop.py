"""What a run keeps, when it ends, and what it leaves behind when it fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from prefix_store.artifact import decode, digest_of
from tests.trainer.runs import Recorder, artifact_tensors, small_run
from trainer.batches import Batch
from trainer.checkpoint import load_checkpoint
from trainer.config import TrainConfig
from trainer.errors import BadSetting, Diverged, NotEnoughMemory, RunFolderFailed
from trainer.loss import next_token_loss
from trainer.prefix_cache import KeyValues
from trainer.records import read_records
from trainer.run_folder import RunFolder
from trainer.session import Attachments, MetricsFor, train

CPU = torch.device("cpu")


def test_training_lowers_the_loss_and_the_log_says_everything(tmp_path: Path) -> None:
    recorder = Recorder()
    config = small_run(tmp_path, num_steps=40, evaluate_every=10)

    result = train(config, Attachments((recorder,)))

    held_out = recorder.of("held_out")
    assert [r["step"] for r in held_out] == [0, 10, 20, 30, 40]
    assert held_out[-1]["loss"] < held_out[0]["loss"] - 0.4
    assert "loss_other_prompt" in held_out[-1]
    assert [r["step"] for r in recorder.of("step")] == list(range(1, 41))
    assert all(a["seconds"] <= b["seconds"] for a, b in pairwise(recorder.of("step")))
    (end,) = recorder.of("end")
    assert (end["best_step"], end["best_loss"]) == (result.best_step, result.best_loss)
    assert read_records(RunFolder(config.output).log) == recorder.records
    look = recorder.of("prefix")[-1]
    for name in ("key_norms", "natural_value_norms", "attention_mass", "sink_mass", "moved_keys"):
        assert len(look[name]) == 3, "one number a layer"
    assert all(
        0 < sink <= mass <= 1
        for mass, sink in zip(look["attention_mass"], look["sink_mass"], strict=True)
    )
    assert recorder.of("prefix")[0]["moved_keys"] == [0.0] * 3
    assert min(look["moved_keys"]) > 0


def scripted(values: list[float], seen: list[KeyValues]) -> MetricsFor:
    """A metric that has these values one after the other, and what it was shown."""

    def metrics_for(*_: Any) -> Any:
        script: Iterator[float] = iter(values)

        def measure(prefix: KeyValues) -> dict[str, float]:
            seen.append(prefix)
            return {"exact_match": next(script)}

        return measure

    return metrics_for


def test_early_stopping_on_a_metric_ends_the_run_and_restores_the_best(tmp_path: Path) -> None:
    seen: list[KeyValues] = []
    recorder = Recorder()
    config = small_run(tmp_path, num_steps=100, select_by="exact_match", patience=2)

    result = train(
        config, Attachments((recorder,), metrics_for=scripted([1.0, 5.0, 5.0, 2.0], seen))
    )

    assert (result.reason, result.num_steps, result.best_step) == ("no improvement", 12, 4)
    for stored, best in zip(artifact_tensors(result.prefix), _in_file_order(seen[1]), strict=True):
        assert torch.equal(stored, best)
    assert [r["exact_match"] for r in recorder.of("held_out")] == [1.0, 5.0, 5.0, 2.0]
    checkpoint = load_checkpoint(RunFolder(config.output).checkpoint, CPU)
    assert checkpoint.best is not None
    for kept, best in zip(checkpoint.best.tensors, seen[1].tensors, strict=True):
        assert torch.equal(kept, best)


def _in_file_order(prefix: KeyValues) -> tuple[Tensor, ...]:
    return (*prefix.keys, *prefix.values)


def test_early_stopping_on_the_loss_keeps_the_step_with_the_lowest(tmp_path: Path) -> None:
    """A learning rate far too high: the loss rises from some step on."""
    recorder = Recorder()
    config = small_run(
        tmp_path, num_steps=60, patience=2, learning_rate=1.0, schedule="constant", clip_norm=None
    )

    result = train(config, Attachments((recorder,)))

    losses = {r["step"]: r["loss"] for r in recorder.of("held_out")}
    assert result.reason == "no improvement"
    assert result.best_step == min(losses, key=lambda step: losses[step])
    assert result.best_step < result.num_steps


def test_selecting_by_a_metric_that_is_not_measured_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadSetting, match=r"select_by: 'accuracy'.*expected one of loss"):
        train(small_run(tmp_path, select_by="accuracy"))


class _NanAtStep:
    """The usual loss, until the step where it is no number."""

    def __init__(self, step: int) -> None:
        self._left = step

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        loss = next_token_loss(logits, batch)
        if loss.requires_grad:
            self._left -= 1
        return loss * float("nan") if self._left == 0 else loss


def require_intact(config: TrainConfig, step: int) -> None:
    """Checkpoint and best prefix are whole, and the checkpoint is that of `step`."""
    folder = RunFolder(config.output)
    assert load_checkpoint(folder.checkpoint, CPU).progress.step == step
    data = folder.prefix.read_bytes()
    assert decode(data, digest_of(data)).manifest.num_virtual_tokens == 4
    assert [path for path in config.output.rglob("*") if path.name.endswith(".new")] == []


def test_a_loss_that_is_no_number_ends_the_run_and_says_what_to_change(tmp_path: Path) -> None:
    config = small_run(tmp_path)

    with pytest.raises(Diverged) as caught:
        train(config, Attachments(objective=_NanAtStep(7)))

    assert "step 7: the loss is nan" in str(caught.value)
    assert "--learning-rate" in str(caught.value)
    require_intact(config, step=4)


@pytest.mark.parametrize(
    "settings",
    [
        {"learning_rate": 1e38, "warmup_fraction": 0.0},
        {"learning_rate": 1e30, "weight_decay": 1e30},
        {"learning_rate": 1e300},
    ],
)
def test_a_rate_that_float32_can_not_hold_ends_the_run_as_any_divergence_does(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    """torch's own words were "value cannot be converted to type float without overflow"."""
    config = small_run(tmp_path, **settings)

    with pytest.raises(Diverged, match=r"step 1: .*more than float32 can hold.*--learning-rate"):
        train(config)
    require_intact(config, step=0)


def test_want_of_memory_is_named_with_the_settings_that_need_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path)

    def no_memory(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("trainer.loop.add_gradients", no_memory)
    with pytest.raises(NotEnoughMemory, match=r"(?s)Tried to allocate .*--micro-batch-size"):
        train(config)
    require_intact(config, step=0)


def test_torch_saying_that_the_host_has_no_memory_left_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_much(*_: object, **__: object) -> None:
        torch.empty(2**60)

    monkeypatch.setattr("trainer.loop.add_gradients", too_much)
    with pytest.raises(NotEnoughMemory, match="--micro-batch-size"):
        train(small_run(tmp_path))


@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO])
def test_a_full_disk_ends_the_run_and_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    config = small_run(tmp_path, checkpoint_every=1)
    real = os.fsync
    recorder = Recorder()

    def full(fd: int) -> None:
        if len(recorder.of("step")) >= 6:
            raise OSError(fault, os.strerror(fault))
        real(fd)

    monkeypatch.setattr(os, "fsync", full)

    with pytest.raises(RunFolderFailed) as caught:
        train(config, Attachments((recorder,)))

    why = "no room left on the device" if fault == errno.ENOSPC else "Input/output error"
    assert why in str(caught.value)
    assert "last checkpoint" in str(caught.value)
    require_intact(config, step=5)


def test_a_log_that_can_not_be_written_ends_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_run(tmp_path)
    real = Path.open

    def refusing(path: Path, *arguments: Any, **options: Any) -> Any:
        if path.name == "log.jsonl":
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", refusing)

    with pytest.raises(RunFolderFailed, match=r"log\.jsonl could not be written: no room left"):
        train(config)


def test_passes_of_a_few_examples_train_as_one_pass_does(tmp_path: Path) -> None:
    whole, cut = Recorder(), Recorder()

    train(small_run(tmp_path, output=tmp_path / "whole"), Attachments((whole,)))
    train(small_run(tmp_path, output=tmp_path / "cut", micro_batch_size=1), Attachments((cut,)))

    assert cut.losses() == pytest.approx(whole.losses(), abs=1e-4)


def test_recomputed_activations_train_to_the_same_losses(tmp_path: Path) -> None:
    kept, recomputed = Recorder(), Recorder()

    train(small_run(tmp_path, output=tmp_path / "kept"), Attachments((kept,)))
    train(
        small_run(tmp_path, output=tmp_path / "recomputed", activation_checkpointing=True),
        Attachments((recomputed,)),
    )

    assert recomputed.losses() == pytest.approx(kept.losses(), abs=1e-5)


def test_a_base_in_bfloat16_trains_float32_parameters_to_a_bfloat16_artifact(
    tmp_path: Path,
) -> None:
    recorder = Recorder()
    config = small_run(tmp_path, dtype="bfloat16", num_steps=40, evaluate_every=40)

    result = train(config, Attachments((recorder,)))

    first, last = recorder.of("held_out")
    assert last["loss"] < first["loss"] - 0.4
    assert {tensor.dtype for tensor in artifact_tensors(result.prefix)} == {torch.bfloat16}
    held = load_checkpoint(RunFolder(config.output).checkpoint, CPU).tensors
    floating = {t.dtype for name, t in held.items() if name.startswith(("encoder", "optimizer"))}
    assert floating == {torch.float32}


def test_frozen_rows_are_those_of_the_initial_text(tmp_path: Path) -> None:
    for encoder in ("direct", "mlp"):
        config = small_run(
            tmp_path, output=tmp_path / encoder, encoder=encoder, num_frozen_tokens=2
        )
        untrained = small_run(
            tmp_path, output=tmp_path / f"{encoder}-0", encoder=encoder, learning_rate=1e-30
        )

        trained = artifact_tensors(train(config).prefix)
        initial = artifact_tensors(train(untrained).prefix)

        for one, other in zip(trained, initial, strict=True):
            torch.testing.assert_close(one[:2], other[:2], rtol=1e-6, atol=1e-7)
            assert not torch.allclose(one[2:], other[2:])
