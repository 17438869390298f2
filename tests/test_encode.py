"""Features of images, from the command line."""

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script
from PIL import Image
from test_hub import tiny_encoder

from nano_aimv2.data.batches import evaluation_pixels
from nano_aimv2.hub import save_encoder
from nano_aimv2.lab import encode
from nano_aimv2.patchify import patchify, pixels_to_float


def random_image(path, width, height):
    rng = np.random.default_rng(width)
    Image.fromarray(rng.integers(256, size=(height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def fixed(tmp_path):
    save_encoder(tiny_encoder(), tmp_path / "fixed")
    return tmp_path / "fixed"


@pytest.fixture
def native(tmp_path):
    save_encoder(tiny_encoder("sincos", native_area=(2, 6)), tmp_path / "native")
    return tmp_path / "native"


@pytest.mark.slow
def test_the_command_writes_features_and_images_and_skips_damaged_files(tmp_path, fixed):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, width in enumerate((30, 50, 41)):
        random_image(photos / f"p{i}.png", width, 44)
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "notes.txt").write_text("no image")
    done = run_script("-m", "nano_aimv2.lab.encode", f"--weights={fixed}", photos,
                      tmp_path / "gone.png", f"--out={tmp_path / 'out'}", "--batch_size=2",
                      "--joint=true", cwd=ROOT)
    assert "3 images encoded" in done.stdout
    assert "2 skipped" in done.stdout
    assert "cut.jpg: ValueError: not a whole file of JPEG, PNG, WEBP, AVIF" in done.stderr
    assert "gone.png: FileNotFoundError: [Errno 2] No such file" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [f"p{i}.{ending}" for i in range(3) for ending in ("npz", "png")] + ["joint.png"])
    encoder = tiny_encoder()
    pixels = evaluation_pixels(Image.open(photos / "p2.png"), encoder.config)
    patches = patchify(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], 4)
    with torch.inference_mode():
        standardised = pixels_to_float(patches, encoder.config.pixel_mean, encoder.config.pixel_std)
        features = encoder(standardised, torch.tensor([[5, 5]]))
    found = np.load(tmp_path / "out/p2.npz")
    assert np.array_equal(found["pixels"], pixels)
    assert found["grid"].tolist() == [5, 5]
    assert np.abs(found["features"] - features[0].unflatten(0, (5, 5)).numpy()).max() < 1e-5
    assert np.abs(found["mean"] - features[0].mean(0).numpy()).max() < 1e-5


def test_native_weights_keep_an_images_proportions_within_the_area(tmp_path, native):
    sizes = ((120, 40), (40, 120), (9, 9))
    names = [str(random_image(tmp_path / f"{w}.png", w, h)) for w, h in sizes]
    encode.main([f"--weights={native}", *names, f"--out={tmp_path / 'out'}", "--area", "27",
                 "--draw=false"])
    grids = {name: np.load(tmp_path / f"out/{name}.npz")["features"].shape[:2]
             for name in ("120", "40", "9")}
    assert grids == {"120": (3, 9), "40": (9, 3), "9": (4, 4)}
    assert not list((tmp_path / "out").glob("*.png"))


def test_an_image_has_the_same_features_alone_and_in_a_batch(native):
    from nano_aimv2.hub import load_encoder

    encoder = load_encoder(native)
    images = list(np.random.default_rng(0).integers(256, size=(3, 12, 24, 3), dtype=np.uint8))
    together = encode.encode(encoder, images)
    assert together.shape == (3, 3, 6, 24)
    assert np.abs(together[1] - encode.encode(encoder, images[1:2])[0]).max() < 1e-5


def test_components_are_those_of_a_singular_value_decomposition_whatever_the_parts():
    features = np.random.default_rng(0).normal(size=(6, 7, 5)) * (9, 1, 5, 3, 2)
    parts = encode.Components()
    for row in features:
        parts.add(row)
    flat = features.reshape(-1, 5)
    axes = np.linalg.svd(flat - flat.mean(0))[2][:3].T
    found, expected = parts.projection()(features), (features - flat.mean(0)) @ axes
    assert np.allclose(np.abs(found), np.abs(expected))
    own_axes = parts.fit()[1]
    assert (np.take_along_axis(own_axes, np.abs(own_axes).argmax(0)[None], 0) > 0).all()
    colours = encode.to_colours([found])[0]
    assert (colours.min(), colours.max()) == (0, 1)


@pytest.mark.parametrize("argv, message", [
    (["cat.png"], "no weights"),
    (["--weights=runs/toy"], "no images"),
    (["--weights=w", "--aera=9", "cat.png"], r"did you mean --area\?"),
    (["--weights=w", "--area", "cat.png"], "--area=cat.png must be a whole number"),
    (["--weights=w", "--area=1", "cat.png"], "at least 2 patches"),
    (["--weights=w", "--batch_size=0", "cat.png"], "at least 1"),
    (["--weights=w", "--device=gpu", "cat.png"], "device='gpu' must be one of auto, cuda"),
    (["--weights=w", "a/cat.png", "b/cat.jpg"], "both be written as cat.npz"),
])
def test_a_mistake_is_explained(argv, message):
    with pytest.raises(ValueError, match=message):
        encode.main(argv)


def test_nothing_readable_is_a_failure_and_learned_positions_refuse_an_area(tmp_path, fixed):
    with pytest.raises(ValueError, match="none of 1 images could be read"):
        encode.main([f"--weights={fixed}", str(tmp_path / "gone.png"), f"--out={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match="learned positions, which fit images of 20 px only"):
        encode.main([f"--weights={fixed}", "gone.png", "--area=30", f"--out={tmp_path / 'out'}"])


@pytest.mark.slow
def test_a_damaged_image_with_a_chinese_name_is_named_on_any_console(tmp_path, fixed):
    photos = tmp_path / "photos"
    photos.mkdir()
    random_image(photos / "\u72d7.png", 24, 24)
    (photos / "\u732b.png").write_bytes(b"no image")
    done = run_script("-m", "nano_aimv2.lab.encode", f"--weights={fixed}", photos,
                      f"--out={tmp_path / 'out'}", env={"PYTHONIOENCODING": "cp1252"})
    assert "1 image encoded" in done.stdout and "1 skipped" in done.stdout
    assert "\\u732b.png: ValueError: not a whole file" in done.stderr
    assert (tmp_path / "out/\u72d7.npz").exists()


def test_the_usual_still_formats_are_encoded(tmp_path, fixed):
    names = ["a.bmp", "b.gif", "c.tiff", "d.webp", "e.jpeg", "f.png"]
    for name in names:
        random_image(tmp_path / name, 30, 24)
    encode.main([f"--weights={fixed}", str(tmp_path), f"--out={tmp_path / 'out'}", "--draw=false",
                 "--device=cpu"])
    assert sorted(p.stem for p in (tmp_path / "out").iterdir()) == [name[0] for name in names]
