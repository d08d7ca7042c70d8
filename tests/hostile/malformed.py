"""Files that are no artifacts, each with a name that says what is wrong with it.

Every entry is a small change to one valid artifact, so that nothing but the named fault can be the reason
for its refusal. `MALFORMED` breaks the format; `INCOMPATIBLE` is well-formed and wrong for the base.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from typing import Any, Final

from prefix_store.artifact import encode
from prefix_store.spec import KVLayout, LayerLayout
from tests.prefix_store.builders import (
    TINY_BASE,
    base_with,
    data_of,
    framed,
    header_of,
    make_artifact,
    manifest_for,
    random_kv,
    raw_artifact,
)

VALID: Final = make_artifact()
DATA: Final = data_of(VALID)
NAMES: Final = ("dec_self.000.k", "dec_self.000.v", "dec_self.001.k", "dec_self.001.v")
TENSOR_BYTES: Final = 3 * 2 * 4 * 4


def header_with(change: Callable[[dict[str, Any]], object]) -> bytes:
    """The valid file with its header changed in place."""
    header = header_of(VALID)
    change(header)
    return framed(header, DATA)


def tensor_with(**fields: Any) -> bytes:
    """The valid file with fields of its third tensor changed."""
    return header_with(lambda header: header[NAMES[2]].update(fields))


def text_with(old: str, new: str) -> bytes:
    """The valid file with the text of its header changed once."""
    text = json.dumps(header_of(VALID))
    assert old in text
    return framed(text.replace(old, new, 1), DATA)


def manifest_with(**fields: Any) -> bytes:
    """The valid file with fields of its manifest changed."""
    header = header_of(VALID)
    manifest = json.loads(header["__metadata__"]["prefixd"]) | fields
    header["__metadata__"]["prefixd"] = json.dumps(manifest)
    return framed(header, DATA)


def manifest_without(field: str) -> bytes:
    header = header_of(VALID)
    manifest = json.loads(header["__metadata__"]["prefixd"])
    del manifest[field]
    header["__metadata__"]["prefixd"] = json.dumps(manifest)
    return framed(header, DATA)


def manifest_text(text: str) -> bytes:
    return header_with(lambda header: header["__metadata__"].update(prefixd=text))


def manifest_replacing(old: str, new: str) -> bytes:
    text = header_of(VALID)["__metadata__"]["prefixd"]
    assert old in text
    return manifest_text(text.replace(old, new, 1))


def metadata(value: Any) -> bytes:
    return header_with(lambda header: header.update(__metadata__=value))


def renamed(new: str, old: str = NAMES[3]) -> bytes:
    return header_with(lambda header: header.update({new: header.pop(old)}))


def without(*names: str) -> bytes:
    """Some tensors missing, the offsets of the others still as they were."""
    return header_with(lambda header: [header.pop(name) for name in names])


def with_length(length: int) -> bytes:
    return length.to_bytes(8, "little") + VALID[8:]


def reshaped(**changes: list[int]) -> bytes:
    """Right framing, other shapes; keys are k0, v0, k1, v1."""
    shapes = {name: changes.get(f"{name[-1]}{name[-3]}", [3, 2, 4]) for name in NAMES}
    return raw_artifact(shapes, manifest_for(TINY_BASE, 3).model_dump(mode="json"))


def offsets(*pairs: tuple[int, int]) -> bytes:
    """Offsets of all four tensors, in units of one tensor's bytes where whole."""
    header = header_of(VALID)
    for name, pair in zip(NAMES, pairs, strict=True):
        header[name]["data_offsets"] = list(pair)
    return framed(header, DATA)


T = TENSOR_BYTES
HEADER_TEXT: Final = json.dumps(header_of(VALID))
MANIFEST_TEXT: Final = header_of(VALID)["__metadata__"]["prefixd"]
FIRST: Final = json.dumps(header_of(VALID)[NAMES[0]])

NOT_A_FILE_OF_OURS: Final[dict[str, bytes]] = {
    "empty file": b"",
    "seven bytes": VALID[:7],
    "length only": VALID[:8],
    "eight zero bytes": bytes(8),
    "zeros": bytes(1024),
    "pickle of protocol 0 that runs a command": b"cposix\nsystem\n(S'touch /tmp/prefixd-pwned'\ntR.",
    "pickle of protocol 4": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x93.",
    "zip as torch saves it": b"PK\x03\x04" + bytes(200),
    "npy array": b"\x93NUMPY\x01\x00" + bytes(200),
    "gguf": b"GGUF\x03\x00\x00\x00" + bytes(200),
    "html": b"<!doctype html><html></html>" * 10,
    "gzip of an artifact": gzip.compress(VALID, mtime=0),
    "artifact without its length": VALID[8:],
    "artifact behind a byte": b"\0" + VALID,
}

