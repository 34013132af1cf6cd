"""SASRec and BSARec: they find what comes next, go on after a kill, and never list what they know nothing of."""

import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from vlrank.config import RayConfig, RetrieveConfig, SequentialConfig
from vlrank.cuda_graphs import Record
from vlrank.data.dataset import Dataset, write_dataset
from vlrank.data.lists import Lists
from vlrank.errors import UserError
from vlrank.retrieval import baselines
from vlrank.retrieval.retrieve import dry_run, run
from vlrank.retrieval.sequential.data import SequenceData, Task, batches, samples
from vlrank.retrieval.sequential.models import FrequencyFilter, SequenceModel
from vlrank.retrieval.sequential.training import Training, softmax_loss
from vlrank.runtime import ray_session

SMALL = {"hidden": 32, "dropout": 0.1, "lr": 0.005, "batch_size": 64, "epochs": 8, "cpus": 1, "gpus": 0}
ITEMS = 40
COLD = ITEMS + 1


def shop(path: Path, sequences: list[list[int]], n_items: int = COLD) -> Dataset:
    items = [
        {"item_id": i, "source_id": f"B{i}", "text": f"item {i}", "title": f"item {i}"} for i in range(1, n_items + 1)
    ]
    blank: dict[str, Any] = {
        "brand": None,
        "categories": [],
        "description": None,
        "image_path": None,
        "image_url": None,
    }
    users = [
        {"user_id": u, "source_user": f"U{u}", "item_ids": seq, "timestamps": list(range(len(seq)))}
        for u, seq in enumerate(sequences, start=1)
    ]
    return write_dataset(path, items=[item | blank for item in items], sequences=users, options={})


