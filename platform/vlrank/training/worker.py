"""The function that every Ray Train worker runs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlrank.compat import hide_extras, hide_vllm, list_packages_once, shard_on_cpus
from vlrank.config import TrainConfig
from vlrank.console import quiet_libraries
from vlrank.data.items import ItemMeta
from vlrank.data.picture import PictureMissing, UnreadablePicture
from vlrank.engines.compiled import keep_compiled
from vlrank.engines.structure import core
from vlrank.errors import UserError
from vlrank.runtime import imported
from vlrank.storage import (
    BucketPath,
    Location,
    cache_folder,
    fetch,
    fetch_model,
    is_url,
    several,
    upload_tree,
)
from vlrank.training.checkpoints import remove_orphans
from vlrank.training.collate import ANSWER_ROOM
from vlrank.training.data import RunSamples, TrainingData, choose_samples, pictures_folder
from vlrank.training.disk import check_disk
from vlrank.training.history import committed_step
from vlrank.training.memory import MemoryPlan, with_gathered
from vlrank.training.model import FOLDERS, Base, load_trainable, recompute_layers
from vlrank.training.packing import launch_tokens, row_length
from vlrank.training.state import saved_states
from vlrank.training.timeline import Timeline

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from vlrank.training.saving import Write
    from vlrank.training.trainer import Outcome, RerankTrainer

PROGRESS_FILE = "progress.json"
PROGRESS_S = 5.0
"""Seconds between writes, and between reads, in a bucket; on a disk the file follows every step."""
_OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw_bf16": "adamw_torch",
    "adamw_8bit": "adamw_bnb_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
}
_KERNELS = ("torch._inductor.compile_fx", "flash_attn.cute.interface")
"""Take seconds to import, in which weights go from the disk to the GPU."""
_FUSED = "adamw_torch_fused"
"""One kernel reads and writes weights, gradients and moments once; but it would unscale float16's gradients again."""


def train_loop(settings: dict[str, Any]) -> dict[str, Any]:
    """Train on this worker.

    Args:
        settings: ``config``, ``base`` and the driver's ``timeline`` as dicts, and ``data``, a reference to a
            `TrainingData`.

    Returns:
        `Outcome` as a dict.

    Raises:
        UserError: the user has to mend something.
    """
    import ray
    import ray.train

    config = TrainConfig.model_validate(settings["config"])
    base = Base(**settings["base"])
    data: TrainingData = ray.get(settings["data"])
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    timeline = _timeline(config, settings["timeline"], rank)
    try:
        return asdict(_train(config, base, data, timeline, rank=rank, world=world))
    except Exception as error:
        error.add_note(traceback.format_exc())  # for `ray_train.worker_error`: exceptions travel without a traceback
        raise


def _timeline(config: TrainConfig, given: Mapping[str, Any], rank: int) -> Timeline:
    """The driver's timeline; after a failure that of the worker before, up to its last sign of life."""
    last: dict[str, Any] = {}
    if rank == 0:
        with suppress(OSError, ValueError, UserError):
            last = json.loads((config.out / PROGRESS_FILE).read_text(encoding="utf-8")).get("timeline") or {}
    if last and last["attempt"]["began"] == given["attempt"]["began"] and last["phase"] != "Ray":
        timeline = Timeline.taken_over(last, "restart")
    else:
        timeline = Timeline.taken_over(given)
    timeline.enter("imports")
    return timeline


def _train(
    config: TrainConfig, base: Base, data: TrainingData, timeline: Timeline, *, rank: int, world: int
) -> Outcome:
    import ray.train.torch
    import torch

    # This process: libraries in the order that they need, seed, device.
    device = ray.train.torch.get_device()
    show = Progress(config.out if rank == 0 else None, timeline)
    show(note="starting")
    start_process(config, base, device)
    from vlrank.training.settle import record_used, with_kept
    from vlrank.training.trainer import device_full

    # The run folder, as the last attempt left it.
    timeline.enter("model")
    home = config.out / FOLDERS[base.family]
    if rank == 0:
        remove_orphans(home)
    config = with_kept(config, config.out)
    committed = committed_step(config.out)
    state = next(iter(saved_states(config.out, committed)), None)

    # The trainer, with everything decided that was left open.
    trainer = make_trainer(
        config, base, data, device, rank=rank, world=world, show=show, committed=committed, timeline=timeline
    )
    if rank == 0:
        check_disk(trainer.config, base, trainer.model, trainer.steps.per_epoch * config.epochs)
        record_used(trainer.config)
    _report_to_ray(trainer, home, show)

    # Training, from the last state on where there is one.
    show(note="training")
    try:
        if state is None:
            trainer.train()
        elif not trainer.is_over(state):
            trainer.resume(state)
    except torch.OutOfMemoryError as error:
        raise device_full(trainer.config, base, f"step {trainer.state.global_step + 1}") from error
    timeline.enter("end")
    trainer.saver.wait()
    shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    with suppress(OSError):  # other ranks still write
        staging_folder(config.out).rmdir()
    return trainer.outcome()


