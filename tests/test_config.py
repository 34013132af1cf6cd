"""A wrong key or value must stop before any model is loaded, with a message that names it."""

from pathlib import Path

import pytest
import yaml

from vlrank.config import (
    MODES,
    Config,
    EvaluateConfig,
    PrepareConfig,
    RankingConfig,
    TrainConfig,
    TuneConfig,
    load_config,
    merge,
    mode_defaults,
    parse_overrides,
)
from vlrank.errors import UserError

NEEDED = {"dataset": "data", "out": "run", "mode": "caption"}


def test_every_mode_file_is_a_valid_training_config_with_the_documented_defaults() -> None:
    batch = {"raw_image": 8, "caption": 16, "semantic_summary": 16, "semantic_summary_small": 32}
    for mode in MODES:
        config = load_config(TrainConfig, dataset="data", out="run", mode=mode)
        assert (config.epochs, config.lr, config.patience, config.negatives) == (10, 1e-4, 5, 19)
        assert (config.ranking.top_k, config.lora.r, config.lora.alpha) == (50, 8, 16)
        assert config.batch_size == batch[mode]
        assert config.model == mode_defaults(mode)["model"]


def test_later_sources_win_over_earlier_ones(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"lr": 2e-4, "epochs": 3, "batch_size": 4, "ranking": {"top_k": 30}}))
    config = load_config(TrainConfig, file=file, overrides=["epochs=4", "batch_size=5"], batch_size=6, **NEEDED)
    assert (config.lr, config.epochs, config.batch_size) == (2e-4, 4, 6)
    assert config.ranking.top_k == 30
    assert config.ranking.stride == 10  # a partial nested mapping keeps the other keys


def test_flags_that_were_not_given_do_not_hide_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 3\nreport_to: [tensorboard]\n")
    config = load_config(TrainConfig, file=file, epochs=None, report_to=(), **NEEDED)
    assert (config.epochs, config.report_to) == (3, ("tensorboard",))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["ranking.topk=20"], ["ranking.topk", "did you mean `ranking.top_k`"]),
        (["lr=fast"], ["`lr`", "'fast'"]),
        (["lr=-1", "epochs=0"], ["`lr`", "`epochs`"]),
        (["ranking.window=5"], ["stride 10", "window 5"]),
        (["lr"], ["key=value"]),
        (["lr=[1"], ["lr=[1"]),
    ],
)
def test_a_wrong_override_is_named(overrides: list[str], expected: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_config(TrainConfig, overrides=overrides, **NEEDED)
    for part in expected:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("samples_per_user=0", "samples_per_user"),
        ("samples_per_user=-3", "samples_per_user"),
        ("samples_per_user=all", "samples_per_user"),
        ("random_share=[1.5, 0]", "random_share"),
        ("random_share=[0, -0.1]", "random_share"),
    ],
)
def test_training_without_samples_or_with_no_share_is_refused(override: str, key: str) -> None:
    with pytest.raises(UserError, match=key):
        load_config(TrainConfig, overrides=[override], **NEEDED)


def test_the_ends_of_what_is_allowed_are_allowed() -> None:
    config = load_config(TrainConfig, overrides=["samples_per_user=1", "random_share=[1, 0]", "seed=0"], **NEEDED)
    assert (config.samples_per_user, config.random_share, config.seed) == (1, (1.0, 0.0), 0)
    assert load_config(TrainConfig, samples_per_user="every_prefix", **NEEDED).samples_per_user == "every_prefix"


def test_commas_part_numbers_and_modes_and_no_paths() -> None:
    train = load_config(TrainConfig, overrides=["random_share=1.0,0.5"], **NEEDED)
    assert train.random_share == (1.0, 0.5)
    values = {"dataset": "data", "out": "report", "rankings": ("a,b.parquet",), "ks": ("1,5", "10")}
    evaluate = load_config(EvaluateConfig, **values)
    assert (evaluate.ks, evaluate.rankings) == ((1, 5, 10), (Path("a,b.parquet"),))
    tune = load_config(TuneConfig, overrides=["modes=caption,raw_image"], dataset="data", out="sweep")
    assert tune.modes == ("caption", "raw_image")
    with pytest.raises(UserError, match=r"`ks\.1`.*'x'"):
        load_config(EvaluateConfig, **values | {"ks": ("1,x",)})


SEEDED = [kind for kind in Config.__subclasses__() if "seed" in kind.model_fields]


@pytest.mark.parametrize("kind", SEEDED, ids=lambda kind: kind.__name__)
def test_a_negative_seed_is_refused_before_hours_of_work(kind: type[Config]) -> None:
    # NumPy takes none, and says so where the seed is first used.
    with pytest.raises(UserError, match="`seed`: input should be greater than or equal to 0"):
        load_config(kind, defaults={}, overrides=["seed=-1"])


def test_an_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="semantic_summary_small"):
        load_config(TrainConfig, dataset="data", out="run", mode="captions")


@pytest.mark.parametrize("content", ["- a\n- b\n", "a: [1\n", b"\xff\xfe"])
def test_an_unreadable_config_file_is_named(tmp_path: Path, content: str | bytes) -> None:
    file = tmp_path / "broken.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=r"broken\.yaml"):
        load_config(TrainConfig, file=file, **NEEDED)


def test_a_missing_config_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml does not exist"):
        load_config(TrainConfig, file=tmp_path / "nowhere.yaml", **NEEDED)


def test_overrides_nest_and_later_ones_win() -> None:
    assert parse_overrides(["a.b=1", "a.c=[1, 2]", "a.b=2", "d=x=y"]) == {"a": {"b": 2, "c": [1, 2]}, "d": "x=y"}


def test_merge_leaves_its_arguments_alone() -> None:
    low, high = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(low, high) == {"a": {"b": 1, "c": 2}}
    assert (low, high) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_configs_cannot_change_after_they_were_checked() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RankingConfig().top_k = 3  # type: ignore[misc]


def test_the_message_of_a_rule_stands_without_the_librarys_words() -> None:
    with pytest.raises(UserError) as caught:
        load_config(EvaluateConfig, dataset="d", rankings=["r"], out="o", ks=[0])
    assert "ks must be at least 1, got 0" in str(caught.value)
    assert "Value error" not in str(caught.value)


@pytest.mark.parametrize("kind", Config.__subclasses__(), ids=lambda kind: kind.__name__)
def test_every_key_is_explained_in_a_sentence(kind: type[Config]) -> None:
    """`vlrank STAGE --help` is where a newcomer learns what a key does."""
    for name, field in kind.model_fields.items():
        text = field.description or ""
        assert text.endswith("."), name
        assert len(text.split()) >= 3, name


def test_a_long_wrong_value_is_not_shown_whole() -> None:
    """The message would be lost in it."""
    template = "{title} " + "and so on " * 20 + "{titel}"
    with pytest.raises(UserError) as caught:
        load_config(PrepareConfig, dataset_code="beauty", text=template)
    assert caught.value.problem.startswith("config key `text`: unknown field `{titel}`; fields are title, ")
    assert caught.value.problem.endswith(" and so on a...")
