"""As much of the Hugging Face hub as an upload asks of it, in a thread: repositories, commits, large files."""

import base64
import json
import re
from contextlib import AbstractContextManager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from in_thread import in_thread

TOKEN = "hf_" + "Secret0123456789" * 2


class Hub(ThreadingHTTPServer):
    """``refuse`` maps a part of an address to the status and words it is answered with."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.refuse: dict[str, tuple[int, str]] = {}
        self.asked: list[str] = []
        self.private: dict[str, bool] = {}
        self.branches: list[str] = []
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def _answer(self) -> None:
        server = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        server.asked.append(f"{self.command} {self.path}")
        for part, (status, said) in server.refuse.items():
            if part in self.path:
                return self._say({"error": said}, status)
        if self.path.startswith("/large/"):  # an address that is signed, and so needs no token
            server.large[self.path.rpartition("/")[2]] = body
            return self._say({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._say({"error": "Invalid credentials in Authorization header"}, 401)
        if self.path.endswith("/commit/main") or "/commit/" in self.path:
            return self._say(self._commit(body))
        return self._say(*self._found(json.loads(body or b"{}")))

    do_GET = do_POST = do_PUT = do_HEAD = _answer  # noqa: N815

    def _found(self, given: dict[str, Any]) -> tuple[Any, int]:
        server, path = self.server, self.path
        if path == "/api/repos/create":
            name = f"{given['organization']}/{given['name']}"
            if name in server.private:
                return {"error": "You already created this model repo", "url": f"{server.url}/{name}"}, 409
            server.private[name] = given.get("visibility") == "private" or given.get("private") is True
            return {"url": f"{server.url}/{name}", "name": name}, 200
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": [{"message": "empty or missing license"}]}, 200
        if "/branch/" in path:
            server.branches.append(path.rpartition("/")[2])
            return {}, 200
        if "/preupload/" in path:
            kinds = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in given["files"]]
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in kinds]}, 200
        if path.endswith(".git/info/lfs/objects/batch"):
            upload = [(o, {"upload": {"href": f"{server.url}/large/{o['oid']}"}}) for o in given["objects"]]
            return {"transfer": "basic", "objects": [o | {"actions": actions} for o, actions in upload]}, 200
        if (known := re.fullmatch(r"/api/models/([^/]+/[^/?]+)", path)) and known[1] in server.private:
            return {"id": known[1], "private": server.private[known[1]], "siblings": [], "tags": []}, 200
        return {"error": "Repository not found"}, 404

    def _commit(self, body: bytes) -> dict[str, Any]:
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.large[value["oid"]]
        return {
            "success": True,
            "commitOid": "0" * 40,
            "commitUrl": f"{self.server.url}/me/x/commit/0",
            "hookOutput": "",
        }

    def _say(self, answer: Any, status: int = 200) -> None:
        sent = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(sent)))
        if status >= 400:
            self.send_header("X-Error-Message", str(answer.get("error")))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_: Any) -> None:
        pass


def hub() -> AbstractContextManager[Hub]:
    """A hub in a thread of this process."""
    return in_thread(Hub())
