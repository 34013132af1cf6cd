"""From a dataset to captions and summaries, on the engines that also run on GPU clusters."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from peft import LoraConfig, get_peft_model

from vlrank.bulk import BulkResult, Shards
from vlrank.config import EngineConfig, GenerateConfig, RayConfig
from vlrank.data.dataset import Dataset
from vlrank.engines.models import open_model
from vlrank.engines.transformers_scorer import load_model
from vlrank.errors import UserError
from vlrank.generation import pipeline, writing
from vlrank.generation.job import DATA, FAILED, Job, prepare
from vlrank.generation.pipeline import dry_run, run
from vlrank.generation.prompts import load_prompt
from vlrank.generation.writers.transformers import TransformersGenerator
from vlrank.runtime import ray_session

MISSING, BROKEN, WITHOUT = 3, 5, 7
"""Items whose picture is gone, cut off, and never was."""


@pytest.fixture
def dataset(shop: Dataset, tmp_path: Path) -> Dataset:
    """The shop with the three troubles that real data has."""
    shutil.copytree(shop.path, tmp_path / "shop")
    copy = Dataset.open(tmp_path / "shop")
    items = copy.items()
    paths = dict(items.select("item_id", "image_path").iter_rows())
    (copy.path / paths[MISSING]).unlink()
    broken = copy.path / paths[BROKEN]
    broken.write_bytes(broken.read_bytes()[:600])
    without = pl.when(pl.col("item_id") == WITHOUT).then(None).otherwise(pl.col("image_path")).alias("image_path")
    copy.update_items(items.with_columns(without))
    return copy


def config(dataset: Dataset, model: Path, what: str = "caption", **changes: Any) -> GenerateConfig:
    engine = EngineConfig(name=changes.pop("engine", "transformers"), max_model_len=changes.pop("max_model_len", None))
    options = {"quality": False, "max_tokens": 8, "shard_rows": 8, "limit": 20} | changes
    return GenerateConfig(dataset=dataset.path, what=what, model=str(model), engine=engine, **options)


def hashes(dataset: Dataset, model: Path, what: str = "semantic_summary", **changes: Any) -> dict[int, str]:
    work = pipeline._plan(config(dataset, model, what, **changes))
    return dict(work.wanted.select("item_id", "input_hash").iter_rows())


# ---- without an engine -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [None, RuntimeError("no GPU")])
def test_a_dry_run_tries_where_all_nodes_can_see_it_and_leaves_nothing(
    dataset: Dataset, tiny_vision_model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """On a cluster its workers looked for the plan in a folder that only the driver has."""
    trials: list[Shards] = []

    def trial(wanted: pl.DataFrame, stages: object, shards: Shards, **_: object) -> BulkResult:
        trials.append(shards)
        for folder in (shards.folder, shards.quarantine):
            folder.mkdir(parents=True)
        (shards.folder / "1.parquet").touch()  # type: ignore[union-attr]
        if error:
            raise error
        return BulkResult(done=wanted.height, seconds=2.0, working_seconds=1.0)

    monkeypatch.setattr(pipeline, "run_bulk", trial)
    monkeypatch.setattr(pipeline, "ray_session", lambda _: nullcontext())
    for module in (pipeline, writing):
        monkeypatch.setattr(module, "engine_gpus", lambda _: 0)
    before = set(dataset.path.rglob("*"))  # type: ignore[union-attr]
    with pytest.raises(RuntimeError, match="no GPU") if error else nullcontext():
        dry_run(config(dataset, tiny_vision_model))
    for place in (trials[0].folder, trials[0].quarantine):
        assert place.parent.parent == dataset.path
        assert place.parent.name.startswith(".dryrun-")
    assert set(dataset.path.rglob("*")) == before  # type: ignore[union-attr]


def test_a_change_of_prompt_model_text_or_picture_means_do_it_again(
    dataset: Dataset, tiny_vision_model: Path, tmp_path: Path
) -> None:
    before = hashes(dataset, tiny_vision_model)
    assert hashes(dataset, tiny_vision_model) == before
    own = tmp_path / "own.yaml"
    own.write_text("kind: semantic_summary\nimage: optional\ntemplate: 'Who wants {text}?'\n")
    for changes in ({"prompt": str(own)}, {"max_tokens": 9}, {"temperature": 0.5}, {"image_side": 64}):
        assert not set(hashes(dataset, tiny_vision_model, **changes).values()) & set(before.values()), changes

    other = tmp_path / "other_model"
    shutil.copytree(tiny_vision_model, other)
    assert hashes(dataset, other) == before, "the same model elsewhere is the same model"
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    assert not set(hashes(dataset, other).values()) & set(before.values())

    items = dataset.items()
    text = pl.when(pl.col("item_id") == 2).then(pl.lit("new")).otherwise(pl.col("text")).alias("text")
    dataset.update_items(items.with_columns(text))
    after = hashes(dataset, tiny_vision_model)
    assert [item for item in before if after[item] != before[item]] == [2]
    captions = hashes(dataset, tiny_vision_model, "caption")
    dataset.update_items(items)
    assert hashes(dataset, tiny_vision_model, "caption") == captions, "captions do not depend on the text"


def test_the_engine_and_its_settings_do_not_matter(dataset: Dataset, tiny_vision_model: Path) -> None:
    one = config(dataset, tiny_vision_model)
    other = one.model_copy(update={"engine": EngineConfig(replicas=3, batch_size=7), "shard_rows": 99})
    assert pipeline._plan(one).wanted.equals(pipeline._plan(other).wanted)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "has no tokenizer"),
        (lambda folder: (folder / "config.json").unlink(), "has no model"),
        (shutil.rmtree, "does not exist"),
    ],
)
def test_an_unusable_model_folder_is_refused_before_anything_starts(
    dataset: Dataset, tiny_vision_model: Path, tmp_path: Path, prepare: Any, message: str
) -> None:
    shutil.copytree(tiny_vision_model, tmp_path / "model")
    prepare(tmp_path / "model")
    with pytest.raises(UserError, match=message):
        run(config(dataset, tmp_path / "model"))
    assert not (dataset.path / "captions").exists()


def test_captions_need_a_model_that_sees_and_items_with_pictures(
    dataset: Dataset, tiny_text_model: Path, tiny_vision_model: Path
) -> None:
    with pytest.raises(UserError, match="cannot see pictures"):
        run(config(dataset, tiny_text_model))
    dataset.update_items(dataset.items().with_columns(pl.lit(None, pl.String).alias("image_path")))
    with pytest.raises(UserError, match="--use_image"):
        run(config(dataset, tiny_vision_model))
    assert pipeline._plan(config(dataset, tiny_text_model, "semantic_summary")).wanted["picture"].null_count() == 20


# ---- on Ray ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(RayConfig(num_cpus=8)):
        yield


def files(dataset: Dataset) -> dict[str, str]:
    found = [*(dataset.path / "captions").glob("*.parquet"), *(dataset.path / "quarantine").rglob("*.parquet")]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in found}


@pytest.mark.stack
def test_bad_pictures_go_to_quarantine_and_come_back_when_they_are_mended(
    cluster: None, shop: Dataset, dataset: Dataset, tiny_vision_model: Path
) -> None:
    first = run(config(dataset, tiny_vision_model))
    assert {key: first.counts[key] for key in ("done", "quarantined", "without_picture")} == {
        "done": 18,
        "quarantined": 2,
        "without_picture": 1,
    }
    captions = dataset.generated("caption")
    assert captions is not None
    assert set(captions["item_id"]) == set(range(1, 22)) - {MISSING, BROKEN, WITHOUT}
    reasons = dict(dataset.quarantine("caption").select("key", "error_type").iter_rows())
    assert reasons == {str(MISSING): "PictureMissing", str(BROKEN): "PictureBroken"}
    assert first.lines["in quarantine"] == "1 PictureBroken, 1 PictureMissing"

    before = files(dataset)
    second = run(config(dataset, tiny_vision_model))
    assert second.lines["in quarantine"] == first.lines["in quarantine"]
    assert (second.counts["done"], second.counts["reused"], second.counts["failed_before"]) == (0, 18, 2)
    assert files(dataset) == before

    paths = dict(shop.items().select("item_id", "image_path").iter_rows())
    shutil.copy(shop.path / paths[MISSING], dataset.path / paths[MISSING])
    third = run(config(dataset, tiny_vision_model, retry_failed=True))
    assert (third.counts["done"], third.counts["quarantined"], third.counts["reused"]) == (1, 1, 18)
    assert dataset.quarantine("caption")["key"].to_list() == [str(BROKEN)]


@pytest.mark.stack
def test_rejected_texts_are_tried_again_then_quarantined_and_the_sheet_shows_why(
    cluster: None, dataset: Dataset, tiny_vision_model: Path
) -> None:
    summary = run(config(dataset, tiny_vision_model, quality=True, sample=8, limit=None))
    counts = summary.counts
    assert counts["wanted"] == 8
    assert counts["done"] + counts["quarantined"] == 8
    assert counts["retried"] > 0, "random weights do not write English"
    kinds = dataset.quarantine("caption")["error_type"]
    assert kinds.str.starts_with("Quality.").any()
    assert summary.output is not None
    page = summary.output.read_text(encoding="utf-8")
    assert page.count("<article") == 8
    assert "Quality." in page


@pytest.mark.stack
def test_a_sample_of_other_settings_leaves_finished_texts_alone(
    cluster: None, dataset: Dataset, tiny_vision_model: Path
) -> None:
    run(config(dataset, tiny_vision_model))
    before = dataset.generated("caption")
    assert before is not None
    sample = run(config(dataset, tiny_vision_model, sample=4, max_tokens=3))
    assert sample.counts["done"] + sample.counts["quarantined"] == 4
    assert "kept apart" in sample.lines
    assert sample.output is not None
    assert sample.output.read_text(encoding="utf-8").count("<article") == 4
    after = Dataset.open(dataset.path).generated("caption")
    assert after is not None
    assert after.equals(before)
    again = run(config(dataset, tiny_vision_model))
    assert (again.counts["done"], again.counts["reused"]) == (0, before.height)


@pytest.mark.stack
def test_a_dry_run_estimates_from_real_items_and_commits_nothing(
    cluster: None, dataset: Dataset, tiny_vision_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "ESTIMATE_ROWS", 8)
    before = {path for path in dataset.path.rglob("*") if path.is_file()}
    summary = dry_run(config(dataset, tiny_vision_model))
    assert summary.counts["pending"] == 20
    assert summary.counts["sampled"] == 8
    assert "time, estimated" in summary.lines
    assert {path for path in dataset.path.rglob("*") if path.is_file()} == before


@pytest.fixture
def opinionated_model(tiny_vision_model: Path, tmp_path: Path) -> Path:
    """As published: its generation_config.json samples and punishes repetition."""
    folder = tmp_path / "opinionated"
    shutil.copytree(tiny_vision_model, folder)
    file = folder / "generation_config.json"
    wishes = {"do_sample": True, "top_p": 0.5, "top_k": 3, "temperature": 0.9, "repetition_penalty": 3.0}
    wishes |= {"no_repeat_ngram_size": 1, "min_new_tokens": 20, "max_length": 9, "suppress_tokens": list(range(200))}
    file.write_text(json.dumps(json.loads(file.read_text()) | wishes))
    return folder


@pytest.mark.parametrize("adapted", [False, True])
def test_a_models_own_generation_settings_change_nothing(
    tiny_vision_model: Path, opinionated_model: Path, tmp_path: Path, adapted: bool
) -> None:
    """vLLM does not read them, and the same row must not depend on the engine."""
    texts = []
    for model in (tiny_vision_model, opinionated_model):
        job = Job(load_prompt("semantic_summary/v1", "semantic_summary"), str(model), "m", max_tokens=12)
        if adapted:
            job = replace(job, adapter=str(tmp_path / "adapter"))
            lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
            if not (tmp_path / "adapter").exists():
                get_peft_model(load_model(open_model(model)), lora).save_pretrained(tmp_path / "adapter")
        rows = np.empty(3, dtype=object)
        rows[:] = [{"item_id": n, "text": f"mug {n}", "picture": None, "picture_hash": ""} for n in range(3)]
        for row in rows:
            row |= prepare(row, job)
        written = TransformersGenerator(job)({DATA: rows})[DATA]
        assert not any(row[FAILED] for row in written)
        texts.append([row["generated_text"] for row in written])
    assert texts[0] == texts[1]


def test_a_vision_model_that_was_not_tried_is_mentioned(
    dataset: Dataset, tiny_vision_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Engines write with any model that they load; what was tried is a shorter list."""
    other = tmp_path / "other"
    shutil.copytree(tiny_vision_model, other)
    file = other / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"model_type": "llava"}))
    for model, said in ((tiny_vision_model, False), (other, True)):
        assert pipeline._plan(config(dataset, model)).job.sees
        printed = " ".join("".join(capsys.readouterr()).split())
        assert ("is a llava; texts were tried with Qwen2.5-VL, Qwen3-VL, Qwen3.5 alone" in printed) == said


