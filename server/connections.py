"""uvicorn's HTTP/1.1 protocol with the deadlines and bounds that it does not have. On the event loop; used by `server.process`.

Before anyone is asked for a key, a stranger may hold a connection only so long and make it remember only so much:

* a request's head must be there `HEAD_SECONDS` after its first byte, or after the connection was made (408, or closed), and
  be no larger than `MAX_HEAD_BYTES` (431);
* what belongs to no body (chunk sizes, trailers) is bounded by what does;
* a body that nobody waits for any more, because its request is answered, may go on for `REST_SECONDS`;
* a peer that takes nothing, or next to it, of what is written to it is cut after `STALL_SECONDS`, also while a connection closes.

Bodies that are read have deadlines of their own: `server.http.json_body`, `server.http.admin_upload`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
from typing import Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

HEAD_SECONDS: Final = 10.0
REST_SECONDS: Final = 10.0
STALL_SECONDS: Final = 30.0
LINGER_SECONDS: Final = 1.0
MAX_HEAD_BYTES: Final = 16 * 1024
MAX_NUM_HEADERS: Final = 100
_FRAMING_PER_BODY_BYTE: Final = 16
"""A chunk of one byte has five or six of framing."""
MIN_TAKEN_BYTES: Final = 16 * 1024
"""Of a large answer, in each `STALL_SECONDS`: who takes a byte now and then takes nothing."""
UNSENT_BYTES: Final = 64 * 1024
"""What the kernel takes of an answer before the peer has room for it; it would take megabytes."""


class _Refused(Exception):
    """The request is answered here, with this status, and the connection closed."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class GuardedProtocol(HttpToolsProtocol):
    """One connection. Invariant: while it waits for its peer, in either direction, a timer runs."""

    _head_timer: asyncio.TimerHandle | None = None
    _rest_timer: asyncio.TimerHandle | None = None
    _stall_timer: asyncio.TimerHandle | None = None
    _place: str = "between"  # requests; or in the "head" or the "body" of one
    _head_bytes = 0
    _num_headers = 0
    _framing_bytes = 0  # received, and no body's
    _body_bytes = 0
    _refused: _Refused | None = None

    # ---- life ----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # uvicorn's own signature is narrower than its base's
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            with contextlib.suppress(OSError):  # not every kernel has them; the timers do without
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, UNSENT_BYTES)
                connection.setsockopt(
                    socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(STALL_SECONDS * 1000)
                )
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._head_timer, self._rest_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()
        self._unset_keepalive_if_required()  # uvicorn keeps it if the connection broke
        super().connection_lost(exc)

    # ---- what comes ----------------------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        if self._refused is not None:
            return  # the parser is in no state to be fed, and the connection is closing
        if self._place == "between":
            self._expect_head()
        self._framing_bytes += len(data)
        super().data_received(data)
        if self._framing_bytes > MAX_HEAD_BYTES + _FRAMING_PER_BODY_BYTE * self._body_bytes:
            self._refuse(_too_large())

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._place = "head"
        self._head_bytes = self._num_headers = 0
        self._expect_head()

    def on_url(self, url: bytes) -> None:
        self._count_head(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._num_headers += 1
        self._count_head(len(name) + len(value))
        if self._place == "head":  # else it is a trailer: it comes too late to say anything
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._place = "body"
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._framing_bytes -= len(body)
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._place = "between"
        self._framing_bytes = self._body_bytes = 0
        if self._rest_timer is not None:
            self._rest_timer.cancel()
            self._rest_timer = None
        super().on_message_complete()

    def _count_head(self, num_bytes: int) -> None:
        self._head_bytes += num_bytes
        if self._head_bytes > MAX_HEAD_BYTES or self._num_headers > MAX_NUM_HEADERS:
            raise _too_large()  # out of the parser, to `send_400_response`

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_timer = None
        if self.cycle is not None and not self.cycle.response_complete:
            # It sends the next request before it has its answer. That one is owed to it.
            if self._place == "head":
                self._expect_head()
        elif self._place == "head":
            seconds = f"{HEAD_SECONDS:.0f} seconds"
            self._refuse(
                _Refused(408, "head_too_slow", f"the headers did not arrive within {seconds}")
            )
        else:
            self.transport.close()

    def _refuse(self, refused: _Refused) -> None:
        if self._refused is None and not self.transport.is_closing():
            self._refused = refused
            if self._is_answering():
                self.transport.abort()  # a second answer amid the first would only confuse
            else:
                self._answer(refused)

    def _is_answering(self) -> bool:
        cycle = self.cycle
        started = cycle is not None and cycle.response_started and not cycle.response_complete
        return started or bool(self.pipeline)

    def send_400_response(self, msg: str) -> None:
        """uvicorn's way out for what its parser refuses; the cause may be ours."""
        # uvicorn is handling it just now, and the parser wraps what a callback raised.
        error = sys.exception()
        cause = None if error is None else error.__context__
        self._refuse(cause if isinstance(cause, _Refused) else _Refused(400, "bad_request", msg))

    def _answer(self, refused: _Refused) -> None:
        """One whole answer, in the words of OpenAI's errors, as all others are."""
        error = {
            "message": str(refused),
            "type": "invalid_request_error",
            "param": None,
            "code": refused.code,
        }
        body = json.dumps({"error": error}).encode()
        head = (
            b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n\r\n"
            % len(body)
        )
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.disconnected = True  # its handler must not add another answer
            self.cycle.message_event.set()
        self.transport.write(STATUS_LINE[refused.status] + head + body)
        # A peer that is still sending would be reset, and lose the answer, if this side closed at once.
        self.transport.write_eof()
        self._rest_timer = self.loop.call_later(LINGER_SECONDS, self._close)

    # ---- what goes -----------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        super().on_response_complete()
        answered = self.cycle.response_complete  # else it was one before, of several sent at once
        if answered and self.cycle.more_body and self._rest_timer is None:
            self._rest_timer = self.loop.call_later(REST_SECONDS, self._close)
        self._watch_writing()  # it may be closing, and would wait for its peer as long as that likes

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._watch_writing()

    def shutdown(self) -> None:
        super().shutdown()
        self._watch_writing()

    def _close(self) -> None:
        self.transport.close()
        self._watch_writing()

    def _watch_writing(self) -> None:
        if self._stall_timer is None and (left := self.transport.get_write_buffer_size()):
            self._stall_timer = self.loop.call_later(STALL_SECONDS, self._cut_if_stalled, left)

    def _cut_if_stalled(self, left_before: int) -> None:
        """Cuts a peer that somebody waits for and that took too little meanwhile."""
        self._stall_timer = None
        taken = left_before - self.transport.get_write_buffer_size()
        is_waited_for = self.flow.write_paused or self.transport.is_closing()
        if is_waited_for and taken < min(left_before, MIN_TAKEN_BYTES):
            self.transport.abort()
        else:
            self._watch_writing()


def _too_large() -> _Refused:
    return _Refused(
        431,
        "head_too_large",
        f"the headers are more than {MAX_NUM_HEADERS}, or larger than {MAX_HEAD_BYTES} bytes",
    )
