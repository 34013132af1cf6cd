"""What the report computes besides the metrics, and data that must not break it."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from vlrank.config import EvaluateConfig
from vlrank.data import schemas
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Lists
from vlrank.data.tables import write_parquet_atomic
from vlrank.errors import UserError
from vlrank.evaluation.report import _calibration, _run_curves, _script_json, _sweep
from vlrank.evaluation.run import run


def scored(rows: list[list[float]]) -> Lists:
    lists = Lists.from_dict({user: list(range(1, len(row) + 1)) for user, row in enumerate(rows)})
    return Lists(lists.users, lists.offsets, lists.items, np.log(np.concatenate(rows)))


def test_calibration_by_hand() -> None:
    # Two users, three candidates with 0.75, 0.15, 0.10 each; the target is the first for one, the second for the other.
    got = _calibration(scored([[0.75, 0.15, 0.10]] * 2), np.array([1, 2]))
    assert got is not None
    assert got["counts"] == [4, 2]  # 0.10 and 0.15 share a bin
    assert got["predicted"] == pytest.approx([0.125, 0.75])
    assert got["observed"] == pytest.approx([0.25, 0.5])
    assert got["error"] == pytest.approx((4 * 0.125 + 2 * 0.25) / 6, abs=1e-5)


def test_scores_that_are_no_probabilities_have_no_calibration() -> None:
    assert _calibration(scored([[5.0, 3.0]]), np.array([1])) is None
    assert _calibration(scored([[0.5, 0.5]]), np.array([9])) is None  # nobody's target is listed


def test_text_cannot_end_the_script_element() -> None:
    text = _script_json({"t": "</script><script>alert(1)</script>\u2028"})
    assert "<" not in text
    assert json.loads(text)["t"].startswith("</script>")


def test_curves_of_a_run_that_is_still_going(tmp_path: Path) -> None:
    lines = [
        '{"epoch": 1, "loss": 2.5, "recall@10": 0.1, "note": "x"}',
        '{"epoch": 2, "loss": NaN, "recall@10": 0.2}',
        '{"ep',
    ]
    (tmp_path / "history.jsonl").write_text("\n".join(lines))
    got = _run_curves(tmp_path)
    assert got["series"] == {"loss": [[1, 2.5]], "recall@10": [[1, 0.1], [2, 0.2]]}
    with pytest.raises(UserError, match=r"no trials\.jsonl"):
        _sweep(tmp_path)


def test_the_page_shows_where_the_time_of_a_run_went(world: Dataset, tmp_path: Path) -> None:
    file = ranked(world, tmp_path / "r.parquet", {1: [1, 2, 3]})
    folder = tmp_path / "caption"
    folder.mkdir()
    (folder / "history.jsonl").write_text('{"epoch": 1, "loss": 2.5, "recall@10": 0.1}\n')
    (folder / "result.json").write_text('{"phases": {"Ray": 12.3, "learning": 100.0, "end": 0.2}}')
    run(EvaluateConfig(dataset=world.path, rankings=(file,), runs=(folder,), out=tmp_path / "out", bootstrap=100))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "Where the time of caption went" in page
    assert re.search(r'<th scope="row">Ray</th>.*?<td>12 s</td>', page)
    assert '<th scope="row">end</th>' not in page


def ranked(world: Dataset, path: Path, lists: dict[int, list[int]]) -> Path:
    table = Lists.from_dict(lists).to_frame(split="test", source="m").select(schemas.RANKINGS.names)
    write_parquet_atomic(table, path, schemas.RANKINGS)
    return path


@pytest.mark.parametrize(
    "lists",
    [
        {1: []},
        {1: [], 2: [3]},
        {1: [1, 2, 3]},
        {user: [60 - user % 3] for user in range(1, 81)},
    ],
    ids=["one empty list", "an empty list among others", "one user", "one candidate"],
)
def test_meagre_rankings_still_make_a_report(world: Dataset, tmp_path: Path, lists: dict[int, list[int]]) -> None:
    file = ranked(world, tmp_path / "r.parquet", lists)
    run(EvaluateConfig(dataset=world.path, rankings=(file,), out=tmp_path / "out", bootstrap=100))
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["groups"][0]["protocol"]["users"] == len(lists)


def test_metrics_json_is_strict_json_and_the_page_says_the_same(world: Dataset, tmp_path: Path) -> None:
    lists = {user: [target, target % 60 + 1] for user, (_, target) in world.histories("test").items()}
    # Misses for all but a few: users whose target was retrieved have their own means.
    lists |= {user: [1] for user in list(lists)[5:] if world.histories("test")[user][1] != 1}
    file = ranked(world, tmp_path / "r.parquet", lists)
    run(EvaluateConfig(dataset=world.path, rankings=(file,), out=tmp_path, bootstrap=100, sample_users=0))
    text = (tmp_path / "metrics.json").read_text()
    assert "NaN" not in text
    method = json.loads(text)["groups"][0]["methods"][0]
    page = (tmp_path / "report.html").read_text()
    shown = re.search(r'<th scope="row">m</th>\s*<td[^>]*><span class="all"><b>([\d.]+)</b>', page)
    assert shown
    assert shown[1] == f"{method['metrics']['recall@1']['mean']:.4f}"
