"""The page of a sweep in a real browser: every plot is drawn, silently and offline, for the mode that is chosen."""

import json
import random
from pathlib import Path
from typing import Any

from tests.browser.conftest import load
from tests.browser.test_report_page import count, problems, scroll_to_all_charts
from vlrank.evaluation.report import render_sweep


def sweep(folder: Path, modes: dict[str, list[dict[str, Any]]]) -> Path:
    """A sweep's folder with a page; every second trial is stopped after one epoch."""
    rng = random.Random(0)
    trials = []
    for mode, configs in modes.items():
        for number, config in enumerate(configs):
            epochs = [
                {"epoch": epoch, "metric": rng.random(), "step": 10 * epoch, "seconds": 60.0 * epoch}
                for epoch in range(1, 2 if number % 2 else 4)
            ]
            trial = {"mode": mode, "trial_id": f"{mode}-{number:03d}", "config": config, "metric": "recall@10"}
            trials.append(trial | {"status": "completed", "epochs": epochs, "seconds": 200.0, "gpus": 1.0})
    (folder / "trials.jsonl").write_text("".join(json.dumps(trial) + "\n" for trial in trials))
    page = folder / "report.html"
    page.write_text(render_sweep("shop", folder), encoding="utf-8")
    return page


def test_all_plots_are_drawn_and_follow_the_mode(chromium: Any, tmp_path: Path) -> None:
    configs = [{"lr": 1e-4 * (1 + i), "batch_size": 8 * (1 + i % 3), "optim": "auto"} for i in range(7)]
    load(chromium, sweep(tmp_path, {"caption": configs, "raw_image": configs[:3]}).as_uri())
    scroll_to_all_charts(chromium)
    assert count(chromium, ".plot .main-svg") >= 4
    lines = "return document.querySelectorAll('[data-plot=sweep-parallel] .scatterlayer .trace').length"
    assert chromium.execute_script(lines) == 7
    chromium.find_element("css selector", "[data-sweep-mode] [data-value=raw_image]").click()
    assert chromium.execute_script(lines) == 3
    assert problems(chromium) == []


def test_a_sweep_without_learning_rates_or_with_one_trial_has_a_page_too(chromium: Any, tmp_path: Path) -> None:
    load(chromium, sweep(tmp_path, {"caption": [{"seed": 1}]}).as_uri())
    scroll_to_all_charts(chromium)
    assert count(chromium, "[data-plot=sweep-heat], [data-sweep-mode]") == 0
    assert count(chromium, ".plot .main-svg") >= 3
    assert problems(chromium) == []
