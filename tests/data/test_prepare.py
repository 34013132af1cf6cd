"""From raw files to a dataset: equal to a plain reference, and whole or absent whatever happens."""

from __future__ import annotations

import gzip
import json
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vlrank.config import ColumnsConfig, PrepareConfig, load_config
from vlrank.data.dataset import Dataset
from vlrank.data.prepare import dry_run, run
from vlrank.errors import UserError


def prepare(**options: Any) -> Dataset:
    return Dataset.open(str(run(load_config(PrepareConfig, **options)).output))


def toy(folder: Path, rows: list[Any], meta: list[Any] | None = None) -> dict[str, Any]:
    """Options for a toy input; metadata for all items unless given."""
    folder.mkdir(exist_ok=True)
    (folder / "r.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    if meta is None:
        ids = sorted({row["item"] for row in rows if isinstance(row, dict)})
        meta = [{"item": source_id, "title": f"Title {source_id}"} for source_id in ids]
    (folder / "m.jsonl").write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in meta))
    return {
        "reviews": [folder / "r.jsonl"],
        "meta": [folder / "m.jsonl"],
        "out": folder / "ds",
        "min_uc": 1,
        "min_sc": 1,
    }


def row(user: str, item: str, timestamp: int, **more: Any) -> dict[str, Any]:
    return {"user": user, "item": item, "timestamp": timestamp, **more}


def by_source(dataset: Dataset) -> dict[str, list[tuple[str, int]]]:
    """Sequences in the source's ids."""
    names = dict(dataset.items().select("item_id", "source_id").iter_rows())
    return {
        user: [(names[item], t) for item, t in zip(items, times, strict=True)]
        for _, user, items, times in dataset.sequences().iter_rows()
    }


# ---- real data against a plain reference ----------------------------------------------------------------------------


def reference(
    reviews: Path, meta: Path, min_rating: float, core: int, *, deduplicate: bool
) -> dict[str, list[tuple[str, int]]]:
    """What `prepare` should do, written independently in plain Python."""
    titled = {m["asin"] for m in map(json.loads, gzip.decompress(meta.read_bytes()).splitlines()) if m["title"].strip()}
    rows = [json.loads(line) for line in gzip.decompress(reviews.read_bytes()).splitlines()]
    rows = [r for r in rows if r["overall"] >= min_rating and r["asin"] in titled]
    rows.sort(key=lambda r: r["unixReviewTime"])  # stable: ties keep the file's order
    if deduplicate:
        first: dict[tuple[str, str], dict[str, Any]] = {}
        for r in rows:
            first.setdefault((r["reviewerID"], r["asin"]), r)
        rows = list(first.values())
    while True:
        users, items = Counter(r["reviewerID"] for r in rows), Counter(r["asin"] for r in rows)
        kept = [r for r in rows if users[r["reviewerID"]] >= core and items[r["asin"]] >= core]
        if len(kept) == len(rows):
            break
        rows = kept
    sequences: dict[str, list[tuple[str, int]]] = {}
    for r in rows:
        sequences.setdefault(r["reviewerID"], []).append((r["asin"], r["unixReviewTime"]))
    return sequences


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("min_rating", "core", "deduplicate"), [(0, 1, False), (0, 5, True), (3, 5, True), (5, 3, True)]
)
def test_gift_cards_equal_the_plain_reference(
    tmp_path: Path, shared_data: Path, min_rating: float, core: int, deduplicate: bool
) -> None:
    folder = shared_data / "gift_cards2018"
    reviews, meta = folder / "Gift_Cards_5.json.gz", folder / "meta_Gift_Cards.json.gz"
    dataset = prepare(
        reviews=[reviews], meta=[meta], out=tmp_path / "ds", min_rating=min_rating, min_uc=core, min_sc=core,
        keep_duplicates=not deduplicate,
    )  # fmt: skip
    expected = reference(reviews, meta, min_rating, core, deduplicate=deduplicate)
    assert by_source(dataset) == expected
    assert dataset.sequences()["source_user"].to_list() == sorted(expected)
    assert dataset.items()["source_id"].to_list() == sorted({item for s in expected.values() for item, _ in s})
    assert not dataset.items()["text"].str.contains("<span|&amp;").any()


