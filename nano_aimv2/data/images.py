"""Images: whatever an image file holds becomes upright 8-bit RGB of the size asked for.

Pipeline: bytes -> **PIL image -> pixels u8[H, W, 3]** -> patches. Source: paper Table A1
(RandomResizedCrop, bicubic). Lesson: 08.
"""

import io
import math
import warnings

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL.Image import Transpose

FORMATS = ("JPEG", "PNG", "WEBP")  # of training data
STILL_FORMATS = (*FORMATS, "AVIF", "BMP", "GIF", "JPEG2000", "PPM", "TIFF")  # none runs a program
MAX_PIXELS = 120_000_000  # larger images are refused unread: a few kB can unpack to gigabytes
Image.MAX_IMAGE_PIXELS = None  # the check below replaces Pillow's warning
# Pillow refuses a whole PNG for a text or colour profile above 1 MB. 64 MB, its bound for all texts
# of a file together, still stops the few kB that unpack to gigabytes.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
warnings.filterwarnings("ignore", module=r"PIL\.")  # of metadata: damaged pixels raise
# How to transpose images of EXIF orientation 2 .. 8 to show them upright.
TO_UPRIGHT = dict(enumerate((
    Transpose.FLIP_LEFT_RIGHT, Transpose.ROTATE_180, Transpose.FLIP_TOP_BOTTOM, Transpose.TRANSPOSE,
    Transpose.ROTATE_270, Transpose.TRANSVERSE, Transpose.ROTATE_90), 2))
# The pixels of these PNGs are scaled to 8 bits by Pillow, their transparent colour is not.
SCALE_COLOUR = {"L;2": lambda grey: grey * 85, "L;4": lambda grey: grey * 17,
                "RGB;16B": lambda rgb: tuple(value >> 8 for value in rgb)}


def open_image(source, formats=FORMATS):
    """Open bytes or a path as a PIL image, without decoding it yet: of an animation, the first
    frame.

    Args: formats: Pillow's names of those that are accepted, whatever the file's extension says.
    Raises: ValueError if the data is not such an image, or has more than 120 million pixels;
        OSError or another error of Pillow if it is damaged.
    """
    file = io.BytesIO(source) if isinstance(source, bytes) else source
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"not a whole file of {', '.join(formats)}") from None
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"image has {image.width} x {image.height} pixels; at most {MAX_PIXELS:,} "
                         "are read: shrink it")
    scale = SCALE_COLOUR.get(image.tile[0].args) if image.format == "PNG" and image.tile else None
    if scale and "transparency" in image.info:
        image.info["transparency"] = scale(image.info["transparency"])
    return image


def read_or_skip(items, read, name, skipped):
    """Read what can be read: yields (item, read(item)).

    An item whose `read` fails is skipped, and `name(item)` is appended to the list `skipped` with
    the reason: no damaged file may stop a run.
    """
    for item in items:
        try:
            value = read(item)
        except Exception as error:  # decoders fail in many ways
            skipped.append(f"{name(item)}: {type(error).__name__}: {error}")
            continue
        yield item, value


def to_rgb(image):
    """Upright 8-bit RGB from any mode.

    What is transparent shows white. 16 bits are scaled to 8, floats that all lie within 0 .. 1 to
    0 .. 255; a value that is not finite becomes 0.
    """
    turn = TO_UPRIGHT.get(orientation(image))
    image = image if turn is None else image.transpose(turn)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
        is_transparent = values == image.info.get("transparency")
        if values.max(initial=0) > 255:
            values = values / 257  # 65535 -> 255
        elif image.mode == "F" and values.min(initial=0) >= 0 and values.max(initial=0) <= 1:
            values = values * 255
        values[is_transparent] = 255
        return Image.fromarray(values.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def crop_box(width, height, min_area, rng, aspect=1.0):
    """RandomResizedCrop's box (left, top, right, bottom): area uniform on [min_area, 1], aspect
    ratio log-uniform on [3/4, 4/3].

    Args:
        width, height: in pixels; min_area: 1 gives the largest centred box of ratio `aspect`, which
            evaluation cuts, too; rng: a numpy Generator.
        aspect: multiplies the ratio of width to height (native resolution: the image's own).

    After ten boxes that do not fit: the largest centred box of an allowed ratio.
    """
    if min_area >= 1:
        return centre_box(width, height, aspect)
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
    own = width / height
    w = width if own <= ratio else height * ratio
    h = height if own >= ratio else width / ratio
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def resize(image, size, box=None):
    """Crop `box` from a PIL image and scale it to `size` = (width, height) in one call, bicubic
    with antialiasing.

    A JPEG is decoded at a half, quarter or eighth of its size where that is still large enough. The
    box is in the coordinates of the upright image. Returns: pixels u8[height, width, 3].
    """
    full = upright_size(image)
    box = box or (0, 0, *full)
    if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
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
    """(width, height) after the EXIF rotation, without decoding (a PNG is decoded: its EXIF may
    stand behind the pixels)."""
    return image.size[::-1] if orientation(image) in (5, 6, 7, 8) else image.size


def orientation(image):
    """The EXIF orientation of an image, 1 (upright) .. 8: 1 if there is no EXIF that can be read.

    Raises: OSError or another error of Pillow if a PNG is damaged.
    """
    if image.format == "TIFF":  # Pillow itself turns it
        return 1
    if image.format == "PNG":  # EXIF may stand behind the pixels, whose damage is to raise here
        image.load()
    try:
        return image.getexif().get(0x0112, 1)
    except Exception:  # broken EXIF fails in many ways, and is no reason to lose the image
        return 1
