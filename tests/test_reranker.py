"""The few lines of the public API, in one process and without Ray."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image

import vlrank
from vlrank import Qwen3VLReranker
from vlrank.config import EngineConfig, RankingConfig
from vlrank.data.items import ItemMeta
from vlrank.data.picture import PictureBroken
from vlrank.data.tables import atomic_write_json
from vlrank.engines.models import open_model
from vlrank.errors import UserError
from vlrank.prompting.encoding import Encoded, Encoder, PromptTooLong
from vlrank.prompting.modes import mode_spec
from vlrank.reranking.ranker import NoCandidates, PromptMaker, Ranker, Ranking, UserLists, open_ranker

from .prompting.tokenizers_zoo import digits

META: dict[int, ItemMeta] = {i: {"text": f"item {i}", "semantic_summary": f"summary {i}"} for i in range(1, 80)}


class Fixed:
    """An engine with one opinion: a function from the number of candidates to log-probabilities."""

    def __init__(self, opinion: Any) -> None:
        self.opinion = opinion
        self.asked: list[int] = []

    def score_labels(self, encoder: Encoder, requests: list[Encoded]) -> list[Any]:
        self.asked += [request.n_candidates for request in requests]
        return [self.opinion(request.n_candidates) for request in requests]


def ranker(opinion: Any, **ranking: Any) -> Ranker:
    spec, config = mode_spec("semantic_summary_small"), RankingConfig(**ranking)
    engine: Any = Fixed(opinion)
    return Ranker(engine, PromptMaker(Encoder(digits(), spec, config), spec, config, META))


def test_a_constant_model_keeps_the_retrievers_order() -> None:
    ranks = ranker(lambda n: np.full(n, -np.log(n), dtype=np.float32), top_k=70, permutations=3)
    [ranking] = ranks.rank([UserLists([1], list(range(60, 9, -1)))])
    assert isinstance(ranking, Ranking)
    assert ranking.item_ids == list(range(60, 9, -1))
    assert ranking.prompts == 5 * 3  # windows [31, 51) [21, 41) [11, 31) [1, 21) [0, 20), three orders each


def test_a_wrong_setting_names_the_place_where_they_are_listed() -> None:
    with pytest.raises(UserError, match=r"unknown config key `windw`.*\n`vlrank.config.RankingConfig` lists"):
        Qwen3VLReranker("caption", windw=3)


def test_a_prior_without_popularity_is_refused() -> None:
    with pytest.raises(UserError, match="popularity"):
        ranker(lambda n: np.zeros(n), popularity_prior=True).rank([UserLists([1], [2, 3])])


def test_top_k_is_the_retrievers_best() -> None:
    [ranking] = ranker(lambda n: np.zeros(n), top_k=5).rank([UserLists([], list(range(1, 30)))])
    assert isinstance(ranking, Ranking)
    assert ranking.item_ids == [1, 2, 3, 4, 5]


def test_items_without_what_the_mode_shows_are_left_out_and_counted() -> None:
    ranks = ranker(lambda n: np.zeros(n))
    ranks.prompts.item_meta = {**META, 3: {"text": "bare", "semantic_summary": None}}
    first, second = ranks.rank([UserLists([3], [1, 3, 2]), UserLists([], [3])])
    assert isinstance(first, Ranking)
    assert (first.item_ids, first.dropped) == ([1, 2], 1)
    assert isinstance(second, NoCandidates)
    shown = ranker(lambda n: np.zeros(n), missing="text")
    shown.prompts.item_meta = ranks.prompts.item_meta
    [third] = shown.rank([UserLists([3], [1, 3, 2])])
    assert isinstance(third, Ranking)
    assert third.item_ids == [1, 3, 2]


def test_one_bad_user_does_not_stop_the_others() -> None:
    ranks = ranker(lambda n: np.zeros(n) if n != 4 else OSError("broken picture"))
    good, bad = ranks.rank([UserLists([], [1, 2, 3]), UserLists([], [1, 2, 3, 4])])
    assert isinstance(good, Ranking)
    assert isinstance(bad, OSError)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_no_ranking(value: float) -> None:
    """A model that overflows in float16 would be committed as done, in the retriever's order, and never be noticed."""

    def opinion(n: int) -> Any:
        scores = np.zeros(n, dtype=np.float32)
        scores[1] = value if n == 4 else 0
        return scores

    good, bad = ranker(opinion).rank([UserLists([], [1, 2, 3]), UserLists([], [1, 2, 3, 4])])
    assert isinstance(good, Ranking)
    assert isinstance(bad, ValueError)
    assert "not finite; try engine.dtype=bfloat16" in str(bad)


