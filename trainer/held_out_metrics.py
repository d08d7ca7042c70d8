"""Metrics of generated answers during a run: what it may be selected by and stopped early by, beside its loss.

Called by whoever begins a run, as `session.Attachments(metrics_for=metrics_for(["bleu"]))`. What is measured is the artifact
as it would be exported now, decoded by the server's engine in process, so the figures are those of `evaluate`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from trainer.base import FrozenBase
from trainer.encoding import EncodedExample
from trainer.engine_in_process import EngineInProcess
from trainer.evaluate import generated_metrics
from trainer.export import Export
from trainer.loop import HeldOutMetrics
from trainer.metrics import require_known
from trainer.prefix_cache import KeyValues
from trainer.session import MetricsFor


def metrics_for(names: Sequence[str], max_examples: int | None = None) -> MetricsFor:
    """Metrics by name, of the first `max_examples` held-out examples or all. Raises `BadSetting` for an unknown name."""
    require_known(names)

    def begin(
        base: FrozenBase, held_out: Sequence[EncodedExample], export: Export
    ) -> HeldOutMetrics:
        engine = EngineInProcess(base.model, base.tokenizer, base=base.spec)
        examples = held_out[:max_examples]

        def measure(prefix: KeyValues) -> Mapping[str, float]:
            return generated_metrics(engine, export.artifact(prefix, {}), examples, names)

        return measure

    return begin
