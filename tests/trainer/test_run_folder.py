"""What a run writes can be read again, whatever the numbers are."""

from __future__ import annotations

import math
from pathlib import Path

from tests.trainer.runs import small_run
from trainer.history import History, per_layer
from trainer.records import read_records
from trainer.run_folder import RunFolder


def test_a_record_with_a_number_that_is_none_is_kept_with_null_in_its_place(
    tmp_path: Path,
) -> None:
    """Norms of a prefix overflow before its loss does: the run must not end by its own log."""
    config = small_run(tmp_path)
    folder = RunFolder.create(config.output, config.model_dump(mode="json"))
    folder.on_record({"kind": "prefix", "step": 3, "key_norms": [1.5, math.inf, math.nan]})

    [record] = read_records(folder.log)

    assert record["key_norms"] == [1.5, None, None]
    [first, *others] = per_layer(History.of([record]).prefix[0], "key_norms")
    assert first == 1.5
    assert all(math.isnan(value) for value in others)
