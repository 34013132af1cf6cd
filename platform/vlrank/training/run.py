"""``vlrank train``: from a dataset to a run folder with the best checkpoint.

A run folder holds ``config.yaml`` (every setting), ``history.jsonl`` (one line per evaluation), ``best.json`` (the best
checkpoint), ``result.json`` (when it is done) and the checkpoints, plain Hugging Face or PEFT folders.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import yaml

from vlrank.config import TrainConfig, mode_defaults
from vlrank.console import Summary, announce, console, progress
from vlrank.data.dataset import Dataset
from vlrank.data.items import ItemMeta
from vlrank.data.quarantine import write_quarantine
from vlrank.data.tables import atomic_write_json, atomic_write_text, disk_errors, read_json
from vlrank.engines.models import best_checkpoint
from vlrank.engines.resources import GIB
from vlrank.errors import UserError
from vlrank.prompting.chat_template import check_chat_template
from vlrank.ray_train import fit_trainer, followed, preload_for, ray_storage, with_failure_policy
from vlrank.runtime import cluster_gpus, cluster_resources, ray_session
from vlrank.storage import BucketPath, Location, fetch_model, listing, location, remove_tree, writable
from vlrank.supervisor import command_started
from vlrank.training.checkpoints import mend_run, torn_file
from vlrank.training.data import TrainingData, choose_samples, display_name, selection_metric
from vlrank.training.history import committed_step, read_history, record_evaluation
from vlrank.training.memory import TooLarge, free_gpu_memory
from vlrank.training.model import FOLDERS, Base, resolve_base
from vlrank.training.selection import improves
from vlrank.training.settle import OPEN, with_kept
from vlrank.training.state import drop_tensors, saved_states
from vlrank.training.timeline import Timeline, as_result, in_words
from vlrank.training.worker import PROGRESS_FILE, PROGRESS_S

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

_FREE_KEYS = {
    *("out", "ray", "max_failures", "resume", "resume_minutes", "report_to", "loader_workers", "save_total_limit"),
    # What a full GPU makes people change; neither samples nor gradients depend on it.
    *("micro_batch_size", "gradient_checkpointing", "pack_tokens", "auto_batch", "gpu_memory_gib", "compile"),
    *("workers", "gpus_per_worker", "cpus_per_worker"),
}
"""Settings that may change between a run and its continuation."""
_DATA_FILE = "data.json"
"""In a run folder: the content hashes of the dataset's tables."""


def run(config: TrainConfig) -> Summary:
    """Train one reranker.

    Raises:
        UserError: anything the user can mend, before a model is loaded where possible.
    """
    dataset = Dataset.open(config.dataset)
    return _run(config, TrainingData.of_dataset(dataset, config.candidates), dataset)


def fit(
    train_data: Mapping[int, Sequence[int]],
    val_data: Mapping[int, Sequence[int]],
    item_meta: Mapping[int, ItemMeta],
    config: TrainConfig,
) -> Location:
    """Train on lists in memory.

    Args:
        train_data: user id -> training items, oldest first.
        val_data: user id -> validation items; the last one is the target, after all others and the training items.
        item_meta: item id -> text and what the mode shows.
        config: Settings; ``dataset`` is not read.

    Returns:
        The best checkpoint's folder.
    """
    _run(config, TrainingData.of_lists(train_data, val_data, item_meta), None)
    return best_checkpoint(config.out)


def dry_run(config: TrainConfig) -> Summary:
    """What a run would do, and on how much data."""
    return _facts(
        config, resolve_base(config), TrainingData.of_dataset(Dataset.open(config.dataset), config.candidates)
    )


