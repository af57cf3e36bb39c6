"""One question to a server over HTTP, with its retries."""

import asyncio
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Generic, Self, TypeVar, cast

from .errors import ConfigError, ServerError

T = TypeVar("T")
OK, SERVER_ERROR = 200, 500
RETRIED = (408, 425, 429)
"""Statuses below 500 that a later attempt may mend."""
LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server asks for more
LONGEST_WAIT = 600.0  # seconds: a server that asks for more is not waited for
SECRET = 8  # characters from which a key is looked for in what a server says; shorter ones are no secrets
SECRETS = {"api_key", "apikey", "key", "auth", "authorization", "token", "auth_token", "access_token", "password"}
"""Fields whose values nobody may write down."""
SHOWN = 300  # characters of a server's message
POLL = 0.1  # seconds between two looks at whether the user wants to stop


@dataclass(frozen=True)
class Server:
    """Where a server is and how patiently it is asked; times are in seconds.

    ``attempts`` bounds the requests made for one answer. The pause after the first that fails is about ``backoff``, and
    doubles with each. ``key`` is sent as a bearer token and never shown.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    jobs: int = 4
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0

    @property
    def exposed(self) -> bool:
        """Whether the key leaves this machine without encryption."""
        return self.key is not None and re.match(r"http://(?!localhost|127\.|\[::1\])", self.url) is not None


class NoAnswer(Exception):
    """All attempts at one request failed; the message has the last reason."""


class Stopped(Exception):
    """The user asked to stop."""


def require_httpx(what: str, extra: str) -> None:
    """Raise ConfigError, with the ``extra`` to install for ``what``, where httpx is absent."""
    try:
        import httpx  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError(f"{what} needs the package httpx: pip install 'distillm[{extra}]'") from error


def endpoint(url: str, path: str, name: str) -> str:
    """The address of ``path``, such as /completions, under ``url``, which usually ends in /v1.

    Raises:
        ConfigError: it is no http(s) address, or has more than host, port and path; secrets do not belong there.
            ``name`` is what the message calls the setting.
    """
    import httpx

    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
        shown = re.sub(r"//[^/]*@", "//...@", url).split("?")[0]
        raise ConfigError(f"{name} {shown}: write http(s)://HOST[:PORT]/PATH, such as http://127.0.0.1:8000/v1")
    address = url.rstrip("/").removesuffix(path) + path
    try:
        httpx.URL(address)
    except httpx.InvalidURL as error:
        raise ConfigError(f"{name} {url!r} is no address: {error}") from error
    return address


def secrets_in(url: str, body: Mapping[str, Any]) -> str | None:
    """What a request's settings, which are written down, seem to hold that is secret; None where there is nothing."""
    if re.search(r"[@?#]", url):
        return "url: write http(s)://HOST[:PORT]/PATH alone; what else it has"
    names = {str(name).lower().replace("-", "_").removeprefix("x_") for name in _names(body)}
    named = sorted(names & SECRETS)
    return f"body.{named[0]}" if named else None


def _names(value: Any) -> Iterator[str]:
    """Every name of a field, however deep."""
    if isinstance(value, Mapping):
        for name, inner in cast(Mapping[str, Any], value).items():
            yield name
            yield from _names(inner)
    elif isinstance(value, list):
        for inner in cast(list[Any], value):
            yield from _names(inner)


def bearer_key(name: str) -> str | None:
    """The key in the environment variable ``name``; None where that is empty or absent.

    Raises:
        ConfigError: it has characters that no key has.
    """
    key = os.environ.get(name, "").strip()
    if not re.fullmatch(r"[!-~]*", key):
        raise ConfigError(f"the key in the environment variable {name} has spaces or characters that no key has")
    return key or None


@dataclass(frozen=True)
class Endpoint(Generic[T]):
    """What is asked: its address, how an answer is read, and what to say where the server refuses.

    ``read`` raises one of the errors of a malformed value where what came is no ``kind``; ``advice`` takes the status.
    """

    url: str
    kind: str
    read: Callable[[Any], T]
    advice: Callable[[int], str]


