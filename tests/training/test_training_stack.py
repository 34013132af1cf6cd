"""All four modes through real Ray Train, transformers, PEFT, bitsandbytes and Unsloth, on tiny models."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from vlrank.config import MODES, RankingConfig, TrainConfig
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.prompting.modes import mode_spec
from vlrank.training.model import resolve_base
from vlrank.training.run import fit, read_history, run

pytestmark = [pytest.mark.stack, pytest.mark.usefixtures("ray_cluster")]


# `semantic_summary` is the mode of the test of patience below.
@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "semantic_summary"])
def test_a_mode_trains_and_its_best_checkpoint_ranks(
    mode: str, settings: Callable[..., TrainConfig], told_shop: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    if mode == "semantic_summary_small":
        pytest.importorskip("bitsandbytes")
    full = mode == "raw_image"  # one mode trains everything, pixels included; the others adapt with LoRA
    config = settings(mode, method="full" if full else "lora", train_vision=full, report_to=["tensorboard"])
    summary = run(config)

    printed = capsys.readouterr().err
    assert re.search(r"\[Qwen3VLReranker\] Epoch 1/2 - val_Recall@10: 0\.\d{4} \[BEST\]", printed)
    assert re.search(r"Loaded best model with val_Recall@10: 0\.\d{4}", printed)
    assert summary.counts["steps"] == 10
    assert yaml.safe_load((config.out / "config.yaml").read_text())["mode"] == mode
    history = read_history(config.out)
    assert [line["epoch"] for line in history] == [1, 2]
    assert {"loss", "recall@10", "ndcg@10", "mrr@10", "step"} <= history[0].keys()
    assert history[1]["loss"] < history[0]["loss"]

    best = json.loads((config.out / "best.json").read_text())
    checkpoint = config.out / best["checkpoint"]
    assert best["checkpoint"].startswith(
        "qwen3vl_rerank/" if mode == "semantic_summary_small" else "qwen3vl_rerank_vl/"
    )
    facts = json.loads((checkpoint / "vlrank.json").read_text())
    assert (facts["mode"], facts["method"]) == (mode, "full" if full else "lora")
    assert RankingConfig(**facts["ranking"]) == config.resolved_ranking
    assert not list(checkpoint.glob("*args.bin"))
    (events,) = (config.out / "logs").glob("events.out.tfevents.*")
    assert b"train/loss" in events.read_bytes()
    assert b"eval/recall_10" in events.read_bytes()

    from vlrank.engines.models import open_model
    from vlrank.engines.transformers_scorer import load_model, score_labels
    from vlrank.prompting.encoding import Encoder

    folder = open_model(config.out)
    encoder = Encoder.load(
        folder.path, mode_spec(mode), config.ranking
    )  # tokenizer and processor are in the checkpoint
    items = list(told_shop.item_meta().values())
    (scores,) = score_labels(load_model(folder), encoder, [encoder.encode(items[:3], items[3:23])])
    assert scores.shape == (20,)

    start = config.model_copy(update={"model": str(config.out)})
    if full:
        assert resolve_base(start).name == str(checkpoint.resolve())
    else:
        with pytest.raises(UserError, match="holds an adapter"):
            resolve_base(start)

    if mode == "caption":
        a_finished_run_is_not_repeated_and_another_one_is_not_overwritten(config, capsys)
    if mode == "semantic_summary_small":
        packing_changes_no_loss_of_unsloth(config)


def a_finished_run_is_not_repeated_and_another_one_is_not_overwritten(
    config: TrainConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (config.out / "history.jsonl").stat().st_mtime_ns
    assert run(config).counts["steps"] == 10
    assert "finished already" in " ".join(capsys.readouterr().err.split())
    assert (config.out / "history.jsonl").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"other settings \(lr: 0.001 -> 0.01\)"):
        run(config.model_copy(update={"lr": 0.01}))


def packing_changes_no_loss_of_unsloth(config: TrainConfig) -> None:
    packed = config.model_copy(update={"packing": True, "out": config.out.with_name("packed")})
    run(packed)
    losses, unpacked = ([line["loss"] for line in read_history(each.out)] for each in (packed, config))
    assert losses == pytest.approx(unpacked, rel=1e-5)


def test_patience_and_a_metric_that_cannot_tell_models_apart(
    settings: Callable[..., TrainConfig], told_shop: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    train = told_shop.train_sequences()
    val = {user: [target] for user, (_, target) in told_shop.histories("val").items()}
    # Nothing is learned at this rate, so the first evaluation stays the best one. Nine negatives make Recall@10 1.
    # The popularity prior puts targets first by itself: no reason to take guessing for an answer.
    config = settings(
        "semantic_summary",
        lr=1e-12,
        epochs=6,
        patience=2,
        negatives=9,
        val_users=8,
        packing=True,
        negative_sampling="popularity",
    )
    checkpoint = fit(train, val, told_shop.item_meta(), config)
    printed = " ".join(capsys.readouterr().err.split())
    assert "recall@10 is always 1 with 10 candidates; checkpoints are selected by ndcg@10" in printed
    assert "Early stopping at epoch 3" in printed
    assert printed.count("neither loss nor validation tells this model from guessing") == 1
    assert all(line["guessing"] for line in read_history(config.out))
    assert checkpoint.name == "checkpoint-5"
    assert Path(checkpoint / "adapter_model.safetensors").is_file()
    assert json.loads((checkpoint / "vlrank.json").read_text())["ranking"]["popularity_prior"] is True


def test_a_run_that_has_blown_up_stops_and_keeps_nothing_of_it(settings: Callable[..., TrainConfig]) -> None:
    config = settings("caption", lr=1e30, epochs=1, warmup_ratio=0.0, max_grad_norm=1e9)
    with pytest.raises(UserError, match=r"not a number at step|exploded at step"):
        run(config)
    assert not list(config.out.glob("*/checkpoint-*"))
    assert not (config.out / "best.json").exists()
