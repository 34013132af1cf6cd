"""Run folders, checks before anything is loaded, and the messages a user sees when training goes wrong."""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from vlrank.config import TrainConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.data.lists import rank_by_score
from vlrank.errors import UserError
from vlrank.training import pictures
from vlrank.training.checkpoints import remove_orphans
from vlrank.training.data import TrainingData, choose_samples, display_name, selection_metric
from vlrank.training.history import read_history, record_evaluation
from vlrank.training.model import resolve_base
from vlrank.training.optim import MasterAdamW
from vlrank.training.run import (
    _finished,
    check_resources,
    dry_run,
    epoch_line,
    run,
)
from vlrank.training.trainer import Stability, device_full
from vlrank.training.validation import rank_metrics

Make = Callable[..., TrainConfig]


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_rank_metrics_in_closed_form() -> None:
    # Ranks 1, 2, 11 and missed: two of four within ten.
    got = rank_metrics([1, 2, 11, math.inf], ["recall@1", "recall@10", "ndcg@10", "mrr@10", "recall@20"])
    assert got["recall@1"] == 1 / 4
    assert got["recall@10"] == 2 / 4
    assert got["recall@20"] == 3 / 4
    assert got["ndcg@10"] == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert got["mrr@10"] == pytest.approx((1 + 1 / 2) / 4)


def test_rank_metrics_agree_with_the_evaluation_room() -> None:
    from vlrank.evaluation.metrics import ranking_metrics

    rng = np.random.default_rng(0)
    lists = {user: rng.permutation(20).tolist() for user in range(50)}
    ranks = [lists[user].index(3) + 1 for user in range(50)]
    expected = ranking_metrics(list(lists.values()), [3] * 50, ks=(5, 10))
    for name, value in rank_metrics(ranks, ["recall@5", "recall@10", "ndcg@10", "mrr@10"]).items():
        assert value == pytest.approx(expected[name])


def test_ties_keep_the_order_of_the_prompt() -> None:
    scores = np.array([0.5, 0.9, 0.5, 0.1], dtype=np.float32)
    assert [rank_by_score(scores, target) for target in range(4)] == [2, 1, 3, 4]


def test_scores_that_are_no_numbers_rank_the_target_last() -> None:
    """Every comparison with them is false, which would make a broken model the best one."""
    assert rank_by_score(np.full(20, np.nan, dtype=np.float32), 3) == 20


def test_a_metric_that_cannot_tell_models_apart_is_replaced(settings: Make) -> None:
    assert selection_metric(settings()) == ("recall@10", None)
    assert selection_metric(settings(ranking={"top_k": 5}))[0] == "recall@5"
    metric, warning = selection_metric(settings(negatives=9))
    assert metric == "ndcg@10"
    assert "always 1 with 10 candidates" in str(warning)
    assert selection_metric(settings(metric="recall@20"))[0] == "ndcg@10"
    assert selection_metric(settings(metric="mrr@20")) == ("mrr@20", None)


# ---- the run folder -------------------------------------------------------------------------------------------------


def evaluation(step: int, value: float) -> dict[str, object]:
    return {
        "step": step,
        "epoch": step // 10,
        "metric": "recall@10",
        "value": value,
        "selection": value - 1e-9 * step,
        "checkpoint": f"qwen3vl_rerank/checkpoint-{step}",
    }


def test_history_and_best_survive_a_repeated_report(tmp_path: Path) -> None:
    for step, value in ((10, 0.2), (20, 0.4), (30, 0.4), (20, 0.4), (30, 0.4)):  # a crash after 30 went back to 10
        record_evaluation(tmp_path, evaluation(step, value))
    assert [line["step"] for line in read_history(tmp_path)] == [10, 20, 30]
    best = json.loads((tmp_path / "best.json").read_text())
    assert (best["checkpoint"], best["value"]) == ("qwen3vl_rerank/checkpoint-20", 0.4)  # the earlier of two equals


def test_console_lines_are_the_historic_ones() -> None:
    line = {"epoch": 1, "metric": "recall@10", "value": 0.12344}
    assert epoch_line(line, 10) == "[Qwen3VLReranker] Epoch 1/10 - val_Recall@10: 0.1234"
    assert [display_name(m) for m in ("ndcg@10", "mrr@5")] == ["NDCG@10", "MRR@5"]