@pytest.mark.shared_data
def test_beauty_2014_keeps_all_users_and_titled_items_before_the_core(tmp_path: Path, shared_data: Path) -> None:
    """The public 5-core counts items without a title. Dropping those seven first leaves some users with four
    interactions, so the 5-core of what can be shown is smaller: 31 users and 8 items fewer."""
    folder = shared_data / "beauty2014"
    options: dict[str, Any] = {"reviews": [folder / "interactions.csv.gz"], "meta": [folder / "items.jsonl.gz"]}
    dataset = prepare(**options, out=tmp_path / "five", min_uc=5, min_sc=5)
    stages = {stage["stage"]: (stage["users"], stage["items"]) for stage in dataset.manifest["stages"]}
    assert stages["read"] == (22_363, 12_101)
    assert stages["items with a title"] == (22_363, 12_094)
    assert (dataset.n_users, dataset.n_items) == (22_332, 12_086)
    assert set(dataset.quarantine("metadata")["error_type"]) == {"NoTitle"}
    untouched = prepare(**options, out=tmp_path / "all", min_uc=4, min_sc=4)
    assert (untouched.n_users, untouched.n_items) == (22_363, 12_094)


@pytest.mark.shared_data
def test_hm_with_its_local_pictures(tmp_path: Path, shared_data: Path) -> None:
    folder = shared_data / "hm"
    options = {"reviews": [folder / "interactions.csv"], "meta": [folder / "items.jsonl"], "out": tmp_path / "ds"}
    dataset = prepare(**options, min_uc=7, min_sc=7, use_image=True, pictures={"workers": 0})
    assert dataset.n_items > 10
    assert dataset.items()["image_path"].null_count() == 0
    original = dataset.items().row(0, named=True)
    stored = (dataset.path / original["image_path"]).read_bytes()
    assert stored == (folder / "images" / f"{original['source_id']}.jpg").read_bytes()
    assert all(Path(str(meta["image_path"])).is_file() for meta in dataset.item_meta().values())


# ---- semantics ------------------------------------------------------------------------------------------------------


def test_min_rating_filters_and_a_missing_column_is_an_error(tmp_path: Path) -> None:
    rows = [row("u", "a", 1, rating=2), row("u", "b", 2, rating=3), row("u", "c", 3, rating=5), row("u", "d", 4)]
    dataset = prepare(**toy(tmp_path, rows), min_rating=3)
    assert by_source(dataset) == {"u": [("b", 2), ("c", 3)]}
    assert dataset.quarantine("reviews")["error_type"].to_list() == ["MissingRating"]
    with pytest.raises(UserError, match=r"has no ratings, but min_rating is 3\n.*columns\.rating"):
        prepare(**toy(tmp_path / "none", [row("u", "a", 1)]), min_rating=3)
    assert not (tmp_path / "none" / "ds").exists()


def test_a_repeated_pair_counts_once_at_its_earliest_time_or_always(tmp_path: Path) -> None:
    rows = [row("u", "a", 9), row("u", "b", 5), row("u", "a", 1), row("u", "b", 5)]
    options = toy(tmp_path, rows)
    assert by_source(prepare(**options)) == {"u": [("a", 1), ("b", 5)]}
    options["out"] = tmp_path / "all"
    assert by_source(prepare(**options, keep_duplicates=True)) == {"u": [("a", 1), ("b", 5), ("b", 5), ("a", 9)]}


def test_items_without_a_title_go_before_the_core_is_taken(tmp_path: Path) -> None:
    """User y reaches two interactions only with the untitled item c."""
    rows = [row(user, item, 1) for user, item in ("xa", "xb", "ya", "yc", "za", "zb")]
    meta = [{"item": "a", "title": "A"}, {"item": "b", "title": "<b>B</b>"}, {"item": "c", "title": "<span> </span>"}]
    dataset = prepare(**toy(tmp_path, rows, meta) | {"min_uc": 2, "min_sc": 2})
    assert by_source(dataset) == {"x": [("a", 1), ("b", 1)], "z": [("a", 1), ("b", 1)]}
    assert dataset.items()["title"].to_list() == ["A", "B"]
    kept = prepare(**toy(tmp_path, rows, meta) | {"out": tmp_path / "kept", "keep_untitled": True})
    assert kept.items()["text"].to_list() == ["A", "B", "c"]
    without = toy(tmp_path, rows) | {"meta": [], "out": tmp_path / "bare"}
    with pytest.raises(UserError, match="no metadata was given"):
        prepare(**without)
    assert prepare(**without, keep_untitled=True).items()["text"].to_list() == ["a", "b", "c"]