def build_trainer(
    config: TrainConfig,
    *,
    name: str,
    storage_path: str | Location,
    callbacks: Sequence[Any] = (),
    data: TrainingData | None = None,
    timeline: Timeline | None = None,
) -> DataParallelTrainer:
    """The Ray Train trainer of a run, for `run` and for tuning; Ray must be connected.

    Every evaluation reports epoch, step, loss and the ranking metrics, with the checkpoint. The run folder is
    ``storage_path/name``; the same folder continues from its last checkpoint by itself.

    Args:
        config: Settings; ``out`` is replaced by the run folder.
        name, storage_path: Where the run folder is.
        callbacks: Ray Train callbacks, e.g. `TuneReportCallback`.
        data: Read from ``config.dataset`` when not given.
        timeline: The worker goes on with it; default a new one.
    """
    import ray
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    from vlrank.ray_processes import ProcessGroupConfig
    from vlrank.training.worker import train_loop

    folder = location(storage_path).resolve() / name
    config = config.model_copy(update={"out": folder, "dataset": config.dataset.resolve()})
    base = resolve_base(config)
    gpus = gpus_per_worker(config, cluster_gpus())
    config = with_kept(with_defaults(config, base), folder).model_copy(update={"gpus_per_worker": gpus})
    if data is None:
        data = TrainingData.of_dataset(Dataset.open(config.dataset), config.candidates)
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    atomic_write_text(folder / "config.yaml", yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    _resume_from_whole(folder, folder / FOLDERS[base.family])
    resources = {"CPU": config.cpus_per_worker} | ({"GPU": gpus} if gpus else {})
    several = config.workers > 1 or config.parallel == "fsdp2"
    return with_failure_policy(DataParallelTrainer, lambda: len(read_history(folder)))(
        train_loop,
        backend_config=ProcessGroupConfig() if several else None,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "base": asdict(base),
            "data": ray.put(data),
            "timeline": (timeline or Timeline(phase="Ray")).handed_on(),
        },
        scaling_config=ScalingConfig(num_workers=config.workers, use_gpu=gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=FOLDERS[base.family],
            **ray_storage(folder),
            failure_config=FailureConfig(max_failures=config.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=config.save_total_limit, checkpoint_score_attribute="selection"
            ),
            callbacks=[_run_folder_callback(folder), *callbacks],
        ),
    )


def _resume_from_whole(folder: Location, home: Location) -> None:
    """Have a run go on from its newest whole state and checkpoint."""
    torn = mend_run(folder, home)
    committed = committed_step(folder)
    states = saved_states(folder, committed)
    step = states[0].step if states else 0
    goes_on = f"from step {step}" if step else "from the start"
    for name, file in torn.items():
        announce("Note:", f"{home / name} is torn ({file} is cut off); the run goes on {goes_on}", "yellow")
    if step < committed and not torn:
        kept = f"checkpoints up to step {committed} are kept"
        announce("Note:", f"the run goes on {goes_on}, where its optimizer was last saved; {kept}", "yellow")


def _run_folder_callback(folder: Location) -> Any:
    from ray.train import UserCallback

    class RunFolder(UserCallback):
        """Keeps history.jsonl and best.json; runs in the controller, on the driver's node."""

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            record_evaluation(folder, {key: value for key, value in metrics[0].items() if key != "last"})
            if metrics[0]["last"]:
                drop_tensors(folder)

    return RunFolder()


