"""Whole training commands, from Enter to the prompt: how long `vlrank train` and `vlrank tune` take, and for what.

    python bench/whole_commands.py --models MODELS --data BEAUTY --out bench/results/whole_commands.json

``MODELS`` holds model folders with weights, which may be random: ``qwen3-vl-2b``, and ``qwen3-0.6b-bnb-4bit`` or
``qwen3-0.6b``. ``BEAUTY`` holds ``interactions.csv.gz`` and ``items.jsonl.gz`` of Amazon Beauty 2014, of which the
first ``--users`` users are prepared; without ``--data`` the demo's shop is. Items show their text where they have no
summary. Each command is a process with a time limit of its own, and the report is written after each: another call
with ``--only`` adds to it. ``--checkout`` measures another state of the code, under ``--label``. ``--tiny`` tries all
of it on a CPU, with the demo's models without training.

Seconds are those of the process. ``phases`` are the command's own account of them (`vlrank.training.timeline`),
``gpu_busy`` is the mean utilisation that nvidia-smi shows between the first and the last step, ``bytes_written`` what
the training workers wrote. Commands that need more GPUs than there are say so.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.processes import command_line, family, of_living

ROOT = Path(__file__).resolve().parents[1]
SMALL_DISK = 90e9
"""On a smaller disk the state of a fully trained 2B model is not saved: it needs 51 GB beside the checkpoints."""


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the table.

    Attributes:
        words: After ``vlrank``; ``DATA``, ``OUT`` and ``MODELS/NAME`` stand for places.
        goal: What it should come to, in words.
        limit: Seconds after which it is ended.
        gpus: That it needs.
    """

    words: str
    goal: str
    limit: float
    gpus: int = 1


_FULL = "train DATA --mode semantic_summary --method full --model MODELS/qwen3-vl-2b --out OUT"
_TWO = f"{_FULL} --batch_size 32 --epochs 2 --workers"
COMMANDS = {
    "small": Command(
        "train DATA --mode semantic_summary_small --model MODELS/small --epochs 1 --out OUT", "50 s", limit=300
    ),
    "small_again": Command(
        "train DATA --mode semantic_summary_small --model MODELS/small --epochs 1 --seed 1 --out OUT",
        "the second run compiles nothing",
        limit=300,
    ),
    "full": Command(f"{_FULL} --epochs 3", "150 s, GPU busy 85% between first and last step", limit=420),
    "full_32": Command(f"{_TWO} 1", "the steady rate of one GPU", limit=300),
    "ddp": Command(f"{_TWO} 2", "1.85 times full_32", limit=300, gpus=2),
    "fsdp2": Command(f"{_TWO} 2 --parallel fsdp2", "1.7 times full_32", limit=400, gpus=2),
    "bytes": Command(f"{_FULL} --epochs 10 --val_users 50", "50 GB written in 10 epochs", limit=580),
    "sweep": Command(
        "tune DATA --modes semantic_summary_small --trials 4 --scheduler none --out OUT train.model=MODELS/small "
        "train.epochs=1 train.gpus_per_worker=0.25 train.gpu_memory_gib=18",
        "30% less than before",
        limit=580,
    ),
}
DEFAULT = ["small", "small_again", "full", "full_32", "ddp", "fsdp2"]