def test_an_item_without_a_title_is_shown_by_what_it_has(tmp_path: Path) -> None:
    """Amazon's raw Magazine Subscriptions hold the remains of a script for nearly all titles."""
    script = "var aPageStart = (new Date()).getTime();\nvar ue_t0 = +new Date();"
    meta = [
        {"item": "a", "title": script, "brand": "Time", "categories": ["Magazines", "News"], "description": "Weekly."},
        {"item": "b", "title": script},
        {"item": "b", "title": "", "description": "About gardens."},  # of untitled rows the first that says something
        {"item": "c", "title": script, "categories": ["Magazines"]},
        {"item": "d", "title": script, "brand": "Unknown"},
        {"item": "e", "title": "Bicycling", "brand": "Hearst"},
    ]
    options = toy(tmp_path, [row("u", item, 1) for item in "abcde"], meta)
    dataset = prepare(**options)
    texts = ["Time | Magazines > News | Weekly.", "About gardens.", "Magazines", "Bicycling | Hearst"]
    assert dataset.items()["text"].to_list() == texts
    assert dataset.manifest["stages"][1]["stage"] == "items with a title or another text"
    assert dataset.quarantine("metadata")["error_type"].to_list() == ["NoTitle"]
    shown = run(load_config(PrepareConfig, **options)).lines["items without a title"]
    assert shown == "3 shown by brand, categories or description"
    kept = run(load_config(PrepareConfig, **options | {"out": tmp_path / "kept"}, keep_untitled=True))
    assert kept.lines["items without a title"] == ("3 shown by brand, categories or description, 1 shown by their id")


def test_a_template_makes_the_item_texts(tmp_path: Path) -> None:
    meta = [
        {"item": "a", "title": "Lavender hand cream", "categories": ["Beauty", "Hands"]},
        {"item": "b", "title": "Soap"},
        {"item": "c", "brand": "Acme"},
    ]
    options = toy(tmp_path, [row("u", item, 1) for item in "abc"], meta)
    plain = prepare(**options)
    assert "text" not in plain.manifest["options"]  # as it was before there were templates
    override = "text={title:.14} [{categories[-1]}]"
    config = load_config(PrepareConfig, **options | {"out": tmp_path / "short"}, overrides=[override])
    assert Dataset.open(str(run(config).output)).items()["text"].to_list() == ["Lavender hand [Hands]", "Soap", "Acme"]
    only = prepare(**options | {"out": tmp_path / "only"}, text="{categories[0]}")
    assert only.items()["text"].to_list() == ["Beauty", "b", "c"]
    with pytest.raises(UserError, match="text was None, now"):
        prepare(**options, text="{title}")


def test_a_wrong_template_is_refused_with_the_fields_before_anything_is_read(tmp_path: Path) -> None:
    for given_as in ({"overrides": ["text={titel}"]}, {"text": "{titel}"}):
        with pytest.raises(UserError, match=r"config key `text`: unknown field `\{titel\}`; fields are title, brand"):
            load_config(PrepareConfig, reviews=[tmp_path / "no.json"], out=tmp_path / "ds", **given_as)


def test_of_several_metadata_rows_the_first_with_a_title_counts(tmp_path: Path) -> None:
    meta = [
        {"item": "a", "title": ""},
        {"item": "a", "title": "First"},
        {"item": "a", "title": "First"},
        {"item": "a", "title": "Second"},
    ]
    dataset = prepare(**toy(tmp_path, [row("u", "a", 1), row("u", "missing", 2)], meta))
    assert dataset.items()["title"].to_list() == ["First"]
    reasons = dataset.quarantine("metadata")["error_type"].to_list()
    assert sorted(reasons) == ["DuplicateMetadata", "NoMetadata"]


@pytest.mark.parametrize("keep", [False, True])
def test_bad_metadata_rows_are_kept_with_their_reason_even_where_untitled_items_stay(
    tmp_path: Path, keep: bool
) -> None:
    meta = [{"item": "a", "title": "First"}, {"item": "a", "title": "Second"}, "{broken", {"item": "b", "title": ""}]
    dataset = prepare(**toy(tmp_path, [row("u", "a", 1), row("u", "b", 2)], meta), keep_untitled=keep)
    reasons = dataset.quarantine("metadata")["error_type"].to_list()
    assert sorted(reasons) == ["BadMetadata", "DuplicateMetadata", *([] if keep else ["NoTitle"])]


