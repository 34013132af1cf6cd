"""What a reranking run works on: the model, and every user's history and candidates with a hash of all inputs."""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from vlrank.config import RankingConfig, RerankConfig, ServeConfig, Split, merge, validate
from vlrank.console import announce
from vlrank.data.candidates_io import check_output
from vlrank.data.dataset import Dataset
from vlrank.data.items import ItemMeta
from vlrank.data.tables import file_size
from vlrank.engines.models import ModelFolder, open_model, unknown_mode
from vlrank.engines.resources import ranking_engine
from vlrank.errors import UserError
from vlrank.prompting.chat_template import check_chat_template
from vlrank.prompting.encoding import PREPARATION
from vlrank.prompting.modes import ModeSpec, mode_spec, shows
from vlrank.prompting.negatives import sampled_candidates
from vlrank.reranking.ranker import tokenizer_folder
from vlrank.storage import Location, listing, location


@dataclass(frozen=True, slots=True)
class Setup:
    """A run's inputs, opened and checked.

    Attributes:
        config: The settings.
        dataset: The dataset.
        folder: The model; ``folder.ranking`` are the settings that prompts are made with.
        spec: The mode.
        meta: item id -> what prompts show.
        usable: Items that the mode can show.
    """

    config: RerankConfig
    dataset: Dataset
    folder: ModelFolder
    spec: ModeSpec
    meta: Mapping[int, ItemMeta]
    usable: Collection[int]

    @property
    def engine(self) -> str:
        """The engine that ``auto`` means here; one that finds at load that it cannot rank leaves it to another."""
        return ranking_engine(self.config.engine, self.folder)


@dataclass(frozen=True, slots=True)
class Users:
    """The users of one split.

    Attributes:
        wanted: ``user_id``, ``input_hash``, ``history``, ``candidates``.
        retrieved: user id -> item id -> the retriever's score; empty for sampled candidates.
        skipped: Users without a target or history, or whose target the mode cannot show.
    """

    wanted: pl.DataFrame
    retrieved: Mapping[int, Mapping[int, float]]
    skipped: int


def open_setup(config: RerankConfig) -> Setup:
    """Open dataset and model, and find mistakes before anything is loaded.

    Raises:
        UserError: an unusable dataset, model, candidates table or setting.
    """
    dataset = Dataset.open(config.dataset)
    folder, spec = open_ranking_model(config)
    if config.candidates == "ground_truth":
        # Sampled candidates come in random order: cut to top_k, some users would lose the target.
        update = {"top_k": max(folder.ranking.top_k, config.negatives + 1)}
        folder = replace(folder, ranking=folder.ranking.model_copy(update=update))
    check_output(config.out, dataset)
    _check_fusion(config, dataset)
    meta = shown_items(dataset, folder, spec)
    usable = {item for item, entry in meta.items() if folder.ranking.missing == "text" or shows(spec, entry)}
    return Setup(config, dataset, folder, spec, meta, usable)


def open_ranking_model(config: RerankConfig | ServeConfig) -> tuple[ModelFolder, ModeSpec]:
    """The model, with the ranking settings it was trained with, changed by those of the config.

    Raises:
        UserError: no usable model, an unknown mode, or a wrong setting.
    """
    folder = open_model(config.model, config.as_mode)
    if folder.mode is None:
        raise unknown_mode(folder, "give as_mode=... as well.")
    spec = mode_spec(folder.mode)
    if note := check_chat_template(tokenizer_folder(folder), pictures=spec.pixels):
        announce("Note:", note, "yellow")
    ranking = validate(
        RankingConfig, merge(folder.ranking.model_dump(), config.ranking), within=(type(config), "ranking")
    )
    # Workers have another working directory.
    path, base = (str(Path(name).resolve()) if Path(name).is_dir() else name for name in (folder.path, folder.base))
    folder = replace(folder, path=path, base=base, ranking=ranking)
    if ranking_engine(config.engine, folder) == "vllm":
        from vlrank.engines.vllm_args import max_prompt_tokens

        # Histories are cut to what the engine takes; it would refuse longer prompts.
        update = {"max_prompt_tokens": max_prompt_tokens(folder, config.engine)}
        folder = replace(folder, ranking=ranking.model_copy(update=update))
    return folder, spec


def shown_items(dataset: Dataset, folder: ModelFolder, spec: ModeSpec) -> dict[int, ItemMeta]:
    """`Dataset.item_meta`, of which at least one item can be shown.

    Raises:
        UserError: no item has what the mode shows.
    """
    meta = dataset.item_meta()
    if folder.ranking.missing == "drop" and not any(shows(spec, item) for item in meta.values()):
        raise UserError(
            f"no item of {dataset.path} has what mode {spec.name} shows ({spec.shown})", f"Make it: {spec.remedy}"
        )
    return meta


