"""Bulk reranking on Ray Data: candidates in, full rankings out, resumable shard by shard.

One row per user runs through a fixed pool of engines; `vlrank.bulk` commits, resumes and quarantines as in generation.
The committed rows hold the model's own scores; fusion with the retriever happens when the output file is written, so
another weight costs no inference.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import threading
import time
from collections.abc import Container, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pyarrow as pa

from vlrank.bulk import ENGINE_PROCESS, ENGINE_SECONDS, ERROR, ERROR_TYPE, TOKENS_IN, BulkResult, Shards, run_bulk
from vlrank.config import EngineConfig, RankingConfig, RerankConfig, Split, merge, validate
from vlrank.console import Summary, announce
from vlrank.data.candidates_io import check_output, write_rankings
from vlrank.data.dataset import Dataset
from vlrank.data.items import ItemMeta
from vlrank.data.lists import Lists, rank_by_score
from vlrank.data.schemas import RANKINGS
from vlrank.data.tables import atomic_write_json, file_size
from vlrank.engines.models import ModelFolder, on_this_node, open_model
from vlrank.engines.resources import EngineDied, engine_gpus, ranking_engine
from vlrank.errors import UserError
from vlrank.prompting.chat_template import check_chat_template
from vlrank.prompting.encoding import PREPARATION
from vlrank.prompting.modes import ModeSpec, mode_spec, shows
from vlrank.prompting.negatives import sampled_candidates
from vlrank.prompting.prior import log_prior
from vlrank.reranking.ranker import Ranking, UserLists, open_prompts, open_ranker, tokenizer_folder
from vlrank.reranking.windows import fuse, stable_order, windows
from vlrank.runtime import ray_session
from vlrank.storage import Location, listing, location, writable

if TYPE_CHECKING:
    import ray.data

_COUNTS = ("prompts", "history_cut", "dropped", "requests", "request_tokens", "cached_tokens")
_SHARD = pa.schema([*RANKINGS, ("input_hash", pa.string()), *((name, pa.int64()) for name in _COUNTS)])
_WEIGHTS = tuple(i / 20 for i in range(21))


@dataclass(frozen=True, slots=True)
class _Work:
    """One split's users.

    Attributes:
        wanted: ``user_id``, ``input_hash``, ``history``, ``candidates``.
        retrieved: user id -> item id -> the retriever's score; empty for sampled candidates.
        skipped: Users without a target or history, or whose target the mode cannot show.
    """

    wanted: pl.DataFrame
    retrieved: Mapping[int, Mapping[int, float]]
    skipped: int


def run(config: RerankConfig) -> Summary:
    """Rank every user's candidates.

    Raises:
        UserError: an unusable dataset, model, candidates table or setting.
    """
    started = time.monotonic()
    dataset, folder, spec = _open(config)
    _check_output(config, dataset)
    meta = _checked_meta(dataset, spec, folder.ranking)
    work = _plan(config, dataset, folder, spec, meta, config.split, config.limit)
    with ray_session(config.ray):
        result, rows = _rank(config, dataset, folder, work, config.split)
        weight = _fusion_weight(config, dataset, folder, spec, meta)
    source = _source(config, spec, folder.ranking, weight)
    table = _fused(rows, work, weight, source)
    write_rankings(table, config.out, dataset=dataset)
    atomic_write_json(
        config.out.with_name(config.out.name + ".json"),
        {
            "source": source,
            "split": config.split,
            "fusion_weight": weight,
            "model": config.model,
            "ranking": folder.ranking.model_dump(),
        },
    )
    lines: dict[str, object] = {
        "model": f"{folder.path} ({spec.name})",
        "engine": ranking_engine(config.engine, folder),
        "source": source,
        "users": table.height,
        "done": result.done,
        "reused": result.reused,
        "quarantined": result.quarantined + result.failed_before,
    }
    if work.skipped:
        lines["users without a usable history or target"] = work.skipped
    if cut := int((rows["history_cut"] > 0).sum()):
        lines["users whose history was cut to fit"] = cut
    if dropped := int(rows["dropped"].sum()):
        lines[f"candidates without {spec.shows}, left out"] = dropped
    seconds = result.working_seconds or result.seconds
    prompts = int(rows["prompts"].sum())
    if result.done and seconds:
        lines["users/s, prompt tokens/s"] = f"{result.done / seconds:,.1f}, {result.tokens_in / seconds:,.0f}"
    if requests := int(rows["requests"].sum()):
        hit_rate = int(rows["cached_tokens"].sum()) / int(rows["request_tokens"].sum())
        lines["asked"] = f"{prompts:,} prompts in {requests:,} requests, {hit_rate:.1%} of their tokens from the cache"
    if weight is not None:
        lines["fusion weight"] = weight
    if _is_constant(rows, meta, folder.ranking):
        announce("Note:", _CONSTANT, "yellow")
        lines["warning"] = _CONSTANT
    lines["time"] = f"{time.monotonic() - started:,.1f} s"
    counts = {
        "users": table.height,
        "done": result.done,
        "reused": result.reused,
        "quarantined": result.quarantined,
        "failed_before": result.failed_before,
        "skipped": work.skipped,
        "histories_cut": cut,
        "candidates_dropped": dropped,
        "prompts": prompts,
        "tokens_in": result.tokens_in,
        "working_ms": int(1000 * seconds),
        **{name: int(rows[name].sum()) for name in ("requests", "request_tokens", "cached_tokens")},
    }
    return Summary(f"rerank: {config.split} users of {config.dataset}", lines, config.out, counts)


def dry_run(config: RerankConfig) -> Summary:
    """What a run would do: users and prompts."""
    dataset, folder, spec = _open(config)
    _check_output(config, dataset)
    meta = _checked_meta(dataset, spec, folder.ranking)
    work = _plan(config, dataset, folder, spec, meta, config.split, config.limit)
    pending = _shards(config, dataset, config.split).pending(work.wanted, retry_failed=config.retry_failed)
    ranking = folder.ranking
    usable = _usable(meta, spec, ranking)
    sizes = [sum(item in usable for item in candidates) for candidates in pending["candidates"]]
    per_user = [len(list(windows(n, ranking.window, ranking.stride))) * ranking.permutations for n in sizes]
    lines: dict[str, object] = {
        "model": f"{folder.path} ({spec.name})",
        "engine": ranking_engine(config.engine, folder),
        "users": work.wanted.height,
        "to do": pending.height,
        "candidates per user": f"{np.mean(sizes):.1f}" if sizes else 0,
        "prompts": sum(per_user),
    }
    if work.skipped:
        lines["users without a usable history or target"] = work.skipped
    counts = {"users": work.wanted.height, "pending": pending.height, "prompts": sum(per_user), "skipped": work.skipped}
    return Summary(f"rerank (dry run): {config.split} users of {config.dataset}", lines, config.out, counts)


# ---- what to do ------------------------------------------------------------------------------------------------------


def _open(config: RerankConfig) -> tuple[Dataset, ModelFolder, ModeSpec]:
    dataset = Dataset.open(config.dataset)
    folder = open_model(config.model, config.as_mode)
    if folder.mode is None:
        raise UserError(f"{folder.path} has no vlrank.json, so its mode is unknown", "Give as_mode=... as well.")
    spec = mode_spec(folder.mode)
    if note := check_chat_template(tokenizer_folder(folder), pictures=spec.pixels):
        announce("Note:", note, "yellow")
    merged = merge(folder.ranking.model_dump(), config.ranking)
    ranking = validate(RankingConfig, merged, within=(RerankConfig, "ranking"))
    if config.candidates == "ground_truth":
        # They come in random order: cut to top_k, a part of the users would lose the target.
        ranking = ranking.model_copy(update={"top_k": max(ranking.top_k, config.negatives + 1)})
    # Workers have another working directory.
    path, base = (str(Path(name).resolve()) if Path(name).is_dir() else name for name in (folder.path, folder.base))
    folder = replace(folder, path=path, base=base, ranking=ranking)
    if ranking_engine(config.engine, folder) == "vllm":
        from vlrank.engines.vllm_args import max_prompt_tokens

        # The history gives way here too: the engine would only refuse the users.
        update = {"max_prompt_tokens": max_prompt_tokens(folder, config.engine)}
        folder = replace(folder, ranking=ranking.model_copy(update=update))
    return dataset, folder, spec


def _check_output(config: RerankConfig, dataset: Dataset) -> None:
    check_output(config.out, dataset)
    if config.fusion_weight is not None and config.candidates == "ground_truth":
        raise UserError("fusion_weight needs a retriever's scores", "Set candidates=NAME of `vlrank retrieve`.")
    if config.fusion_weight == "auto":
        if config.split == "val":
            raise UserError(
                "fusion_weight=auto on split val would choose the weight on the users it ranks", "Give a number."
            )
        _retrieved(config, dataset, "val")  # not found missing when all others are ranked


def _retrieved(config: RerankConfig, dataset: Dataset, split: Split) -> pl.DataFrame:
    """The candidates table of one split, by user."""
    table = dataset.candidates(config.candidates).filter(pl.col("split") == split).sort("user_id")
    if table.is_empty():
        raise UserError(
            f"candidates {config.candidates!r} of {dataset.path} hold no {split} users",
            f"Make them: vlrank retrieve {dataset.path} --name {config.candidates}",
        )
    return table


def _checked_meta(dataset: Dataset, spec: ModeSpec, ranking: RankingConfig) -> dict[int, ItemMeta]:
    meta = dataset.item_meta()
    if ranking.missing == "drop" and not any(shows(spec, item) for item in meta.values()):
        raise UserError(
            f"no item of {dataset.path} has what mode {spec.name} shows ({spec.shows})", f"Make it: {spec.remedy}"
        )
    return meta


def _plan(
    config: RerankConfig,
    dataset: Dataset,
    folder: ModelFolder,
    spec: ModeSpec,
    meta: Mapping[int, ItemMeta],
    split: Split,
    limit: int | None,
) -> _Work:
    usable = _usable(meta, spec, folder.ranking)
    histories = dataset.histories(split)
    retrieved: dict[int, dict[int, float]] = {}
    listed: dict[int, list[int]] = {}
    if config.candidates == "ground_truth":
        pool = np.asarray(sorted(usable), dtype=np.int64)
        for user in sorted(histories)[:limit]:
            history, target = histories[user]
            if target in usable:
                listed[user] = list(sampled_candidates(user, history, target, pool, config.negatives, config.seed)[0])
        considered = len(histories) if limit is None else min(limit, len(histories))
    else:
        table = _retrieved(config, dataset, split)
        table = table.head(limit) if limit is not None else table
        for user, items, scores in table.select("user_id", "item_ids", "scores").iter_rows():
            if len(set(items)) != len(items):
                raise UserError(f"candidates {config.candidates!r} repeat an item for user {user}", "Make them again.")
            if user in histories:
                listed[user] = _reached(items, usable, folder.ranking.top_k)
                retrieved[user] = dict(zip(items, scores, strict=True)) if scores else {}
        considered = table.height
    if not listed:
        raise UserError(f"no {split} user of {dataset.path} can be ranked", "Check the dataset and its candidates.")
    model, items_of = _fingerprint(folder, spec), _item_hashes(meta, spec, folder.ranking, dataset.path.resolve())
    rows = []
    for user, candidates in listed.items():
        history = histories[user][0][-_reach(folder.ranking) :]
        shown = [items_of.get(item, "") for item in (*history, *candidates)]
        text = json.dumps([model, config.seed, history, candidates, shown])
        rows.append((user, hashlib.sha256(text.encode()).hexdigest()[:32], history, candidates))
    wanted = pl.DataFrame(
        rows,
        schema={
            "user_id": pl.Int32,
            "input_hash": pl.String,
            "history": pl.List(pl.Int32),
            "candidates": pl.List(pl.Int32),
        },
        orient="row",
    )
    return _Work(wanted, retrieved, considered - len(listed))


def _usable(meta: Mapping[int, ItemMeta], spec: ModeSpec, ranking: RankingConfig) -> set[int]:
    """Items that prompts can show."""
    return {item for item, entry in meta.items() if ranking.missing == "text" or shows(spec, entry)}


def _reached(items: list[int], usable: Container[int], top_k: int) -> list[int]:
    """The head of a list that holds its best ``top_k`` usable items: those that are not make room for further ones."""
    places = [place for place, item in enumerate(items) if item in usable][:top_k]
    return items[: places[-1] + 1] if len(places) == top_k else items


def _reach(ranking: RankingConfig) -> int:
    # Items that the mode cannot show make room for older ones: hand over more than max_history.
    return ranking.max_history * (1 if ranking.missing == "text" else 4)


def _fingerprint(folder: ModelFolder, spec: ModeSpec) -> str:
    """Of everything about the model that changes rankings: its settings, its files, and how it gets its pictures."""
    parts: list[Any] = [folder.mode, folder.ranking.model_dump(), *([PREPARATION] if spec.pixels else [])]
    for path in dict.fromkeys((folder.path, folder.base)):
        place = location(path)
        if not place.is_dir():
            parts.append(path)  # a name on the hub
            continue
        for file in listing(place, "*"):
            if file.suffix == ".safetensors":
                # The ends of a weights file tell trainings apart; whole ones are large.
                size = file_size(file)
                with file.open("rb") as content:
                    head = content.read(1 << 20)
                    content.seek(max(0, size - (1 << 20)))
                    data = head + content.read()
                parts.append([file.name, size, hashlib.sha256(data).hexdigest()])
            elif file.suffix in (".json", ".jinja") and file.is_file():
                parts.append([file.name, hashlib.sha256(file.read_bytes()).hexdigest()])
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _item_hashes(
    meta: Mapping[int, ItemMeta], spec: ModeSpec, ranking: RankingConfig, root: Location
) -> dict[int, str]:
    # A picture's file name is the hash of its content; where the dataset lies is no matter.
    def seen(entry: ItemMeta) -> str:
        counted = entry["popularity"] if ranking.popularity_prior else ""
        return f"{entry['text']}\0{str(entry.get(spec.shows)).removeprefix(f'{root}/')}\0{counted}"

    return {item: hashlib.sha256(seen(entry).encode()).hexdigest()[:16] for item, entry in meta.items()}


def _shards(config: RerankConfig, dataset: Dataset, split: Split) -> Shards:
    # Of this output alone: runs that share a quarantine take each other's failures for their own.
    place = hashlib.sha256(str(config.out.resolve()).encode()).hexdigest()[:8]
    name = f"rerank-{config.out.stem}-{split}-{place}"
    shards = config.out.with_name(config.out.name + ".shards")
    return Shards(
        folder=shards / split,
        schema=_SHARD,
        key="user_id",
        quarantine=(dataset.path if writable(dataset.path) else shards) / "quarantine" / name,
        stage=name,
    )


# ---- inference -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Job:
    """What an engine's worker needs to know."""

    dataset: str
    folder: ModelFolder
    engine: EngineConfig
    prompt_workers: int | None
    split: str
    source: str
    seed: int