BROKEN_FRAME: Final[dict[str, bytes]] = {
    "header length of 2^64-1": with_length(2**64 - 1),
    "header length of 2^63": with_length(2**63),
    "header length beyond 64 KiB": framed(HEADER_TEXT + " " * 65536, DATA),
    "header length beyond the file": with_length(len(VALID)),
    "header length to the end of the file": with_length(len(VALID) - 8),
    "header length one too short": with_length(int.from_bytes(VALID[:8], "little") - 1),
    "header length eight too long": with_length(int.from_bytes(VALID[:8], "little") + 8),
    "header length zero": bytes(8) + VALID[8:],
    "header that is not a multiple of eight": framed(
        HEADER_TEXT + " " * (len(HEADER_TEXT) % 8 == 0), DATA, pad=False
    ),
    "data cut in half": VALID[: -len(DATA) // 2],
    "data cut by one byte": VALID[:-1],
    "no data": VALID[: -len(DATA)],
    "one byte behind the data": VALID + b"\0",
    "zip behind the data": VALID + b"PK\x05\x06" + bytes(18),
    "gap before the data": framed(HEADER_TEXT, bytes(8) + DATA),
}

BROKEN_JSON: Final[dict[str, bytes]] = {
    "byte order mark": framed("\ufeff" + HEADER_TEXT, DATA),
    "leading space": framed(" " + HEADER_TEXT, DATA),
    "leading newline": framed("\n" + HEADER_TEXT, DATA),
    "newlines as padding": framed(HEADER_TEXT + "\n" * (-len(HEADER_TEXT) % 8 or 8), DATA),
    "zero bytes as padding": framed(HEADER_TEXT + "\0" * (-len(HEADER_TEXT) % 8 or 8), DATA),
    "payload in the padding": framed(HEADER_TEXT + " " * 64, DATA),
    "header in UTF-16": framed(HEADER_TEXT.encode("utf-16"), DATA),
    "header in Latin-1": framed(HEADER_TEXT.replace("tiny", "x").encode() + b"\xff}", DATA),
    "overlong UTF-8": framed(b'{"\xc0\xaf":1}', DATA),
    "header is a list": framed(f"[{HEADER_TEXT}]", DATA),
    "header is a string": framed('"hello"', DATA),
    "header is a number": framed("12345678", DATA),
    "two objects": framed(HEADER_TEXT + "{}", DATA),
    "trailing comma": framed(HEADER_TEXT[:-1] + ",}", DATA),
    "single quotes": framed(HEADER_TEXT.replace('"', "'"), DATA),
    "comment": framed(HEADER_TEXT[:-1] + "/* hi */}", DATA),
    "unclosed object": framed(HEADER_TEXT[:-1], DATA),
    "raw control character in a string": text_with("dec_self.000.k", "dec_self\n000.k"),
    "empty object": framed("{}", DATA),
    "empty object and no data": framed("{}", b""),
    "nested 100 deep": text_with(FIRST, "[" * 100 + "]" * 100),
    "nested 30000 deep": framed("{" + '"a":[' * 1 + "[" * 30000 + "]" * 30000 + "]}", DATA),
    "duplicate tensor": text_with('"dec_self.000.k"', f'"{NAMES[0]}": {FIRST}, "{NAMES[0]}"'),
    "duplicate tensor by an escape": text_with(
        '"dec_self.000.k"', f'"dec_self.000.\\u006b": {FIRST}, "{NAMES[0]}"'
    ),
    "duplicate metadata": text_with('"__metadata__"', '"__metadata__": {}, "__metadata__"'),
    "duplicate manifest key": text_with('"prefixd"', '"prefixd": "{}", "prefixd"'),
    "duplicate dtype": text_with('"dtype"', '"dtype": "F16", "dtype"'),
    "duplicate shape": text_with('"shape"', '"shape": [9, 9, 9], "shape"'),
    "NaN in a shape": text_with("[3, 2, 4]", "[3, 2, NaN]"),
    "Infinity in an offset": text_with(f"[0, {T}]", "[0, Infinity]"),
    "integer of 5000 digits": text_with("[3, 2, 4]", f"[3, 2, {'9' * 5000}]"),
    "number 1e999": text_with("[3, 2, 4]", "[3, 2, 1e999]"),
    "minus zero": text_with(f"[0, {T}]", f"[-0, {T}]"),
    "hexadecimal number": text_with("[3, 2, 4]", "[3, 2, 0x4]"),
    "number with a leading zero": text_with("[3, 2, 4]", "[3, 2, 04]"),
}

BROKEN_TENSORS: Final[dict[str, bytes]] = {
    "shape with 2^64": tensor_with(shape=[3, 2, 2**64]),
    "shape whose product wraps to the right size": tensor_with(shape=[2**32, 2**32, 24]),
    "negative dimension": tensor_with(shape=[-3, -2, 4]),
    "fractional dimension": tensor_with(shape=[3, 2, 4.0]),
    "dimension with an exponent": text_with("[3, 2, 4]", "[3, 2, 4e0]"),
    "boolean dimension": tensor_with(shape=[3, 2, True]),
    "dimension in a string": tensor_with(shape=[3, 2, "4"]),
    "null dimension": tensor_with(shape=[3, 2, None]),
    "no tokens": reshaped(k1=[0, 2, 4]),
    "no heads": reshaped(v1=[3, 0, 4]),
    "huge and empty": tensor_with(shape=[0, 2**63, 4], data_offsets=[2 * T, 2 * T]),
    "scalar": tensor_with(shape=[]),
    "rank one": tensor_with(shape=[24]),
    "rank two": tensor_with(shape=[3, 8]),
    "rank four": tensor_with(shape=[1, 3, 2, 4]),
    "rank 5000": tensor_with(shape=[1] * 5000),
    "shape is null": tensor_with(shape=None),
    "shape is an object": tensor_with(shape={"0": 3}),
    "dtype F64": tensor_with(dtype="F64"),
    "dtype I8": tensor_with(dtype="I8"),
    "dtype BOOL": tensor_with(dtype="BOOL"),
    "dtype F8_E4M3": tensor_with(dtype="F8_E4M3"),
    "dtype in lower case": tensor_with(dtype="f32"),
    "dtype null": tensor_with(dtype=None),
    "dtype a number": tensor_with(dtype=32),
    "dtype a list": tensor_with(dtype=["F32"]),
    "mixed dtypes": tensor_with(dtype="F16"),
    "mixed dtypes of the right sizes": tensor_with(dtype="BF16", shape=[3, 4, 4]),
    "overlapping tensors": offsets((0, T), (0, T), (2 * T, 3 * T), (3 * T, 4 * T)),
    "partly overlapping tensors": offsets(
        (0, T), (T - 4, 2 * T - 4), (2 * T, 3 * T), (3 * T, 4 * T)
    ),
    "tensors out of order": offsets((T, 2 * T), (0, T), (2 * T, 3 * T), (3 * T, 4 * T)),
    "reversed offsets": offsets((T, 0), (T, 2 * T), (2 * T, 3 * T), (3 * T, 4 * T)),
    "offsets beyond the file": offsets((0, T), (T, 2 * T), (2 * T, 3 * T), (4 * T, 5 * T)),
    "offsets near 2^53": offsets((0, T), (T, 2 * T), (2 * T, 3 * T), (2**53 - T, 2**53)),
    "one offset": tensor_with(data_offsets=[2 * T]),
    "three offsets": tensor_with(data_offsets=[2 * T, 3 * T, 4 * T]),
    "fractional offsets": tensor_with(data_offsets=[2.0 * T, 3.0 * T]),
    "offsets in strings": tensor_with(data_offsets=[str(2 * T), str(3 * T)]),
    "negative offset": tensor_with(data_offsets=[-T, 3 * T]),
    "offsets null": tensor_with(data_offsets=None),
    "extra field": tensor_with(stride=[8, 4, 1]),
    "missing dtype": header_with(lambda header: header[NAMES[1]].pop("dtype")),
    "missing shape": header_with(lambda header: header[NAMES[1]].pop("shape")),
    "missing offsets": header_with(lambda header: header[NAMES[1]].pop("data_offsets")),
    "tensor is a list": header_with(lambda header: header.update({NAMES[1]: [1, 2]})),
    "tensor is null": header_with(lambda header: header.update({NAMES[1]: None})),
}

BROKEN_NAMES: Final[dict[str, bytes]] = {
    "value of the last layer missing": without(NAMES[3]),
    "key of the first layer missing": without(NAMES[0]),
    "first layer missing": without(NAMES[0], NAMES[1]),
    "no tensors": without(*NAMES),
    "layers that are not consecutive": renamed("dec_self.002.v"),
    "layer 999 of a thousand": renamed("dec_self.999.v"),
    "unknown tensor": header_with(lambda header: header.update(extra=header[NAMES[0]])),
    "path as a name": renamed("../../../etc/passwd"),
    "zero byte in a name": renamed("dec_self.001.v\0"),
    "newline behind a name": renamed("dec_self.001.v\n"),
    "empty name": renamed(""),
    "name of 50000 characters": renamed("x" * 50_000),
    "thousands of tensors": header_with(lambda h: h.update({f"t{i}": 0 for i in range(5000)})),
    "name without zeros": renamed("dec_self.1.v"),
    "name with four digits": renamed("dec_self.0001.v"),
    "name with other digits": renamed("dec_self.00１.v"),
    "name in upper case": renamed("DEC_SELF.001.V"),
    "name of a third part": renamed("dec_self.001.q"),
    "encoder block": header_with(lambda h: h.update({"enc_self.000.k": h[NAMES[0]]})),
    "cross-attention block": header_with(lambda h: h.update({"dec_cross.000.k": h[NAMES[0]]})),
    "soft prompt": header_with(lambda header: header.update({"soft.enc": header[NAMES[0]]})),
    "names of a model's weights": renamed("model.layers.0.self_attn.k_proj.weight"),
}

BROKEN_MANIFEST: Final[dict[str, bytes]] = {
    "no metadata": header_with(lambda header: header.pop("__metadata__")),
    "metadata null": metadata(None),
    "metadata a list": metadata(["prefixd"]),
    "metadata a string": metadata(MANIFEST_TEXT),
    "metadata empty": metadata({}),
    "metadata of another format": metadata({"kvprefix": MANIFEST_TEXT}),
    "extra metadata key": metadata({"prefixd": MANIFEST_TEXT, "base_model": "evil"}),
    "manifest is not a string": metadata({"prefixd": {"format_version": 1}}),
    "format is not a string": metadata({"prefixd": MANIFEST_TEXT, "format": 1}),
    "manifest empty": manifest_text(""),
    "manifest is not JSON": manifest_text("hello"),
    "manifest is a list": manifest_text("[]"),
    "manifest has a duplicate field": manifest_replacing(
        '"model_type"', '"model_type":"gpt2","model_type"'
    ),
    "manifest has a duplicate field deep inside": manifest_replacing(
        '"training":{}', '"training":{"a":[{"b":1,"b":2}]}'
    ),
    "manifest has NaN": manifest_replacing('"rope_theta":10000.0', '"rope_theta":NaN'),
    "manifest has 1e999": manifest_replacing('"rope_theta":10000.0', '"rope_theta":1e999'),
    "manifest has a huge integer": manifest_with(training={"seed": 2**53 + 1}),
    "manifest nested 20 deep": manifest_with(training={"a": json.loads("[" * 20 + "]" * 20)}),
    "manifest has half a surrogate pair": manifest_replacing(
        '"description":null', '"description":"\\ud800"'
    ),
    "metadata has half a surrogate pair": metadata({"prefixd": MANIFEST_TEXT, "format": "\ud800"}),
    "format version missing": manifest_without("format_version"),
    "format version 2": manifest_with(format_version=2),
    "format version true": manifest_with(format_version=True),
    "format version in a string": manifest_with(format_version="1"),
    "unknown manifest field": manifest_with(auto_map={"AutoModel": "evil.Model"}),
    "unknown field of base_model": manifest_with(base_model={"path": "/etc/passwd"}),
    "num_virtual_tokens missing": manifest_without("num_virtual_tokens"),
    "num_virtual_tokens in a string": manifest_with(num_virtual_tokens="3"),
    "num_virtual_tokens fractional": manifest_with(num_virtual_tokens=3.0),
    "num_virtual_tokens true": manifest_with(num_virtual_tokens=True),
    "num_virtual_tokens zero": manifest_with(num_virtual_tokens=0),
    "num_virtual_tokens negative": manifest_with(num_virtual_tokens=-3),
    "num_virtual_tokens of a billion": manifest_with(num_virtual_tokens=10**9),
    "token_start negative": manifest_with(token_start=-1),
    "token_start of a billion": manifest_with(token_start=10**9),
    "k_space missing": manifest_without("k_space"),
    "k_space unknown": manifest_with(k_space="pre_rope"),
    "model_type empty": manifest_with(model_type=""),
    "model_type of 65 characters": manifest_with(model_type="x" * 65),
    "rope_theta zero": manifest_with(rope_theta=0),
    "rope_theta negative": manifest_with(rope_theta=-1.0),
    "fingerprint of another form": manifest_with(base_model={"fingerprint": "sha1:" + "a" * 40}),
    "fingerprint with a newline": manifest_with(
        base_model={"fingerprint": "sha256:" + "a" * 64 + "\n"}
    ),
    "vocab_size zero": manifest_with(base_model={"vocab_size": 0}),
    "temperature 3": manifest_with(generation={"temperature": 3}),
    "top_p zero": manifest_with(generation={"top_p": 0}),
    "five stop strings": manifest_with(generation={"stop": list("abcde")}),
    "empty stop string": manifest_with(generation={"stop": [""]}),
    "max_tokens of a billion": manifest_with(generation={"max_tokens": 10**9}),
    "stop is a string": manifest_with(generation={"stop": "a"}),
    "description of 1025 characters": manifest_with(description="x" * 1025),
    "training is a list": manifest_with(training=[1]),
}

MALFORMED: Final = {
    **NOT_A_FILE_OF_OURS,
    **BROKEN_FRAME,
    **BROKEN_JSON,
    **BROKEN_TENSORS,
    **BROKEN_NAMES,
    **BROKEN_MANIFEST,
}


def for_layers(*layers: tuple[int, int, int]) -> bytes:
    """A valid artifact for another geometry."""
    layout = KVLayout(tuple(LayerLayout(*layer) for layer in layers), "float32")
    return make_artifact(base_with(layout=layout))


def holding(value: float, layer: int = 1, dtype: str = "float32") -> bytes:
    keys, values = random_kv(TINY_BASE, 3, dtype=dtype)
    keys[layer][2, 1, 3] = value
    return encode(manifest_for(TINY_BASE, 3), keys, values)


INCOMPATIBLE: Final[dict[str, bytes]] = {
    "one layer too few": for_layers((2, 4, 4)),
    "one layer too many": for_layers((2, 4, 4), (2, 4, 4), (2, 4, 4)),
    "heads of attention instead of heads of keys": for_layers((8, 4, 4), (8, 4, 4)),
    "one layer with other heads": for_layers((2, 4, 4), (1, 4, 4)),
    "other key dimension": for_layers((2, 8, 4), (2, 8, 4)),
    "other value dimension": for_layers((2, 4, 8), (2, 4, 8)),
    "heads and dimension swapped": for_layers((4, 2, 2), (4, 2, 2)),
    "tensors of differing lengths": reshaped(v1=[4, 2, 4]),
    "heads before tokens": reshaped(k0=[2, 3, 4], v0=[2, 3, 4], k1=[2, 3, 4], v1=[2, 3, 4]),
    "length that the manifest denies": manifest_with(num_virtual_tokens=4),
    "other architecture": make_artifact(model_type="gpt2"),
    "keys without rotation": make_artifact(k_space="none"),
    "other rope_theta": make_artifact(rope_theta=1e6),
    "other fingerprint": make_artifact(base_model={"fingerprint": "sha256:" + "b" * 64}),
    "other vocabulary": make_artifact(base_model={"vocab_size": 99}),
    "start behind the last position": make_artifact(token_start=128),
    "more tokens than positions": make_artifact(num_virtual_tokens=128),
    "more tokens than allowed": make_artifact(num_virtual_tokens=33),
    "NaN": holding(float("nan")),
    "NaN in the first layer": holding(float("nan"), layer=0),
    "infinity": holding(float("inf")),
    "minus infinity in half precision": holding(float("-inf"), dtype="float16"),
    "NaN in bfloat16": holding(float("nan"), dtype="bfloat16"),
    "finite and destructive": holding(1e30),
    "largest float16": holding(-65504.0, dtype="float16"),
}
