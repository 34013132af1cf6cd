"""transformers' `Trainer`, fed with whole optimizer steps: exact losses, validation by ranking, plain checkpoints."""

from __future__ import annotations

import json
import math
import os
import tempfile
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
from accelerate import DistributedDataParallelKwargs
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from vlrank.config import TrainConfig
from vlrank.engines.packed_live import score_rows
from vlrank.engines.packed_model import Unsuited
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
from vlrank.training.pictures import FeatureEncoder
from vlrank.training.saving import Saver, Write, restore_optimizer, restore_weights, set_random_states
from vlrank.training.selection import improves, logged_selections, patience_spent, selection_value
from vlrank.training.sharding import prefetch_layers
from vlrank.training.state import SavedState, StateReader
from vlrank.training.timeline import Timeline, as_result
from vlrank.training.validation import encode_samples, rank_metrics, target_ranks, validation_scores

_ROUNDING = 0.2
"""In nat: two ways of the same arithmetic in bfloat16 were up to 0.08 apart on an H100."""


@dataclass(slots=True)
class Outcome:
    """Result of a finished training loop.

    Attributes:
        steps: Optimizer steps done.
        epochs: Epochs begun.
        stopped_early: The epoch at which patience ran out, or None.
        samples_per_s: Training samples per second over all ranks while the run learns and waits for batches, without
            its first step and what is compiled later.
        tokens_per_s: The same for tokens.
        loader_wait: Share of this time spent waiting for batches.
        padding: Share of padding among the tokens computed.
        peak_memory_gib: Largest GPU memory of this rank; 0 on a CPU.
        planned_memory_gib: What was predicted.
        inserted: Share of samples whose target had to be added to a retriever's candidates.
        bad: (user, error type, message) of rows that could not be used.
        timeline: `Timeline.handed_on` of this rank.
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
    timeline: dict[str, Any]


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
        committed: Step up to which the run has its evaluations and checkpoints already.
        timeline: Of this process; default a new one.
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
        committed: int = 0,
        timeline: Timeline | None = None,
    ) -> None:
        self.config, self.base, self.run_samples = config, base, run_samples
        self.head, self.steps = trainable.head, steps
        self._encoder, self._memory_plan, self._say = validation_encoder, memory_plan, say
        self._read_tokens, self._recompute = memory_plan.read_tokens, memory_plan.recompute
        self._validation_prompts: list[Any] | None = None
        self._validates_in_rows: bool | None = None
        self.timeline = timeline or Timeline()
        self.saver = Saver(self, committed)
        self.begun_write: Write | None = None
        self._reader: Any = None
        self._steps_made, self._compiled = 0, 0.0
        self._padding = self._inserted = self._samples = self._tokens = 0
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
            callbacks=[StopEarly(config.patience), *([Prefetch()] if config.parallel == "fsdp2" else [])],
        )
        self.remove_callback(PrinterCallback)
        self._counts: tuple[Any, torch.device] | None = None
        if self.args.world_size > 1:
            self._counts = group_for_counts(self.args.device)

    def _build_accelerator_args(self, **given: Any) -> dict[str, Any]:
        """Gradients of whole copies are reduced where they are, without a copy into buckets and back."""
        made = super()._build_accelerator_args(**given)
        for handler in made["kwargs_handlers"]:
            if isinstance(handler, DistributedDataParallelKwargs):
                handler.gradient_as_bucket_view = True
        return made

    # ---- data -------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> StepLoader:
        """Steps of this rank; not sharded again."""
        return StepLoader(self.steps, self.config.loader_workers or 0, pin_memory=self.args.device.type == "cuda")

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Fetch the next step; the device waits for it."""
        if self._steps_made == 0:  # with everything that happens once
            self.timeline.enter("compilation")
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._steps_made == 1:
            if self.args.device.type == "cuda":
                torch.cuda.synchronize()
            self.timeline.enter("learning")
        with self.timeline.during("waiting for data"):
            return super().get_batch_samples(epoch_iterator, num_batches, device)

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
        self._count(inputs)
        for user, kind, message in inputs["bad"]:
            self.bad[str(user)] = (kind, message)
        return loss

    def _count(self, step: dict[str, Any]) -> None:
        """Count the work of a step on this rank; of the first one, which compiles and allocates, nothing."""
        self._steps_made += 1
        compiled = compile_seconds() if self.config.compile else 0.0
        if self._steps_made > 1:
            self._samples += step["samples"]
            self._tokens += step["tokens"]
            self._padding += step["padding"]
            self._inserted += step["inserted"]
            world = self.args.world_size
            self.timeline.count(step["samples"] * world, step["tokens"] * world)  # made exact by `outcome`
            if compiled > self._compiled:
                self.timeline.move(compiled - self._compiled, "compilation")
        self._compiled = compiled

    def _learn(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        micro, world = inputs["micro"], self.args.world_size
        # Nothing here may wait for the GPU, which would be idle while the next kernels are launched.
        counts = self._of_all_ranks([inputs["answers"], len(micro)])
        scale = world / max(1, sum(answers for answers, _ in counts))
        # Sharded weights are gathered by all ranks together: all make as many passes as the busiest one.
        repeats = max(passes for _, passes in counts) - len(micro) if self.config.parallel == "fsdp2" else 0
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

    def _of_all_ranks(self, counts: list[int]) -> list[list[int]]:
        """The counts of every rank."""
        if self._counts is None:
            return [counts]
        group, device = self._counts
        own = torch.tensor(counts, device=device)
        gathered = [torch.zeros_like(own) for _ in range(self.args.world_size)]
        dist.all_gather(gathered, own, group=group)
        return [part.tolist() for part in gathered]

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
        self._check_gradients()  # waits for the last step
        with self.timeline.during("validation"):
            metrics = self._validate()
        prefixed = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.log(prefixed)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, prefixed)
        return prefixed

    def _validate(self) -> dict[str, float]:
        begun = time.perf_counter()
        rank, world = self.args.process_index, self.args.world_size
        if self.config.parallel == "fsdp2":
            # Sharded weights are gathered by all ranks together: all must make the same passes, so all rank everybody.
            rank, world = 0, 1
        own = self.run_samples.validation[rank::world]
        if self._validation_prompts is None:
            self._validation_prompts, bad = encode_samples(own, self.run_samples.item_meta, self._encoder)
            self.bad |= {f"{user} (validation)": (error, message) for user, error, message in bad}
        priors = None
        if self.config.resolved_ranking.popularity_prior:
            priors = [log_prior(self.run_samples.item_meta[item] for item in sample.candidates) for sample in own]
        with self.compute_loss_context_manager():
            scores = self._validation_scores()
        ranks = np.stack([target_ranks(own, scores, priors), target_ranks(own, scores)])
        if world > 1:
            parts: list[Any] = [None] * world
            dist.all_gather_object(parts, ranks.tolist())
            ranks = np.concatenate([np.asarray(part) for part in parts], axis=1)
        metrics = rank_metrics(ranks[0], self.metric_names)
        # Without the prior, by which even a model that guesses would put many targets first.
        metrics["answered"] = float((ranks[1] == 1).mean())
        metrics["selection"] = selection_value(metrics[self.run_samples.metric], self.state.global_step)
        metrics["seconds"] = time.perf_counter() - begun
        return metrics

    def _validation_scores(self) -> list[Any]:
        """Scores of the validation prompts, in smaller passes where memory runs out."""
        assert self._validation_prompts is not None
        if self._validates_in_rows is None:
            self._validates_in_rows = self._rows_agree([prompt for prompt in self._validation_prompts if prompt][:2])
        score = self._score_rows if self._validates_in_rows else self._score_plainly
        while True:
            try:
                return validation_scores(self._validation_prompts, score, self._read_tokens)
            except torch.OutOfMemoryError:
                if self._read_tokens <= 1024 or self.args.world_size > 1:
                    raise
            self._read_tokens //= 2
            torch.cuda.empty_cache()

    def _read_model(self) -> Any:
        return self.accelerator.unwrap_model(self.model) if self.config.parallel == "ddp" else self.model

    def _score_rows(self, prompts: list[Any]) -> list[Any]:
        features = isinstance(self._encoder, FeatureEncoder)
        return score_rows(self._read_model(), self._encoder, prompts, features=features, rows_only=self.base.unsloth)

    def _score_plainly(self, prompts: list[Any]) -> list[Any]:
        # Unsloth's attention knows only causal rows; everything else reads the whole trie in one pass.
        return score_labels(self._read_model(), self._encoder, prompts, tree=not self.base.unsloth)

    def _rows_agree(self, prompts: list[Any]) -> bool:
        """Whether this model is validated through packed rows.

        Where Unsloth has replaced the model's code, a few scores of both ways are compared first.
        """
        if self.steps.pack_tokens is None or core(self.model).config.model_type not in PACKED_ARCHITECTURES:
            return False
        if not self.base.unsloth:
            return True
        try:
            pairs = zip(self._score_rows(prompts), self._score_plainly(prompts), strict=True)
            return all(np.abs(a - b).max(initial=0.0) < _ROUNDING for a, b in pairs)
        except Unsuited:
            return False

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

    def resume(self, state: SavedState) -> None:
        """Go on from a saved state, to the end."""
        reader = StateReader(state, self.args.process_index, self.args.world_size)
        self._reader = reader
        with tempfile.TemporaryDirectory(prefix="vlrank-resume-") as folder:
            (Path(folder) / "trainer_state.json").write_text(json.dumps(state.trainer), encoding="utf-8")
            self.train(resume_from_checkpoint=folder)
        reader.close()

    def is_over(self, state: SavedState) -> bool:
        """Whether the run that saved this state had come to its end; then its outcome is taken over."""
        over = state.finished or patience_spent(logged_selections(state.trainer["log_history"]), self.config.patience)
        if over:
            self.state = TrainerState(**state.trainer)
        return over

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with self.timeline.during("checkpoints"):
            restore_weights(self, self._reader)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            with self.timeline.during("checkpoints"):
                restore_optimizer(self, self._reader)

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (saved := self._reader.part("scaler")) is not None:
            self.accelerator.scaler.load_state_dict(saved)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None and (saved := self._reader.own("rng")) is not None:
            set_random_states(saved, self.args.device)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Begin a checkpoint; `ReportCallback` has it written."""
        with self.timeline.during("checkpoints"):
            self._check_gradients()
            self.begun_write = self.saver.begin()

    # ---- outcome ----------------------------------------------------------------------------------------------------

    def speed(self) -> tuple[float, float]:
        """Samples per second on all ranks, and the share of time that this rank waits for its loader, so far."""
        made = as_result(self.timeline.attempts[-1:])
        return made["samples_per_s"], made["loader_wait"]

    def outcome(self) -> Outcome:
        """What happened, gathered from all ranks."""
        world, timeline = self.args.world_size, self.timeline
        bad = [(user, error, message) for user, (error, message) in self.bad.items()]
        sums = [self._samples, self._tokens, self._padding, self._inserted]
        if world > 1:
            parts: list[Any] = [None] * world
            dist.all_gather_object(parts, (bad, sums))
            bad = [row for rows, _ in parts for row in rows]
            sums = [sum(values) for values in zip(*(numbers for _, numbers in parts), strict=True)]
        samples, tokens, padding, inserted = sums
        timeline.count(samples - self._samples * world, tokens - self._tokens * world)
        speed = as_result(timeline.attempts[-1:])
        cuda = self.args.device.type == "cuda"
        stopped = self.state.global_step < self.state.max_steps
        return Outcome(
            steps=self.state.global_step,
            epochs=math.ceil(self.state.epoch or 0),
            stopped_early=math.ceil(self.state.epoch or 0) if stopped else None,
            samples_per_s=speed["samples_per_s"],
            tokens_per_s=speed["tokens_per_s"],
            loader_wait=speed["loader_wait"],
            padding=padding / max(1.0, tokens + padding),
            peak_memory_gib=torch.cuda.max_memory_allocated() / GIB if cuda else 0.0,
            planned_memory_gib=self._memory_plan.peak / GIB if cuda else 0.0,
            inserted=inserted / max(1.0, samples),
            bad=bad,
            timeline=timeline.handed_on(),
        )


def compile_seconds() -> float:
    """Seconds that torch.compile has taken in this process."""
    from torch._dynamo.utils import calculate_time_spent

    return float(calculate_time_spent()["total_wall_time"])


def group_for_counts(device: torch.device) -> tuple[Any, torch.device]:
    """The group of all ranks that exchanges numbers on the host, and where these have to be: all ranks call it.

    GPUs may then still be at work on the last step. Between nodes it is the GPUs that exchange them: which network
    would serve the hosts is not known.
    """
    if dist.get_backend() == "gloo":
        return dist.group.WORLD, torch.device("cpu")
    if os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE"):
        return dist.new_group(backend="gloo"), torch.device("cpu")
    return dist.group.WORLD, device


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


class StopEarly(TrainerCallback):
    """Stops a run whose last evaluations were no improvement."""

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Compare the evaluation with those before."""
        if patience_spent(logged_selections(state.log_history), self._patience):
            control.should_training_stop = True


