"""What an upload can be used for, one row after the other, and what the server does about it.

    1   no or a wrong length, a flood        11  NaN and infinity
    2   a body that never ends               12  finite and destructive values
    3   a full disk                          13  subnormal values
    4   a header that claims too much        14  overflow inside of attention
    5   JSON that reads in two ways          15  a body that was cut off or changed
    6   unexpected tensors and fields        16  files that change under their reader, links, mapping
    7   offsets that overlap, gap, overflow  17  a file that is also something else
    8   dtypes that we do not serve          18  uploads of one name at once
    9   another geometry                     19  a retry after a lost answer
    10  another model of the same geometry   20  a version that changes, or goes while it is read

Where this differs from the usual advice, on purpose:

* row 1: an upload without a length is taken, as `curl -T -` sends it, and counted; it is not answered 411. A
  length is compared with the largest artifact, not with all sizes that one can have;
* row 3: the room on the disk is not asked for before: what is written there besides can take it meanwhile, so the
  failing write decides. It is undone at once;
* row 14: no probe runs through the model before an upload is accepted. A row of logits that is not finite fails
  its own request, and those beside it are as they were (`test_over_http`, where a model is at hand);
* row 19: there is no `Idempotency-Key`. The same bytes are the same version.

Not here, because the server has one tenant so far: quotas and slots per tenant (rows 2 and 21), and that equal
bytes of two tenants must not tell one of the other (row 22).
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
import uvicorn
from starlette.testclient import TestClient

from prefix_store.artifact import encode
from prefix_store.backends import durable_files
from prefix_store.backends.filesystem import FilesystemBackend
from prefix_store.store import PrefixStore
from server.http import admin_upload, admin_write
from server.http.app import create_app
from server.http.services import Services
from tests.hostile.incompatible import INCOMPATIBLE
from tests.hostile.malformed import MALFORMED
from tests.hostile.originals import BASE, LIMITS
from tests.prefix_store.builders import base_with, make_artifact, manifest_for, random_kv
from tests.server.http.fakes import ADMIN, ADMIN_KEY, FakeEngine, make_services

TASK: Final = "/admin/v1/tasks/task"
VALID: Final = make_artifact()


@pytest.fixture
def store(tmp_path: Path) -> Iterator[PrefixStore]:
    store = PrefixStore(FilesystemBackend(tmp_path), BASE, LIMITS, host_cache_bytes=0)
    yield store
    store.close()


@pytest.fixture
def services(store: PrefixStore) -> Services:
    return make_services(FakeEngine(), store=store)


@pytest.fixture
def client(services: Services) -> Iterator[TestClient]:
    with TestClient(create_app(services)) as client:  # one event loop for all requests
        yield client


def files(root: Path) -> list[str]:
    """Everything in the store but its lock."""
    names = (str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    return sorted(set(names) - {"lock"})


def put(client: TestClient, data: Any, **headers: str) -> Any:
    return client.put(TASK, content=data, headers=ADMIN | headers)


# ---- rows 1 and 2: the body ------------------------------------------------------------------------


@contextlib.contextmanager
def listening(services: Services) -> Iterator[int]:
    """The app behind a real HTTP parser; the port."""
    config = uvicorn.Config(create_app(services), log_config=None, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


def spoken(port: int, *headers: str, body: bytes | Callable[[socket.socket], object]) -> bytes:
    """All that the server says to a PUT with these headers until it closes, or has nothing more to say."""
    lines = (f"PUT {TASK} HTTP/1.1", "Host: x", f"Authorization: Bearer {ADMIN_KEY}", *headers)
    head = "".join(f"{line}\r\n" for line in (*lines, "")).encode()
    answer = b""
    with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        connection.sendall(head)
        with contextlib.suppress(ConnectionError):
            body(connection) if callable(body) else connection.sendall(body)
        with contextlib.suppress(TimeoutError, ConnectionError):
            while more := connection.recv(65536):
                answer += more
    return answer


def test_row_1_an_announced_length_that_is_too_large_is_refused_unread(services: Services) -> None:
    with listening(services) as port:
        answer = spoken(port, f"Content-Length: {2**40}", body=b"")
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert b"connection: close" in answer.lower()


def test_row_1_a_chunked_flood_is_cut_off(services: Services, tmp_path: Path) -> None:
    limit = services.store.max_artifact_bytes
    sent = 0

    def flood(connection: socket.socket) -> None:
        nonlocal sent
        while sent < 1000 * limit:
            connection.sendall(b"10000\r\n" + bytes(2**16) + b"\r\n")
            sent += 2**16

    with listening(services) as port:
        answer = spoken(port, "Transfer-Encoding: chunked", body=flood)
    assert sent < 500 * limit
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413 ")  # a reset may overtake it
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("headers", "statuses"),
    [
        ([], {b"400"}),
        ([f"Content-Length: {len(VALID) - 1}"], {b"400"}),
        (["Content-Length: -1"], {b"400"}),
        (["Content-Length: 0x200"], {b"400"}),
        (["Content-Length: " + "9" * 5000], {b"400", b"413"}),
        ([f"Content-Length: {len(VALID)}", "Content-Length: 5"], {b"400"}),
        ([f"Content-Length: {len(VALID)}", "Transfer-Encoding: chunked"], {b"400"}),
        (["Transfer-Encoding: gzip"], {b"400"}),
    ],
)
def test_row_1_a_body_is_what_its_length_says_or_is_refused(
    services: Services, tmp_path: Path, headers: list[str], statuses: set[bytes]
) -> None:
    with listening(services) as port:
        answer = spoken(port, *headers, body=VALID)
    assert answer.split(b" ")[1] in statuses, answer
    assert services.store.tasks() == []


def test_row_1_what_follows_the_announced_length_is_no_part_of_the_upload(
    services: Services,
) -> None:
    """It is a request of its own, and no good one; that may end the connection before the first is answered."""
    with listening(services) as port:
        answer = spoken(port, f"Content-Length: {len(VALID)}", body=VALID + b"\0" * 100)
    assert answer.count(b"HTTP/1.1 2") <= 1
    for info in services.store.tasks():
        assert [version.size_bytes for version in info.versions] == [len(VALID)]


async def answered(services: Services, receive: Callable[[], Awaitable[Any]]) -> int:
    """The status of an upload whose body comes from `receive`; raises if it takes more than five seconds."""
    sent: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(name.encode(), value.encode()) for name, value in ADMIN.items()]
    scope = {
        "type": "http",
        "method": "PUT",
        "path": TASK,
        "query_string": b"",
        "headers": headers,
    }
    app: Any = create_app(services)
    async with asyncio.timeout(5):
        await app(scope, receive, send)
    status: int = sent[0]["status"]
    return status


def test_row_2_a_body_that_stalls_is_408(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_upload, "STALL_SECONDS", 0.1)

    async def never() -> Any:
        await asyncio.Event().wait()

    assert asyncio.run(answered(services, never)) == 408
    assert files(tmp_path) == []


def test_row_2_a_body_that_drips_is_408(
    services: Services, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A byte now and then stalls never, and would hold its file and connection for days."""
    monkeypatch.setattr(admin_upload, "STALL_SECONDS", 0.3)

    async def drip() -> Any:
        await asyncio.sleep(0.02)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert asyncio.run(answered(services, drip)) == 408
    assert files(tmp_path) == []


