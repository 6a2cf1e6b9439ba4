"""Endpoints that never come to an end: one time limit holds for a whole call, whatever trickles in."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from whet.base.errors import UserError
from whet.data.example import Example, Message
from whet.data.judge.endpoint import Endpoint
from whet.data.judge.judge import verdicts

LIMIT_SECONDS = 0.6
DROP_SECONDS = 0.05
NEVER_SECONDS = (
    60.0  # without a limit no reply is over earlier, and a busy machine has this long to see that the time is
)
BODY = b'{"choices": []}' + b" " * int(NEVER_SECONDS / DROP_SECONDS)
Talk = Callable[[Callable[[bytes], None]], None]


def trickle(send: Callable[[bytes], None], part: bytes) -> None:
    while True:
        send(part)
        time.sleep(DROP_SECONDS)


def endless_continue(send: Callable[[bytes], None]) -> None:
    trickle(send, b"HTTP/1.1 100 Continue\r\n\r\n")


def endless_headers(send: Callable[[bytes], None]) -> None:
    send(b"HTTP/1.1 200 OK\r\n")
    trickle(send, b"X-More: a\r\n")


def a_header_without_an_end(send: Callable[[bytes], None]) -> None:
    send(b"HTTP/1.1 200 OK\r\nX: ")
    trickle(send, b"a")


def a_body_drop_by_drop(send: Callable[[bytes], None]) -> None:
    send(f"HTTP/1.1 200 OK\r\nContent-Length: {len(BODY)}\r\n\r\n".encode())
    for byte in BODY:
        send(bytes([byte]))
        time.sleep(DROP_SECONDS)


def a_body_drop_by_drop_without_keep_alive(send: Callable[[bytes], None]) -> None:
    send(f"HTTP/1.0 200 OK\r\nConnection: close\r\nContent-Length: {len(BODY)}\r\n\r\n".encode())
    for byte in BODY:
        send(bytes([byte]))
        time.sleep(DROP_SECONDS)


def an_endless_refusal(send: Callable[[bytes], None]) -> None:
    send(b"HTTP/1.1 429 Too Many Requests\r\nConnection: close\r\n\r\n")
    trickle(send, b"busy " * 100)


def silence(send: Callable[[bytes], None]) -> None:
    time.sleep(NEVER_SECONDS)


@contextmanager
def serving(talk: Talk) -> Iterator[str]:
    """The address of a server that answers every call with `talk`."""
    server = socket.create_server(("127.0.0.1", 0))

    def answer(line: socket.socket) -> None:
        with line, suppress(OSError):
            line.recv(1 << 16)
            talk(line.sendall)

    def accept() -> None:
        with suppress(OSError):
            while True:
                threading.Thread(target=answer, args=(server.accept()[0],), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
    finally:
        server.close()


@pytest.mark.parametrize("talk", [
    endless_continue, endless_headers, a_header_without_an_end, a_body_drop_by_drop,
    a_body_drop_by_drop_without_keep_alive, an_endless_refusal, silence,
], ids=lambda talk: talk.__name__)  # fmt: skip
def test_a_call_ends_when_its_time_is_over(talk: Talk, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    row = Example("1" * 16, (Message("user", "q"), Message("assistant", "a")), None, "f.jsonl", 1)
    began = time.monotonic()
    with serving(talk) as url:
        asked = Endpoint(base_url=url, model="m", timeout_seconds=LIMIT_SECONDS, attempts=1)
        with pytest.raises(UserError) as refused:
            list(verdicts([row], asked, tmp_path / "replies.jsonl"))
    assert refused.value.field == "base_url"
    assert time.monotonic() - began < NEVER_SECONDS / 2
