"""Training throughput on one GPU, ours beside a plain transformers loop, with random weights of the real shapes.

    python bench/train.py --config-dir MODELS --data BEAUTY --out bench/results/train.json

``MODELS`` holds ``qwen3-0.6b/`` and ``qwen3-vl-2b/`` (config, tokenizer files) and ``tokenizer.json``; ``BEAUTY`` holds
``interactions.csv.gz`` and ``items.jsonl.gz`` for real prompt lengths (without it they are drawn from a recorded
distribution). Every variant runs in a process of its own, so that none profits from another's memory or compilation;
``--only vl`` selects variants by prefix, ``--seconds`` is the measured time of each, ``--deadline`` ends the whole run.
Two GPUs: ``torchrun --nproc-per-node 2 bench/train.py --child small/ours --config-dir MODELS``.

Model FLOPs (Chowdhery et al. 2022, appendix B; only what the model needs, recomputation not counted): a matrix of N
weights costs 2N per token forward, 2N for the gradient of its input and 2N for its own; frozen weights save the last.
Causal attention over T tokens costs 2 * T^2 * heads * head_dim forward per layer and twice that backward. The head
counts for learned tokens only, the last layer for them and for the keys and values of all, the embedding not at all.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))

FOLDERS = {"vl": "qwen3-vl-2b", "raw": "qwen3-vl-2b", "smol": "smollm2-135m"}
ANSWER = 3  # tokens of an answer: two digits and the end
LENGTH, BATCH = 2048, 8

VARIANTS: dict[str, str] = {
    "matmul": "bf16 matrix product 8192^3: what the device gives",
    "small/plain": "Qwen3-0.6B LoRA r8, 8x2048: transformers + PEFT with labels, float32 adapters",
    "small/ours": "the same rows packed, answer-only head, bf16 adapters with float32 masters, compiled layers",
    "vl/plain-gc": "Qwen3-VL-2B full, text 8x2048: transformers with labels and gradient checkpointing, AdamW in bf16",
    "vl/ours": "the same rows, packed, answer-only head, AdamW with float32 masters, compiled layers",
    "lengths/plain": "Qwen3-0.6B LoRA, 32 real prompts a step, padded, 8 in a pass: transformers + PEFT with labels",
    "lengths/padded": "the same prompts, padded, answer-only head, bf16 adapters, compiled layers (dynamic shapes)",
    "lengths/packed": "the same prompts packed into rows as long as `row_length` says",
    "raw/pixels": "Qwen3-VL-2B LoRA, 20 pictures 224x224, pixels through the frozen tower each step, padded",
    "raw/cached": "the same with cached vision features (deepstack included), packed and compiled",
    "smol/ours": "SmolLM2-135M full, 64 prompts of 450 to 750 tokens, packed",
    "small/whole-last": "small/ours with the last layer computed at all places",
    "vl/whole-last": "vl/ours with the last layer computed at all places",
    "small/peft": "small/ours with PEFT's own LoRA layers",
    "small/eager": "small/ours without compilation",
    "small/padded": "small/ours side by side instead of packed",
    "small/unsloth": "Unsloth's own path: 4-bit base weights, LoRA r8, padded",
    "vl/plain": "vl/plain-gc without gradient checkpointing",
    "vl/bf16": "vl/ours with AdamW in bf16 (no masters)",
    "vl/one-row": "vl/bf16 with one packed row of 16384",
    "vl/8bit-gc": "vl/ours with 8-bit paged AdamW and gradient checkpointing, one row of 2048 at a time",
    "raw/full-pixels": "raw/pixels, full fine-tuning of the language model (tower frozen), gradient checkpointing",
    "raw/full-cached": "raw/cached, full fine-tuning of the language model",
    "raw/packed-pixels": "raw/cached, but with pixels: what packing and compilation alone give",
}
DEFAULT = [name for name in VARIANTS if list(VARIANTS).index(name) < 10]


@dataclass
class Work:
    """What is repeated and timed.

    Attributes:
        step: One optimizer step; returns its loss.
        samples: Samples of a step, on average.
        tokens: Real tokens of a step, on average.
        flops: Model FLOPs of a step, on average.
    """

    step: Callable[[], Any]
    samples: float
    tokens: float
    flops: float


def main() -> None:
    """Run the variants one by one, or one as a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-dir", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="prefixes of variants; default: the table of ten")
    parser.add_argument("--seconds", type=float, default=12)
    parser.add_argument("--deadline", type=float, default=450, help="seconds for the whole run")
    parser.add_argument("--child", choices=list(VARIANTS))
    parser.add_argument("--profile", type=Path, help="with --child: write a table of kernels here")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script on a CPU")
    parser.add_argument("--list", action="store_true")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:20} {what}" for name, what in VARIANTS.items()))
    elif args.child:
        print(json.dumps(child(args.child, args)), flush=True)
    else:
        parent(args)


