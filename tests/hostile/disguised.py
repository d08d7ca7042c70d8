"""Files of other kinds under an artifact's name: pickles that would run a command, archives, programs, texts.

The pickles are real: whoever unpickles one of them makes the file `SENTINEL`.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import marshal
import os
import pickle
import sqlite3
import tarfile
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tests.prefix_store.builders import make_artifact

SENTINEL: Final = Path(tempfile.gettempdir()) / f"prefixd-pwned-{os.getpid()}"
VALID: Final = make_artifact()


class Payload:
    """Unpickles to the result of a shell command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {SENTINEL}",)


def torch_file(content: Any, *, legacy: bool = False) -> bytes:
    """As `torch.save` writes it."""
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


def numpy_file(content: Any, *, zipped: bool) -> bytes:
    """As `numpy.save` or `numpy.savez` writes it; objects are pickled."""
    buffer = io.BytesIO()
    array = np.array([content], dtype=object)
    np.savez(buffer, x=array) if zipped else np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def zip_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("task.safetensors", data)
    return buffer.getvalue()


def tar_of(data: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("task.safetensors")
        entry.size = len(data)
        archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def database() -> bytes:
    with sqlite3.connect(":memory:") as connection:
        connection.execute("create table prefix (layer, data)")
        data = connection.serialize()
    connection.close()
    return data


TENSORS: Final = {"dec_self.000.k": torch.zeros(3, 2, 4)}

DISGUISED: Final[dict[str, bytes]] = {
    "empty file": b"",
    "seven bytes": VALID[:7],
    "length only": VALID[:8],
    "eight zero bytes": bytes(8),
    "zeros": bytes(1024),
    "all bits set": b"\xff" * 1024,
    **{
        f"pickle of protocol {protocol} that runs a command": pickle.dumps(Payload(), protocol)
        for protocol in range(6)
    },
    "pickle of tensors as torch saved them": torch_file(TENSORS, legacy=True),
    "torch file": torch_file(TENSORS),
    "torch file that runs a command": torch_file({"state": Payload()}),
    "old torch file that runs a command": torch_file({"state": Payload()}, legacy=True),
    "npy of an object that runs a command": numpy_file(Payload(), zipped=False),
    "npz of an object that runs a command": numpy_file(Payload(), zipped=True),
    "joblib file, a compressed pickle": zlib.compress(pickle.dumps(Payload())),
    "marshalled code": marshal.dumps(compile("import os", "x", "exec")),
    "zip of an artifact": zip_of(VALID),
    "tar of an artifact": tar_of(VALID),
    "gzip of an artifact": gzip.compress(VALID, mtime=0),
    "bzip2 of an artifact": bz2.compress(VALID),
    "xz of an artifact": lzma.compress(VALID),
    "zip bomb": zip_of(bytes(2**24)),
    "artifact with a whole zip behind it": VALID + zip_of(VALID),
    "artifact with a pickle before it": pickle.dumps(Payload()) + VALID,
    "artifact without its length": VALID[8:],
    "artifact behind a byte": b"\0" + VALID,
    "artifact twice": VALID + VALID,
    "artifact in base64": b"UEs" * 100,
    "artifact in a data URL": b"data:application/octet-stream;base64,AAAA",
    "artifact as multipart form data": (
        b"--x\r\nContent-Disposition: form-data; name=file\r\n\r\n" + VALID + b"\r\n--x--\r\n"
    ),
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(200),
    "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(200),
    "onnx": b"\x08\x07\x12\x07pytorch" + bytes(200),
    "tflite": b"\x1c\x00\x00\x00TFL3" + bytes(200),
    "sqlite": database(),
    "program": b"\x7fELF\x02\x01\x01" + bytes(200),
    "windows program": b"MZ\x90\x00" + bytes(200),
    "png": b"\x89PNG\r\n\x1a\n" + bytes(200),
    "shell script": b"#!/bin/sh\ntouch /tmp/x\n" * 10,
    "html": b"<!doctype html><html></html>" * 10,
    "index of a sharded model": json.dumps({"metadata": {}, "weight_map": {}}).encode(),
    "adapter_config.json": json.dumps({"peft_type": "PREFIX_TUNING", "auto_map": {}}).encode(),
    "git lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n",
}