def test_row_2_a_slow_and_steady_body_is_taken(
    services: Services, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admin_upload, "STALL_SECONDS", 0.3)
    monkeypatch.setattr(admin_upload, "MIN_BYTES_PER_SECOND", 500)
    pieces = [VALID[start : start + 50] for start in range(0, len(VALID), 50)]

    async def trickle() -> Any:
        await asyncio.sleep(0.03)
        body = pieces.pop(0)
        return {"type": "http.request", "body": body, "more_body": bool(pieces)}

    assert asyncio.run(answered(services, trickle)) == 201


def test_no_encoding_is_unfolded(client: TestClient) -> None:
    for encoding in ("gzip", "deflate", "br", "zstd", "identity, gzip", "x-unknown"):
        assert put(client, VALID, **{"content-encoding": encoding}).status_code == 415
    assert put(client, VALID, **{"content-encoding": "identity"}).status_code == 201


# ---- row 3: the disk -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status"), [(errno.ENOSPC, 507), (errno.EDQUOT, 507), (errno.EIO, 500)]
)
def test_row_3_a_disk_without_room_keeps_nothing_and_serves_on(
    client: TestClient,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    status: int,
) -> None:
    assert put(client, VALID).status_code == 201
    before = files(tmp_path)
    with monkeypatch.context() as patch:

        def half(fd: int, data: bytes) -> None:
            os.write(fd, bytes(data[: len(data) // 2]))
            raise OSError(code, "injected")

        patch.setattr(durable_files, "write_all", half)
        response = put(client, make_artifact(seed=1))
    assert response.status_code == status
    assert response.headers.get("connection") == ("close" if status == 507 else None)
    assert files(tmp_path) == before
    use = client.post("/v1/completions", json={"model": "task", "prompt": "x"})
    assert use.json()["prefixd"]["version"] == 1


# ---- rows 4 to 12 and 17: the file -----------------------------------------------------------------

FILES: Final[dict[int, tuple[int, list[str]]]] = {
    4: (400, ["header length of 2^64-1", "header length beyond 64 KiB", "header length beyond the file"]),
    5: (
        400,
        [
            *("duplicate tensor", "duplicate dtype", "duplicate metadata", "duplicate manifest key"),
            *("manifest has a duplicate field deep inside", "NaN in a shape", "number 1e999"),
            *("integer of 5000 digits", "nested 30000 deep", "byte order mark", "leading space"),
            *("two objects", "newlines as padding", "payload in the padding"),
        ],
    ),
    6: (
        400,
        [
            *("unknown tensor", "path as a name", "zero byte in a name", "thousands of tensors"),
            *("extra field", "extra metadata key", "unknown manifest field", "no tensors"),
        ],
    ),
    7: (
        400,
        [
            *("overlapping tensors", "gap before the data", "tensors out of order", "no tokens"),
            *("shape whose product wraps to the right size", "huge and empty", "negative offset"),
            *("one byte behind the data", "offsets near 2^53"),
        ],
    ),
    8: (400, ["dtype F8_E4M3", "dtype I8", "dtype BOOL", "dtype C64", "dtype F4", "mixed dtypes"]),
    9: (
        422,
        [
            *("heads of attention instead of heads of keys", "heads before tokens", "one layer too few"),
            *("heads and dimension swapped", "keys without rotation", "other rope_theta"),
        ],
    ),
    10: (422, ["other fingerprint", "other vocabulary", "other architecture"]),
    11: (422, ["NaN", "infinity", "NaN in bfloat16", "minus infinity in half precision"]),
    12: (422, ["finite and destructive", "largest float16"]),
    17: (400, ["zip behind the data", "artifact with a whole zip behind it", "artifact twice"]),
}  # fmt: skip


@pytest.mark.parametrize("row", FILES)
def test_rows_4_to_12_and_17_a_file_with_a_fault_is_refused(
    client: TestClient, tmp_path: Path, row: int
) -> None:
    status, names = FILES[row]
    for name in names:
        response = put(client, {**MALFORMED, **INCOMPATIBLE}[name])
        assert response.status_code == status, name
        assert response.json()["errors"]
    assert files(tmp_path) == []


def test_row_10_a_prefix_of_no_known_base_is_served_with_a_warning(client: TestClient) -> None:
    [warning] = put(client, make_artifact(base_model={})).json()["warnings"]
    assert warning.startswith("unverified base")


def test_row_12_what_overflows_only_as_it_is_served_is_refused(tmp_path: Path) -> None:
    limits = type(LIMITS)(max_abs_value=1e6)
    half = base_with(dtype="float16")
    store = PrefixStore(FilesystemBackend(tmp_path), half, limits, host_cache_bytes=0)
    client = TestClient(create_app(make_services(FakeEngine(), store=store)))
    keys, values = random_kv(BASE, 3)
    keys[0][0, 0, 0] = 7e4
    response = put(client, encoded(keys, values))
    assert response.status_code == 422
    assert "overflows float16" in response.json()["detail"]
    store.close()


def test_row_13_subnormal_values_are_stored_and_warned_of(client: TestClient) -> None:
    keys, values = random_kv(BASE, 3)
    keys[0][:] = 1e-40
    response = put(client, encoded(keys, values))
    assert response.status_code == 201
    assert response.json()["warnings"] == [
        "25% of the values are subnormal in float32: a CPU can compute many times slower with them"
    ]


def encoded(keys: Any, values: Any) -> bytes:
    return encode(manifest_for(BASE, 3), keys, values)


# ---- rows 15 and 16: the bytes ---------------------------------------------------------------------


def digest_header(data: bytes) -> dict[str, str]:
    value = base64.b64encode(hashlib.sha256(data).digest()).decode()
    return {"content-digest": f"sha-256=:{value}:"}


def test_row_15_bytes_that_were_not_announced_are_refused(client: TestClient) -> None:
    response = put(client, VALID, **digest_header(VALID + b"x"))
    assert (response.status_code, response.json()["code"]) == (400, "digest_mismatch")
    assert put(client, VALID, **digest_header(VALID)).status_code == 201


def test_row_15_a_body_that_is_cut_off_leaves_nothing(services: Services, tmp_path: Path) -> None:
    def leave(connection: socket.socket) -> None:
        connection.sendall(VALID[:500])
        connection.shutdown(socket.SHUT_WR)

    with listening(services) as port:
        spoken(port, f"Content-Length: {len(VALID)}", body=leave)
    assert files(tmp_path) == []


def test_row_16_a_staged_file_that_changes_is_noticed(
    client: TestClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = make_artifact(seed=1)

    def meddle(request: Any) -> Any:
        [staged] = (tmp_path / "tmp").iterdir()
        staged.write_bytes(other)
        return admin_write.proving_slot(request)

    monkeypatch.setattr("server.http.admin_upload.proving_slot", meddle)
    response = put(client, VALID)
    assert (response.status_code, response.json()["code"]) == (500, "store_failed")
    assert files(tmp_path) == []


def test_row_16_a_link_in_the_place_of_a_blob_is_not_followed(
    client: TestClient, store: PrefixStore, tmp_path: Path
) -> None:
    name = hashlib.sha256(VALID).hexdigest()
    target = tmp_path / "outside"
    target.write_bytes(b"precious")
    (tmp_path / "blobs" / name[:2]).mkdir(parents=True)
    (tmp_path / "blobs" / name[:2] / name).symlink_to(target)

    assert put(client, VALID).status_code == 201

    assert target.read_bytes() == b"precious"
    assert store.load(f"sha256:{name}").prefix.digest == f"sha256:{name}"
    assert not (tmp_path / "blobs" / name[:2] / name).is_symlink()


def test_row_16_what_is_loaded_does_not_follow_its_file(store: PrefixStore, tmp_path: Path) -> None:
    digest = store.put("task", VALID).version.digest
    prefix = store.load(digest).prefix
    before = [tensor.clone() for tensor in (*prefix.keys, *prefix.values)]
    [blob] = (tmp_path / "blobs").rglob("?" * 64)
    blob.write_bytes(b"")  # under a mapping this would be a SIGBUS
    assert all(
        bool((a == b).all()) for a, b in zip(before, (*prefix.keys, *prefix.values), strict=True)
    )


def test_row_16_nobody_else_can_read_or_write_the_store(client: TestClient, tmp_path: Path) -> None:
    put(client, VALID)
    for path in tmp_path.rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


# ---- rows 18 to 20: versions -----------------------------------------------------------------------


def test_row_18_of_many_first_uploads_at_once_one_wins(client: TestClient) -> None:
    def upload(seed: int) -> int:
        return int(put(client, make_artifact(seed=seed), **{"if-none-match": "*"}).status_code)

    with ThreadPoolExecutor(8) as pool:
        statuses = sorted(pool.map(upload, range(8)))
    assert statuses == [201] + [412] * 7


def test_row_18_unconditional_uploads_at_once_all_become_versions(
    client: TestClient, store: PrefixStore
) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda seed: put(client, make_artifact(seed=seed)).json(), range(8))
        )
    assert sorted(answer["version"] for answer in answers) == [*range(1, 9)]
    for answer in answers:
        assert store.resolve(f"task@v{answer['version']}").digest == answer["digest"]


def test_row_19_a_retry_after_a_lost_answer_makes_no_second_version(client: TestClient) -> None:
    first, again = put(client, VALID), put(client, VALID)
    assert (first.status_code, again.status_code) == (201, 200)
    assert again.json()["created"] is False
    assert again.json()["version"] == first.json()["version"]


def test_row_20_a_version_never_changes_and_its_number_is_never_given_again(
    client: TestClient, store: PrefixStore
) -> None:
    first = put(client, VALID).json()
    put(client, make_artifact(seed=1))
    assert store.resolve("task@v1").digest == first["digest"]
    assert client.delete(TASK, headers=ADMIN).status_code == 204
    assert put(client, make_artifact(seed=2)).json()["version"] == 3
    gone = client.post("/v1/completions", json={"model": "task@v1", "prompt": "x"})
    assert gone.status_code == 404


def test_row_20_a_deletion_leaves_the_bytes_to_those_who_read_them(
    client: TestClient, store: PrefixStore
) -> None:
    put(client, VALID)
    version = store.resolve("task")
    store.hold(version)
    assert client.delete(TASK, headers=ADMIN).status_code == 204
    assert store.load(version.digest).prefix.digest == version.digest
    assert store.release(version.digest)
    assert store.free(version.digest)
    assert store.stats().disk_entries == 0
