"""One way from any file to RGB: what a caption describes, ranking and the report show too."""

import io
import pickle
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlrank.data.images import normalise
from vlrank.data.picture import PictureBroken, PictureMissing, UnreadablePicture, read_rgb, to_rgb, upright_size

BACKGROUND, RED = (255, 255, 255), (255, 0, 0)


def png(depth: int, kind: int, row: bytes, key: bytes) -> bytes:
    """A PNG of one row repeated 16 times, 16 pixels wide, with a transparent colour, as Pillow cannot write it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 16, 16, depth, kind, 0, 0, 0)
    pixels = zlib.compress(16 * (b"\0" + row))
    chunks = [chunk(b"IHDR", head), chunk(b"tRNS", key), chunk(b"IDAT", pixels), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def halves(mode: str, left: Any, right: Any) -> Image.Image:
    image = Image.new(mode, (16, 16), left)
    image.paste(right, (8, 0, 16, 16))
    return image


def paletted() -> bytes:
    image = halves("P", 0, 1)
    image.putpalette([9, 9, 9, 255, 0, 0])
    return saved(image, transparency=b"\0\xff")


def grey16(value: int) -> Image.Image:
    return Image.fromarray(np.repeat(np.uint16([[0] * 8 + [value] * 8]), 16, axis=0))


CASES: dict[str, tuple[bytes, Any]] = {
    "RGBA": (saved(halves("RGBA", (0, 0, 0, 0), (255, 0, 0, 255))), RED),
    "half transparent": (saved(halves("RGBA", (0, 0, 0, 0), (0, 0, 0, 128))), (127, 127, 127)),
    "LA": (saved(halves("LA", (0, 0), (40, 255))), (40, 40, 40)),
    "palette": (paletted(), RED),
    "palette, GIF": (saved(Image.open(io.BytesIO(paletted())), "GIF", transparency=0), RED),
    "colour": (saved(halves("RGB", (0, 0, 0), RED), transparency=(0, 0, 0)), RED),
    "grey": (saved(halves("L", 0, 40), transparency=0), (40, 40, 40)),
    "grey, 1 bit": (png(1, 0, b"\xff\x00", b"\0\1"), (0, 0, 0)),
    "grey, 2 bits": (png(2, 0, b"\xff\xff\x55\x55", b"\0\3"), (85, 85, 85)),
    "grey, 4 bits": (png(4, 0, b"\xff" * 4 + b"\x33" * 4, b"\0\x0f"), (51, 51, 51)),
    "grey, 16 bits": (png(16, 0, b"\x01\x02" * 8 + b"\x80\x00" * 8, b"\x01\x02"), (128, 128, 128)),
    "colour, 16 bits": (png(16, 2, b"\x80\xff" * 24 + b"\xff\xff\0\0\0\0" * 8, b"\x80\xff" * 3), RED),
    "WebP": (saved(halves("RGBA", (0, 0, 0, 0), (255, 0, 0, 255)), "WEBP", lossless=True), RED),
}


@pytest.mark.parametrize("name", CASES)
def test_transparency_of_every_kind_is_laid_on_white(tmp_path: Path, name: str) -> None:
    """A product cut out of its ground is drawn on white; on black it is another picture, or none."""
    data, product = CASES[name]
    (tmp_path / "a.png").write_bytes(data)
    stored = Image.open(io.BytesIO(normalise(data, 10**6)[0]))
    for image in (read_rgb(tmp_path / "a.png"), stored):
        assert (image.mode, image.size) == ("RGB", (16, 16))
        assert (image.getpixel((2, 8)), image.getpixel((13, 8))) == (BACKGROUND, product)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (grey16(0x9C40), 0x9C),
        (halves("I", 0, 0x9C40), 0x9C),
        (halves("I", 0, 0x40000000), 0x80),
        (halves("F", 0.0, 0.5), 127),
        (halves("F", 0.0, 200.0), 200),
    ],
)
def test_more_than_eight_bits_are_scaled_not_clipped(tmp_path: Path, image: Image.Image, expected: int) -> None:
    image.save(tmp_path / "a.tiff")
    seen = read_rgb(tmp_path / "a.tiff")
    assert (seen.getpixel((2, 8)), seen.getpixel((13, 8))) == ((0, 0, 0), (expected,) * 3)


def test_printers_colours_and_films(tmp_path: Path) -> None:
    halves("CMYK", (0, 0, 0, 0), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=95)
    seen = np.asarray(read_rgb(tmp_path / "a.jpg")).astype(int)
    assert np.abs(seen[8, 2] - BACKGROUND).max() < 8
    assert np.abs(seen[8, 13] - RED).max() < 8
    frames = [Image.new("RGB", (16, 16), colour) for colour in (RED, (0, 0, 255))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_rgb(tmp_path / "a.gif").getpixel((5, 5)) == RED


@pytest.mark.parametrize("kind", ["png", "tiff", "webp"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_pictures_stand_upright(tmp_path: Path, turn: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    stored = Image.new("RGB", (32, 16))
    stored.paste(RED, (0, 0, 8, 8))
    path = tmp_path / f"a.{kind}"
    stored.save(path, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    red = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (1, 0), 7: (1, 1), 8: (0, 1)}[turn]
    image = read_rgb(path)
    assert image.size == upright_size(path) == ((32, 16) if turn < 5 else (16, 32))
    assert image.getpixel((2 + red[0] * (image.width - 5), 2 + red[1] * (image.height - 5))) == RED


def test_damaged_exif_costs_no_picture(tmp_path: Path) -> None:
    Image.new("RGB", (16, 16), RED).save(tmp_path / "a.jpg", exif=b"Exif\0\0garbage that is no TIFF")
    assert upright_size(tmp_path / "a.jpg") == read_rgb(tmp_path / "a.jpg").size == (16, 16)


def test_a_large_jpeg_is_decoded_at_a_fraction(tmp_path: Path) -> None:
    Image.new("RGB", (1600, 800), RED).save(tmp_path / "a.jpg")
    assert read_rgb(tmp_path / "a.jpg", at_least=200).size == (400, 200)
    assert read_rgb(tmp_path / "a.jpg").size == (1600, 800)


def test_plain_pictures_keep_their_pixels(tmp_path: Path) -> None:
    """What has been computed from them is kept, and models were trained on them."""
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    np.testing.assert_array_equal(np.asarray(read_rgb(tmp_path / "a.png")), pixels)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(np.asarray(to_rgb(image)), pixels)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "known format"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 64, "known format"),
        (saved(Image.effect_noise((200, 200), 80).convert("RGB"), "JPEG")[:3000], "truncated"),
        (saved(Image.new("RGB", (1093, 5))), "1093 x 5 pixels"),
        (saved(Image.new("RGB", (2, 5000))), "2 x 5000 pixels"),
    ],
)
def test_a_bad_file_is_named_with_its_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    with pytest.raises(PictureBroken, match=reason) as error:
        read_rgb(path)
    assert str(path) in str(error.value)
    again = pickle.loads(pickle.dumps(error.value))  # from another process
    assert (type(again), str(again), again.path) == (PictureBroken, str(error.value), str(path))


def test_a_missing_file_is_told_from_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(PictureMissing, match=r"gone\.jpg: no such file"):
        read_rgb(tmp_path / "gone.jpg")
    with pytest.raises(UnreadablePicture):
        upright_size(tmp_path)  # a folder
