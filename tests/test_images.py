"""Images of any format become RGB pixels; what is damaged or far too large is refused."""

import io

import numpy as np
import pytest
from PIL import Image

from nano_aimv2.data import images
from nano_aimv2.data.images import centre_box, crop_box, open_image, resize, to_rgb, upright_size


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


RED = Image.new("RGB", (6, 4), (200, 30, 10))
NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))


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


def test_exif_rotation_is_applied_to_pixels_and_size():
    halves = [np.zeros((4, 4, 3), dtype=np.uint8), np.full((4, 4, 3), 255, dtype=np.uint8)]
    image = Image.fromarray(np.concatenate(halves, axis=1))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to show it upright
    data = encoded(image, "PNG", exif=exif)
    assert upright_size(open_image(data)) == (4, 8)
    pixels = resize(open_image(data), (4, 8))
    assert pixels[0].max() == 0 and pixels[-1].min() == 255


@pytest.mark.parametrize("data", [
    b"", b"no image at all", encoded(NOISE, "JPEG")[:1000], encoded(NOISE)[:2000]])
def test_damaged_files_raise_instead_of_giving_half_an_image(data):
    with pytest.raises((OSError, SyntaxError)):
        resize(open_image(data), (4, 4))


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


def test_no_crop_is_the_whole_image_and_the_centre_is_square():
    assert crop_box(30, 20, 1.0, None) == (0, 0, 30, 20)
    assert centre_box(30, 20, 1.0) == (5, 0, 25, 20)
    assert images.MAX_PIXELS > 100_000_000
