"""What a recipe says is checked as a whole. A user would lose an hour of training to a typo in the last stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from vlrank.cli import cli
from vlrank.config import load_config, merge
from vlrank.errors import UserError
from vlrank.options import main
from vlrank.recipes.recipe import RunConfig, absolute_recipe, steps_of

RECIPE = """
out: made
settings: {raw: null, epochs: 3}
common: {dataset: beauty, seed: 5}
stages:
- prepare: beauty
  reviews: ["${raw}/reviews.csv"]
- retrieve: knn
  method: item_knn
- train: model
  mode: caption
  epochs: ${epochs}
  candidates: retrieval:knn
- rerank: test
  model: model
  candidates: knn
- rerank: fused
  model: model
  candidates: knn
  scores_of: test
  fusion_weight: auto
- evaluate: report
  rankings: [test, fused, ./others.trec]
  runs: [model]
"""


def recipe(text: str, *overrides: str, folder: Path) -> RunConfig:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(RunConfig, file=file, overrides=overrides)


def test_names_become_places_below_one_folder_and_settings_reach_their_stages(tmp_path: Path) -> None:
    steps = steps_of(recipe(RECIPE, "raw=/data", "model.lr=3e-4", "out=/runs/b", folder=tmp_path))
    by_name: dict[str, Any] = {step.name: step.config for step in steps}
    assert list(by_name) == ["beauty", "knn", "model", "test", "fused", "report"]
    assert by_name["beauty"].reviews == (Path("/data/reviews.csv"),)
    assert by_name["beauty"].out == by_name["knn"].dataset == by_name["model"].dataset == Path("/runs/b/beauty")
    assert (by_name["knn"].name, by_name["test"].candidates) == ("knn", "knn")
    assert (by_name["model"].epochs, by_name["model"].lr, by_name["model"].seed) == (3, 3e-4, 5)
    assert by_name["model"].batch_size == 16  # of the mode's file, as in `vlrank train`
    assert by_name["test"].model == "/runs/b/model"
    assert by_name["fused"].scores_of == by_name["test"].out == Path("/runs/b/test.parquet")
    assert by_name["report"].rankings == (
        *(Path("/runs/b/test.parquet"), Path("/runs/b/fused.parquet")),
        Path("others.trec"),
    )
    assert {step.name: set(step.needs) for step in steps}["fused"] == {"beauty", "model", "knn", "test"}


def test_a_run_that_starts_from_another_is_the_same_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = RECIPE.replace("- rerank: test", "- train: second\n  mode: caption\n  model: model\n- rerank: test")
    models = []
    for folder, out in ((tmp_path, "made"), (tmp_path.parent, f"{tmp_path.name}/made")):
        monkeypatch.chdir(folder)
        steps = steps_of(recipe(text, "raw=/data", f"out={out}", folder=tmp_path))
        models.append(next(step.config.model_dump()["model"] for step in steps if step.name == "second"))
    assert models == [str(tmp_path / "made" / "model")] * 2


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("- train: model", "- trian: model", "`trian`, which is no stage, did you mean `train`"),
        ("mode: caption", "mode: caption\n  epoch: 3", "stage `model` (train): unknown config key `epoch`"),
        ("epochs: ${epochs}", "epochs: many", "stage `model` (train): config key `epochs`"),
        ("epochs: ${epochs}", "epochs: ${epoch}", "uses ${epoch}, did you mean `epochs`"),
        ("  model: model\n", "  model: modle\n", "`model: modle` is no stage of the recipe, did you mean `model`"),
        ("  model: model\n", "  model: knn\n", "`model: knn` is a retrieve stage"),
        ("retrieval:knn", "retrieval:sasrec", "`candidates: sasrec` is no stage"),
        ("- rerank: fused", "- rerank: model", "`model` is used twice: by a train stage and by stage 5 (rerank)"),
        ("- rerank: fused", "- rerank: a.b", "cannot be named 'a.b'"),
        ("mode: caption", "mode: caption\n  model: model", "in a circle: model -> model"),
        ("mode: caption", "mode: caption\n  out: x", "sets `out`, which its name decides"),
        ("seed: 5", "sead: 5", "`common` sets `sead`, which no stage has, did you mean `seed`"),
        ("{raw: null", "{raws: null", "uses ${raw}, did you mean `raws`"),
        ("{raw: null", "{raw: null, raw: 1", "line 3: the key `raw` is given twice"),
        ("out: made\n", "", "`out` is required"),
    ],
)
def test_a_wrong_recipe_is_refused_with_the_stage_and_what_was_expected(
    old: str, new: str, said: str, tmp_path: Path
) -> None:
    assert old in RECIPE
    with pytest.raises(UserError) as caught:
        recipe(RECIPE.replace(old, new, 1), *(["raw=/data"] if "raws" not in new else []), folder=tmp_path)
    assert said in str(caught.value)


def test_a_circle_and_a_later_stage_are_told_apart(tmp_path: Path) -> None:
    stages = "out: o\ncommon: {dataset: ./d, mode: caption}\nstages:\n- {train: a, model: b}\n- {train: b%s}\n"
    with pytest.raises(UserError, match=r"in a circle: a -> b -> a"):
        recipe(stages % ", model: a", folder=tmp_path)
    with pytest.raises(UserError, match=r"stage `a` \(train\) uses `b`, which is made after it"):
        recipe(stages % "", folder=tmp_path)


def test_lists_of_another_dataset_are_refused(tmp_path: Path) -> None:
    text = RECIPE.replace(
        "- retrieve: knn\n", "- prepare: toys\n  reviews: [./r.csv]\n- retrieve: knn\n  dataset: toys\n"
    )
    with pytest.raises(UserError, match=r"stage `model` .* works on dataset `beauty`, and `knn` on `toys`"):
        recipe(text, "raw=/data", folder=tmp_path)


def test_every_wrong_name_is_told_at_once(tmp_path: Path) -> None:
    text = RECIPE.replace("  model: model\n", "  model: modle\n", 1).replace("scores_of: test", "scores_of: knn")
    with pytest.raises(UserError) as caught:
        recipe(text, "raw=/data", folder=tmp_path)
    assert "stage `test` (rerank): `model: modle` is no stage" in str(caught.value)
    assert "stage `fused` (rerank): `scores_of: knn` is a retrieve stage" in str(caught.value)


def test_every_wrong_stage_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        recipe(RECIPE, "raw=/data", "model.epochs=0", "model.rl=1", "fused.fusion_weight=3", folder=tmp_path)
    assert "stage `model` (train): config key `epochs`" in str(caught.value)
    assert "stage `model` (train): unknown config key `rl`" in str(caught.value)
    assert "stage `fused` (rerank): fusion_weight must be between 0 and 1" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "`stages` is required"),
        ("- train: a", "holds a list"),
        ("stages: [", "cannot be read: line 1"),
        ("out: o\nstages: []", "`stages`"),
        ("out: o\nstages: [{}]", "stage 1 of the recipe is empty"),
        ("out: o\nstages: [train]", "`stages.0`"),
        ("out: o\nstages: [{train: [a]}]", "cannot be named ['a']"),
        ("out: o\nstages: [{train: {mode: caption}}]", "Write `- train: NAME`"),
        ("out: o\nsettings: [a]\nstages: [{train: a}]", "`settings`"),
        ("out: o\ncommon: 3\nstages: [{train: a}]", "`common`"),
        ("out: o\nstages: {train: a}", "`stages`"),
        ("out: 3\nstages: [{train: a}]", "`out`"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_message_and_exit_code_2(
    content: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("recipe.yaml").write_text(content)
    with pytest.raises(SystemExit) as stop:
        main(cli, ["run", "recipe.yaml"])
    message = capsys.readouterr().err
    assert (stop.value.code, message.count("error:")) == (2, 1)
    assert said in message
    assert "recipe.yaml" in message
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.yaml"]


def test_an_override_of_nothing_is_refused_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown key `modle`, did you mean `model`\?; this recipe has .*raw, .*fused"):
        recipe(RECIPE, "raw=/data", "modle.lr=1", folder=tmp_path)
    with pytest.raises(UserError, match=r"`model` is a stage: its settings are given as model\.KEY=VALUE"):
        recipe(RECIPE, "raw=/data", "model=3", folder=tmp_path)
    with pytest.raises(UserError, match=r"the setting `raw` has no value, and stage `beauty` .*\nAdd raw=VALUE"):
        recipe(RECIPE, folder=tmp_path)


def test_the_settings_of_a_stage_may_hold_braces_and_a_list_mixes_earlier_ones(tmp_path: Path) -> None:
    text = RECIPE.replace(
        "- train: model", "- retrieve: als\n  method: als\n- retrieve: both\n  method: ensemble:knn,als\n- train: model"
    )
    steps = {
        step.name: step
        for step in steps_of(recipe(text, "raw=/data", "beauty.text={title:.40} [{brand}]", folder=tmp_path))
    }
    assert getattr(steps["beauty"].config, "text") == "{title:.40} [{brand}]"  # noqa: B009
    assert {"knn", "als"} <= set(steps["both"].needs)
    with pytest.raises(
        UserError, match=r"stage `both` \(retrieve\): `method: kn` is no stage of the recipe, did you mean `knn`"
    ):
        recipe(text.replace("ensemble:knn", "ensemble:kn"), "raw=/data", folder=tmp_path)


def test_a_job_gets_the_same_recipe_with_absolute_paths(tmp_path: Path) -> None:
    config = recipe(RECIPE, "raw=raw", folder=tmp_path)
    with pytest.raises(UserError, match="`out` is made, a relative path"):
        absolute_recipe(config, None)
    with pytest.raises(UserError, match=r"stage `beauty` \(prepare\): `reviews` is raw/reviews.csv, a relative path"):
        absolute_recipe(config.model_copy(update={"out": Path("/made")}), None)
    there = RunConfig(**absolute_recipe(config, "/data"))
    assert there.out == Path("/data/made")
    assert there.stages[0]["reviews"] == ["/data/raw/reviews.csv"]
    assert there.stages[-1]["rankings"] == ["test", "fused", "/data/others.trec"]
    assert absolute_recipe(there, None) == absolute_recipe(config, "/data")


@pytest.mark.parametrize("file", ["configs/recipes/demo.yaml", "configs/recipes/beauty.yaml", "docs/recipes.md"])
def test_the_recipes_that_come_with_vlrank_are_valid(file: str) -> None:
    text = (Path(__file__).resolve().parents[2] / file).read_text(encoding="utf-8")
    if file.endswith(".md"):
        text = text.partition("```yaml")[2].partition("```")[0]
    values = yaml.safe_load(text)
    unset = {key: "./given" for key, value in values["settings"].items() if value is None}
    steps = steps_of(RunConfig(**merge(values, {"settings": unset})))
    assert steps[0].stage == "prepare"
    assert steps[-1].stage == "evaluate"