class Prefetch(TrainerCallback):
    """Has the weights of the next layer gathered while a sharded layer is computed."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """When the model is sharded."""
        prefetch_layers(model)


class ReportCallback(TrainerCallback):
    """After every saved checkpoint: hand metrics and files to Ray Train; meanwhile: show progress.

    Args:
        trainer: Whose checkpoints they are.
        report: Called on every rank with the metrics and the checkpoint, which it has written.
        progress: Called on rank 0 with the step and the latest loss, at most once a second.
    """

    def __init__(
        self,
        trainer: RerankTrainer,
        report: Callable[[dict[str, Any], Write], None],
        progress: Callable[[int, float | None], None],
    ) -> None:
        self._trainer, self._report, self._progress = trainer, report, progress
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
        self._loss.clear()
        trainer, write = self._trainer, self._trainer.begun_write
        trainer.begun_write = None
        if write is None:  # a step that is made again
            return
        metric = trainer.run_samples.metric
        metrics = {
            "epoch": math.ceil(round(state.epoch or 0, 6)),
            "epochs_done": round(state.epoch or 0, 6),
            "step": state.global_step,
            "loss": float(np.mean(losses)) if losses else float("nan"),
            **{name: self._evaluated[name] for name in trainer.metric_names},
            "selection": self._evaluated["selection"],
            "metric": metric,
            "value": self._evaluated[metric],
            "best": improves(logged_selections(state.log_history)),
            "validation_s": round(self._evaluated["seconds"], 3),
            "last": control.should_training_stop or state.global_step >= state.max_steps,
            "guessing": bool(losses)
            and trainer.guesses(float(np.mean(losses[len(losses) // 2 :])), self._evaluated["answered"]),
        }
        with trainer.timeline.during("checkpoints"):
            self._report(metrics, write)
        if state.is_world_process_zero:
            self._progress(state.global_step, losses[-1] if losses else None)
