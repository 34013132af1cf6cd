"""Bulk reranking on Ray Data: candidates in, full rankings out, resumable shard by shard.

One row per user runs through a fixed pool of engines; `vlrank.bulk` commits, resumes and quarantines as in generation.
The committed rows hold the model's own scores; fusion with the retriever happens when the output file is written, so
another weight costs no inference.
"""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from vlrank.bulk import ENGINE_SECONDS, ERROR, ERROR_TYPE, TOKENS_IN, BulkResult, Shards, run_bulk
from vlrank.compat import hide_torch
from vlrank.config import EngineConfig, RankingConfig, RerankConfig, Split
from vlrank.console import Summary, announce
from vlrank.data.candidates_io import write_rankings
from vlrank.data.dataset import Dataset
from vlrank.data.items import ItemMeta
from vlrank.data.lists import Lists, mean_spread
from vlrank.data.quarantine import by_error, quarantine_folder
from vlrank.data.schemas import RANKINGS
from vlrank.data.tables import atomic_write_json
from vlrank.engines.models import ModelFolder, on_this_node
from vlrank.engines.resources import EngineDied, engine_actor
from vlrank.prompting.modes import ModeSpec, mode_spec
from vlrank.prompting.prior import log_prior
from vlrank.reranking.fusion import best_weight, fused_table
from vlrank.reranking.plan import Setup, Users, open_setup, users_to_rank
from vlrank.reranking.ranker import (
    AGREEMENT,
    Ranking,
    UserLists,
    agreement,
    describe_agreement,
    open_prompts,
    open_ranker,
    user_seed,
)
from vlrank.reranking.windows import windows
from vlrank.runtime import cluster_resources, ray_session
from vlrank.storage import writable

if TYPE_CHECKING:
    import ray.data

_COUNTS = ("prompts", "history_cut", "dropped", "requests", "request_tokens", "cached_tokens", *AGREEMENT)
_SHARD = pa.schema([*RANKINGS, ("input_hash", pa.string()), *((name, pa.int64()) for name in _COUNTS)])
_COMPARED = 128  # users of each engine whose rankings are made without 8-bit products too


def run(config: RerankConfig) -> Summary:
    """Rank every user's candidates.

    Raises:
        UserError: an unusable dataset, model, candidates table or setting.
    """
    started = time.monotonic()

    # Whom to rank; mistakes are found before an engine starts.
    setup = open_setup(config)
    users = users_to_rank(setup, config.split, config.limit)

    # Inference. Validation users come second, where they choose the fusion weight.
    with ray_session(config.ray, data=True):
        result, rows = _rank(setup, users, config.split)
        spread = 1.0 if config.fusion_weight is None else _spread(setup)
        weight = _fusion_weight(setup, spread) if config.fusion_weight == "auto" else config.fusion_weight

    # The output file, and beside it how it was made.
    source = _source(config, setup.spec, setup.folder.ranking, weight)
    table = fused_table(rows.select(RANKINGS.names), users.retrieved, weight, spread)
    table = table.with_columns(source=pl.lit(source))
    write_rankings(table, config.out, dataset=setup.dataset)
    facts = {"source": source, "split": config.split, "fusion_weight": weight, "model": config.model}
    details = {**facts, "ranking": setup.folder.ranking.model_dump()}
    atomic_write_json(config.out.with_name(config.out.name + ".json"), details)

    constant = _is_constant(rows, setup.meta, setup.folder.ranking)
    if constant:
        announce("Note:", _CONSTANT, "yellow")
    shards = _shards(config, setup.dataset, config.split)
    put_aside = result.quarantined or result.failed_before
    lines = {
        "model": f"{setup.folder.path} ({setup.spec.name})",
        "engine": setup.engine,
        "source": source,
        **_facts(setup, users, result, rows),
        **({"in quarantine": by_error(shards.quarantined())} if put_aside else {}),
        **({"fusion weight": weight} if weight is not None else {}),
        **({"warning": _CONSTANT} if constant else {}),
        "time": f"{time.monotonic() - started:,.1f} s",
    }
    failure = result.failure(shards)
    counts = _counts(users, result, rows)
    return Summary(f"rerank: {config.split} users of {config.dataset}", lines, config.out, counts, failure)


