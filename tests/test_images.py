"""Images of any format become RGB pixels; what is damaged or far too large is refused."""

import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from damage import damaged
from helpers import ROOT, environment
from PIL import Image, PngImagePlugin

from nano_aimv2.config import Config
from nano_aimv2.data import images
from nano_aimv2.data.batches import evaluation_pixels
from nano_aimv2.data.images import (
    FORMATS,
    STILL_FORMATS,
    centre_box,
    crop_box,
    open_image,
    resize,
    to_rgb,
    upright_size,
)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED = Image.new("RGB", (6, 4), (200, 30, 10))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
LEFT_BLACK = Image.fromarray(np.repeat([[0] * 4 + [255] * 4], 4, axis=0).astype(np.uint8))
ORIENTATION, XRESOLUTION, WIDTH, HEIGHT, EXIF_IFD = 0x0112, 0x011A, 0x0100, 0x0101, 0x8769


def raw_png(bit_depth, colour_type, pixel, transparent, width=8, height=4):
    """A PNG of one colour as its specification has it, with a tRNS chunk.

    Args: pixel: bytes of a row; transparent: the values of the tRNS chunk, 16 bits each.
    """
    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
            + chunk(b"IDAT", zlib.compress((b"\0" + pixel) * height)) + chunk(b"IEND", b""))


def raw_exif(*more, orientation=6, order="<"):
    """EXIF as its specification has it: the orientation, and entries (tag, type, value bytes)."""
    entries = [(ORIENTATION, 3, struct.pack(order + "HH", orientation, 0)), *more]
    end = 8 + 2 + 12 * len(entries) + 4
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "IH", 8, len(entries))
    values = b""
    for tag, kind, value in entries:
        is_far = len(value) > 4
        content = struct.pack(order + "I", end + len(values)) if is_far else value.ljust(4, b"\0")
        head += struct.pack(order + "HHI", tag, kind, 1) + content
        values += value if is_far else b""
    return b"Exif\0\0" + head + bytes(4) + values


def is_upright(image):
    """Whether LEFT_BLACK, rotated by orientation 6, has its black half at the top: in the pixels,
    and in the size that is told before they are decoded."""
    assert upright_size(image) == (4, 8)
    pixels = resize(image, (4, 8))
    return pixels[:2].max() < 30 and pixels[-2:].min() > 225


@pytest.mark.parametrize("image, kind, expected", [
    (RED, "PNG", (200, 30, 10)),
    (RED.quantize(4), "PNG", (200, 30, 10)),
    (RED.convert("CMYK"), "JPEG", (200, 30, 10)),
    (RED.convert("RGBA"), "WEBP", (200, 30, 10)),
    (Image.new("L", (6, 4), 77), "PNG", (77, 77, 77)),
    (Image.new("LA", (6, 4), (77, 255)), "PNG", (77, 77, 77)),
    (Image.new("RGBA", (6, 4), (200, 30, 10, 0)), "PNG", (255, 255, 255)),  # transparent
    (Image.new("1", (6, 4), 1), "PNG", (255, 255, 255)),
    (Image.fromarray(np.full((4, 6), 40_000, dtype=np.uint16)), "PNG", (156, 156, 156)),
])
def test_every_mode_becomes_rgb(image, kind, expected):
    rgb = to_rgb(open_image(encoded(image, kind)))
    assert rgb.mode == "RGB"
    assert np.abs(np.asarray(rgb)[1, 1].astype(int) - expected).max() <= 6, np.asarray(rgb)[1, 1]


def test_palette_transparency_shows_white():
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30] * 256)
    assert np.asarray(to_rgb(open_image(encoded(image, "PNG", transparency=0)))).min() == 255


