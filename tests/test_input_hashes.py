"""Hashes of what a result depends on: another value for the same input would do finished work again."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from vlrank.config import GenerateConfig, RerankConfig, load_config
from vlrank.data.dataset import Dataset, DatasetWriter
from vlrank.data.schemas import CANDIDATES, ITEMS, SEQUENCES
from vlrank.data.tables import empty_frame
from vlrank.generation import pipeline as generate
from vlrank.reranking.plan import open_setup, users_to_rank

# A picture of one red pixel, as bytes: a library's next version may encode it otherwise.
RED = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63f8cfc0000003010100c9fe92ef"
    "0000000049454e44ae426082"
)
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{{ part.text or '<|image_pad|>' }}{% endfor %}{% endif %}{% endfor %}"
)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    """Two users, five items, the first with a picture."""
    with DatasetWriter(tmp_path / "dataset") as writer:
        picture = writer.add_image(RED, "png")
        items = [
            {"item_id": i, "source_id": f"B{i}", "text": f"Tasse № {i}", "image_path": picture if i == 1 else None}
            for i in range(1, 6)
        ]
        sequences = [
            {"user_id": user, "source_user": f"A{user}", "item_ids": taken, "timestamps": [1, 2, 3, 4]}
            for user, taken in ((1, [1, 2, 3, 4]), (2, [5, 4, 1, 2]))
        ]
        tables = [
            pl.concat([empty_frame(schema), pl.DataFrame(rows)], how="diagonal_relaxed")
            for schema, rows in ((ITEMS, items), (SEQUENCES, sequences))
        ]
        dataset = writer.commit(items=tables[0], sequences=tables[1], options={})
    lists = {
        "split": ["test"] * 2,
        "user_id": [1, 2],
        "item_ids": [[4, 5], [2, 3]],
        "scores": [[0.5, 0.25], [2.0, 1.0]],
    }
    dataset.write_candidates("found", pl.concat([empty_frame(CANDIDATES), pl.DataFrame(lists)], how="vertical_relaxed"))
    return dataset


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A vision model's folder, as far as it is looked at before it is loaded."""
    folder = tmp_path / "model"
    folder.mkdir()
    config: dict[str, Any] = {"model_type": "qwen3_vl", "vision_config": {}, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 9000)
    return folder


@pytest.mark.parametrize(
    ("mode", "ranking", "expected"),
    [
        ("raw_image", {"missing": "text"}, ["5074c298c4ee977dacb96b0495792259", "c2e1ac5c5794c08dee6b1706bb55a090"]),
        (
            "caption",
            {"missing": "text", "max_history": 1},
            ["774bfb1d74f676b2d0aaf2cf07cfe06c", "246fd88c67d88728ba62c7874731526e"],
        ),
        (
            "semantic_summary",
            {"missing": "text", "popularity_prior": True},
            ["ee96032138e69981c0d97bf039f4bf09", "1ddf1e3d9f29d1bc37159838bf2b7dea"],
        ),
    ],
)
def test_rankings(dataset: Dataset, model: Path, mode: str, ranking: dict[str, Any], expected: list[str]) -> None:
    config = load_config(
        RerankConfig,
        dataset=dataset.path,
        model=str(model),
        as_mode=mode,
        out=dataset.path.parent / "out.parquet",
        candidates="found",
        ranking=ranking,
        engine={"name": "transformers"},
    )
    users = users_to_rank(open_setup(config), "test", None)
    assert users.wanted["input_hash"].to_list() == expected


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("caption", ["b8dad1ff6ffcbaf521056d1b1ab4772c"]),
        (
            "semantic_summary",
            [
                "00aa5204509b7d147f78e727c0e942b2",
                "6612c10a4d2c507b00f34560c7016b96",
                "2854690e507919d69213411314a5ceee",
                "5a298f04bec5077b82adc245faef71cd",
                "0d0b04a15373d31af9fe2e396d4cf94f",
            ],
        ),
    ],
)
def test_generated_texts(dataset: Dataset, model: Path, what: str, expected: list[str]) -> None:
    given = {"dataset": dataset.path, "what": what, "prompt": f"{what}/v1", "model": str(model)}
    config = load_config(GenerateConfig, **given, engine={"name": "transformers"})
    assert generate._plan(config).wanted["input_hash"].to_list() == expected