def reach(ranking: RankingConfig) -> int:
    """History items to hand over for a prompt: those that the mode cannot show make room for older ones."""
    return ranking.max_history * (1 if ranking.missing == "text" else 4)


def _check_fusion(config: RerankConfig, dataset: Dataset) -> None:
    if config.fusion_weight is not None and config.candidates == "ground_truth":
        raise UserError("fusion_weight needs a retriever's scores", "Set candidates=NAME of `vlrank retrieve`.")
    if config.fusion_weight == "auto":
        if config.split == "val":
            raise UserError(
                "fusion_weight=auto on split val would choose the weight on the users it ranks", "Give a number."
            )
        _retrieved(config, dataset, "val")  # fail before the other users are ranked


def _retrieved(config: RerankConfig, dataset: Dataset, split: Split) -> pl.DataFrame:
    """The candidates table of one split, by user."""
    table = dataset.candidates(config.candidates).filter(pl.col("split") == split).sort("user_id")
    if table.is_empty():
        raise UserError(
            f"candidates {config.candidates!r} of {dataset.path} hold no {split} users",
            f"Make them: vlrank retrieve {shlex.quote(str(dataset.path))} --name {shlex.quote(config.candidates)}",
        )
    return table


def users_to_rank(setup: Setup, split: Split, limit: int | None) -> Users:
    """The first ``limit`` users of a split, with their candidates.

    Raises:
        UserError: no user can be ranked, or a list repeats an item.
    """
    config, ranking = setup.config, setup.folder.ranking
    histories = setup.dataset.histories(split)
    retrieved: dict[int, dict[int, float]] = {}
    listed: dict[int, list[int]] = {}

    # Candidates: sampled around the target, or a retriever's.
    if config.candidates == "ground_truth":
        items = np.asarray(sorted(setup.usable), dtype=np.int64)
        considered = sorted(histories)[:limit]
        for user in considered:
            history, target = histories[user]
            if target in setup.usable:
                listed[user] = list(sampled_candidates(user, history, target, items, config.negatives, config.seed)[0])
    else:
        table = _retrieved(config, setup.dataset, split)
        table = table.head(limit) if limit is not None else table
        considered = table["user_id"].to_list()
        for user, candidates, scores in table.select("user_id", "item_ids", "scores").iter_rows():
            if len(set(candidates)) != len(candidates):
                raise UserError(f"candidates {config.candidates!r} repeat an item for user {user}", "Make them again.")
            if user in histories:
                listed[user] = _best_usable(candidates, setup.usable, ranking.top_k)
                retrieved[user] = dict(zip(candidates, scores, strict=True)) if scores else {}
    if not listed:
        raise UserError(
            f"no {split} user of {setup.dataset.path} can be ranked", "Check the dataset and its candidates."
        )

    # Hashes: a user is ranked again when anything that the ranking depends on has changed.
    model = _model_hash(setup.folder, setup.spec)
    item_hashes = _item_hashes(setup.meta, setup.spec, ranking, setup.dataset.path.resolve())
    # Engines agree within the noise of bfloat16; products in 8 bits do not.
    rounding = [config.engine.quantization] if config.engine.quantization else []
    rows = []
    for user, candidates in listed.items():
        history = histories[user][0][-reach(ranking) :]
        shown = [item_hashes.get(item, "") for item in (*history, *candidates)]
        text = json.dumps([model, config.seed, history, candidates, shown, *rounding])
        rows.append((user, hashlib.sha256(text.encode()).hexdigest()[:32], history, candidates))
    ids = pl.List(pl.Int32)
    schema: dict[str, Any] = {"user_id": pl.Int32, "input_hash": pl.String, "history": ids, "candidates": ids}
    return Users(pl.DataFrame(rows, schema=schema, orient="row"), retrieved, len(considered) - len(listed))


def _best_usable(items: list[int], usable: Collection[int], top_k: int) -> list[int]:
    """The head of a list that holds its best ``top_k`` usable items: those that are not make room for further ones."""
    places = [place for place, item in enumerate(items) if item in usable][:top_k]
    return items[: places[-1] + 1] if len(places) == top_k else items


def _model_hash(folder: ModelFolder, spec: ModeSpec) -> str:
    """Hash of everything about the model that changes rankings: settings, files, and how pictures are prepared."""
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
    # A picture's file name is the hash of its content; the place of the dataset does not count.
    def seen(entry: ItemMeta) -> str:
        counted = entry["popularity"] if ranking.popularity_prior else ""
        return f"{entry['text']}\0{str(entry.get(spec.shows)).removeprefix(f'{root}/')}\0{counted}"

    return {item: hashlib.sha256(seen(entry).encode()).hexdigest()[:16] for item, entry in meta.items()}
