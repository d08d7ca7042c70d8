"""Files that are no artifacts, each with a name that says what is wrong with it.

Every entry is a small change to one valid artifact, so that nothing but the named fault can be the reason
for its refusal; or it is a file of another kind (`disguised`).
"""

from __future__ import annotations

import json
from typing import Final

from tests.hostile.bad_manifests import BROKEN_MANIFEST
from tests.hostile.changes import (
    DATA,
    FIRST,
    HEADER_TEXT,
    NAMES,
    T,
    header_with,
    offsets,
    renamed,
    reshaped,
    tensor_with,
    text_with,
    with_length,
    without,
)
from tests.hostile.disguised import DISGUISED, VALID
from tests.prefix_store.builders import framed

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
    "nested 9 deep": text_with(FIRST, "[" * 8 + "]" * 8),
    "nested 9000 objects deep": framed('{"a":' * 9_000 + "0" + "}" * 9_000, DATA),
    "64 KiB of keys": framed(json.dumps({f"k{i}": i for i in range(4400)}), DATA),
    "30000 numbers": text_with(FIRST, "[" + "1," * 30_000 + "1]"),
    "number of a thousand decimals": text_with("[3, 2, 4]", f"[3, 2, 4.{'0' * 1000}]"),
    "integer of 2^53 + 1": text_with("[3, 2, 4]", f"[3, 2, {2**53 + 1}]"),
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
    "dtype F32 with a zero byte": tensor_with(dtype="F32\0"),
    "dtype F4": tensor_with(dtype="F4"),
    "dtype C64": tensor_with(dtype="C64"),
    "dtype of half the size": header_with(
        lambda header: [header[name].update(dtype="F16") for name in NAMES]
    ),
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

MALFORMED: Final = {
    **DISGUISED,
    **BROKEN_FRAME,
    **BROKEN_JSON,
    **BROKEN_TENSORS,
    **BROKEN_NAMES,
    **BROKEN_MANIFEST,
}
