"""The report in a real browser: it opens silently and offline, its controls work, and it fits a phone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from tests.browser.conftest import load
from vlrank.config import EvaluateConfig, RetrieveConfig
from vlrank.data import schemas
from vlrank.data.dataset import Dataset
from vlrank.data.lists import Lists
from vlrank.data.tables import write_parquet_atomic
from vlrank.evaluation.run import run
from vlrank.retrieval.retrieve import run as retrieve

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"><b>Mug</b> & \u2028 {{ 7*7 }}"


@pytest.fixture(scope="module")
def report(shop: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models on the shop, with captions, a run, a sweep, stage times, and a title that tries to break out."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(shop.path, folder / "data")
    dataset = Dataset.open(folder / "data")
    items = dataset.items()
    dataset.update_items(items.with_columns(title=pl.lit(HOSTILE)))
    texts = [
        {"item_id": i, "text": f"caption of {i} {HOSTILE}", "model": "m", "prompt_id": "caption/v1", "input_hash": "h"}
        for i in items["item_id"]
    ]
    dataset.add_generated("caption", texts)
    retrieve(RetrieveConfig(dataset=dataset.path, method="popularity", top_k=15))
    lists = Lists.from_frame(dataset.candidates("popularity").filter(pl.col("split") == "test"))
    targets = np.array([dataset.histories("test")[int(user)][1] for user in lists.users])
    files = []
    for seed, name in enumerate(("caption", "raw_image")):
        scores = np.random.default_rng(seed).normal(size=len(lists.items))
        scores += 0.8 * (lists.items == np.repeat(targets, lists.lengths))
        scores -= np.log(np.bincount(lists.segments(), np.exp(scores)))[lists.segments()]
        table = lists.sorted_by(scores).to_frame(split="test", source=f"qwen3vl/{name}")
        files.append(folder / f"{name}.parquet")
        write_parquet_atomic(table.select(schemas.RANKINGS.names), files[-1], schemas.RANKINGS)
    (folder / "run").mkdir()
    epochs = [{"epoch": e, "val_recall@10": 0.1 * e, "train_loss": 3 / e} for e in (1, 2, 3)]
    (folder / "run" / "history.jsonl").write_text("\n".join(map(json.dumps, epochs)) + '\n{"epoch": 4, "val_')
    (folder / "sweep").mkdir()
    trial = {"mode": "caption", "trial_id": "caption-000", "config": {"lr": 1e-4}, "metric": "recall@10"}
    points = {"status": "completed", "epochs": [{"epoch": 1, "metric": 0.2}, {"epoch": 2, "metric": 0.3}]}
    (folder / "sweep" / "trials.jsonl").write_text(json.dumps(trial | points))
    config = EvaluateConfig(
        dataset=dataset.path,
        rankings=tuple(files),
        out=folder / "out",
        bootstrap=200,
        baselines=("identity", "random", "popularity"),
        sample_users=12,
        runs=(folder / "run",),
        sweep=folder / "sweep",
        stage_times={"prepare": 3, "train": 41},
    )
    run(config)
    return folder / "out" / "report.html"


@pytest.fixture
def page(chromium: Any, report: Path) -> Iterator[Any]:
    chromium.set_window_size(1280, 1000)
    load(chromium, report.as_uri())
    yield chromium
    assert problems(chromium) == []


def problems(chromium: Any) -> list[Any]:
    """What the console has to complain about."""
    return [entry for entry in chromium.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


def count(page: Any, selector: str) -> int:
    return page.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def scroll_to_all_charts(page: Any) -> None:
    from selenium.webdriver.support.wait import WebDriverWait

    for element in page.find_elements("css selector", ".plot"):
        if element.is_displayed():
            page.execute_script("arguments[0].scrollIntoView({behavior: 'instant'})", element)
            WebDriverWait(page, 20).until(lambda _, e=element: e.get_attribute("data-drawn"))


def choose(page: Any, control: str, value: str) -> None:
    script = (
        "const s = document.querySelector(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))"
    )
    page.execute_script(script, f"[data-control={control}]", value)


def test_every_chart_is_drawn(page: Any) -> None:
    scroll_to_all_charts(page)
    # forest, curve, heat, position and calibration of the first model, slices, metric and loss, two of the sweep
    assert count(page, ".plot .main-svg") >= 10
    assert count(page, "figure[data-of='1'] .main-svg") == 0  # the second model's wait to be chosen
    choose(page, "model", "1")
    scroll_to_all_charts(page)
    assert count(page, "figure[data-of='1'] .main-svg") > 0


def test_data_stays_text(page: Any) -> None:
    assert page.title != "owned"
    assert count(page, ".browser b img, .browser img[src=x]") == 0
    assert HOSTILE.split("&")[0] in page.find_element("css selector", ".cands .title").get_attribute("textContent")


def test_titles_in_arabic_and_hebrew_read_from_the_right(page: Any) -> None:
    script = "return getComputedStyle(document.querySelector('.item .title')).unicodeBidi"
    assert page.execute_script(script) == "plaintext"


def test_wins_and_losses_filter_the_users(page: Any) -> None:
    def users() -> int:
        text = page.find_element("css selector", "[data-b=where]").text
        return 0 if text == "no such user" else int(text.split()[2])

    counts = {}
    for kind in ("all", "win", "loss", "same", "miss"):
        button = page.find_element("css selector", f"[data-b=filter] [data-value={kind}]")
        page.execute_script("arguments[0].click()", button)
        counts[kind] = users()
        assert button.text.split()[-1] == str(counts[kind])
        assert button.get_attribute("aria-pressed") == "true"
        if kind == "win" and counts[kind]:
            assert "▲" in page.find_element("css selector", ".verdict").text
            assert count(page, ".cands .item.target") == 1
    assert counts["all"] == 12 == sum(counts[kind] for kind in ("win", "loss", "same", "miss"))
    assert counts["win"] > 0
    assert counts["loss"] > 0


def test_search_and_keyboard_go_through_the_users(page: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    where = page.find_element("css selector", "[data-b=where]")
    page.execute_script("document.querySelector('[data-browser]').scrollIntoView({behavior: 'instant'})")
    page.execute_script("document.querySelector('[data-b=next]').focus()")
    ActionChains(page).send_keys(Keys.ARROW_RIGHT).perform()
    assert where.text.startswith("2 of")
    ActionChains(page).send_keys(Keys.ARROW_LEFT).perform()
    assert where.text.startswith("1 of")
    search = page.find_element("css selector", "[data-b=search]")
    search.send_keys("no such thing")
    assert where.text == "no such user"
    search.clear()
    search.send_keys("mug")
    assert where.text.endswith("12 users")


def test_table_switches_to_users_whose_target_was_retrieved(page: Any) -> None:
    cell = page.find_element("css selector", ".results td")
    before = cell.text
    page.find_element("css selector", "[data-control=scope] [data-value=retrieved]").click()
    assert cell.text != before


def test_pairs_follow_model_and_metric(page: Any) -> None:
    def visible() -> list[str]:
        script = "return [...document.querySelectorAll('.pairs tbody tr')].filter(r => !r.hidden).map(r => r.innerText)"
        return page.execute_script(script)

    assert len(visible()) == 4  # the other model and three rivals
    assert all("caption" in row for row in visible())
    choose(page, "pair-model", "1")
    assert all("raw_image" in row for row in visible())


def test_dark_mode_by_button_and_by_system(page: Any) -> None:
    theme = "return document.documentElement.dataset.theme"
    background = "return getComputedStyle(document.body).backgroundColor"
    assert page.execute_script(theme) == "light"
    light = page.execute_script(background)
    page.find_element("id", "theme").click()
    assert page.execute_script(theme) == "dark"
    assert page.execute_script(background) != light
    page.execute_script("localStorage.clear()")
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    )
    load(page, page.current_url)
    assert page.execute_script(theme) == "dark"
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_phone_needs_no_sideways_scrolling(page: Any) -> None:
    metrics = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    try:
        load(page, page.current_url)
        scroll_to_all_charts(page)
        assert page.execute_script("return document.documentElement.scrollWidth") <= 360
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_pictures_are_inside_the_file(page: Any, report: Path) -> None:
    assert count(page, ".cands img.pic") > 0
    sources = page.execute_script("return [...document.querySelectorAll('img')].map(i => i.src.slice(0, 16))")
    assert set(sources) == {"data:image/webp;"}
    text = report.read_text(encoding="utf-8")
    linked = page.execute_script("return [...document.querySelectorAll('[src],link')].map(e => e.src || e.href)")
    assert all(address.startswith("data:") for address in linked)
    assert "default-src 'none'" in text