def _rank(
    config: RerankConfig, dataset: Dataset, folder: ModelFolder, work: _Work, split: Split
) -> tuple[BulkResult, pl.DataFrame]:
    """Run what is missing; returns the result and the wanted rows that are committed."""
    shards = _shards(config, dataset, split)
    job = _Job(
        dataset=str(dataset.path.resolve()),
        folder=folder,
        engine=config.engine,
        prompt_workers=config.prompt_workers,
        split=split,
        source=f"qwen3vl/{folder.mode}",
        seed=config.seed,
    )
    result = run_bulk(
        work.wanted,
        partial(_stages, job=job, shard_rows=config.shard_rows),
        shards,
        shard_rows=config.shard_rows,
        description="rerank" if split == config.split else f"rerank {split} users",
        retry_failed=config.retry_failed,
    )
    keys = work.wanted.select("user_id", "input_hash")
    return result, shards.committed().join(keys, on=["user_id", "input_hash"], how="semi", maintain_order="left")


def _stages(dataset: ray.data.Dataset, job: _Job, shard_rows: int) -> ray.data.Dataset:
    from ray.data import ActorPoolStrategy

    config = job.engine
    gpus = engine_gpus(config)
    # The next shard's prompts begin while the last ones of this shard are scored.
    overlap = 1 if ranking_engine(config, job.folder) == "transformers" else 2
    makers = job.prompt_workers if job.prompt_workers is not None else 4 * config.replicas * (gpus > 0)
    if makers:
        dataset = dataset.map_batches(
            _PromptWorker,
            fn_constructor_args=(job,),
            batch_size=shard_rows,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(min_size=1, max_size=makers, initial_size=makers),
            # Not what reading asks for, or Ray Data joins the two steps and commits nothing before the end.
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
        num_cpus=config.cpus,
        num_gpus=math.ceil(gpus * config.tensor_parallel_size) if gpus >= 1 else gpus,
        **ENGINE_PROCESS,
    )