@dataclass(slots=True)
class Watch:
    """What is seen of a running command from outside, every half a second.

    Attributes:
        utilisation: (time, percent of all GPUs).
        memory_gib: Most GPU memory in use.
        steps: (time, step) from the run folder's progress.json.
        written: Bytes by process.
    """

    utilisation: list[tuple[float, float]] = field(default_factory=list)
    memory_gib: float = 0.0
    steps: list[tuple[float, int]] = field(default_factory=list)
    written: dict[int, int] = field(default_factory=dict)

    def look(self, pid: int, out: Path) -> None:
        """Once; what cannot be seen is left out."""
        now = time.time()
        if shutil.which("nvidia-smi"):
            asked = ["nvidia-smi", "--query-gpu=utilization.gpu,memory.used", "--format=csv,noheader,nounits"]
            said = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=False).stdout
            rows = [[float(value) for value in line.split(",")] for line in said.splitlines() if "," in line]
            if rows:
                self.utilisation.append((now, sum(row[0] for row in rows) / len(rows)))
                self.memory_gib = max(self.memory_gib, max(row[1] for row in rows) / 1024)
        try:
            step = json.loads((out / "progress.json").read_text()).get("step", 0)
            self.steps.append((now, step))
        except (OSError, ValueError):
            pass
        lines = of_living(family(pid), command_line)
        workers = [child for child, line in lines.items() if "RayTrainWorker" in line]
        counters = of_living(workers, psutil.Process.io_counters)
        self.written |= {child.pid: counter.write_chars for child, counter in counters.items()}

    def seen(self) -> dict[str, Any]:
        """As the report has it."""
        learned = [at for at, step in self.steps if step > 0]
        busy = [share for at, share in self.utilisation if learned and learned[0] <= at <= learned[-1]]
        return {
            "gpu_busy": round(sum(busy) / len(busy) / 100, 3) if busy else None,
            "gpu_memory_gib": round(self.memory_gib, 1) or None,
            "bytes_written": sum(self.written.values()) or None,
        }