def dry_run(config: RerankConfig) -> Summary:
    """What a run would do: users and prompts."""
    setup = open_setup(config)
    users = users_to_rank(setup, config.split, config.limit)
    pending = _shards(config, setup.dataset, config.split).pending(users.wanted, retry_failed=config.retry_failed)
    ranking = setup.folder.ranking
    sizes = [sum(item in setup.usable for item in candidates) for candidates in pending["candidates"]]
    prompts = sum(len(list(windows(n, ranking.window, ranking.stride))) * ranking.permutations for n in sizes)
    lines: dict[str, object] = {
        "model": f"{setup.folder.path} ({setup.spec.name})",
        "engine": setup.engine,
        "users": users.wanted.height,
        "to do": pending.height,
        "candidates per user": f"{np.mean(sizes):.1f}" if sizes else 0,
        "prompts": prompts,
    }
    if users.skipped:
        lines[_SKIPPED] = users.skipped
    counts = {"users": users.wanted.height, "pending": pending.height, "prompts": prompts, "skipped": users.skipped}
    return Summary(f"rerank (dry run): {config.split} users of {config.dataset}", lines, config.out, counts)


# ---- inference -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """What workers need to know."""

    dataset: str
    folder: ModelFolder
    engine: EngineConfig
    prompt_workers: int | None
    split: str
    source: str
    seed: int


def _shards(config: RerankConfig, dataset: Dataset, split: Split) -> Shards:
    out = config.scores_of or config.out
    # Every output has its own quarantine: runs that shared one would skip each other's failed users.
    place = hashlib.sha256(str(out.resolve()).encode()).hexdigest()[:8]
    name = f"rerank-{out.stem}-{split}-{place}"
    shards = out.with_name(out.name + ".shards")
    return Shards(
        folder=shards / split,
        schema=_SHARD,
        key="user_id",
        quarantine=quarantine_folder(dataset.path if writable(dataset.path) else shards, name),
        stage=name,
    )


def _rank(setup: Setup, users: Users, split: Split) -> tuple[BulkResult, pl.DataFrame]:
    """Rank the users that are missing; returns the result and the committed rows of all wanted users."""
    config = setup.config
    job = _Job(
        dataset=str(setup.dataset.path.resolve()),
        folder=setup.folder,
        engine=config.engine,
        prompt_workers=config.prompt_workers,
        split=split,
        source=f"qwen3vl/{setup.folder.mode}",
        seed=config.seed,
    )
    shards = _shards(config, setup.dataset, split)
    result = run_bulk(
        users.wanted,
        partial(_stages, job=job, shard_rows=config.shard_rows),
        shards,
        shard_rows=config.shard_rows,
        description="rerank" if split == config.split else f"rerank {split} users",
        retry_failed=config.retry_failed,
    )
    keys = users.wanted.select("user_id", "input_hash")
    return result, shards.committed().join(keys, on=["user_id", "input_hash"], how="semi", maintain_order="left")


def _stages(dataset: ray.data.Dataset, job: _Job, shard_rows: int) -> ray.data.Dataset:
    from ray.data import ActorPoolStrategy

    config = job.engine
    actor = engine_actor(config)
    # The next shard's prompts begin while the last ones of this shard are scored.
    overlap = 1 if config.name == "transformers" else 2
    makers = job.prompt_workers if job.prompt_workers is not None else default_prompt_workers(config, actor["num_gpus"])
    if makers:
        dataset = dataset.map_batches(
            _PromptWorker,
            fn_constructor_args=(job,),
            batch_size=shard_rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=makers, initial_size=makers),
            # Different from the read step's CPUs, or Ray Data fuses the two steps and commits nothing before the end.
            num_cpus=0.5,
        )
    return dataset.map_batches(
        _Worker,
        fn_constructor_args=(job,),
        batch_size=shard_rows,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(
            size=config.replicas,
            max_tasks_in_flight_per_actor=2 * overlap,
            max_concurrent_calls_per_actor=overlap,
            enable_true_multi_threading=overlap > 1,
        ),
        **actor,
    )


def default_prompt_workers(config: EngineConfig, gpus: float) -> int:
    """Processes that make prompts: for each engine on a GPU its share of the cluster's CPUs, 4 to 12 of them.

    A small model ranks more prompts in a second than four processes can make.
    """
    share = int(cluster_resources().get("CPU", 0) / config.replicas) - 2  # for the engine and the driver
    return config.replicas * min(12, max(4, share)) if gpus else 0


