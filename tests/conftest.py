"""Settings for every test: no network, no progress bars, one thread (tiny models only lose by more)."""

import gc
import os
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # also in the processes that tests start

import torch
from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()

# Without a GPU, Triton's kernels are interpreted. It reads this as it is imported, which neither torch nor transformers
# does by itself; nothing else here uses it.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SHARED = Path(__file__).parents[2] / "shared"


LONG = ("sharding", "processes", "check_memory", "triton", "teacher_cache", "studies", "seq2seq_runs", "resume")
"""Files that take long and that the alphabet puts last: one of two workers would still be at one, the other done."""


@pytest.fixture(name="made", scope="module")
def _made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a tiny run needs, once for each file of tests."""
    from tiny_run import materials  # not before the environment above

    return materials(tmp_path_factory.mktemp("made"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first; `--no-loadscope-reorder` of pytest-xdist leaves it there."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONG)


def pytest_collection_finish() -> None:
    """What imports and the collection made stays: looking through it for garbage again and again takes a tenth of the
    time of all tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(700, 10, 100)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked ``data`` read ../shared: skipped where it is absent, failed where it was asked for."""
    if item.get_closest_marker("data") and not SHARED.is_dir():
        if os.environ.get("DISTILLM_REQUIRE_DATA"):
            pytest.fail("../shared is absent, and these tests were asked for by name")
        pytest.skip("needs ../shared, which is absent")
