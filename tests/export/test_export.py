"""A published model is what was trained. A user would lose a model that ranks otherwise than its run, unnoticed."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BitsAndBytesConfig,
)

from tests.engines.brute_force import RANKING, picture_items, text_items
from vlrank.config import EngineConfig, ExportConfig, RankingConfig
from vlrank.data.dataset import Dataset
from vlrank.data.tables import atomic_write_json
from vlrank.engines.models import open_model
from vlrank.engines.scoring import open_scorer
from vlrank.engines.transformers_scorer import load_model, score_labels
from vlrank.errors import UserError
from vlrank.export.run import run
from vlrank.prompting.encoding import Encoder
from vlrank.prompting.modes import mode_spec

Run = Callable[..., Path]


@pytest.fixture
def adapter_run(tiny_text_model: Path, tiny_vision_model: Path, shop: Dataset, tmp_path: Path) -> Run:
    """A run folder as training leaves it, whose adapter has random weights; keywords are LoRA's."""

    def make(mode: str = "semantic_summary_small", base: Path | None = None, **lora: Any) -> Path:
        vision = mode != "semantic_summary_small"
        base = base or (tiny_vision_model if vision else tiny_text_model)
        kind = AutoModelForImageTextToText if vision else AutoModelForCausalLM
        torch.manual_seed(0)
        targets = {"target_modules": r".*(language_model|model).*layers.*(q_proj|up_proj|down_proj)"} | lora
        model = get_peft_model(kind.from_pretrained(base), LoraConfig(**{"r": 4, "lora_alpha": 8, **targets}))
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        folder = tmp_path / "run"
        checkpoint = folder / "qwen3vl_rerank" / "checkpoint-3"
        model.save_pretrained(checkpoint)
        (AutoProcessor if vision else AutoTokenizer).from_pretrained(base).save_pretrained(checkpoint)
        (checkpoint / "optimizer.pt").write_bytes(b"large")
        ranking = {"max_history": 3, "max_item_chars": 40, "window": 8, "stride": 4, "missing": "text"}
        details = {"mode": mode, "family": "vision" if vision else "text", "ranking": ranking, "method": "lora"}
        atomic_write_json(checkpoint / "vlrank.json", {**details, "base_model": str(base)})
        best = {"checkpoint": "qwen3vl_rerank/checkpoint-3", "metric": "ndcg@10", "value": 0.25, "epoch": 1, "step": 3}
        atomic_write_json(folder / "best.json", best)
        settings: dict[str, Any] = {"dataset": str(shop.path), "out": str(folder), "mode": mode, "lr": 0.0003}
        settings |= {"epochs": 10, "ranking": RankingConfig(max_history=7).model_dump(mode="json")}
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return make


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(5, 40)[None]).logits.float()  # type: ignore[no-any-return]


def of_run(folder: Path, kind: Any = AutoModelForCausalLM) -> torch.Tensor:
    model = open_model(folder)
    return logits(PeftModel.from_pretrained(kind.from_pretrained(model.base), model.path))


@pytest.mark.parametrize(
    "lora",
    [
        {},
        {"use_dora": True},
        {"target_modules": ["q_proj", "lm_head"]},  # tied to the embeddings, which stay as they are
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        {"r": 128, "use_rslora": True},
        {"target_modules": "all-linear"},
    ],
    ids=str,
)
def test_plain_transformers_gives_the_runs_scores(adapter_run: Run, tmp_path: Path, lora: dict[str, Any]) -> None:
    folder, out = adapter_run(**lora), tmp_path / "out"
    run(ExportConfig(run=str(folder), out=out, sample=0))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(out)), of_run(folder), atol=1e-4, rtol=1e-4)


def in_four_bits(model: Path, folder: Path) -> Path:
    pytest.importorskip("bitsandbytes")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    AutoModelForCausalLM.from_pretrained(model, quantization_config=nf4).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def in_bfloat16(model: Path, folder: Path) -> Path:
    shutil.copytree(model, folder)
    AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("lora", [{}, {"use_rslora": True}, {"target_modules": "all-linear"}], ids=str)
