"""Which model a folder means. A user would rank with another run than the one that was given."""

from pathlib import Path

import pytest

from vlrank.data.tables import atomic_write_json
from vlrank.engines.models import best_checkpoint
from vlrank.errors import UserError


def test_the_model_of_a_sweep_is_its_winner_and_several_modes_are_named(tmp_path: Path) -> None:
    sweep, winners = tmp_path / "sweep", {}
    for mode, trial in (("caption", "caption-002"), ("raw_image", "raw_image-000")):
        (sweep / "runs" / trial / "checkpoint-9").mkdir(parents=True)
        atomic_write_json(sweep / "runs" / trial / "best.json", {"checkpoint": "checkpoint-9"})
        winners[mode] = {"trial_id": trial}
    (sweep / "trials.jsonl").touch()
    atomic_write_json(sweep / "best.json", {"caption": winners["caption"]})
    assert best_checkpoint(sweep) == sweep / "runs" / "caption-002" / "checkpoint-9"
    atomic_write_json(sweep / "best.json", winners)
    with pytest.raises(
        UserError, match=r"is a sweep of 2 modes\nGive the run folder of one: .*raw_image-000 \(raw_image\)"
    ):
        best_checkpoint(sweep)
