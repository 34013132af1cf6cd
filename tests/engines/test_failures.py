"""What went wrong in a child process is what the user has to read, not that something went wrong there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vlrank.config import EngineConfig
from vlrank.engines.failures import last_error, root_cause
from vlrank.engines.models import open_model
from vlrank.engines.scoring import open_scorer
from vlrank.errors import UserError

FAILED = RuntimeError("Engine core initialization failed. See root cause above. Failed core proc(s): {}")


def start(printed: str, error: Exception | None) -> None:
    with root_cause():
        subprocess.run([sys.executable, "-c", f"import sys; sys.stderr.write({printed!r})"], check=True)
        if error:
            raise error


def test_the_error_of_a_child_process_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    printed = (
        "(EngineCore pid=7) ERROR 11-27 12:00:00 [core.py:1510] EngineCore failed to start.\n"
        "(EngineCore pid=7) ERROR 11-27 12:00:00 [core.py:1510] Traceback (most recent call last):\n"
        "(EngineCore pid=7) ValueError: rank 600 is not one of 8, 16\n"
        "(EngineCore pid=7) Exception: WorkerProc initialization failed due to an exception. See root cause above.\n"
    )
    with pytest.raises(UserError) as caught:
        start(printed, FAILED)
    assert caught.value.problem == "an engine did not start: ValueError: rank 600 is not one of 8, 16"
    assert capfd.readouterr().err == printed, "logs keep all of it"


def test_a_full_gpu_names_the_settings_to_lower() -> None:
    with pytest.raises(UserError, match="the engine ran out of memory: ValueError: No available memory") as caught:
        start("(EngineCore pid=7) ValueError: No available memory for the cache blocks.\n", FAILED)
    assert "engine.max_model_len" in str(caught.value.remedy)


def test_an_error_of_the_process_itself_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="did not start: KeyError: 'no such model'"):
        start("ValueError: of somebody else, long ago\n", KeyError("no such model"))
    with pytest.raises(UserError, match="rank 600"):
        start("", UserError("adapter has rank 600"))
    start("hello\n", None)
    print("after", file=sys.stderr, flush=True)
    assert capfd.readouterr().err.endswith("hello\nafter\n")


@pytest.mark.stack
def test_vllm_says_what_went_wrong_in_its_core(tiny_text_model: Path, tmp_path: Path) -> None:
    """The model is loaded by the core, a process of its own."""
    pytest.importorskip("vllm")
    model = tmp_path / "model"
    shutil.copytree(tiny_text_model, model)
    content = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"an engine did not start: \w*Safetensor\w*: ") as caught:
        open_scorer(open_model(model), EngineConfig(name="vllm", max_model_len=512))
    assert "See root cause" not in caught.value.problem


def test_colours_and_prefixes_are_no_part_of_an_error() -> None:
    lines = [
        "\x1b[0;36m(EngineCore pid=21)\x1b[0;0m torch.OutOfMemoryError: CUDA out of memory.\n",
        "    at x: y\n",
        "",
    ]
    assert last_error(lines) == "OutOfMemoryError: CUDA out of memory."
    assert last_error(["all well", "Warning: this is none"]) is None
