"""The pointwise baseline: its score is the model's own probability of "Yes", and batching changes nothing."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from vlrank.config import RankingConfig
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Lists
from vlrank.prompting.modes import mode_spec
from vlrank.prompting.prompts import render
from vlrank.reranking.pointwise import prompt, yes_log_probs
from vlrank.retrieval import baselines
from vlrank.retrieval.baselines import Evidence


def test_the_score_is_the_probability_of_yes_against_no(tiny_text_model: Path, shop: Dataset) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    meta = shop.item_meta()
    pairs = [([meta[1], meta[2]], meta[3]), ([meta[4]], meta[5]), ([], meta[6])]
    got = yes_log_probs(str(tiny_text_model), None, pairs, batch_size=2)

    tokenizer = AutoTokenizer.from_pretrained(tiny_text_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_text_model, dtype=torch.float32).eval()
    # The two answers part at their first tokens; what follows them is certain.
    first = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ("Yes", "No")]
    assert first[0] != first[1]
    spec = mode_spec("semantic_summary_small")
    for score, (history, candidate) in zip(got, pairs, strict=True):
        texts = [{"text": item["text"]} for item in history]
        text = render(tokenizer, prompt(spec, texts, {"text": candidate["text"]}, RankingConfig().max_item_chars))
        assert candidate["text"] in text
        with torch.no_grad():
            logits = model(**tokenizer(text, add_special_tokens=False, return_tensors="pt")).logits[0, -1]
        assert score == pytest.approx(float(logits[first].log_softmax(-1)[0]), abs=1e-4)


def test_pictures_are_looked_at(tiny_vision_model: Path, shop: Dataset) -> None:
    meta = shop.item_meta()
    other = {**meta[3], "image_path": meta[4]["image_path"]}
    scores = yes_log_probs(str(tiny_vision_model), "raw_image", [([meta[1]], meta[3]), ([meta[1]], other)])
    assert scores[0] != scores[1]


def test_a_bad_picture_costs_its_item_only(tiny_vision_model: Path, shop: Dataset, tmp_path: Path) -> None:
    meta = shop.item_meta()
    (tmp_path / "cut.jpg").write_bytes(Path(str(meta[3]["image_path"])).read_bytes()[:60])
    questions = [{**meta[3], "image_path": path} for path in (str(tmp_path / "cut.jpg"), None, meta[3]["image_path"])]
    scores = yes_log_probs(str(tiny_vision_model), "raw_image", [([meta[1]], item) for item in questions])
    assert scores[0] == pytest.approx(scores[1], abs=1e-5)
    assert scores[0] != pytest.approx(scores[2], abs=1e-5)


def test_it_ranks_the_same_lists_as_the_other_baselines(tiny_text_model: Path, shop: Dataset) -> None:
    ask = partial(yes_log_probs, str(tiny_text_model), None, max_history=3)
    evidence = Evidence.of(shop, "test", ask=ask)
    lists = Lists.from_dict({1: [3, 4, 5], 2: [6, 7]})
    ranked = baselines.rank("pointwise", evidence, lists)
    assert [sorted(ranked.items[a:b]) for a, b in ((0, 3), (3, 5))] == [[3, 4, 5], [6, 7]]
    assert (np.diff(ranked.scores[:3]) <= 0).all()
