"""Shared by all tests: the small shop, tiny models, a world of two tastes, the research data beside the checkout."""

import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections import Counter
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import settings

from tests.processes import command_line, end, of_living
from tests.vision_families import FAMILIES, family_folder
from vlrank.config import PrepareConfig
from vlrank.data.dataset import Dataset, write_dataset
from vlrank.demo.shop import make_shop

# An example may take as long as a busy machine makes it take.
settings.register_profile("vlrank", deadline=None)
settings.load_profile("vlrank")

SESSION = "VLRANK_TEST_SESSION"
"""Environment variable that marks every process which the tests start, directly or through Ray."""


def pytest_configure(config: pytest.Config) -> None:
    # Under nohup, or in the background of a script, signals are ignored, and processes that tests start inherit that.
    for number, usual in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    if not hasattr(config, "workerinput"):  # xdist's workers inherit the controller's mark
        os.environ[SESSION] = uuid.uuid4().hex
        # Tiny tensors gain nothing from threads, which wait for each other in loops: on two cores that others used too,
        # the same tests took two to three times the CPU time.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # The user's own cache is neither read nor filled.
        os.environ["VLRANK_CACHE"] = tempfile.mkdtemp(prefix="vlrank-cache-")
        config.add_cleanup(lambda: shutil.rmtree(os.environ["VLRANK_CACHE"], ignore_errors=True))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start Ray, vLLM or Unsloth come first, so that no process is left alone with a long one at the end."""
    slow = Counter(item.path for item in items if item.get_closest_marker("stack"))
    items.sort(key=lambda item: -slow[item.path])


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    """A process that outlives the tests fails the run: users would find it on their machines."""
    yield
    if hasattr(session.config, "workerinput"):
        return  # the controller looks when all workers have ended
    _, left = psutil.wait_procs(_started_by_tests(), timeout=20)
    lines = of_living(left, command_line)
    for process in left:
        print(f"left behind: {process.pid} {lines.get(process, '(has ended since)')[:200]}")
    end(left)
    if left and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def _started_by_tests() -> list[psutil.Process]:
    others = (process for process in psutil.process_iter() if process.pid != os.getpid())
    sessions = of_living(others, lambda process: process.environ().get(SESSION))
    return [process for process, session in sessions.items() if session == os.environ[SESSION]]


SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call: pytest.CallInfo[None]) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show what a process printed that ended otherwise than `subprocess.run(..., check=True)` expects."""
    report = yield
    error = call.excinfo.value if call.excinfo else None
    if isinstance(error, subprocess.CalledProcessError | subprocess.TimeoutExpired):
        for name in ("stdout", "stderr"):
            if printed := getattr(error, name):
                text = printed if isinstance(printed, str) else printed.decode(errors="replace")
                report.sections.append((f"{name} of the process", text))
    return report


@pytest.fixture(scope="session")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """A small shop with pictures; read-only, copy it to change it."""
    return make_shop(tmp_path_factory.mktemp("shop") / "shop", n_items=60, n_users=80)


@pytest.fixture(scope="session")
def tiny_text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 folder with random weights."""
    from vlrank.demo.base_models import save_model, text_model, train_tokenizer

    tokenizer = train_tokenizer(_corpus())
    return save_model(tmp_path_factory.mktemp("models") / "text", text_model(tokenizer), tokenizer)


@pytest.fixture(scope="session")
def tiny_vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL folder with random weights."""
    from vlrank.demo.base_models import save_model, train_tokenizer, vision_model

    tokenizer = train_tokenizer(_corpus())
    return save_model(tmp_path_factory.mktemp("models") / "vision", vision_model(tokenizer), tokenizer)


@pytest.fixture(scope="session", params=FAMILIES)
def family_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of each vision family, named after its model_type, with random weights."""
    folder: Path = tmp_path_factory.mktemp("families") / request.param
    return family_folder(request.param, folder, _corpus())


def _corpus() -> list[str]:
    from vlrank.demo.base_models import corpus

    return corpus()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Research data; never part of the project."""
    return _present(SHARED / "data")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """Configs and tokenizers of the real models, without weights."""
    return _present(SHARED / "models")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """80 users, 60 items in two halves (odd: tea, even: tools); everyone stays in one half."""
    rng = np.random.default_rng(7)
    names = {0: ("steel hammer", "Tools"), 1: ("green tea", "Tea")}
    items = [
        {
            "item_id": item,
            "source_id": f"B{item:03d}",
            "text": f"{names[item % 2][0]} {item}",
            "title": f"{names[item % 2][0]} {item}",
            "brand": "Acme",
            "categories": [names[item % 2][1], "All"],
            "description": "",
            "image_path": None,
            "image_url": None,
        }
        for item in range(1, 61)
    ]
    sequences = []
    for user in range(1, 81):
        half = np.arange(2 - user % 2, 61, 2)
        weights = 1 / np.arange(1, len(half) + 1)
        history = rng.choice(half, size=int(rng.integers(4, 12)), replace=False, p=weights / weights.sum()).tolist()
        start = int(rng.integers(0, 1000))
        sequences.append(
            {
                "user_id": user,
                "source_user": f"U{user:03d}",
                "item_ids": history,
                "timestamps": [start + 10 * step for step in range(len(history))],
            }
        )
    return write_dataset(tmp_path_factory.mktemp("world") / "data", items=items, sequences=sequences, options={})


@pytest.fixture(scope="session")
def beauty(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Amazon Beauty 2014 (5-core), prepared whole; skipped without the research data."""
    from vlrank.data.prepare import run

    folder, out = shared_data / "beauty2014", tmp_path_factory.mktemp("beauty") / "data"
    reviews, meta = (folder / "interactions.csv.gz",), (folder / "items.jsonl.gz",)
    run(PrepareConfig(reviews=reviews, meta=meta, out=out, min_uc=1, min_sc=1, keep_untitled=True))
    return Dataset.open(out)


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"{folder.name}/ is not beside the checkout")
    return folder
