"""One question to a server that speaks chat completions, with its retries."""

import asyncio
import json
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from types import TracebackType
from typing import Any, Self

from ..errors import ConfigError, JudgeError
from .cache import Reply

OK, SERVER_ERROR = 200, 500
RETRIED = (408, 425, 429)
"""Statuses below 500 that a later attempt may mend."""
LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server asks for more
LONGEST_WAIT = 600.0  # seconds: a server that asks for more is not waited for
SECRET = 8  # characters from which a key is looked for in what a server says; shorter ones are no secrets
SHOWN = 300  # characters of a server's message


@dataclass(frozen=True)
class Server:
    """Where the judge is and how patiently it is asked; times are in seconds.

    ``attempts`` bounds the requests made for one answer. The pause after the first that fails is about ``backoff``, and
    doubles with each. ``key`` is sent as a bearer token and never shown.
    """

    url: str
    key: str | None = field(default=None, repr=False)
    jobs: int = 4
    timeout: float = 120.0
    attempts: int = 6
    backoff: float = 1.0


@dataclass
class Usage:
    """What judging came to: requests that were answered, replies from the cache, requests that were made again.

    Tokens are those of ``calls``, and of ``cached``; ``unknown`` counts the replies for which the server gave none.
    """

    calls: int = 0
    cached: int = 0
    retries: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0
    unknown: int = 0

    def count(self, reply: Reply, *, cached: bool) -> None:
        """Add one reply."""
        self.unknown += reply.prompt_tokens is None or reply.completion_tokens is None
        prompt, completion = reply.prompt_tokens or 0, reply.completion_tokens or 0
        if cached:
            self.cached += 1
            self.cached_prompt_tokens += prompt
            self.cached_completion_tokens += completion
        else:
            self.calls += 1
            self.prompt_tokens += prompt
            self.completion_tokens += completion


class NoAnswer(Exception):
    """All attempts at one request failed; the message has the last reason."""


class Stopped(Exception):
    """The user asked to stop."""


def require_httpx() -> None:
    """Raise ConfigError, with what to install, where httpx is absent."""
    try:
        import httpx  # noqa: F401  # pyright: ignore[reportUnusedImport]
    except ImportError as error:
        raise ConfigError("distillm judge needs the package httpx: pip install 'distillm[judge]'") from error


def endpoint(url: str) -> str:
    """The address of chat completions under ``url``, which usually ends in /v1.

    Raises:
        ConfigError: it is no http(s) address, or has more than host, port and path; secrets do not belong there.
    """
    if not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url):
        shown = re.sub(r"//[^/]*@", "//...@", url).split("?")[0]
        raise ConfigError(f"--server {shown}: write http(s)://HOST[:PORT]/PATH, such as http://127.0.0.1:8000/v1")
    return url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"


class Client:
    """The connections to a server; ``stop`` ends the pauses between attempts."""

    def __init__(self, server: Server, usage: Usage, stop: asyncio.Event):
        import httpx

        self.server = server
        self.usage = usage
        self.stop = stop
        self._url = endpoint(server.url)
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

    async def answer(self, body: Mapping[str, Any], name: str) -> Reply:
        """The reply to ``body``; ``name`` is what messages call the question.

        Raises:
            ConfigError: the server refuses, so that asking again is of no use.
            JudgeError: the server asks to wait longer than ``LONGEST_WAIT``.
            NoAnswer: all attempts failed.
            Stopped: ``stop`` was set in a pause.
        """
        reason = ""
        content = json.dumps(body).encode()
        for attempt in range(self.server.attempts):
            answer, asked_for = await self._try(content, name)
            if isinstance(answer, Reply):
                return answer
            reason = answer
            if attempt + 1 < self.server.attempts:
                self.usage.retries += 1
                await self._pause(attempt, asked_for, reason)
        raise NoAnswer(reason)

    async def _try(self, content: bytes, name: str) -> tuple[Reply | str, float | None]:
        """One request: the reply, or why there is none; and how long the server asks to wait."""
        import httpx

        try:
            async with asyncio.timeout(self.server.timeout):  # the whole of it: a server may also drip
                response = await self._http.post(self._url, content=content)
        except (TimeoutError, httpx.TimeoutException):
            return f"no answer within {self.server.timeout:g} seconds", None
        except httpx.RequestError as error:
            return self._safe(f"{type(error).__name__}: {error}"), None
        status = response.status_code
        if status == OK:
            return self._read(response.content), None
        said = self._said(response.content)
        reason = f"status {status} {response.reason_phrase}{': ' + said if said else ''}"
        if status >= SERVER_ERROR or status in RETRIED:
            return reason, retry_after(response.headers.get("Retry-After"))
        raise ConfigError(f"{name}: the server refuses, {reason}\n{_advice(status, self._url)}")

    def _read(self, content: bytes) -> Reply | str:
        """The reply in a chat completion, or why there is none."""
        try:
            found: Any = json.loads(content)
            choice = found["choices"][0]
            text = choice["message"].get("content") or ""
            if not isinstance(text, str):
                raise TypeError
            usage = found.get("usage") or {}
            counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            return f"what came is no chat completion: {self._said(content) or 'nothing'}"
        prompt, completion = (n if isinstance(n, int) and not isinstance(n, bool) else None for n in counts)
        return Reply(self._safe(text), choice.get("finish_reason") == "length", prompt, completion)

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

    def _safe(self, text: str) -> str:
        """``text`` as it may be shown and written: without the key, and without halves of characters."""
        if self.server.key is not None and len(self.server.key) >= SECRET:
            text = text.replace(self.server.key, "[key]")
        return text.encode("utf-8", "replace").decode()

    async def _pause(self, attempt: int, asked_for: float | None, reason: str) -> None:
        pause = min(LONGEST_PAUSE, self.server.backoff * 2**attempt) * self._jitter.uniform(0.5, 1)
        if asked_for is not None:
            if asked_for > LONGEST_WAIT:
                raise JudgeError(
                    f"the server asks to wait {asked_for:.0f} seconds ({reason}). Run the same command again then: it "
                    "goes on from its cache"
                )
            pause = max(pause, asked_for + self._jitter.uniform(0, min(self.server.backoff, 1)))
        try:
            await asyncio.wait_for(self.stop.wait(), pause)
        except TimeoutError:
            return
        raise Stopped


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


def _advice(status: int, url: str) -> str:
    if status in (401, 403):
        return "Is the key right, and may it use this model? It is read from the environment variable of --key-env."
    if status == 404:
        return f"It was asked at {url}. Does --server end as the server wants it, often in /v1, and is --model right?"
    if 300 <= status < 400:
        return f"It was asked at {url}, and answers that it is elsewhere; give its real address by --server."
    return (
        "The request itself is not accepted. Fields can be added, or left out by null: --body '{\"max_tokens\": null}'"
    )
