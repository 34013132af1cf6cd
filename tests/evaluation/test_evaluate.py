"""`vlrank evaluate`: the same users, the same lists, the right protocol, and a report that says so."""

import json
import shutil
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from vlrank.config import EvaluateConfig, RetrieveConfig, load_config
from vlrank.data import schemas
from vlrank.data.candidates_io import write_rankings
from vlrank.data.dataset import Dataset, write_dataset
from vlrank.data.lists import Lists
from vlrank.data.tables import write_parquet_atomic
from vlrank.errors import UserError
from vlrank.evaluation.metrics import ranking_metrics
from vlrank.evaluation.rankings import _names, read_rankings
from vlrank.evaluation.run import dry_run, run
from vlrank.retrieval.retrieve import run as retrieve

RIVALS = ("identity", "random", "popularity")


@pytest.fixture(scope="module")
def data(world: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The small world with candidates of two retrievers."""
    path = tmp_path_factory.mktemp("evaluate") / "data"
    shutil.copytree(world.path, path)
    for name in ("item_knn", "popularity"):
        retrieve(RetrieveConfig(dataset=path, method=name, top_k=15))
    return Dataset.open(path)


def write(path: Path, lists: Lists, source: str, split: str = "test") -> Path:
    table = lists.to_frame(split=split, source=source).select(schemas.RANKINGS.names)
    write_parquet_atomic(table, path, schemas.RANKINGS)
    return path


def reranked(data: Dataset, path: Path, source: str, seed: int | None, name: str = "item_knn") -> Path:
    """Candidates in a new order with probabilities as scores; seed None is the constant scorer."""
    lists = Lists.from_frame(data.candidates(name).filter(pl.col("split") == "test"))
    noise = np.zeros(len(lists.items)) if seed is None else np.random.default_rng(seed).normal(size=len(lists.items))
    sums = np.bincount(lists.segments(), np.exp(noise))
    return write(path, lists.sorted_by(noise - np.log(sums)[lists.segments()]), source)


def evaluated(data: Dataset, out: Path, *files: Path, **options: object) -> dict:
    values = {"bootstrap": 200, "baselines": RIVALS, "sample_users": 6} | options
    run(EvaluateConfig(dataset=data.path, rankings=files, out=out, **values))  # type: ignore[arg-type]
    return json.loads((out / "metrics.json").read_text())


def means(group: dict, name: str) -> dict[str, float]:
    method = next(m for m in group["methods"] if m["name"] == name)
    return {metric: value["mean"] for metric, value in method["metrics"].items()}


def test_a_constant_scorer_gets_the_retrievers_numbers(data: Dataset, tmp_path: Path) -> None:
    (group,) = evaluated(data, tmp_path, reranked(data, tmp_path / "r.parquet", "qwen3vl/caption", None))["groups"]
    assert means(group, "caption") == means(group, "identity")
    assert group["differences"][0]["difference"] == 0
    assert [f["level"] for f in group["findings"] if f["check"] == "scores"] == ["warning"]  # and it is told


def test_numbers_carry_their_protocol(data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = reranked(data, tmp_path / "r.parquet", "qwen3vl/caption", 1)
    (group,) = evaluated(data, tmp_path, file)["groups"]
    protocol = group["protocol"]
    assert (protocol["name"], protocol["candidates"], protocol["split"]) == ("retrieval", "item_knn", "test")
    assert (protocol["users"], protocol["candidates_per_user"]) == (80, 15)
    lists = Lists.from_frame(data.candidates("item_knn").filter(pl.col("split") == "test"))
    targets = {user: target for user, (_, target) in data.histories("test").items()}
    ranked = {int(user): lists.items[a:b].tolist() for user, a, b in zip(lists.users, lists.offsets, lists.offsets[1:])}  # noqa: B905
    expected = ranking_metrics(ranked, targets, ks=(1, 5, 10, 20, 50))
    assert means(group, "identity") == pytest.approx(expected)
    assert protocol["coverage"] == pytest.approx(expected["recall@50"])
    assert "test, retrieval (item_knn), 15 candidates, 80 users" in capsys.readouterr().out


def test_ground_truth_is_recognised_and_has_no_retriever(data: Dataset, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lists = {
        user: rng.permutation(
            [target, *rng.choice(np.setdiff1d(np.arange(1, 61), [target]), 9, replace=False)]
        ).tolist()
        for user, (_, target) in data.histories("test").items()
    }
    file = write(tmp_path / "gt.parquet", Lists.from_dict(lists), "qwen3vl/caption")
    (group,) = evaluated(data, tmp_path, file)["groups"]
    assert group["protocol"]["name"] == "ground_truth"
    assert group["protocol"]["coverage"] == 1
    assert [m["name"] for m in group["methods"]] == ["caption", "random", "popularity"]
    random = next(m for m in group["methods"] if m["name"] == "random")
    assert random["metrics"]["recall@1"]["expected"] == pytest.approx(0.1)


def sampled(data: Dataset, n: int = 20) -> Lists:
    """The target among random items, in random order: what a model that knows nothing makes of ground truth."""
    rng = np.random.default_rng(0)
    return Lists.from_dict(
        {
            user: rng.permutation([target, *rng.choice(np.setdiff1d(np.arange(1, 61), [target]), n - 1, replace=False)])
            for user, (_, target) in data.histories("test").items()
        }
    )


@pytest.mark.parametrize("source", ["qwen3vl/caption candidates=ground_truth", "qwen3vl/caption"])
def test_a_table_of_the_whole_catalogue_does_not_claim_sampled_candidates(
    data: Dataset, tmp_path: Path, source: str
) -> None:
    # Rivals that rank all 60 items while the model ranks 20 would lose against chance.
    shutil.copytree(data.path, tmp_path / "data")
    small = Dataset.open(tmp_path / "data")
    whole = {user: list(range(1, 61)) for user in small.histories("test")}
    small.write_candidates("all", Lists.from_dict(whole).to_frame(split="test"))
    file = write(tmp_path / "gt.parquet", sampled(small), source)
    (group,) = evaluated(small, tmp_path / "out", file)["groups"]
    protocol = group["protocol"]
    assert (protocol["name"], protocol["candidates"], protocol["candidates_per_user"]) == ("ground_truth", None, 20)
    assert group["methods"][0]["name"] == "caption"
    assert all(difference["p_holm"] > 0.05 for difference in group["differences"])


def test_what_is_declared_ground_truth_stays_it_whatever_table_is_asked_for(data: Dataset, tmp_path: Path) -> None:
    lists = Lists.from_frame(data.candidates("popularity").filter(pl.col("split") == "test"))
    file = write(tmp_path / "gt.parquet", lists, "qwen3vl/caption candidates=ground_truth")
    (group,) = evaluated(data, tmp_path / "out", file, candidates="popularity")["groups"]
    assert group["protocol"]["candidates"] is None
    assert any("ranks the target among sampled items" in f["message"] for f in group["findings"])


def test_the_best_few_of_long_lists_are_still_those_of_their_retriever(data: Dataset, tmp_path: Path) -> None:
    # Another program that reranks the first 5 of 15 says nothing about it; the retriever stays its rival.
    lists = Lists.from_frame(data.candidates("item_knn").filter(pl.col("split") == "test")).head(5)
    file = write(tmp_path / "r.parquet", lists.sorted_by(np.random.default_rng(0).random(len(lists.items))), "other")
    (group,) = evaluated(data, tmp_path / "out", file)["groups"]
    assert (group["protocol"]["candidates"], group["protocol"]["candidates_per_user"]) == ("item_knn", 5)
    deep = Lists.from_frame(data.candidates("item_knn").filter(pl.col("split") == "test"))
    file = write(tmp_path / "d.parquet", deep.keep(deep.positions() >= 10), "other candidates=item_knn")
    (group,) = evaluated(data, tmp_path / "said", file)["groups"]
    assert group["protocol"]["candidates"] == "item_knn"


def test_rivals_never_profit_from_the_models_order(data: Dataset, tmp_path: Path) -> None:
    # A perfect model lists the target first. A rival that knows nothing (all equally popular) must not inherit that.
    lists = {user: [target, *range(61 - 20, 60)][:15] for user, (_, target) in data.histories("test").items()}
    file = write(tmp_path / "gt.parquet", Lists.from_dict(lists), "qwen3vl/caption")
    (group,) = evaluated(data, tmp_path, file, baselines=("bm25", "random"))["groups"]
    assert means(group, "caption")["recall@1"] == 1
    assert means(group, "random")["recall@1"] < 0.3


def test_what_the_rankings_say_about_themselves_names_the_group(data: Dataset, tmp_path: Path) -> None:
    # 15 popular items per user may lie within several tables; the source says which one was reranked, and how.
    source = "qwen3vl/caption candidates=popularity permutations=3 fusion=0.4"
    file = reranked(data, tmp_path / "r.parquet", source, 1, "popularity")
    (group,) = evaluated(data, tmp_path, file)["groups"]
    assert group["protocol"]["candidates"] == "popularity"
    assert group["methods"][0]["name"] == "caption permutations=3 fusion=0.4"


def test_runs_of_other_programs_are_evaluated_too(data: Dataset, tmp_path: Path) -> None:
    lists = Lists.from_frame(data.candidates("item_knn").filter(pl.col("split") == "test"))
    lines = [
        f"U{user:03d} Q0 B{item:03d} {place + 1} {-place} other"
        for user, item, place in zip(np.repeat(lists.users, lists.lengths), lists.items, lists.positions(), strict=True)
    ]
    (tmp_path / "other.trec").write_text("\n".join(lines))
    (group,) = evaluated(data, tmp_path, tmp_path / "other.trec")["groups"]
    assert means(group, "other") == means(group, "identity")


@pytest.mark.parametrize("said", [True, False])
def test_validation_rankings_in_other_formats_are_not_measured_on_test_targets(
    data: Dataset, tmp_path: Path, said: bool
) -> None:
    # A TREC run names no split: read as test, every validation item counts as history and every hit as a miss.
    table = data.candidates("item_knn").filter(pl.col("split") == "val")
    source = "qwen3vl/caption candidates=item_knn"
    file = tmp_path / "v.trec"
    write_rankings(table.with_columns(source=pl.lit(source)).select(schemas.RANKINGS.names), file, dataset=data)
    if said:
        (tmp_path / "v.trec.json").write_text(json.dumps({"source": source, "split": "val"}))
    options = {} if said else {"split": "val"}
    (group,) = evaluated(data, tmp_path / "out", file, **options)["groups"]
    assert (group["protocol"]["split"], group["protocol"]["candidates"]) == ("val", "item_knn")
    assert group["methods"][0]["name"] == ("caption" if said else "v")
    assert means(group, group["methods"][0]["name"]) == means(group, "identity")


@pytest.mark.parametrize("beside", ["{", "[]", '{"split": "train"}'])
def test_a_foreign_file_beside_a_run_changes_nothing(data: Dataset, tmp_path: Path, beside: str) -> None:
    (tmp_path / "r.tsv").write_text("U001\tB005 B010\n")
    (tmp_path / "r.tsv.json").write_text(beside)
    assert [(run.name, run.split) for run in read_rankings([tmp_path / "r.tsv"], data)] == [("r", "test")]


def test_an_item_ranked_twice_counts_at_its_first_place(data: Dataset, tmp_path: Path) -> None:
    # Runs of other programs may repeat items: the report ended with an IndexError, and later items fell in rank.
    table = data.candidates("item_knn").filter(pl.col("split") == "test")
    lines, repeated = [], 0
    for user, items in table.select("user_id", "item_ids").iter_rows():
        twice = [item for item in items for _ in range(2)] if user <= 10 else items
        repeated += len(twice) - len(items)
        lines += [f"U{user:03d} Q0 B{item:03d} {place} {-place} other" for place, item in enumerate(twice, start=1)]
    (tmp_path / "other.trec").write_text("\n".join(lines))
    (group,) = evaluated(data, tmp_path, tmp_path / "other.trec")["groups"]
    assert means(group, "other") == means(group, "identity")
    (finding,) = [f for f in group["findings"] if f["check"] == "duplicates"]
    assert (finding["level"], finding["count"], finding["total"]) == ("warning", 10, 80)
    assert f"({repeated} items)" in finding["message"]


def test_what_an_imported_ranking_holds_beside_the_dataset_is_counted(data: Dataset, tmp_path: Path) -> None:
    """Half a file of unknown users would otherwise be half the users missing, without a word."""
    table = data.candidates("item_knn").filter(pl.col("split") == "test").select("user_id", "item_ids")
    lines = [f"U{user:03d}\t{' '.join(f'B{item:03d}' for item in items)}" for user, items in table.iter_rows()]
    (tmp_path / "theirs.txt").write_text("\n".join([*lines, "nobody\tB001 B002", lines[0]]))
    (group,) = evaluated(data, tmp_path / "out", tmp_path / "theirs.txt")["groups"]
    (finding,) = [one for one in group["findings"] if one["check"] == "rejected"]
    assert "1 UnknownUser, 1 DuplicateUser" in finding["message"]


def test_different_candidates_are_not_compared(data: Dataset, tmp_path: Path) -> None:
    files = [
        reranked(data, tmp_path / f"{name}.parquet", "qwen3vl/caption", 1, name) for name in ("item_knn", "popularity")
    ]
    groups = evaluated(data, tmp_path, *files)["groups"]
    assert [group["protocol"]["candidates"] for group in groups] == ["item_knn", "popularity"]


def test_models_are_compared_on_the_users_that_all_ranked(data: Dataset, tmp_path: Path) -> None:
    whole = reranked(data, tmp_path / "a.parquet", "qwen3vl/caption", 1)
    part = tmp_path / "b.parquet"
    table = pl.read_parquet(reranked(data, tmp_path / "c.parquet", "qwen3vl/raw_image", 2)).head(50)
    write_parquet_atomic(table, part, schemas.RANKINGS)
    (group,) = evaluated(data, tmp_path, whole, part)["groups"]
    assert group["protocol"]["users"] == 50
    assert any("30 of its users are left out" in f["message"] for f in group["findings"])


def test_an_injected_target_is_an_error_in_the_report(data: Dataset, tmp_path: Path) -> None:
    lists = Lists.from_frame(data.candidates("item_knn").filter(pl.col("split") == "test"))
    targets = {user: target for user, (_, target) in data.histories("test").items()}
    ranked = {}
    for user, a, b in zip(lists.users.tolist(), lists.offsets, lists.offsets[1:], strict=False):
        items = lists.items[a:b].tolist()
        ranked[user] = items if targets[user] in items else [*items[:-1], targets[user]]
    file = write(tmp_path / "i.parquet", Lists.from_dict(ranked), "qwen3vl/caption")
    (group,) = evaluated(data, tmp_path, file)["groups"]
    injected = [f for f in group["findings"] if f["check"] == "target_injected"]
    assert injected
    assert injected[0]["level"] == "error"


def test_compare_prints_the_paired_difference(
    data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [
        reranked(data, tmp_path / f"{name}.parquet", f"qwen3vl/{name}", s) for s, name in enumerate(("one", "two"))
    ]
    got = evaluated(data, tmp_path, *files, compare=("one", str(files[1])))
    assert {(d["a"], d["b"]) for d in got["compare"]} == {("one", "two")}
    assert "one against two" in capsys.readouterr().out
    with pytest.raises(UserError, match="no table holds both 'one' and 'three'"):
        evaluated(data, tmp_path / "x", *files, compare=("one", "three"))
    assert not (tmp_path / "x").exists()


def test_new_items_have_a_table_of_their_own(
    world: Dataset, data: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A ranker that reads texts is worth most where nobody has bought anything yet, which means over all users hide."""
    items, sequences = world.items().to_dicts(), world.sequences().to_dicts()
    items += [items[0] | {"item_id": 61, "source_id": "B061"}]
    for row in sequences[:8]:
        row["item_ids"][-1] = 61  # as the last item alone: in nobody's training part
    new = write_dataset(tmp_path / "data", items=items, sequences=sequences, options={})
    rare = range(48, 60)
    lists = {user: [t, *(i for i in rare if i != t)] for user, (_, t) in new.histories("test").items()}
    file = write(tmp_path / "r.parquet", Lists.from_dict(lists), "qwen3vl/caption")
    group = evaluated(new, tmp_path / "out", file, protocol="ground_truth")["groups"][0]
    printed = capsys.readouterr().out
    table = printed[printed.index("of them 8 whose target has no training interaction") :].split("paired")[0]
    first = {words[0]: words[1] for words in map(str.split, table.splitlines()) if len(words) > 3}
    assert first["caption"] == "1.0000"
    assert first["popularity"] == "0.0000"
    assert means(group, "popularity")["recall@1"] > 0

    # A retriever that lists none of them: one line says so, and no table of zeros.
    without = write(tmp_path / "w.parquet", Lists.from_dict({u: [*rare] for u in lists}), "qwen3vl/caption")
    evaluated(new, tmp_path / "without", without, protocol="retrieval")
    printed = capsys.readouterr().out
    assert "of them 8 whose target has no training interaction: no list holds it" in printed
    assert printed.count("NDCG@10   MRR@10") == 1

    evaluated(data, tmp_path / "none", reranked(data, tmp_path / "x.parquet", "qwen3vl/caption", 1))
    assert "no training interaction" not in capsys.readouterr().out


def test_equal_inputs_give_equal_files(data: Dataset, tmp_path: Path) -> None:
    file = reranked(data, tmp_path / "r.parquet", "qwen3vl/caption", 1)
    for name in ("a", "b"):
        evaluated(data, tmp_path / name, file)
    for name in ("metrics.json", "report.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"baselines": ["itemknn"]}, "unknown baseline 'itemknn'"),
        ({"baselines": ["embedding"]}, "needs `embedding_model`"),
        ({"compare": ["one"]}, "compare takes two methods"),
        ({"ks": [0]}, "ks must be at least 1"),
        ({"candidates": "nope"}, "no candidates 'nope'"),
        ({"runs": ["nowhere"]}, "has no history.jsonl"),
    ],
)
def test_wrong_options_are_told_and_nothing_is_written(
    data: Dataset, tmp_path: Path, options: dict, message: str
) -> None:
    file = reranked(data, tmp_path / "r.parquet", "qwen3vl/caption", 1)
    with pytest.raises(UserError, match=message):
        run(load_config(EvaluateConfig, dataset=data.path, rankings=[file], out=tmp_path / "out", **options))
    assert not (tmp_path / "out" / "report.html").exists()