class _PromptWorker:
    """Makes users' first prompts outside of the engine's process, where they would hold up the thread that feeds it."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        if not mode_spec(str(job.folder.mode)).pixels:
            hide_torch()
        self.prompts = open_prompts(on_this_node(job.folder), Dataset.open(job.dataset).item_meta())

    def __call__(self, batch: pa.Table) -> pa.Table:
        made = [self.prompts.first(_user_lists(self.job, row)) for row in batch.to_pylist()]
        return batch.append_column("prompts", pa.array(made, pa.large_binary()))


def _user_lists(job: _Job, row: Mapping[str, Any]) -> UserLists:
    seed = user_seed(job.seed, row["user_id"])
    return UserLists(row["history"], row["candidates"], seed, row.get("prompts"))


class _Worker:
    """One engine of the pool."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        meta = Dataset.open(job.dataset).item_meta()
        self.ranker = open_ranker(job.folder, job.engine, meta, own_process=True)
        self.counted = _engine_counts(self.ranker.engine)
        self.counting = threading.Lock()
        self.calling: Any = threading.Lock() if self.ranker.engine.callers == 1 else nullcontext()

    def __call__(self, batch: pa.Table) -> pa.Table:
        started = time.monotonic()
        rows = batch.to_pylist()
        try:
            with self.calling:
                rankings = self.ranker.rank([_user_lists(self.job, row) for row in rows])
        except EngineDied as error:
            print(error, file=sys.stderr, flush=True)
            with suppress(Exception):
                self.ranker.engine.close()  # its remains hold the GPU's memory
            os._exit(1)  # Ray restarts the actor and repeats its tasks; an exception would end the run
        outcomes = [self._row(row, outcome) for row, outcome in zip(rows, rankings, strict=True)]
        # Engines count over all users: the first row of each shard carries the increase since the last shard.
        with self.counting:
            before, self.counted = self.counted, _engine_counts(self.ranker.engine)
            outcomes[0] |= {name: value - before[name] for name, value in self.counted.items()}
            outcomes[0] |= self._agreement(rows, rankings)
        for outcome in outcomes:
            outcome[ENGINE_SECONDS] = time.monotonic() - started
        return pa.Table.from_pylist(outcomes, schema=_OUTCOME)

    def _agreement(self, rows: Sequence[Mapping[str, Any]], rankings: Sequence[Ranking | Exception]) -> dict[str, int]:
        """How the first users' rankings agree with those of the engine without 8-bit products, where it has them."""
        exact = getattr(self.ranker.engine, "exact", None)
        if exact is None:
            return {}
        sample = [_user_lists(self.job, row) for row in rows[:_COMPARED]]
        expected = replace(self.ranker, engine=exact).rank(sample)
        self.ranker.engine.exact = None  # type: ignore[attr-defined]
        exact.close()
        return agreement(zip(rankings, expected, strict=False))

    def _row(self, row: Mapping[str, Any], outcome: Ranking | Exception) -> dict[str, Any]:
        common = {"split": self.job.split, "user_id": row["user_id"], "input_hash": row["input_hash"]}
        common |= dict.fromkeys(_COUNTS, 0)
        if isinstance(outcome, Exception):
            return {**common, ERROR_TYPE: type(outcome).__name__, ERROR: str(outcome) or repr(outcome)}
        return {
            **common,
            "item_ids": outcome.item_ids,
            "scores": outcome.scores.tolist(),
            "source": self.job.source,
            "prompts": outcome.prompts,
            "history_cut": outcome.history_cut,
            "dropped": outcome.dropped,
            TOKENS_IN: outcome.tokens,
        }


_OUTCOME = pa.schema(
    [
        *_SHARD,
        (ERROR_TYPE, pa.string()),
        (ERROR, pa.string()),
        (TOKENS_IN, pa.int64()),
        (ENGINE_SECONDS, pa.float64()),
    ]
)


def _engine_counts(engine: Any) -> dict[str, int]:
    names = {"requests": "requests", "request_tokens": "prompt_tokens", "cached_tokens": "cached_tokens"}
    return {name: getattr(engine, attribute, 0) for name, attribute in names.items()}


