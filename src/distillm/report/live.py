"""The report of runs that go on, served by HTTP: the same page, which asks every few seconds whether it has changed."""

import base64
import errno
import hashlib
import html
import ipaddress
import re
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, DataError
from ..paths import is_dir
from ..screen import visible
from .page import asset, render
from .read import RunFolder, named, read_run, read_runs

PAUSE = 2.0
"""Seconds at least between two renderings."""
SHARE = 20.0
"""A rendering that takes long is followed by so many times as long a pause: the training needs the processor."""
TRIES = 20
_POLICY = re.compile(r'(<meta http-equiv="Content-Security-Policy" content=")([^"]*)(")')
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
}
_WAITING = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; base-uri 'none'; form-action 'none'; \
style-src 'unsafe-inline'; img-src data:">
<title>waiting · distillm</title>
<link rel="icon" href="data:,">
<style>
{style}
</style>
</head>
<body>
<main>
<h1>Waiting for a run</h1>
{said}
</main>
</body>
</html>
"""


class Rendering:
    """The page over ``paths`` as it was made last; made again when a file has changed, but not all the time."""

    def __init__(self, paths: Sequence[Path]):
        self.paths = [Path(path) for path in paths]
        self._lock = threading.Lock()
        self._version = ""
        self._page = b""
        self._due = 0.0

    def current(self) -> tuple[str, bytes]:
        """A word for the state that the page shows, and the page in UTF-8."""
        with self._lock:
            if time.monotonic() >= self._due and (version := state_of(self.paths)) != self._version:
                began = time.monotonic()
                self._page = live_page(self.paths, version).encode("utf-8", errors="replace")
                self._version, took = version, time.monotonic() - began
                self._due = time.monotonic() + max(PAUSE, SHARE * took)
            return self._version, self._page


def state_of(paths: Sequence[Path]) -> str:
    """A short word that changes whenever a file changes that the report reads."""
    seen = hashlib.sha256()
    for path in paths:
        for file in _files(path):
            try:
                found = file.stat()
                seen.update(f"{file}\0{found.st_mtime_ns}\0{found.st_size}\0".encode(errors="replace"))
            except OSError:
                seen.update(f"{file}\0absent\0".encode(errors="replace"))
        seen.update(f"{is_dir(path)}{is_dir(path / 'student')}".encode())
    return seen.hexdigest()[:16]


def _files(path: Path) -> list[Path]:
    try:
        return [path / "run.yaml", *sorted(path.glob("*.jsonl")), *sorted(path.glob("eval/*.json"))]
    except OSError:  # a folder that is deleted as it is read
        return []


def live_page(paths: Sequence[Path], version: str) -> str:
    """The report on those of ``paths`` that are runs by now, or a page that says what is waited for."""
    try:
        return _living(render(read_runs(paths)), version)
    except DataError:  # one is not there yet, or between two states
        pass
    runs: list[RunFolder] = []
    missing: list[str] = []
    for path in paths:
        try:
            runs.append(read_run(path))
        except DataError as error:
            missing.append(str(error))
    if runs:
        first, *others = named(runs)
        return _living(render([replace(first, notes=[*missing, *first.notes]), *others]), version)
    said = "\n".join(f'<p class="quiet">{html.escape(visible(text))}</p>' for text in missing)
    return _living(_WAITING.format(style=asset("style.css"), said=said), version)


def _living(page: str, version: str) -> str:
    """``page`` with the script that asks for changes, which its policy lets run and ask this server alone."""
    script = asset("live.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")

    def wider(found: re.Match[str]) -> str:
        parts = [part.strip().partition(" ") for part in html.unescape(found[2]).split(";")]
        policy = {name: values for name, _, values in parts}
        policy["script-src"] = f"{policy.get('script-src', '')} 'sha256-{digest}'".strip()
        policy["connect-src"] = "'self'"
        return found[1] + html.escape("; ".join(f"{name} {values}" for name, values in policy.items())) + found[3]

    page, count = _POLICY.subn(wider, page, count=1)
    assert count == 1, "the page has a policy"
    head, end, tail = page.rpartition("</body>")
    note = f'<p class="quiet" id="live" role="status" data-version="{version}">This page follows the run.</p>\n'
    return f"{head}{note}<script>{script}</script>\n{end}{tail}"


class LiveServer(ThreadingHTTPServer):
    """Serves one page, and a word for its state, to whoever asks by an address that no other site can have."""

    daemon_threads = True

    def __init__(self, rendering: Rendering, host: str, port: int):
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        self.address_family = found[0][0]
        self.rendering = rendering
        self.host = host
        super().__init__((host, port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away before it has the page is none; anything else is a defect, and shown."""
        if not isinstance(sys.exception(), ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it, or, where all networks reach it, one on another."""
        everywhere = self.host in ("0.0.0.0", "::")
        name = socket.gethostname() if everywhere else self.host
        return f"http://{f'[{name}]' if ':' in name else name}:{self.server_port}/"

    def knows(self, host: str) -> bool:
        """Whether a request may name ``host``.

        A page elsewhere that had its own name point here could otherwise read the report; it cannot have a number, nor
        the name of this machine.
        """
        name = urlsplit(f"//{host}").hostname or ""
        return _is_number(name) or name in ("localhost", self.host.lower(), socket.gethostname().lower())


class _Handler(BaseHTTPRequestHandler):
    server: LiveServer  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version = "distillm"
    sys_version = ""
    timeout = 10

    def do_GET(self) -> None:
        try:
            known = self.server.knows(self.headers.get("Host", ""))
        except ValueError:
            known = False
        path = self.path.partition("?")[0]
        if not known:
            self._say(403, "text/plain", b"This name is not that of the machine that distillm watch runs on.\n")
        elif path == "/":
            self._say(200, "text/html", self.server.rendering.current()[1])
        elif path == "/version":
            self._say(200, "text/plain", self.server.rendering.current()[0].encode())
        else:
            self._say(404, "text/plain", b"There is nothing but the report here.\n")

    do_HEAD = do_GET  # noqa: N815

    def _say(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body))} | _HEADERS
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing: the terminal is for the address."""


def serve(runs: Sequence[Path], host: str = "127.0.0.1", port: int = 8765, *, exactly: bool = False) -> LiveServer:
    """A server of the report on ``runs``, whether they are there yet or not; ``serve_forever`` lets it begin.

    Where ``port`` is taken one of the next is, unless it is to be ``exactly`` that one; 0 is any that is free.

    Raises:
        ConfigError: there is no such host here, or no port is free.
        DataError: one of ``runs`` is a file.
    """
    for path in runs:
        if path.is_file():
            raise DataError(f"{path} is a file, not a run folder")
    rendering = Rendering(runs)
    ports = [port] if exactly or port == 0 else [p for p in range(port, port + TRIES) if p < 65536]
    for candidate in ports:
        try:
            return LiveServer(rendering, host, candidate)
        except socket.gaierror as error:
            raise ConfigError(f"--host {host}: there is no such address ({error.strerror})") from error
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise ConfigError(f"{host}:{candidate} cannot be used: {error.strerror}") from error
    tried = str(port) if len(ports) == 1 else f"{port} to {ports[-1]}"
    raise ConfigError(f"port {tried} of {host} is taken; give another one by --port (0 takes any that is free)")


def is_loopback(host: str) -> bool:
    """Whether only programs of this machine reach ``host``."""
    return host == "localhost" or (_is_number(host) and ipaddress.ip_address(host).is_loopback)


def _is_number(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
