"""What the reranking benchmarks share: a made-up dataset, raw vLLM, whole jobs, one process per variant."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from generate import blobs, gpu_memory, machine, sample_gpu

WORDS = ("mug", "lamp", "vase", "chair", "red", "blue", "striped", "plain", "ceramic", "oak", "steel", "cotton")


@dataclass(frozen=True, slots=True)
class Shape:
    """What prompts look like.

    Attributes:
        mode: The mode that is measured.
        words: Words of one item's line.
        summary_words: Words of its summary; 0 in raw_image.
        history: History items.
        side: Pixels of the pictures' sides; 0 without pictures.
    """

    mode: str
    words: int
    summary_words: int
    history: int
    side: int = 0


def main(shape: Shape, variants: list[str], description: str) -> None:
    """Parse, run every variant in its own process, write the report."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder; without weights they are random")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--users", type=int, default=1024)
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--words", type=int, default=shape.words)
    parser.add_argument("--summary_words", type=int, default=shape.summary_words)
    parser.add_argument("--history", type=int, default=shape.history)
    parser.add_argument("--side", type=int, default=shape.side)
    parser.add_argument("--mode", default=shape.mode, help="as which mode the model ranks")
    parser.add_argument("--variant", action="append", help=f"repeatable; default {' '.join(variants)}")
    parser.add_argument("--engine_kwargs", default="{}", help="JSON, passed to vLLM in all variants")
    parser.add_argument("--timeout", type=int, default=900, help="seconds per variant")
    parser.add_argument("--child", nargs=3, metavar=("VARIANT", "DATASET", "MODEL"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = Shape(options.mode, options.words, options.summary_words, options.history, options.side)
    if options.child:
        variant, dataset, model = options.child
        print(json.dumps(run_variant(shape, variant, Path(dataset), Path(model), json.loads(options.engine_kwargs))))
        return
    with tempfile.TemporaryDirectory(prefix="vlrank-bench-") as folder:
        dataset, model = Path(folder) / "data", Path(folder) / "model"
        make_dataset(dataset, shape, options.users, options.items)
        dummy = copy_model(options.model, model)
        results: list[dict[str, Any]] = []
        report = {"shape": vars_of(shape), "users": options.users, "items": options.items, "dummy_weights": dummy}
        report |= {"machine": machine(), "results": results}
        for variant in options.variant or variants:
            results.append(measure(variant, dataset, model, options.timeout))
            done = [result for result in results if "error" not in result]
            raw = next((r["prompts_per_second"] for r in done if r["variant"].startswith("raw")), None)
            if raw and "prompts_per_second" in results[-1]:
                results[-1]["of_raw"] = round(results[-1]["prompts_per_second"] / raw, 4)
            print(json.dumps(results[-1]), file=sys.stderr)
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def vars_of(shape: Shape) -> dict[str, Any]:
    """The shape as JSON."""
    return {name: getattr(shape, name) for name in Shape.__slots__}


def make_dataset(path: Path, shape: Shape, users: int, items: int) -> None:
    """Users with random histories over random items; every history is long enough for `Shape.history`."""
    import polars as pl

    from vlrank.data.dataset import Dataset, DatasetWriter

    rng = np.random.default_rng(0)
    with DatasetWriter(path) as writer:
        rows = []
        for number in range(1, items + 1):
            image = writer.add_image(blobs(rng, shape.side), "jpg") if shape.side else None
            text = " ".join(rng.choice(WORDS, shape.words))
            empty: dict[str, Any] = {"title": "", "brand": "", "categories": [], "description": "", "image_url": None}
            rows.append(empty | {"item_id": number, "source_id": str(number), "text": text, "image_path": image})
        length = shape.history + 1
        sequences = [
            {
                "user_id": user,
                "source_user": str(user),
                "item_ids": rng.choice(items, length, replace=False) + 1,
                "timestamps": list(range(length)),
            }
            for user in range(1, users + 1)
        ]
        writer.commit(items=rows, sequences=sequences, options={"bench": True})
    if shape.summary_words:
        summaries = [
            {
                "item_id": number,
                "text": " ".join(rng.choice(WORDS, shape.summary_words)),
                "model": "bench",
                "prompt_id": "bench",
                "input_hash": str(number),
            }
            for number in range(1, items + 1)
        ]
        table = pl.DataFrame(summaries, schema_overrides={"item_id": pl.Int32})
        Dataset.open(path).add_generated("semantic_summary", table)


def copy_model(source: Path, target: Path) -> bool:
    """A model folder with everything that loading needs; returns whether it has no weights."""
    shutil.copytree(source, target)
    if not (target / "tokenizer.json").is_file():
        shutil.copy(source.parent / "tokenizer.json", target / "tokenizer.json")
    return not any(target.glob("*.safetensors"))


def write_random_weights(folder: Path) -> None:
    """Weights that the packed engine can load, in bfloat16."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    kind = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "weights")
    for file in (folder / "weights").glob("*.safetensors*"):
        file.rename(folder / file.name)
    shutil.rmtree(folder / "weights")


# ---- one variant, in its own process ---------------------------------------------------------------------------------


def run_variant(
    shape: Shape, variant: str, dataset: Path, model: Path, engine_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """One variant's figures: prompts, seconds (without the engine's start), prompt tokens, when it ended."""
    from vlrank.config import RerankConfig, load_config

    kind, *settings = variant.split(",")
    engine = "packed" if kind == "packed" else "vllm"
    values = {key: int(value) for key, value in (setting.split("=") for setting in settings)}
    candidates, replicas = values.pop("candidates", 20), values.pop("replicas", 1)
    if kind == "packed":
        engine_kwargs = {}
        if not any(model.glob("*.safetensors")):
            write_random_weights(model)
    elif not any(model.glob("*.safetensors")):
        engine_kwargs = {"load_format": "dummy", **engine_kwargs}
    packed: dict[str, Any] = {"quantization": "fp8"} if values.pop("fp8", 0) else {}
    packed |= {"row_tokens": values.pop("row")} if "row" in values else {}
    share = {"gpus": int(100 / replicas) / 100} if replicas > 1 else {}  # all on one GPU
    if kind != "packed" and share and (memory := gpu_memory()) and "kv_cache_memory_bytes" not in engine_kwargs:
        # Random weights have no files from which the job could tell their size: 8 GiB for them and all but the cache.
        engine_kwargs["kv_cache_memory_bytes"] = int(memory * 0.8 / replicas) - 8 * 2**30
    ranking = {"max_history": shape.history, "max_item_chars": 4000, "window": 20, "top_k": max(50, candidates)}
    config = load_config(
        RerankConfig,
        dataset=dataset,
        model=str(model),
        as_mode=shape.mode,
        out=dataset.parent / f"{variant.replace(',', '-')}.parquet",
        negatives=candidates - 1,
        shard_rows=values.pop("shard", 256),
        limit=values.pop("limit", None),
        engine={"name": engine, "replicas": replicas, "engine_kwargs": engine_kwargs} | share | packed,
        ranking=ranking | {"permutations": values.pop("permutations", 1)},
    )
    if kind not in ("raw", "job", "packed") or values:
        raise SystemExit(f"unknown variant {variant!r}")
    return raw(config) if kind == "raw" else job(config)


def job(config: Any) -> dict[str, Any]:
    """``vlrank rerank`` as a user runs it."""
    from vlrank.reranking.pipeline import run

    began = time.monotonic()
    summary = run(config)
    counts = summary.counts
    assert counts["quarantined"] == 0, summary.lines
    return {
        "prompts": counts["prompts"],
        "users": counts["done"],
        "requests": counts["requests"],
        "tokens": counts["tokens_in"],
        "prefix_cache_hit_rate": counts["cached_tokens"] / max(1, counts["request_tokens"]),
        "seconds": counts["working_ms"] / 1000,
        "seconds_with_start": time.monotonic() - began,
        "ended": time.time(),
    }


def raw(config: Any) -> dict[str, Any]:
    """``LLM.generate``, one token per prompt; the prompts and the decoded pictures are made beforehand."""
    import os
    from dataclasses import replace

    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM, SamplingParams

    from vlrank.config import RankingConfig
    from vlrank.data.dataset import Dataset
    from vlrank.engines.models import open_model
    from vlrank.engines.vllm_args import scoring_args
    from vlrank.prompting.encoding import Encoder
    from vlrank.prompting.modes import mode_spec
    from vlrank.prompting.negatives import sampled_candidates

    folder = replace(open_model(config.model, config.as_mode), ranking=RankingConfig(**config.ranking))
    encoder = Encoder.load(config.model, mode_spec(config.as_mode), folder.ranking)
    dataset = Dataset.open(config.dataset)
    meta = dataset.item_meta()
    pool = np.arange(1, dataset.n_items + 1)
    prompts, tokens = [], 0
    for user, (history, target) in islice(dataset.histories("test").items(), config.limit):
        listed, _ = sampled_candidates(user, history, target, pool, config.negatives, config.seed)
        encoded = encoder.encode([meta[i] for i in history], [meta[i] for i in listed])
        prompt: dict[str, Any] = {"prompt_token_ids": compact(encoded.ids, encoder.image_token_id)}
        if encoded.image_paths:
            prompt["multi_modal_data"] = {"image": [encoder.picture(path) for path in encoded.image_paths]}
            prompt["mm_processor_kwargs"] = {"size": encoder.picture_size}
        prompts.append(prompt)
        tokens += len(encoded.ids)
    import torch

    kwargs = scoring_args(folder, config.engine, gpu_memory() if torch.cuda.is_available() else None)
    for ours in ("hf_overrides", "mm_processor_cache_gb", "scheduling_policy"):
        kwargs.pop(ours, None)
    llm = LLM(**kwargs)
    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
    llm.generate(prompts[:8], params, use_tqdm=False)
    llm.reset_prefix_cache()
    began = time.monotonic()
    llm.generate(prompts, params, use_tqdm=False)
    seconds = time.monotonic() - began
    return {"prompts": len(prompts), "tokens": tokens, "seconds": seconds, "ended": time.time()}


def compact(ids: Sequence[int], placeholder: int | None) -> list[int]:
    """Token ids with one placeholder per picture, as vLLM takes them beside decoded pictures."""
    return [token for at, token in enumerate(ids) if token != placeholder or ids[at - 1] != placeholder]


# ---- around it -------------------------------------------------------------------------------------------------------


def measure(variant: str, dataset: Path, model: Path, timeout: int) -> dict[str, Any]:
    """Run one variant; GPU utilisation is sampled while it works."""
    samples: list[tuple[float, float]] = []
    stop = threading.Event()
    sampler = threading.Thread(target=sample_gpu, args=(samples, stop), daemon=True)
    sampler.start()
    command = [sys.executable, sys.argv[0], *sys.argv[1:], "--child", variant, str(dataset), str(model)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"prompts"')]
        if done.returncode or not lines:
            return {"variant": variant, "error": (done.stderr or done.stdout)[-2000:]}
        result = json.loads(lines[-1])
    except subprocess.TimeoutExpired:
        return {"variant": variant, "error": f"not done after {timeout} s"}
    finally:
        stop.set()
        sampler.join(timeout=10)
    ended, seconds = result.pop("ended"), result["seconds"]
    result |= {"prompts_per_second": result["prompts"] / seconds, "tokens_per_second": result["tokens"] / seconds}
    used = [share for at, share in samples if ended - seconds <= at <= ended]
    if used:
        result["gpu_utilisation"] = float(np.mean(used)) / 100
    return {"variant": variant} | {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