class _PromptWorker:
    """Makes the first prompts of users: in the engine's process that would hold up the thread that feeds it."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.prompts = open_prompts(on_this_node(job.folder), Dataset.open(job.dataset).item_meta())

    def __call__(self, batch: pa.Table) -> pa.Table:
        made = [self.prompts.first(_user_lists(self.job, row)) for row in batch.to_pylist()]
        return batch.append_column("prompts", pa.array(made, pa.large_binary()))


def _user_lists(job: _Job, row: Mapping[str, Any]) -> UserLists:
    seed = job.seed * 1_000_003 + row["user_id"]
    return UserLists(row["history"], row["candidates"], seed, row.get("prompts"))


class _Worker:
    """One engine of the pool."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        self.ranker = open_ranker(job.folder, job.engine, Dataset.open(job.dataset).item_meta())
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
                self.ranker.engine.close()  # what is left of it holds the GPU's memory
            os._exit(1)  # Ray starts the actor anew and repeats its tasks; an exception would end the run
        outcomes = [self._row(row, outcome) for row, outcome in zip(rows, rankings, strict=True)]
        # The engine counts for all its users at once: the shard's first row carries what has come since the last one.
        with self.counting:
            before, self.counted = self.counted, _engine_counts(self.ranker.engine)
            outcomes[0] |= {name: value - before[name] for name, value in self.counted.items()}
        for outcome in outcomes:
            outcome[ENGINE_SECONDS] = time.monotonic() - started
        return pa.Table.from_pylist(outcomes, schema=_OUTCOME)

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


