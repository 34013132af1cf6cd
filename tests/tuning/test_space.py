"""A search space that is wrong must say so before a GPU is touched; a right one gives the same trials every time."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlrank.config import MODES, TuneConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.errors import UserError
from vlrank.tuning.mode_search import mode_search
from vlrank.tuning.resources import TrialResources, concurrency, trial_resources
from vlrank.tuning.run import dry_run, run
from vlrank.tuning.space import RandInt, Uniform, default_point, nested, parse_space, sampled_points, trial_points


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"lrr": 1}, "`lrr` is not a key of training\nDid you mean `lr`"),
        ({"mode": "caption"}, "`mode` is set by the sweep itself"),
        ({"lr": {"loguniform": [2e-4, 5e-5]}}, "`lr.loguniform` has low 0.0002 above high 5e-05"),
        ({"lr": {"loguniform": [0, 1]}}, "needs bounds above 0"),
        ({"lr": {"loguniform": [1]}}, r"must be \[low, high\]"),
        ({"lr": {"loguniform": ["a", "b"]}}, r"must be \[low, high\]"),
        ({"lr": {"normal": [0, 1]}}, "`lr` has normal, expected exactly one of loguniform"),
        ({"lr": {}}, "`lr` has nothing"),
        ({"lr": {"uniform": [0, 1], "choice": [1]}}, "expected exactly one of"),
        ({"batch_size": {"choice": []}}, "at least one value"),
        ({"epochs": {"randint": [1.5, 3]}}, "whole numbers"),
        ({"lr": {"uniform": [1, 2], "steps": 0}}, "steps"),
    ],
)
def test_a_wrong_space_names_the_key_and_the_remedy(space: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_space(space)


@given(st.floats(1e-6, 1.0), st.floats(1.0, 1e3), st.booleans(), st.integers(0, 10_000))
def test_samples_stay_within_their_bounds(low: float, factor: float, log: bool, seed: int) -> None:
    dimension = Uniform(low, low * factor, log)
    assert low <= dimension.sample(random.Random(seed)) <= low * factor
    assert all(low <= value <= low * factor for value in dimension.grid())


def test_log_uniform_samples_are_uniform_in_the_logarithm() -> None:
    rng = random.Random(0)
    draws = [Uniform(1e-5, 1e-3, log=True).sample(rng) for _ in range(4000)]
    below = sum(draw < 1e-4 for draw in draws) / len(draws)
    assert below == pytest.approx(0.5, abs=4 * math.sqrt(0.25 / len(draws)))


def test_both_ends_of_randint_are_drawn() -> None:
    rng = random.Random(0)
    assert {RandInt(1, 3).sample(rng) for _ in range(100)} == {1, 2, 3}


def test_yaml_reads_5e_5_as_text_and_is_understood() -> None:
    assert parse_space({"lr": {"loguniform": ["5e-5", "2e-4"]}})["lr"].bounds() == [5e-5, 2e-4]


def test_nested_keys_reach_into_the_training_config() -> None:
    assert nested({"lora.r": 8, "lora.alpha": 16, "lr": 1.0}) == {"lora": {"r": 8, "alpha": 16}, "lr": 1.0}


def test_the_default_comes_first_and_no_point_twice() -> None:
    space = parse_space({"batch_size": {"choice": [8, 16, 32]}, "seed": 7})
    default = default_point(space, {"batch_size": 16, "seed": 0})
    assert default == {"batch_size": 16, "seed": 7}, "a fixed value holds for the default trial too"
    points = trial_points(space, default, "random", 10, seed=0)
    assert points[0] == default
    assert sorted(point["batch_size"] for point in points) == [8, 16, 32], "a small space is searched once, not padded"


def test_the_same_seed_gives_the_same_trials() -> None:
    space = parse_space({"lr": {"loguniform": [5e-5, 2e-4]}})
    first, again, other = (
        [point for point, _ in zip(sampled_points(space, "random", seed), range(5), strict=False)] for seed in (1, 1, 2)
    )
    assert first == again != other


def test_a_grid_has_every_combination() -> None:
    space = parse_space({"lr": {"loguniform": [1e-4, 1e-2]}, "batch_size": {"choice": [8, 16]}})
    assert [point["lr"] for point in sampled_points(space, "grid", 0)] == [1e-4, 1e-4, 1e-3, 1e-3, 1e-2, 1e-2]


def config(**more: Any) -> TuneConfig:
    return load_config(TuneConfig, **{"dataset": "data/shop", "out": "sweep", **more})


@pytest.mark.parametrize("mode", MODES)
def test_the_shipped_space_of_a_mode_contains_its_documented_default(mode: Any) -> None:
    made = mode_search(config(), mode)
    assert made.points[0]["lr"] == 1e-4
    assert made.points[0]["batch_size"] in made.dimensions["batch_size"].grid()
    assert made.dimensions["lr"].bounds() == [5e-5, 2e-4]
    assert len(made.points) == 8


def test_own_keys_replace_single_dimensions_and_fixed_keys_are_not_searched() -> None:
    spaces = {"caption": {"lora.r": {"choice": [4, 8]}}}
    made = mode_search(config(space={"batch_size": 4}, spaces=spaces, train={"lr": 3e-4}), "caption")
    assert list(made.dimensions) == ["batch_size", "lora.r"]
    assert made.points[0] == {"batch_size": 4, "lora.r": 8}
    assert made.base.lr == 3e-4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": {"lrr": 1}}, "unknown config key `lrr`, did you mean `lr`"),
        ({"train": {"mode": "caption"}}, "cannot set mode"),
        ({"space": {"batch_size": {"choice": [8, 0]}}}, "batch_size"),
        ({"space": {"lr": {"uniform": [-1, 1]}}}, "lr"),
    ],
)
def test_a_value_that_training_would_refuse_fails_before_any_trial(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        mode_search(config(**more), "caption")


def test_recall_that_cannot_tell_models_apart_becomes_ndcg() -> None:
    assert mode_search(config(), "caption").metric == "recall@10"
    assert mode_search(config(train={"negatives": 9}), "caption").metric == "ndcg@10"
    assert mode_search(config(train={"negatives": 9, "metric": "recall@5"}), "caption").metric == "recall@5"


def test_as_many_trials_run_at_once_as_the_gpus_allow() -> None:
    eight = {"GPU": 8.0, "CPU": 64.0}
    assert concurrency([TrialResources(2, 2)], eight, local=False) == 4
    assert concurrency([TrialResources(0.5, 1)], eight, local=False) == 16
    assert concurrency([TrialResources(1, 1), TrialResources(4, 4)], eight, local=False) == 2
    assert concurrency([TrialResources(1, 1)], {"CPU": 8.0}, local=False) == 1, "the first GPU node is yet to start"
    assert concurrency([TrialResources(0, 2)], {"CPU": 8.0}, local=False) == 4


def test_workers_never_share_a_gpu() -> None:
    base = mode_search(config(train={"workers": 2, "gpus_per_worker": 0.5}), "caption").base
    with pytest.raises(UserError, match="NCCL"):
        trial_resources(base, {"GPU": 1})
    half = mode_search(config(train={"gpus_per_worker": 0.5}), "caption").base
    assert trial_resources(half, {"GPU": 1}) == TrialResources(0.5, 1)
    assert trial_resources(mode_search(config(), "caption").base, {"CPU": 4}) == TrialResources(0, 1)


def test_a_dry_run_lists_trials_and_what_asha_is_expected_to_save(
    shop: Dataset, tiny_text_model: Path, tmp_path: Path
) -> None:
    train = {"epochs": 9, "model": str(tiny_text_model), "ranking": {"missing": "text"}, "max_missing": 1}
    options = {"out": tmp_path / "sweep", "modes": "semantic_summary_small", "trials": 9, "train": train}
    summary = dry_run(config(dataset=shop.path, **options))
    # 9 trials to epoch 1, 3 to epoch 3, 1 to epoch 9: 9 + 3 * 2 + 1 * 6 = 21 of 81.
    assert summary.lines["expected epochs"] == "21 of 81, 8 trials stopped by ASHA"
    assert summary.counts == {"trials": 9, "expected_epochs": 21}
    assert str(summary.lines["semantic_summary_small-000"]).endswith("(defaults)")
    assert f"{shop.count_targets('val')} validation users" in str(summary.lines["semantic_summary_small"])
    assert not (tmp_path / "sweep").exists(), "a dry run leaves nothing behind"


def test_a_dry_run_refuses_what_every_trial_would_refuse(shop: Dataset, tiny_text_model: Path, tmp_path: Path) -> None:
    train = {"model": str(tiny_text_model)}
    for dataset, problem in ((tmp_path / "nowhere", "nowhere does not exist"), (shop.path, "vlrank generate")):
        with pytest.raises(UserError, match=problem):
            dry_run(config(dataset=dataset, out=tmp_path / "sweep", modes="semantic_summary_small", train=train))


def test_a_model_that_the_hub_cannot_deliver_is_one_message_before_any_trial(
    shop: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    def offline(name: str, **options: Any) -> None:
        raise OSError("We couldn't connect to the hub.\nDetails.")

    monkeypatch.setattr(AutoConfig, "from_pretrained", offline)
    train = {"model": "nobody/nothing-1b", "ranking": {"missing": "text"}, "max_missing": 1}
    asked = config(dataset=shop.path, out=tmp_path / "sweep", modes="semantic_summary_small", train=train)
    with pytest.raises(UserError, match=r"^model nobody/nothing-1b was not found: We couldn't connect to the hub\.\n"):
        run(asked)
    assert not (tmp_path / "sweep").exists(), "the same --out takes a sweep of another model"
