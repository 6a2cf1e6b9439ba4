"""A server on this machine that speaks the chat completions interface and misbehaves as it is told to."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Say:
    """One reply. text: the model's; body: in place of a chat completion; seconds: how long it takes."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0
    drip: bool = False


@dataclass
class Fake:
    """asked: every request's JSON, keys: their Authorization; most: how many were under way at a time."""

    base_url: str
    answer: Callable[[dict[str, Any], int], Say]
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    under_way: int = 0
    most: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(answer: Callable[[dict[str, Any], int], Say]) -> Iterator[Fake]:
    """answer: from the request's JSON and how often its last message was sent before, what to say."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with fake.lock:
                before = sum(one["messages"][1] == request["messages"][1] for one in fake.asked)
                fake.asked.append(request)
                fake.keys.append(self.headers["Authorization"])
                fake.under_way += 1
                fake.most = max(fake.most, fake.under_way)
            try:
                say = fake.answer(request, before)
                time.sleep(0 if say.drip else say.seconds)
            finally:
                with fake.lock:  # before the reply is sent: whoever has it may ask again at once
                    fake.under_way -= 1
            with suppress(BrokenPipeError, ConnectionResetError):
                self._say(say)

        def _say(self, say: Say) -> None:
            choice = {"message": {"role": "assistant", "content": say.text}, "finish_reason": "stop"}
            body = json.dumps({"choices": [choice]}).encode() if say.body is None else say.body
            self.send_response(say.status)
            for name, value in {"Content-Length": str(len(body)), **say.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            for byte in body if say.drip else ():
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(say.seconds)
            if not say.drip:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    fake = Fake(f"http://127.0.0.1:{server.server_address[1]}/v1", answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        server.server_close()
