"""Names of devices."""

from __future__ import annotations

import pytest
import torch

from server.errors import ConfigError
from server.model.device import pick_device


def test_a_device_is_taken_by_its_name() -> None:
    assert pick_device("cpu") == torch.device("cpu")
    assert pick_device("auto").type in ("cpu", "cuda")


@pytest.mark.parametrize("name", ["tpu", "", "cpu:x"])
def test_a_name_that_is_none_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(ConfigError, match="expected auto, cpu, cuda or cuda:N"):
        pick_device(name)
