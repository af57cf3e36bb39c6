"""Many questions at a time: those in the cache are not asked, and every reply is kept as it comes."""

import asyncio
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType
from typing import Any, Generic, TypeVar, cast

from ..client import Client, NoAnswer, Server, Stopped
from ..display import Display
from ..errors import Interrupted, ServerError
from .cache import Cache, Reply, key_of
from .chat import Usage, chat_completions

T = TypeVar("T")
FEWEST = 3
"""Questions in a row without an answer, or as many as are asked at a time, after which the server counts as gone."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """``bodies`` are the requests to make one after another, until ``read`` finds a value in a reply.

    ``name`` is what messages call it.
    """

    name: str
    bodies: Sequence[Mapping[str, Any]]
    read: Callable[[Reply], T | None]


@dataclass(frozen=True)
class Judgment(Generic[T]):
    """What was read from the replies to one question: ``value`` is None, with the reason, where nothing could be."""

    value: T | None
    replies: Sequence[str]
    reason: str = ""


def ask(
    server: Server, cache: Cache, questions: Sequence[Question[T]], usage: Usage, display: Display
) -> list[Judgment[T]]:
    """Ask all ``questions``, ``server.jobs`` at a time, those in the cache not at all; the judgments in their order.

    Each reply is in ``cache`` as soon as it has come. The first Ctrl-C waits for the requests under way.

    Raises:
        ConfigError: the server refuses: the key, the address, the model or the request is wrong.
        ServerError: the server no longer answers; the same call goes on from the cache.
        Interrupted: the user stopped it.
    """
    found = [_known(question, cache, usage) for question in questions]
    left = [i for i, judgment in enumerate(found) if judgment is None]
    if left:
        known = len(found) - len(left)
        with display.phase("judge", len(found), known) as advance:
            asking = _Asking[T](server, cache, usage, lambda done, info: advance(known + done, info))
            asked = _run(asking, [questions[i] for i in left], display)
        for i, judgment in zip(left, asked, strict=True):
            found[i] = judgment
    return cast(list[Judgment[T]], found)


def _known(question: Question[T], cache: Cache, usage: Usage) -> Judgment[T] | None:
    """The judgment that the cache alone decides, or None."""
    replies: list[Reply] = []
    for body in question.bodies:
        reply = cache.get(key_of(body))
        if reply is None:
            return None
        replies.append(reply)
        if question.read(reply) is not None:
            break
    for reply in replies:
        usage.count(reply, cached=True)
    return _judgment(question, replies)


def _judgment(question: Question[T], replies: Sequence[Reply]) -> Judgment[T]:
    value = question.read(replies[-1])
    many = "the reply" if len(replies) == 1 else f"any of {len(replies)} replies"
    return Judgment(
        value, [reply.text for reply in replies], "" if value is not None else f"no verdict could be read from {many}"
    )


def _run(asking: "_Asking[T]", questions: Sequence[Question[T]], display: Display) -> list[Judgment[T]]:
    found: list[Judgment[T] | None] = [None] * len(questions)
    with (
        asyncio.Runner() as runner,
        _interruptible(runner.get_loop(), asking, display),
        suppress(asyncio.CancelledError),  # by the second Ctrl-C
    ):
        runner.run(asking.all(questions, found))
    left = sum(judgment is None for judgment in found)
    if left:
        raise Interrupted(
            f"stopped with {left} questions left; {len(asking.cache)} replies are kept in {asking.cache.path}, and the "
            "same command goes on from there"
        )
    return cast(list[Judgment[T]], found)


@contextmanager
def _interruptible(loop: asyncio.AbstractEventLoop, asking: "_Asking[Any]", display: Display) -> Generator[None]:
    """The first Ctrl-C asks nothing further and waits for what is under way; the second one does not wait."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        if asking.stopping:
            loop.call_soon_threadsafe(asking.cancel)
            return
        asking.stopping = True
        loop.call_soon_threadsafe(asking.stop.set)
        display.note("stopping after the requests under way; press Ctrl-C again to stop at once")

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _Asking(Generic[T]):
    """Workers over one list of questions."""

    def __init__(self, server: Server, cache: Cache, usage: Usage, advance: Callable[[int, str], None]):
        self.server = server
        self.cache = cache
        self.usage = usage
        self.advance = advance
        self.stop = asyncio.Event()
        self.stopping = False
        self._task: asyncio.Task[None] | None = None
        self._done = self._failed = self._in_a_row = 0

    def cancel(self) -> None:
        """Give up the requests under way."""
        if self._task is not None:
            self._task.cancel()

    async def all(self, questions: Sequence[Question[T]], found: list[Judgment[T] | None]) -> None:
        """Fill ``found`` with the judgments of ``questions``."""
        self._task = asyncio.current_task()
        left = iter(enumerate(questions))
        async with Client(self.server, chat_completions(self.server.url), self.stop) as client:
            workers = [asyncio.create_task(self._work(client, left, found)) for _ in range(self.server.jobs)]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
                self.usage.retries += client.retries

    async def _work(
        self, client: Client[Reply], left: Iterator[tuple[int, Question[T]]], found: list[Judgment[T] | None]
    ) -> None:
        for i, question in left:
            if self.stop.is_set():
                return
            try:
                judgment = await self._judge(client, question)
                self._in_a_row = 0
            except Stopped:
                return
            except NoAnswer as error:
                judgment = Judgment[T](None, [], f"no answer: {error}")
                self._in_a_row += 1
                if self._in_a_row >= max(FEWEST, self.server.jobs):
                    raise ServerError(
                        f"{question.name}: the server gave no answer to {self._in_a_row} questions in a row, each "
                        f"tried {self.server.attempts} times; the last time: {error}\n"
                        f"{len(self.cache)} replies are kept in {self.cache.path}: the same command goes on from there"
                    ) from error
            found[i] = judgment
            self._done += 1
            self._failed += judgment.value is None
            self.advance(self._done, f"{self._failed} failed" if self._failed else "")

    async def _judge(self, client: Client[Reply], question: Question[T]) -> Judgment[T]:
        replies: list[Reply] = []
        for body in question.bodies:
            key = key_of(body)
            reply = self.cache.get(key)
            if reply is None:
                reply = await client.answer(body, question.name)
                self.cache.put(key, reply)
                self.usage.count(reply, cached=False)
            else:
                self.usage.count(reply, cached=True)
            replies.append(reply)
            if question.read(reply) is not None:
                break
        return _judgment(question, replies)
