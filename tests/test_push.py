"""``distillm push``: what goes, what stays, and what is said where the hub refuses; with the hub's own client."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distillm.errors import ConfigError, DataError, ModelError
from distillm.publish import address_of, parcel_of
from fabricated_run import fabricate
from hub_server import TOKEN, Hub, hub
from tiny import save, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model("llama", layers=1), tiny_tokenizer(), tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run whose student has its model, and what does not belong there."""
    run = fabricate(tmp_path / "kitchen", num_steps=20, every=10)
    shutil.copytree(model, run / "student", dirs_exist_ok=True)
    for name in ("secrets.json", "train.jsonl", "optimizer.bin", "modeling_x.py", "[a].safetensors", ".env"):
        (run / "student" / name).write_text("private")
    (run / "student" / "checkpoints").mkdir()
    (run / "student" / "checkpoints" / "config.json").write_text("private")
    return run


@pytest.fixture
def server() -> Iterator[Hub]:
    with hub() as started:
        yield started


def push(
    server: Hub | str, *arguments: object, token: str | None = TOKEN, **more: str
) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_ENDPOINT": server if isinstance(server, str) else server.url, "HF_HUB_DISABLE_XET": "1"}
    environment |= {"HF_HOME": "/nowhere", **({} if token is None else {"HF_TOKEN": token}), **more}
    command = [sys.executable, "-m", "distillm", "push", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert "Traceback" not in done.stderr, done.stderr
    assert TOKEN not in done.stdout + done.stderr
    return done


MODEL_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
               "tokenizer_config.json"}  # fmt: skip


def test_the_student_goes_whole_and_nothing_else_does(server: Hub, run: Path):
    done = push(server, run, "me/kitchen")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{server.url}/me/kitchen"
    assert server.files.keys() == MODEL_FILES
    for name in MODEL_FILES:
        assert server.files[name] == (run / "student" / name).read_bytes()
    assert server.private == {"me/kitchen": False}
    assert b"# smollm2-6-layers-distillm" in server.files["README.md"]  # made because the run had none
    for name in ("secrets.json", "train.jsonl", "checkpoints/", "[a].safetensors"):
        assert f"left out: {name}" in done.stdout
    assert "states no license" in done.stdout
    assert f"{(run / 'student' / 'model.safetensors').stat().st_size:,}" in done.stdout
    assert not [path for path in run.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]


def test_a_link_out_of_the_folder_stays_and_one_into_the_hubs_cache_goes(model: Path, tmp_path: Path):
    folder = Path(shutil.copytree(model, tmp_path / "hub" / "snapshots" / "rev"))
    (tmp_path / "private").write_text("private")
    (folder / "LICENSE").symlink_to(tmp_path / "private")
    (folder / "NOTICE").symlink_to("LICENSE")
    (folder / "vocab.txt").symlink_to("config.json")
    (tmp_path / "hub" / "blobs").mkdir()
    (folder / "model.safetensors").rename(tmp_path / "hub" / "blobs" / "abc")
    (folder / "model.safetensors").symlink_to("../../blobs/abc")
    parcel = parcel_of(str(folder))
    assert {"model.safetensors", "vocab.txt"} <= parcel.files.keys()
    assert {"LICENSE, a link out of the folder", "NOTICE, a link out of the folder"} <= set(parcel.left_out)


def test_a_dry_run_asks_the_hub_nothing(server: Hub, run: Path):
    done = push(server, run, "me/kitchen", "--dry-run", token=None)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in done.stdout
    assert server.asked == []


def test_private_and_a_branch(server: Hub, run: Path):
    done = push(server, run, "me/kitchen", "--private", "--revision", "second")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"{server.url}/me/kitchen/tree/second"
    assert server.private == {"me/kitchen": True}
    assert server.branches == ["second"]
    assert any(asked.endswith("/commit/second") for asked in server.asked)


