"""A sweep with real training of a tiny model in 4 bits: Ray Tune over Ray Train, ASHA, checkpoints.

`test_run` sweeps all four modes without models, `tests/training` trains all four without a sweep, and
`tests/cluster/test_jobs_over_http.py` sweeps over a vision model.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from vlrank.config import EngineConfig, TrainConfig, TuneConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.tuning import final
from vlrank.tuning.mode_search import mode_search
from vlrank.tuning.run import run
from vlrank.tuning.trials import Sweep

pytestmark = pytest.mark.stack


@pytest.fixture(scope="module")
def finished(shop: Dataset, tiny_text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TuneConfig]:
    import ray

    folder = tmp_path_factory.mktemp("sweep")
    shutil.copytree(shop.path, folder / "shop")
    dataset = Dataset.open(folder / "shop")
    rows = [
        {"item_id": item, "text": f"picture {item % 7}", "model": "m", "prompt_id": "p", "input_hash": "h"}
        for item in dataset.items()["item_id"]
    ]
    dataset.add_generated("semantic_summary", rows)  # type: ignore[arg-type]
    config = load_config(
        TuneConfig,
        dataset="shop",  # relative, as people type it: trials must not look for it in their own folders
        out="sweep",
        modes=("semantic_summary_small",),
        trials=2,
        space={"batch_size": {"choice": [8, 16]}},
        train={"epochs": 2, "val_users": 24, "negatives": 4, "metric": "recall@1", "ranking": {"max_history": 4}},
        per_mode={"semantic_summary_small": {"model": str(tiny_text_model)}},
        max_concurrent_trials=2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ray.init(address="local", num_cpus=8, include_dashboard=False, log_to_driver=False)
        try:
            run(config)
            yield config
        finally:
            ray.shutdown()


def test_every_mode_has_a_winner_with_a_curve_and_a_checkpoint(finished: TuneConfig) -> None:
    sweep = Sweep(finished.out / "trials.jsonl")
    best = json.loads((finished.out / "best.json").read_text())
    assert sorted(best) == sorted(finished.modes)
    for trial in sweep:
        assert trial.status in ("completed", "stopped"), trial
        assert trial.users > 0
        assert [entry["epoch"] for entry in trial.epochs] == list(range(1, int(trial.epochs_run) + 1))
    for mode in finished.modes:
        winner = finished.out / "runs" / best[mode]["trial_id"]
        facts = json.loads((winner / "best.json").read_text())
        assert facts["value"] == best[mode]["value"]
        assert (winner / facts["checkpoint"]).is_dir()
        for loser in sweep.of(mode):
            if loser.trial_id != best[mode]["trial_id"]:
                assert not list((finished.out / "runs" / loser.trial_id).glob("*/checkpoint-*"))


def test_the_best_yaml_trains_to_exactly_the_same_validation_number(finished: TuneConfig) -> None:
    from vlrank.training.run import run as train

    best = json.loads((finished.out / "best.json").read_text())["semantic_summary_small"]
    train(load_config(TrainConfig, file=Path(best["config"])))
    again = json.loads((finished.out / "best" / "semantic_summary_small" / "best.json").read_text())
    assert (again["metric"], again["value"]) == (best["metric"], best["value"])


def test_the_winner_ranks_the_test_users_once(finished: TuneConfig) -> None:
    config = finished.model_copy(update={"engine": EngineConfig(name="transformers")})
    best = json.loads((config.out / "best.json").read_text())["semantic_summary_small"]
    base = mode_search(config, "semantic_summary_small").base
    winner = config.out / "runs" / best["trial_id"]
    base = base.model_copy(update={"metric": "ndcg@3"})
    metrics = final.test_metrics(config, base, winner)
    assert 0 <= metrics["recall@1"] <= metrics["ndcg@3"] <= metrics["recall@5"] == 1, "5 candidates"
    (winner / "best.json").unlink()
    assert final.test_metrics(config, base, winner) == metrics, "kept: the test users are not looked at again"