def test_a_tokenizer_without_a_padding_token_writes_the_same(tiny_text_model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny_text_model, bare)
    file = bare / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["pad_token"]
    file.write_text(json.dumps(settings))
    texts = []
    for model in (tiny_text_model, bare):
        job = Job(load_prompt("semantic_summary/v1", "semantic_summary"), str(model), "m", sees=False, max_tokens=8)
        rows = np.empty(2, dtype=object)
        rows[:] = [{"item_id": n, "text": "mug " * n, "picture": None, "picture_hash": ""} for n in (1, 9)]
        for row in rows:
            row |= prepare(row, job)
        written = TransformersGenerator(job)({DATA: rows})[DATA]
        assert not any(row[FAILED] for row in written)
        texts.append([row["generated_text"] for row in written])
    assert texts[0] == texts[1]


@pytest.mark.stack
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.parametrize(("what", "render_workers"), [("caption", 2), ("semantic_summary", 0)])
def test_vllm_and_transformers_give_the_same_rows(
    cluster: None, dataset: Dataset, opinionated_model: Path, what: str, render_workers: int
) -> None:
    """Greedy decoding of one model: neither the engine nor who prepares the pictures changes what is in the dataset."""
    tables, quarantines = [], []
    for engine in ("transformers", "vllm"):
        summary = run(config(dataset, opinionated_model, what, engine=engine, render_workers=render_workers))
        assert summary.counts["quarantined"] == 2
        assert summary.counts["tokens_out"] > 0
        table = dataset.generated(what)  # type: ignore[arg-type]
        assert table is not None
        tables.append(table)
        quarantines.append(dataset.quarantine(what).sort("key"))
        shutil.rmtree(table_folder(dataset, what))
        shutil.rmtree(dataset.path / "quarantine" / what)
    assert tables[0].height == 18
    assert tables[0].equals(tables[1]), pl.concat([tables[0], tables[1]]).unique(keep="none")
    assert quarantines[0].equals(quarantines[1])


@pytest.mark.stack
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_writes_another_familys_texts_as_transformers_does(tmp_path: Path) -> None:
    """Qwen2.5-VL: windows in the tower, other patches, other bounds of pictures."""
    program, out = Path(__file__).resolve().parents[2] / "bench" / "families.py", tmp_path / "result.json"
    command = [sys.executable, str(program), "--out", str(out), "--families", "qwen2_5_vl", "--parts", "texts"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    cell = json.loads(out.read_text())["cells"]["qwen2_5_vl: texts"]
    alike = {"texts": 6, "equal": 6, "equal prompt tokens": 6}
    assert cell == {"caption": alike, "semantic_summary": alike}


def table_folder(dataset: Dataset, what: str) -> Path:
    return dataset.path / {"caption": "captions", "semantic_summary": "semantic_summaries"}[what]
