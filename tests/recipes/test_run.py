"""A recipe run as one. A user would lose hours to stages done twice, and the stage's name in what went wrong."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import yaml

from vlrank.config import RayConfig, load_config, read_yaml
from vlrank.console import Summary
from vlrank.demo.shop import write_raw_shop
from vlrank.errors import UserError
from vlrank.recipes.recipe import RunConfig, steps_of
from vlrank.recipes.run import dry_run, run
from vlrank.runtime import ray_session

RECIPE = """
settings: {raw: null, base: null}
common: {dataset: shop}
stages:
- prepare: shop
  reviews: ["${raw}/reviews.json.gz"]
  meta: ["${raw}/meta.json.gz"]
  min_sc: 1
- retrieve: knn
  method: item_knn
- train: model
  mode: semantic_summary_small
  model: ${base}
  method: full
  backend: transformers
  epochs: 1
  val_users: 8
  negatives: 4
  max_missing: 1
  metric: recall@1
  ranking: &ranking {max_history: 3, max_item_chars: 40, top_k: 6, missing: text}
- rerank: alone
  model: model
  candidates: knn
  limit: 12
- rerank: fused
  model: model
  candidates: knn
  limit: 12
  scores_of: alone
  fusion_weight: 0.5
- evaluate: report
  rankings: [alone, fused]
  baselines: [identity]
  bootstrap: 100
  runs: [model]
"""


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    write_raw_shop(folder, n_items=40, n_users=60)
    return folder


def recipe(folder: Path, raw: Path, *overrides: str, stages: int | None = None) -> RunConfig:
    values = yaml.safe_load(RECIPE)
    values["stages"] = values["stages"][:stages]
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
    given = [f"out={folder / 'made'}", f"raw={raw}", "base=./nowhere", *overrides]
    return load_config(RunConfig, file=folder / "recipe.yaml", overrides=given)


def test_what_a_later_stage_lacks_is_found_before_the_first_one_runs(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(UserError, match=r"stage `model` \(train\): `model` \./nowhere does not exist"):
        run(recipe(tmp_path, raw))
    assert not (tmp_path / "made").exists()


def test_a_plan_shows_each_stage_as_far_as_its_inputs_are_there(tmp_path: Path, raw: Path) -> None:
    config = recipe(tmp_path, raw, stages=2)
    plan = dry_run(config)
    assert str(plan.lines["prepare shop"]).startswith("to do, about")
    assert plan.lines["retrieve knn"] == "after shop"
    assert not (tmp_path / "made").exists()
    run(config)
    assert str(dry_run(config).lines["retrieve knn"]).startswith("done")


def test_what_goes_wrong_in_a_stage_has_its_name_and_earlier_results_stay(tmp_path: Path, raw: Path) -> None:
    with pytest.raises(UserError, match=r"stage `knn` \(retrieve\): retrieval method 'no_such_method' is neither"):
        run(recipe(tmp_path, raw, "knn.method=no_such_method", stages=2))
    assert (tmp_path / "made" / "shop" / "manifest.json").is_file()
    run(recipe(tmp_path, raw, stages=2))


@pytest.mark.stack
def test_a_second_run_does_only_what_is_missing(tmp_path: Path, raw: Path, tiny_text_model: Path) -> None:
    config = recipe(tmp_path, raw, f"base={tiny_text_model}")
    with ray_session(RayConfig(num_cpus=4)):
        first = run(config)
        _check_second_run(config, first, tmp_path / "made")


def _check_second_run(config: RunConfig, first: Summary, made: Path) -> None:
    assert first.output == made / "report" / "report.html"
    assert set(read_yaml(made / "times.json")) == {"shop", "knn", "model", "alone", "fused", "report"}
    metrics = json.loads((made / "report" / "metrics.json").read_text())
    assert {"shop", "model"} <= metrics["stage_seconds"].keys()
    assert {method["name"] for method in metrics["groups"][0]["methods"]} >= {"identity", "semantic_summary_small"}

    # Fusion took the scores that were there.
    assert not (made / "fused.parquet.shards").exists()
    alone, fused = (pl.read_parquet(made / f"{name}.parquet") for name in ("alone", "fused"))
    assert alone["user_id"].to_list() == fused["user_id"].to_list()
    assert alone["scores"].to_list() != fused["scores"].to_list()

    kept = [
        made / "shop" / "manifest.json",
        made / "model" / "result.json",
        *made.glob("alone.parquet.shards/test/*.parquet"),
    ]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert run(config).counts == first.counts
    assert {path: path.stat().st_mtime_ns for path in kept} == before
    assert all(str(state).startswith("done") for key, state in dry_run(config).lines.items() if " " in key)

    # The recipe that the folder keeps says everything.
    again = load_config(RunConfig, file=made / "recipe.yaml")
    assert [step.config for step in steps_of(again)] == [step.config for step in steps_of(config)]
