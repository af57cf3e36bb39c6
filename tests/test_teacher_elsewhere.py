"""A teacher that is not here: only what was kept of it, or a server that scores given tokens."""

import json
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from answering_server import Answer, Script, serving
from command_line import done, refused
from distillm.checking import check
from distillm.client import Server
from distillm.config import as_yaml, make_run
from distillm.divergences import DIVERGENCES, Bucketed
from distillm.errors import ConfigError, ServerError, StorageError
from distillm.kernels import linear_divergence, logits
from distillm.pipeline import distill
from distillm.served_teacher import ServedTeacher
from distillm.teacher_cache import Disk, entries, teachers
from distillm.types import Head, Layout
from rows import row
from tiny import tiny_tokenizer
from tiny_run import Heard, figures, lines, materials, rows, same_weights, scores, settings, weights, write_rows

pytest.importorskip("httpx", reason="needs the package httpx, of the extras server and dev")


# ------------------------------------------------------------------------------------------------ what was kept of it


@dataclass
class Away:
    """Settings of a run whose teacher was deleted after its cache was filled, and the run that had it."""

    made: Path
    given: dict[str, Any]
    name: str
    whole: Path


def kept_settings(made: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    fixed = {"method": {"name": "kd"}, "teacher.cache": "disk", "teacher.cache_folder": str(made / "cache")}
    return settings(made, folder, {**fixed, "data.text": None, **changes})


@pytest.fixture(name="away", params=["none", "bf16"], scope="module")
def _away(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Away:
    made = materials(tmp_path_factory.mktemp("away"))
    precision = {"train.mixed_precision": request.param}
    path = made / "run.yaml"
    write_rows(made / "other.jsonl", rows(2, 60))
    path.write_text(as_yaml(make_run(kept_settings(made, made / "warm", **precision))), encoding="utf-8")
    said = done("cache", "warm", str(path))
    whole = distill(make_run(kept_settings(made, made / "whole", **precision)))
    (kept,) = teachers(made / "cache")
    assert kept.alone
    assert f"teacher.cached={kept.name}" in said
    shutil.copytree(made / "cache", made / "copied")
    shutil.rmtree(made / "teacher")
    shutil.rmtree(made / "cache")
    given = kept_settings(made, made / "alone", **precision)
    given["teacher"] = {"cached": kept.name, "cache_folder": str(made / "copied"), "path": str(made / "teacher")}
    return Away(made, given, kept.name, whole)


def changed(away: Away, output: str, **changes: Any) -> dict[str, Any]:
    return json.loads(json.dumps(away.given)) | {"output": str(away.made / output)} | changes


def test_kd_on_what_was_kept_is_the_run_with_the_teacher(away: Away) -> None:
    display = Heard()
    alone = distill(make_run(changed(away, "alone")), display)
    assert figures(alone) == figures(away.whole)
    assert same_weights(weights(alone), weights(away.whole))
    assert any("is not here" in said for said in display.said)
    mine, theirs = scores(away.whole), scores(alone)
    assert set(mine) - set(theirs) == {"numbers-teacher.json"}
    for file, result in theirs.items():
        assert result["scores"] == mine[file]["scores"]
        assert "divergence" in result["scores"]
    assert all(entry["teacher"] is None for entry in lines(alone / "samples.jsonl"))
    assert (alone / "report.html").is_file()


def test_a_check_of_such_a_run_reads_what_was_kept(away: Away) -> None:
    checked = check(make_run(changed(away, "checked")))
    assert {"training", "validation", "scoring"} <= {work.name for work in checked.cost.work}
    assert checked.subject.models.teacher is None
    assert not (away.made / "checked").exists()


@pytest.mark.parametrize("method", ["distillm", "gkd", "imitkd", "minillm", "distillm2", "seqkd"])
def test_methods_that_need_more_are_refused_before_they_start(away: Away, method: str) -> None:
    with pytest.raises(ConfigError, match=r"teacher\.cached") as caught:
        make_run(changed(away, "refused", method={"name": method}))
    assert method in str(caught.value)
    assert not (away.made / "refused").exists()


def test_a_student_of_its_layers_is_refused(away: Away) -> None:
    with pytest.raises(ConfigError, match=r"student\.layers needs the teacher itself"):
        make_run(changed(away, "refused", student={"layers": 1}))


def test_a_row_that_is_missing_is_named_before_the_run_begins(away: Away) -> None:
    folder = away.made / "lacking"
    shutil.copytree(away.made / "copied", folder)
    next(iter(entries(folder))).path.unlink()
    given = changed(away, "lacks")
    given["teacher"]["cache_folder"] = str(folder)
    with pytest.raises(ConfigError, match=r"has nothing of (train|valid|test):\d+, and .*distillm cache warm"):
        distill(make_run(given))
    assert not (away.made / "lacks" / "metrics.jsonl").exists()


def test_a_damaged_row_is_missing_and_a_damaged_head_is_said(away: Away) -> None:
    for name, pattern in (("states", "has nothing of"), ("head", "is damaged .*copy it again")):
        folder = away.made / f"damaged-{name}"
        shutil.copytree(away.made / "copied", folder)
        head = folder / away.name / "head" / "head.safetensors"
        path = next(iter(entries(folder))).path if name == "states" else head
        path.write_bytes(path.read_bytes()[:-4] if name == "head" else path.read_bytes()[:-4] + b"spam")
        given = changed(away, "damaged")
        given["teacher"]["cache_folder"] = str(folder)
        with pytest.raises(Exception, match=pattern):
            distill(make_run(given))


def test_a_path_is_no_name_of_what_was_kept(away: Away) -> None:
    with pytest.raises(ConfigError, match="a name that `distillm cache` shows"):
        make_run(changed(away, "refused", teacher={"cached": "../../elsewhere"}))


def test_a_name_that_is_not_kept_says_which_are(away: Away) -> None:
    given = changed(away, "unknown")
    given["teacher"]["cached"] = "0123456789abcdef"
    with pytest.raises(ConfigError, match=away.name):
        distill(make_run(given))


def test_a_finished_run_is_scored_again_with_what_was_kept(away: Away) -> None:
    folder = distill(make_run(changed(away, "scored")))
    assert "divergence" in done("eval", str(folder), "--data", str(away.made / "test.jsonl"))
    said = refused("eval", str(folder), "--data", str(away.made / "test.jsonl"), "--system", "teacher")
    assert "not here" in said
    said = done("eval", str(folder), "--data", str(away.made / "other.jsonl"))
    assert "perplexity" in said
    assert "divergence" not in said


def test_what_was_kept_for_runs_without_the_teacher_is_not_evicted(away: Away, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(away.made / "copied", folder)
    before = len(list(entries(folder)))
    other = Disk(folder, "0" * 16, 1, lambda _: None)
    other.put("ab" * 32, torch.ones(4, 4))
    other.put("cd" * 32, torch.ones(4, 4))
    assert len(list(entries(folder))) == before


def test_warming_says_when_there_is_no_room_for_all(tmp_path: Path) -> None:
    made = materials(tmp_path)
    path = made / "run.yaml"
    path.write_text(as_yaml(make_run(kept_settings(made, made / "run", **{"teacher.cache_gib": 2e-6}))), "utf-8")
    assert "teacher.cache_gib" in refused("cache", "warm", str(path), code=4)


def test_a_bit_of_the_head_that_changed_is_noticed(away: Away) -> None:
    folder = away.made / "flipped"
    shutil.copytree(away.made / "copied", folder)
    head = folder / away.name / "head" / "head.safetensors"
    found = bytearray(head.read_bytes())
    found[-9] ^= 64
    head.write_bytes(found)
    given = changed(away, "flip")
    given["teacher"]["cache_folder"] = str(folder)
    with pytest.raises(StorageError, match="not as it was written"):
        distill(make_run(given))


def test_clearing_takes_the_head_as_well(away: Away, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(away.made / "copied", folder)
    done("cache", "clear", "--folder", str(folder))
    assert list(folder.iterdir()) == []


# ------------------------------------------------------------------------------------------ a server that scores tokens

TOP = 5


def scorer(made: Path, way: str = "prompt_logprobs", **faults: Any) -> Script:
    """Scores tokens as vLLM does in one of the two ways, with the teacher in ``made``."""
    model: Any = AutoModelForCausalLM.from_pretrained(made / "teacher").eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(made / "teacher")
    lock = threading.Lock()

    def place(log_p: Tensor, token: int, count: int) -> dict[int, float]:
        ids = [*log_p.topk(count).indices.tolist(), token]
        return {i: log_p[i].item() for i in ids}

    def script(prompt: str, before: int) -> Answer:
        ids = json.loads(prompt)
        count = faults.get("lists", TOP)
        with lock, torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        places = [None, *(place(log_p[i - 1], ids[i], count) for i in range(1, len(ids)))]
        if way == "prompt_logprobs":
            text = faults.get("text", lambda token: tokenizer.decode([token]))
            found = [
                p and {str(i): {"logprob": v, "rank": 1, "decoded_token": text(i)} for i, v in p.items()}
                for p in places
            ]
            return Answer("x", scored={"prompt_logprobs": found})
        name = faults.get("name", lambda token: f"token_id:{token}")
        listed = [p and {name(i): v for i, v in list(p.items())[:count]} for p in places]
        own = [p and p[i] for p, i in zip(places, ids, strict=True)]
        said = {"tokens": [name(i) for i in ids], "token_logprobs": own, "top_logprobs": listed}
        more = {"tokens": name(7), "token_logprobs": -1.0, "top_logprobs": {name(7): -1.0}}  # what it wrote itself
        return Answer("x", scored={"logprobs": {k: [*v, more[k]] for k, v in said.items()}})

    return script


def served(url: str, **changes: Any) -> ServedTeacher:
    asked = Server(url, jobs=3, timeout=5, attempts=3, backoff=0.01)
    given: dict[str, Any] = {"top_k": TOP, "tokenizer": tiny_tokenizer(), "num_tokens": 300, "layout": Layout(0)}
    return ServedTeacher(asked, "big", **given | changes)


def run_settings(made: Path, output: Path, url: str, **changes: Any) -> dict[str, Any]:
    given = settings(made, output, {"validation.samples": 0, "train.steps": 4, **changes})
    given["teacher"] = {"server": {"url": url, "model": "big", "top_k": TOP, "attempts": 2}} | given.get("extra", {})
    return given


def test_a_check_of_such_a_run_asks_the_server(made: Path, tmp_path: Path) -> None:
    with serving(scorer(made)) as server:
        checked = check(make_run(run_settings(made, tmp_path / "run", server.url)))
    assert {"training", "teacher", "generation"} <= {work.name for work in checked.cost.work}


@pytest.mark.parametrize("way", ["prompt_logprobs", "echo"])
def test_what_a_server_says_is_what_the_teacher_here_says_of_its_likeliest_tokens(made: Path, way: str) -> None:
    rows = [row(0, 5, 3), row(1, 2, 6, "student"), row(2, 4, 4, teacher_context=[5, 6])]
    model: Any = AutoModelForCausalLM.from_pretrained(made / "teacher").eval()
    with serving(scorer(made, way)) as server:
        teacher = served(server.url)
        assert teacher.probe() == way
        states = teacher.states(rows)
        assert all(isinstance(body["prompt"], list) for body in server.asked)
    for given, said in zip(rows, states, strict=True):
        ids = (given.teacher_context or given.prompt) + given.response
        with torch.no_grad():
            log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)[-len(given.response) - 1 : -1]
        values, tokens = log_p.topk(TOP)
        torch.testing.assert_close(said[:, :TOP], values)
        assert torch.equal(said[:, TOP:].long(), tokens)
        # All the others are one bucket, whatever the divergence.
        q = torch.randn(len(log_p), 300, generator=torch.Generator().manual_seed(0))
        for name in ("forward_kl", "skew_kl", "jsd", "reverse_kl"):
            function = DIVERGENCES[name]
            exact = Bucketed(function, TOP)(log_p, q.log_softmax(-1)).sum()
            for impl in ("eager", "chunked"):
                found = linear_divergence(function, teacher.head(said), Head(q, None), torch.ones(len(q)), impl=impl)
                torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5)


def test_the_listed_part_of_a_distribution_sums_to_one() -> None:
    listed = torch.tensor([[0.5, 0.3, 2.0, 7.0], [0.6, 0.4, 1.0, 0.0]])
    listed[:, :2] = listed[:, :2].log()
    p = logits(Head(listed, None, listed=10)).exp()
    torch.testing.assert_close(p.sum(-1), torch.ones(2))
    torch.testing.assert_close(p[0, [2, 7, 0]], torch.tensor([0.5, 0.3, 0.2 / 8]))
    assert 0 < p[1, 5] < 1e-7


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "symmetric_kl", "skew_reverse_kl", "jsd"])
def test_a_teacher_that_is_sure_leaves_every_divergence_finite(name: str) -> None:
    log_p = torch.tensor([[60.0, 3.0, 2.0, *[0.0] * 97], [200.0, 3.0, 2.0, *[0.0] * 97]]).log_softmax(-1)
    values, ids = log_p.topk(3)
    values[1, 2] = -torch.inf  # as a server may say
    q = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), requires_grad=True)
    teacher = Head(torch.cat([values, ids.float()], -1), None, listed=100)
    for impl in ("eager", "chunked"):
        total = linear_divergence(name, teacher, Head(q, None), torch.ones(2), impl=impl)
        assert total.isfinite()
        (gradient,) = torch.autograd.grad(total, q)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("method", ["kd", "gkd", "distillm"])
