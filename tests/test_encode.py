"""Features of pictures, from the command line."""

import numpy as np
import pytest
import torch
from conftest import ROOT, run_script
from PIL import Image
from test_hub import tiny_encoder

from nano_aimv2 import encode
from nano_aimv2.data import evaluation_pixels
from nano_aimv2.hub import save_encoder
from nano_aimv2.patchify import patchify, pixels_to_float


def random_picture(path, width, height):
    Image.fromarray(np.random.default_rng(width).integers(256, size=(height, width, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def fixed(tmp_path):
    save_encoder(tiny_encoder(), tmp_path / "fixed")
    return tmp_path / "fixed"


@pytest.fixture
def native(tmp_path):
    save_encoder(tiny_encoder("sincos", native_area=(2, 6)), tmp_path / "native")
    return tmp_path / "native"


def test_the_command_writes_features_and_pictures_and_leaves_damaged_files_out(tmp_path, fixed):
    photos = tmp_path / "photos"
    photos.mkdir()
    for i, width in enumerate((30, 50, 41)):
        random_picture(photos / f"p{i}.png", width, 44)
    (photos / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (photos / "notes.txt").write_text("no picture")
    done = run_script("-m", "nano_aimv2.encode", f"--weights={fixed}", photos, tmp_path / "gone.png", f"--out={tmp_path / 'out'}",
                      "--batch_size=2", "--joint=true", cwd=ROOT)
    assert "3 pictures encoded" in done.stdout
    assert "2 left out" in done.stdout
    assert "cut.jpg cannot be read" in done.stderr
    assert "gone.png there is no such file" in done.stderr
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        [f"p{i}.{ending}" for i in range(3) for ending in ("npz", "png")] + ["joint.png"])
    encoder = tiny_encoder()
    pixels = evaluation_pixels(Image.open(photos / "p2.png"), encoder.config)
    patches = patchify(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None], 4)
    with torch.inference_mode():
        features = encoder(pixels_to_float(patches, encoder.config.pixel_mean, encoder.config.pixel_std), torch.tensor([[5, 5]]))
    found = np.load(tmp_path / "out/p2.npz")
    assert np.array_equal(found["pixels"], pixels)
    assert found["grid"].tolist() == [5, 5]
    assert np.abs(found["features"] - features[0].unflatten(0, (5, 5)).numpy()).max() < 1e-5
    assert np.abs(found["mean"] - features[0].mean(0).numpy()).max() < 1e-5


def test_native_weights_keep_a_pictures_proportions_within_the_area(tmp_path, native):
    names = [str(random_picture(tmp_path / f"{w}.png", w, h)) for w, h in ((120, 40), (40, 120), (9, 9))]
    encode.main([f"--weights={native}", *names, f"--out={tmp_path / 'out'}", "--area=27", "--pictures=false"])
    grids = {name: np.load(tmp_path / f"out/{name}.npz")["features"].shape[:2] for name in ("120", "40", "9")}
    assert grids == {"120": (3, 9), "40": (9, 3), "9": (4, 4)}


def test_one_picture_has_one_result_alone_or_in_a_batch(native):
    from nano_aimv2.hub import load_encoder

    encoder = load_encoder(native)
    pixels = list(np.random.default_rng(0).integers(256, size=(3, 12, 24, 3), dtype=np.uint8))
    together = encode.encode(encoder, pixels)
    assert together.shape == (3, 3, 6, 24)
    assert np.abs(together[1] - encode.encode(encoder, pixels[1:2])[0]).max() < 1e-5


def test_components_are_those_of_a_singular_value_decomposition_whatever_the_parts():
    features = np.random.default_rng(0).normal(size=(6, 7, 5)) * (9, 1, 5, 3, 2)
    parts = encode.Components()
    for row in features:
        parts.add(row)
    flat = features.reshape(-1, 5)
    axes = np.linalg.svd(flat - flat.mean(0))[2][:3].T
    assert np.allclose(np.abs(parts.projection()(features)), np.abs((features - flat.mean(0)) @ axes))
    assert (np.take_along_axis(parts.fit()[1], np.abs(parts.fit()[1]).argmax(0)[None], 0) > 0).all()
    colours = encode.to_colours([parts.projection()(features)])[0]
    assert (colours.min(), colours.max()) == (0, 1)


@pytest.mark.parametrize("argv, told", [
    (["cat.png"], "no weights"),
    (["--weights=runs/toy"], "no pictures"),
    (["--weights=w", "--aera=9", "cat.png"], r"did you mean --area\?"),
    (["--weights=w", "--area", "9", "cat.png"], "--key=value"),
    (["--weights=w", "--area=1", "cat.png"], "at least 2 patches"),
    (["--weights=w", "--batch_size=0", "cat.png"], "at least 1"),
    (["--weights=w", "a/cat.png", "b/cat.jpg"], "both be written as cat.npz"),
])
def test_a_mistake_is_told(argv, told):
    with pytest.raises(ValueError, match=told):
        encode.main(argv)


def test_nothing_readable_is_a_failure_and_learned_positions_refuse_an_area(tmp_path, fixed):
    with pytest.raises(ValueError, match="no picture could be read of 1"):
        encode.main([f"--weights={fixed}", str(tmp_path / "gone.png"), f"--out={tmp_path / 'out'}"])
    with pytest.raises(ValueError, match="knows one size, 20 px"):
        encode.main([f"--weights={fixed}", "gone.png", "--area=30", f"--out={tmp_path / 'out'}"])