def test_rankings_of_another_dataset_are_refused(data: Dataset, tmp_path: Path) -> None:
    file = write(tmp_path / "r.parquet", Lists.from_dict({1: [61]}), "qwen3vl/caption")
    with pytest.raises(UserError, match="made from another dataset"):
        evaluated(data, tmp_path, file)


def test_a_dry_run_names_what_it_found(data: Dataset, tmp_path: Path) -> None:
    file = reranked(data, tmp_path / "r.parquet", "qwen3vl/caption", 1)
    lines = dry_run(EvaluateConfig(dataset=data.path, rankings=(file,), out=tmp_path / "out")).lines
    assert "test, 80 users" in str(lines["caption"])
    assert not (tmp_path / "out").exists()


@pytest.mark.shared_data
def test_beauty_reproduces_the_recorded_sasrec(beauty: Dataset, shared_data: Path, tmp_path: Path) -> None:
    """Full ranking over all 22,363 users: the numbers recorded with the candidates, to their last digit."""
    file = shared_data / "beauty2014" / "sasrec_candidates.parquet"
    summary = retrieve(RetrieveConfig(dataset=beauty.path, method=str(file), name="sasrec"))
    assert summary.counts["quarantined"] == 0
    recorded = {
        "val": {"recall@10": 0.1164, "ndcg@10": 0.0710, "recall@20": 0.1564, "recall@50": 0.2230},
        "test": {"recall@10": 0.0933, "ndcg@10": 0.0564, "recall@20": 0.1283, "recall@50": 0.1886},
    }
    groups = evaluated(beauty, tmp_path, file, bootstrap=100, baselines=("identity",))["groups"]
    assert {group["protocol"]["split"] for group in groups} == {"val", "test"}
    for group in groups:
        assert group["protocol"]["name"] == "retrieval"
        assert group["protocol"]["users"] == 22_363
        for metric, value in recorded[group["protocol"]["split"]].items():
            assert round(means(group, "sasrec_candidates")[metric], 4) == value
        assert means(group, "identity") == means(group, "sasrec_candidates")


def test_rankings_of_one_mode_are_told_apart_by_their_files() -> None:
    found = [("qwen3vl/caption", "test", Path(name)) for name in ("a/caption.parquet", "a/caption_zero_shot.parquet")]
    assert _names(found) == ["caption", "caption_zero_shot"]  # type: ignore[arg-type]
    # One of them made before sampled candidates were named.
    found = [
        (f"{source}{said}", split, file)
        for (source, split, file), said in zip(found, ("", " candidates=ground_truth"), strict=True)
    ]
    assert _names(found) == ["caption", "caption_zero_shot"]  # type: ignore[arg-type]
    other = [("qwen3vl/caption candidates=knn", "test", Path("a/reranked.parquet"))]
    assert _names(found + other) == ["caption", "caption_zero_shot", "reranked"]  # type: ignore[arg-type]
    same = [("qwen3vl/caption", "test", Path(f"{folder}/caption.parquet")) for folder in "ab"]
    assert len(set(_names(same))) == 2  # type: ignore[arg-type]