def test_several_files_make_one_dataset_whatever_their_order(tmp_path: Path) -> None:
    options = toy(tmp_path, [row("u", "a", 2), row("v", "b", 1)])
    (tmp_path / "more.csv").write_text("user,item,timestamp\nu,b,1\n")
    first = prepare(**options | {"reviews": [tmp_path / "r.jsonl", tmp_path / "more.csv"], "out": tmp_path / "1"})
    second = prepare(**options | {"reviews": [tmp_path / "more.csv", tmp_path / "r.jsonl"], "out": tmp_path / "2"})
    assert by_source(first) == {"u": [("b", 1), ("a", 2)], "v": [("b", 1)]}
    assert first.sequences().equals(second.sequences())


def test_the_temporal_split_records_its_cuts(tmp_path: Path) -> None:
    rows = [row(f"u{n % 5}", f"i{n}", n) for n in range(50)]
    dataset = prepare(**toy(tmp_path, rows), split="temporal", val_fraction=0.2, test_fraction=0.2)
    assert dataset.manifest["split"] == {"method": "temporal", "val_from": 30, "test_from": 40}
    assert len(dataset.histories("test")) == 5
    given_cuts = prepare(**toy(tmp_path, rows) | {"out": tmp_path / "g"}, split="temporal", val_from=10, test_from=20)
    assert given_cuts.manifest["split"] == {"method": "temporal", "val_from": 10, "test_from": 20}


rows_strategy = st.lists(
    st.tuples(st.sampled_from("uvw"), st.sampled_from("abcd"), st.integers(0, 3)), min_size=1, max_size=25
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows_strategy, st.integers(1, 3), st.sampled_from(["json", "csv"]))
def test_any_input_gives_the_plain_result_or_says_that_nothing_is_left(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str, int]], core: int, kind: str
) -> None:
    folder = tmp_path_factory.mktemp("any")
    options = toy(folder, [row(*values) for values in rows]) | {"min_uc": core, "min_sc": core}
    if kind == "csv":
        lines = ["user,item,timestamp", *(",".join(map(str, values)) for values in rows)]
        (folder / "r.csv").write_text("\n".join(lines))
        options["reviews"] = [folder / "r.csv"]
    expected: list[tuple[str, str, int]] = []
    for values in sorted(rows, key=lambda r: r[2]):
        if values[:2] not in [kept[:2] for kept in expected]:
            expected.append(values)
    while True:
        users, items = Counter(r[0] for r in expected), Counter(r[1] for r in expected)
        kept = [r for r in expected if users[r[0]] >= core and items[r[1]] >= core]
        if kept == expected:
            break
        expected = kept
    if not expected:
        with pytest.raises(UserError, match="no interactions are left after `core"):
            prepare(**options)
        assert not (folder / "ds").exists()
        return
    found = by_source(prepare(**options))
    assert found == {user: [(r[1], r[2]) for r in expected if r[0] == user] for user in users}


# ---- again, differently, interrupted --------------------------------------------------------------------------------


def test_a_second_run_changes_nothing_and_another_one_asks_first(tmp_path: Path) -> None:
    options = toy(tmp_path, [row("u", "a", 1), row("u", "b", 2)])
    dataset = prepare(**options)
    dataset.add_generated("caption", [{"item_id": 1, "text": "c", "model": "m", "prompt_id": "p", "input_hash": "h"}])
    before = {path: path.stat().st_mtime_ns for path in dataset.path.rglob("*")}
    assert "nothing to do" in run(load_config(PrepareConfig, **options)).title
    assert {path: path.stat().st_mtime_ns for path in dataset.path.rglob("*")} == before
    with pytest.raises(UserError, match="made differently: max_text_chars was 600, now 100"):
        prepare(**options, max_text_chars=100)
    (tmp_path / "r.jsonl").write_text(json.dumps(row("u", "a", 1)))
    with pytest.raises(UserError, match="other reviews files"):
        prepare(**options)
    assert prepare(**options, overwrite=True).n_items == 1


