"""Artifacts whose only fault is in their metadata or manifest, each with a name that says what is wrong."""

from __future__ import annotations

import json
from typing import Final

from tests.hostile.changes import (
    MANIFEST_TEXT,
    NAMES,
    header_with,
    manifest_replacing,
    manifest_text,
    manifest_with,
    manifest_without,
    metadata,
)
from tests.hostile.disguised import VALID
from tests.prefix_store.builders import header_of


def probe(**fields: object) -> bytes:
    """The valid file with a small probe, some of its fields changed."""
    sound = {"input_ids": [1], "top_ids": [1], "top_logprobs": [-1.0]}
    return manifest_with(probe=sound | fields)


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
    "training holds an integer of 5000 digits": manifest_replacing(
        '"training":{}', '"training":{"seed":' + "9" * 5000 + "}"
    ),
    "source nested 9 deep": manifest_with(source={"a": json.loads("[" * 8 + "]" * 8)}),
    "manifest behind a byte order mark": manifest_text("\ufeff" + MANIFEST_TEXT),
    "manifest before a zero byte": manifest_text(MANIFEST_TEXT + "\0"),
    "two manifests": manifest_text(MANIFEST_TEXT * 2),
    "manifest in a manifest": manifest_text(json.dumps(MANIFEST_TEXT)),
    "metadata key in upper case": metadata({"PREFIXD": MANIFEST_TEXT}),
    "metadata key with a space": metadata({"prefixd ": MANIFEST_TEXT}),
    "metadata described as a tensor": metadata(header_of(VALID)[NAMES[0]]),
    "base_model null": manifest_with(base_model=None),
    "base_model a string": manifest_with(base_model="tiny"),
    "base_model.id a number": manifest_with(base_model={"id": 7}),
    "fingerprint in upper case": manifest_with(base_model={"fingerprint": "sha256:" + "A" * 64}),
    "fingerprint one digit short": manifest_with(base_model={"fingerprint": "sha256:" + "a" * 63}),
    "vocab_size fractional": manifest_with(base_model={"vocab_size": 100.0}),
    "k_space a list": manifest_with(k_space=["post_rope"]),
    "model_type null": manifest_with(model_type=None),
    "rope_theta in a string": manifest_with(rope_theta="10000"),
    "rope_theta true": manifest_with(rope_theta=True),
    "token_start fractional": manifest_with(token_start=3.0),
    "token_start in a string": manifest_with(token_start="3"),
    "temperature in a string": manifest_with(generation={"temperature": "NaN"}),
    "temperature negative": manifest_with(generation={"temperature": -0.1}),
    "top_p above one": manifest_with(generation={"top_p": 1.5}),
    "top_k fractional": manifest_with(generation={"top_k": 1.5}),
    "max_tokens zero": manifest_with(generation={"max_tokens": 0}),
    "stop string of 129 characters": manifest_with(generation={"stop": ["x" * 129]}),
    "probe without its fields": manifest_with(probe={}),
    "probe of no tokens": probe(input_ids=[]),
    "probe of 65 tokens": probe(input_ids=[1] * 65),
    "probe with a negative token": probe(input_ids=[-1]),
    "probe with a token in a string": probe(input_ids=["1"]),
    "probe with a token that is true": probe(input_ids=[True]),
    "probe of five thousand tokens": probe(input_ids=["x"] * 5_000),
    "probe with a probability above one": probe(top_logprobs=[0.5]),
    "probe with a probability of NaN": manifest_replacing(
        '"probe":null', '"probe":{"input_ids":[1],"top_ids":[1],"top_logprobs":[NaN]}'
    ),
    "probe with fewer probabilities than tokens": probe(top_ids=[1, 2]),
    "probe with a token twice": probe(top_ids=[1, 1], top_logprobs=[-1.0, -1.0]),
    "probe with 33 tops": probe(top_ids=list(range(33)), top_logprobs=[-1.0] * 33),
    "probe that tolerates anything": probe(tolerance=1e9),
    "probe that tolerates nothing": probe(tolerance=0),
    "probe with an unknown field": probe(code="evil"),
    "twenty thousand stops": manifest_with(generation={"stop": [1] * 20_000}),
    "sampling value that nobody knows": manifest_with(generation={"logit_bias": {"1": 100}}),
    "description a list": manifest_with(description=["x"]),
    "three thousand unknown fields": manifest_with(**{f"field{i}": 0 for i in range(3000)}),
}
