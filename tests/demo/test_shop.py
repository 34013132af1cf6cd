"""The demo rests on the shop: tastes are really in the data, and no text gives away what only a picture shows."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vlrank.data.dataset import Dataset
from vlrank.demo.shop import (
    COLOURS,
    PATTERNS,
    Review,
    draw,
    make_products,
    make_reviews,
    make_shop,
    make_tastes,
    new_products,
    write_raw_shop,
)


def test_no_text_names_a_colour_or_a_pattern(shop: Dataset) -> None:
    words = {*COLOURS, *PATTERNS}
    for text in shop.items()["text"]:
        assert not words & {word.strip(".,|>").lower() for word in text.split()}, text


def test_pictures_show_the_colour() -> None:
    """The product's own pixels, in the middle of the picture, are nearest to its colour."""
    for colour, rgb in COLOURS.items():
        centre = np.asarray(draw("Cushion", colour, "plain", seed=3))[80:140, 80:140].reshape(-1, 3).mean(0)
        distances = {name: np.linalg.norm(centre - np.array(value)) for name, value in COLOURS.items()}
        assert min(distances, key=distances.__getitem__) == colour, (colour, rgb, centre)


def test_patterns_and_kinds_differ_in_pixels() -> None:
    pictures = [np.asarray(draw(kind, "blue", pattern)) for kind in ("Mug", "Lamp") for pattern in PATTERNS]
    for i, first in enumerate(pictures):
        for second in pictures[i + 1 :]:
            assert np.abs(first.astype(int) - second).mean() > 1


def test_who_knows_both_halves_of_a_taste_beats_who_knows_one_and_who_knows_what_is_popular() -> None:
    products, tastes = make_products(180, 0), make_tastes(600, 0)
    by_id = {product.source_id: product for product in products}
    bought: dict[str, list[str]] = {}
    for review in make_reviews(products, tastes, 0):
        bought.setdefault(review.source_user, []).append(review.source_id)
    counts = Counter(item for items in bought.values() for item in items[:-1])
    rng = np.random.default_rng(0)
    hits = Counter[str]()
    for user, taste in enumerate(tastes, start=1):
        items = bought[f"U{user:06d}"]
        free = [product.source_id for product in products if product.source_id not in items]
        candidates = [by_id[items[-1]], *(by_id[free[i]] for i in rng.permutation(len(free))[:19])]
        noise = rng.random(20) * 0.1
        style = np.array([c.style == taste.style for c in candidates], float)
        colour = np.array([c.colour == taste.colour for c in candidates], float)
        scores = {"both": style + colour, "style": style, "colour": colour}
        scores["popular"] = np.array([counts[c.source_id] for c in candidates], float)
        for name, score in scores.items():
            hits[name] += int((score + noise).argmax() == 0)
    share = {name: count / len(tastes) for name, count in hits.items()}
    assert share["both"] > 1.5 * max(share["style"], share["colour"])
    assert min(share["style"], share["colour"]) > share["popular"]


def test_new_products_are_targets_and_never_in_the_training_part() -> None:
    """They show what nothing that counts purchases can do; one in the training part, and they would not be new."""
    products = make_products(480, 0)
    new = {product.source_id for product in new_products(products)}
    bought = _bought(make_reviews(products, make_tastes(300, 0), 0))
    assert not new & {review.source_id for reviews in bought.values() for review in reviews[:-2]}
    for place in (-1, -2):
        share = np.mean([reviews[place].source_id in new for reviews in bought.values()])
        assert 0.15 < share < 0.45
    # Nobody is judged by what others did later.
    last = max(review.time for reviews in bought.values() for review in reviews[:-2])
    assert last < min(review.time for reviews in bought.values() for review in reviews[-2:])


def test_recent_purchases_tell_the_taste_and_first_ones_another() -> None:
    products, tastes = make_products(180, 0), make_tastes(300, 0)
    by_id = {product.source_id: product for product in products}
    shares = []
    for user, reviews in _bought(make_reviews(products, tastes, 0)).items():
        bought = [by_id[review.source_id] for review in reviews]
        own = np.array([(p.style, p.colour) == (tastes[user].style, tastes[user].colour) for p in bought], float)
        shares.append((own[:2].mean(), own[-6:-1].mean(), own[-1]))
    first, recent, target = np.mean(shares, axis=0)
    assert first < 0.2 < 0.5 < min(recent, target)


def _bought(reviews: Sequence[Review]) -> dict[int, list[Review]]:
    """The purchases of each user, by the user's place among the tastes, oldest first."""
    bought: dict[int, list[Review]] = {}
    for review in reviews:
        bought.setdefault(int(review.source_user.removeprefix("U")) - 1, []).append(review)
    return bought


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    def content(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    write_raw_shop(tmp_path / "a", n_items=12, n_users=20, seed=3)
    write_raw_shop(tmp_path / "b", n_items=12, n_users=20, seed=3)
    write_raw_shop(tmp_path / "c", n_items=12, n_users=20, seed=4)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert content(tmp_path / "a") != content(tmp_path / "c")


def test_a_made_shop_is_a_complete_dataset(shop: Dataset) -> None:
    for meta in shop.item_meta().values():
        with Image.open(str(meta["image_path"])) as picture:
            assert picture.size == (224, 224)
    assert all(len(history) >= 3 for history, _ in shop.histories("val").values())


def test_an_existing_dataset_is_not_overwritten(shop: Dataset) -> None:
    from vlrank.errors import UserError

    with pytest.raises(UserError):
        make_shop(shop.path, n_items=12, n_users=20)