def test_bad_rows_are_counted_and_kept_with_their_reason(tmp_path: Path) -> None:
    options = toy(tmp_path, [row("u", "a", 1), "{broken", '{"user": "u"}', row("u", "b", 2)])
    options["meta"][0].write_bytes(
        options["meta"][0].read_bytes() + b'\n{"item": "b", "title": "caf\xe9 again"}\n{nonsense'
    )
    summary = run(load_config(PrepareConfig, **options))
    dataset = Dataset.open(options["out"])
    assert summary.counts["quarantined_reviews"] == 2
    assert summary.counts["quarantined_metadata"] == 2
    assert [key.rsplit(":", 1)[1] for key in dataset.quarantine("reviews")["key"]] == ["2", "3"]
    assert "BadInteraction" in str(summary.lines["quarantine: reviews"])


def test_lines_of_ten_megabytes_and_of_several_encodings_lose_nothing(tmp_path: Path) -> None:
    options = toy(tmp_path, [row("u", "a", 1, text="x" * 10_000_000), row("u", "b", 2), row("u", "c", 3)])
    long = json.dumps({"item": "a", "title": "Long", "description": "word " * 2_000_000}).encode()
    utf8 = '{"item": "b", "title": "Café “b”"}'
    options["meta"][0].write_bytes(b"\n".join([long, utf8.encode("cp1252"), utf8.replace("b", "c").encode()]))
    dataset = prepare(**options)
    assert dataset.items()["title"].to_list() == ["Long", "Café “b”", "Café “c”"]
    assert dataset.items()["text"].str.len_chars().to_list()[0] <= 600
    assert dataset.quarantine_stages() == []


@pytest.mark.parametrize("pack", ["gzip", "plain"])
def test_input_without_a_single_usable_row_is_named(tmp_path: Path, pack: str) -> None:
    path = tmp_path / ("r.json.gz" if pack == "gzip" else "r.json")
    path.write_bytes(gzip.compress(b"") if pack == "gzip" else b"")
    with pytest.raises(UserError, match="no usable interaction among 0 rows"):
        prepare(reviews=[path], out=tmp_path / "ds", keep_untitled=True)
    (tmp_path / "list.json").write_text("[1,\n2]")
    with pytest.raises(UserError, match=r"among 2 rows\nThe first of them: .*list\.json:1: not JSON"):
        prepare(reviews=[tmp_path / "list.json"], out=tmp_path / "ds", keep_untitled=True)
    with pytest.raises(UserError, match="no item of the reviews, such as 'a', has a title"):
        prepare(**toy(tmp_path / "toy", [row("u", "a", 1)], [{"item": "b", "title": "B"}]))
    assert not (tmp_path / "ds").exists()


def test_a_cut_off_download_is_refused_unless_asked_for(tmp_path: Path) -> None:
    rows = [json.dumps(row(f"u{n % 9}", f"i{n % 11}", n * 7919 % 100_003)) for n in range(3_000)]
    (tmp_path / "r.json.gz").write_bytes(gzip.compress("\n".join(rows).encode())[:-2_000])
    options: dict[str, Any] = {"reviews": [tmp_path / "r.json.gz"], "out": tmp_path / "ds", "keep_untitled": True}
    with pytest.raises(UserError, match="is cut off"):
        prepare(**options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json.gz"]
    dataset = prepare(**options, allow_truncated=True)
    assert 1_000 < dataset.manifest["stages"][0]["interactions"] < 3_000
    assert dataset.quarantine("reviews")["error_type"].to_list() == ["TruncatedFile"]


def test_wrong_options_are_one_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="give either reviews"):
        load_config(PrepareConfig, out=tmp_path / "ds")
    with pytest.raises(UserError, match="does not exist"):
        prepare(reviews=[tmp_path / "no.json"], out=tmp_path / "ds")
    (tmp_path / "r.xlsx").write_text("x")
    with pytest.raises(UserError, match="no known kind"):
        prepare(reviews=[tmp_path / "r.xlsx"], out=tmp_path / "ds")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is not a dataset"):
        prepare(**toy(tmp_path, [row("u", "a", 1)]) | {"out": tmp_path / "other"})
    assert (tmp_path / "other" / "file").read_text() == "mine"


def test_plan_says_what_would_be_read(tmp_path: Path) -> None:
    options = toy(tmp_path, [row("u", "a", n) for n in range(100)])
    summary = dry_run(load_config(PrepareConfig, **options))
    assert "100" in str(summary.lines["reviews"])
    assert not (tmp_path / "ds").exists()


PROGRAM = """
import sys
from vlrank.config import ColumnsConfig, PrepareConfig, load_config
from vlrank.data import prepare
from vlrank.errors import UserError
{patch}
try:
    options = {{"keep_untitled": True, "min_uc": 1, "min_sc": 1}}
    prepare.run(load_config(PrepareConfig, reviews=[sys.argv[1]], out=sys.argv[2], **options))
except UserError as error:
    print(error.problem)
    sys.exit(2)
"""