def make_trainer(
    config: TrainConfig,
    base: Base,
    data: TrainingData,
    device: Any,
    *,
    rank: int,
    world: int,
    show: Progress,
    committed: int = 0,
    timeline: Timeline | None = None,
) -> RerankTrainer:
    """Load a run's model and make its trainer; `start_process` comes before.

    Args:
        config, base, data: The run.
        device: Of this rank.
        rank, world: Of this process.
        show: Tells the driver.
        committed, timeline: See `RerankTrainer`.

    Raises:
        UserError: the user has to mend something.
    """
    from vlrank.training.settle import settle
    from vlrank.training.trainer import RerankTrainer

    # What was left open, and whether the run fits, before anything is loaded.
    on_gpu = device.type == "cuda"
    local = replace(base, name=fetch_model(base.name))
    given = config
    config, memory_plan = settle(given, local, device)

    # The model, and what it reads.
    timeline = timeline or Timeline()
    show(note="loading the model")
    with timeline.during("model"), imported(_KERNELS if on_gpu and config.packing else ()):
        trainable = load_trainable(config, local, device)
    with timeline.during("vision features"):
        encoder, training_encoder, pictures, run_samples, unreadable = _prepare_pictures(
            config, trainable, data, rank, world, show
        )
    if config.packing and not _pack(config, base, trainable.model, on_gpu, show):
        recomputes = config.gradient_checkpointing
        config, memory_plan = settle(given.model_copy(update={"packing": False}), local, device)
        if config.gradient_checkpointing and not recomputes:
            recompute_layers(trainable.model)

    # Steps, in passes that fit.
    steps = _steps(
        config, base, trainable.model, run_samples, training_encoder, pictures, memory_plan, rank, world, on_gpu
    )
    used = {"micro_batch_size": steps.micro_batch_size, "pack_tokens": steps.pack_tokens}
    config = config.model_copy(update=used)
    if on_gpu:
        memory_plan = _as_loaded(config, base, trainable.model, memory_plan)
    if config.parallel == "fsdp2":
        memory_plan = with_gathered(memory_plan, config, trainable.model)
    if on_gpu:
        show.say(str(memory_plan))

    # The trainer, which writes checkpoints to a folder of this rank.
    staging = staging_folder(config.out) / f"rank-{rank}"
    shutil.rmtree(staging, ignore_errors=True)
    trainer = RerankTrainer(
        trainable,
        _training_arguments(config, base, trainable.model, steps, staging, memory_plan, on_gpu),
        config=config,
        base=base,
        run_samples=run_samples,
        steps=steps,
        validation_encoder=encoder,
        memory_plan=memory_plan,
        say=show.say,
        committed=committed,
        timeline=timeline,
    )
    trainer.bad |= unreadable if rank == 0 else {}
    return trainer


def start_process(config: TrainConfig, base: Base, device: Any) -> None:
    """Prepare libraries and seed, in the order that the libraries need."""
    import torch

    quiet_libraries()
    on_gpu = device.type == "cuda"
    if base.unsloth:
        # Unsloth patches transformers and has to come first.
        hide_vllm()
        list_packages_once()
        import unsloth  # noqa: F401
    elif not base.maybe_quantised:
        maybe_8bit = "8bit" in config.optim or (on_gpu and base.method == "full")
        hide_extras(bitsandbytes=not (base.in_4bit or maybe_8bit))
    if on_gpu:
        keep_compiled()  # Unsloth has removed the setting from the environment
    from transformers import set_seed

    set_seed(config.seed)
    if not torch.distributed.is_initialized():
        # No process group: Accelerate must not find the environment of one that this host's launcher made.
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            os.environ.pop(name, None)
        os.environ["ACCELERATE_TORCH_DEVICE"] = str(device)
    if config.parallel == "fsdp2" and not on_gpu:
        shard_on_cpus()
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(config.out / "logs"))


