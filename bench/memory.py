"""GPU memory of training: mode x method x card, predicted and measured, with random weights of the real shapes.

    python bench/memory.py --config-dir MODELS --out bench/results/memory_h100.json

``MODELS`` as for bench/train.py. Every cell runs in a process of its own, which may take as much memory as a card has
(``torch.cuda.set_per_process_memory_fraction``): settings at their defaults, a few steps at the mode's batch size, one
validation, and steps again, on prompts of about 1,100 tokens with some of the longest length. ``--seconds`` bounds a
cell, ``--deadline`` the whole run; what is done is written after each cell, beside what the file holds already.
``--cells caption-full`` selects by name, ``--models`` keeps the random weights for the next run.
A cell says "refused" where no plan fits, with the message.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

CARDS = (8, 12, 16, 24, 40, 80)
USABLE = 0.97  # of a card's gibibytes, the rest is the driver's
WORK = {
    "semantic_summary_small-lora": ("semantic_summary_small", "lora", {}),
    "semantic_summary_small-lora-packed": ("semantic_summary_small", "lora", {"backend": "transformers"}),
    "caption-lora": ("caption", "lora", {}),
    "caption-full": ("caption", "full", {}),
    "semantic_summary-lora": ("semantic_summary", "lora", {}),
    "raw_image-lora": ("raw_image", "lora", {}),
    "raw_image-full": ("raw_image", "full", {}),
    "raw_image-full-vision": ("raw_image", "full", {"train_vision": True}),
}
ITEMS, USERS, STEPS = 400, 600, 6
WORDS = ("red", "tea", "pot", "oak", "lamp", "silk", "rug", "wool", "hat", "iron", "pan", "glass", "jar", "vase")


def main() -> None:
    """All cells one by one, or one as a child."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--cards", type=int, nargs="*", default=list(CARDS), help="GiB")
    parser.add_argument("--cells", nargs="*", default=[""], help="names of mode-method")
    parser.add_argument("--models", type=Path, help="folder of the random weights, made where they are missing")
    parser.add_argument("--seconds", type=float, default=150, help="for one cell")
    parser.add_argument("--deadline", type=float, default=3000, help="for the whole run")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script on a CPU")
    parser.add_argument("--child", help="mode-method")
    parser.add_argument("--card", type=int)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(cell(args.child, args.card, args)), flush=True)
    else:
        table(args)


def table(args: argparse.Namespace) -> None:
    """Each cell in a subprocess; prints and stores the table."""
    begun = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    if args.out and args.out.is_file():
        results = json.loads(args.out.read_text(encoding="utf-8"))
    scratch = Path(tempfile.mkdtemp())
    models = args.models or scratch  # random weights, made once by the first cell of a family
    for name in (name for name in WORK if any(name == cell or not cell for cell in args.cells)):
        for card in args.cards:
            left = args.deadline - (time.monotonic() - begun)
            if left < 20:
                break
            command = [sys.executable, __file__, "--child", name, "--card", str(card)]
            command += ["--config-dir", str(args.config_dir), *(["--tiny"] if args.tiny else [])]
            environment = {**os.environ, "BENCH_MODELS": str(models)}
            environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(scratch / "compiled"))
            try:
                done = subprocess.run(
                    command, capture_output=True, text=True, timeout=min(args.seconds, left), env=environment
                )
                lines = done.stdout.strip().splitlines()
                found = json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.stderr[-1500:]}
            except subprocess.TimeoutExpired:
                found = {"failed": f"took more than {min(args.seconds, left):.0f} s"}
            results.setdefault(name, {})[f"{card} GiB"] = found
            print(f"{name:36} {card:3} GiB  {json.dumps(found)[:160]}", flush=True)
            if args.out:
                args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(scratch, ignore_errors=True)


