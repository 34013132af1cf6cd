"""Each check fires on the mistake it is made for, and stays quiet on sound data."""

import numpy as np
import polars as pl

from vlrank.data.lists import Lists
from vlrank.evaluation.checks import Finding, check_candidates, check_order, check_times


def found(lists: dict[int, list[int]], targets: list[int], **options: object) -> dict[str, Finding]:
    given = {"histories": {}, "name": "candidates", "expected": 3, "n_items": 1000} | options
    return {f.check: f for f in check_candidates(Lists.from_dict(lists), np.array(targets), **given)}  # type: ignore[arg-type]


def test_sound_candidates_raise_nothing() -> None:
    assert found({1: [1, 2, 3], 2: [4, 5, 6]}, [2, 9], histories={1: [7], 2: [8]}) == {}


def test_duplicate_candidates() -> None:
    assert found({1: [1, 2, 1], 2: [3, 4, 5]}, [9, 9])["duplicates"].count == 1


def test_history_items_among_candidates() -> None:
    assert found({1: [1, 2, 3], 2: [3, 4, 5]}, [9, 9], histories={1: [2], 2: [9]})["history"].level == "note"
    both = check_candidates(
        Lists.from_dict({1: [1, 2, 3]}), np.array([3]), {1: [2, 3]}, name="c", expected=3, protocol="retrieval"
    )
    # Item 2 was had before; the target itself is a repeat, which is another matter.
    assert [(f.check, f.level, f.count) for f in both] == [("history", "warning", 1), ("history", "note", 1)]


def test_fewer_candidates_than_asked() -> None:
    finding = found({1: [1, 2], 2: [3, 4, 5]}, [9, 9])["short_lists"]
    assert (finding.count, finding.total) == (1, 2)
    assert "fewest: 2" in finding.message


def test_a_target_that_was_put_in() -> None:
    rng = np.random.default_rng(0)
    lists = {user: rng.choice(1000, 10, replace=False).tolist() for user in range(100)}
    targets = [items[int(rng.integers(10))] for items in lists.values()]
    assert found(lists, targets)["target_injected"].level == "error"
    # Under ground_truth that is the protocol.
    assert "target_injected" not in found(lists, targets, protocol="ground_truth")
    # Appended in place of the last one for those whom the retriever missed, but not for all.
    last = {user: [*items[:9], 2000 + user] for user, items in lists.items()}
    mixed = [items[-1] if user % 5 else 5000 for user, items in last.items()]
    assert "stand at place 10" in found(last, mixed)["target_injected"].message
    # An honest retriever: most targets at the top, many missed.
    honest = [items[0] if user % 2 else 5000 for user, items in lists.items()]
    assert "target_injected" not in found(lists, honest)


def test_near_duplicate_titles() -> None:
    titles = ["Red Lip Balm 5 ml", "red lip-balm, 5 ml", "Blue Soap", "Green Soap", "Hair Oil"]
    assert found({1: [1, 2, 3], 2: [3, 4, 5]}, [1, 3], titles=titles)["near_duplicates"].count == 1


def test_scores_that_contradict_or_say_nothing() -> None:
    def check(*rows: list[float]) -> list[str]:
        lists = Lists.from_dict({i: list(range(len(row))) for i, row in enumerate(rows)})
        scored = Lists(lists.users, lists.offsets, lists.items, np.concatenate([np.array(r, float) for r in rows]))
        return [f.message for f in check_order(scored, "m")]

    assert check([3, 2, 1], [5, 5, 4], [1]) == []
    assert "rise" in check([1, 2, 3], [3, 2, 1])[0]
    assert "equal" in check([1, 1, 1], [3, 2, 1])[0]
    assert "not finite" in check([1, float("nan"), 0])[0]
    constant = np.log([0.5, 0.3, 0.2]).tolist()
    assert "do not depend on the candidates" in check(*[constant] * 6)[0]
    assert "do not depend on the candidates" in check(*[np.log([1 / 3] * 3).tolist()] * 6)[0]
    assert check(*[constant] * 5, np.log([0.6, 0.3, 0.1]).tolist()) == []
    assert check(*[[-1, -2, -3]] * 6) == [], "ranks are alike by nature"


def sequences(times: list[list[int]]) -> pl.DataFrame:
    rows = {"user_id": list(range(1, len(times) + 1)), "timestamps": times}
    return pl.DataFrame(rows, schema={"user_id": pl.Int32, "timestamps": pl.List(pl.Int64)})


def test_targets_older_than_other_users_training() -> None:
    # User 1 ends before the others begin to train: any model of "what is popular" has seen user 1's future.
    times = [[1, 2, 3, 4]] + [[10 + u, 20 + u, 900, 1000] for u in range(19)]
    (finding,) = check_times(sequences(times), "test", dict.fromkeys(range(1, 21), 3))
    assert (finding.check, finding.level, finding.count) == ("time_leakage", "warning", 1)
    assert "--split temporal" in finding.message
    apart = [[u, 20 + u, 900 + u, 1000 + u] for u in range(20)]
    assert check_times(sequences(apart), "test", dict.fromkeys(range(1, 21), 3)) == []


def test_users_without_a_training_part_do_not_lend_their_targets_to_it() -> None:
    # Two items: history and test target. Their late targets were taken for training, and every dataset with many such
    # users was said to leak.
    times = [[u, 20 + u, 100 + u, 200 + u] for u in range(20)] + [[300, 900 + u] for u in range(20)]
    lengths = dict.fromkeys(range(1, 21), 3) | dict.fromkeys(range(21, 41), 1)
    assert check_times(sequences(times), "test", lengths) == []
    assert check_times(sequences([[5, 9]] * 3), "test", dict.fromkeys((1, 2, 3), 1)) == []


def test_a_target_before_its_own_history_is_an_error() -> None:
    # Cannot come out of `prepare`, but a dataset may be made by other hands.
    findings = check_times(sequences([[1, 2, 9, 4], [1, 2, 3, 4]]), "test", {1: 3, 2: 3})
    assert [(f.level, f.count) for f in findings if f.level == "error"] == [("error", 1)]
