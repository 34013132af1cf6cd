"""A run that is killed goes on exactly where it was, in every number format, and even while a checkpoint is written."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import Program
from vlrank.config import TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.data.tables import DiskFull
from vlrank.training import saving, state
from vlrank.training.data import TrainingData
from vlrank.training.history import committed_step, read_history, record_evaluation
from vlrank.training.model import resolve_base
from vlrank.training.saving import Write, name_dtype
from vlrank.training.state import saved_states
from vlrank.training.trainer import ReportCallback, RerankTrainer
from vlrank.training.worker import Progress, make_trainer

Make = Callable[..., TrainConfig]


def trainer_of(config: TrainConfig, stop_at: int | None = None) -> RerankTrainer:
    """A trainer whose checkpoints are written by a thread and recorded then, as Ray Train does."""
    torch.manual_seed(0)
    data = TrainingData.of_dataset(Dataset.open(config.dataset), "ground_truth")
    committed = committed_step(config.out)
    trainer = make_trainer(
        config,
        resolve_base(config),
        data,
        torch.device("cpu"),
        rank=0,
        world=1,
        show=Progress(None),
        committed=committed,
    )

    def report(metrics: dict[str, Any], write: Write) -> None:
        def work() -> None:
            line = metrics | {"checkpoint": f"home/{write.name}"}
            write.to(config.out / "home" / write.name, lambda: record_evaluation(config.out, line))

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        if stop_at is not None and metrics["step"] >= stop_at:
            thread.join()
            raise KeyboardInterrupt

    trainer.add_callback(ReportCallback(trainer, report, lambda step, loss: None))
    return trainer


def train(config: TrainConfig, stop_at: int | None = None) -> dict[str, torch.Tensor]:
    """The trained weights at the end, or when it was stopped; a saved state is taken up."""
    trainer = trainer_of(config, stop_at)
    found = saved_states(config.out, trainer.saver.committed)
    try:
        trainer.resume(found[0]) if found else trainer.train()
        trainer.saver.wait()
    except KeyboardInterrupt:
        pass
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=0, msg=name)


def config_of(settings: Make, out: Path, **changes: Any) -> TrainConfig:
    """Short prompts, three steps an epoch."""
    short: dict[str, Any] = {"negatives": 3, "val_users": 4, "ranking": {"max_history": 1, "max_item_chars": 20}}
    changes = {"method": "full", "backend": "transformers", "epochs": 3, "batch_size": 32, **short, **changes}
    return settings("semantic_summary_small", out=out, load_in_4bit=False, warmup_ratio=0.0, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dtype": "bfloat16"},
        {"method": "lora", "dtype": "bfloat16", "lora": {"dropout": 0.1}},
    ],
    ids=["float32", "bfloat16 with masters", "adapters with dropout"],
)
def test_a_stopped_run_goes_on_to_the_bit(changes: dict[str, Any], settings: Make, tmp_path: Path) -> None:
    """Masters, moments, learning rate and random numbers all matter: dropout would show a wrong generator."""
    expected = train(config_of(settings, tmp_path / "unbroken", **changes))
    config = config_of(settings, tmp_path / "broken", **changes)
    train(config, stop_at=6)
    assert [found.step for found in saved_states(config.out, 100)] == [6, 3]
    same(train(config), expected)
    assert [line["step"] for line in read_history(config.out)] == [3, 6, 9]
    # A kept checkpoint holds the weights once, in the model's type, and nothing that only a resumed run needs.
    kept = config.out / "home" / "checkpoint-9"
    (weights,) = kept.glob("*.safetensors")
    assert weights.stat().st_mode == (kept / "vlrank.json").stat().st_mode, "others may read what they may list"
    assert {value.dtype for value in load_file(weights).values()} == {next(iter(expected.values())).dtype}
    assert not [file.name for file in config.out.rglob("*") if file.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert not [file.name for file in kept.iterdir() if "optim" in file.name or "state" in file.name]


def test_a_large_state_is_saved_less_often_and_what_is_made_again_is_not_recorded_again(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else full fine-tuning would write 25 GB after every epoch of a minute."""
    monkeypatch.setattr(saving, "LARGE_STATE", 1)
    config = config_of(settings, tmp_path / "run", epochs=4)
    config = config.model_copy(update={"resume_minutes": 1000.0})
    train(config, stop_at=6)
    assert saved_states(config.out, 100) == []
    before = read_history(config.out)
    expected = train(config.model_copy(update={"out": tmp_path / "unbroken"}))
    same(train(config), expected)
    assert read_history(config.out)[:2] == before
    assert [line["step"] for line in read_history(config.out)] == [3, 6, 9, 12]


def test_without_room_on_the_host_the_state_is_written_at_once(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "free_host_memory", lambda: 0)
    monkeypatch.setattr(state, "_PART_BYTES", 4096)
    config = config_of(settings, tmp_path / "run")
    train(config, stop_at=6)
    assert len(list((config.out / "resume" / "a").glob("*.safetensors"))) > 1
    same(train(config), train(config.model_copy(update={"out": tmp_path / "unbroken"})))


def test_an_error_of_the_writing_thread_ends_the_run(
    settings: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saving, "write_draft", full)
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with pytest.raises(DiskFull, match="save_total_limit=2"):
        train(config_of(settings, tmp_path / "run"))


def test_the_type_of_gathered_weights_is_named_at_all_levels(tmp_path: Path) -> None:
    """transformers loads a model in the type that config.json names, and of Qwen3-VL in that of each part."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"dtype": "float32", "text_config": {"dtype": "float32", "n": 1}, "other": None}))
    name_dtype(file, torch.bfloat16)
    assert json.loads(file.read_text()) == {
        "dtype": "bfloat16",
        "text_config": {"dtype": "bfloat16", "n": 1},
        "other": None,
    }


BLOCKED = """
import json, sys, threading, time
from pathlib import Path
import safetensors.torch
from vlrank.config import TrainConfig
import tests.training.test_saving as here
config, written = TrainConfig.model_validate(json.loads(sys.argv[1])), safetensors.torch.save_file

def half(tensors, file):
    written(tensors, file)
    if "checkpoint-3" in [path.name for path in (config.out / "home").glob("*")] and "resume" in str(file):
        content = Path(file).read_bytes()
        Path(file).write_bytes(content[: len(content) // 2])
        (config.out / "half").touch()
        time.sleep(3600)

safetensors.torch.save_file = half
trainer = here.trainer_of(config)
trainer.training_step = lambda *a, step=trainer.training_step: (
    (config.out / f"trained-{trainer.state.global_step + 1}").touch(), step(*a))[1]
trainer.train()
"""


def test_a_kill_while_a_checkpoint_is_written_costs_the_steps_since_the_last_one(
    settings: Make, tmp_path: Path
) -> None:
    """kill -9 with half a state on the disk, while training has gone on behind it."""
    config = config_of(settings, tmp_path / "run")
    given = json.dumps(config.model_dump(mode="json"))
    program = Program(sys.executable, "-c", BLOCKED, given)
    try:
        program.wait_for((config.out / "half").exists, "half a state")
        program.wait_for((config.out / "trained-8").exists, "training behind the write")
    finally:
        program.kill()
    assert [found.step for found in saved_states(config.out, committed_step(config.out))] == [3]
    same(train(config), train(config.model_copy(update={"out": tmp_path / "unbroken"})))
    assert [line["step"] for line in read_history(config.out)] == [3, 6, 9]
