"""The embedded demo shop: drawn products and users whose taste has one half in the pictures and one half in the texts.

Every product has a kind (mug, lamp, ...), a **style** that is only *read*, in title and description, and a **colour**
and a **pattern** that are only *seen*, in its picture: no text of the shop names a colour. Every user likes one style
and one colour. Styles and colours are distributed independently over the catalogue, so a title says nothing about a
picture; the tastes are correlated (`HOME_COLOUR`: six in ten friends of a style like the same colour), so that a
reader of the history's texts alone can still learn which pictures its owner likes.

Two things make it a shop for readers rather than for counters. Tastes move on: a user's first purchases follow another
taste, so recent ones tell more. And a quarter of the products is **new**: nobody can buy them before the last two
purchases, so the training part of a leave-one-out split has none of them.

Everything is a pure function of the seed.
"""

from __future__ import annotations

import gzip
import io
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from vlrank.data import schemas
from vlrank.data.dataset import Dataset, DatasetWriter

KINDS = ("Mug", "Vase", "Lamp", "Cushion", "Backpack", "Umbrella", "Chair", "Shirt")
STYLES = ("Nordic", "Rustic", "Vintage", "Royal", "Urban", "Tropical")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (206, 58, 62),
    "yellow": (242, 198, 62),
    "green": (72, 156, 96),
    "blue": (62, 108, 196),
    "purple": (140, 86, 176),
    "black": (58, 58, 64),
}
PATTERNS = ("plain", "striped", "dotted")
HOME_COLOUR = dict(zip(STYLES, ("blue", "green", "red", "purple", "black", "yellow"), strict=True))
"""The colour that most friends of a style like."""
BRANDS = ("Alva", "Bruno", "Cato", "Dora", "Enzo", "Fenna", "Gusto", "Holm")

_DESCRIPTIONS = (
    "A {style} {kind} by {brand} for every day.",
    "{brand} makes this {kind} by hand, with a {style} touch.",
    "The {style} line of {brand}: a {kind} that lasts.",
)
_LAUNCH = 1_531_536_000  # 2018-07-14, when the new products come: seconds since 1970
_DAY = 86_400

# How a user picks: both halves of the taste, the text's half, the picture's half, anything.
_PICKS = ("both", "style", "colour", "any")
_PICK_PROBABILITIES = (0.72, 0.12, 0.12, 0.04)
_HOME_COLOUR_PROBABILITY = 0.6
_DISLIKE_PROBABILITY = 0.08
_PURCHASES = (8, 10)  # of a user, the upper bound excluded
_SETTLED = 6  # a user's last purchases, which follow the present taste
_AFTER_LAUNCH = 2  # a user's last purchases, which may be of new products: the validation and the test item


@dataclass(frozen=True, slots=True)
class Product:
    """One product of the shop; ``colour`` and ``pattern`` are in its picture only, ``style`` in its texts only."""

    source_id: str
    kind: str
    style: str
    colour: str
    pattern: str
    brand: str
    title: str
    description: str


@dataclass(frozen=True, slots=True)
class Review:
    """One rating; ``time`` in seconds since 1970, ``rating`` 1 to 5."""

    source_user: str
    source_id: str
    rating: float
    time: int


@dataclass(frozen=True, slots=True)
class Taste:
    """What a user likes."""

    style: str
    colour: str


def make_products(n_items: int, seed: int = 0) -> list[Product]:
    """The catalogue: styles x colours as evenly as ``n_items`` allows, kinds, patterns and brands at random."""
    rng = np.random.default_rng([seed, 1])
    cells = [(style, colour) for style in STYLES for colour in COLOURS]
    order = np.concatenate([rng.permutation(len(cells)) for _ in range(math.ceil(n_items / len(cells)))])[:n_items]
    products = []
    for number, cell in enumerate(order, start=1):
        style, colour = cells[cell]
        kind, pattern, brand = (str(rng.choice(names)) for names in (KINDS, PATTERNS, BRANDS))
        text = str(rng.choice(_DESCRIPTIONS)).format(style=style.lower(), kind=kind.lower(), brand=brand)
        products.append(Product(f"SHOP{number:06d}", kind, style, colour, pattern, brand, f"{style} {kind}", text))
    return products


def make_tastes(n_users: int, seed: int = 0) -> list[Taste]:
    """One taste per user: a uniform style, and its home colour in six of ten cases, else a uniform other colour."""
    rng = np.random.default_rng([seed, 2])
    tastes = []
    for _ in range(n_users):
        style = str(rng.choice(STYLES))
        home = HOME_COLOUR[style]
        at_home = rng.random() < _HOME_COLOUR_PROBABILITY
        tastes.append(Taste(style, home if at_home else str(rng.choice([name for name in COLOURS if name != home]))))
    return tastes