@pytest.fixture(scope="module")
def circle(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users walk around a circle of items, each from another start: all items are equally popular, the next is certain.

    Item 41 is bought by one user, last: nothing can be learned of it.
    """
    rng = np.random.default_rng(1)
    walks = [
        [(start + step) % ITEMS + 1 for step in range(rng.integers(5, 12))] for start in range(ITEMS) for _ in range(8)
    ]
    walks[0][-1] = COLD
    return shop(tmp_path_factory.mktemp("circle") / "data", walks)


def trained(
    dataset: Dataset, folder: Path, method: str = "sasrec", record: Record | None = None, **settings: Any
) -> Training:
    config = RetrieveConfig(dataset=dataset.path, method=method, sequential=SequentialConfig(**SMALL | settings))
    folder.mkdir(exist_ok=True)
    task = Task.of(config, dataset)
    return Training(task, SequenceData.of(dataset, method), folder, torch.device("cpu"), record)


def recall_at_1(dataset: Dataset, lists: Lists) -> float:
    targets = np.array([target for _, target in dataset.histories("test").values()])
    return float((lists.rank_of(targets) == 1).mean())


@pytest.mark.parametrize("method", ["sasrec", "bsarec"])
def test_a_pattern_that_popularity_cannot_see_is_found(circle: Dataset, tmp_path: Path, method: str) -> None:
    training = trained(circle, tmp_path, method)
    training.run(lambda history: None)
    users = SequenceData.of(circle, method).histories["test"]
    assert recall_at_1(circle, training.ranker.top(users, 5)) > 0.9
    popular = baselines.retrieve("popularity", baselines.Evidence.of(circle, "test"), users.users, 5)
    assert recall_at_1(circle, popular) < 0.2


def test_all_places_of_a_history_teach_the_pattern_too(circle: Dataset, tmp_path: Path) -> None:
    training = trained(circle, tmp_path, samples="histories", batch_size=16)
    training.run(lambda history: None)
    users = SequenceData.of(circle, "sasrec").histories["test"]
    assert recall_at_1(circle, training.ranker.top(users, 5)) > 0.9
    with pytest.raises(UserError, match="reads what comes after"):
        trained(circle, tmp_path, "bsarec", samples="histories")


def test_a_sampled_softmax_finds_the_pattern_too(circle: Dataset, tmp_path: Path) -> None:
    training = trained(circle, tmp_path, negatives=16)
    training.run(lambda history: None)
    users = SequenceData.of(circle, "sasrec").histories["test"]
    assert recall_at_1(circle, training.ranker.top(users, 5)) > 0.9


def test_what_is_drawn_stands_for_the_whole_catalogue() -> None:
    # The normaliser is the mean of many draws; uncorrected, often-drawn items would be pushed down.
    torch.manual_seed(0)
    model = SequenceModel(30, SequentialConfig(hidden=8), filtered=False)
    torch.nn.init.normal_(model.items.weight)
    states, targets = torch.randn(6, 8), torch.tensor([1, 2, 3, 10, 20, 30])
    q = torch.cat([torch.zeros(1), torch.arange(1.0, 31)])
    drawn = torch.multinomial(q, 400_000, replacement=True)
    whole = softmax_loss(model, states, targets, None, q / q.sum())
    estimate = softmax_loss(model, states, targets, drawn, q / q.sum())
    assert estimate.item() == pytest.approx(whole.item(), abs=0.01)


def test_a_killed_run_ends_like_an_unbroken_one_and_other_settings_start_anew(circle: Dataset, tmp_path: Path) -> None:
    whole = trained(circle, tmp_path / "whole", dropout=0.5, epochs=4)
    whole.run(lambda history: None)

    def kill(history: list[dict[str, Any]]) -> None:
        if len(history) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained(circle, tmp_path / "cut", dropout=0.5, epochs=4).run(kill)
    rest = trained(circle, tmp_path / "cut", dropout=0.5, epochs=4)
    assert len(rest.history) == 2
    rest.run(lambda history: None)
    for name, weights in whole.model.state_dict().items():
        assert torch.equal(weights, rest.model.state_dict()[name]), name
    assert [line["loss"] for line in rest.history] == [line["loss"] for line in whole.history]
    assert trained(circle, tmp_path / "cut", dropout=0.4, epochs=4).history == []
    state = tmp_path / "cut" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    assert trained(circle, tmp_path / "cut", dropout=0.5, epochs=4).history == []


@pytest.mark.parametrize("negatives", [None, 30])
def test_recorded_steps_learn_what_other_steps_learn(circle: Dataset, tmp_path: Path, negatives: int | None) -> None:
    """On a GPU nearly all steps are replays: of the same launches, on samples that lie in the same places."""
    recorded = 0

    def record(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        nonlocal recorded
        recorded += 1
        loss = torch.zeros(())
        return lambda: loss.copy_(compute()), loss

    settings: dict[str, Any] = {"dropout": 0.5, "epochs": 3, "negatives": negatives}
    expected = trained(circle, tmp_path / "launched", "bsarec", **settings)
    replays = trained(circle, tmp_path / "replayed", "bsarec", record, **settings)
    for training in (expected, replays):
        training.run(lambda history: None)
    assert 0 < recorded < 12  # lengths of 1 to 8
    assert [line["loss"] for line in replays.history] == [line["loss"] for line in expected.history]
    for name, weights in expected.model.state_dict().items():
        assert torch.equal(weights, replays.model.state_dict()[name]), name


def test_a_step_that_cannot_be_recorded_is_launched(
    circle: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def record(compute: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        raise RuntimeError("operation not permitted when stream is capturing")

    launched, refused = (trained(circle, tmp_path / str(r), record=r, epochs=2) for r in (None, record))
    for training in (launched, refused):
        training.run(lambda history: None)
    assert [line["loss"] for line in refused.history] == [line["loss"] for line in launched.history]
    assert capsys.readouterr().out.count("cannot be recorded") == 1


def test_training_stops_when_validation_does_not_improve(circle: Dataset, tmp_path: Path) -> None:
    training = trained(circle, tmp_path, lr=1e-9, epochs=50, patience=2)
    training.run(lambda history: None)
    best = max(line["ndcg"] for line in training.history)
    assert len(training.history) - 1 - [line["ndcg"] for line in training.history].index(best) == 2


def test_no_prefix_of_a_history_leaks_what_comes_after_it() -> None:
    # Where all places are learned at once a later item must not change an earlier state.
    model = SequenceModel(9, SequentialConfig(hidden=8, max_length=6, samples="histories"), filtered=False).eval()
    one, other = model(torch.tensor([[1, 2, 3, 4]])), model(torch.tensor([[1, 2, 3, 9]]))
    assert torch.equal(one[:, :3], other[:, :3])
    assert not torch.equal(one[:, 3], other[:, 3])
    # And what is learned there is what a list is made from: the state of the prefix alone.
    torch.testing.assert_close(one[:, 1], model(torch.tensor([[1, 2]]))[:, -1])


@pytest.mark.parametrize(("filtered", "kind"), [(False, "prefixes"), (False, "histories"), (True, "prefixes")])
def test_empty_places_change_nothing(filtered: bool, kind: Any) -> None:
    # Batches are as wide as their longest sample: a user's scores must not depend on who else is in the batch.
    torch.manual_seed(0)
    model = SequenceModel(9, SequentialConfig(hidden=8, max_length=8, samples=kind), filtered=filtered).eval()
    alone, padded = model(torch.tensor([[4, 5, 6]])), model(torch.tensor([[0, 0, 0, 4, 5, 6]]))
    torch.testing.assert_close(alone[:, -1], padded[:, -1])


def test_the_filter_keeps_low_frequencies_as_the_paper_has_it() -> None:
    # Equations 6 and 7 of Shin et al. by NumPy's FFT over the whole length: low + beta^2 (x - low).
    torch.manual_seed(0)
    layer = FrequencyFilter(4, max_length=10, c=5, dropout=0.0)
    layer.norm = torch.nn.Identity()
    x = torch.randn(2, 10, 4)
    spectrum = np.fft.rfft(x.numpy(), axis=1)
    spectrum[:, 3:] = 0
    low = np.fft.irfft(spectrum, n=10, axis=1)
    beta = layer.sqrt_beta.detach().numpy() ** 2
    got = layer(x, torch.ones(2, 10, dtype=torch.bool)).detach().numpy()
    np.testing.assert_allclose(got, x.numpy() + low + beta * (x.numpy() - low), atol=1e-5)


def test_every_target_is_learned_once_per_epoch() -> None:
    train = Lists.from_dict({1: [1, 2, 3, 4, 5, 6], 2: [7], 3: [8, 9]})
    starts, ends = samples(train, SequentialConfig(max_length=3, c=1))
    assert sorted(zip(starts.tolist(), ends.tolist(), strict=True)) == [(0, 1), (0, 2), (0, 3), (1, 4), (2, 5), (7, 8)]
    starts, ends = samples(
        train, SequentialConfig(max_length=3, c=1, samples="histories")
    )  # pieces of three: the targets are 2..3 of the first, 4..6 of the second
    assert sorted(zip(starts.tolist(), ends.tolist(), strict=True)) == [(0, 2), (2, 5), (7, 8)]
    rows = batches(np.arange(1000) % 37, 16, np.random.default_rng(0))
    assert sorted(np.concatenate(rows).tolist()) == list(range(1000))
    assert {len(batch) for batch in rows[:-1]} <= {16, 8}


@pytest.mark.parametrize(
    ("sequences", "message"), [([[1, 2, 3], [2, 3, 1]], "two training interactions"), ([[1, 2]], "two training")]
)
def test_sets_that_show_no_order_are_refused_at_once(tmp_path: Path, sequences: list[list[int]], message: str) -> None:
    dataset = shop(tmp_path / "data", sequences, 3)
    for act in (run, dry_run):
        with pytest.raises(UserError, match=message):
            act(RetrieveConfig(dataset=dataset.path, method="bsarec"))
    assert not (dataset.path / "retrievers").exists()


def test_sizes_that_do_not_fit_are_refused() -> None:
    for wrong, message in (({"heads": 3}, "divided among 3 heads"), ({"c": 90}, "no frequency would be filtered")):
        with pytest.raises(ValueError, match=message):
            SequentialConfig(**wrong)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    with ray_session(RayConfig(num_cpus=4)):
        yield


@pytest.mark.stack
def test_the_command_trains_lists_and_lists_again_without_training(
    circle: Dataset, tmp_path: Path, cluster: None
) -> None:
    shutil.copytree(circle.path, tmp_path / "data")
    data = Dataset.open(tmp_path / "data")
    config = RetrieveConfig(dataset=data.path, method="sasrec", top_k=10, sequential=SequentialConfig(**SMALL))
    summary = run(config)
    assert str(summary.lines["trained"]).startswith("8 epochs")
    assert summary.lines["cold items"] == (
        "1 without a training interaction are never listed (0 validation and 1 test targets)"
    )
    table = data.candidates("sasrec")
    for split in ("val", "test"):
        histories = data.histories(split)  # type: ignore[arg-type]
        rows = table.filter(pl.col("split") == split)
        assert len(rows) == len(histories)
        for user, items, scores in rows.select("user_id", "item_ids", "scores").iter_rows():
            assert len(items) == len(set(items)) == 10
            assert not set(items) & {*histories[user][0], COLD}
            assert scores == sorted(scores, reverse=True)
            assert all(map(math.isfinite, scores))
    # The test history ends with the validation item: what follows it is first.
    tests = Lists.from_frame(table.filter(pl.col("split") == "test"))
    assert recall_at_1(data, tests) > 0.9
    left = sorted(file.name for file in (data.path / "retrievers" / "sasrec").iterdir() if file.name[0] != ".")
    assert left == ["model.safetensors"]
    again = run(config.model_copy(update={"top_k": 3}))
    assert str(again.lines["trained"]).startswith("before")
    assert data.candidates("sasrec")["item_ids"].list.head(3).to_list() == table["item_ids"].list.head(3).to_list()