def _run(config: TrainConfig, data: TrainingData, dataset: Dataset | None) -> Summary:
    config = config.model_copy(update={"out": config.out.resolve(), "dataset": config.dataset.resolve()})
    timeline = _timeline(config)
    base = resolve_base(config)
    _check_reporters(config)
    run_samples = choose_samples(config, data)
    if _finished(with_defaults(config, base), dataset):
        console.print(f"{config.out} is finished already; delete it or set resume=never to train again")
        return _summary(config, base, read_json(config.out / "result.json"))
    template_note = check_chat_template(base.name, pictures=run_samples.spec.pixels)
    for warning in (*run_samples.warnings, *([template_note] if template_note else [])):
        announce("Note:", warning, "yellow")
    timeline.enter("Ray")
    with ray_session(config.ray, preload=preload_for(config.workers)):
        check_resources(config, cluster_resources())
        trainer = build_trainer(
            config, name=config.out.name, storage_path=config.out.parent, data=data, timeline=timeline
        )
        if dataset is not None:
            atomic_write_json(config.out / _DATA_FILE, dataset.manifest["files"])
        # The attempts before this one are known from here on, whatever becomes of it.
        atomic_write_json(config.out / PROGRESS_FILE, {"timeline": timeline.handed_on()})
        with _watch(config, config.epochs * -(-len(run_samples.samples) // config.batch_size)):
            outcome: dict[str, Any] | None = fit_trainer(trainer).return_value
            if outcome is not None:
                timeline = Timeline.taken_over(outcome.pop("timeline"))
    if outcome is None:
        raise RuntimeError("training ended without a result")
    if outcome["stopped_early"]:
        console.print(f"Early stopping at epoch {outcome['stopped_early']}")
    best = read_json(config.out / "best.json")
    _check_weights(config.out / best["checkpoint"])
    console.print(f"Loaded best model with val_{display_name(best['metric'])}: {best['value']:.4f}")
    bad = outcome.pop("bad")
    if dataset is not None:
        rows = [{"key": key, "error_type": error, "message": message} for key, error, message in bad]
        write_quarantine(dataset.path if writable(dataset.path) else config.out, "train", rows)
    else:
        for key, _, message in bad:
            warnings.warn(f"{key}: {message}", stacklevel=3)
    result = outcome | {
        **as_result(timeline.attempts),
        "quarantined": len(bad),
        "samples": len(run_samples.samples),
        "validation_users": len(run_samples.validation),
    }
    atomic_write_json(config.out / "result.json", result)
    (config.out / PROGRESS_FILE).unlink(missing_ok=True)
    return _summary(config, base, result)


def _timeline(config: TrainConfig) -> Timeline:
    """A new attempt's timeline, behind those of the attempts before it."""
    from_enter = "ray" not in sys.modules or not sys.modules["ray"].is_initialized()  # else part of a longer command
    earlier: list[Any] = []
    with suppress(OSError, ValueError, UserError):
        last = json.loads((config.out / PROGRESS_FILE).read_text(encoding="utf-8")).get("timeline")
        earlier = [*last["earlier"], last["attempt"]] if last and config.resume == "auto" else []
    return Timeline(command_started() if from_enter else None, earlier=earlier)


def with_defaults(config: TrainConfig, base: Base) -> TrainConfig:
    """The config with every setting decided that depends on no device; see `vlrank.training.settle` for the others."""
    decided = {
        "model": config.model or mode_defaults(config.mode)["model"],
        "method": base.method,
        "backend": "unsloth" if base.unsloth else "transformers",
        "load_in_4bit": base.in_4bit,
        "metric": selection_metric(config)[0],
        "ranking": config.resolved_ranking,
    }
    return config.model_copy(update=decided)


def _finished(config: TrainConfig, dataset: Dataset | None) -> bool:
    """Whether ``out`` holds this very run, finished; clears it under ``resume: never``.

    Raises:
        UserError: ``out`` holds a run with other settings or data, or something that is no run.
    """
    out = config.out
    if isinstance(out, BucketPath) and not out.key:
        raise UserError(f"{out} is a whole bucket", f"Choose a folder in it: --out {out}/NAME.")
    if not out.exists() or not any(out.iterdir()):
        return False
    if not (out / "config.yaml").is_file():
        raise UserError(f"{out} is not empty and is no training run", "Choose another --out.")
    if config.resume == "never":
        remove_tree(out)
        return False
    saved = yaml.safe_load((out / "config.yaml").read_text(encoding="utf-8"))
    wanted = config.model_dump(mode="json")

    def differs(key: str) -> bool:
        # What one of both leaves open is the other's; a key that a later version has added stood at its default before.
        return key in saved and saved[key] != wanted[key] and saved[key] not in OPEN and wanted[key] not in OPEN

    differing = [key for key in wanted if key not in _FREE_KEYS and differs(key)]
    if differing:
        changes = ", ".join(f"{key}: {saved.get(key)!r} -> {wanted[key]!r}" for key in differing)
        raise UserError(
            f"{out} holds a run with other settings ({changes})",
            "Choose another --out, or set resume=never to replace it.",
        )
    if dataset is not None and (out / _DATA_FILE).is_file():
        before = read_json(out / _DATA_FILE)
        if before != dataset.manifest["files"]:
            raise UserError(
                f"{out} holds a run on another state of {dataset.path}, which has been prepared again since",
                "Choose another --out, or set resume=never to replace it.",
            )
    return (out / "result.json").is_file()


def _check_reporters(config: TrainConfig) -> None:
    from importlib.util import find_spec

    packages = {"tensorboard": ("tensorboardX", "tensorboard"), "mlflow": ("mlflow",), "wandb": ("wandb",)}
    for name in config.report_to:
        if not any(find_spec(package) for package in packages[name]):
            raise UserError(f"report_to: {name}, but {packages[name][0]} is not installed", f"pip install {name}")
    if "tensorboard" in config.report_to and isinstance(config.out, BucketPath):
        raise UserError(
            f"report_to: tensorboard adds to its files at every step, which {config.out} cannot take",
            "Give an --out on a disk, or report to mlflow or wandb.",
        )


def gpus_per_worker(config: TrainConfig, gpus: float) -> float:
    """GPUs that each worker takes, where the cluster has ``gpus``."""
    return config.gpus_per_worker if config.gpus_per_worker is not None else min(1.0, gpus)


def check_resources(config: TrainConfig, have: Mapping[str, float]) -> None:
    """Whether the workers fit: Ray would wait for what never comes, without a word.

    Args:
        config: The run.
        have: CPUs and GPUs of the cluster.

    Raises:
        UserError: they do not.
    """
    cpus = config.workers * config.cpus_per_worker
    gpus = config.workers * gpus_per_worker(config, have.get("GPU", 0))
    for kind, needed in (("CPU", cpus), ("GPU", gpus)):
        if needed > have.get(kind, 0):
            raise UserError(
                f"{config.workers} workers need {needed:g} {kind}s, the cluster has {have.get(kind, 0):g}",
                f"Lower `workers` or `{kind.lower()}s_per_worker`.",
            )


@contextmanager
def _watch(config: TrainConfig, total: int) -> Iterator[None]:
    """Show progress and a line per evaluation while the block runs."""
    shown, at, warned = len(read_history(config.out)), 0, False
    said: set[str] = set()
    history: list[dict[str, Any]] = []
    with progress(f"train {config.mode}", total=total) as bar:

        def look(finished: bool) -> None:
            nonlocal shown, at, warned, history
            with suppress(OSError, ValueError, UserError):
                facts = json.loads((config.out / PROGRESS_FILE).read_text(encoding="utf-8"))
                bar.advance(facts.get("step", 0) - at, note=_progress_note(facts))
                at = facts.get("step", 0)
                for line in facts.get("said", []):
                    if line not in said:
                        announce("Note:", line, "yellow")
                        said.add(line)
            with suppress(UserError):  # a bucket that does not answer for once
                history = read_history(config.out)
            for i, line in enumerate(history[shown:], shown + 1):
                mark = " [BEST]" if improves([earlier["selection"] for earlier in history[:i]]) else ""
                console.print(epoch_line(line, config.epochs) + mark)
                if line.get("guessing") and not warned:
                    announce("Note:", _GUESSES, "yellow")
                    warned = True
            shown = len(history)
            if finished:
                bar.advance((history[-1]["step"] if history else at) - at, note="")

        with followed(look, PROGRESS_S if isinstance(config.out, BucketPath) else 0.3):
            yield


def _progress_note(facts: Mapping[str, Any]) -> str:
    if facts.get("loss") is None:
        return str(facts.get("note", ""))
    speed = f", {facts['samples_per_s']:.4g} samples/s" if facts["samples_per_s"] else ""
    wait = f", waiting for the loader {facts['loader_wait']:.0%}" if facts["loader_wait"] > 0.1 else ""
    return f"loss {facts['loss']:.3f}{speed}{wait}"


def epoch_line(line: Mapping[str, Any], epochs: int) -> str:
    """``[Qwen3VLReranker] Epoch 1/10 - val_Recall@10: 0.1234``."""
    return f"[Qwen3VLReranker] Epoch {line['epoch']}/{epochs} - val_{display_name(line['metric'])}: {line['value']:.4f}"


_GUESSES = (
    "neither loss nor validation tells this model from guessing yet. If it stays so: take more steps, another lr, or "
    "random negatives first (random_share=[1, 0]) where they come from a retriever. A small model gets there sooner by "
    "a short run with few candidates (negatives=4), and then model=THAT_RUN"
)


def _check_weights(folder: Location) -> None:
    """A folder that cannot be read must not pass for the best model."""
    if not listing(folder, "*.safetensors"):
        raise UserError(f"{folder} holds no weights", "The disk may be full; train again with resume=never.")
    if file := torn_file(folder):
        raise UserError(f"{file} is cut off", "The disk may be full; train again with resume=never.")


def _facts(config: TrainConfig, base: Base, data: TrainingData) -> Summary:
    run_samples = choose_samples(config, data)
    steps = -(-len(run_samples.samples) // config.batch_size)
    lines: dict[str, object] = {
        "model": f"{base.name} ({base.method}{', 4-bit' if base.in_4bit else ''}{', Unsloth' if base.unsloth else ''})",
        "samples per epoch": len(run_samples.samples),
        "steps": f"{steps} per epoch, {steps * config.epochs} at most",
        "validation users": len(run_samples.validation),
        "selected by": display_name(run_samples.metric),
        **_plan_lines(config, base, steps * config.epochs),
        **({"notes": "; ".join(run_samples.warnings)} if run_samples.warnings else {}),
    }
    return Summary(
        f"train {config.mode} (dry run)", lines, config.out, {"samples": len(run_samples.samples), "steps": steps}
    )


def _plan_lines(config: TrainConfig, base: Base, steps: int) -> dict[str, object]:
    """How the run would fit this machine's GPU, or ``gpu_memory_gib``, and a disk."""
    import torch

    from vlrank.training.disk import foreseen_plan
    from vlrank.training.settle import default_dtype, foreseen_work, plan_for

    on_gpu = torch.cuda.is_available()
    base = replace(base, name=fetch_model(base.name))
    memory = free_gpu_memory(config, torch.device("cuda", 0)) if on_gpu else (config.gpu_memory_gib or 0.0) * GIB
    settled = {"dtype": default_dtype(True)} if config.dtype == "auto" and on_gpu else {}
    if config.dtype == "auto" and not on_gpu:
        settled = {"dtype": "bfloat16" if memory else "float32"}
    gpu: object = "no GPU here; gpu_memory_gib=24 shows the plan for a card of 24 GiB"
    try:
        if memory:
            plan = plan_for(config, base, memory)
            gpu, settled = str(plan), settled | {"optim": plan.optim}
        config = config.model_copy(update=settled)
        return {"GPU memory": gpu, "disk": foreseen_plan(config, base, foreseen_work(config, base), steps)}
    except TooLarge:
        raise
    except UserError as error:
        return {"GPU memory": f"unknown: {error.problem}"}


def _summary(config: TrainConfig, base: Base, result: Mapping[str, Any]) -> Summary:
    best = read_json(config.out / "best.json")
    lines: dict[str, object] = {
        "model": f"{base.name} ({base.method}{', 4-bit' if base.in_4bit else ''}{', Unsloth' if base.unsloth else ''})",
        "samples per epoch": result["samples"],
        "steps": result["steps"],
        "best": f"val_{display_name(best['metric'])} {best['value']:.4f} at epoch {best['epoch']}",
        "samples/s": round(result["samples_per_s"], 2),
        "tokens/s": round(result["tokens_per_s"]),
        "waiting for data": f"{result['loader_wait']:.1%} of the time",
        "seconds": result["seconds"],
    }
    if result.get("phases"):  # former results have none
        attempts = len(result["attempts"])
        lines["time"] = in_words(result["phases"]) + (f"; {attempts} attempts" if attempts > 1 else "")
    if result["peak_memory_gib"]:
        planned = f" ({result['planned_memory_gib']:.1f} predicted)" if result.get("planned_memory_gib") else ""
        lines["peak GPU memory"] = f"{result['peak_memory_gib']:.1f} GiB{planned}"
    if result["inserted"]:
        lines["targets inserted"] = f"{result['inserted']:.1%} of samples: the retriever did not list them"
    if result["quarantined"]:
        lines["quarantined"] = result["quarantined"]
    counts = {key: int(result[key]) for key in ("samples", "steps", "validation_users", "quarantined")}
    return Summary(f"train: {config.mode}", lines, config.out, counts)
