"""vLLM must rank as transformers does, or a model is validated as one thing and served as another."""

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from scipy.stats import kendalltau

from tests.processes import of_living
from vlrank.config import EngineConfig
from vlrank.engines.models import open_model
from vlrank.engines.resources import EngineDied
from vlrank.engines.scoring import open_scorer
from vlrank.engines.transformers_scorer import load_model, score_labels
from vlrank.prompting.encoding import Encoded, Encoder
from vlrank.prompting.modes import mode_spec

from .brute_force import RANKING, brute_force, picture_items, text_items

pytestmark = pytest.mark.stack
pytest.importorskip("vllm")

CONFIG = EngineConfig(name="vllm", max_model_len=4096)


@dataclass(frozen=True)
class Served:
    engine: Any
    plain: Any
    adapted: Any
    encoder: Encoder


def adapt(model: Path, folder: Path, **changes: Any) -> Any:
    """An adapter with random weights, written to ``folder`` as training writes it; ``changes`` are of its shape."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = {"r": 4, "lora_alpha": 8, "target_modules": targets, "init_lora_weights": False} | changes
    adapted = get_peft_model(load_model(open_model(model)), LoraConfig(**shape))
    adapted.save_pretrained(folder)
    return adapted


@pytest.fixture(scope="module")
def text(tiny_text_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One engine for the base model and an adapter on it, as large as people train them elsewhere."""
    folder = tmp_path_factory.mktemp("adapter")
    adapted = adapt(tiny_text_model, folder, r=128, lora_alpha=64, target_modules="all-linear")
    engine = open_scorer(open_model(folder), CONFIG)
    encoder = Encoder.load(tiny_text_model, mode_spec("semantic_summary_small"), RANKING)
    yield Served(engine, load_model(open_model(tiny_text_model)), adapted, encoder)
    engine.close()


