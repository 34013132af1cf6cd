"""The one look at the test users in a sweep: each mode's winner, after everything is chosen."""

from __future__ import annotations

from pathlib import Path

from vlrank.config import RerankConfig, TrainConfig, TuneConfig
from vlrank.console import console
from vlrank.data.dataset import Dataset
from vlrank.data.schemas import RANKINGS
from vlrank.data.tables import atomic_write_json, read_json, read_parquet
from vlrank.evaluation.metrics import ranking_metrics
from vlrank.training.data import selection_metric


def test_metrics(config: TuneConfig, base: TrainConfig, run_folder: Path) -> dict[str, float]:
    """Metrics of a run on the test users, ranked once and kept in ``SWEEP/test``; Ray must be connected.

    Candidates are made as in validation: sampled negatives, or the retriever's.

    Args:
        config: The sweep.
        base: The mode's training config.
        run_folder: The winner's run folder.

    Returns:
        ``{"recall@10": ..., "ndcg@10": ..., ...}``.
    """
    from vlrank.reranking.pipeline import run as rerank

    facts = config.out / "test" / f"{base.mode}.json"
    metric = selection_metric(base)[0]
    if facts.exists():
        known = read_json(facts)
        if known["run"] == run_folder.name and metric in known["metrics"]:
            return dict(known["metrics"])
    rankings = config.out / "test" / f"{base.mode}-{run_folder.name}.parquet"
    console.print(f"ranking the test users with {run_folder.name}")
    rerank(
        RerankConfig(
            dataset=config.dataset,
            model=str(run_folder),
            candidates=base.candidates.removeprefix("retrieval:"),
            negatives=base.negatives,
            split="test",
            out=rankings,
            seed=base.seed,
            engine=config.engine,
            ray=config.ray,
        )
    )
    rows = read_parquet(rankings, RANKINGS)
    ranked = dict(rows.select("user_id", "item_ids").iter_rows())
    histories = Dataset.open(config.dataset).histories("test")
    ks = sorted({1, 5, 10, int(metric.partition("@")[2])})
    metrics = ranking_metrics(ranked, {user: histories[user][1] for user in ranked}, ks=ks)
    atomic_write_json(facts, {"run": run_folder.name, "users": len(ranked), "metrics": metrics})
    return metrics