def test_cut_histories_are_counted() -> None:
    ranks = ranker(lambda n: np.zeros(n), max_prompt_tokens=500)
    [ranking] = ranks.rank([UserLists(list(range(20, 40)), [1, 2, 3])])
    assert isinstance(ranking, Ranking)
    assert 0 < ranking.history_cut < 20


def test_prompts_made_elsewhere_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In bulk jobs other processes make them; rankings may not depend on who did."""
    ranks = ranker(lambda n: np.log(np.arange(1, n + 1) / (n * (n + 1) / 2)), permutations=2, max_prompt_tokens=900)
    asked: list[tuple[int, ...]] = []
    score_labels = ranks.engine.score_labels
    monkeypatch.setattr(
        ranks.engine,
        "score_labels",
        lambda encoder, prompts: (asked.extend(tuple(one.ids) for one in prompts), score_labels(encoder, prompts))[1],
    )
    users = [
        UserLists(list(range(20, 40)), list(range(40, 40 + n)), seed=n) for n in (0, 1, 5, 20, 30)
    ]  # the last one takes two windows, and the second of them depends on the first
    here = ranks.rank(users)
    told, asked[:] = list(asked), []
    made = [replace(user, prompts=ranks.prompts.first(user)) for user in users]
    encoded: list[int] = []
    encode = ranks.prompts.encoder.encode
    monkeypatch.setattr(
        ranks.prompts.encoder, "encode", lambda history, shown: (encoded.append(len(shown)), encode(history, shown))[1]
    )
    there = ranks.rank(made)
    assert asked == told
    assert encoded == [20, 20], "only the second window of the last user, in both orders"
    for ours, theirs in zip(here, there, strict=True):
        assert (type(ours), str(ours)) == (type(theirs), str(theirs))


def test_why_a_prompt_could_not_be_made_elsewhere_is_told() -> None:
    ranks = ranker(lambda n: np.zeros(n), max_prompt_tokens=64)
    user = UserLists([], list(range(1, 21)))
    [ranking] = ranks.rank([replace(user, prompts=ranks.prompts.first(user))])
    assert isinstance(ranking, PromptTooLong)


@pytest.fixture(scope="module")
def reranker(tiny_text_model: Path) -> Qwen3VLReranker:
    return Qwen3VLReranker(mode="semantic_summary_small", model=tiny_text_model, top_k=30)


def test_rerank_returns_log_probabilities_best_first(reranker: Qwen3VLReranker) -> None:
    ranked = reranker.rerank([1, 2, 3], [10, 11, 12, 13, 14], META)
    assert sorted(item for item, _ in ranked) == [10, 11, 12, 13, 14]
    scores = [score for _, score in ranked]
    assert scores == sorted(scores, reverse=True)
    assert np.exp(scores).sum() == pytest.approx(1, abs=1e-4)


def test_many_users_equal_each_alone(reranker: Qwen3VLReranker) -> None:
    histories, candidates = [[1], [], [5, 6]], [list(range(20, 50)), [7], [9, 8, 30]]
    together = reranker.rerank_batch(histories, candidates, META)
    for history, listed, ranked in zip(histories, candidates, together, strict=True):
        alone = reranker.rerank(history, listed, META)
        assert [item for item, _ in alone] == [item for item, _ in ranked]
        np.testing.assert_allclose([s for _, s in alone], [s for _, s in ranked], atol=1e-4)


def test_frames_as_rectools_has_them(reranker: Qwen3VLReranker) -> None:
    frame = pl.DataFrame({"user_id": [5, 5, 2], "item_id": [10, 11, 12], "score": [0.5, 0.7, 0.1]})
    ranked = reranker.rerank_frame(frame, {5: [1, 2]}, META)
    assert ranked.columns == ["user_id", "item_id", "rank", "score"]
    assert ranked["user_id"].to_list() == [5, 5, 2]
    assert ranked["rank"].to_list() == [1, 2, 1]
    assert [(i, pytest.approx(s, abs=1e-5)) for i, s in reranker.rerank([1, 2], [11, 10], META)] == [
        (row[1], row[3]) for row in ranked.rows()[:2]
    ]


def test_saved_and_loaded_it_says_the_same(reranker: Qwen3VLReranker, tmp_path: Path) -> None:
    expected = reranker.rerank([1], [10, 11, 12], META)
    saved = reranker.save(tmp_path / "saved")
    loaded = Qwen3VLReranker.load(saved, item_meta=META)
    assert (loaded.mode, loaded.ranking.top_k) == ("semantic_summary_small", 30)
    assert loaded.rerank([1], [10, 11, 12]) == expected
    with pytest.raises(UserError, match="not empty"):
        reranker.save(saved)


def test_a_saved_adapter_names_its_base_where_others_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this machine's cache nobody else would find it, nor would this machine once the cache is emptied."""
    monkeypatch.setenv("VLRANK_CACHE", str(tmp_path / "cache"))
    base = "s3://bucket/models/base"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    atomic_write_json(adapter / "adapter_config.json", {"r": 8, "base_model_name_or_path": base})
    details = {"mode": "semantic_summary_small", "family": "text", "base_model": base}
    atomic_write_json(adapter / "vlrank.json", details)
    monkeypatch.setattr("vlrank.engines.models.fetch_model", lambda place: str(place).replace("s3://", "/cache/"))
    saved = Qwen3VLReranker("semantic_summary_small", model=adapter).save(tmp_path / "saved")
    assert json.loads((saved / "vlrank.json").read_text())["base_model"] == base
    assert open_model(saved).base == base


