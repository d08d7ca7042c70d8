"""URLs as people write them."""

from __future__ import annotations

import pytest

from loadtest.errors import BadLoad
from loadtest.wire import Origin


@pytest.mark.parametrize(
    ("url", "host", "port", "base"),
    [
        ("http://127.0.0.1:8000", "127.0.0.1", 8000, "http://127.0.0.1:8000"),
        ("http://127.0.0.1:8000/", "127.0.0.1", 8000, "http://127.0.0.1:8000"),
        ("http://gate/behind/it/", "gate", 80, "http://gate/behind/it"),
        ("https://gate.example", "gate.example", 443, "https://gate.example"),
        ("http://[::1]:81", "::1", 81, "http://[::1]:81"),
    ],
)
def test_a_url_may_have_a_path_and_a_slash_at_its_end(
    url: str, host: str, port: int, base: str
) -> None:
    origin = Origin.of(url)

    assert (origin.host, origin.port, origin.url) == (host, port, base)
    assert origin.tls is url.startswith("https")


@pytest.mark.parametrize(
    "url",
    ["127.0.0.1:8000", "ftp://gate", "http://", "http://gate:port", "http://a?b", "http://me@gate"],
)
def test_what_is_no_base_url_is_refused_by_name(url: str) -> None:
    with pytest.raises(BadLoad, match=r"expected a URL|Port could not"):
        Origin.of(url)


def test_a_request_is_whole() -> None:
    request = Origin.of("http://gate:81/x").post("/generate", {"a": "b"}, b"{}")

    head, _, body = request.partition(b"\r\n\r\n")
    assert body == b"{}"
    assert head.split(b"\r\n") == [
        b"POST /x/generate HTTP/1.1",
        b"host: gate:81",
        b"content-type: application/json",
        b"content-length: 2",
        b"a: b",
    ]
