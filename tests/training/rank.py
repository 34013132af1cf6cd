"""One process of a run with several, forked from one that has imported what all of them need."""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vlrank.config import TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.engines.structure import decoder_layers
from vlrank.training.data import TrainingData
from vlrank.training.model import resolve_base
from vlrank.training.saving import Write
from vlrank.training.worker import Progress, make_trainer, start_process


def rank(number: int, world: int, config: TrainConfig) -> None:
    """One process of a run: trains, saves the last checkpoint to ``out/last`` and losses to ``out/losses.json``."""
    torch.set_num_threads(1)
    if world > 1:
        facts = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in facts.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_TORCH_DEVICE": "cpu"}
        dist.init_process_group("gloo", init_method=f"file://{config.out}/store", rank=number, world_size=world)
    base, device = resolve_base(config), torch.device("cpu")
    start_process(config, base, device)
    from vlrank.training.trainer import ReportCallback

    data = TrainingData.of_dataset(Dataset.open(config.dataset), "ground_truth")
    trainer = make_trainer(config, base, data, device, rank=number, world=world, show=Progress(None))
    trainer.args.logging_steps = 1
    trainer._read_tokens = 1000  # validation passes of a few users each, of which ranks have more and fewer
    evaluations: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any], write: Write) -> None:
        evaluations.append(metrics)
        write.to(Path(config.out) / "last", lambda: None)

    trainer.add_callback(ReportCallback(trainer, report, lambda step, loss: None))
    trainer.train()
    trainer.saver.wait()
    if number == 0:
        losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
        found = {"losses": losses, "ndcg": evaluations[-1]["ndcg@10"], **wrapping(trainer)}
        (Path(config.out) / "found.json").write_text(json.dumps(found), encoding="utf-8")
    if world > 1:
        dist.destroy_process_group()


def wrapping(trainer: Any) -> dict[str, Any]:
    """How the model is distributed: what costs speed and memory on GPUs and changes no number."""
    wrapped = trainer.model_wrapped
    if isinstance(wrapped, torch.nn.parallel.DistributedDataParallel):
        names = ("gradient_as_bucket_view", "find_unused_parameters")
        return {name: getattr(wrapped, name) for name in names}
    layers = decoder_layers(trainer.model)
    states = [layer._get_fsdp_state() for layer in layers if hasattr(layer, "_get_fsdp_state")]
    return {
        "prefetched": [len(state._states_to_forward_prefetch) for state in states],
        "reshards": [state._fsdp_param_group.post_forward_mesh_info is not None for state in states],
    }


def forked(number: int, world: int, config: TrainConfig, output: Path) -> None:
    """The whole life of such a process, which prints to a file."""
    with output.open("wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    code = 1
    try:
        rank(number, world, config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # A process group's threads now and then abort an interpreter that ends by itself; Ray ends its workers so.
        os._exit(code)