def test_a_public_repository_is_not_taken_for_a_private_one(server: Hub, run: Path):
    server.private["me/kitchen"] = False
    done = push(server, run, "me/kitchen", "--private")
    assert done.returncode == 2
    assert "me/kitchen is there already, and public; nothing was uploaded" in done.stderr
    assert server.files == {}
    assert push(server, run, "me/kitchen").returncode == 0  # again, into what is there
    assert server.files.keys() == MODEL_FILES


@pytest.mark.parametrize(
    ("part", "status", "code", "said"),
    [
        ("/api/repos/create", 401, 2, "does not accept the token"),
        ("/api/", 403, 2, "no right to write to me/kitchen (403"),
        ("/commit/", 403, 2, "no right to write to me/kitchen"),
        ("/preupload/", 404, 2, "knows no me/kitchen"),
        ("/api/repos/create", 500, 5, "cannot do it now (500"),
        ("/commit/", 502, 5, "cannot do it now (502"),
        ("/large/", 400, 2, "does not take it (400"),
        ("/api/validate-yaml", 400, 2, "Invalid metadata in README.md"),
        ("/api/repos/create", 402, 2, "does not take it (402"),
    ],
)
def test_what_the_hub_refuses_is_said(server: Hub, run: Path, part: str, status: int, code: int, said: str):
    server.refuse[part] = (status, f"no, {TOKEN} must not")
    done = push(server, run, "me/kitchen")
    assert done.returncode == code, done.stderr
    assert said in done.stderr
    assert server.files == {}


def test_without_a_login_a_network_or_a_hub(server: Hub, run: Path):
    assert "not logged in" in push(server, run, "me/kitchen", token=None).stderr
    assert server.asked == []
    assert "does not accept the token" in push(server, run, "me/kitchen", token="hf_other").stderr
    assert "HF_HUB_OFFLINE is set" in push(server, run, "me/kitchen", HF_HUB_OFFLINE="1").stderr
    done = push("http://127.0.0.1:9", run, "me/kitchen")
    assert done.returncode == 5
    assert "http://127.0.0.1:9 does not answer" in done.stderr


def test_what_is_no_model_does_not_go(run: Path, model: Path, tmp_path: Path):
    with pytest.raises(DataError, match="is no folder"):
        parcel_of(str(tmp_path / "absent"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="none of the files of a model"):
        parcel_of(str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="no model folder"):
        parcel_of(str(run / "eval"))
    shutil.rmtree(run / "student")
    with pytest.raises(DataError, match="no student yet"):
        parcel_of(str(run))
    folder = shutil.copytree(model, tmp_path / "card")
    assert parcel_of(str(folder)).notes == ["there is no README.md: the hub will know nothing of the model"]
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    assert parcel_of(str(folder)).notes == []
    (folder / "README.md").write_text("---\nlicense: [\n---\n")
    with pytest.raises(ModelError, match="metadata cannot be read"):
        parcel_of(str(folder))


def test_a_card_that_was_edited_stays_and_that_is_said(run: Path):
    assert len(parcel_of(str(run)).notes) == 1  # no licence; the card is written here
    assert len(parcel_of(str(run)).notes) == 1
    card = run / "student" / "README.md"
    edited = card.read_text(encoding="utf-8").replace("---\n", "---\nlicense: mit\n", 1)
    card.write_text(edited, encoding="utf-8")
    (note,) = parcel_of(str(run)).notes
    assert "was edited, or scores were added" in note
    assert card.read_text(encoding="utf-8") == edited


@pytest.mark.parametrize("name", ["kitchen", "a/b/c", "a b/c", "me/x..y", "", "/x", "me/"])
def test_a_name_that_the_hub_would_not_take(name: str):
    with pytest.raises(ConfigError):
        address_of(name)


def test_an_adapter_of_a_local_model_means_nothing_to_others(tmp_path: Path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/base"}')
    with pytest.raises(ModelError, match=r"base_model_name_or_path: /home/me/base.*hub name"):
        parcel_of(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    assert parcel_of(str(tmp_path)).files.keys() == {"adapter_model.safetensors", "adapter_config.json"}