def test_orphans_of_a_crash_are_removed_and_known_checkpoints_kept(tmp_path: Path) -> None:
    for name in ("checkpoint-10", "checkpoint-20", "other"):
        (tmp_path / name).mkdir()
    snapshot = {"checkpoint_results": [{"checkpoint_dir_name": "checkpoint-10"}]}
    (tmp_path / "checkpoint_manager_snapshot.json").write_text(json.dumps(snapshot))
    assert remove_orphans(tmp_path) == ["checkpoint-20"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["checkpoint-10", "other"]


# ---- before anything is loaded --------------------------------------------------------------------------------------


def test_the_dry_run_says_what_would_happen(settings: Make) -> None:
    summary = dry_run(settings("caption"))
    assert summary.counts == {"samples": 80, "steps": 5}
    assert summary.lines["steps"] == "5 per epoch, 10 at most"


def test_workers_that_do_not_fit_are_refused(settings: Make) -> None:
    """Ray would wait for the fourth GPU for ever, and say nothing."""
    for changes, have in (
        ({"workers": 4}, {"CPU": 16.0, "GPU": 2.0}),
        ({"gpus_per_worker": 1}, {"CPU": 16.0}),
        ({"workers": 3, "cpus_per_worker": 2}, {"CPU": 4.0}),
    ):
        with pytest.raises(UserError, match="workers need"):
            check_resources(settings(**changes), have)
    check_resources(settings(workers=2), {"CPU": 16.0, "GPU": 2.0})
    check_resources(settings(workers=2), {"CPU": 2.0})


def test_what_a_full_gpu_makes_people_change_does_not_end_a_run(settings: Make, told_shop: Dataset) -> None:
    begun = settings("caption")
    begun.out.mkdir()
    (begun.out / "config.yaml").write_text(yaml.safe_dump(begun.model_dump(mode="json", exclude={"compile"})))
    assert not _finished(settings("caption", micro_batch_size=2, gradient_checkpointing=True, workers=2), told_shop)
    with pytest.raises(UserError, match="other settings"):
        _finished(settings("caption", lr=0.5), told_shop)


def test_a_run_does_not_go_on_with_a_dataset_that_was_prepared_anew(settings: Make, told_shop: Dataset) -> None:
    """Item 7 would be another item."""
    begun = settings("caption")
    begun.out.mkdir()
    (begun.out / "config.yaml").write_text(yaml.safe_dump(begun.model_dump(mode="json")))
    (begun.out / "data.json").write_text(json.dumps(told_shop.manifest["files"]))
    assert not _finished(begun, told_shop)
    (begun.out / "data.json").write_text(json.dumps({"items.parquet": "another"}))
    with pytest.raises(UserError, match="prepared again"):
        _finished(begun, told_shop)


def test_features_that_cannot_be_written_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(model: object, encoder: object, paths: object, folder: Path) -> None:
        (folder / "features.bin").write_bytes(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(pictures, "_write_features", full)
    with pytest.raises(UserError, match="No space left"):
        pictures.compute_features(None, None, ["a.jpg"], tmp_path / "key")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_mode_without_its_column_names_the_command(settings: Make, shop: Dataset) -> None:
    with pytest.raises(UserError, match="no caption") as caught:
        run(settings("caption", dataset=shop.path))
    assert "vlrank generate DATASET --what caption" in str(caught.value.remedy)


def test_wrong_models_are_refused(
    settings: Make, tiny_text_model: Path, tiny_vision_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="needs a model of a vision family") as caught:
        run(settings("caption", model=str(tiny_text_model)))
    for family in ("Qwen2.5-VL", "Qwen3-VL", "Qwen3.5"):
        assert family in str(caught.value.remedy)
    with pytest.raises(UserError, match="needs a causal language model"):
        run(settings("semantic_summary_small", model=str(tiny_vision_model)))
    with pytest.raises(UserError, match=r"no config\.json"):
        run(settings("caption", model=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(UserError, match="no tokenizer"):
        run(settings("caption", model=str(tmp_path)))
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        run(settings("caption", model=str(tmp_path)))
    with pytest.raises(UserError, match="weights are quantised"):
        run(settings("semantic_summary_small", model="unsloth/Qwen3-0.6B-unsloth-bnb-4bit", method="full"))
    assert not (tmp_path / "run").exists(), "nothing half-written"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_vision": True}, "train_vision needs method: full"),
        ({"train_inputs": "caption"}, "belongs to mode raw_image"),
        ({"candidates": "retrieval:"}, "needs a name"),
        ({"candidates": "retrieved"}, "ground_truth or retrieval:NAME"),
        ({"metric": "accuracy"}, "`metric`"),
    ],
)
def test_settings_that_do_not_fit_together(settings: Make, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings("caption", **changes)


def test_unknown_candidates_are_named(settings: Make) -> None:
    with pytest.raises(UserError, match="no candidates 'sasrec'"):
        run(settings("caption", candidates="retrieval:sasrec"))


def test_unsloth_is_refused_where_it_cannot_serve(settings: Make) -> None:
    with pytest.raises(UserError, match="unsloth trains text models"):
        resolve_base(settings("caption", backend="unsloth"))


def test_a_reporter_that_is_not_installed_is_named_before_anything_starts(settings: Make) -> None:
    if find_spec("wandb"):
        pytest.skip("wandb is installed")
    config = settings("caption", report_to=["wandb"])
    with pytest.raises(UserError, match="pip install wandb"):
        run(config)
    assert not config.out.exists()
    with pytest.raises(UserError, match="report_to"):
        settings("caption", report_to=["weights"])


def test_lists_in_memory_become_splits(told_shop: Dataset) -> None:
    meta = told_shop.item_meta()
    data = TrainingData.of_lists({1: [1, 2], 2: [3]}, {1: [4, 5], 2: []}, meta)
    assert data.validation == {1: ([1, 2, 4], 5)}
    with pytest.raises(UserError, match="item 999 of user 1"):
        TrainingData.of_lists({1: [999]}, {}, meta)


def test_captions_train_and_pictures_rank(settings: Make, told_shop: Dataset) -> None:
    config = settings("raw_image", train_inputs="caption")
    run_samples = choose_samples(config, TrainingData.of_dataset(told_shop, "ground_truth"))
    assert (run_samples.train_spec.name, run_samples.spec.name) == ("caption", "raw_image")
    assert len(run_samples.picture_paths) == len(set(run_samples.picture_paths)) > 50


# ---- when training goes wrong ---------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    with pytest.raises(UserError, match="not a number at step 7"):
        Stability(10.0).check_gradients(float("nan"), 7)
    with pytest.raises(UserError, match="exploded at step 3"):
        Stability(10.0).check_loss(float("nan"), 3)


def test_an_exploding_loss_stops_the_run_and_a_bad_start_does_not() -> None:
    stability = Stability(uniform=10.0)
    for step, loss in enumerate([70.0, 60.0, 30.0, 12.0, 3.0, 2.0, 9.0]):  # random weights may begin far above ln V
        stability.check_loss(loss, step)
    calm = Stability(uniform=10.0)
    for step in range(60):
        calm.check_loss(2.0, step)
    calm.check_loss(39.0, 60)
    with pytest.raises(UserError, match="exploded at step 61: 41"):
        calm.check_loss(41.0, 61)


def test_a_full_device_names_settings_in_the_order_of_least_loss(settings: Make) -> None:
    config = settings("raw_image", method="full", packing=True)
    for row, size in ((16384, "pack_tokens=8192"), (None, "micro_batch_size=")):
        remedy = str(device_full(config, resolve_base(config), "step 1", row).remedy)
        names = [size, "gradient_checkpointing", "optim", "method=lora", "max_image_pixels"]
        places = [remedy.index(name) for name in names]
        assert places == sorted(places)


# ---- the optimizer --------------------------------------------------------------------------------------------------


def test_master_weights_keep_updates_that_bfloat16_would_lose() -> None:
    weight = torch.nn.Parameter(torch.full((4,), 1.0, dtype=torch.bfloat16))
    plain = torch.nn.Parameter(weight.detach().clone())
    master, usual = MasterAdamW([weight], lr=1e-3), torch.optim.AdamW([plain], lr=1e-3, weight_decay=0.0)
    for _ in range(20):
        for parameter, optimizer in ((weight, master), (plain, usual)):
            parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    # Adam moves by lr a step: 20 steps are 0.02. In bfloat16 a step of 0.001 below 1.0 is less than half a unit.
    assert weight.float()[0].item() == pytest.approx(0.98, abs=0.004)
    assert plain.float()[0].item() == 1.0


def test_master_weights_equal_adamw_in_float32_and_resume_exactly() -> None:
    torch.manual_seed(0)
    start, gradients = torch.randn(8, 3), torch.randn(10, 8, 3)
    mine, other = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    first, usual = MasterAdamW([mine], lr=0.1, weight_decay=0.1), torch.optim.AdamW([other], lr=0.1, weight_decay=0.1)
    for i, gradient in enumerate(gradients):
        mine.grad, other.grad = gradient.clone(), gradient.clone()
        if i == 5:  # as a killed worker would: new objects, state from disk
            saved = first.state_dict()
            first = MasterAdamW([mine], lr=0.1, weight_decay=0.1)
            first.load_state_dict(saved)
        first.step()
        usual.step()
    torch.testing.assert_close(mine, other)


def test_an_8_bit_optimizer_is_a_setting_not_code() -> None:
    with pytest.raises(UserError, match="optim"):
        load_config(TrainConfig, dataset="d", out="o", mode="caption", optim="sgd")
