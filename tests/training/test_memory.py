"""A run fits the card it is given: the plan, what is given up in which order, and running out all the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vlrank.config import TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.engines.resources import GIB
from vlrank.errors import UserError
from vlrank.training import trainer as trainer_file
from vlrank.training.answers import AnswerHead, token_losses
from vlrank.training.collate import Row, side_by_side
from vlrank.training.data import TrainingData
from vlrank.training.memory import MemoryPlan, Shape, TooLarge, Work, make_plan, with_gathered
from vlrank.training.model import Base, load_trainable, resolve_base
from vlrank.training.run import dry_run, with_defaults
from vlrank.training.settle import foreseen_work, record_used, settle, with_kept
from vlrank.training.trainer import RerankTrainer
from vlrank.training.worker import Progress, make_trainer

Make = Callable[..., TrainConfig]

# Qwen3-0.6B with LoRA (4-bit and bfloat16), Qwen3-VL-2B with LoRA and with everything but its tower trained.
SMALL = Shape(28, 1024, 2048, 1024, 3072, 151936, 1.202e9, 5_046_272, 10_092_544, 49_152)
SMALL_4BIT = replace(SMALL, weight_bytes=0.55e9)
VISION = Shape(28, 2048, 2048, 1024, 6144, 151936, 4.272e9, 8_716_288, 17_432_576, 98_304)
FULL = Shape(28, 2048, 2048, 1024, 6144, 151936, 4.255e9, 1_720_574_976, 3_441_149_952, 622_329_856, 311_164_928)
LONGEST = 4112


def work(shape: Shape, prompts: int, **changes: Any) -> Work:
    return Work(**{"shape": shape, "longest": LONGEST, "prompts": prompts, "fused": True, **changes})


@pytest.mark.parametrize(
    ("shape", "prompts", "tokens", "recompute", "optim", "measured"),
    [
        (SMALL, 8, 16384, False, "adamw", 21.1),
        (FULL, 8, 8192, False, "adamw", 42.0),
        (SMALL_4BIT, 8, 16384, False, "adamw", 19.6),
        (FULL, 16, LONGEST, True, "paged_adamw_8bit", 9.0),
        (FULL, 8, 3456, True, "adamw_8bit", 14.1),
    ],
)
def test_predictions_are_within_a_tenth_of_what_an_h100_took(
    shape: Shape, prompts: int, tokens: int, recompute: bool, optim: str, measured: float
) -> None:
    assert work(shape, prompts).peak(tokens, recompute, optim) / GIB == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "prompts", "card"),
    [(SMALL_4BIT, 32, 8), (VISION, 16, 12), (VISION, 8, 12), (FULL, 8, 16), (FULL, 16, 16)],
)
def test_every_mode_trains_at_its_batch_size_on_its_card(shape: Shape, prompts: int, card: int) -> None:
    for memory in [card, *(size for size in (8, 12, 16, 24, 40, 80) if size > card)]:
        made = make_plan(work(shape, prompts), 0.97 * memory * GIB)
        assert made.peak <= 0.92 * 0.97 * memory * GIB
        assert made.tokens >= LONGEST  # the longest prompt of an epoch may come late
        assert made.read_tokens >= LONGEST


def test_what_is_given_up_follows_the_order_of_least_loss() -> None:
    ways = [make_plan(work(FULL, 16), 0.97 * card * GIB) for card in (80, 40, 24, 16, 12)]
    assert [(way.recompute, way.optim) for way in ways] == [
        (False, "adamw"),
        (False, "adamw"),
        (True, "adamw_8bit"),
        (True, "adamw_8bit"),
        (True, "paged_adamw_8bit"),
    ]
    lengths = [make_plan(work(VISION, 16), card * GIB).tokens for card in (80, 40, 24)]
    assert lengths == sorted(lengths, reverse=True)


def test_what_the_user_has_set_is_not_changed() -> None:
    fixed = work(FULL, 16, optim="adamw", recompute=False)
    with pytest.raises(TooLarge, match=r"needs 3\d\.\d GiB .* the smallest card that could is one of 40 GiB"):
        make_plan(fixed, 24 * GIB)
    made = make_plan(work(VISION, 16, tokens=LONGEST), 80 * GIB)
    assert (made.tokens, made.recompute) == (LONGEST, False)
    assert make_plan(work(VISION, 16, recompute=True), 80 * GIB).recompute


def test_what_cannot_run_names_the_smallest_card_that_could() -> None:
    with pytest.raises(TooLarge, match=r"7\.8 GiB are free; the smallest card that could is one of 12 GiB"):
        make_plan(work(FULL, 16), 7.8 * GIB)
    with pytest.raises(TooLarge, match="no single card could"):
        make_plan(work(replace(FULL, weight_bytes=1e12), 16), 80 * GIB)


# ---- settings -------------------------------------------------------------------------------------------------------


def test_the_dry_run_shows_the_plan_and_refuses_what_does_not_fit(settings: Make) -> None:
    line = str(dry_run(settings("caption", gpu_memory_gib=8)).lines["GPU memory"])
    assert "tokens" in line
    assert "of 8.0 GiB" in line
    with pytest.raises(UserError, match="the smallest card that could"):
        dry_run(settings("caption", gpu_memory_gib=0.2))


def test_the_model_is_foreseen_as_it_is_loaded(settings: Make) -> None:
    from vlrank.training.memory import shape_of

    for mode, method in (("semantic_summary_small", "full"), ("caption", "lora"), ("caption", "full")):
        config = settings(mode, method=method, dtype="float32", gradient_checkpointing=False)
        base = resolve_base(config)
        foreseen = foreseen_work(config, base).shape
        assert foreseen == shape_of(load_trainable(config, base, torch.device("cpu")).model)


def test_config_yaml_names_what_a_run_used_and_a_continued_run_keeps_it(settings: Make) -> None:
    config = settings("caption")
    config.out.mkdir()
    base = resolve_base(config)
    used, _ = settle(with_defaults(config, base), base, torch.device("cpu"))
    record_used(used)
    saved = yaml.safe_load((config.out / "config.yaml").read_text())
    for key in ("model", "method", "backend", "load_in_4bit", "metric", "dtype", "optim", "packing", "compile"):
        assert saved[key] not in (None, "auto"), key
    assert saved["ranking"]["popularity_prior"] is False
    assert (saved["gradient_checkpointing"], saved["loader_workers"]) == (False, 0)
    (config.out / "config.yaml").write_text(yaml.safe_dump(saved | {"optim": "paged_adamw_8bit"}))
    assert with_kept(config, config.out).optim == "paged_adamw_8bit"
    assert with_kept(settings("caption", optim="adamw"), config.out).optim == "adamw"


# ---- when it was too much -------------------------------------------------------------------------------------------


def trainer_of(config: TrainConfig, shop: Dataset, said: list[str]) -> RerankTrainer:
    torch.manual_seed(config.seed)
    show = Progress(None)
    show.say = said.append  # type: ignore[method-assign]
    data = TrainingData.of_dataset(shop, "ground_truth")
    made = make_trainer(config, resolve_base(config), data, torch.device("cpu"), rank=0, world=1, show=show)
    made.args.save_strategy = "no"
    return made


def train(config: TrainConfig, shop: Dataset) -> tuple[dict[str, torch.Tensor], list[str]]:
    said: list[str] = []
    trainer = trainer_of(config, shop, said)
    trainer.train()
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}, said


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_that_runs_out_of_memory_is_repeated_in_smaller_passes(
    packing: bool, settings: Make, told_shop: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("semantic_summary_small", method="full", epochs=1, packing=packing, lr=1e-4)
    expected, _ = train(config, told_shop)
    passes: list[int] = []

    def full_device(model: Any, head: Any, batch: dict[str, Any]) -> torch.Tensor:
        losses = token_losses(model, head, batch)
        passes.append(batch["input_ids"].numel())
        if passes[-1] > 3000:
            raise torch.OutOfMemoryError("full")
        return losses

    monkeypatch.setattr(trainer_file, "token_losses", full_device)
    found, said = train(config, told_shop)
    assert max(passes) > 3000
    assert len(said) == 1
    assert "GPU memory ran out at step 1" in said[0]
    for name, weight in found.items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-5, msg=name)


def test_a_single_prompt_that_is_too_much_recomputes_its_layers_and_then_gives_up(
    settings: Make, told_shop: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings("semantic_summary_small", method="full", epochs=1, micro_batch_size=1)
    said: list[str] = []
    trainer = trainer_of(config, told_shop, said)

    def full_device(model: Any, head: Any, batch: dict[str, Any]) -> torch.Tensor:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(trainer_file, "token_losses", full_device)
    with pytest.raises(UserError, match="ran out of memory at step 1"):
        trainer.train()
    assert said == ["GPU memory ran out at step 1: layers are recomputed in the backward pass from now on"]
    assert trainer.model.is_gradient_checkpointing


# ---- cards without bfloat16 -----------------------------------------------------------------------------------------


def test_float16_with_scaled_losses_learns_as_float32_does(tiny_text_model: Path) -> None:
    """As on a T4: weights in float16, adapters in float32, operations in float16, losses scaled."""
    rng = np.random.default_rng(0)
    batches = [
        side_by_side(
            [Row(rng.integers(5, 200, 40), np.tile(np.arange(40), (3, 1)), np.array([39]), rng.integers(5, 9, 1))] * 4,
            vision=False,
            pad_id=0,
        )
        for _ in range(3)
    ]

    def losses(dtype: str) -> list[float]:
        config = TrainConfig(
            dataset="d", out="o", mode="semantic_summary_small", dtype=dtype, gradient_checkpointing=False
        )
        base = Base(str(tiny_text_model), "text", "lora", unsloth=False, in_4bit=False)
        model = load_trainable(config, base, torch.device("cpu")).model
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.02)
        head = AnswerHead(model, last_layer=False)
        # From 65,536 on the factor is halved over some steps, whose updates are left out.
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=dtype == "float16")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
        found = []
        for step in range(12):
            with torch.autocast("cpu", dtype=torch.float16, enabled=dtype == "float16"):
                loss = token_losses(model, head, batches[step % 3]).mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    expected = losses("float32")
    assert expected[-1] < expected[0] - 0.5
    np.testing.assert_allclose(losses("float16"), expected, rtol=0.02)


def test_a_few_overflows_of_scaled_losses_are_no_divergence() -> None:
    scaled = trainer_file.Stability(10.0, overflows=2)
    for step, norm in enumerate([float("inf"), float("inf"), 1.0, float("inf"), float("nan")]):
        scaled.check_gradients(norm, step)
    with pytest.raises(UserError, match="not a number at step 5"):
        scaled.check_gradients(float("inf"), 5)


def test_gathered_weights_are_kept_where_they_fit() -> None:
    model = torch.nn.Linear(2**20, 2**10, bias=False, device="meta")  # 2 GiB in bfloat16
    config = TrainConfig(dataset="d", out="o", mode="caption", dtype="bfloat16")
    for memory, kept in ((8.0, True), (6.4, False)):  # 92% of it are used
        plan = with_gathered(MemoryPlan(8192, False, "adamw", 8192, 4.0 * GIB, memory * GIB), config, model)
        assert plan.keeps_gathered is kept
        assert plan.peak == (6.0 if kept else 4.0) * GIB


def test_a_plan_reads_as_a_line() -> None:
    made = MemoryPlan(8192, True, "paged_adamw_8bit", 8192, 9.2 * GIB, 16 * GIB)
    assert str(made) == "passes of up to 8,192 tokens, layers recomputed, paged 8-bit optimizer states; 9.2 of 16.0 GiB"