def parent(args: argparse.Namespace) -> None:
    """Each variant in a subprocess; prints and stores the table."""
    begun = time.monotonic()
    chosen = [v for prefix in args.only for v in VARIANTS if v.startswith(prefix)] or DEFAULT
    results: dict[str, Any] = {}
    for name in chosen:
        left = args.deadline - (time.monotonic() - begun)
        if left < 20:
            results[name] = {"error": "not run: the deadline of the whole run"}
            continue
        command = [sys.executable, __file__, "--child", name, "--config-dir", str(args.config_dir)]
        command += ["--seconds", str(args.seconds)] + (["--data", str(args.data)] if args.data else [])
        command += ["--tiny"] if args.tiny else []
        environment = os.environ | {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=min(left, 180), env=environment)
            lines = done.stdout.strip().splitlines()
            results[name] = json.loads(lines[-1]) if done.returncode == 0 and lines else {"error": done.stderr[-1500:]}
        except subprocess.TimeoutExpired:
            results[name] = {"error": "timed out"}
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    peak = results.get("matmul", {}).get("tflops")
    print(f"{'variant':18} {'samples/s':>10} {'tokens/s':>10} {'GiB':>6} {'TFLOP/s':>8} {'of peak':>8}  {'start s':>7}")
    for name, result in results.items():
        if "samples_per_s" in result:
            share = f"{result['tflops'] / peak:.1%}" if peak else "-"
            print(
                f"{name:18} {result['samples_per_s']:10.1f} {result['tokens_per_s']:10.0f} {result['peak_gib']:6.1f} "
                f"{result['tflops']:8.1f} {share:>8}  {result['startup_s']:7.1f}"
            )
        else:
            print(f"{name:18} {result.get('tflops', result.get('error', ''))!s:.100}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"what": VARIANTS, "results": results}, indent=2) + "\n", encoding="utf-8")


def child(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Build one variant, warm it up, measure it."""
    import torch

    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available()
    if world > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if cuda else "gloo")
    facts = {"device": torch.cuda.get_device_name() if cuda else "cpu", "torch": torch.__version__, "world": world}
    torch.manual_seed(int(os.environ.get("RANK", "0")))
    if name == "matmul":
        return facts | {"tflops": matmul(256 if args.tiny else 8192)}
    begun = time.perf_counter()
    work = build(name, args)
    for _ in range(2 if args.tiny else 4):
        work.step()
    synchronize(torch)
    startup = time.perf_counter() - begun
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    steps, start = 0, time.perf_counter()
    while time.perf_counter() - start < args.seconds:
        loss = work.step()
        steps += 1
        if steps % 4 == 0:
            synchronize(torch)  # bounds the queue, so that the measured time is the device's
    synchronize(torch)
    seconds = time.perf_counter() - start
    if args.profile:
        profile(work, args.profile)
    return facts | {
        "samples_per_s": round(work.samples * steps * world / seconds, 2),
        "tokens_per_s": round(work.tokens * steps * world / seconds),
        "tflops": round(work.flops * steps / seconds / 1e12, 2),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if cuda else 0.0,
        "steps": steps,
        "loss": float(loss),
        "startup_s": round(startup, 1),
    }


def synchronize(torch: Any) -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matmul(n: int) -> float:
    """TFLOP/s of a bf16 matrix product."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(torch)
    start = time.perf_counter()
    for _ in range(20):
        a @ b
    synchronize(torch)
    return round(20 * 2 * n**3 / (time.perf_counter() - start) / 1e12, 1)


def profile(work: Work, path: Path) -> None:
    """Kernels of three steps, by device time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        for _ in range(3):
            work.step()
    path.write_text(trace.key_averages().table(sort_by="cuda_time_total", row_limit=40), encoding="utf-8")


# ---- models ---------------------------------------------------------------------------------------------------------


def random_model(folder: Path, tiny: bool) -> Any:
    """The architecture of ``folder`` with random weights on the device, bfloat16 (float32 on a CPU)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen3VLForConditionalGeneration

    config = AutoConfig.from_pretrained(folder)
    if tiny:
        shrink(config)
    cuda = torch.cuda.is_available()
    vision = hasattr(config, "vision_config")
    kind = Qwen3VLForConditionalGeneration._from_config if vision else AutoModelForCausalLM.from_config
    with torch.device("cuda" if cuda else "cpu"):
        model = kind(config, dtype=torch.bfloat16 if cuda else torch.float32, attn_implementation="sdpa")
    model.config.use_cache = False
    if vision:
        model.model.visual.requires_grad_(False)
    return model.train()


def shrink(config: Any) -> None:
    """Two small layers, for trying the script."""
    text = config.get_text_config()
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 64, 128, 2
    text.num_attention_heads, text.num_key_value_heads, text.head_dim = 2, 1, 32
    text.layer_types = ["full_attention"] * 2
    if hasattr(config, "vision_config"):
        text.rope_parameters["mrope_section"] = [6, 5, 5]
        vision = config.vision_config
        vision.hidden_size, vision.intermediate_size, vision.depth, vision.num_heads = 64, 128, 3, 2
        vision.out_hidden_size, vision.deepstack_visual_indexes = 64, [0, 1]


def with_lora(model: Any, *, float32_adapters: bool) -> Any:
    """LoRA r 8, alpha 16 on all linear layers of the language model."""
    from peft import LoraConfig, get_peft_model

    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
    return get_peft_model(model, lora, autocast_adapter_dtype=float32_adapters)


def model_flops(model: Any, lengths: list[int], *, learned: int, lora: bool, pictures: int = 0) -> float:
    """Model FLOPs of one step over prompts of these lengths; see the head of this file.

    Args:
        model: Inside PEFT or not.
        lengths: Tokens of each prompt.
        learned: Tokens whose next token is learned.
        lora: The base weights are frozen.
        pictures: Patches that go through the vision tower (forward only, it is frozen).
    """
    from vlrank.engines.structure import core

    config = core(model).config.get_text_config()
    width, head_dim = config.hidden_size, config.head_dim
    keys_and_values = 2 * width * config.num_key_value_heads * head_dim
    rest = 2 * width * config.num_attention_heads * head_dim + 3 * width * config.intermediate_size
    layers = config.num_hidden_layers - 1
    everywhere = layers * (keys_and_values + rest) + keys_and_values
    at_learned = rest + width * config.vocab_size
    per_weight = 4 if lora else 6
    attention = sum(2 * t * t for t in lengths) * config.num_attention_heads * head_dim
    flops = per_weight * (everywhere * sum(lengths) + at_learned * learned) + 3 * attention * layers
    if pictures:
        tower = sum(p.numel() for p in core(model).model.visual.blocks.parameters() if p.ndim == 2)
        flops += 2 * tower * pictures
    return float(flops)


# ---- steps ----------------------------------------------------------------------------------------------------------


def build(name: str, args: argparse.Namespace) -> Work:
    """The work of a variant."""
    import torch

    from vlrank.engines.structure import core
    from vlrank.training.answers import AnswerHead, token_losses
    from vlrank.training.attention import compile_layers, use_packed_attention
    from vlrank.training.batches import to_device
    from vlrank.training.lora import fuse_lora

    random.seed(0)
    family, variant = name.split("/")
    folder = args.config_dir / FOLDERS.get(family, "qwen3-0.6b")
    if variant == "unsloth":
        return unsloth_work(folder, args)
    model = random_model(folder, args.tiny)
    vision = hasattr(model.config, "vision_config")
    full = family in ("vl", "smol") or variant.startswith("full")
    plain = variant.startswith("plain")
    if family in ("small", "lengths"):
        model = with_lora(model, float32_adapters=plain)
    elif not full:
        model = with_lora(model, float32_adapters=False)
    batches = make_batches(family, args, core(model))
    cached = variant.endswith("cached")
    patches = 0
    if family == "raw":
        batches, patches = add_pictures(batches, core(model), args, cached=cached)
    if variant.endswith("gc") or variant == "full-pixels":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    packed = variant not in ("padded", "plain", "plain-gc", "pixels", "full-pixels")
    budget = row_tokens(variant, core(model), batches)
    head = None if plain else AnswerHead(model, last_layer=variant != "whole-last")
    if packed:
        use_packed_attention(core(model))
        if not full and variant != "peft":
            fuse_lora(model)
    if variant != "eager" and (packed or variant == "padded"):
        compile_layers(core(model), dynamic=not packed)
    wrapped = model
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, device_ids=[int(os.environ["LOCAL_RANK"])])
    optimizer = make_optimizer(variant, model, plain)
    at_once = BATCH if plain else 32  # logits of 32 prompts are more than a GPU holds
    forms = [collate(rows, packed, budget, vision, at_once) for rows in batches]
    device = next(model.parameters()).device
    at = 0

    def step() -> Any:
        nonlocal at
        micro = forms[at % len(forms)]
        at += 1
        total = 0.0
        for i, batch in enumerate(micro):
            moved = to_device(batch, device)
            if plain:
                loss = plain_loss(wrapped, moved)
            else:
                loss = token_losses(wrapped, head, moved).sum() / moved["targets"].numel()
            loss = loss / len(micro)
            if i < len(micro) - 1 and wrapped is not model:
                with wrapped.no_sync():
                    loss.backward()
            else:
                loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return total

    lengths = [[len(row.ids) for row in rows] for rows in batches]
    mean = 1 / len(batches)
    return Work(
        step,
        samples=sum(map(len, lengths)) * mean,
        tokens=sum(map(sum, lengths)) * mean,
        flops=sum(
            model_flops(
                model, own, learned=ANSWER * len(own), lora=not full, pictures=0 if cached else patches * len(own)
            )
            for own in lengths
        )
        * mean,
    )


def row_tokens(variant: str, model: Any, batches: list[list[Any]]) -> int:
    """Length of packed rows, chosen as training does."""
    from vlrank.training.memory import Work, make_plan, shape_of
    from vlrank.training.packing import launch_tokens, row_length

    if variant == "8bit-gc":
        return LENGTH + ANSWER
    if variant == "one-row":
        return BATCH * LENGTH
    import torch

    on_gpu = torch.cuda.is_available()
    memory = torch.cuda.get_device_properties(0).total_memory if on_gpu else float("inf")
    work = Work(shape_of(model), longest=LENGTH + ANSWER, prompts=len(batches[0]), fused=True)
    least = launch_tokens(work.shape.hidden) if on_gpu else 0
    lengths = [len(row) for rows in batches for row in rows]
    return row_length(lengths, len(batches[0]), make_plan(work, memory).tokens, least)


def plain_loss(model: Any, batch: dict[str, Any]) -> Any:
    """What most people write: logits of the whole batch, labels of -100 outside the answer."""
    import torch

    ids = batch["input_ids"]
    labels = torch.full_like(ids, -100)
    # The last answer token is not in the row: learn the token after each place from the row itself where it is there.
    flat = labels.view(-1)
    places = batch["answer_index"]
    inside = places + 1 < flat.numel()
    flat[places[inside] + 1] = batch["targets"][inside]
    mask = (torch.arange(ids.shape[1], device=ids.device)[None] < ids.ne(0).sum(1, keepdim=True)).long()
    return model(input_ids=ids, attention_mask=mask, labels=labels).loss


def make_optimizer(variant: str, model: Any, plain: bool) -> Any:
    """AdamW as the variant says."""
    import torch

    from vlrank.training.optim import MasterAdamW

    trained = [p for p in model.parameters() if p.requires_grad]
    if variant == "8bit-gc":
        import bitsandbytes

        return bitsandbytes.optim.PagedAdamW8bit(trained, lr=1e-5)
    if plain or variant in ("bf16", "one-row") or not torch.cuda.is_available():
        return torch.optim.AdamW(trained, lr=1e-5, fused=torch.cuda.is_available())
    return MasterAdamW(trained, lr=1e-5)


def collate(rows: list[Any], packed: bool, budget: int, vision: bool, at_once: int) -> list[dict[str, Any]]:
    """The micro-batches of one step, pinned: packed rows of ``budget`` tokens, or ``at_once`` prompts side by side."""
    import torch

    from vlrank.training.collate import end_to_end, side_by_side
    from vlrank.training.packing import pack

    form: dict[str, Any] = {
        "vision": vision,
        "pad_id": 0,
        "pictures": lambda paths: torch.cat([PICTURES[p] for p in paths]),
    }
    if packed:
        bins = pack([len(row) for row in rows], max(budget, max(len(row) for row in rows)))
        batches = [
            end_to_end(
                [rows[i] for i in chosen],
                length=max(budget, *map(len, rows)),
                documents=len(rows),
                longest=max(map(len, rows)) if len(set(map(len, rows))) == 1 else 4096,
                **form,
            )
            for chosen in bins
        ]
    else:
        passes = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
        batches = [side_by_side(chosen, **form) for chosen in passes]
    if not torch.cuda.is_available():
        return batches
    return [{k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()} for batch in batches]


# ---- data -----------------------------------------------------------------------------------------------------------

PICTURES: dict[str, Any] = {}


def make_batches(family: str, args: argparse.Namespace, model: Any) -> list[list[Any]]:
    """Steps of rows with random tokens: 8 x 2048, real lengths, or (for raw_image) the text around 20 pictures."""
    if family in ("small", "vl"):
        length = 96 if args.tiny else LENGTH
        return [[random_row(length) for _ in range(BATCH)] for _ in range(4)]
    if family == "raw":
        length = 96 if args.tiny else 600
        return [[random_row(length) for _ in range(BATCH)] for _ in range(4)]
    if family == "smol":
        lengths = [random.randrange(450, 750) // (8 if args.tiny else 1) for _ in range(256)]
        return [[random_row(length) for length in lengths[i : i + 64]] for i in range(0, 256, 64)]
    lengths = real_lengths(args)
    if args.tiny:
        lengths = [max(8, length // 16) for length in lengths]
    return [[random_row(random.choice(lengths)) for _ in range(32)] for _ in range(8)]


def random_row(length: int) -> Any:
    """A row of random token ids whose last three next tokens are learned; it reads ``length`` tokens."""
    import numpy as np

    from vlrank.training.collate import Row

    ids = np.array([random.randrange(1, 49_000) for _ in range(length)], dtype=np.int64)
    places = np.arange(length - ANSWER, length)
    targets = np.array([random.randrange(15, 25) for _ in range(ANSWER)], dtype=np.int64)
    return Row(ids, np.tile(np.arange(length), (3, 1)), places, targets)


def real_lengths(args: argparse.Namespace) -> list[int]:
    """Prompt lengths in tokens of Amazon Beauty 2014: at most 20 history items and 20 candidates with their text."""
    if args.data is None:
        # The 5th, 15th, ... 95th percentile of what follows, measured on the data (mean 942), for hosts without them.
        return [797, 835, 858, 875, 894, 916, 944, 979, 1038, 1163]
    import csv
    import gzip

    from transformers import PreTrainedTokenizerFast

    from vlrank.prompting.modes import mode_spec
    from vlrank.prompting.prompts import build_prompt

    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file(args.config_dir)))
    with gzip.open(args.data / "items.jsonl.gz", "rt", encoding="utf-8") as file:
        texts = {row["asin"]: item_text(row) for row in map(json.loads, file)}
    histories: dict[str, list[tuple[int, str]]] = {}
    with gzip.open(args.data / "interactions.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            histories.setdefault(row["user"], []).append((int(row["pos"]), row["asin"]))
    users, items, spec = sorted(histories), sorted(texts), mode_spec("semantic_summary_small")
    lengths = []
    for user in random.Random(0).sample(users, 600):
        own = [asin for _, asin in sorted(histories[user])][:-2]
        split = random.randrange(1, len(own)) if len(own) > 1 else 1
        history = [{"text": texts.get(asin, asin)} for asin in own[:split]][-20:]
        candidates = [{"text": texts[random.choice(items)]} for _ in range(20)]
        prompt = build_prompt(spec, history, candidates)  # type: ignore[arg-type]
        lengths.append(len(tokenizer(prompt.messages[0]["content"])["input_ids"]) + 12)  # and the chat template
    return lengths


def item_text(row: dict[str, Any]) -> str:
    """Title, brand and categories, as `vlrank prepare` joins them."""
    categories = row.get("categories") or []
    names = [name for part in categories for name in (part if isinstance(part, list) else [part])]
    return ". ".join(str(part) for part in (row.get("title"), row.get("brand"), ", ".join(names)) if part)


def tokenizer_file(folder: Path) -> Path:
    """``tokenizer.json`` of the configs."""
    for place in (folder / "tokenizer.json", folder / "qwen3-0.6b" / "tokenizer.json"):
        if place.is_file():
            return place
    raise SystemExit(f"no tokenizer.json in {folder}")


def add_pictures(
    batches: list[list[Any]], model: Any, args: argparse.Namespace, *, cached: bool
) -> tuple[list[list[Any]], int]:
    """Put 20 pictures of 224x224 into every row, as pixels or as cached features.

    Returns:
        The rows, and the patches of one row that go through the tower.
    """
    import numpy as np
    import torch

    from vlrank.training.collate import Row
    from vlrank.training.model import accept_features

    config = model.config.vision_config
    side = 4 if args.tiny else 14
    grid, merge = (1, side, side), config.spatial_merge_size
    tokens, patches = side * side // merge**2, side * side
    token = model.config.image_token_id
    width = accept_features(model) if cached else config.in_channels * config.temporal_patch_size * config.patch_size**2
    dtype = next(model.parameters()).dtype if cached else torch.float32
    for i in range(40):
        PICTURES[str(i)] = torch.randn(tokens if cached else patches, width).to(dtype)
    result = []
    for rows in batches:
        changed = []
        for row in rows:
            ids, positions, at = [], [], 0
            chunk = len(row.ids) // 21
            for i in range(21):
                text = row.ids[i * chunk : (i + 1) * chunk] if i < 20 else row.ids[20 * chunk :]
                ids += text.tolist()
                positions.append(np.tile(np.arange(len(text)) + at, (3, 1)))
                at += len(text)
                if i < 20:
                    ids += [token] * tokens
                    positions.append(np.indices((1, side // merge, side // merge)).reshape(3, -1) + at)
                    at += side // merge
            names = tuple(str(random.randrange(40)) for _ in range(20))
            places = np.arange(len(ids) - ANSWER, len(ids))
            changed.append(
                Row(np.array(ids), np.concatenate(positions, axis=1), places, row.targets, names, (grid,) * 20)
            )
        result.append(changed)
    return result, patches * 20


def unsloth_work(folder: Path, args: argparse.Namespace) -> Work:
    """Unsloth's own path on a folder with random weights, 4-bit."""
    import shutil

    from vlrank.compat import hide_vllm

    hide_vllm()
    os.environ["UNSLOTH_RETURN_LOGITS"] = "1"
    import torch
    from unsloth import FastLanguageModel

    place = Path(tempfile.mkdtemp()) / "model"
    model = random_model(folder, args.tiny)
    model.save_pretrained(place)
    del model
    for name in ("tokenizer_config.json",):
        shutil.copy(folder / name, place)
    shutil.copy(tokenizer_file(args.config_dir), place / "tokenizer.json")
    model, _ = FastLanguageModel.from_pretrained(str(place), max_seq_length=4096, load_in_4bit=True)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=8, lora_alpha=16, lora_dropout=0, target_modules=names, use_gradient_checkpointing=False
    )

    from vlrank.training.answers import AnswerHead, token_losses
    from vlrank.training.batches import to_device

    head = AnswerHead(model)
    batches = make_batches("small", args, model)
    forms = [collate(rows, False, 0, False, BATCH)[0] for rows in batches]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    steps: Iterator[int] = iter(range(10**9))
    kind = "cuda" if torch.cuda.is_available() else "cpu"

    def step() -> Any:
        batch = to_device(forms[next(steps) % len(forms)], torch.device(kind))
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            loss = token_losses(model, head, batch).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        model.zero_grad(set_to_none=True)
        return loss.detach()

    lengths = [len(row.ids) for row in batches[0]]
    flops = model_flops(model, lengths, learned=ANSWER * BATCH, lora=True)
    return Work(step, BATCH, sum(lengths), flops)


if __name__ == "__main__":
    main()
