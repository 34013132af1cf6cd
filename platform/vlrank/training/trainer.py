"""transformers' `Trainer`, fed with whole optimizer steps: exact losses, validation by ranking, plain checkpoints."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlrank.config import TrainConfig
from vlrank.data.tables import DiskFull, disk_errors
from vlrank.engines.packed_live import score_rows
from vlrank.engines.resources import GIB, PACKED_ARCHITECTURES
from vlrank.engines.structure import core
from vlrank.engines.transformers_scorer import score_labels
from vlrank.errors import UserError
from vlrank.prompting.prior import log_prior
from vlrank.training.answers import token_losses
from vlrank.training.batches import StepLoader, Steps, fields_of, to_device
from vlrank.training.collate import ANSWER_ROOM
from vlrank.training.data import RunSamples
from vlrank.training.memory import MemoryPlan
from vlrank.training.model import Base, Trainable, recompute_layers
from vlrank.training.optim import MasterAdamW
from vlrank.training.selection import improves, logged_selections, patience_spent, selection_value
from vlrank.training.validation import encode_samples, rank_metrics, target_ranks, validation_scores

CHECKPOINT_FILE = "vlrank.json"
"""In every checkpoint: mode, ranking settings, base model, family and method: enough to rank with it."""


@dataclass(slots=True)
class Outcome:
    """Result of a finished training loop.

    Attributes:
        steps: Optimizer steps done.
        epochs: Epochs begun.
        stopped_early: The epoch at which patience ran out, or None.
        samples_per_s: Training samples per second over all ranks, validation left out.
        tokens_per_s: The same for tokens.
        loader_wait: Share of training time spent waiting for batches.
        padding: Share of padding among the tokens computed.
        peak_memory_gib: Largest GPU memory of this rank; 0 on a CPU.
        planned_memory_gib: What was predicted.
        inserted: Share of samples whose target had to be added to a retriever's candidates.
        bad: (user, error type, message) of rows that could not be used.
    """

    steps: int
    epochs: int
    stopped_early: int | None
    samples_per_s: float
    tokens_per_s: float
    loader_wait: float
    padding: float
    peak_memory_gib: float
    planned_memory_gib: float
    inserted: float
    bad: list[tuple[str, str, str]]


class RerankTrainer(Trainer):
    """Learns answers, validates by ranking.

    One item of its data loader is one rank's share of one optimizer step: a list of micro-batches. So the global batch
    never depends on the number of devices or on how rows are packed, and gradients are those of the mean over all
    learned tokens of the step, wherever they were computed.

    Args:
        trainable: From `load_trainable`.
        args: `TrainingArguments`; accumulation, sampling and collation settings there are not used.
        config, base, run_samples: The run.
        steps: The training data.
        validation_encoder: Encodes validation prompts (in raw_image with ``train_inputs: caption`` they differ).
        memory_plan: How the run fits the device.
        say: Shows the user a line.
    """

    optimizer: torch.optim.Optimizer | None
    control: TrainerControl

    def __init__(
        self,
        trainable: Trainable,
        args: TrainingArguments,
        *,
        config: TrainConfig,
        base: Base,
        run_samples: RunSamples,
        steps: Steps,
        validation_encoder: Any,
        memory_plan: MemoryPlan,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.base, self.run_samples = config, base, run_samples
        self.head, self.steps = trainable.head, steps
        self._encoder, self._memory_plan, self._say = validation_encoder, memory_plan, say
        self._read_tokens, self._recompute = memory_plan.read_tokens, memory_plan.recompute
        self._validation_prompts: list[Any] | None = None
        self._meter = _Meter()
        # Scaled losses of float16 overflow until their factor is found, which is halved each time.
        self._stability = Stability(math.log(len(trainable.encoder.tokenizer)), overflows=24 if args.fp16 else 0)
        self._norm: tuple[int, Callable[[], float]] | None = None
        self.bad: dict[str, tuple[str, str]] = {}
        super().__init__(
            model=trainable.model,
            args=args,
            train_dataset=steps,
            eval_dataset=run_samples.validation,
            processing_class=trainable.processor,
            callbacks=[StopEarly(config.patience)],
        )
        self.remove_callback(PrinterCallback)

    # ---- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> StepLoader:
        """Steps of this rank; not sharded again."""
        return StepLoader(self.steps, self.config.loader_workers or 0, pin_memory=self.args.device.type == "cuda")

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the next step and measure how long the device waits for it."""
        begun = time.perf_counter()
        result = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._meter.waited(time.perf_counter() - begun)
        return result

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        inputs["micro"] = [to_device(batch, self.args.device) for batch in inputs["micro"]]
        return inputs

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Not estimated: transformers' formula counts one padded batch per step."""
        return 0

    # ---- learning ---------------------------------------------------------------------------------------------------

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward over the micro-batches of a step, which is repeated in smaller ones if memory runs out.

        Returns:
            This rank's part of the mean loss per learned token, scaled so that the mean over ranks is the loss.
        """
        model.train()
        if inputs["halvings"] < self.steps.halvings:  # made ahead, before passes became smaller
            inputs = self._made_again()
        while True:
            try:
                loss = self._learn(model, self._prepare_inputs(inputs))
                break
            except torch.OutOfMemoryError as error:
                together, full = inputs["together"], error.with_traceback(None)
            # Outside the handler: what the failed pass had kept is free now.
            inputs = self._smaller_step(model, together, full)
        self._meter.did(inputs)
        for user, kind, message in inputs["bad"]:
            self.bad[str(user)] = (kind, message)
        return loss

    def _learn(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        micro, world = inputs["micro"], self.args.world_size
        # Nothing here may wait for the GPU, which would be idle while the next kernels are launched.
        scale: Any = world / max(1, inputs["answers"])
        repeats = 0
        if world > 1:
            counts = torch.tensor([inputs["answers"], len(micro)]).to(self.args.device, non_blocking=True)
            dist.all_reduce(counts[:1])
            scale = world / counts[0].clamp(min=1)
            if self.config.parallel == "fsdp2":
                # Sharded weights are gathered by all ranks together: all make as many passes as the busiest one.
                dist.all_reduce(counts[1:], op=dist.ReduceOp.MAX)
                repeats = int(counts[1]) - len(micro)
        work = [(batch, inputs["answers"] > 0) for batch in micro] + [(micro[-1], False)] * repeats
        loss = torch.zeros((), device=self.args.device)
        for i, (batch, counted) in enumerate(work):
            last = i == len(work) - 1
            with nullcontext() if last or world == 1 else self.accelerator.no_sync(model):
                with self.compute_loss_context_manager():
                    part = token_losses(model, self.head, batch).sum() * scale
                    part = part if counted else part * 0.0  # keeps the output connected to the model
                self.accelerator.backward(part)
            loss += part.detach()
        return loss

    def _smaller_step(self, model: Any, together: int, error: Exception) -> dict[str, Any]:
        """The step that ran out of memory once more, in passes of half the size, or with recomputed layers.

        Raises:
            UserError: nothing is left to give up, or other ranks have finished the step's collectives.
        """
        at = f"step {self.state.global_step + 1}"
        if self.args.world_size > 1 or (together == 1 and (self._recompute or self.base.unsloth)):
            raise device_full(self.config, self.base, at, self.steps.pack_tokens) from error
        model.zero_grad(set_to_none=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if together > 1:
            if not self.steps.halvings:
                self._say(f"GPU memory ran out at {at}: this and all later steps are made in passes of half the size")
            self.steps.halve()
        else:
            self._say(f"GPU memory ran out at {at}: layers are recomputed in the backward pass from now on")
            recompute_layers(self.accelerator.unwrap_model(model))
            self._recompute = True
        return self._made_again()

    def _made_again(self) -> dict[str, Any]:
        return fields_of([self.steps[self.state.global_step]])

    def _clip_grad_norm(self, model: Any) -> Any:
        # Called once per step, when all gradients are computed. Waiting for their norm would leave the GPU idle until
        # the next step is launched, so the norm of the previous step is checked.
        norm = super()._clip_grad_norm(model)
        whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # sharded gradients have a sharded norm
        self._check_gradients()
        self._norm = self.state.global_step + 1, _read_later(whole)
        return whole

    def _check_gradients(self) -> None:
        """Check the last unchecked norm; a step's weights must not be saved before this."""
        if self._norm is not None:
            (step, read), self._norm = self._norm, None
            self._stability.check_gradients(read(), step)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Besides logging, stop a run whose loss explodes."""
        if "loss" in logs:
            self._meter.loss = logs["loss"]
            self._stability.check_loss(logs["loss"], self.state.global_step)
        super().log(logs, start_time)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """AdamW with float32 masters where weights are bfloat16; see `TrainConfig.optim` for the others."""
        if self.optimizer is None and self.config.optim in ("auto", "adamw") and self.config.parallel == "ddp":
            trained = [p for p in (model or self.model).parameters() if p.requires_grad]
            if any(p.dtype == torch.bfloat16 for p in trained):
                decayed = set(self.get_decay_parameter_names(model or self.model))
                named = [(n, p) for n, p in (model or self.model).named_parameters() if p.requires_grad]
                groups = [
                    {"params": [p for n, p in named if n in decayed], "weight_decay": self.args.weight_decay},
                    {"params": [p for n, p in named if n not in decayed], "weight_decay": 0.0},
                ]
                self.optimizer = MasterAdamW(groups, lr=self.args.learning_rate)
                return self.optimizer
        return super().create_optimizer(model)

    # ---- validation -------------------------------------------------------------------------------------------------

    @property
    def metric_names(self) -> list[str]:
        """Metrics of every evaluation; the selecting one is among them."""
        return list(dict.fromkeys(["recall@1", "recall@5", "recall@10", "ndcg@10", "mrr@10", self.run_samples.metric]))

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Rank the validation users' candidates, each rank its share of the users."""
        begun = time.perf_counter()
        self._check_gradients()
        rank, world = self.args.process_index, self.args.world_size
        if self.config.parallel == "fsdp2":
            # Sharded weights are gathered by all ranks together: all must make the same passes, so all rank everybody.
            rank, world = 0, 1
        own = self.run_samples.validation[rank::world]
        if self._validation_prompts is None:
            self._validation_prompts, bad = encode_samples(own, self.run_samples.item_meta, self._encoder)
            self.bad |= {f"{user} (validation)": (error, message) for user, error, message in bad}
        model = self.accelerator.unwrap_model(self.model) if self.config.parallel == "ddp" else self.model

        kind = core(model).config.model_type

        def score(prompts: list[Any]) -> list[Any]:
            if self.steps.pack_tokens is not None and kind in PACKED_ARCHITECTURES:
                return score_rows(model, self._encoder, prompts)
            # Unsloth's attention knows only causal rows; everything else reads the whole trie in one pass.
            return score_labels(model, self._encoder, prompts, tree=not self.base.unsloth)

        priors = None
        if self.config.resolved_ranking.popularity_prior:
            priors = [log_prior(self.run_samples.item_meta[item] for item in sample.candidates) for sample in own]
        with self.compute_loss_context_manager():
            scores = self._validation_scores(score)
        ranks = np.stack([target_ranks(own, scores, priors), target_ranks(own, scores)])
        if world > 1:
            parts: list[Any] = [None] * world
            dist.all_gather_object(parts, ranks.tolist())
            ranks = np.concatenate([np.asarray(part) for part in parts], axis=1)
        metrics = rank_metrics(ranks[0], self.metric_names)
        # Without the prior, by which even a model that guesses would put many targets first.
        metrics["answered"] = float((ranks[1] == 1).mean())
        metrics["selection"] = selection_value(metrics[self.run_samples.metric], self.state.global_step)
        self._meter.paused(time.perf_counter() - begun)
        metrics["seconds"] = time.perf_counter() - begun
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(prefixed)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, prefixed)
        return prefixed

    def _validation_scores(self, score: Callable[[list[Any]], list[Any]]) -> list[Any]:
        """Scores of the validation prompts, in smaller passes where memory runs out."""
        assert self._validation_prompts is not None
        while True:
            try:
                return validation_scores(self._validation_prompts, score, self._read_tokens)
            except torch.OutOfMemoryError:
                if self._read_tokens <= 1024 or self.args.world_size > 1:
                    raise
            self._read_tokens //= 2
            torch.cuda.empty_cache()

    def guesses(self, loss: float, answered: float) -> bool:
        """Whether neither loss nor validation distinguishes this model from one that guesses a number.

        A model that knows only the form of answers has a loss of ln(candidates) per answer (2.996 with 20). Hard
        negatives alone can keep a model there, and the loss per token does not make it obvious.

        Args:
            loss: Recent mean loss per learned token.
            answered: Share of the validation users whose target the model itself puts first.
        """
        if self.config.loss != "answer":
            return False
        n = self.config.negatives + 1
        chance = math.log(n) / float(np.mean([len(label) for label in self._encoder.trie(n).labels]))
        noise = 2 * math.sqrt((n - 1) / n**2 / len(self.run_samples.validation))
        return loss >= 0.98 * chance and answered <= 1 / n + noise

    # ---- checkpoints ------------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        types = {name: parameter.dtype for name, parameter in self.model.named_parameters()}
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        # PEFT makes bfloat16 adapters float32 when it loads them; the optimizer would then forget its float32 masters.
        for name, parameter in self.model.named_parameters():
            parameter.data = parameter.data.to(types[name])

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        try:
            with disk_errors(self.config.out):
                super()._save_checkpoint(model, trial)
        except DiskFull as error:
            shutil.rmtree(self.args.output_dir, ignore_errors=True)
            kept = self.config.save_total_limit
            more = f" A run keeps up to {kept} checkpoints while it writes the next one (save_total_limit={kept})."
            raise DiskFull(error.problem, f"{error.remedy}{more}") from error

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        self._check_gradients()
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)
        (folder / "training_args.bin").unlink(missing_ok=True)  # a pickle that nobody needs
        write_checkpoint_facts(folder, self.config, self.base)

    def has_stopped(self, checkpoint: Path) -> bool:
        """Whether the run that wrote this checkpoint had run out of patience; then its state is taken over."""
        state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
        stopped = patience_spent(logged_selections(state.log_history), self.config.patience)
        if stopped:
            self.state = state
        return stopped

    # ---- outcome ----------------------------------------------------------------------------------------------------

    def speed(self) -> tuple[float, float]:
        """Samples per second on all ranks, and the share of time that this rank waits for its loader, so far."""
        seconds = self._meter.seconds
        return (self._meter.samples * self.args.world_size / seconds, self._meter.wait / seconds) if seconds else (0, 0)

    def outcome(self) -> Outcome:
        """What happened, gathered from all ranks."""
        meter, world = self._meter, self.args.world_size
        bad = [(user, error, message) for user, (error, message) in self.bad.items()]
        sums = [float(meter.samples), float(meter.tokens), float(meter.padding), float(meter.inserted)]
        if world > 1:
            parts: list[Any] = [None] * world
            dist.all_gather_object(parts, (bad, sums))
            bad = [row for rows, _ in parts for row in rows]
            sums = [sum(values) for values in zip(*(numbers for _, numbers in parts), strict=True)]
        samples, tokens, padding, inserted = sums
        seconds = max(1e-9, meter.seconds)
        cuda = self.args.device.type == "cuda"
        stopped = self.state.global_step < self.state.max_steps
        return Outcome(
            steps=self.state.global_step,
            epochs=math.ceil(self.state.epoch or 0),
            stopped_early=math.ceil(self.state.epoch or 0) if stopped else None,
            samples_per_s=samples / seconds,
            tokens_per_s=tokens / seconds,
            loader_wait=meter.wait / seconds,
            padding=padding / max(1.0, tokens + padding),
            peak_memory_gib=torch.cuda.max_memory_allocated() / GIB if cuda else 0.0,
            planned_memory_gib=self._memory_plan.peak / GIB if cuda else 0.0,
            inserted=inserted / max(1.0, samples),
            bad=bad,
        )