@pytest.fixture(scope="module")
def vision(tiny_vision_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Its cache holds about ten of the tests' pictures, so that prompts push one another's pictures out.

    Like Qwen3-VL's, its processor would scale these pictures up, beyond `RANKING`'s ``max_image_pixels``.
    """
    folder = tmp_path_factory.mktemp("adapter")
    model = tmp_path_factory.mktemp("models") / "vision"
    shutil.copytree(tiny_vision_model, model)
    processor = Encoder.load(model, mode_spec("raw_image"), RANKING).image_processor
    processor.size = {"shortest_edge": 4 * RANKING.max_image_pixels, "longest_edge": 16 * RANKING.max_image_pixels}
    processor.save_pretrained(model)
    adapted = adapt(model, folder)
    config = CONFIG.model_copy(update={"engine_kwargs": {"mm_processor_cache_gb": 6e-5}})
    engine = open_scorer(replace(open_model(folder, "raw_image"), ranking=RANKING), config)
    encoder = Encoder.load(model, mode_spec("raw_image"), RANKING)
    yield Served(engine, load_model(open_model(model)), adapted, encoder)
    engine.close()


def test_agrees_with_brute_force(
    text: Served, judged: dict[int, tuple[Encoded, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text.engine, "lora", None)
    scored = text.engine.score_labels(text.encoder, [encoded for encoded, _ in judged.values()])
    for (_, expected), scores in zip(judged.values(), scored, strict=True):
        assert scores.dtype == np.float32
        np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_an_adapter_is_served_unmerged_and_ranks_as_in_transformers(text: Served) -> None:
    """For the same checkpoint: Kendall's tau at least 0.99 on average and the same first place in 99 of 100 lists."""
    batch = [text.encoder.encode(text_items(i % 7, "old"), text_items(20, f"item {i}")) for i in range(30)]
    ours = text.engine.score_labels(text.encoder, batch)
    reference = [score_labels(text.adapted, text.encoder, [encoded])[0] for encoded in batch]
    taus = [kendalltau(a, b).statistic for a, b in zip(ours, reference, strict=True)]
    tops = [a.argmax() == b.argmax() for a, b in zip(ours, reference, strict=True)]
    assert np.mean(taus) >= 0.99
    assert np.mean(tops) >= 0.99
    np.testing.assert_allclose(np.stack(ours), np.stack(reference), atol=1e-3)
    plain = score_labels(text.plain, text.encoder, [batch[0]])[0]
    assert np.abs(plain - ours[0]).max() > 1e-2


def test_further_nodes_come_from_the_prefix_cache(text: Served) -> None:
    engine = text.engine
    before = engine.requests, engine.cached_tokens
    encoded = text.encoder.encode(text_items(9, "cached"), text_items(20, "cached"))
    engine.score_labels(text.encoder, [encoded])
    assert engine.requests - before[0] == 2
    assert engine.cached_tokens - before[1] >= len(encoded.ids) - 128  # whole blocks, on a CPU of 128 tokens


def test_threads_share_the_engine_and_a_bad_prompt_fails_alone(text: Served) -> None:
    good = [text.encoder.encode([], text_items(n, "thread")) for n in (5, 12, 20)]
    long = replace(good[0], ids=good[0].ids * 200)
    alone = text.engine.score_labels(text.encoder, good)
    with ThreadPoolExecutor(4) as pool:
        rounds = list(pool.map(lambda _: text.engine.score_labels(text.encoder, [good[0], long, *good[1:]]), range(4)))
    for first, failed, *rest in rounds:
        assert isinstance(failed, Exception)
        for scores, expected in zip([first, *rest], alone, strict=True):
            np.testing.assert_allclose(scores, expected, atol=1e-4)


def test_pictures_agree_with_brute_force(vision: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = vision.engine.lora
    monkeypatch.setattr(vision.engine, "lora", None)
    pictures = picture_items(20, tmp_path)
    batch = [vision.encoder.encode(text_items(2, "old"), pictures[:n]) for n in (5, 20)]
    for encoded, scores in zip(batch, vision.engine.score_labels(vision.encoder, batch), strict=True):
        np.testing.assert_allclose(scores, brute_force(vision.plain, vision.encoder, encoded), atol=1e-4)
    monkeypatch.setattr(vision.engine, "lora", adapter)
    served = vision.engine.score_labels(vision.encoder, batch)
    for scores, expected in zip(served, score_labels(vision.adapted, vision.encoder, batch), strict=True):
        np.testing.assert_allclose(scores, expected, atol=1e-3)


def test_a_picture_is_prepared_once(vision: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    prepare = vision.engine.prepare
    monkeypatch.setattr(
        vision.engine, "prepare", lambda encoder, path: (prepared.append(path), prepare(encoder, path))[1]
    )
    encoded = vision.encoder.encode([], picture_items(4, tmp_path))
    [first] = vision.engine.score_labels(vision.encoder, [encoded])
    [again] = vision.engine.score_labels(vision.encoder, [encoded])
    assert prepared == list(encoded.image_paths)
    assert all(prepare.forms.values()), "pixels are made here, not by the slow renderer"
    np.testing.assert_allclose(again, first, atol=1e-4)


def test_prompts_and_pictures_that_are_too_large_fail_alone(vision: Served, tmp_path: Path) -> None:
    """A picture that vLLM's core never got must not count as known to it."""
    items = picture_items(3, tmp_path)
    good = vision.encoder.encode([], items)
    long = replace(good, ids=good.ids * 500)
    failed, scores = vision.engine.score_labels(vision.encoder, [long, good])
    assert isinstance(failed, ValueError)
    np.testing.assert_allclose(scores, score_labels(vision.adapted, vision.encoder, [good])[0], atol=1e-3)


def test_an_unreadable_picture_fails_alone(vision: Served, tmp_path: Path) -> None:
    encoded = vision.encoder.encode([], picture_items(3, tmp_path))
    (tmp_path / "1.png").unlink()
    [failed] = vision.engine.score_labels(vision.encoder, [encoded])
    assert isinstance(failed, OSError)


def test_a_dead_core_is_not_the_prompts_fault(text: Served) -> None:
    """The last one: the engine is gone after it. Rows would go to the quarantine that another engine could answer."""
    encoded = text.encoder.encode([], text_items(5, "dead"))
    names = of_living(psutil.Process().children(recursive=True), psutil.Process.name)
    of_living((child for child, name in names.items() if "EngineCore" in name), psutil.Process.kill)
    for _ in range(2):
        with pytest.raises(EngineDied):
            text.engine.score_labels(text.encoder, [encoded])