def new_products(products: Sequence[Product]) -> Sequence[Product]:
    """The last quarter of the catalogue, which nobody can buy before the launch."""
    return products[len(products) - len(products) // 4 :]


def make_reviews(products: Sequence[Product], tastes: Sequence[Taste], seed: int = 0) -> list[Review]:
    """What the users bought and how they rated it, in order of time.

    A user buys 8 or 9 different products, the last two after the launch of `new_products`. Seven in ten match both
    halves of the taste, others one half or none; within a group popular products are likelier. All but the last six
    follow an earlier taste, which is that of another user now. A few purchases before the launch disappoint (rating 1
    or 2): ``--min_rating 3`` drops them.
    """
    rng = np.random.default_rng([seed, 3])
    popularity = np.arange(1, len(products) + 1) ** -0.3
    rng.shuffle(popularity)
    styles = np.array([product.style for product in products])
    colours = np.array([product.colour for product in products])
    n_old = len(products) - len(new_products(products))
    old = np.arange(len(products)) < n_old
    earlier = [tastes[i] for i in rng.permutation(len(tastes))]
    reviews = []
    for user, now in enumerate(tastes, start=1):
        count = int(rng.integers(*_PURCHASES))
        before = min(count - _AFTER_LAUNCH, n_old)
        count = min(count, before + _AFTER_LAUNCH, len(products))
        gaps = rng.integers(_DAY, 30 * _DAY, count)
        times = _LAUNCH + np.concatenate([-np.cumsum(gaps[:before])[::-1], np.cumsum(gaps[before:])])
        free = np.ones(len(products), dtype=bool)
        for number, time in enumerate(times.tolist()):
            taste = now if number >= count - _SETTLED else earlier[user - 1]
            style, colour = styles == taste.style, colours == taste.colour
            groups = {"both": style & colour, "style": style, "colour": colour, "any": np.ones_like(free)}
            sold = free if number >= before else free & old
            group = groups[str(rng.choice(_PICKS, p=_PICK_PROBABILITIES))] & sold
            weights = popularity * (group if group.any() else sold)
            item = int(rng.choice(len(products), p=weights / weights.sum()))
            free[item] = False
            disliked = number < before and rng.random() < _DISLIKE_PROBABILITY
            rating = float(rng.integers(1, 3) if disliked else rng.integers(4, 6))
            reviews.append(Review(f"U{user:06d}", products[item].source_id, rating, time))
    return sorted(reviews, key=lambda review: (review.time, review.source_user))


# ---- pictures ------------------------------------------------------------------------------------------------------


def draw(kind: str, colour: str, pattern: str, *, seed: int | Sequence[int] = 0, size: int = 224) -> Image.Image:
    """A product's picture: RGB, ``size`` x ``size`` pixels.

    ``seed`` moves, scales and tints it a little, so that no two products share a picture.
    """
    rng = np.random.default_rng(seed)
    big = 2 * size  # drawn at twice the size and scaled down: smooth edges
    tint = rng.normal(0, 7, 3)
    base = tuple(int(np.clip(value + shift, 0, 255)) for value, shift in zip(COLOURS[colour], tint, strict=True))
    backdrop = tuple(int(value) for value in np.clip(np.array([246, 243, 238]) + rng.normal(0, 4, 3), 228, 255))

    body, trim = (Image.new("L", (big, big)) for _ in range(2))
    _SILHOUETTES[kind](_Pen(body, rng_view := _view(rng)), _Pen(trim, rng_view))
    cloth = _cloth(base, pattern, big, float(rng.uniform(0, 1)))

    picture = Image.new("RGB", (big, big), backdrop)
    shadow = ImageChops.offset(ImageChops.lighter(body, trim), big // 60, big // 40)
    shadow = shadow.filter(ImageFilter.GaussianBlur(big / 50)).point(lambda value: value // 4)
    picture.paste((90, 80, 70), mask=shadow)
    picture.paste(_mix(base, (40, 32, 28), 0.45), mask=trim)
    picture.paste(cloth, mask=body)
    # Light from the left: the right third of the body is a little darker.
    shade = Image.linear_gradient("L").rotate(90).resize((big, big)).point(lambda value: max(0, value - 150) // 2)
    picture.paste(_mix(base, (0, 0, 0), 0.6), mask=ImageChops.multiply(shade, body))
    return picture.resize((size, size), Image.Resampling.LANCZOS)


def _mix(a: Sequence[int], b: Sequence[int], weight: float) -> tuple[int, ...]:
    return tuple(round(x * (1 - weight) + y * weight) for x, y in zip(a, b, strict=True))


def _cloth(base: tuple[int, ...], pattern: str, big: int, phase: float) -> Image.Image:
    """A square of the product's colour with its pattern in near white."""
    cloth = Image.new("RGB", (big, big), base)
    pen = ImageDraw.Draw(cloth)
    light = _mix(base, (255, 255, 255), 0.85)
    step = big / 7
    if pattern == "striped":
        for row in range(-1, 8):
            top = (row + phase) * step
            pen.rectangle((0, top, big, top + step * 0.36), fill=light)
    elif pattern == "dotted":
        for row in range(-1, 9):
            for column in range(-1, 9):
                x, y = (column + phase + (row % 2) / 2) * step, (row + phase) * step
                pen.ellipse((x - step / 4.4, y - step / 4.4, x + step / 4.4, y + step / 4.4), fill=light)
    return cloth


def _view(rng: np.random.Generator) -> tuple[float, float, float]:
    """Scale and shift of the product in its picture."""
    return float(rng.uniform(0.9, 1.06)), float(rng.uniform(-4, 4)), float(rng.uniform(-4, 4))


class _Pen:
    """Draws on a mask in a coordinate system of 0 to 100, whatever its size."""

    def __init__(self, mask: Image.Image, view: tuple[float, float, float]) -> None:
        self._draw = ImageDraw.Draw(mask)
        self._unit = mask.width / 100
        self._scale, self._dx, self._dy = view

    def _at(self, points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [
            (
                ((x - 50) * self._scale + 50 + self._dx) * self._unit,
                ((y - 50) * self._scale + 50 + self._dy) * self._unit,
            )
            for x, y in points
        ]

    def polygon(self, *points: tuple[float, float]) -> None:
        self._draw.polygon(self._at(points), fill=255)

    def ellipse(self, left: float, top: float, right: float, bottom: float, fill: int = 255) -> None:
        self._draw.ellipse(self._at([(left, top), (right, bottom)]), fill=fill)

    def box(self, left: float, top: float, right: float, bottom: float, radius: float = 3) -> None:
        self._draw.rounded_rectangle(self._at([(left, top), (right, bottom)]), radius * self._unit, fill=255)

    def ring(self, left: float, top: float, right: float, bottom: float, width: float) -> None:
        self._draw.ellipse(self._at([(left, top), (right, bottom)]), outline=255, width=round(width * self._unit))

    def wedge(self, left: float, top: float, right: float, bottom: float, start: float, end: float) -> None:
        self._draw.pieslice(self._at([(left, top), (right, bottom)]), start, end, fill=255)


def _mug(body: _Pen, trim: _Pen) -> None:
    trim.ring(60, 34, 90, 68, 6)
    body.box(18, 22, 72, 82, 8)


def _vase(body: _Pen, trim: _Pen) -> None:
    trim.box(38, 8, 62, 16, 2)
    body.polygon((41, 14), (59, 14), (57, 34), (76, 58), (68, 90), (32, 90), (24, 58), (43, 34))


def _lamp(body: _Pen, trim: _Pen) -> None:
    trim.box(47, 50, 53, 86, 1)
    trim.ellipse(30, 82, 70, 92)
    body.polygon((34, 10), (66, 10), (84, 56), (16, 56))


def _cushion(body: _Pen, trim: _Pen) -> None:
    body.polygon((10, 14), (50, 20), (90, 14), (84, 50), (90, 86), (50, 80), (10, 86), (16, 50))
    for x, y in ((10, 14), (90, 14), (10, 86), (90, 86)):
        trim.ellipse(x - 4, y - 4, x + 4, y + 4)


def _backpack(body: _Pen, trim: _Pen) -> None:
    trim.ring(36, 4, 64, 28, 5)
    trim.box(14, 46, 24, 78, 4)
    trim.box(76, 46, 86, 78, 4)
    body.box(22, 16, 78, 90, 20)


def _umbrella(body: _Pen, trim: _Pen) -> None:
    trim.box(48, 48, 52, 90, 1)
    trim.ring(36, 80, 52, 96, 4)
    body.wedge(6, 8, 94, 100, 180, 360)
    for x in (6, 28, 50, 72):
        body.ellipse(x, 48, x + 22, 60, fill=0)


def _chair(body: _Pen, trim: _Pen) -> None:
    for x in (24, 70):
        trim.box(x, 58, x + 6, 94, 1)
    body.box(24, 8, 76, 52, 6)
    body.box(18, 54, 82, 68, 4)


def _shirt(body: _Pen, trim: _Pen) -> None:
    trim.ellipse(38, 8, 62, 26)
    body.polygon((36, 14), (64, 14), (94, 34), (84, 52), (72, 44), (72, 90), (28, 90), (28, 44), (16, 52), (6, 34))
    body.ellipse(40, 6, 60, 22, fill=0)


_SILHOUETTES = {
    "Mug": _mug,
    "Vase": _vase,
    "Lamp": _lamp,
    "Cushion": _cushion,
    "Backpack": _backpack,
    "Umbrella": _umbrella,
    "Chair": _chair,
    "Shirt": _shirt,
}


def picture_bytes(product: Product, seed: int = 0) -> bytes:
    """The product's picture as PNG; the same bytes for the same product and seed."""
    buffer = io.BytesIO()
    number = int(product.source_id.removeprefix("SHOP"))
    draw(product.kind, product.colour, product.pattern, seed=[seed, 4, number]).save(buffer, "PNG")
    return buffer.getvalue()


# ---- files and datasets --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RawShop:
    """The raw files of a shop, in the form of Amazon's: what `vlrank prepare` takes."""

    reviews: Path
    meta: Path


def write_raw_shop(folder: str | Path, *, n_items: int = 288, n_users: int = 600, seed: int = 0) -> RawShop:
    """Write ``reviews.json.gz``, ``meta.json.gz`` and ``pictures/``; the same bytes for the same arguments."""
    folder = Path(folder)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    products = make_products(n_items, seed)
    meta = []
    for product in products:
        picture = f"pictures/{product.source_id}.png"
        (folder / picture).write_bytes(picture_bytes(product, seed))
        meta.append(
            {
                "asin": product.source_id,
                "title": product.title,
                "brand": product.brand,
                "category": ["Home", f"{product.kind}s"],
                "description": [product.description],
                "image": picture,
            }
        )
    reviews = [
        {
            "reviewerID": review.source_user,
            "asin": review.source_id,
            "overall": review.rating,
            "unixReviewTime": review.time,
        }
        for review in make_reviews(products, make_tastes(n_users, seed), seed)
    ]
    shop = RawShop(folder / "reviews.json.gz", folder / "meta.json.gz")
    _write_lines(shop.reviews, reviews)
    _write_lines(shop.meta, meta)
    return shop


def _write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def make_shop(path: str | Path, *, n_items: int = 288, n_users: int = 600, seed: int = 0) -> Dataset:
    """The shop as a prepared dataset with pictures: `write_raw_shop` and `vlrank prepare` without Ray.

    Args:
        path: The dataset folder; must not exist.
        n_items: Products in the catalogue.
        n_users: Users; each has 5 to 9 purchases after ratings below 3 are left out.
        seed: Of everything.
    """
    products = make_products(n_items, seed)
    number = {product.source_id: item_id for item_id, product in enumerate(products, start=1)}
    bought: dict[str, list[Review]] = {}
    for review in make_reviews(products, make_tastes(n_users, seed), seed):
        if review.rating >= 3:
            bought.setdefault(review.source_user, []).append(review)
    bought = {user: reviews for user, reviews in sorted(bought.items()) if len(reviews) >= 5}
    with DatasetWriter(path) as writer:
        items = [
            {
                "item_id": number[product.source_id],
                "source_id": product.source_id,
                "text": f"{product.title}. {product.brand}. Home, {product.kind}s. {product.description}",
                "title": product.title,
                "brand": product.brand,
                "categories": ["Home", f"{product.kind}s"],
                "description": product.description,
                "image_path": writer.add_image(picture_bytes(product, seed), "png"),
                "image_url": None,
            }
            for product in products
        ]
        sequences = [
            {
                "user_id": user_id,
                "source_user": user,
                "item_ids": [number[review.source_id] for review in reviews],
                "timestamps": [review.time for review in reviews],
            }
            for user_id, (user, reviews) in enumerate(bought.items(), start=1)
        ]
        return writer.commit(
            items=pa.Table.from_pylist(items, schema=schemas.ITEMS),
            sequences=pa.Table.from_pylist(sequences, schema=schemas.SEQUENCES),
            options={"shop": {"n_items": n_items, "n_users": n_users, "seed": seed}},
        )
