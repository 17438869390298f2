"""Images: whatever an image file holds becomes upright 8-bit RGB of the size asked for.

Pipeline: bytes -> **PIL image -> pixels u8[H, W, 3]** -> patches. Source: paper Table A1
(RandomResizedCrop, bicubic). Lesson: 07.
"""

import io
import math

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 120_000_000  # larger images are refused unread: a few kB can unpack to gigabytes
Image.MAX_IMAGE_PIXELS = None  # the check below replaces Pillow's warning


def open_image(source):
    """Open bytes or a path as a PIL image, without decoding it yet.

    Raises: OSError or another error of Pillow if the data is not an image; ValueError if it has
        more than 120 million pixels.
    """
    image = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} "
                         "are read: shrink it")
    return image


def read_or_skip(items, read, name, skipped):
    """Read what can be read: yields (item, read(item)).

    An item whose `read` fails is skipped, and `name(item)` is appended to the list `skipped` with
    the
    reason: no damaged file may stop a run.
    """
    for item in items:
        try:
            value = read(item)
        except Exception as error:  # decoders fail in many ways
            skipped.append(f"{name(item)}: {type(error).__name__}: {error}")
            continue
        yield item, value


def to_rgb(image):
    """Upright 8-bit RGB from any mode; alpha is blended onto white, 16 bits are scaled to 8."""
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        if values.size and values.max() > 255:
            values = values / 257  # 65535 -> 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def crop_box(width, height, min_area, rng, aspect=1.0):
    """RandomResizedCrop's box (left, top, right, bottom): area uniform on [min_area, 1], aspect
    ratio log-uniform on [3/4, 4/3].

    Args:
        width, height: in pixels; min_area: 1 gives the whole image; rng: a numpy Generator.
        aspect: multiplies the ratio of width to height (native resolution: the image's own).

    After ten boxes that do not fit: the largest centred box of an allowed ratio.
    """
    if min_area >= 1:
        return 0, 0, width, height
    for _ in range(10):
        area = width * height * rng.uniform(min_area, 1)
        ratio = aspect * math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    return centre_box(width, height, min(max(width / height, aspect * 3 / 4), aspect * 4 / 3))


def centre_box(width, height, ratio):
    """The largest centred box whose width / height is `ratio`."""
    w, h = (width, width / ratio) if width / height < ratio else (height * ratio, height)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def resize(image, size, box=None):
    """Crop `box` from a PIL image and scale it to `size` = (width, height) in one call, bicubic
    with antialiasing.

    A JPEG is decoded at a half, quarter or eighth of its size where that is still large enough. The
    box is in the coordinates of the upright image. Returns: pixels u8[height, width, 3].
    """
    full = upright_size(image)
    box = box or (0, 0, *full)
    if image.format == "JPEG" and image.mode in ("RGB", "L"):
        scale = min((box[2] - box[0]) / size[0], (box[3] - box[1]) / size[1])
        needed = (math.ceil(image.width / scale), math.ceil(image.height / scale))
        image.draft(None, needed)  # decodes at least so many pixels
    image = to_rgb(image)
    sx, sy = image.width / full[0], image.height / full[1]
    box = (box[0] * sx, box[1] * sy, box[2] * sx, box[3] * sy)
    if image.size != size or box != (0, 0, *size):
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
    return np.asarray(image)


def upright_size(image):
    """(width, height) after the EXIF rotation, without decoding."""
    is_rotated = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
    return image.size[::-1] if is_rotated else image.size