def test_mistakes_are_named(reranker: Qwen3VLReranker, tiny_text_model: Path) -> None:
    with pytest.raises(UserError, match="item 999 is not in item_meta"):
        reranker.rerank([], [999], META)
    with pytest.raises(UserError, match="item 7 more than once"):
        reranker.rerank([], [7, 8, 7], META)
    with pytest.raises(UserError, match="no item_meta"):
        reranker.rerank([], [7])
    with pytest.raises(UserError, match="no candidates"):
        reranker.rerank([], [], META)
    with pytest.raises(UserError, match="unknown mode 'captions'"):
        Qwen3VLReranker(mode="captions")
    with pytest.raises(UserError, match="mode is unknown"):
        Qwen3VLReranker.load(tiny_text_model)
    with pytest.raises(UserError, match="needs a model of a vision family"):
        Qwen3VLReranker(mode="raw_image", model=tiny_text_model).rerank([], [7, 8], META)


def test_importing_costs_nothing() -> None:
    code = (
        "import sys, vlrank, vlrank.prompting.labels, vlrank.prompting.encoding, vlrank.reranking.windows, "
        "vlrank.reranker, vlrank.reranking.ranker; vlrank.Qwen3VLReranker; "
        "print([m for m in ('torch', 'ray', 'transformers', 'vllm') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert vlrank.Qwen3VLReranker is Qwen3VLReranker


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[int, ItemMeta]:
    """Items 1 to 8 with good pictures; 11 to 15 with bad ones."""
    folder = tmp_path_factory.mktemp("pictures")
    noise = np.random.default_rng(0).integers(0, 255, (15, 64, 64, 3), dtype=np.uint8)
    meta: dict[int, ItemMeta] = {}
    for item in (*range(1, 9), *range(11, 16)):
        path = folder / f"{item}.jpg"
        image = Image.fromarray(noise[item - 1])
        (image.resize((1093, 5)) if item == 15 else image).save(path)
        meta[item] = {"text": f"item {item}", "image_path": str(path)}
    for item, content in ((11, b""), (12, b"<svg/>"), (13, Path(str(meta[1]["image_path"])).read_bytes()[:900])):
        Path(str(meta[item]["image_path"])).write_bytes(content)
    Path(str(meta[14]["image_path"])).unlink()
    return meta


@pytest.mark.parametrize("missing", ["drop", "text"])
def test_a_bad_picture_costs_its_item_and_not_the_call(
    tiny_vision_model: Path, pictures: dict[int, ItemMeta], missing: str
) -> None:
    """A catalogue of a shop always holds some; they ended the ranking of all users, without a file's name."""
    model = Qwen3VLReranker("raw_image", model=tiny_vision_model, missing=missing, max_history=3)
    bad = range(11, 16)
    bare = {item: {**entry, "image_path": None} if item in bad else entry for item, entry in pictures.items()}
    histories = [[1, 2], [3, 12, 13, 4]]
    candidates = [[5, 11, 6, 13, 7, 14], [8, 15, 1]]
    with model:
        expected = model.rerank_batch(histories, candidates, bare)
        with pytest.warns(UserWarning, match=r"item \d+ is treated like one without a picture: .*\.jpg: ") as said:
            ranked = model.rerank_batch(histories, candidates, pictures)
        assert ranked == expected
        assert [sorted(item for item, _ in row) for row in ranked] == [
            sorted(set(row) - set(bad) if missing == "drop" else row) for row in candidates
        ]
        named = {int(str(warning.message).split()[1]) for warning in said}
        assert named == {11, 12, 13, 14, 15}
        if missing == "drop":
            with pytest.warns(UserWarning, match="list 1 is empty: none of the 2 candidates has a picture"):
                assert model.rerank_batch([[1], [1]], [[5, 6], [11, 12]], pictures)[1] == []


def test_bulk_names_item_and_file_of_a_bad_picture(tiny_vision_model: Path, pictures: dict[int, ItemMeta]) -> None:
    """There the user waits in quarantine until the file has been mended."""
    ranker = open_ranker(open_model(tiny_vision_model, "raw_image"), EngineConfig(name="transformers"), pictures)
    good, cut_off, strip = ranker.rank([UserLists([1], [2, 3]), UserLists([], [4, 13]), UserLists([], [15, 4])])
    assert isinstance(good, Ranking)
    assert isinstance(cut_off, PictureBroken)
    assert isinstance(strip, PictureBroken)
    assert str(cut_off).startswith(str(pictures[13]["image_path"]))
    assert str(cut_off).endswith("(item 13)")
    assert "1093 x 5" in str(strip)


@pytest.mark.stack
def test_fit_then_rerank(tiny_vision_model: Path, pictures: dict[int, ItemMeta], tmp_path: Path) -> None:
    """Training, its best checkpoint, and reranking with it, as a notebook does it; bad pictures are named."""
    train = {user: [1 + (user + step) % 8 for step in range(3)] + [11 + user % 5] for user in range(1, 9)}
    validation = {user: [1 + (user + 5) % 8] for user in train}
    reranker = Qwen3VLReranker("raw_image", model=tiny_vision_model, max_history=2)
    settings = {"epochs": 1, "method": "lora", "batch_size": 4, "negatives": 3, "max_missing": 0.5}
    settings |= {"ray": {"address": "local", "num_cpus": 4}}
    with pytest.warns(UserWarning, match=r"item 15: .*15\.jpg: 1093 x 5 pixels") as said:
        reranker.fit(train, validation, pictures, out=tmp_path / "run", **settings)
    named = {str(warning.message).partition(":")[0] for warning in said}
    assert named == {f"item {item}" for item in range(11, 16)}
    assert json.loads((tmp_path / "run" / "result.json").read_text())["quarantined"] == 5

    ranked = reranker.rerank([1, 2], [3, 5, 8])
    assert sorted(item for item, _ in ranked) == [3, 5, 8]
    assert reranker.model is not None
    assert (Path(reranker.model) / "vlrank.json").is_file()
    again = Qwen3VLReranker.load(tmp_path / "run", item_meta=pictures)
    assert again.rerank([1, 2], [3, 5, 8]) == ranked