def test_a_run_with_a_server_is_the_run_with_the_teacher_and_the_same_bucket(
    made: Path, tmp_path: Path, method: str
) -> None:
    changes: dict[str, Any] = {"method": {"name": method}, "student.dropout": 0.0, "data.text": None}
    if method == "distillm":
        changes["method"] |= {"initial_probability": 0.7, "capacity": 6, "replay_ratio": "constant"}
    with serving(scorer(made)) as server:
        found = distill(make_run(run_settings(made, tmp_path / "served", server.url, **changes)))
    changes["method"]["top_k"] = TOP
    here = distill(make_run(settings(made, tmp_path / "here", {"validation.samples": 0, "train.steps": 4, **changes})))
    for mine, theirs in zip(lines(here / "metrics.jsonl", "step"), lines(found / "metrics.jsonl", "step"), strict=True):
        assert theirs["loss"] == pytest.approx(mine["loss"], rel=1e-3)
    for name, tensor in weights(here).items():
        torch.testing.assert_close(weights(found)[name], tensor, rtol=1e-3, atol=1e-4)
    assert "divergence" in scores(found)["numbers-student.json"]["scores"]


def test_a_server_is_asked_about_each_row_once(made: Path, tmp_path: Path) -> None:
    changes = {"method": {"name": "kd"}, "data.text": None, "train.epochs": 3, "train.steps": None}
    with serving(scorer(made)) as server:
        distill(make_run(run_settings(made, tmp_path / "run", server.url, **changes)))
        asked = [json.dumps(body["prompt"]) for body in server.asked]
    # The first question, every row, and the student's answers to the last three.
    assert len(asked) == len(set(asked)) == 1 + 12 + 4 + 3 + 3


