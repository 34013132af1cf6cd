"""`ray job submit -- python jobs/train_rerank_standalone.py --dataset_code beauty --qwen3vl_mode caption ...`.

Takes every flag of `vlrank train`, and the historic ones: ``--rerank_method qwen3vl --qwen3vl_mode MODE --mode
ground_truth|retrieval --rerank_top_k --rerank_epochs --rerank_batch_size --rerank_lr --rerank_patience``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import click

from vlrank.config import TrainConfig
from vlrank.errors import UserError
from vlrank.jobs import main
from vlrank.training.run import dry_run, run

ALIASES = {
    "epochs": ["--rerank_epochs"],
    "batch_size": ["--rerank_batch_size"],
    "lr": ["--rerank_lr"],
    "patience": ["--rerank_patience"],
}
EXTRA = (
    click.Option(["--dataset_code"], metavar="NAME", help="The dataset data/NAME, as `vlrank prepare` wrote it."),
    click.Option(["--rerank_method"], default="qwen3vl", metavar="VALUE", help="qwen3vl is the only one here."),
    click.Option(["--qwen3vl_mode"], metavar="MODE", help="What a prompt shows; --mode then means the candidates."),
    click.Option(["--rerank_top_k"], type=int, metavar="VALUE", help="ranking.top_k: candidates reranked per user."),
    click.Option(["--retriever"], metavar="NAME", help="candidates/NAME for --mode retrieval [default: popularity]."),
)


def adapt(given: dict[str, Any]) -> dict[str, Any]:
    """Translate historic flags into keys of `TrainConfig`.

    Raises:
        UserError: a method that is not qwen3vl, or a ``--mode`` that is neither old nor new.
    """
    code, method = given.pop("dataset_code"), given.pop("rerank_method")
    historic, top_k, retriever = given.pop("qwen3vl_mode"), given.pop("rerank_top_k"), given.pop("retriever")
    if method != "qwen3vl":
        raise UserError(f"--rerank_method {method} is not known here", "Use qwen3vl.")
    if code is not None and given.get("dataset") is None:
        given["dataset"] = Path("data") / code
    if historic is not None:
        candidates = given.get("mode") or "ground_truth"
        if candidates not in ("ground_truth", "retrieval"):
            raise UserError(f"--mode {candidates} beside --qwen3vl_mode", "--mode is then ground_truth or retrieval.")
        retrieval = f"retrieval:{retriever or 'popularity'}"
        given |= {"mode": historic, "candidates": retrieval if candidates == "retrieval" else "ground_truth"}
    if top_k is not None:
        given["ranking"] = {"top_k": top_k}
    if given.get("out") is None and given.get("dataset") is not None and given.get("mode"):
        given["out"] = Path("runs") / f"{Path(given['dataset']).name}-{given['mode']}"
    return given


def job(argv: Sequence[str] | None = None) -> NoReturn:
    """Train one reranker."""
    main(run, TrainConfig, argv, dry_run=dry_run, aliases=ALIASES, adapt=adapt, extra=EXTRA)


if __name__ == "__main__":
    job()