@pytest.mark.parametrize("data, tones", [
    (raw_png(1, 0, b"\x0f", [0]), (255, 255)),  # black is transparent, white is white
    (raw_png(2, 0, b"\x00\x55", [1]), (0, 255)),  # tones 0 and 1 of 0 .. 3
    (raw_png(4, 0, b"\x00\x00\x77\x77", [7]), (0, 255)),
    (raw_png(8, 0, b"\x00" * 4 + b"\x07" * 4, [7]), (0, 255)),
    (raw_png(16, 0, b"\x80\x00" * 4 + b"\x80\x07" * 4, [0x8007]), (128, 255)),
    (raw_png(16, 0, b"\x00\x00" * 4 + b"\x00\x07" * 4, [0]), (255, 7)),
    (raw_png(8, 2, b"\x00\x00\x00" * 4 + b"\x01\x02\x03" * 4, [1, 2, 3]), (0, 255)),
    (raw_png(16, 2, b"\x80\x00" * 12 + b"\x12\x34" * 12, [0x1234] * 3), (128, 255)),
], ids=["1 bit", "2 bits", "4 bits", "grey", "16-bit grey", "dark 16-bit", "RGB", "16-bit RGB"])
def test_the_transparent_colour_of_a_png_shows_white_at_every_depth(data, tones):
    rgb = np.asarray(to_rgb(open_image(data)))
    assert (rgb[0, 0].tolist(), rgb[0, -1].tolist()) == tuple([tone] * 3 for tone in tones)


@pytest.mark.parametrize("values, expected", [
    ([0, 0.5, 1], [0, 128, 255]),  # all within 0 .. 1
    ([0, 0.5, 200], [0, 0, 200]), ([0, 257, 65535], [0, 1, 255]), ([-1, 0.5, 1], [0, 0, 1]),
    ([0, float("nan"), 1], [0, 0, 255]), ([float("inf"), 1, 0.5], [0, 255, 128]),
    ([float("nan")] * 3, [0, 0, 0])])