def _read_later(value: torch.Tensor) -> Callable[[], float]:
    """Copy a scalar to the host without waiting for it; the result waits, and only for this copy."""
    if not value.is_cuda:
        return lambda: float(value)
    host = torch.empty((), dtype=value.dtype, pin_memory=True)
    host.copy_(value, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def read() -> float:
        copied.synchronize()
        return float(host)

    return read


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


def device_full(config: TrainConfig, base: Base, when: str, row: int | None = None) -> UserError:
    """The message for a full GPU: what to change, in the order of what it costs.

    Args:
        config, base: The run.
        when: Where it happened.
        row: Tokens of a packed row; None without packing.
    """
    changes = []
    longest = config.ranking.max_prompt_tokens + ANSWER_ROOM
    if row is not None:  # packed; micro-batches do not matter
        if row > longest:
            changes.append(f"pack_tokens={max(row // 2, longest)} (same result)")
    elif (config.micro_batch_size or config.batch_size) > 1:
        half = max(1, (config.micro_batch_size or config.batch_size) // 2)
        changes.append(f"micro_batch_size={half} (same result)")
    if config.loss == "all":
        changes.append("loss=answer (logits of the answer only)")
    if not config.gradient_checkpointing:
        changes.append("gradient_checkpointing=true (same result, about a third slower)")
    if config.optim in ("auto", "adamw") and base.method == "full":
        changes.append("optim=paged_adamw_8bit (8-bit moments)")
    if base.method == "full":
        changes.append("method=lora (adapts instead of training everything)")
    elif not base.in_4bit and base.family == "text":
        changes.append("load_in_4bit=true (4-bit base weights)")
    if config.mode == "raw_image":
        changes.append(f"ranking.max_image_pixels={config.ranking.max_image_pixels // 2} (smaller pictures)")
    changes.append(f"ranking.max_history={max(1, config.ranking.max_history // 2)} (shorter prompts)")
    return UserError(
        f"the GPU ran out of memory at {when}", "Change, in the order of least loss: " + "; ".join(changes) + "."
    )


class Stability:
    """Stops a run whose loss has diverged, instead of letting it run on for hours.

    Args:
        uniform: Loss per token of a model that knows nothing, ln(vocabulary).
        overflows: How many steps in a row may have infinite gradients: the optimizer leaves them out.
    """

    def __init__(self, uniform: float, overflows: int = 0) -> None:
        self._uniform, self._overflows, self._overflowed = uniform, overflows, 0
        self._recent: deque[float] = deque(maxlen=50)

    def check_gradients(self, norm: float, step: int) -> None:
        """Raises a `UserError` when gradients are not finite; all ranks see the same norm."""
        self._overflowed = 0 if math.isfinite(norm) else self._overflowed + 1
        if self._overflowed > self._overflows:
            raise UserError(
                f"the loss is not a number at step {step} (gradient norm {norm})",
                "Lower `lr`, raise `warmup_ratio`, or train in dtype: float32. The last good checkpoint is kept.",
            )

    def check_loss(self, loss: float, step: int) -> None:
        """Raises a `UserError` when the loss is far above both what it was and what guessing would give."""
        usual = float(np.median(self._recent)) if self._recent else loss
        if not math.isfinite(loss) or loss > 4 * max(usual, self._uniform):
            raise UserError(
                f"the loss exploded at step {step}: {loss:.3g}, after {usual:.3g} before",
                "Lower `lr` or `max_grad_norm`, or raise `warmup_ratio`. The last good checkpoint is kept.",
            )
        self._recent.append(loss)


class _Meter:
    """Counts the work of a rank without its first step, which compiles and allocates."""

    def __init__(self) -> None:
        self.samples = self.tokens = self.padding = self.inserted = 0
        self.wait = self._pause = 0.0
        self.loss: float | None = None
        self._begun: float | None = None

    @property
    def seconds(self) -> float:
        return 0.0 if self._begun is None else time.perf_counter() - self._begun - self._pause

    def waited(self, seconds: float) -> None:
        self.wait += seconds if self._begun is not None else 0.0

    def paused(self, seconds: float) -> None:
        self._pause += seconds if self._begun is not None else 0.0

    def did(self, step: dict[str, Any]) -> None:
        if self._begun is None:
            self._begun = time.perf_counter()
            return
        self.samples += step["samples"]
        self.tokens += step["tokens"]
        self.padding += step["padding"]
        self.inserted += step["inserted"]


class StopEarly(TrainerCallback):
    """Stops a run whose last evaluations were no improvement."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Compare the evaluation with those before."""
        if patience_spent(logged_selections(state.log_history), self._patience):
            control.should_training_stop = True


class ReportCallback(TrainerCallback):
    """After every saved checkpoint: hand metrics and files to Ray Train; meanwhile: show progress.

    Args:
        report: Called on every rank with the metrics and this rank's checkpoint folder.
        progress: Called on rank 0 with the step and the latest loss, at most once a second.
        metric: What selects the best checkpoint.
        metric_names: What is reported of an evaluation.
        guesses: `RerankTrainer.guesses`.
    """

    def __init__(
        self,
        report: Callable[[dict[str, Any], Path], None],
        progress: Callable[[int, float | None], None],
        metric: str,
        metric_names: list[str],
        guesses: Callable[[float, float], bool],
    ) -> None:
        self._report, self._progress, self._guesses = report, progress, guesses
        self._metric, self._names = metric, metric_names
        self._loss: list[tuple[int, float]] = []
        self._shown = 0.0
        self._evaluated: dict[str, float] = {}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Remember the training loss."""
        if logs and "loss" in logs:
            self._loss.append((state.global_step, logs["loss"]))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Show progress."""
        if state.is_world_process_zero and time.monotonic() - self._shown > 1:
            self._shown = time.monotonic()
            self._progress(state.global_step, self._loss[-1][1] if self._loss else None)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, metrics: Any = None, **_: Any
    ) -> None:
        """Remember the metrics until the checkpoint is saved."""
        self._evaluated = {name.removeprefix("eval_"): value for name, value in (metrics or {}).items()}

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report."""
        losses = [loss for _, loss in self._loss]
        metrics = {
            "epoch": math.ceil(round(state.epoch or 0, 6)),
            "epochs_done": round(state.epoch or 0, 6),
            "step": state.global_step,
            "loss": float(np.mean(losses)) if losses else float("nan"),
            **{name: self._evaluated[name] for name in self._names},
            "selection": self._evaluated["selection"],
            "metric": self._metric,
            "value": self._evaluated[self._metric],
            "best": improves(logged_selections(state.log_history)),
            "validation_s": round(self._evaluated["seconds"], 3),
            "guessing": bool(losses)
            and self._guesses(float(np.mean(losses[len(losses) // 2 :])), self._evaluated["answered"]),
        }
        self._loss.clear()
        self._report(metrics, Path(args.output_dir) / f"checkpoint-{state.global_step}")