@pytest.mark.parametrize(
    ("faults", "said"),
    [
        ({"lists": TOP - 2}, r"fewer than teacher\.server\.top_k"),
        ({"text": lambda _: "another"}, "do not share a tokenizer"),
        ({"way": "echo", "name": lambda token: f"text{token}"}, "named by its text"),
    ],
)
def test_a_server_that_cannot_do_it_is_told_so_before_training(made: Path, faults: Any, said: str) -> None:
    with serving(scorer(made, **faults)) as server, pytest.raises(ConfigError, match=said):
        served(server.url).probe()


def test_a_server_that_only_writes_is_refused_with_what_would_help(made: Path, tmp_path: Path) -> None:
    with serving(lambda *_: Answer("hello", [5, 6])) as server:
        given = run_settings(made, tmp_path / "run", server.url, method={"name": "kd"})
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(given), encoding="utf-8")
        said = refused("train", str(path))
    assert "does not score given tokens" in said
    assert "data.responses_server" in said
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_garbage_is_asked_for_again_and_what_stays_garbage_is_an_error(made: Path) -> None:
    right = scorer(made)
    bad = [Answer(body=b"{"), Answer(status=503), Answer("x", scored={"prompt_logprobs": [None, {"a": 3}]})]
    with serving(lambda prompt, before: bad[before - 1] if 1 <= before <= 2 else right(prompt, before)) as server:
        teacher = served(server.url)
        teacher.probe()
        assert len(teacher.states([row(0)])) == 1
    with serving(lambda prompt, before: bad[2] if before else right(prompt, before)) as server:
        teacher = served(server.url)
        teacher.probe()
        with pytest.raises(ServerError, match="no answer in 3 attempts"):
            teacher.states([row(0)])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"method": {"name": "kd", "temperature": 2.0}}, r"method\.temperature"),
        ({"method": {"name": "kd", "top_k": 9}}, r"method\.top_k is 9"),
        ({"method": {"name": "minillm"}}, "method minillm needs the teacher itself"),
        ({"method": {"name": "distillm2"}}, "method distillm2 needs the teacher itself"),
        ({"method": {"name": "seqkd"}}, "method seqkd needs the teacher itself"),
        ({"data.responses": "teacher"}, r"data\.responses=teacher needs the teacher itself"),
    ],
)
def test_what_a_server_cannot_do_is_refused(made: Path, tmp_path: Path, changes: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make_run(run_settings(made, tmp_path, "http://127.0.0.1:1/v1", **changes))


@pytest.mark.parametrize("more", [{"url": "http://me:secret@127.0.0.1:1/v1"}, {"body": {"api_key": "secret"}}])
def test_a_secret_in_the_settings_is_refused_without_being_shown(made: Path, tmp_path: Path, more: Any) -> None:
    given = run_settings(made, tmp_path, "http://127.0.0.1:1/v1", method={"name": "kd"})
    given["teacher"]["server"] |= more
    with pytest.raises(ConfigError, match="key_env") as caught:
        make_run(given)
    assert "secret" not in str(caught.value)


def test_where_a_teacher_is_is_said_once(made: Path, tmp_path: Path) -> None:
    given = run_settings(made, tmp_path, "http://127.0.0.1:1/v1", method={"name": "kd"})
    for more, said in (
        ({"path": "x"}, "path, cached or server"),
        ({"dtype": "bfloat16"}, "dtype says nothing"),
        ({"quantization": "4bit"}, "quantization says nothing"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_run(given | {"teacher": given["teacher"] | more})