class Client(Generic[T]):
    """The connections to an endpoint; ``stop`` ends the pauses between attempts. ``retries`` counts what was asked
    again."""

    def __init__(self, server: Server, endpoint: Endpoint[T], stop: asyncio.Event):
        import httpx

        self.server = server
        self.endpoint = endpoint
        self.stop = stop
        self.retries = 0
        self._jitter = random.Random()
        headers = {"Content-Type": "application/json"}
        if server.key is not None:
            headers["Authorization"] = f"Bearer {server.key}"
        limits = httpx.Limits(max_connections=server.jobs, max_keepalive_connections=server.jobs)
        self._http = httpx.AsyncClient(headers=headers, timeout=server.timeout, limits=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def answer(self, body: Mapping[str, Any], name: str) -> T:
        """What was read from the reply to ``body``; ``name`` is what messages call the question.

        Raises:
            ConfigError: the server refuses, so that asking again is of no use.
            ServerError: the server asks to wait longer than ``LONGEST_WAIT``.
            NoAnswer: all attempts failed.
            Stopped: ``stop`` was set in a pause.
        """
        reason = ""
        content = json.dumps(body).encode()
        for attempt in range(self.server.attempts):
            answer = await self._try(content, name)
            if not isinstance(answer, _Failure):
                return answer
            reason = answer.reason
            if attempt + 1 < self.server.attempts:
                self.retries += 1
                await self._pause(attempt, answer)
        raise NoAnswer(reason)

    async def _try(self, content: bytes, name: str) -> "T | _Failure":
        """One request: what was read, or why nothing was."""
        import httpx

        try:
            async with asyncio.timeout(self.server.timeout):  # the whole of it: a server may also drip
                response = await self._http.post(self.endpoint.url, content=content)
        except (TimeoutError, httpx.TimeoutException):
            return _Failure(f"no answer within {self.server.timeout:g} seconds")
        except httpx.RequestError as error:
            return _Failure(self._safe(f"{type(error).__name__}: {error}"))
        status = response.status_code
        if status == OK:
            return self._read(response.content)
        said = self._said(response.content)
        reason = f"status {status} {response.reason_phrase}{': ' + said if said else ''}"
        if status >= SERVER_ERROR or status in RETRIED:
            return _Failure(reason, retry_after(response.headers.get("Retry-After")))
        raise ConfigError(f"{name}: the server refuses, {reason}\n{self.endpoint.advice(status)}")

    def _read(self, content: bytes) -> "T | _Failure":
        try:
            return self.endpoint.read(json.loads(self._hidden(content.decode())))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return _Failure(f"what came is no {self.endpoint.kind}: {self._said(content) or 'nothing'}")

    def _said(self, content: bytes) -> str:
        """A server's message, short and on one line."""
        text = content[:20_000].decode("utf-8", "replace")
        try:
            found: Any = json.loads(text)
            inner = found.get("error", found.get("detail", found.get("message")))
            text = str(inner.get("message", inner) if isinstance(inner, dict) else inner or text)
        except (ValueError, AttributeError, RecursionError):
            pass
        text = " ".join(self._safe(text).split())
        return text if len(text) <= SHOWN else text[:SHOWN] + " ..."

    def _hidden(self, text: str) -> str:
        """``text`` without the key."""
        if self.server.key is not None and len(self.server.key) >= SECRET:
            return text.replace(self.server.key, "[key]")
        return text

    def _safe(self, text: str) -> str:
        return whole(self._hidden(text))

    async def _pause(self, attempt: int, failure: "_Failure") -> None:
        pause = min(LONGEST_PAUSE, self.server.backoff * 2**attempt) * self._jitter.uniform(0.5, 1)
        asked_for = failure.asked_for
        if asked_for is not None:
            if asked_for > LONGEST_WAIT:
                raise ServerError(
                    f"the server asks to wait {asked_for:.0f} seconds ({failure.reason}). Run the same command again "
                    "then: it goes on from what it has kept"
                )
            pause = max(pause, asked_for + self._jitter.uniform(0, min(self.server.backoff, 1)))
        try:
            await asyncio.wait_for(self.stop.wait(), pause)
        except TimeoutError:
            return
        raise Stopped


def refused(status: int, url: str, setting: str) -> str | None:
    """What to look at in the settings of a server that was asked at ``url`` and answers with ``status``; None where
    that is the request's own matter."""
    if status in (401, 403):
        return f"Is the key right, and may it use this model? It is read from the variable of {setting}.key_env."
    if status == 404:
        return f"It was asked at {url}. Does {setting}.url end as it must, often in /v1, and is {setting}.model right?"
    if 300 <= status < 400:
        return f"It was asked at {url}, and answers that it is elsewhere; give its real address by {setting}.url."
    return None


def ask_all(
    server: Server,
    asked: Endpoint[T],
    bodies: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    heard: Callable[[int, T], None],
    progress: Callable[[int], None] | None = None,
) -> None:
    """Ask each of ``bodies``, ``server.jobs`` at a time; ``heard`` gets the number of each and what was read from its
    reply, as they come.

    ``progress`` is called with how many were answered, and several times a second while waiting; what it raises ends
    the work.

    Raises:
        ConfigError: the server refuses.
        ServerError: the server gives no answer.
    """
    work = _ask_all(server, asked, bodies, names, heard, progress or (lambda _: None))
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
    else:  # in a thread of its own where something is running already, such as a notebook
        with ThreadPoolExecutor(1) as thread:
            thread.submit(asyncio.run, work).result()


async def _ask_all(
    server: Server,
    asked: Endpoint[T],
    bodies: Sequence[Mapping[str, Any]],
    names: Sequence[str],
    heard: Callable[[int, T], None],
    progress: Callable[[int], None],
) -> None:
    left, done = iter(range(len(bodies))), 0

    async def work(client: Client[T]) -> None:
        nonlocal done
        for i in left:
            try:
                heard(i, await client.answer(bodies[i], names[i]))
            except NoAnswer as error:
                raise ServerError(
                    f"{names[i]}: the server gave no answer in {server.attempts} attempts; the last time: {error}\n"
                    "What came before is kept: the same command with resume=auto goes on from there"
                ) from error
            done += 1

    async with Client(server, asked, asyncio.Event()) as client:
        every = [asyncio.create_task(work(client)) for _ in range(min(server.jobs, len(bodies)))]
        workers = set(every)
        try:
            while workers:
                ended, workers = await asyncio.wait(workers, timeout=POLL, return_when=asyncio.FIRST_EXCEPTION)
                for worker in ended:
                    worker.result()  # raises what the worker raised
                progress(done)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*every, return_exceptions=True)


@dataclass(frozen=True)
class _Failure:
    """Why a request brought nothing, and how many seconds the server asks to wait."""

    reason: str
    asked_for: float | None = None


def whole(text: str) -> str:
    """``text`` as it may be shown and written: without halves of characters, which JSON's escapes allow."""
    return text.encode("utf-8", "replace").decode()


def retry_after(header: str | None) -> float | None:
    """The seconds to wait that a Retry-After header asks for, as a number or a date; None where it says nothing."""
    if header is None:
        return None
    if re.fullmatch(r"\s*\d{1,9}(\.\d*)?\s*", header):
        return float(header)
    try:
        when = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, ((when if when.tzinfo else when.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds())