def main() -> None:
    """Prepare, run the commands one after the other, write the report after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder of model folders with weights")
    parser.add_argument("--data", type=Path, help="folder with Amazon Beauty 2014's interactions and items")
    parser.add_argument("--out", type=Path, required=True, help="report; results of other commands in it stay")
    parser.add_argument("--users", type=int, default=1600)
    parser.add_argument("--only", nargs="*", choices=list(COMMANDS), default=[], help=f"default: {' '.join(DEFAULT)}")
    parser.add_argument("--seconds", type=float, default=3000, help="for everything; what finds no time is left out")
    parser.add_argument("--work", type=Path, help="folder for datasets and runs; default a temporary one")
    parser.add_argument("--checkout", type=Path, default=ROOT, help="state of the code that is measured")
    parser.add_argument("--label", default="now", help="name of that state in the report")
    parser.add_argument("--tiny", action="store_true", help="tiny models and data, to try the script on a CPU")
    args = parser.parse_args()
    if args.models is None and not args.tiny:
        parser.error("--models is needed, or --tiny")
    end = time.monotonic() + args.seconds
    work = args.work or Path(tempfile.mkdtemp(prefix="vlrank-whole-"))
    work.mkdir(parents=True, exist_ok=True)
    report = json.loads(args.out.read_text()) if args.out.is_file() else {}
    report.setdefault("goals", {name: command.goal for name, command in COMMANDS.items()})
    results = report.setdefault("results", {}).setdefault(args.label, {})
    report.setdefault("machines", {})[args.label] = machine()
    data = dataset(work, args)
    models = tiny_models(work) if args.tiny else args.models.resolve()
    for name in args.only or DEFAULT:
        results[name] = measure(name, work, data, models, args, end - time.monotonic())
        print(json.dumps({name: results[name]}), file=sys.stderr, flush=True)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.work is None:
        shutil.rmtree(work, ignore_errors=True)


def machine() -> dict[str, Any]:
    """What it was measured on."""
    import torch

    return {
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "date": time.strftime("%Y-%m-%d"),
    }


def environment(args: argparse.Namespace) -> dict[str, str]:
    """The environment of a command: the code that is measured, nothing from a network."""
    path = os.pathsep.join([str(args.checkout.resolve() / "platform"), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.strip(os.pathsep), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def measure(
    name: str, work: Path, data: Path, models: Path, args: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """Run a command of the table.

    Args:
        name: Its name.
        work, data, models: Places.
        args: Of the script.
        seconds: That are left for it.
    """
    import torch

    command = COMMANDS[name]
    gpus = torch.cuda.device_count()
    if command.gpus > max(1, gpus) and not args.tiny:
        return {"not_run": f"needs {command.gpus} GPUs, there are {gpus}"}
    if seconds < 30:
        return {"not_run": "no time left"}
    out = work / f"{args.label}-{name}"
    shutil.rmtree(out, ignore_errors=True)
    small = next((models / kind for kind in ("qwen3-0.6b-bnb-4bit", "qwen3-0.6b") if (models / kind).is_dir()), models)
    places = {"DATA": str(data), "OUT": str(out)}
    words = [places.get(word, word) for word in command.words.replace("MODELS/small", str(small)).split()]
    words = [word.replace("MODELS/", f"{models}/") for word in words]
    prefix = "train." if words[0] == "tune" else ""
    words += [f"{prefix}ranking.missing=text", f"{prefix}max_missing=1"]
    if "full" in words and shutil.disk_usage(work).free < SMALL_DISK and not args.tiny and args.checkout == ROOT:
        words.append("resume_minutes=never")
    if args.tiny:
        words += ["ray.num_cpus=4", f"{prefix}val_users=16", f"{prefix}negatives=4", f"{prefix}gpus_per_worker=0"]
        words = [word for word in words if not word.startswith(("train.gpus_per_worker=0.25", "train.gpu_memory_gib"))]
    result = run(words, out, min(command.limit, seconds), work / f"{args.label}-{name}.log", environment(args))
    shown = [word.replace(str(models), "MODELS").replace(str(out), "OUT").replace(str(data), "DATA") for word in words]
    shutil.rmtree(out, ignore_errors=True)
    return {"command": " ".join(["vlrank", *shown]), **result}


def run(words: list[str], out: Path, limit: float, log: Path, env: dict[str, str]) -> dict[str, Any]:
    """One command as a process of its own, ended after ``limit`` seconds."""
    watch, over = Watch(), threading.Event()
    with log.open("w", encoding="utf-8") as said:
        begun = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-m", "vlrank", *words], stdout=said, stderr=said, env=env, start_new_session=True
        )

        def look() -> None:
            while not over.wait(0.5):
                watch.look(process.pid, out)

        looking = threading.Thread(target=look, daemon=True)
        looking.start()
        timed_out = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
            process.send_signal(signal.SIGINT)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        seconds = time.monotonic() - begun
        over.set()
        looking.join(30)
    result: dict[str, Any] = {"seconds": round(seconds, 1), "exit_code": process.returncode, **watch.seen()}
    if timed_out:
        result["error"] = f"ended after {limit:.0f} s"
    elif process.returncode:
        result["error"] = log.read_text(encoding="utf-8", errors="replace")[-1500:]
    facts = json.loads((out / "result.json").read_text()) if (out / "result.json").is_file() else {}
    kept = ("steps", "samples", "validation_users", "samples_per_s", "tokens_per_s", "loader_wait", "peak_memory_gib")
    return result | {key: facts[key] for key in (*kept, "phases") if key in facts}


# ---- data and models -------------------------------------------------------------------------------------------------


def dataset(work: Path, args: argparse.Namespace) -> Path:
    """The dataset of all commands, prepared once."""
    folder = work / "data"
    if (folder / "manifest.json").is_file():
        return folder
    if args.tiny or args.data is None:
        from vlrank.demo.shop import make_shop

        make_shop(folder, n_items=60 if args.tiny else 2000, n_users=80 if args.tiny else args.users)
        return folder
    chosen: set[str] = set()
    reviews = work / "interactions.csv"
    with gzip.open(args.data / "interactions.csv.gz", "rt", encoding="utf-8") as source, reviews.open("w") as target:
        header = next(source)
        user = header.strip().split(",").index("user")
        target.write(header.replace("unixReviewTime", "timestamp"))
        for line in source:
            name = line.rstrip("\n").split(",")[user]
            if name in chosen or len(chosen) < args.users:
                chosen.add(name)
                target.write(line)
    words = ["prepare", "--reviews", str(reviews), "--meta", str(args.data / "items.jsonl.gz"), "--out", str(folder)]
    prepare = [sys.executable, "-m", "vlrank", *words, "--min_uc", "4", "--min_sc", "1"]
    subprocess.run(prepare, check=True, env=environment(args), timeout=600)
    return folder


def tiny_models(work: Path) -> Path:
    """The demo's models without training, under the names of the real ones."""
    from vlrank.demo.base_models import corpus, save_model, text_model, train_tokenizer, vision_model

    models = work / "models"
    if not models.is_dir():
        tokenizer = train_tokenizer(corpus())
        save_model(models / "qwen3-0.6b", text_model(tokenizer), tokenizer)
        save_model(models / "qwen3-vl-2b", vision_model(tokenizer), tokenizer)
    return models


if __name__ == "__main__":
    main()
