"""``distillm watch``: the report over HTTP while runs go on, for this machine alone, asking for nothing but changes."""

import base64
import hashlib
import http.client
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from command_line import refused
from distillm.errors import ConfigError, DataError
from distillm.pipeline import distill
from distillm.report import live
from distillm.report.live import LiveServer, is_loopback, live_page, serve, state_of
from distillm.report.page import render
from distillm.report.read import read_runs
from fabricated_run import fabricate
from in_thread import in_thread
from report_page import Page
from test_security_output import hostile_run
from tiny_run import materials, tiny_run


def watched(*runs: Path, host: str = "127.0.0.1", port: int = 0) -> AbstractContextManager[LiveServer]:
    return in_thread(serve(runs, host, port))


def ask(
    server: LiveServer | int, path: str = "/", method: str = "GET", host: str = ""
) -> tuple[int, str, dict[str, str]]:
    port = server if isinstance(server, int) else server.server_port
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers={"Host": host} if host else {})
    answer = connection.getresponse()
    found = answer.status, answer.read().decode(), {name.lower(): value for name, value in answer.getheaders()}
    connection.close()
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate(tmp_path_factory.mktemp("runs") / "kitchen")


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change shows at once."""
    monkeypatch.setattr(live, "PAUSE", 0.0)
    monkeypatch.setattr(live, "SHARE", 0.0)


def policy(page: Page) -> dict[str, list[str]]:
    (text,) = [
        a["content"] for t, a in page.elements if t == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    ]
    parts = [part.split() for part in str(text).split(";")]
    return {part[0]: part[1:] for part in parts}


def test_it_is_the_page_of_the_report_and_one_script_more(run: Path):
    with watched(run) as server:
        status, text, headers = ask(server)
        _, version, _ = ask(server, "/version")
    plain, page = Page(render(read_runs([run]))), Page(text)
    assert status == 200
    assert headers["content-type"] == "text/html; charset=utf-8"
    more = [element for element in page.elements if element not in plain.elements]
    assert [tag for tag, _ in more] == ["meta", "p"]  # a policy and a note; the script has nothing to tell it by
    assert len(page.all("script")) == len(plain.all("script")) + 1
    (script,) = [text for text in page.all("script") if text not in plain.all("script")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    was, now = policy(plain), policy(page)
    assert now.pop("connect-src") == ["'self'"]
    assert now["script-src"] == [*was["script-src"], f"'sha256-{digest}'"]
    assert now | {"script-src": was["script-src"]} == was
    assert re.findall(r"fetch\([^)]*\)", script) == ['fetch("version", { cache: "no-store" })']
    assert not re.search(r"https?:|innerHTML|import\(|XMLHttp", script)
    assert dict(next(attrs for tag, attrs in page.elements if attrs.get("id") == "live"))["data-version"] == version
    assert page.source.index('id="live"') > page.source.index("</main>") - 10
    for kept in ("charts", "Scores"):
        assert kept in text


def test_nothing_else_is_served_and_only_to_this_machine(run: Path):
    with watched(run) as server:
        for path in ("/run.yaml", "/../run.yaml", "/%2e%2e/x", "/index.html", "/version/", "/student"):
            status, text, _ = ask(server, path)
            assert (status, text) == (404, "There is nothing but the report here.\n")
        assert ask(server, "/?x=1")[0] == 200
        for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
            assert ask(server, "/", method)[0] == 501
        status, text, headers = ask(server, "/", "HEAD")
        assert (status, text) == (200, "")
        assert int(headers["content-length"]) > 10_000
        for host in ("evil.example", f"evil.example:{server.server_port}", "127.0.0.1.evil.example", "[", "a@b", ""):
            given = ask(server, "/version", host=host)[0] if host else raw(server, b"GET / HTTP/1.0\r\n\r\n")
            assert given == 403, host
        for host in ("localhost", "LOCALHOST:1", "127.0.0.1:9999", "[::1]:8765"):
            assert ask(server, "/version", host=host)[0] == 200, host
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert headers["content-security-policy"] == "frame-ancestors 'none'"
        assert headers["server"].strip() == "distillm"
        assert server.server_address[0] == "127.0.0.1"


def raw(server: LiveServer, sent: bytes) -> int:
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as line:
        line.sendall(sent)
        return int(line.makefile("rb").readline().split()[1])


def test_a_browser_that_goes_away_leaves_no_trace(run: Path, capsys: pytest.CaptureFixture[str]):
    with watched(run) as server:
        for _ in range(5):
            with socket.create_connection(("127.0.0.1", server.server_port), timeout=30) as line:
                line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # closed by a reset
                line.sendall(b"GET / HTTP/1.0\r\nHost: localhost\r\n\r\n")
        assert ask(server)[0] == 200
        time.sleep(0.2)
    assert capsys.readouterr().err == ""


def test_a_page_is_made_again_only_when_a_file_has_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hasty: None
):
    run = fabricate(tmp_path / "run", num_steps=30, every=10)
    made: list[str] = []
    monkeypatch.setattr(live, "live_page", lambda _, version: made.append(version) or f"page {len(made)}")
    rendering = live.Rendering([run])
    assert rendering.current()[1] == rendering.current()[1] == b"page 1"
    versions = [rendering.current()[0]]
    for change in (
        lambda: (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + "{}\n"),
        lambda: (run / "eval" / "new-student.json").write_text("{}"),
        lambda: (run / "samples.jsonl").write_text(""),
        lambda: (run / "run.yaml").unlink(),
        lambda: shutil.rmtree(run / "student"),
        lambda: shutil.rmtree(run),
    ):
        change()
        versions.append(rendering.current()[0])
    assert len(set(versions)) == len(versions) == len(made)
    (tmp_path / "other").mkdir()
    assert rendering.current()[0] == versions[-1]


def test_a_page_that_takes_long_is_not_made_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = fabricate(tmp_path / "run", num_steps=30, every=10)
    clock, made = [0.0], [0]

    def slow(*_: object) -> str:
        clock[0] += 3
        made[0] += 1
        return ""

    monkeypatch.setattr(live, "live_page", slow)
    monkeypatch.setattr(live.time, "monotonic", lambda: clock[0])
    rendering = live.Rendering([run])
    for second in range(200):
        (run / "samples.jsonl").write_text("x" * second)
        rendering.current()
        clock[0] += 1
    assert made[0] == 4  # every 63 seconds: three of work, sixty of pause


def test_runs_that_are_not_there_yet_are_waited_for(tmp_path: Path, hasty: None):
    with watched(tmp_path / "a<b>", tmp_path / "two") as server:
        page = Page(ask(server)[1])
        assert page.all("h1") == ["Waiting for a run"]
        assert f"{tmp_path}/a<b> does not exist" in "".join(page.all("p"))
        assert "connect-src" in policy(page)
        first = ask(server, "/version")[1]
        (tmp_path / "two").mkdir()
        assert "is not a run folder" in ask(server)[1]
        fabricate(tmp_path / "run", num_steps=30, every=10)
        (tmp_path / "two").rmdir()
        (tmp_path / "run").rename(tmp_path / "two")
        assert ask(server, "/version")[1] != first
        page = Page(ask(server)[1])
        assert str(tmp_path / "two") in page.source
        assert any("does not exist" in text for text in page.all("li"))
        fabricate(tmp_path / "a<b>", num_steps=20, every=10)
        assert len(Page(ask(server)[1]).all("p", id="live")) == 1
        text = ask(server)[1]
        assert "does not exist" not in text
        assert f"{tmp_path}/a&lt;b&gt;" in text


def test_runs_of_one_name_are_told_apart_while_another_is_waited_for(tmp_path: Path):
    runs = [fabricate(tmp_path / name / "run", num_steps=20, every=10) for name in "ab"]
    (tmp_path / "c").mkdir()
    page = Page(live_page([*runs, tmp_path / "c" / "run"], "0"))
    assert [row[0] for row in page.table("All runs")[1:]] == ["a/run", "b/run"]


def test_a_folder_that_is_deleted_as_it_is_read(run: Path, monkeypatch: pytest.MonkeyPatch):
    def gone(self: Path, pattern: str) -> Iterator[Path]:
        raise FileNotFoundError(2, "No such file or directory", str(self))

    whole = state_of([run])
    monkeypatch.setattr(Path, "glob", gone)
    assert state_of([run]) != whole


def test_half_a_line_is_left_out(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=30, every=10)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 31, "lo')
    assert "30 of 120" in live_page([run], "0")


def test_hostile_names_do_not_come_alive(tmp_path: Path):
    evil = "</p><script>alert(1)</script><!-- </main> <script"
    run = hostile_run(tmp_path / "run", evil)
    page = Page(live_page([run, tmp_path / evil.replace("/", "|")], "0"))
    assert len(page.all("script")) == 4
    assert "<!--" not in page.source
    assert policy(page)["connect-src"] == ["'self'"]
    waiting = Page(live_page([tmp_path / "</p><script>alert(1)</script>\x1b"], "0"))
    assert len(waiting.all("script")) == 1


def test_a_run_is_watched_while_it_is_trained(tmp_path: Path, hasty: None):
    made, folder = materials(tmp_path), tmp_path / "run"
    training = threading.Thread(target=distill, args=(tiny_run(made, folder, {"train.steps": 30}),))
    shown: list[str] = []
    with watched(folder) as server:
        training.start()
        while training.is_alive():
            status, text, _ = ask(server)
            assert status == 200
            step = re.search(r"\b(\d+) of 30\b", text)  # the first; plotly's megabytes come later
            shown += [step[1]] if step else []
        training.join()
        text = ask(server)[1]
    assert len(set(shown)) > 2
    assert sorted(map(int, shown)) == list(map(int, shown))
    assert "30 of 30" in text
    assert "There is no student folder yet" not in text
    assert state_of([folder]) == state_of([folder])


def started(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "distillm", "watch", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.skipif(os.name == "nt", reason="sends SIGINT")
def test_the_command_says_where_and_ends_with_ctrl_c(run: Path):
    with started(run, "--port", 0) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        address = process.stdout.readline().strip()
        (port,) = re.findall(r"^http://127\.0\.0\.1:(\d+)/$", address)
        assert ask(int(port))[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert process.stderr.read() == ""


def test_a_port_that_is_taken(run: Path, tmp_path: Path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with watched(run, port=port) as server:
            assert port < server.server_port < port + live.TRIES
        assert f"port {port} of 127.0.0.1 is taken" in refused("watch", run, "--port", port)
    assert "there is no such address" in refused("watch", run, "--host", "nowhere.invalid")
    with pytest.raises(ConfigError, match="cannot be used"):
        serve([run], "192.0.2.1", 0)  # an address of nobody's
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="is a file"):
        serve([tmp_path / "file"])


def test_an_open_door_is_said(run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(LiveServer, "serve_forever", lambda _: None)
    from command_line import distillm

    said = distillm("watch", run, "--host", "0.0.0.0", "--port", 0)
    assert re.fullmatch(r"warning: whoever reaches 0\.0\.0\.0:\d+ over the network can read these runs\n", said.err)
    assert said.out == said.out.replace("0.0.0.0", "")  # no browser finds that one
    assert distillm("watch", run, "--port", 0).err == ""
    assert [is_loopback(h) for h in ("127.0.0.1", "127.1.2.3", "::1", "localhost", "0.0.0.0", "10.0.0.1", "::")] == [
        True, True, True, True, False, False, False,
    ]  # fmt: skip


@pytest.mark.slow
def test_a_long_run_is_drawn_in_seconds(tmp_path: Path):
    run = fabricate(tmp_path / "run", num_steps=5000, every=100)
    took: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        size = len(live_page([run], "0"))
        took.append(time.perf_counter() - began)
    sys.stdout.write(f"seconds: {', '.join(f'{each:.2f}' for each in took)}\n")
    assert size < 5_000_000
    assert min(took) < 10


@pytest.mark.slow
def test_a_browser_follows_a_run_and_keeps_its_place(tmp_path: Path, hasty: None):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if browser is None:
        pytest.skip("needs a browser")
    asked: list[str] = []
    said: list[str] = []
    with watched(tmp_path / "run") as server, api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = started.new_page(viewport={"width": 1000, "height": 600})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        assert page.inner_text("h1") == "Waiting for a run"
        run = fabricate(tmp_path / "made", num_steps=60, every=20)
        run.rename(tmp_path / "run")
        page.wait_for_selector(".chart svg", timeout=30_000)
        page.select_option("#theme", "dark")
        page.evaluate("document.querySelector('details').open = true; scrollTo(0, 700)")
        version = page.get_attribute("#live", "data-version")
        with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
            file.write('{"kind": "step", "step": 61, "loss": 1.0}\n')
        page.wait_for_selector(f"#live:not([data-version='{version}'])", timeout=30_000)
        page.wait_for_selector(".chart svg")
        assert page.evaluate("document.documentElement.dataset.theme") == "dark"
        assert page.evaluate("document.querySelector('details').open")
        assert page.evaluate("scrollY") == 700
        assert "61 of" in page.inner_text("main")
        started.close()
        assert {url.removeprefix(server.url) for url in asked} == {"", "version"}
        assert said == []
