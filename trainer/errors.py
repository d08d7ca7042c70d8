"""What can go wrong in the trainer through the caller's or the world's fault, as named exceptions.

TrainerError
 |-- BadSetting          a setting, or a combination of them, can not work; names the setting
 |-- BadData             the examples can not be used; names the lines
 |-- RunExists           the output folder holds a run already, or is not empty
 |-- CannotResume        there is nothing to go on from, or it belongs to other data or another base
 |-- NotEnoughMemory     a run does not fit into the device's or the host's memory; names the settings that need less
 |-- Diverged            the loss or a gradient is no longer a number; the last checkpoint is intact
 `-- RunFolderFailed     the file system refused a write (a full disk); the last checkpoint is intact
"""

from __future__ import annotations

from server.errors import PrefixdError


class TrainerError(PrefixdError):
    """Root of everything the trainer raises on purpose."""


class BadSetting(TrainerError):
    """The settings can not work; the message names the one to change."""


class BadData(TrainerError):
    """The examples can not be used; the message names the file and the lines."""


class RunExists(TrainerError):
    """The output folder is in use by another run."""


class CannotResume(TrainerError):
    """The run folder has nothing to go on from, or what it was begun with has changed."""


class Diverged(TrainerError):
    """Loss or gradients are no longer finite."""


class NotEnoughMemory(TrainerError):
    """A run needs more memory than there is."""


class RunFolderFailed(TrainerError):
    """The run folder could not be written."""
