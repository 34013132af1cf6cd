"""Bulk jobs must come out whole, once, and the same however often they were interrupted."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.processes import two_shards
from tests.summaries import with_summaries
from vlrank.config import EngineConfig, EvaluateConfig, RankingConfig, RayConfig, RerankConfig, Split, load_config
from vlrank.data.dataset import Dataset
from vlrank.data.items import ItemMeta
from vlrank.data.schemas import CANDIDATES, RANKINGS
from vlrank.data.tables import atomic_write_json
from vlrank.engines import vllm_args
from vlrank.errors import UserError
from vlrank.evaluation.run import run as evaluate
from vlrank.prompting.modes import mode_spec
from vlrank.prompting.prior import with_prior
from vlrank.reranker import Qwen3VLReranker
from vlrank.reranking import pipeline, plan
from vlrank.reranking.pipeline import _is_constant, _shards, _source, default_prompt_workers, dry_run, run
from vlrank.reranking.plan import open_setup, users_to_rank
from vlrank.reranking.ranker import UserLists, open_prompts
from vlrank.storage import Location
from vlrank.training.samples import validation_samples

TRANSFORMERS = EngineConfig(name="transformers", cpus=1)


@pytest.mark.parametrize(
    ("cpus", "replicas", "gpus", "workers"),
    [(16, 1, 1, 12), (64, 1, 1, 12), (8, 1, 0.5, 6), (16, 4, 1, 16), (2, 1, 1, 4), (16, 1, 0, 0)],
)
def test_prompts_are_made_by_as_many_processes_as_an_engine_can_have(
    cpus: float, replicas: int, gpus: float, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too few hold up the GPU: four processes make 640 prompts/s, a small model ranks thousands."""
    monkeypatch.setattr(pipeline, "cluster_resources", lambda: {"CPU": cpus})
    assert default_prompt_workers(EngineConfig(replicas=replicas), gpus) == workers