def _spread(setup: Setup) -> float:
    """Standard deviation of the retriever's scores within a list, the mean over all lists of its table."""
    lists = Lists.from_frame(setup.dataset.candidates(setup.config.candidates))
    return mean_spread(lists.standardised()[1])


def _fusion_weight(setup: Setup, spread: float) -> float:
    """The weight that ranks validation users best."""
    users = users_to_rank(setup, "val", setup.config.fusion_users)
    _, rows = _rank(setup, users, "val")
    targets = {user: target for user, (_, target) in setup.dataset.histories("val").items()}
    return best_weight(
        [
            (items, scores, [users.retrieved[user].get(item, 0.0) for item in items], targets[user])
            for user, items, scores in rows.select("user_id", "item_ids", "scores").iter_rows()
        ],
        spread,
    )


_CONSTANT = "scores do not depend on the candidates: the model gives all users the same ones"


def _is_constant(rows: pl.DataFrame, meta: Mapping[int, ItemMeta], ranking: RankingConfig) -> bool:
    """Whether the model gives all users the same scores, whatever their candidates."""
    lists = Lists.from_frame(rows)
    if ranking.popularity_prior and lists.scores is not None:
        prior = dict(zip(meta, log_prior(meta.values()), strict=True))
        lists = lists.sorted_by(lists.scores - np.array([prior[item] for item in lists.items.tolist()]))
    return lists.same_scores()


# ---- the summary -----------------------------------------------------------------------------------------------------


_SKIPPED = "users without a usable history or target"


def _facts(setup: Setup, users: Users, result: BulkResult, rows: pl.DataFrame) -> dict[str, object]:
    """What the run did, for people."""
    lines: dict[str, object] = {
        "users": rows.height,
        "done": result.done,
        "reused": result.reused,
        "quarantined": result.quarantined + result.failed_before,
    }
    if users.skipped:
        lines[_SKIPPED] = users.skipped
    if cut := int((rows["history_cut"] > 0).sum()):
        lines["users whose history was cut to fit"] = cut
    if dropped := int(rows["dropped"].sum()):
        lines[f"candidates without {setup.spec.shown}, left out"] = dropped
    seconds = result.working_seconds or result.seconds
    if result.done and seconds:
        lines["users/s, prompt tokens/s"] = f"{result.done / seconds:,.1f}, {result.tokens_in / seconds:,.0f}"
    if requests := int(rows["requests"].sum()):
        hit_rate = int(rows["cached_tokens"].sum()) / int(rows["request_tokens"].sum())
        prompts = f"{int(rows['prompts'].sum()):,} prompts in {requests:,} requests"
        lines["requests"] = f"{prompts}, {hit_rate:.1%} of their tokens from the cache"
    if compared := int(rows["compared"].sum()):
        sums = {name: int(rows[name].sum()) for name in AGREEMENT}
        lines["rankings in 8 bits"] = f"{compared} users compared with bfloat16: {describe_agreement(sums)}"
    return lines


def _counts(users: Users, result: BulkResult, rows: pl.DataFrame) -> dict[str, int]:
    """The same for programs."""
    return {
        "users": rows.height,
        "done": result.done,
        "reused": result.reused,
        "quarantined": result.quarantined,
        "failed_before": result.failed_before,
        "skipped": users.skipped,
        "histories_cut": int((rows["history_cut"] > 0).sum()),
        "candidates_dropped": int(rows["dropped"].sum()),
        "tokens_in": result.tokens_in,
        "working_ms": int(1000 * (result.working_seconds or result.seconds)),
        **{
            name: int(rows[name].sum())
            for name in ("prompts", "requests", "request_tokens", "cached_tokens", *AGREEMENT)
        },
    }


def _source(config: RerankConfig, spec: ModeSpec, ranking: RankingConfig, weight: float | None) -> str:
    parts = [f"qwen3vl/{spec.name}", f"candidates={config.candidates}"]
    most = config.negatives + 1 if config.candidates == "ground_truth" else ranking.top_k
    if most > ranking.window:
        parts.append(f"windows={ranking.window}/{ranking.stride}")
    if ranking.permutations > 1:
        parts.append(f"permutations={ranking.permutations}")
    if ranking.popularity_prior:
        parts.append("prior")
    if weight is not None:
        parts.append(f"fusion={weight:g}")
    return " ".join(parts)