def cell(name: str, card: int, args: argparse.Namespace) -> dict[str, Any]:
    """One run of a few steps on a card of ``card`` GiB."""
    import torch

    from vlrank.config import TrainConfig, load_config
    from vlrank.errors import UserError
    from vlrank.training.data import TrainingData
    from vlrank.training.model import resolve_base
    from vlrank.training.worker import Progress, make_trainer, start_process

    mode, method, changes = WORK[name]
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, USABLE * card * 2**30 / total), device)
    out = Path(tempfile.mkdtemp())
    said: list[str] = []
    show = Progress(None)
    show.say = said.append  # type: ignore[method-assign]
    config = load_config(
        TrainConfig,
        dataset=str(out),
        out=str(out / "run"),
        mode=mode,
        method=method,
        model=str(model_folder("text" if mode == "semantic_summary_small" else "vision", args)),
        val_users=64,
        epochs=1,
        **changes,
    )
    base = resolve_base(config)
    start_process(config, base, device)
    data = TrainingData.of_lists(*world(out, pictures=mode == "raw_image"))
    begun = time.monotonic()
    try:
        trainer = make_trainer(config, base, data, device, rank=0, world=1, show=show)
    except UserError as error:
        return {"refused": error.problem}
    trainer.args.save_strategy = "no"
    trainer.args.eval_strategy = trainer.args.eval_strategy.__class__("steps")
    trainer.args.eval_steps, trainer.args.max_steps = STEPS // 2, STEPS
    loaded = time.monotonic()
    try:
        trainer.train()
    except (UserError, torch.OutOfMemoryError) as error:
        return {"failed": str(error)[:600], "said": said}
    outcome = trainer.outcome()
    shutil.rmtree(out, ignore_errors=True)
    used = trainer.config
    return {
        "plan": str(trainer._memory_plan),
        "predicted_gib": round(outcome.planned_memory_gib, 2),
        "peak_gib": round(outcome.peak_memory_gib, 2),
        "reserved_gib": round(torch.cuda.max_memory_reserved() / 2**30, 2) if device.type == "cuda" else 0.0,
        "samples_per_s": round(outcome.samples_per_s, 2),
        "batch_size": used.batch_size,
        "recompute": used.gradient_checkpointing,
        "optim": used.optim,
        "pack_tokens": used.pack_tokens,
        "load_s": round(loaded - begun, 1),
        "train_s": round(time.monotonic() - loaded, 1),
        "said": said,
        "gpu": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
    }


def model_folder(family: str, args: argparse.Namespace) -> Path:
    """A folder with random weights of the family, made once a run."""
    from bench.train import random_model, tokenizer_file

    place = Path(os.environ.get("BENCH_MODELS", tempfile.gettempdir())) / family
    if not (place / "config.json").is_file():
        source = args.config_dir / ("qwen3-0.6b" if family == "text" else "qwen3-vl-2b")
        draft = place.with_name(f".{family}-{os.getpid()}")
        random_model(source, args.tiny).save_pretrained(draft)
        for file in source.iterdir():
            if file.name not in ("config.json", "tokenizer.json"):
                shutil.copy(file, draft)
        shutil.copy(tokenizer_file(args.config_dir), draft / "tokenizer.json")
        draft.rename(place)
    return place


def world(folder: Path, *, pictures: bool) -> tuple[dict[int, list[int]], dict[int, list[int]], dict[int, Any]]:
    """Users and items whose prompts have about 1,100 tokens; every fiftieth user's items have long texts."""
    from PIL import Image

    draw = random.Random(0)
    meta: dict[int, Any] = {}
    for item in range(1, ITEMS + 1):
        words = 120 if item <= 40 else 8
        text = " ".join(draw.choice(WORDS) for _ in range(words))
        meta[item] = {"text": text, "caption": f"a {text[:40]}", "semantic_summary": text[:60], "image_path": None}
        if pictures:
            path = folder / f"{item}.png"
            Image.frombytes("RGB", (224, 224), draw.randbytes(3 * 224 * 224)).save(path)
            meta[item]["image_path"] = str(path)
    train: dict[int, list[int]] = {}
    for user in range(1, USERS + 1):
        train[user] = draw.sample(range(1, 41) if user % 50 == 0 else range(41, ITEMS + 1), 24)
    return train, {user: [draw.randint(41, ITEMS)] for user in train}, meta


if __name__ == "__main__":
    main()