def test_floats_within_0_and_1_are_scaled_and_what_is_not_finite_is_0(values, expected):
    data = encoded(Image.fromarray(np.array([values], dtype=np.float32)), "TIFF")
    assert np.asarray(to_rgb(open_image(data, STILL_FORMATS)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("values, expected", [
    ([0, 1, 1], [0, 1, 1]), ([0, 7, 255], [0, 7, 255]), ([0, 257, 65535], [0, 1, 255]),
    ([-9, 100_000, 65535], [0, 255, 255])])
def test_integers_are_8_bits_or_where_one_is_larger_16(values, expected):
    data = encoded(Image.fromarray(np.array([values], dtype=np.int32)), "TIFF")
    assert np.asarray(to_rgb(open_image(data, STILL_FORMATS)))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_every_exif_orientation_is_applied_to_pixels_and_size(kind, orientation):
    """The upright image has its black corner at the bottom left."""
    upright = np.full((16, 32, 3), 255, dtype=np.uint8)
    upright[8:, :16] = 0
    back = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # Image.Transpose
    stored = Image.fromarray(upright)
    stored = stored if back is None else stored.transpose(back)
    options = {"WEBP": {"lossless": True}}.get(kind, {})
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    opened = open_image(encoded(stored, kind, exif=exif, **options), STILL_FORMATS)
    assert upright_size(opened) == (32, 16)
    assert np.abs(resize(opened, (32, 16)).astype(int) - upright).max() < 30
    assert upright_size(opened) == (32, 16), "the same once it is decoded"


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("exif", [
    raw_exif(), raw_exif(order=">"),
    raw_exif((XRESOLUTION, 10, struct.pack("<ii", -1, 0))),
    raw_exif((XRESOLUTION, 12, struct.pack("<d", float("nan")))),
    raw_exif((WIDTH, 9, struct.pack("<i", -5))), raw_exif((HEIGHT, 8, struct.pack("<h", -5))),
    raw_exif((EXIF_IFD, 9, struct.pack("<i", -5))),
    raw_exif((XRESOLUTION, 5, struct.pack("<II", 1, 1)))[:-6],
], ids=["plain", "big-endian", "-1/0", "NaN", "signed long", "signed short", "bad offset", "cut"])
def test_an_image_is_rotated_whatever_else_its_exif_holds(kind, exif):
    assert is_upright(open_image(encoded(LEFT_BLACK, kind, exif=exif)))


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("exif", [
    raw_exif()[:12], raw_exif()[:18], b"Exif\0\0", b"Exif\0\0garbage", raw_exif(orientation=0),
    raw_exif(orientation=9), raw_exif(orientation=65535)])
def test_an_image_whose_exif_cannot_be_read_counts_as_upright(kind, exif):
    opened = open_image(encoded(LEFT_BLACK, kind, exif=exif))
    assert upright_size(opened) == (8, 4)
    pixels = resize(opened, (8, 4))
    assert pixels[:, :2].max() < 30 and pixels[:, -2:].min() > 225


def test_exif_behind_the_pixels_of_a_png_is_found():
    data = encoded(LEFT_BLACK, "PNG", exif=raw_exif())
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack_from(">I", data, start)[0]
    moved = data[:start] + data[end:-12] + data[start:end] + data[-12:]  # IEND has 12 bytes
    assert moved.index(b"eXIf") > moved.index(b"IDAT")
    assert is_upright(open_image(moved))


@pytest.mark.parametrize("kind", FORMATS)
def test_broken_metadata_is_not_reported_on_the_screen(kind, tmp_path):
    """Pillow warns of it, once per place in its code, in the middle of a training log."""
    exif = raw_exif((XRESOLUTION, 5, struct.pack("<II", 1, 1)))[:-6]
    (tmp_path / "image").write_bytes(encoded(NOISE, kind, exif=exif))
    code = ("import sys; from nano_aimv2.data.images import open_image, resize; "
            "print(resize(open_image(sys.argv[1]), (4, 4)).shape)")
    done = subprocess.run([sys.executable, "-W", "always", "-c", code, tmp_path / "image"],
                          cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "(4, 4, 3)\n" and not done.stderr, done.stderr


@pytest.mark.parametrize("key", ["text", "compressed text", "international text", "profile"])
def test_a_png_with_megabytes_of_text_or_profile_opens_and_64_mb_are_refused(key):
    def with_extra(size):
        info, options = PngImagePlugin.PngInfo(), {}
        if key == "profile":
            options["icc_profile"] = bytes(size)
        elif key == "international text":
            info.add_itxt("comment", "x" * size, zip=True)
        else:
            info.add_text("comment", "x" * size, zip=key == "compressed text")
        return encoded(RED, "PNG", pnginfo=info, **options)

    assert resize(open_image(with_extra(2_000_000)), (6, 4))[0, 0].tolist() == [200, 30, 10]
    with pytest.raises(ValueError, match="[Tt]oo (large|much)"):
        open_image(with_extra(70 * 2**20))


# What is opened


@pytest.mark.parametrize("kind", ["BMP", "GIF", "TIFF", "PPM"])
def test_training_reads_jpeg_png_and_webp_and_commands_the_other_still_formats(kind):
    data = encoded(RED, kind)
    assert resize(open_image(data, STILL_FORMATS), (6, 4)).shape == (4, 6, 3)
    with pytest.raises(ValueError, match="not a whole file of JPEG"):
        open_image(data)


@pytest.mark.parametrize("formats", [FORMATS, STILL_FORMATS])
def test_an_eps_named_jpg_is_refused_and_ghostscript_is_not_started(formats, tmp_path,
                                                                    monkeypatch):
    path, trace = tmp_path / "eps.jpg", tmp_path / "started"
    RED.save(path, "EPS")
    for name in ("gs", "gswin64c"):
        (tmp_path / name).write_text(f"#!/bin/sh\necho started >> {trace}\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for source in (path, path.read_bytes()):
        with pytest.raises(ValueError, match="not a whole file of JPEG"):
            resize(open_image(source, formats), (4, 4))
    assert not trace.exists()


def test_a_phones_jpeg_of_several_images_opens_as_its_first_and_is_decoded_small():
    first = Image.fromarray(np.full((160, 80, 3), 9, dtype=np.uint8))
    opened = open_image(encoded(first, "MPO", save_all=True, append_images=[RED]))
    assert opened.format == "MPO" and upright_size(opened) == (80, 160)
    assert resize(opened, (5, 10)).max() < 15 and opened.size == (10, 20)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_an_animation_gives_its_first_frame(kind):
    frames = [Image.new("RGB", (6, 4), (value, value, value)) for value in (0, 255)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    opened = open_image(data, STILL_FORMATS)
    assert opened.n_frames == 2
    assert resize(opened, (6, 4)).max() < 10


# Damage


@pytest.mark.parametrize("data", [
    b"", b"no image at all", encoded(NOISE, "JPEG")[:1000], encoded(NOISE)[:2000]])
def test_damaged_files_raise_instead_of_giving_half_an_image(data):
    with pytest.raises((ValueError, OSError, SyntaxError)):
        resize(open_image(data), (4, 4))


@pytest.mark.parametrize("kind", [*FORMATS, "MPO", "GIF", "TIFF", "BMP"])
def test_a_damaged_file_is_an_image_or_an_ordinary_error(kind):
    options = {"exif": raw_exif(order=">")} if kind in ("JPEG", "WEBP") else {}
    options |= {"save_all": True, "append_images": [RED]} if kind == "MPO" else {}
    data, seen = encoded(NOISE.resize((80, 60)), kind, **options), {"image": 0, "error": 0}
    for what, content in [*damaged(data, 200, kinds=["flipped bit"]), *damaged(data, 140, seed=1)]:
        try:
            image = open_image(content, STILL_FORMATS)
            pixels = resize(image, (12, 8), (0, 0, *upright_size(image)))
        except (Warning, MemoryError):
            raise
        except Exception:  # decoders fail in many ways
            seen["error"] += 1
        else:
            assert pixels.shape == (8, 12, 3) and pixels.dtype == np.uint8, what
            seen["image"] += 1
    assert seen["error"] > 20, seen
    if kind == "PNG":  # whose checksums cover every byte of the pixels
        assert seen["image"] < 20, seen


def test_a_decompression_bomb_is_refused_unread():
    bomb = encoded(Image.new("1", (20_000, 10_000)))
    assert len(bomb) < 50_000
    with pytest.raises(ValueError, match="20000 x 10000 pixels; at most"):
        open_image(bomb)


def test_a_single_pixel_is_an_image():
    image = open_image(encoded(Image.new("RGB", (1, 1), (9, 8, 7))))
    assert resize(image, (16, 8)).shape == (8, 16, 3)


def test_one_resize_from_the_crop_box_equals_crop_then_resize_inside():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    pixels = resize(image, (10, 12), (20, 10, 40, 34))
    expected = np.asarray(image.crop((20, 10, 40, 34)).resize((10, 12), Image.Resampling.BICUBIC))
    assert np.abs(pixels.astype(int) - expected).mean() < 3  # only the border differs


def test_a_large_jpeg_is_decoded_small_and_looks_the_same(monkeypatch):
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
    image = small.resize((1600, 1200), Image.Resampling.BICUBIC)
    data = encoded(image, "JPEG", quality=95)
    opened = open_image(data)
    quick = resize(opened, (100, 75))
    assert opened.size == (200, 150), "decoded at an eighth"
    slow = resize(open_image(encoded(image)), (100, 75))
    assert np.abs(quick.astype(int) - slow).mean() < 3


def test_crop_boxes_keep_area_and_ratio_within_bounds():
    rng = np.random.default_rng(0)
    for width, height in ((500, 375), (300, 900)):
        boxes = np.array([crop_box(width, height, 0.4, rng) for _ in range(300)])
        w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        assert boxes[:, :2].min() >= 0
        assert boxes[:, 2].max() <= width and boxes[:, 3].max() <= height
        assert (w / h).min() > 0.74 and (w / h).max() < 1.35
        if width == 500:
            assert (w * h).min() > 0.39 * width * height and (w * h).std() > 0.1 * width * height


def test_native_crops_keep_the_images_own_aspect_ratio():
    rng = np.random.default_rng(0)
    boxes = np.array([crop_box(900, 300, 0.4, rng, aspect=3.0) for _ in range(200)])
    ratios = (boxes[:, 2] - boxes[:, 0]) / (boxes[:, 3] - boxes[:, 1])
    assert ratios.min() > 2.2 and ratios.max() < 4.1


def test_extreme_aspect_ratios_get_a_legal_crop():
    rng = np.random.default_rng(0)
    for size in ((1, 4000), (4000, 1), (1, 1)):
        left, top, right, bottom = crop_box(*size, 0.4, rng)
        assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1]


def test_without_a_random_crop_training_sees_what_evaluation_sees():
    config = Config.from_preset("toy", image_size=24)
    for width, height in ((37, 20), (20, 37), (30, 30)):
        image = NOISE.resize((width, height))
        box = crop_box(width, height, 1.0, None)
        assert box == centre_box(width, height, 1.0)
        assert box[2] - box[0] == box[3] - box[1] == min(width, height)
        assert np.array_equal(resize(image, (24, 24), box), evaluation_pixels(image, config))
    assert centre_box(30, 20, 1.0) == (5, 0, 25, 20)


def test_without_a_random_crop_native_training_sees_the_whole_image_exactly():
    rng = np.random.default_rng(0)
    for width, height in [(48, 48), (1, 1), (3, 7), *rng.integers(1, 9000, (500, 2)).tolist()]:
        assert crop_box(width, height, 1.0, None, width / height) == (0, 0, width, height)


def test_the_largest_accepted_image_is_larger_than_a_cameras():
    assert images.MAX_PIXELS > 100_000_000
