"""Text embeddings as sentence-transformers defines them, with transformers alone."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vlrank.data.lists import Lists
from vlrank.errors import UserError
from vlrank.retrieval.baselines import Evidence, embedding

TEXTS = ["A red mug", "A Nordic lamp that gives light for a long evening of reading", "A red mug", ""]


@pytest.mark.parametrize("pooling", ["mean", "cls", "lasttoken"])
def test_pooling_is_the_models_own(tiny_text_model: Path, tmp_path: Path, pooling: str) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from vlrank.reranking.embeddings import embed_texts

    folder = tmp_path / "model"
    shutil.copytree(tiny_text_model, folder)
    (folder / "1_Pooling").mkdir()
    key = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token", "lasttoken": "pooling_mode_lasttoken"}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({key[pooling]: True}))
    got = embed_texts(str(folder), TEXTS)
    assert np.linalg.norm(got, axis=1) == pytest.approx(np.ones(4), abs=1e-5)
    assert (got[0] == got[2]).all()
    # One text at a time there is no padding that could leak into the mean.
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        hidden = model(**tokenizer(TEXTS[0], return_tensors="pt")).last_hidden_state[0]
    pooled = {"mean": hidden.mean(dim=0), "cls": hidden[0], "lasttoken": hidden[-1]}[pooling].numpy()
    assert got[0] == pytest.approx(pooled / np.linalg.norm(pooled), abs=1e-4)


def test_a_missing_model_is_one_message(tmp_path: Path) -> None:
    from vlrank.reranking.embeddings import embed_texts

    with pytest.raises(UserError, match="cannot be loaded"):
        embed_texts(str(tmp_path), ["text"])


def test_the_rival_is_the_cosine_to_the_mean_of_the_history() -> None:
    evidence = Evidence(n_items=3, train={}, histories={7: [1, 2]})
    # Filled by hand in place of a model: item 1 points right, item 2 up, item 3 halfway between.
    evidence.__dict__["embeddings"] = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    scores = embedding(evidence, Lists.from_dict({7: [3, 1]}))
    assert scores.tolist() == pytest.approx([(0.6 + 0.8) / np.sqrt(2), 1 / np.sqrt(2)])


def test_the_room_loads_neither_torch_nor_ray() -> None:
    heavy = ("torch", "ray", "transformers", "plotly", "implicit", "bm25s")
    code = (
        "import sys, vlrank.evaluation.run, vlrank.retrieval.retrieve, vlrank.evaluation.report\n"
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
