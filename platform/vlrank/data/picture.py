"""Any picture as upright RGB: what captions, ranking, the report and the dataset's own copies see of a file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from vlrank.errors import UserError
from vlrank.storage import Location, fetch

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_ASPECT = 200
"""Longer strips are refused, as Qwen-VL's image processor does."""

_FLIPS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
"""EXIF orientation -> `PIL.Image.Transpose` that turns the picture upright."""


class UnreadablePicture(OSError):
    """A picture that nothing can be seen in.

    Attributes:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class PictureMissing(UnreadablePicture):
    """There is no such file."""


class PictureBroken(UnreadablePicture):
    """The file is damaged, of an unknown format, or a strip that no model takes."""


def read_rgb(path: str | Location, *, at_least: int | None = None) -> Image:
    """The picture in a file, see `to_rgb`.

    Args:
        path: File or URL.
        at_least: Pixels that each side has to keep: larger JPEGs are decoded at a half, a quarter or an eighth.

    Raises:
        UnreadablePicture: missing, cut off, no picture, or a strip.
    """
    with _opened(path) as image:
        if at_least is not None:
            image.draft("RGB", (at_least, at_least))
        return to_rgb(image)


def upright_size(path: str | Location) -> tuple[int, int]:
    """Width and height of the picture that `read_rgb` gives, from the file's header alone.

    Raises:
        UnreadablePicture: as `read_rgb`, as far as the header shows it.
    """
    with _opened(path) as image:
        width, height = image.size
        return (height, width) if orientation(image) >= 5 else (width, height)


def to_rgb(image: Image) -> Image:
    """The first frame, turned upright, transparency laid on white, 16 bits scaled to 8."""
    from PIL import Image as pillow

    turned = _FLIPS.get(orientation(image))
    if turned is not None:
        image = image.transpose(pillow.Transpose(turned))
    if image.mode.startswith(("I", "F")):
        image = _eight_bits(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    layer = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return pillow.alpha_composite(pillow.new("RGBA", layer.size, "white"), layer).convert("RGB")


def orientation(image: Image) -> int:
    """EXIF orientation, 1 (upright) to 8; from 5 on the sides are swapped. Damaged EXIF counts as upright."""
    if image.format == "PNG":
        image.load()  # the EXIF chunk may follow the pixels
    if image.format == "TIFF":
        return 1  # Pillow turns these itself when it loads them
    try:
        value = int(image.getexif().get(0x0112, 1))
    except Exception:
        return 1
    return value if value in _FLIPS else 1


def open_picture(file: Any, formats: tuple[str, ...] | None = None) -> Image:
    """`PIL.Image.open`, with the transparent colour of a PNG on the scale of the pixels that Pillow gives.

    PNG states the colour in the file's bit depth (2, 4 or 16 bits); Pillow passes it on as it is.
    """
    from PIL import Image as pillow

    image = pillow.open(file, formats=formats)
    colour, packing = image.info.get("transparency"), image.tile[0].args if getattr(image, "tile", None) else None
    if isinstance(colour, int) and packing in ("L;2", "L;4"):
        image.info["transparency"] = colour * (85 if packing == "L;2" else 17)
    elif isinstance(colour, tuple) and packing == "RGB;16B":
        image.info["transparency"] = tuple(value >> 8 for value in colour)
    return image


def is_strip(width: int, height: int) -> bool:
    """Whether a picture is too long for image processors."""
    return max(width, height) >= MAX_ASPECT * min(width, height)


@contextmanager
def _opened(path: str | Location) -> Iterator[Image]:
    """The open file; whatever decoders raise on it becomes an `UnreadablePicture`."""
    from PIL import UnidentifiedImageError

    try:
        with open_picture(fetch(path)) as image:
            if is_strip(*image.size):
                raise PictureBroken(str(path), f"{image.width} x {image.height} pixels: too long a strip")
            yield image
    except (MemoryError, UserError, UnreadablePicture):
        raise
    except FileNotFoundError:
        raise PictureMissing(str(path), "no such file") from None
    except UnidentifiedImageError:
        raise PictureBroken(str(path), "not a picture in a known format") from None
    except Exception as error:  # decoders have errors of many kinds for bad files
        reason = str(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise PictureBroken(str(path), reason) from error


def _eight_bits(image: Image) -> Image:
    """Grey values of 16 or more bits, or floating point, as 8 bits: the upper byte, as Pillow reads 16-bit colours."""
    from PIL import Image as pillow

    values = np.nan_to_num(np.asarray(image).astype(np.float64))
    most = values.max(initial=0)
    if image.mode == "F":
        divisor = 1 / 255 if most <= 1 else 1 if most <= 255 else 257
    else:
        divisor = 256 if most <= 65535 else 2**23
    grey = pillow.fromarray((values / divisor).clip(0, 255).astype(np.uint8))
    if (colour := image.info.get("transparency")) is None:
        return grey
    return pillow.merge("LA", (grey, pillow.fromarray(np.where(values == colour, 0, 255).astype(np.uint8))))
