"""Ask questions at an OpenAI-compatible endpoint, each once: of a judge of the rows, or a writer of paraphrases.

Plain HTTP from the standard library, no client package and no redirects, which would carry the key to another host.
The key is read from the environment variable that the recipe names; it is in no file, message or record of whet.
Every good reply is appended to a JSONL file under the hash of model, temperature and the whole prompt, so that a
second run asks nothing again and a killed one goes on where it was. Replies are stored as they came and are checked
again when they are read back: the file cannot say what the model did not.

A busy or failing server is asked again after a growing pause; one that stays so ends the run with a `UserError`, and so
does, at once, an address where no server answered yet.
A reply that does not keep to the form is asked for once more; after that only its row is without one (`Reply.problem`).
Gives up: proxies, streaming and batch interfaces.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import math
import os
import random
import socket
import ssl
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from annotated_types import Ge, Gt

from whet.base.config import config, setting
from whet.base.console import say
from whet.base.errors import UserError, shorten
from whet.base.network import is_offline
from whet.data.detect.personal import find, redact
from whet.data.judge.replies import Replies, StoredReply

MOST_BYTES, MOST_BYTES_OF_ERRORS = 4 << 20, 64 << 10
SECRET = "[SECRET]"
LONGEST_PAUSE_SECONDS = 60.0
ASKED_AGAIN = 2  # times that a reply of the wrong form is asked for
ALL_BAD = 10  # so many bad replies and no good one: the model does not do what it is asked


@config
class Endpoint:
    """An endpoint that answers questions."""

    base_url: str = setting("", "Such as https://api.example.com/v1 or http://127.0.0.1:8000/v1.")
    model: str = setting("", "The model's name at the endpoint.")
    api_key_env: str | None = setting(None, "Environment variable that holds the key; auto = no key.")
    temperature: Annotated[float, Ge(0)] = setting(0.0, "Sampling temperature.")
    timeout_seconds: Annotated[float, Gt(0)] = setting(60.0, "For one whole reply.")
    attempts: Annotated[int, Ge(1)] = setting(6, "How often a busy or failing server is asked.")
    concurrency: Annotated[int, Ge(1)] = setting(4, "Questions on their way at a time.")
    pause_seconds: Annotated[float, Ge(0)] = setting(1.0, "Before the second attempt; doubled before each other one.")


PromptMessage = dict[str, str]


class BadReply(Exception):
    """A reply that does not keep to the form that was asked for."""


class _Refused(BadReply):
    """A question that the server will not take, however often it is asked, such as too long a row."""


class _Busy(Exception):
    """A failure that is worth another attempt. args: the problem, seconds that the server asks to wait or None."""


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt and the form of its reply. parse: reads the value of a reply's text; raises BadReply for any other
    form."""

    messages: tuple[PromptMessage, ...]
    parse: Callable[[str], Any]

    def sha256(self, endpoint: Endpoint) -> str:
        """The hash of all that decides the reply, 64 hex digits."""
        parts = [endpoint.model, endpoint.temperature, list(self.messages)]
        return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Reply:
    """The reply to one question. value: the result of `parse`, None when there is a `problem`; cached: it was not asked
    for in this run.

    endpoint, date: its source and time, as in `replies.StoredReply`; "" when there is a problem.
    """

    value: Any
    problem: str
    cached: bool
    prompt_sha256: str
    endpoint: str = ""
    date: str = ""


def ask_all(questions: Iterable[Question], endpoint: Endpoint, cache: Path) -> Iterator[Reply]:
    """A reply for each question, in order; at most twice `concurrency` questions are held at a time.

    Raises UserError for an endpoint that cannot be used, and offline as soon as something has to be asked.
    """
    stop = threading.Event()
    waiting: deque[Future[Reply] | Reply] = deque()
    under_way: dict[str, Future[Reply]] = {}
    bad = good = kept = 0
    with Replies(cache) as replies, ThreadPoolExecutor(endpoint.concurrency) as pool:
        try:
            client: _Client | None = None
            source = iter(questions)
            question = next(source, None)
            while question is not None or waiting:
                while question is not None and len(waiting) < 2 * endpoint.concurrency:
                    key = question.sha256(endpoint)
                    stored = _from_store(replies.get(key), question, key)
                    if stored is None and key not in under_way:
                        client = client or _Client(endpoint, stop)
                        under_way[key] = pool.submit(client.answer, question, key, replies)
                    waiting.append(stored or under_way[key])
                    question = next(source, None)
                first = waiting.popleft()
                reply = first if isinstance(first, Reply) else first.result()
                under_way.pop(reply.prompt_sha256, None)
                kept += reply.cached
                good, bad = good + (not reply.problem), bad + bool(reply.problem)
                if bad >= ALL_BAD and not good:
                    raise UserError(
                        f"the first {bad} replies are all unusable", "choose a model that keeps to a JSON form",
                        field="model", found=f"{endpoint.model}: {reply.problem}",
                    )  # fmt: skip
                yield reply
            if kept:
                say(f"{kept:,} replies were kept in {cache} and are not asked for again", style="dim")
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)