@pytest.mark.parametrize(
    ("stored", "dtype"), [(None, "float32"), (in_bfloat16, "bfloat16"), (in_four_bits, "bfloat16")]
)
def test_the_packed_engine_ranks_with_the_same_bits(
    adapter_run: Run,
    tiny_text_model: Path,
    tmp_path: Path,
    stored: Callable[[Path, Path], Path] | None,
    dtype: str,
    lora: dict[str, Any],
) -> None:
    """The engine merges the run's adapter by itself, PEFT the exported one: both in float32, rounded once."""
    base = stored(tiny_text_model, tmp_path / "base") if stored else None
    folder, out = adapter_run(base=base, **lora), tmp_path / "out"
    run(ExportConfig(run=str(folder), out=out, sample=0))
    models = [replace(open_model(place), ranking=RANKING) for place in (folder, out)]
    prompts = [(text_items(k, "old"), text_items(n)) for k, n in [(0, 4), (3, 12), (1, 9)]]
    ranked = []
    for model in models:
        engine = open_scorer(model, EngineConfig(name="packed", dtype=dtype))
        encoder = Encoder.load(out, mode_spec(model.mode), RANKING)
        ranked.append(engine.score_labels(encoder, [encoder.encode(*prompt) for prompt in prompts]))
        engine.close()
    for before, after in zip(*ranked, strict=True):
        np.testing.assert_array_equal(before, after)


def test_a_text_model_with_its_card_and_its_rankings(adapter_run: Run, shop: Dataset, tmp_path: Path) -> None:
    metric = {"mean": 0.5, "low": 0.4, "high": 0.6}
    names = ("recall@5", "ndcg@5", "mrr@5", "recall@10", "ndcg@10", "mrr@10", "recall@20", "ndcg@20", "mrr@20")
    method = {"name": "mine", "kind": "model", "metrics": dict.fromkeys(names, metric)}
    protocol = {"name": "retrieval", "split": "test", "users": 1234, "candidates": "als"}
    protocol |= {"candidates_per_user": 20, "coverage": 0.25}
    (tmp_path / "report").mkdir()
    atomic_write_json(tmp_path / "report" / "metrics.json", {"groups": [{"protocol": protocol, "methods": [method]}]})

    out = tmp_path / "my out v1.2"
    summary = run(ExportConfig(run=str(adapter_run()), out=out, sample=12, evaluation=tmp_path / "report"))
    assert (summary.counts["compared"], summary.counts["same_first"]) == (12, 12)
    assert summary.counts["tau_millionths"] > 11_900_000
    assert summary.next == f"hf upload USER/my-out-v1.2 '{out}'"
    assert {path.name for path in out.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "vlrank.json",
    }
    assert not (out / "optimizer.pt").exists()
    exported = open_model(out)
    assert (exported.mode, exported.is_adapter, exported.ranking.window) == ("semantic_summary_small", False, 8)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    text = (out / "README.md").read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert (header["library_name"], header["pipeline_tag"]) == ("transformers", "text-generation")
    assert "retrieval protocol, test, 1,234 users, 20 candidates of als; 25.0% of the targets" in text
    assert "| mine | 0.5000 [0.4000, 0.6000] |" in text
    assert "| method | Recall@10 | NDCG@10 | MRR@10 |" in text
    assert "lr: 0.0003" in text
    assert "epochs" not in text  # its default
    assert "ranking:\n  max_history: 7\n```" in text
    assert "filters" not in text
    assert f"{shop.n_items} items" in text
    assert "12 validation users: 100.0% the same first item" in text
    for file in out.glob("*.json"):
        assert str(tmp_path) not in file.read_text(), file
    assert str(tmp_path) not in text
    assert str(shop.path) not in text


def test_a_vision_model_keeps_its_processor(adapter_run: Run, tmp_path: Path) -> None:
    folder, out = adapter_run("raw_image"), tmp_path / "out"
    summary = run(ExportConfig(run=str(folder), out=out, sample=4))
    assert summary.counts["same_first"] == summary.counts["compared"] == 4
    assert (out / "preprocessor_config.json").exists() or (out / "processor_config.json").exists()
    plain = AutoModelForImageTextToText.from_pretrained(out)
    torch.testing.assert_close(logits(plain), of_run(folder, AutoModelForImageTextToText), atol=1e-4, rtol=1e-4)


def test_in_8_bits_transformers_loads_it_and_the_card_says_how_rankings_change(
    adapter_run: Run, tmp_path: Path
) -> None:
    folder, out = adapter_run(), tmp_path / "out"
    summary = run(ExportConfig(run=str(folder), out=out, sample=12, quantization="fp8"))
    assert summary.counts["compared"] == 12
    assert 6_000_000 < summary.counts["tau_millionths"] < 12_000_000
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    with safe_open(out / "model.safetensors", framework="pt") as tensors:
        kinds = {key: tensors.get_tensor(key).dtype for key in tensors.keys()}  # noqa: SIM118
    assert kinds["model.layers.0.self_attn.q_proj.weight"] == torch.float8_e4m3fn
    assert kinds["model.embed_tokens.weight"] == torch.float32
    assert "FP8" in (out / "README.md").read_text()
    apart = (logits(AutoModelForCausalLM.from_pretrained(out)) - of_run(folder)).abs().mean()
    assert apart < 0.1 * of_run(folder).abs().mean()