def _pack(config: TrainConfig, base: Base, model: Any, on_gpu: bool, show: Progress) -> bool:
    """Prepare a model for packed rows; False, said once, where its layers do not allow them."""
    from vlrank.training.attention import NotPackable, compile_layers, use_packed_attention
    from vlrank.training.unsloth_rows import computed_by_unsloth, use_packed_rows

    use = use_packed_rows if computed_by_unsloth(model) else use_packed_attention
    try:
        use(core(model), config.ranking.max_prompt_tokens + ANSWER_ROOM)
    except NotPackable as error:
        show.say(error.problem)
        return False
    if base.unsloth:
        return True
    if on_gpu and base.method == "lora" and config.parallel == "ddp":
        from vlrank.training.lora import fuse_lora

        fuse_lora(model)
    if config.compile:
        compile_layers(core(model))
    return True


def _steps(
    config: TrainConfig,
    base: Base,
    model: Any,
    run_samples: RunSamples,
    encoder: Any,
    pictures: Any,
    memory_plan: MemoryPlan,
    rank: int,
    world: int,
    on_gpu: bool,
) -> Any:
    """The training data as steps, in passes that fit the memory plan."""
    from vlrank.training.batches import Steps
    from vlrank.training.unsloth_rows import computed_by_unsloth

    own_share = -(-config.batch_size // world)
    longest = config.ranking.max_prompt_tokens + ANSWER_ROOM
    steps = Steps(
        run_samples.samples,
        run_samples.item_meta,
        encoder,
        batch_size=config.batch_size,
        micro_batch_size=min(config.micro_batch_size or own_share, own_share),
        pack_tokens=max(config.pack_tokens, longest) if config.packing and config.pack_tokens else None,
        pass_tokens=memory_plan.tokens if on_gpu else None,
        rank=rank,
        world=world,
        vision=base.family == "vision",
        pad_id=0,
        pictures=pictures,
        loss=config.loss,
        for_unsloth=base.unsloth and computed_by_unsloth(model),
    )
    if steps.for_unsloth and config.packing and steps.pack_tokens is None:
        steps.pack_tokens = max(memory_plan.tokens, longest)  # rows are not filled up: the fewer the better
    if config.packing and steps.pack_tokens is None:
        lengths = steps.some_lengths()
        if not lengths:
            raise UserError("not one prompt can be made", "Look at some items with `vlrank inspect`.")
        least = launch_tokens(memory_plan.hidden) if on_gpu else 0
        steps.pack_tokens = row_length(lengths, own_share, memory_plan.tokens, least)
    return steps


def _as_loaded(config: TrainConfig, base: Base, model: Any, memory_plan: MemoryPlan) -> MemoryPlan:
    """The memory plan with the weights and the rows that the run has."""
    from vlrank.training.memory import shape_of, with_passes, work_of

    packed = bool(config.packing)
    item_bytes = 4 if config.dtype == "float32" else 2
    work = work_of(config, base, shape_of(model), packed=packed, item_bytes=item_bytes)
    return with_passes(memory_plan, work, config.pack_tokens if packed and config.pack_tokens else memory_plan.tokens)


def _training_arguments(
    config: TrainConfig, base: Base, model: Any, steps: Any, staging: Path, memory_plan: MemoryPlan, on_gpu: bool
) -> TrainingArguments:
    """Our settings as transformers' Trainer takes them."""
    from transformers import TrainingArguments

    from vlrank.engines.structure import blocks

    n_steps = steps.per_epoch * config.epochs
    sharding: dict[str, Any] = {}
    if config.parallel == "fsdp2":
        kept = {"reshard_after_forward": not memory_plan.keeps_gathered}
        sharding = {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": blocks(model), **kept}}
    by_steps = config.eval_steps is not None
    optimizer = _OPTIMIZERS[config.optim]
    return TrainingArguments(
        output_dir=str(staging),
        num_train_epochs=config.epochs,
        per_device_train_batch_size=steps.micro_batch_size,
        learning_rate=config.lr,
        lr_scheduler_type="cosine",
        warmup_steps=round(config.warmup_ratio * n_steps),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=_FUSED if optimizer == "adamw_torch" and on_gpu and config.dtype != "float16" else optimizer,
        # Whole copies are bfloat16 themselves; Unsloth and sharded float32 weights compute in bfloat16.
        bf16=on_gpu and config.dtype == "bfloat16" and (base.unsloth or config.parallel == "fsdp2"),
        fp16=on_gpu and config.dtype == "float16",
        **sharding,
        eval_strategy="steps" if by_steps else "epoch",
        eval_steps=config.eval_steps,
        save_strategy="steps" if by_steps else "epoch",
        save_steps=config.eval_steps or 500,
        logging_strategy="steps",
        logging_steps=max(1, min(10, n_steps // 100)),
        logging_nan_inf_filter=False,
        load_best_model_at_end=False,
        remove_unused_columns=False,
        report_to=list(config.report_to) or "none",
        seed=config.seed,
        disable_tqdm=True,
        use_cpu=not on_gpu,
        ddp_find_unused_parameters=config.train_vision,
    )


def _report_to_ray(trainer: Any, home: Location, show: Progress) -> None:
    """Hand evaluations and checkpoints to Ray Train, and the driver what it shows meanwhile."""
    from vlrank.training.trainer import ReportCallback

    def progress(step: int, loss: float | None) -> None:
        samples_per_s, loader_wait = trainer.speed()
        show(step=step, loss=loss, samples_per_s=round(samples_per_s, 1), loader_wait=round(loader_wait, 3))

    staging = Path(trainer.args.output_dir)
    trainer.add_callback(ReportCallback(trainer, _reporter(home, staging), progress))


def _prepare_pictures(
    config: TrainConfig, trainable: Any, data: TrainingData, rank: int, world: int, show: Progress
) -> tuple[Any, Any, Any, RunSamples, dict[str, tuple[str, str]]]:
    """Encoders for validation and training, the picture loader, and the samples without unreadable pictures.

    An item whose picture cannot be read is treated like one without a picture; the last value is "item ID" ->
    (error type, message) of these.
    """
    import torch.distributed as dist

    from vlrank.prompting.encoding import Encoder
    from vlrank.training.model import accept_features, tower_key
    from vlrank.training.pictures import FeatureEncoder, Features, Pixels, compute_features

    encoder = trainable.encoder
    run_samples = choose_samples(config, data)
    unreadable: dict[str, tuple[str, str]] = {}
    if remote := [path for path in run_samples.picture_paths if is_url(path)]:
        show(note=f"fetching {len(remote):,} pictures")
        copies = _fetch_pictures(remote, world)
        missing = {url: PictureMissing(url, "no such file") for url, copy in copies.items() if copy is None}
        unreadable = _of_items(data.item_meta, missing)
        data = data.with_pictures(copies)
        run_samples = _samples_without(config, data, unreadable)
    pictures: Any = Pixels(encoder)
    paths = run_samples.picture_paths
    if paths and config.cache_vision and not config.train_vision:
        accept_features(trainable.model)
        folder = pictures_folder(config) / tower_key(trainable.model, encoder, paths)
        if rank == 0:
            show(note=f"vision features of {len(paths):,} pictures")
            compute_features(trainable.model, encoder, paths, folder)
        if world > 1:
            dist.barrier()
        pictures, suspects = compute_features(trainable.model, encoder, paths, folder)
    else:
        suspects = paths
    errors = zip(suspects, several(encoder.unreadable, suspects, at_once=True), strict=True)
    if broken := {path: error for path, error in errors if error is not None}:
        unreadable |= _of_items(data.item_meta, broken)
        run_samples = _samples_without(config, data.with_pictures(dict.fromkeys(broken)), unreadable)
    if isinstance(pictures, Features):
        encoder = FeatureEncoder(encoder, pictures)
    training_encoder = encoder
    if run_samples.train_spec is not run_samples.spec:
        training_encoder = Encoder(encoder.tokenizer, run_samples.train_spec, config.ranking)
    return encoder, training_encoder, pictures, run_samples, unreadable


def _of_items(item_meta: Mapping[int, ItemMeta], errors: Mapping[str, UnreadablePicture]) -> dict[str, tuple[str, str]]:
    """The errors of pictures by item, as quarantine rows have them: "item ID" -> (error type, message)."""
    items = ((item, errors.get(entry.get("image_path") or "")) for item, entry in item_meta.items())
    return {f"item {item}": (type(error).__name__, str(error)) for item, error in items if error is not None}


def _samples_without(config: TrainConfig, data: TrainingData, unreadable: Mapping[str, tuple[str, str]]) -> RunSamples:
    try:
        return choose_samples(config, data)
    except UserError as error:
        item, (_, reason) = next(iter(unreadable.items()), ("none", ("", "")))
        problem = f"{len(unreadable):,} pictures cannot be read ({item}: {reason}); {error.problem}"
        raise UserError(problem, error.remedy) from None


def _fetch_pictures(urls: Sequence[str], world: int) -> dict[str, str | None]:
    """Local copies, None where there is no such picture.

    All of them before training begins: the loader's processes are forks, and storage clients do not survive a fork.
    """
    import ray.train
    import torch.distributed as dist

    def local(url: str) -> str | None:
        try:
            return str(fetch(url))
        except FileNotFoundError:
            return None

    if world > 1 and ray.train.get_context().get_local_rank() > 0:
        dist.barrier()  # the first worker of this node fetches for all
    copies = dict(zip(urls, several(local, urls, at_once=True), strict=True))
    if world > 1 and ray.train.get_context().get_local_rank() == 0:
        dist.barrier()
    return copies


def staging_folder(out: Location) -> Path:
    """Where checkpoints are written before they are reported."""
    if isinstance(out, Path):
        return out / ".staging"
    return cache_folder() / "staging" / hashlib.sha256(str(out).encode()).hexdigest()[:16]


def _reporter(home: Location, staging: Path) -> Callable[[dict[str, Any], Write], None]:
    """Hands evaluations to Ray Train, in whose thread a checkpoint is written: an evaluation counts once it is."""

    def report(metrics: dict[str, Any], write: Write) -> None:
        import ray.train

        folder = staging / write.name
        folder.mkdir(parents=True, exist_ok=True)

        def written(checkpoint: Any, name: str) -> Any:
            return write.to(folder, lambda: _move(folder, home / name))

        ray.train.report(
            metrics | {"checkpoint": f"{home.name}/{write.name}"},
            checkpoint=ray.train.Checkpoint.from_directory(str(folder)),
            checkpoint_dir_name=write.name,
            checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
            checkpoint_upload_fn=written,
        )

    return report


def _move(source: Path, target: Location) -> Any:
    """Move files of this rank into the checkpoint folder: by renaming on one disk, else by copying."""
    import ray.train

    if isinstance(target, BucketPath):
        upload_tree(source, target)
        shutil.rmtree(source)
        return ray.train.Checkpoint(target.in_file_system, filesystem=target.file_system)
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(path for path in source.rglob("*") if path.is_file()):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(str(file), place)
    shutil.rmtree(source)
    return ray.train.Checkpoint.from_directory(str(target))


class Progress:
    """Shows the driver what this worker does, through a small file in the run folder; a failed write is no error."""

    def __init__(self, folder: Location | None, timeline: Timeline | None = None) -> None:
        self._path = None if folder is None else folder / PROGRESS_FILE
        self._timeline = timeline
        self._last: dict[str, Any] = {}
        self._written = 0.0

    def say(self, line: str) -> None:
        """Have the driver print a line, once."""
        self(said=[*self._last.get("said", []), line], note=self._last.get("note", ""))

    def __call__(self, **facts: Any) -> None:
        """Update what is shown."""
        if self._path is None:
            return
        self._last |= facts | {"time": time.time()}
        if self._timeline is not None:
            self._last["timeline"] = self._timeline.handed_on()
        try:
            if isinstance(self._path, BucketPath):
                if "note" in facts or time.monotonic() - self._written >= PROGRESS_S:
                    self._path.write_bytes(json.dumps(self._last).encode())
                    self._written = time.monotonic()
                return
            draft = self._path.with_suffix(".tmp")
            draft.write_text(json.dumps(self._last), encoding="utf-8")
            os.replace(draft, self._path)
        except (OSError, UserError):
            self._path = None