@pytest.fixture(scope="module")
def model(tiny_text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As training leaves it: a run folder with a checkpoint that says what it was trained for."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    checkpoint = folder / "qwen3vl_rerank" / "checkpoint-3"
    shutil.copytree(tiny_text_model, checkpoint)
    ranking = {"top_k": 50, "max_history": 5, "max_item_chars": 60}
    details = {"mode": "semantic_summary_small", "family": "text", "ranking": ranking, "method": "full"}
    atomic_write_json(checkpoint / "vlrank.json", details)
    atomic_write_json(folder / "best.json", {"checkpoint": "qwen3vl_rerank/checkpoint-3"})
    return folder


@pytest.fixture
def dataset(shop: Dataset, tmp_path: Path) -> Dataset:
    """A copy with summaries and with the candidates of a made-up retriever that always finds the target."""
    copy = with_summaries(shop, tmp_path / "dataset")
    lists = []
    for split in ("val", "test"):
        for user, (history, target) in copy.histories(split).items():  # type: ignore[arg-type]
            others = [item for item in range(1, copy.n_items + 1) if item not in (*history, target)][:24]
            lists.append((split, user, [target, *others], np.linspace(1, 0, len(others) + 1).tolist()))
    schema = pl.from_arrow(CANDIDATES.empty_table()).schema  # type: ignore[union-attr]
    copy.write_candidates("found", pl.DataFrame(lists, schema=schema, orient="row"))
    return Dataset.open(copy.path)


def config(dataset: Dataset, model: Path, out: Path, **more: object) -> RerankConfig:
    values = {"limit": 12, "shard_rows": 5, "engine": TRANSFORMERS, "ray": RayConfig(num_cpus=8), **more}
    return load_config(RerankConfig, dataset=dataset.path, model=str(model), out=out, **values)


# ---- without Ray -----------------------------------------------------------------------------------------------------


def test_split_val_measures_what_validation_does(dataset: Dataset, model: Path) -> None:
    """Other candidates are another metric: the user's later items were never shown here, and were in training."""
    settings = config(dataset, model, Path("r.parquet"), split="val", negatives=7, seed=3)
    here = dict(users_to_rank(open_setup(settings), "val", None).wanted.select("user_id", "candidates").iter_rows())
    items = np.arange(1, dataset.n_items + 1)
    there = validation_samples(dataset.histories("val"), items, negatives=7, users=10_000, seed=3)
    assert here == {sample.user_id: list(sample.candidates) for sample in there}
    tests = {user: target for user, (_, target) in dataset.histories("test").items()}
    assert any(tests[user] in candidates for user, candidates in here.items())


def test_sampled_candidates_are_named_so_that_no_table_claims_them(dataset: Dataset, model: Path) -> None:
    # `evaluate` would else measure rivals on a candidates table that happens to hold the sampled items.
    settings, spec = config(dataset, model, Path("r.parquet")), mode_spec("caption")
    assert _source(settings, spec, RankingConfig(), None) == "qwen3vl/caption candidates=ground_truth"


def test_a_model_that_does_not_look_is_noticed() -> None:
    """Its NDCG is that of the places it prefers, and nothing in a table of metrics shows it."""
    rng = np.random.default_rng(0)
    meta = {item: ItemMeta(text="", popularity=item) for item in range(1, 50)}
    lists = [rng.choice(np.arange(1, 50), size=20, replace=False) for _ in range(6)]

    def constant(answers: list[np.ndarray], **ranking: bool) -> bool:
        order = [np.argsort(-answer, kind="stable") for answer in answers]
        columns = {
            "user_id": range(6),
            "item_ids": [items[by].tolist() for items, by in zip(lists, order, strict=True)],
            "scores": [answer[by].tolist() for answer, by in zip(answers, order, strict=True)],
        }
        return _is_constant(pl.DataFrame(columns), meta, RankingConfig(**ranking))

    places = np.log(rng.dirichlet(np.ones(20)))
    assert constant([places] * 6)
    assert constant([np.full(20, -np.log(20))] * 6)
    assert constant([with_prior(places, np.log1p(items)) for items in lists], popularity_prior=True)
    assert not constant([with_prior(places, np.log1p(items)) for items in lists])
    assert not constant([places + rng.normal(size=20) * 0.01 for _ in lists])


def test_a_dry_run_says_how_much(dataset: Dataset, model: Path, tmp_path: Path) -> None:
    summary = dry_run(config(dataset, model, tmp_path / "r.parquet", candidates="found"))
    # 25 candidates: windows [5, 25) and [0, 20).
    assert summary.counts == {"users": 12, "pending": 12, "prompts": 24, "skipped": 0}
    assert not (tmp_path / "r.parquet.shards").exists()


def test_more_negatives_than_top_k_cost_no_user_its_target(dataset: Dataset, model: Path, tmp_path: Path) -> None:
    """They come in random order: 99 negatives cut to 50 would lose half of the targets, and half of the metric."""
    settings = config(dataset, model, tmp_path / "r.parquet", negatives=30, limit=40, ranking={"top_k": 10})
    setup = open_setup(settings)
    wanted = users_to_rank(setup, "test", 40).wanted
    prompts = open_prompts(setup.folder, setup.meta)
    histories = dataset.histories("test")
    for user, history, candidates in wanted.select("user_id", "history", "candidates").iter_rows():
        kept = prompts.lists(UserLists(history, candidates)).kept
        assert len(kept) == 31
        assert histories[user][1] in kept
    # 31 candidates: windows [11, 31), [1, 21) and [0, 20).
    assert dry_run(settings).counts["prompts"] == 3 * wanted.height
    assert "windows=20/10" in _source(settings, setup.spec, setup.folder.ranking, None)


def test_items_that_cannot_be_shown_make_room_for_the_retrievers_next(
    dataset: Dataset, model: Path, tmp_path: Path
) -> None:
    """A bulk run must rank what a notebook ranks: top_k items that can be shown, not those left of the first top_k."""
    settings = config(dataset, model, tmp_path / "r.parquet", candidates="found", ranking={"top_k": 7})
    setup = open_setup(settings)
    meta = {i: item if i % 3 else {**item, "semantic_summary": None} for i, item in setup.meta.items()}
    users = users_to_rank(replace(setup, meta=meta, usable={i for i in meta if i % 3}), "test", 12)
    found = dict(
        dataset.candidates("found").filter(pl.col("split") == "test").select("user_id", "item_ids").iter_rows()
    )
    maker = open_prompts(setup.folder, meta)
    for user, history, candidates in users.wanted.select("user_id", "history", "candidates").iter_rows():
        kept = maker.lists(UserLists(history, candidates)).kept
        assert kept == maker.lists(UserLists(history, found[user])).kept == [i for i in found[user] if i % 3][:7]


def test_a_user_is_ranked_again_where_pictures_changed_and_not_where_the_dataset_moved(
    dataset: Dataset, tiny_vision_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranking again costs hours of GPUs; keeping rankings made from other pixels mixes two models in one table."""

    def hashes(data: Dataset, mode: str = "raw_image") -> list[str]:
        settings = config(data, tiny_vision_model, tmp_path / "r.parquet", as_mode=mode)
        return users_to_rank(open_setup(settings), "test", 12).wanted["input_hash"].to_list()

    before, texts = hashes(dataset), hashes(dataset, "semantic_summary")
    shutil.copytree(dataset.path, tmp_path / "moved")
    moved = Dataset.open(tmp_path / "moved")
    assert hashes(moved) == before
    items = moved.items()
    moved.update_items(items.with_columns(image_path=items["image_path"].reverse()))
    assert not set(hashes(Dataset.open(moved.path))) & set(before)
    monkeypatch.setattr(plan, "PREPARATION", "another way")
    assert not set(hashes(dataset)) & set(before)
    assert hashes(dataset, "semantic_summary") == texts


def test_histories_are_cut_to_a_short_engine(
    dataset: Dataset, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would refuse the prompts, and every user with a long history would go to the quarantine."""

    def longest(**engine: object) -> int:
        settings = config(dataset, model, tmp_path / "r.parquet", engine=EngineConfig(**engine))
        return open_setup(settings).folder.ranking.max_prompt_tokens

    monkeypatch.setattr(plan, "ranking_engine", lambda engine, folder: engine.name)
    assert longest(name="transformers", max_model_len=512) == 4096
    assert longest(name="vllm", max_model_len=512) == 512 - 16
    assert longest(name="vllm", max_model_len=8192) == 4096
    monkeypatch.setattr(vllm_args, "context_length", lambda base: 1024)
    assert longest(name="vllm") == 1024 - 16


def test_every_output_has_its_own_quarantine(
    dataset: Dataset, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a shared one a run takes another's failures for its own, leaves those users out and deletes its drafts."""

    def place(out: Path, split: Split = "test") -> Location:
        return _shards(config(dataset, model, out), dataset, split).quarantine

    outs = [tmp_path / name for name in ("caption/r.parquet", "raw/r.parquet", "raw/r.trec")]
    places = {place(out, split) for out in outs for split in get_args(Split)}
    assert len(places) == len(outs) * len(get_args(Split))
    assert all(folder.name.startswith("rerank-r-") for folder in places)
    monkeypatch.chdir(tmp_path)  # resuming from elsewhere finds it again
    assert place(Path("raw/r.trec")) == place(outs[2])


def test_mistakes_are_named_before_anything_starts(
    dataset: Dataset, model: Path, shop: Dataset, tmp_path: Path
) -> None:
    out = tmp_path / "r.parquet"
    with pytest.raises(UserError, match=r"vlrank retrieve"):
        run(config(dataset, model, out, candidates="absent"))
    with pytest.raises(UserError, match="cannot be written as"):
        run(config(dataset, model, tmp_path / "r.xlsx"))
    with pytest.raises(UserError, match="needs a retriever's scores"):
        run(config(dataset, model, out, fusion_weight=0.5))
    auto = {"candidates": "found", "fusion_weight": "auto"}
    for do in (dry_run, run):  # said at the end, it would cost all the users ranked by then
        with pytest.raises(UserError, match="on split val"):
            do(config(dataset, model, out, split="val", **auto))
    found = dataset.candidates("found")
    dataset.write_candidates("found", found.filter(pl.col("split") == "test"))
    for do in (dry_run, run):
        with pytest.raises(UserError, match=r"hold no val users\n.*vlrank retrieve"):
            do(config(dataset, model, out, **auto))
    with pytest.raises(UserError, match="between 0 and 1"):
        config(dataset, model, out, fusion_weight=1.5)
    with pytest.raises(UserError, match=r"`ranking.windw`, did you mean `ranking.window`\?\n`vlrank rerank --help`"):
        run(config(dataset, model, out, ranking={"windw": 5}))
    bare = tmp_path / "bare"
    shutil.copytree(shop.path, bare, ignore=shutil.ignore_patterns("semantic_summaries"))
    with pytest.raises(UserError, match="--what semantic_summary"):
        run(config(Dataset.open(bare), model, out))
    assert not out.exists()


# ---- with Ray --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    import ray

    # A GPU in name: engines ask for it, and Ray Data has rules for steps that do.
    ray.init(address="local", num_cpus=8, num_gpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.stack
def test_rankings_equal_the_notebooks_and_a_second_run_does_nothing(
    cluster: None, dataset: Dataset, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "r.parquet"
    first = run(config(dataset, model, out, candidates="found"))
    assert first.counts["done"] == 12
    table = pl.read_parquet(out)
    assert table.columns == RANKINGS.names
    assert table["user_id"].is_sorted()
    assert table["user_id"].n_unique() == table.height == 12
    assert set(table["source"]) == {"qwen3vl/semantic_summary_small candidates=found windows=20/10"}
    reranker = Qwen3VLReranker.load(model, item_meta=dataset.item_meta())
    found = dataset.candidates("found").filter(pl.col("split") == "test")
    histories = dataset.histories("test")
    for user, items, scores in table.select("user_id", "item_ids", "scores").head(3).iter_rows():
        listed = found.filter(pl.col("user_id") == user)["item_ids"][0].to_list()
        ranked = reranker.rerank(histories[user][0], listed)
        assert [item for item, _ in ranked] == items
        np.testing.assert_allclose([score for _, score in ranked], scores, atol=1e-3)
        assert sorted(items) == sorted(listed)
    again = run(config(dataset, model, out, candidates="found"))
    assert (again.counts["done"], again.counts["reused"]) == (0, 12)
    assert pl.read_parquet(out).equals(table)
    changed = dry_run(config(dataset, model, out, candidates="found", ranking={"max_history": 2}))
    assert changed.counts["pending"] == 12  # another question is noticed

    # The model's scores are kept: only the validation users are new.
    fused = run(config(dataset, model, out, candidates="found", fusion_weight="auto", fusion_users=10))
    assert fused.counts["reused"] == 12
    by_retriever = pl.read_parquet(out)
    # This retriever puts every target first: leaning on it is what validation says.
    assert float(str(fused.lines["fusion weight"])) > 0
    targets = [histories[user][1] for user in by_retriever["user_id"]]
    assert np.mean([items[0] == t for items, t in zip(by_retriever["item_ids"], targets, strict=True)]) > 0.8
    assert "fusion=" in by_retriever["source"][0]


@pytest.mark.stack
def test_rankings_of_a_constant_model_say_so(cluster: None, dataset: Dataset, model: Path, tmp_path: Path) -> None:
    """All scores are equal: the lists are the retriever's, with the retriever's numbers."""
    constant, out = tmp_path / "constant", tmp_path / "r.parquet"
    shutil.copytree(model, constant)
    [file] = constant.rglob("model.safetensors")
    save_file({key: torch.zeros_like(weight) for key, weight in load_file(file).items()}, file, {"format": "pt"})
    said = run(config(dataset, constant, out)).lines["warning"]
    assert "do not depend on the candidates" in str(said)
    evaluate(load_config(EvaluateConfig, dataset=dataset.path, rankings=(out,), out=tmp_path / "report"))
    assert "do not depend on the candidates" in (tmp_path / "report" / "metrics.json").read_text()


@pytest.mark.stack
def test_the_popularity_prior_reaches_the_rankings(
    cluster: None, dataset: Dataset, model: Path, tmp_path: Path
) -> None:
    def ranked(name: str, **ranking: object) -> dict[int, dict[int, float]]:
        out = tmp_path / name
        run(config(dataset, model, out, candidates="found", ranking={"top_k": 20, **ranking}))
        rows = pl.read_parquet(out).select("user_id", "item_ids", "scores").iter_rows()
        return {user: dict(zip(items, scores, strict=True)) for user, items, scores in rows}

    plain, weighted = ranked("plain.parquet"), ranked("weighted.parquet", popularity_prior=True)
    assert plain.keys() == weighted.keys()
    meta = dataset.item_meta()
    for user, scores in plain.items():
        items = list(scores)
        product = np.exp([scores[item] for item in items]) * [meta[item]["popularity"] + 1 for item in items]
        np.testing.assert_allclose(np.exp([weighted[user][item] for item in items]), product / product.sum(), rtol=1e-3)
    assert " prior" in pl.read_parquet(tmp_path / "weighted.parquet")["source"][0]


@pytest.mark.stack
def test_a_bad_picture_costs_its_user_and_can_be_retried(
    cluster: None, shop: Dataset, tiny_vision_model: Path, tmp_path: Path
) -> None:
    path = tmp_path / "dataset"
    shutil.copytree(shop.path, path)
    data = Dataset.open(path)
    victim = Path(str(data.item_meta()[1]["image_path"]))
    intact = victim.read_bytes()
    victim.write_bytes(intact[:50])
    more = {"as_mode": "raw_image", "ranking": {"max_history": 3}, "negatives": 30, "limit": 6}
    settings = config(data, tiny_vision_model, tmp_path / "r.parquet", **more)
    first = run(settings)
    assert first.counts["quarantined"] > 0
    assert first.counts["done"] + first.counts["quarantined"] == 6
    assert first.lines["in quarantine"] == f"{first.counts['quarantined']} PictureBroken"
    [folder] = (path / "quarantine").glob("rerank-r-test-*")
    reasons = data.quarantine(folder.name)
    assert set(reasons["error_type"]) == {"PictureBroken"}
    victim.write_bytes(intact)
    assert run(settings).counts["done"] == 0
    retried = run(settings.model_copy(update={"retry_failed": True}))
    assert retried.counts["done"] == first.counts["quarantined"]
    assert pl.read_parquet(tmp_path / "r.parquet").height == 6


@pytest.mark.stack
def test_killed_and_resumed_equals_unbroken(cluster: None, dataset: Dataset, model: Path, tmp_path: Path) -> None:
    unbroken, out = tmp_path / "unbroken.parquet", tmp_path / "r.parquet"
    run(config(dataset, model, unbroken, limit=40, engine=EngineConfig()))
    arguments = [
        *("rerank", dataset.path, "--model", model, "--out", out, "limit=40", "shard_rows=2", "prompt_workers=2"),
        "ray.num_cpus=8",
    ]
    process = two_shards(tmp_path, *arguments)
    shards = tmp_path / "r.parquet.shards" / "test"
    process.wait_for(lambda: len(list(shards.glob("[!.]*.parquet"))) >= 2, "the second shard")
    process.lose_power()
    resumed = run(config(dataset, model, out, limit=40, shard_rows=2, engine=EngineConfig()))
    assert (resumed.counts["reused"], resumed.counts["done"]) == (4, 36), (
        "shards are committed while others are in work"
    )
    assert pl.read_parquet(out).equals(pl.read_parquet(unbroken))  # to the bit