@pytest.mark.stack
@pytest.mark.parametrize(("mode", "quantization"), [("raw_image", None), ("semantic_summary_small", "fp8")])
def test_vllm_loads_it_and_ranks_as_transformers_does(
    adapter_run: Run, tmp_path: Path, mode: str, quantization: Any
) -> None:
    pytest.importorskip("vllm")
    out = tmp_path / "out"
    run(ExportConfig(run=str(adapter_run(mode)), out=out, sample=0, quantization=quantization))
    model = open_model(out)
    encoder = Encoder.load(out, mode_spec(model.mode), RANKING)
    items = picture_items(12, tmp_path) if mode == "raw_image" else text_items(12)
    prompts = [encoder.encode(text_items(k, "old"), items[:n]) for k, n in [(0, 4), (3, 12), (1, 9)]]
    expected = score_labels(load_model(model, "float32"), encoder, prompts)
    engine = open_scorer(replace(model, ranking=RANKING), EngineConfig(name="vllm", max_model_len=4096))
    try:
        scored = engine.score_labels(encoder, prompts)
    finally:
        engine.close()
    atol = 0.1 if quantization else 1e-3  # activations are rounded to 8 bits by kernels of either's own
    for ours, theirs in zip(scored, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=atol)


def test_a_base_in_4_bits_becomes_whole(adapter_run: Run, tiny_text_model: Path, tmp_path: Path) -> None:
    folder, out = adapter_run(base=in_four_bits(tiny_text_model, tmp_path / "base")), tmp_path / "out"
    run(ExportConfig(run=str(folder), out=out, sample=0))
    plain = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert plain.dtype == torch.bfloat16
    assert not hasattr(plain.config, "quantization_config")
    apart = (logits(plain) - of_run(folder)).abs().mean()
    assert apart < 0.03 * of_run(folder).abs().mean()


def test_an_adapter_alone_and_another_number_format(adapter_run: Run, tmp_path: Path) -> None:
    folder = adapter_run()
    run(ExportConfig(run=str(folder), out=tmp_path / "adapter", sample=0, merge=False))
    assert open_model(tmp_path / "adapter").is_adapter
    assert not (tmp_path / "adapter" / "optimizer.pt").exists()
    run(ExportConfig(run=str(folder), out=tmp_path / "half", sample=0, dtype="bfloat16"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype="auto").dtype == torch.bfloat16


def test_an_adapter_of_the_text_model_is_not_merged_into_a_vision_base(
    adapter_run: Run, tiny_vision_model: Path, tmp_path: Path
) -> None:
    """None of its matrices would be: the base would be published under the adapter's name."""
    folder = adapter_run()
    file = folder / "qwen3vl_rerank" / "checkpoint-3" / "vlrank.json"
    changes = {"mode": "caption", "family": "vision", "base_model": str(tiny_vision_model)}
    atomic_write_json(file, json.loads(file.read_text()) | changes)
    file = file.with_name("adapter_config.json")
    atomic_write_json(file, json.loads(file.read_text()) | {"base_model_name_or_path": str(tiny_vision_model)})
    with pytest.raises(UserError, match="does not fit its base model"):
        run(ExportConfig(run=str(folder), out=tmp_path / "out", sample=0))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merge", [True, False])
def test_a_full_disk_is_one_message_and_leaves_nothing(
    adapter_run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, merge: bool
) -> None:
    def full(*_: object, **__: object) -> None:
        raise (
            OSError(errno.ENOSPC, "No space left on device")
            if not merge
            else SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        )

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file" if merge else "shutil.copyfile", full)
    with pytest.raises(UserError, match=r"cannot write .*out: No space left on device"):
        run(ExportConfig(run=str(adapter_run()), out=tmp_path / "out", sample=0, merge=merge))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_what_cannot_be_exported_is_one_message_and_leaves_nothing(
    adapter_run: Run, tiny_text_model: Path, tmp_path: Path
) -> None:
    folder, out = str(adapter_run()), tmp_path / "out"
    for config, said in (
        (ExportConfig(run=str(tiny_text_model), out=out), "has no vlrank.json"),
        (ExportConfig(run=folder, out=out, merge=False, quantization="fp8"), "no weights of its own to quantise"),
        (ExportConfig(run=folder, out=out, evaluation=tmp_path / "none"), "has no metrics.json"),
        (ExportConfig(run=folder, out=out, dataset=tmp_path / "none"), "dataset .*none does not exist"),
        (ExportConfig(run=folder, out=tmp_path / "run"), "exists and is not empty"),
        (ExportConfig(run=str(tmp_path / "capton"), out=out), "capton does not exist"),
    ):
        with pytest.raises(UserError, match=said):
            run(config)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
