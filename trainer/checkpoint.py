"""A run between two steps, as one safetensors file: whoever loads it goes on as if nothing had happened.

Holds the encoder's parameters before folding, the optimizer's moments, the state of the dropout generator, the best
prefix so far, and how far the run is. Learning rate and data order are functions of the step and need no state.
Nothing is pickled. Main thread; called by `loop`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.errors import CannotResume
from trainer.prefix_cache import KeyValues
from trainer.prefix_encoder import PrefixEncoder
from trainer.run_folder import write_durably

_KEY: Final = "prefixd.trainer"
_CHECKSUM: Final = "sha256"
_ENCODER: Final = "encoder."
_OPTIMIZER: Final = "optimizer."
_BEST: Final = "best."
_GENERATOR: Final = "generator"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a run was begun with; a resumed one must find the same."""

    base_fingerprint: str
    data: str
    held_out: str | None


@dataclass(slots=True)
class Progress:
    """How far a run is. `step`: steps done. `best_score`: of the best, higher is better. `seconds`: of training.
    `ended`: why, if it has.
    """

    step: int = 0
    best_step: int = 0
    best_score: float | None = None
    best_loss: float | None = None
    num_stale: int = 0
    evaluated_step: int = -1
    seconds: float = 0.0
    ended: str | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What `load` found."""

    origin: Origin
    progress: Progress
    tensors: dict[str, Tensor]

    @property
    def best(self) -> KeyValues | None:
        """The best prefix so far."""
        found = [name for name in self.tensors if name.startswith(_BEST)]
        if not found:
            return None
        return KeyValues.of([self.tensors[f"{_BEST}{index}"] for index in range(len(found))])

    def restore(self, encoder: PrefixEncoder, optimizer: torch.optim.Optimizer) -> None:
        """Puts encoder, optimizer and generator back. Raises `CannotResume` if they are others than these."""
        state = _below(self.tensors, _ENCODER)
        try:
            encoder.load_state_dict(state)
        except RuntimeError as error:
            raise CannotResume(f"the checkpoint is of another encoder: {error}") from None
        encoder.generator.set_state(self.tensors[_GENERATOR])
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in _below(self.tensors, _OPTIMIZER).items():
            index, _, kind = name.partition(".")
            moments.setdefault(int(index), {})[kind] = tensor
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": moments, "param_groups": groups})


def save_checkpoint(
    path: Path,
    origin: Origin,
    progress: Progress,
    encoder: PrefixEncoder,
    optimizer: torch.optim.Optimizer,
    best: KeyValues | None,
) -> None:
    """Replaces the checkpoint at `path`, or leaves it intact. Raises `RunFolderFailed`."""
    tensors = {f"{_ENCODER}{name}": t for name, t in encoder.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{kind}": value for kind, value in moments.items()}
    tensors[_GENERATOR] = encoder.generator.get_state()
    if best is not None:
        tensors |= {f"{_BEST}{index}": tensor for index, tensor in enumerate(best.tensors)}
    about = json.dumps({"origin": asdict(origin), "progress": asdict(progress)})
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {_KEY: about, _CHECKSUM: _checksum(about, held)}
    write_durably(path, save(held, metadata=metadata))


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """Raises `CannotResume` for a file that is no checkpoint, or is one no longer."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            about: dict[str, Any] = json.loads(metadata[_KEY])
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
        # An older checkpoint has no checksum, and is believed.
        if metadata.get(_CHECKSUM, found := _checksum(metadata[_KEY], tensors)) != found:
            raise ValueError("its bytes changed since it was written")
        origin, progress = Origin(**about["origin"]), Progress(**about["progress"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CannotResume(f"{path} is no checkpoint of this program: {error}") from None
    on_host = {_GENERATOR}  # a generator's state lives in host memory, whatever it draws for
    return Checkpoint(
        origin,
        progress,
        {name: t if name in on_host else t.to(device) for name, t in tensors.items()},
    )


def _checksum(about: str, tensors: dict[str, Tensor]) -> str:
    """Of all that a checkpoint holds; safetensors itself would not notice a changed bit."""
    sha = hashlib.sha256(about.encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def _below(tensors: dict[str, Tensor], head: str) -> dict[str, Tensor]:
    return {name.removeprefix(head): t for name, t in tensors.items() if name.startswith(head)}
