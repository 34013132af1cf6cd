"""A trainer that learns by formula: the reports, run folder and resume behaviour of training, in milliseconds.

Run as a script it is the driver of a sweep, for tests that kill it: ``stand_in.py CONFIG.yaml RAY_ADDRESS``.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlrank.config import TrainConfig
from vlrank.errors import UserError


def quality(lr: float, epoch: int, seed: int = 0) -> float:
    """Rises with the epoch towards a height that is best at lr 1.2e-4."""
    height = 0.9 - 0.5 * abs(math.log(lr / 1.2e-4)) + 0.001 * seed % 7
    return height * (1 - math.exp(-epoch / 3))


class StandIn:
    """Reports an evaluation per epoch; continues after the last one in its run folder."""

    def __init__(self, config: TrainConfig, *, name: str, storage_path: str, callbacks: Sequence[Any] = ()) -> None:
        self.config = config
        self.run = Path(storage_path) / name

    def fit(self) -> None:
        import ray
        from ray import tune

        checkpoint = self.run / "qwen3vl_rerank" / "checkpoint-1"
        checkpoint.mkdir(parents=True, exist_ok=True)
        (checkpoint / "model.safetensors").write_text("weights")
        with (self.run / "starts").open("a") as file:
            file.write(ray.get_runtime_context().get_node_id() + "\n")
        history = self.run / "history.jsonl"
        done = len(history.read_text().splitlines()) if history.exists() else 0
        for epoch in range(done + 1, self.config.epochs + 1):
            time.sleep(self.config.weight_decay)  # the one key without a meaning here: seconds per epoch
            if self.config.max_grad_norm == 13 and epoch == 2:
                raise RuntimeError("the GPU fell off the bus")
            if self.config.max_grad_norm == 14:
                raise UserError("the model has\nno tokenizer", "Copy it.")
            report = {"epoch": epoch, self.config.metric: quality(self.config.lr, epoch, self.config.seed)}
            with history.open("a") as file:
                file.write(json.dumps(report) + "\n")
            tune.report(report)


if __name__ == "__main__":
    import ray
    import yaml

    from vlrank.config import TuneConfig, load_config
    from vlrank.tuning.run import run

    ray.init(address=sys.argv[2], log_to_driver=False)
    ray.cloudpickle.register_pickle_by_value(sys.modules["__main__"])
    run(load_config(TuneConfig, **yaml.safe_load(Path(sys.argv[1]).read_text())), build=StandIn)