# ---- fusion ----------------------------------------------------------------------------------------------------------


def _fusion_weight(
    config: RerankConfig, dataset: Dataset, folder: ModelFolder, spec: ModeSpec, meta: Mapping[int, ItemMeta]
) -> float | None:
    """The configured weight, or the one that ranks validation users best."""
    if config.fusion_weight != "auto":
        return config.fusion_weight
    work = _plan(config, dataset, folder, spec, meta, "val", config.fusion_users)
    _, rows = _rank(config, dataset, folder, work, "val")
    targets = {user: target for user, (_, target) in dataset.histories("val").items()}
    return best_weight(
        [
            (items, scores, [work.retrieved[user].get(item, 0.0) for item in items], targets[user])
            for user, items, scores in rows.select("user_id", "item_ids", "scores").iter_rows()
        ]
    )


def best_weight(lists: Sequence[tuple[Sequence[int], Sequence[float], Sequence[float], int]], k: int = 10) -> float:
    """The fusion weight in steps of 0.05 with the highest mean NDCG@k; of equals the smallest.

    Args:
        lists: (items, model scores, retriever scores, target) per validation user.
        k: Cut-off.
    """

    def gain(weight: float) -> float:
        total = 0.0
        for items, model, retriever, target in lists:
            if target in items:
                order = stable_order(retriever)  # which ties of the fused scores keep
                rank = rank_by_score(fuse(model, retriever, weight)[order], order.index(list(items).index(target)))
                total += 1 / math.log2(rank + 1) if rank <= k else 0.0
        return total

    return max(_WEIGHTS, key=lambda weight: (round(gain(weight), 9), -weight))