def _from_store(stored: StoredReply | None, question: Question, key: str) -> Reply | None:
    if stored is None:
        return None
    try:
        return Reply(question.parse(stored.text), "", True, key, stored.endpoint, stored.date)
    except BadReply:
        return None


class _Client:
    """One endpoint with its key; `answer` may run in several threads."""

    def __init__(self, endpoint: Endpoint, stop: threading.Event) -> None:
        self.endpoint, self.stop = endpoint, stop
        self.url = _checked(endpoint)
        self.key = _key(endpoint)
        self.answered = False
        loopback = self.url.hostname in ("localhost", "127.0.0.1", "::1")
        if self.key and self.url.scheme == "http" and not loopback:
            raise UserError(
                "the key would be sent in the clear", "use https, or remove api_key_env", field="base_url",
                found=endpoint.base_url, expected="https:// or this machine",
            )  # fmt: skip

    def answer(self, question: Question, key: str, replies: Replies) -> Reply:
        """Ask until the reply keeps to the form, at most `ASKED_AGAIN` times."""
        problem = ""
        for turn in range(ASKED_AGAIN):
            messages = list(question.messages)
            if turn:
                messages.append({"role": "user", "content": f"That could not be used: {problem}. Give the JSON alone."})
            try:
                text = self._patiently(messages)
                value = question.parse(text)
            except _Refused as error:
                return Reply(None, str(error), False, key)
            except BadReply as error:
                problem = str(error)
                continue
            stored = replies.put(key, self.endpoint.model, self.url.netloc, text)
            return Reply(value, "", False, key, stored.endpoint, stored.date)
        return Reply(None, problem, False, key)

    def _patiently(self, messages: list[PromptMessage]) -> str:
        """The text of a reply, after further attempts if the server is busy or fails for a while."""
        last = ""
        for attempt in range(self.endpoint.attempts):
            if self.stop.is_set():
                break
            try:
                return self._once(messages)
            except _Busy as busy:
                last, asked = busy.args
                pause = asked or self.endpoint.pause_seconds * 2**attempt * (1 + random.random() / 4)
                if attempt + 1 < self.endpoint.attempts:
                    self.stop.wait(min(pause, LONGEST_PAUSE_SECONDS))
        raise UserError(
            "the endpoint does not answer", "run the same command again later: nothing is asked twice",
            field="base_url", found=f"{self.endpoint.base_url}: {last}",
        )  # fmt: skip

    def _once(self, messages: list[PromptMessage]) -> str:
        status, wait, body = self._request(messages)
        if status in (408, 425, 429) or status >= 500:
            raise _Busy(f"status {status}", wait)
        shown = self._without_key(body.decode("utf-8", "replace"))
        if status in (400, 413, 422):
            raise _Refused(f"the server refuses the question (status {status}): {shown}")
        if status != 200:
            fix = {401: "set the key in the variable that api_key_env names", 403: "use a key that may use this model",
                   404: "check base_url (it usually ends in /v1) and model"}.get(status, "check base_url")  # fmt: skip
            where = "api_key_env" if status in (401, 403) else "base_url"
            raise UserError(f"the endpoint answers with status {status}", fix, field=where, found=shown or "nothing")
        try:
            choice = json.loads(body)["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            raise BadReply("not a chat completion") from None
        if not isinstance(text, str):
            raise BadReply("a reply without text")
        if choice.get("finish_reason") == "length":
            raise BadReply("the reply was cut off")
        return text.replace(self.key, SECRET) if self.key else text  # whatever is made of a reply is written to files

    def _request(self, messages: list[PromptMessage]) -> tuple[int, float | None, bytes]:
        """Status, seconds to wait that the server asks for, body; within `timeout_seconds` in all."""
        url, limit = self.url, self.endpoint.timeout_seconds
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "whet"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        body = {"model": self.endpoint.model, "temperature": self.endpoint.temperature, "messages": messages}
        kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
        assert url.hostname is not None
        connection = kind(url.hostname, url.port, timeout=limit)
        late, lines = threading.Event(), list[socket.socket]()
        # A server that sends a byte now and then keeps every single read within its time, headers too.
        watch = threading.Timer(limit, _end, (lines, late))
        watch.daemon = True
        watch.start()
        try:
            connection.request("POST", f"{url.path.rstrip('/')}/chat/completions", json.dumps(body).encode(), headers)
            lines.append(connection.sock)  # the connection lets go of it before a reply without keep-alive is read
            response = connection.getresponse()
            self.answered = True
            read = _read(response, late, MOST_BYTES if response.status == 200 else MOST_BYTES_OF_ERRORS)
            return response.status, _seconds(response.getheader("Retry-After")), read
        except ssl.SSLCertVerificationError as error:
            raise UserError("the endpoint's certificate is not trusted", "check base_url", field="base_url",
                            found=self.endpoint.base_url) from error  # fmt: skip
        except (ConnectionRefusedError, socket.gaierror) as error:
            if not self.answered:
                raise UserError(
                    "there is no server at this address", "start the server, or check base_url", field="base_url",
                    found=f"{self.endpoint.base_url}: {error.strerror}",
                ) from error  # fmt: skip
            raise _Busy(self._without_key(str(error)), None) from error
        except TimeoutError as error:
            raise _Busy(f"no whole reply within {limit:g} s", None) from error
        except (OSError, http.client.HTTPException, AttributeError, ValueError) as error:  # also of a closed socket
            if late.is_set():
                raise _Busy(f"no whole reply within {limit:g} s", None) from error
            if isinstance(error, AttributeError | ValueError):
                raise
            raise _Busy(self._without_key(str(error) or type(error).__name__), None) from error
        finally:
            watch.cancel()
            connection.close()

    def _without_key(self, text: str) -> str:
        """The text of a server, shortened and without key and personal data, so that it may be printed."""
        text = text.replace(self.key, SECRET) if self.key else text
        return shorten(redact(text, find(text)), 200)


def _end(lines: Sequence[socket.socket], late: threading.Event) -> None:
    """End the connection whose time is over, whatever it waits for."""
    late.set()
    for line in lines:
        with contextlib.suppress(OSError):
            line.shutdown(socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, late: threading.Event, most: int) -> bytes:
    """The body; of a failure at most its beginning. Raises BadReply for a reply that is too long."""
    parts, size = [], 0
    while part := response.read1(1 << 16):
        parts.append(part)
        size += len(part)
        if size > most and response.status == 200:
            raise BadReply(f"a reply of over {most >> 20} MiB")
        if size > most:
            break
    if late.is_set():
        raise TimeoutError
    return b"".join(parts)[:most]


def _seconds(header: str | None) -> float | None:
    try:
        seconds = float(header) if header else None
    except ValueError:
        return None
    return max(0.0, seconds) if seconds is not None and math.isfinite(seconds) else None


def _checked(endpoint: Endpoint) -> Any:
    """Check that the endpoint may be asked; returns the parts of base_url. Raises UserError."""
    if is_offline():
        raise UserError("the endpoint would have to be asked, and --offline forbids it", "run without --offline",
                        field="base_url", found=endpoint.base_url)  # fmt: skip
    if not endpoint.model:
        raise UserError("the model at the endpoint is not named", "set model", field="model")
    try:
        url = urlsplit(endpoint.base_url)
        usable = url.scheme in ("http", "https") and url.hostname and (url.port is None or url.port > 0)
    except ValueError:
        usable, url = False, urlsplit("")
    expected = "http:// or https://, a host and a path such as /v1"
    if not usable or url.query or url.fragment:
        raise UserError(
            "base_url is no address of an endpoint", "set base_url", field="base_url",
            found=shorten(redact(endpoint.base_url, find(endpoint.base_url))), expected=expected,
        )  # fmt: skip
    if url.username or url.password:
        raise UserError("base_url holds a password", "remove it, and name the key's variable in api_key_env",
                        field="base_url", expected=expected)  # fmt: skip
    return url


def _key(endpoint: Endpoint) -> str | None:
    if endpoint.api_key_env is None:
        return None
    key = os.environ.get(endpoint.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        name = endpoint.api_key_env if endpoint.api_key_env.isidentifier() else "(not the name of a variable)"
        raise UserError("the environment variable holds no key", f"export {name}=… before the command",
                        field="api_key_env", found=name, expected="a key of printable ASCII")  # fmt: skip
    return key
