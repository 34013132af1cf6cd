"""Every vision family in every mode of vision models: learned, ranked and written as transformers' own code does it.

What a user would lose: a family whose pictures, positions or features are slightly wrong trains and ranks like any
other, only worse.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.brute_force import RANKING, brute_force, picture_items, text_items
from tests.training.test_exact import make_case
from tests.training.test_memory import trainer_of
from vlrank.config import EngineConfig, TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.engines.adapters import check_adapter
from vlrank.engines.families import VISION_FAMILIES
from vlrank.engines.models import open_model
from vlrank.engines.packed import PackedScorer
from vlrank.engines.scoring import open_scorer
from vlrank.engines.transformers_scorer import load_model, score_labels
from vlrank.errors import UserError
from vlrank.generation.job import DATA, FAILED, Job, prepare
from vlrank.generation.prompts import load_prompt
from vlrank.generation.writers.transformers import TransformersGenerator
from vlrank.prompting.encoding import Encoder
from vlrank.prompting.modes import mode_spec
from vlrank.training.attention import NotPackable, use_packed_attention
from vlrank.training.collate import end_to_end, side_by_side
from vlrank.training.model import accept_features, resolve_base
from vlrank.training.pictures import compute_features

MODES = ("raw_image", "caption", "semantic_summary")
RECURRENT = ("qwen3_5",)


@pytest.mark.parametrize("mode", MODES)
def test_every_way_to_learn_is_the_plain_one(family_model: Path, shop: Dataset, tmp_path: Path, mode: str) -> None:
    case = make_case(family_model, shop, mode)
    case.assert_same(lambda: case.fast(side_by_side(case.rows, **case.form)))
    if mode == "raw_image":
        case.model.model.visual.requires_grad_(False)
        case.loss, case.gradients = case.measure(case.plain)
        accept_features(case.model)
        paths = sorted({path for row in case.rows for path in row.image_paths})
        features, _ = compute_features(case.model, case.encoder, paths, tmp_path / "features")
        case.assert_same(lambda: case.fast(side_by_side(case.rows, **(case.form | {"pictures": features}))))
    if family_model.name in RECURRENT:
        with pytest.raises(NotPackable, match="linear attention layers"):
            use_packed_attention(case.model)
        return
    use_packed_attention(case.model)
    row = {"length": sum(map(len, case.rows)) + 17, "documents": 9}
    case.assert_same(lambda: case.fast(end_to_end(case.rows, **row, **case.form)))


@pytest.mark.parametrize("mode", MODES)
def test_scores_are_those_of_every_answer_in_full(family_model: Path, tmp_path: Path, mode: str) -> None:
    model = load_model(open_model(family_model, mode))
    encoder = Encoder.load(family_model, mode_spec(mode), RANKING)
    items = picture_items(12, tmp_path) if mode == "raw_image" else text_items(12)
    batch = [encoder.encode(text_items(k, "old"), items[:n]) for k, n in [(0, 4), (3, 12)]]
    for encoded, scores in zip(batch, score_labels(model, encoder, batch), strict=True):
        np.testing.assert_allclose(scores, brute_force(model, encoder, encoded), atol=1e-4)


def test_packed_rows_rank_where_the_layers_allow_it(
    family_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vlrank.engines.resources.importlib.util.find_spec", lambda name: None)  # no vLLM
    folder = open_model(family_model, "raw_image")
    encoder = Encoder.load(family_model, mode_spec("raw_image"), RANKING)
    scorer: Any = open_scorer(folder, EngineConfig(), encoder)
    said = capsys.readouterr().err
    encoded = encoder.encode(text_items(3, "old"), picture_items(12, tmp_path))
    [scores] = scorer.score_labels(encoder, [encoded])
    np.testing.assert_allclose(scores, brute_force(load_model(folder), encoder, encoded), atol=1e-4)
    if family_model.name in RECURRENT:
        assert "is ranked by transformers, not by packed: it has linear attention layers" in said
        with pytest.raises(UserError, match=r"cannot rank with .*: it has linear attention layers"):
            open_scorer(folder, EngineConfig(name="packed"), encoder)
    else:
        assert isinstance(scorer, PackedScorer)
        assert "not by packed" not in said
    scorer.close()


@pytest.mark.parametrize("mode", MODES)
def test_what_was_trained_ranks_as_validation_does(
    family_model: Path, told_shop: Dataset, settings: Callable[..., TrainConfig], tmp_path: Path, mode: str
) -> None:
    """Adapters in raw_image, all weights in caption, packed rows wanted: through checkpoints to a ranking."""
    method = {"raw_image": "lora", "caption": "full", "semantic_summary": "lora"}[mode]
    said: list[str] = []
    short: dict[str, Any] = {"epochs": 1, "negatives": 3, "val_users": 4, "packing": True}
    if delta := family_model.name in RECURRENT and mode == "semantic_summary":
        short["lora"] = {"target_modules": ["q_proj", "in_proj_qkv", "in_proj_z", "out_proj", "down_proj"]}
    config = settings(mode, model=str(family_model), method=method, **short)
    trainer = trainer_of(config, told_shop, said)
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    learned = {name for name, weight in trainer.model.named_parameters() if not torch.equal(weight, before[name])}
    assert learned
    assert any(".linear_attn." in name for name in learned) == (
        delta or (family_model.name in RECURRENT and method == "full")
    )
    assert not any(".visual." in name for name in learned)
    unpacked = "prompts are not packed: qwen3_5_text has linear attention layers"
    assert said.count(unpacked) == (family_model.name in RECURRENT)
    write = trainer.saver.begin()
    assert write is not None
    write.to(tmp_path / "checkpoint", lambda: None)
    folder = open_model(tmp_path / "checkpoint")
    assert (folder.mode, folder.is_adapter) == (mode, method == "lora")
    encoder = Encoder.load(folder.path, mode_spec(mode), trainer.config.ranking)
    check_adapter(folder, "transformers")
    loaded = load_model(folder)
    items = list(told_shop.item_meta().values())
    prompt = encoder.encode(items[20:23], items[:12])
    [expected] = score_labels(trainer.model, encoder, [prompt])
    np.testing.assert_allclose(score_labels(loaded, encoder, [prompt])[0], expected, atol=1e-4)


@pytest.mark.parametrize("what", ["caption", "semantic_summary"])
def test_texts_are_written_as_transformers_writes_them(family_model: Path, shop: Dataset, what: str) -> None:
    """Prompts of different length and pictures of different shape in one batch, each as if it were alone."""
    job = Job(load_prompt(f"{what}/v1", what), str(family_model), "m", max_tokens=6, image_side=96)  # type: ignore[arg-type]
    items = list(shop.item_meta().items())[:3]
    rows = np.empty(3, dtype=object)
    rows[:] = [
        {"item_id": n, "text": meta["text"] * (i + 1), "picture": meta["image_path"], "picture_hash": str(n)}
        for i, (n, meta) in enumerate(items)
    ]
    for row in rows:
        row |= prepare(row, job)
    pictures = [row["multimodal_data"]["image"] if row["with_image"] else None for row in rows]
    generator = TransformersGenerator(job)
    written = generator({DATA: rows})[DATA]
    for row, picture in zip(written, pictures, strict=True):
        assert not row[FAILED]
        inputs = generator.processor(text=[row["prompt"]], images=picture and [picture], return_tensors="pt")
        with torch.inference_mode():
            tokens = generator.model.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=[-1])
        answer = tokens[0, inputs["input_ids"].shape[1] :].tolist()
        end = next((i for i, token in enumerate(answer) if token in generator.ends), None)
        assert row["generated_text"] == generator.tokenizer.decode(answer[:end], skip_special_tokens=True)
        assert row["num_input_tokens"] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("kind", ["llava", "gemma3", "qwen3_vl_moe", "qwen3"])
def test_another_architecture_is_one_message_with_the_families(
    kind: str, settings: Callable[..., TrainConfig], tiny_vision_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / kind
    shutil.copytree(tiny_vision_model, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": kind}
    (folder / "config.json").write_text(json.dumps(config))
    refused = [lambda mode: resolve_base(settings(mode, model=str(folder))), lambda mode: open_model(folder, mode)]
    for mode in MODES:
        for open_it in refused:
            with pytest.raises(
                UserError, match=rf"mode {mode} needs a model of a vision family, .* is a {kind}"
            ) as why:
                open_it(mode)
            assert all(family.name in str(why.value.remedy) for family in VISION_FAMILIES.values())


def test_a_text_mode_does_not_do_a_vision_modes_work(family_model: Path, settings: Callable[..., TrainConfig]) -> None:
    for open_it in (
        lambda: resolve_base(settings("semantic_summary_small", model=str(family_model))),
        lambda: open_model(family_model, "semantic_summary_small"),
    ):
        with pytest.raises(UserError, match=r"needs a causal language model, .* with a vision tower") as why:
            open_it()
        assert "semantic_summary" in str(why.value.remedy)
