"""Pictures that cannot be read cost their items, in training as in ranking."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vlrank.config import TrainConfig, load_config
from vlrank.data.items import ItemMeta
from vlrank.errors import UserError
from vlrank.training.data import TrainingData
from vlrank.training.model import load_trainable, resolve_base
from vlrank.training.settle import settle
from vlrank.training.worker import _prepare_pictures


@pytest.fixture
def item_meta(tmp_path: Path) -> dict[int, ItemMeta]:
    """Ten items; the picture of 9 is cut off, that of 10 missing."""
    meta: dict[int, ItemMeta] = {}
    for item in range(1, 11):
        path = tmp_path / f"{item}.jpg"
        noise = np.random.default_rng(item).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
        meta[item] = {"text": f"item {item}", "image_path": str(path)}
    (tmp_path / "9.jpg").write_bytes((tmp_path / "9.jpg").read_bytes()[:900])
    (tmp_path / "10.jpg").unlink()
    return meta


@pytest.mark.parametrize("cache_vision", [True, False])
def test_items_with_unreadable_pictures_are_left_out_and_named(
    tiny_vision_model: Path, item_meta: dict[int, ItemMeta], tmp_path: Path, cache_vision: bool
) -> None:
    train = {user: [1 + (user + step) % 8 for step in range(3)] + [9, 10] for user in range(1, 9)}
    data = TrainingData.of_lists(train, {user: [1 + (user + 5) % 8] for user in train}, item_meta)
    settings = {"mode": "raw_image", "model": str(tiny_vision_model), "dataset": tmp_path, "out": tmp_path / "run"}
    settings |= {"cache_vision": cache_vision, "method": "lora", "negatives": 3, "max_missing": 0.2}
    config = load_config(TrainConfig, **settings)
    base, device = resolve_base(config), torch.device("cpu")
    config, _ = settle(config, base, device)
    trainable = load_trainable(config, base, device)
    *_, plan, unreadable = _prepare_pictures(config, trainable, data, 0, 1, lambda **facts: None)
    assert plan.usable.item_ids.tolist() == list(range(1, 9))
    shown = {item for index in range(len(plan.samples)) for item in plan.samples.sample(0, index).history}
    assert not shown & {9, 10}
    assert {key: kind for key, (kind, _) in unreadable.items()} == {
        "item 9": "PictureBroken",
        "item 10": "PictureMissing",
    }
    assert "9.jpg: image file is truncated" in unreadable["item 9"][1]
    strict = config.model_copy(update={"max_missing": 0.1})
    with pytest.raises(UserError, match=r"2 pictures cannot be read \(item 9: .*9\.jpg: .*; mode raw_image: 2 of 10"):
        _prepare_pictures(strict, trainable, data, 0, 1, lambda **facts: None)