def start(patch: str, reviews: Path, out: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PROGRAM.format(patch=patch), str(reviews), str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def big_reviews(tmp_path: Path) -> Path:
    path = tmp_path / "in" / "r.csv"
    path.parent.mkdir()
    lines = (f"u{n * 7919 % 9_973},i{n * 104_729 % 4_999},{n}" for n in range(60_000))
    path.write_text("user,item,timestamp\n" + "\n".join(lines))
    return path


def test_ctrl_c_leaves_no_half_dataset_and_the_next_run_is_whole(tmp_path: Path, big_reviews: Path) -> None:
    """The process is stopped while it writes: it says so on stdout and then waits to be interrupted."""
    out = tmp_path / "out" / "ds"
    patch = """
import time
from vlrank.data import dataset
check = dataset._check_tables
def slow(folder):
    print("writing", flush=True)
    time.sleep(60)
    return check(folder)
dataset._check_tables = slow
"""
    process = start(patch, big_reviews, out)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    assert (out.parent / ".ds.building" / "sequences.parquet").exists()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert list(out.parent.iterdir()) == []
    assert prepare(reviews=[big_reviews], out=out, keep_untitled=True, min_uc=1, min_sc=1).n_users == 9_973


def test_kill_leaves_no_dataset_and_the_next_run_clears_up(tmp_path: Path, big_reviews: Path) -> None:
    out = tmp_path / "out" / "ds"
    patch = """
import os, signal
from vlrank.data import dataset
dataset._hashes = lambda _: os.kill(os.getpid(), signal.SIGKILL)
"""
    process = start(patch, big_reviews, out)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in out.parent.iterdir()] == [".ds.building"]
    prepare(reviews=[big_reviews], out=out, keep_untitled=True, min_uc=1, min_sc=1)
    assert [path.name for path in out.parent.iterdir()] == ["ds"]


def test_a_file_size_limit_stops_with_a_message_and_leaves_nothing(tmp_path: Path, big_reviews: Path) -> None:
    patch = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