_CONSTANT = "scores do not depend on the candidates: the model gives all users the same ones"


def _is_constant(rows: pl.DataFrame, meta: Mapping[int, ItemMeta], ranking: RankingConfig) -> bool:
    """Whether the model's own answers are alike for all users."""
    lists = Lists.from_frame(rows)
    if ranking.popularity_prior and lists.scores is not None:
        prior = dict(zip(meta, log_prior(meta.values()), strict=True))
        lists = lists.sorted_by(lists.scores - np.array([prior[item] for item in lists.items.tolist()]))
    return lists.same_scores()


def _fused(rows: pl.DataFrame, work: _Work, weight: float | None, source: str) -> pl.DataFrame:
    """The output table; ties of fused scores keep the retriever's order."""
    table = rows.select(RANKINGS.names).with_columns(source=pl.lit(source))
    if weight is None:
        return table
    items, scores = [], []
    for user, listed, model in table.select("user_id", "item_ids", "scores").iter_rows():
        retriever = [work.retrieved[user].get(item, 0.0) for item in listed]
        before = stable_order(retriever)
        fused = fuse(model, retriever, weight)
        order = [before[i] for i in stable_order(fused[before])]
        items.append([listed[i] for i in order])
        scores.append(fused[order].tolist())
    return table.with_columns(
        item_ids=pl.Series(items, dtype=pl.List(pl.Int32)), scores=pl.Series(scores, dtype=pl.List(pl.Float32))
    )


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
