"""Model folders as people have them: each trains, and its checkpoint ranks and is published as it was trained.

What a user would lose: a base model's odd file ends a run after the first epoch, when its checkpoint is written, or the
checkpoint asks another question than training did.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines.brute_force import brute_force
from tests.prompting.test_chat_template import DATED, REASONER, REFUSING
from tests.training.test_memory import trainer_of
from tests.vision_families import THINKING_TEMPLATE
from vlrank.config import EngineConfig, ExportConfig, TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.engines.models import open_model
from vlrank.engines.scoring import open_scorer
from vlrank.export.run import run as export
from vlrank.prompting.encoding import Encoder
from vlrank.prompting.modes import mode_spec

Make = Callable[..., TrainConfig]
Change = Callable[[Path], None]


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    settings = json.loads(file.read_text()) if file.exists() else {}
    change(settings)
    file.write_text(json.dumps(settings))


def template(source: str | None, name: str = "chat_template.jinja") -> Change:
    """The template ``source`` in the file ``name`` and nowhere else."""

    def change(folder: Path) -> None:
        (folder / "chat_template.jinja").unlink()
        if source is None:
            return
        if name.endswith(".jinja"):
            (folder / name).write_text(source)
        else:
            edit(folder / name, lambda settings: settings.update(chat_template=source))

    return change


def without_padding_token(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", lambda settings: settings.pop("pad_token"))
    for name in ("config.json", "generation_config.json"):
        edit(folder / name, lambda settings: settings.update(pad_token_id=None))


def padded_vocabulary(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(pad_to_multiple_of=64)
    assert model.config.vocab_size % 64 == 0
    model.save_pretrained(folder)


def generation_settings(**settings: Any) -> Change:
    return lambda folder: edit(folder / "generation_config.json", lambda known: known.update(settings))


TEXT: dict[str, Change] = {
    "no template": template(None),
    "template of the processor": template(THINKING_TEMPLATE, "chat_template.json"),
    "dated template": template(DATED),
    "template that refuses arguments": template(REFUSING),
    "template that thinks": template(REASONER),
    "no padding token": without_padding_token,
    "padded vocabulary": padded_vocabulary,
    "sampling": generation_settings(do_sample=True, top_p=0.5, top_k=3, temperature=0.9, repetition_penalty=3.0),
    # transformers refuses to write these again
    "settings that contradict": generation_settings(do_sample=False, top_p=0.5, temperature=0.9, num_beams=1),
}
VISION: dict[str, Change] = {name: TEXT[name] for name in ("no padding token", "settings that contradict")}
VISION["template of the processor"] = template(THINKING_TEMPLATE, "processor_config.json")
CASES = [("semantic_summary_small", name) for name in TEXT] + [("raw_image", name) for name in VISION]


@pytest.mark.parametrize(("mode", "name"), CASES)
def test_a_folder_trains_ranks_and_is_published(
    mode: str,
    name: str,
    settings: Make,
    told_shop: Dataset,
    tiny_text_model: Path,
    tiny_vision_model: Path,
    tmp_path: Path,
) -> None:
    vision = mode == "raw_image"
    base = tmp_path / "base"
    shutil.copytree(tiny_vision_model if vision else tiny_text_model, base)
    (VISION if vision else TEXT)[name](base)
    short: dict[str, Any] = {"epochs": 1, "negatives": 3, "val_users": 4, "packing": True, "backend": "transformers"}
    short |= {"batch_size": 64, "ranking": {"max_history": 1, "max_item_chars": 20}}
    config = settings(mode, model=str(base), method="full", **short)
    trainer = trainer_of(config, told_shop, [])
    trainer.train()
    write = trainer.saver.begin()
    assert write is not None
    write.to(tmp_path / "checkpoint", lambda: None)
    export(ExportConfig(run=str(tmp_path / "checkpoint"), out=tmp_path / "published", dtype="float32", sample=0))

    items = list(told_shop.item_meta().values())
    spec = mode_spec(mode)
    encoders = [Encoder.load(place, spec, trainer.config.ranking) for place in (base, tmp_path / "checkpoint")]
    encoders.append(Encoder.load(tmp_path / "published", spec, trainer.config.ranking))
    prompts = [encoder.encode(items[20:23], items[:12]) for encoder in encoders]
    assert prompts[0].ids == prompts[1].ids == prompts[2].ids
    assert prompts[0].trie.labels == prompts[1].trie.labels == prompts[2].trie.labels
    expected = brute_force(trainer.model.eval(), encoders[0], prompts[0])
    for folder in ("checkpoint", "published"):
        for engine in ("packed", "transformers"):
            scorer = open_scorer(open_model(tmp_path / folder), EngineConfig(name=engine), encoders[1])
            [scores] = scorer.score_labels(encoders[1], prompts[1:2])
            np.testing.assert_allclose(scores, expected, atol=1e-4, err_msg=f"{folder}, {engine}")
            scorer.close()