"""
    process = start(patch, big_reviews, tmp_path / "out" / "ds")
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 2, stderr
    assert "cannot write" in stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_stops_with_a_message_and_leaves_nothing(tmp_path: Path, big_reviews: Path) -> None:
    """A file system of 256 KiB, where the tests may mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("not allowed to mount a tmpfs")
    try:
        process = start("", big_reviews, disk / "ds")
        stdout, stderr = process.communicate(timeout=120)
        assert process.returncode == 2, stderr
        assert "No space left" in stdout
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def _shop(folder: Path, times: list[Any], titled: int, items: int = 6) -> PrepareConfig:
    reviews = [
        {"user": f"u{user}", "item": f"i{item}", "timestamp": 1_600_000_000 + item}
        for user in range(4)
        for item in range(items)
    ]
    for row, when in enumerate(times):
        reviews[row * items]["timestamp"] = when
    meta = [{"item": f"i{item}", "title": f"T{item}" if item < titled else ""} for item in range(items)]
    for name, rows in (("r.jsonl", reviews), ("m.jsonl", meta)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return PrepareConfig(
        reviews=(folder / "r.jsonl",), meta=(folder / "m.jsonl",), out=folder / "d", min_uc=3, min_sc=3
    )


def test_impossible_times_are_counted_with_an_example_and_put_aside_when_asked(tmp_path: Path) -> None:
    config = _shop(tmp_path, [0, -86_400, 16_000_000_000_000], titled=6)
    summary = run(config)
    line = str(summary.lines["impossible times"])
    assert line.startswith(
        f"2 before 1990, 1 in the future, such as 1970-01-01 00:00:00 in {tmp_path / 'r.jsonl'}:1; kept"
    )
    assert Dataset.open(tmp_path / "d").sequences()["item_ids"].list.len().to_list() == [6, 6, 6, 6]
    config = config.model_copy(update={"impossible_times": "quarantine", "out": tmp_path / "other"})
    assert "in quarantine" in str(run(config).lines["impossible times"])
    dataset = Dataset.open(tmp_path / "other")
    assert dataset.sequences()["item_ids"].list.len().to_list() == [5, 5, 5, 5]  # i0 keeps one user of three
    assert [row["message"].split(" is ")[0] for row in dataset.quarantine("reviews").to_dicts()] == [
        "1970-01-01 00:00:00",
        "1969-12-31 00:00:00",
        "2477-01-07 04:26:40",
    ]


def test_a_dataset_that_older_options_made_is_not_taken_for_another(tmp_path: Path) -> None:
    config = _shop(tmp_path, [], titled=6)
    run(config)
    manifest = json.loads((tmp_path / "d" / "manifest.json").read_text())
    del manifest["options"]["impossible_times"]
    del manifest["options"]["columns"]["meta_item"]
    (tmp_path / "d" / "manifest.json").write_text(json.dumps(manifest))
    assert "nothing to do" in run(config).title


@pytest.mark.parametrize(
    ("update", "titled", "message", "remedy"),
    [
        ({}, 1, "`core.*4 before.: 5 of 6 items have no title", "keep_untitled=true"),
        ({}, 0, "no item of the reviews, .* in the metadata: 6 of 6 items have no title", "columns.title"),
        ({"min_uc": 7}, 6, "`core: users >= 7, items >= 3` .24 before.$", "Lower min_uc"),
    ],
)
def test_when_nothing_is_left_the_real_cause_is_named(
    tmp_path: Path, update: dict[str, Any], titled: int, message: str, remedy: str
) -> None:
    with pytest.raises(UserError) as told:
        run(_shop(tmp_path, [], titled).model_copy(update=update))
    problem, its_remedy = str(told.value).split("\n")
    assert re.search(message, problem)
    assert remedy in its_remedy
    assert not (tmp_path / "d").exists()


def test_items_that_the_metadata_lacks_are_told_from_untitled_ones(tmp_path: Path) -> None:
    config = _shop(tmp_path, [], titled=6)
    (tmp_path / "m.jsonl").write_text('{"item": "x1", "title": "T"}\n{"item": "i1", "title": ""}\n')
    with pytest.raises(
        UserError, match=r"6 of 6 items have no title.* \(5 have no usable row in the metadata\)\n.*ids"
    ):
        run(config)


def test_reviews_and_metadata_may_call_the_item_differently(tmp_path: Path) -> None:
    config = _shop(tmp_path, [], titled=6)
    rows = (tmp_path / "m.jsonl").read_text().replace('"item"', '"sku"')
    (tmp_path / "m.jsonl").write_text(rows)
    with pytest.raises(UserError, match=r"no usable row in the metadata\)\n.*columns.meta_item"):
        run(config)
    dataset = Dataset.open(str(run(config.model_copy(update={"columns": ColumnsConfig(meta_item="sku")})).output))
    assert (dataset.items()["title"] != "").all()


def test_a_table_of_items_without_the_item_column_names_the_key_for_it(tmp_path: Path) -> None:
    config = _shop(tmp_path, [], titled=6)
    (tmp_path / "m.csv").write_text("sku,title\ni1,T\n")
    with pytest.raises(UserError, match=r"no item column .* its columns are sku, title\n.*columns.meta_item=NAME\.$"):
        run(config.model_copy(update={"meta": (tmp_path / "m.csv",)}))


@pytest.mark.parametrize("text", ['[{"a": 1}]', '[\n  {\n "a": 1}\n]', '\ufeff [{"a": 1},\n{"a": 2}]', "[\n\n{}]"])
@pytest.mark.parametrize("role", ["reviews", "meta"])
def test_a_json_array_is_refused_with_the_command_that_makes_lines_of_it(tmp_path: Path, text: str, role: str) -> None:
    config = _shop(tmp_path, [], titled=6)
    (tmp_path / "all items.json").write_text(text)
    told = r"one JSON array, expected one object per line\n.*jq -c '\.\[\]' '.*items.json'"
    with pytest.raises(UserError, match=told):
        run(config.model_copy(update={role: (tmp_path / "all items.json",)}))
    assert not (tmp_path / "d").exists()


def test_json_reviews_with_other_names_are_told_from_broken_ones(tmp_path: Path) -> None:
    config = _shop(tmp_path, [], titled=6)
    rows = (tmp_path / "r.jsonl").read_text().replace('"item"', '"sku"')
    (tmp_path / "r.jsonl").write_text(rows)
    with pytest.raises(UserError, match=r"no item column .* its columns are user, sku, .*\n.*columns.item=NAME\.$"):
        run(config)
