"""Checkpoints of a running training: copied to the host, written by a background thread while training goes on."""

from __future__ import annotations

import json
import random
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from vlrank.config import TrainConfig
from vlrank.data.tables import DiskFull, disk_errors
from vlrank.engines.resources import GIB
from vlrank.storage import Location, remove_tree
from vlrank.training.history import committed_step
from vlrank.training.model import Base
from vlrank.training.optim import MasterAdamW
from vlrank.training.sharding import second_names
from vlrank.training.state import Draft, StateReader, flatten, place_to_write, write_draft

CHECKPOINT_FILE = "vlrank.json"
"""In every checkpoint: mode, ranking settings, base model, family and method: enough to rank with it."""
LARGE_STATE = GIB
"""Bytes of a rank's share from which on a state is written only every ``resume_minutes``."""


@dataclass(slots=True)
class Write:
    """A checkpoint that is copied and not yet written.

    Attributes:
        name: ``checkpoint-STEP``.
        to: Writes this rank's share of the state to resume from, then its files of the checkpoint (all of them on
            rank 0, none on others) into a folder, and calls the second argument, which takes them from there. The
            write is done when this returns. Call it once, from any thread.
    """

    name: str
    to: Callable[[Path, Callable[[], Any]], Any]


class Saver:
    """Saves the checkpoints of a `RerankTrainer`, one at a time.

    Args:
        trainer: The trainer; its model, optimizer, scheduler and random generators are the state.
        committed: Step up to which evaluations and checkpoints are there already: a run that resumes from an older
            state makes these steps again and saves nothing.
    """

    def __init__(self, trainer: Any, committed: int) -> None:
        self._trainer, self.committed = trainer, committed
        self._running: Future[None] | None = None
        self._copies: dict[str, torch.Tensor] = {}
        self._still: dict[str, torch.Tensor] = {}  # copies of what training does not change
        self._state_at = time.monotonic()

    def begin(self) -> Write | None:
        """Copy what a checkpoint needs, as soon as the one before is written; None where it is there already.

        All ranks call it together.

        Raises:
            Exception: what the last write failed with.
        """
        trainer = self._trainer
        self.wait()
        step = trainer.state.global_step
        if step <= self.committed:
            return None
        weights = self._weights()
        decided = self._place_of_state(step)
        draft = None if decided is None else self._draft(step, *decided)
        weights, draft, in_background = self._on_host(weights, draft)
        done: Future[None] = Future()
        config, base, rank = trainer.config, trainer.base, trainer.args.process_index

        def write(folder: Path) -> None:
            with _disk_errors(config, folder):
                if draft is not None:
                    write_draft(draft, rank)
                folder.mkdir(parents=True, exist_ok=True)
                if weights is not None:
                    self._write_weights(folder, weights, config, base)

        def write_and_commit(folder: Path, commit: Callable[[], Any]) -> Any:
            try:
                if in_background:
                    write(folder)
                committed = commit()
            except BaseException as error:
                error.add_note(traceback.format_exc())  # exceptions travel without a traceback
                done.set_exception(error)
                raise
            done.set_result(None)
            return committed

        made = Write(f"checkpoint-{step}", write_and_commit)
        if not in_background:
            write(Path(trainer.args.output_dir) / made.name)
        self._running = done
        return made

    def wait(self) -> None:
        """Until the last checkpoint is written.

        Raises:
            Exception: what this failed with.
        """
        if self._running is not None:
            running, self._running = self._running, None
            running.result()

    # ---- weights ----------------------------------------------------------------------------------------------------

    def _weights(self) -> dict[str, torch.Tensor] | None:
        """The model's state dict on rank 0; sharded weights are gathered by all ranks."""
        trainer = self._trainer
        if trainer.config.parallel == "fsdp2":
            gathered: dict[str, torch.Tensor] = trainer.accelerator.get_state_dict(trainer.model)
            if not trainer.args.should_save:
                return None
            again = second_names(trainer.model)
            return {name: weight for name, weight in gathered.items() if name not in again}
        return dict(trainer.model.state_dict()) if trainer.args.should_save else None

    def _write_weights(self, folder: Path, weights: dict[str, torch.Tensor], config: TrainConfig, base: Base) -> None:
        dtype = kept_dtype(config)
        if dtype is not None:
            weights = {name: value.to(dtype) if value.is_floating_point() else value for name, value in weights.items()}
        self._trainer.accelerator.unwrap_model(self._trainer.model).save_pretrained(folder, state_dict=weights)
        if dtype is not None and (folder / "config.json").is_file():
            name_dtype(folder / "config.json", dtype)
        self._trainer.processing_class.save_pretrained(folder)
        write_checkpoint_facts(folder, config, base)
        for file in folder.glob("*.safetensors"):  # safetensors lets nobody else read what it writes
            file.chmod((folder / CHECKPOINT_FILE).stat().st_mode)

    # ---- the state --------------------------------------------------------------------------------------------------

    def _place_of_state(self, step: int) -> tuple[Location, str] | None:
        """Where the state goes, and a name of this write; None where it is not due. The same on all ranks."""
        trainer = self._trainer
        decided: list[Any] = [None]
        if trainer.args.process_index == 0:
            waited, minutes = time.monotonic() - self._state_at, trainer.config.resume_minutes
            long_ago = minutes != "never" and waited >= 60 * minutes
            if long_ago or state_bytes(trainer) < LARGE_STATE or self._over(step):
                out = trainer.config.out
                decided = [(place_to_write(out, committed_step(out)), uuid.uuid4().hex)]
        if trainer.args.world_size > 1:
            dist.broadcast_object_list(decided, src=0, device=trainer.args.device)
        if decided[0] is not None:
            self._state_at = time.monotonic()
        due: tuple[Location, str] | None = decided[0]
        return due

    def _over(self, step: int) -> bool:
        return bool(self._trainer.control.should_training_stop or step >= self._trainer.state.max_steps)

    def _draft(self, step: int, place: Location, write: str) -> Draft:
        trainer, rank, over = self._trainer, self._trainer.args.process_index, self._over(step)
        values: dict[str, Any] = {} if over else {"rng": random_states(trainer.args.device)}
        sharded = trainer.config.parallel == "fsdp2"
        if not over and (rank == 0 or sharded):
            values |= {"weights": trained_weights(trainer), "optimizer": trainer.optimizer.state_dict()}
        if not over and rank == 0:
            scaler = getattr(trainer.accelerator, "scaler", None)
            values |= {"scheduler": trainer.lr_scheduler.state_dict()}
            values |= {} if scaler is None else {"scaler": scaler.state_dict()}
        tree, tensors = flatten(values)
        facts = {"step": step, "world": trainer.args.world_size, "write": write, "finished": over}
        facts |= {"tree": dict(tree["dict"]), "trainer": asdict(trainer.state) if rank == 0 else None}
        return Draft(place, facts, tensors)

    # ---- copies -----------------------------------------------------------------------------------------------------

    def _on_host(
        self, weights: dict[str, torch.Tensor] | None, draft: Draft | None
    ) -> tuple[dict[str, torch.Tensor] | None, Draft | None, bool]:
        """Copies on the host, and True; where these find no room, what was given, and False."""
        state = {} if draft is None else {f"state{name}": value for name, value in draft.tensors.items()}
        changing, still = self._to_copy(weights or {})
        tensors = {**state, **changing, **({} if self._still else still)}
        needed = sum(value.nbytes for name, value in tensors.items() if name not in self._copies)
        free = 0.8 * free_host_memory()
        if needed > free:
            return weights, draft, False
        # The GPU copies into page-locked memory several times as fast. PyTorch rounds such memory up to a power of two.
        copied = self._copied(tensors, locked=2 * needed <= free)
        self._still = self._still or {name: copied[name] for name in still}
        if draft is not None:
            draft = replace(draft, tensors={name: copied[f"state{name}"] for name in draft.tensors})
        if weights is not None:
            weights = {**weights, **self._still, **{name: copied[name] for name in changing}}
        return weights, draft, True

    def _to_copy(self, weights: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """What training changes, and what it does not and a checkpoint holds all the same: a frozen vision tower."""
        if self._trainer.config.parallel == "fsdp2":  # gathered on the host
            return {}, {}
        trained = {weight.data_ptr() for weight in self._trainer.model.parameters() if weight.requires_grad}
        changing = {name: value for name, value in weights.items() if value.data_ptr() in trained}
        if self._trainer.base.method == "lora":
            return changing, {}
        return changing, {name: value for name, value in weights.items() if name not in changing}

    def _copied(self, tensors: Mapping[str, torch.Tensor], *, locked: bool = False) -> dict[str, torch.Tensor]:
        """Copies in memory that is taken once for all checkpoints; tied weights get one."""
        copies: dict[str, torch.Tensor] = {}
        places: dict[tuple[int, int], torch.Tensor] = {}
        for name, value in tensors.items():
            key = (value.data_ptr(), value.nbytes)
            if value.nbytes and key in places and places[key].shape == value.shape:
                copies[name] = places[key]
                continue
            known = self._copies.get(name)
            if known is None or known.shape != value.shape or known.dtype != value.dtype:
                known = self._copies[name] = _host_memory(value, locked=locked)
            known.copy_(value.detach(), non_blocking=True)
            copies[name] = places[key] = known
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.synchronize()
        return copies


def _host_memory(like: torch.Tensor, *, locked: bool) -> torch.Tensor:
    """Uninitialised memory on the host for a copy; page-locked, where the system allows it, for one of a GPU's."""
    if locked and like.is_cuda:
        with suppress(RuntimeError):
            return torch.empty(like.shape, dtype=like.dtype, pin_memory=True)
    return torch.empty(like.shape, dtype=like.dtype)


@contextmanager
def _disk_errors(config: TrainConfig, folder: Path) -> Iterator[None]:
    """A full disk leaves no half of a checkpoint, and the message says what a run keeps."""
    try:
        with disk_errors(config.out):
            yield
    except DiskFull as error:
        remove_tree(folder)
        kept = config.save_total_limit
        more = f" A run keeps up to {kept} checkpoints while it writes the next one (save_total_limit={kept})."
        raise DiskFull(error.problem, f"{error.remedy}{more}") from error


def kept_dtype(config: TrainConfig) -> torch.dtype | None:
    """The type of a checkpoint's weights where it differs from theirs in training.

    Sharded weights are float32 and compute in ``dtype``, in which a plain copy of the model has them. Scaled losses of
    float16 keep float32 weights: not every one of them is a float16 number.
    """
    return torch.bfloat16 if config.parallel == "fsdp2" and config.dtype == "bfloat16" else None


def name_dtype(file: Path, dtype: torch.dtype) -> None:
    """Have a model's config.json name the type of its weights."""
    name = str(dtype).removeprefix("torch.")

    def renamed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: name if key == "dtype" and entry else renamed(entry) for key, entry in value.items()}
        return value

    facts = renamed(json.loads(file.read_text(encoding="utf-8")))
    file.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def write_checkpoint_facts(folder: Path, config: TrainConfig, base: Base) -> None:
    """Write `CHECKPOINT_FILE`."""
    facts = {
        "mode": config.mode,
        "ranking": config.resolved_ranking.model_dump(mode="json"),
        "base_model": base.name,
        "family": base.family,
        "method": base.method,
    }
    (folder / CHECKPOINT_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


# ---- the state of a trainer ------------------------------------------------------------------------------------------


def trained_weights(trainer: Any) -> dict[str, torch.Tensor] | None:
    """Trained weights by name; None where the optimizer's float32 masters stand for them."""
    if isinstance(getattr(trainer.optimizer, "optimizer", trainer.optimizer), MasterAdamW):
        return None
    return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def state_bytes(trainer: Any) -> int:
    """Bytes of this rank's share of the state."""
    values = [value for state in trainer.optimizer.state.values() for value in state.values()]
    values += (trained_weights(trainer) or {}).values()
    return sum(_local(value).nbytes for value in values if isinstance(value, torch.Tensor))


def random_states(device: torch.device) -> dict[str, Any]:
    """The states of all random generators of this process."""
    of_numpy: dict[str, Any] = dict(np.random.get_state(legacy=False))
    of_numpy["state"] = {name: value.tolist() if name == "key" else value for name, value in of_numpy["state"].items()}
    states = {"python": random.getstate(), "numpy": of_numpy, "torch": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: Mapping[str, Any], device: torch.device) -> None:
    """Put back what `random_states` gave."""
    inner = states["numpy"]["state"]
    random.setstate(states["python"])
    np.random.set_state({**states["numpy"], "state": {**inner, "key": np.asarray(inner["key"], dtype=np.uint32)}})
    torch.set_rng_state(states["torch"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


def restore_weights(trainer: Any, reader: StateReader) -> None:
    """Put back `trained_weights`."""
    weights = reader.part("weights") or {}
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if name in weights:
                _local(weight).copy_(weights[name])


def restore_optimizer(trainer: Any, reader: StateReader) -> None:
    """Put back the optimizer and the schedule of the learning rate."""
    saved = reader.part("optimizer")
    parameters = [weight for group in trainer.optimizer.param_groups for weight in group["params"]]
    for number, state in saved["state"].items():
        weight = parameters[number]
        if hasattr(weight, "to_local"):
            saved["state"][number] = {
                name: _sharded_as(weight, value)
                if isinstance(value, torch.Tensor) and value.shape == _local(weight).shape
                else value
                for name, value in state.items()
            }
    trainer.optimizer.load_state_dict(saved)
    trainer.lr_scheduler.load_state_dict(reader.part("scheduler"))


def _sharded_as(weight: Any, share: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        share.to(weight.device), weight.device_mesh, weight.placements, shape=weight.shape, stride=weight.stride()
    )


def _local(tensor: Any) -> torch.Tensor:
    """This rank's share of a sharded tensor, which shares its memory; any other tensor itself."""
    local: torch.Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def free_host_memory() -> int:
    """Bytes that this process can still take, within the limit of its container."""
    free = psutil.virtual_memory().available
    try:
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        facts = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(facts["inactive_file"]) + int(facts["active_file"]))
    except (OSError, ValueError, KeyError):  # no such limit
        pass
    return max(0, free)
