"""Post-training: weights on another grid, images of any shape, and runs measured over sizes."""

import hashlib
import itertools
import json

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    caption_without_caches,
    colour_shares,
    complete_without_caches,
    liven_sampler,
    random_batch,
    run_script,
    tiny_config,
)
from PIL import Image

from data.scenes import (
    PLACES,
    SHAPES,
    SIZES,
    dense_caption,
    draw_extent,
    draw_object,
    encoded_scene,
    make_scene,
    terse_caption,
)
from nano_aimv2.data.batches import evaluation_pixels
from nano_aimv2.data.shards import ShardWriter
from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.generate import caption, complete, score, teacher_forced
from nano_aimv2.model import AIMv2
from nano_aimv2.positions import LearnedPositions, resize_table

TOKENIZER = Tokenizer("toy.tiktoken")
BLUE, GREY = (43, 108, 176), (113, 128, 150)  # colours of curves


def test_a_grid_with_as_many_patches_as_the_square_gets_its_own_table():
    positions = LearnedPositions(4, 8)
    torch.nn.init.normal_(positions.table)
    wide = positions.eval()(torch.tensor([[2, 8]]), 16)
    assert torch.equal(wide[0], resize_table(positions.table, (4, 4), (2, 8)))
    assert torch.equal(positions(torch.tensor([[4, 4]]), 16)[0], positions.table)


def test_the_first_toy_set_stays_bit_identical():
    digest = hashlib.sha256()
    for split in ("train", "val", "novel"):
        for i in range(8):
            pixels, alt, dense, objects = make_scene(split, i)
            digest.update(pixels.tobytes() + (alt + dense + str(objects)).encode())
    assert digest.hexdigest() == "e3deb222bb4de059516fd9a31973c4e9011b88ad0630ed0e46409b916d0800f0"


def test_a_scene_has_its_facts_in_two_wordings():
    objects = [("top left", "large", "red", "star"), ("bottom right", "small", "blue", "ring")]
    assert dense_caption(objects) == "top left a large red star, bottom right a small blue ring"
    assert terse_caption(objects) == "star: red, large, top left; ring: blue, small, bottom right"
    _, _, _, metadata = encoded_scene(("val", 3, 20, 0, 1.0))
    assert metadata["synthetic"] == [dense_caption(metadata["objects"])]
    assert metadata["terse"] == terse_caption(metadata["objects"])


def test_scenes_of_any_size_show_the_objects_of_the_first_set():
    shapes = set()
    for i in range(20):
        pixels, _, dense, objects = make_scene("val", i, size=96, aspect=3.0)
        assert (dense, objects) == make_scene("val", i)[2:]
        height, width = pixels.shape[:2]
        shapes.add((height, width))
        assert 1 / 3.1 < width / height < 3.1
        assert 48**2 * 0.9 < width * height < 96**2 * 1.1
    assert len(shapes) == 20
    assert draw_extent(96, 1.0, None) == (96, 96)


@pytest.mark.parametrize("width, height", [(48, 48), (96, 96), (144, 48), (40, 120)])
def test_places_and_sizes_stay_true_in_images_of_any_shape(width, height):
    rng = np.random.default_rng(0)
    areas = {size: {shape: [] for shape in SHAPES} for size in SIZES}
    for (place, (x, y)), size, shape in itertools.product(PLACES.items(), SIZES, SHAPES):
        image = np.full((height, width, 3), -1000.0)
        draw_object(image, place, size, "red", shape, rng)
        rows, cols = np.nonzero(image[..., 0] > -500)
        assert (cols.mean() > width / 2) == (x > 0.5), (place, shape)
        assert (rows.mean() > height / 2) == (y > 0.5), (place, shape)
        areas[size][shape].append(len(rows) / min(width, height) ** 2)
    for shape in SHAPES:  # every large one is clearly larger than every small one
        assert min(areas["large"][shape]) > 1.3 * max(areas["small"][shape]), shape


@pytest.mark.parametrize("width, height", [(60, 20), (20, 60), (33, 31), (7, 90)])
def test_the_native_view_keeps_the_whole_image_within_the_area(width, height):
    config = tiny_config(native_area=(2.0, 5.0))
    pixels = evaluation_pixels(Image.new("RGB", (width, height)), config)
    rows, cols = pixels.shape[0] // 4, pixels.shape[1] // 4
    assert pixels.shape == (4 * rows, 4 * cols, 3) and 2 <= rows * cols <= 25
    assert (cols - rows) * (width - height) >= 0, (rows, cols)
    assert 0.6 < (cols / rows) / (width / height) < 1.6, (rows, cols)
    square = evaluation_pixels(Image.new("RGB", (width, height)), tiny_config())
    assert square.shape == (20, 20, 3)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = AIMv2(tiny_config(native_area=(2.0, 5.0))).eval()
    with torch.no_grad():
        model.decoder.text_head.weight.mul_(8)
    liven_sampler(model)
    return model


def test_a_panorama_is_completed_and_captioned_with_caches_as_without(model):
    batch = random_batch(model.config, size=2, num_tokens=(5, 5), grids=[(2, 6), (6, 2)])
    cached = complete(model, batch.patches, batch.grid, 5)
    uncached = complete_without_caches(model, batch.patches, batch.grid, 5)
    assert (cached.int() - uncached.int()).abs().max() <= 1
    assert not torch.equal(cached[0, 5:], cached[1, 5:])
    cached = caption(model, batch.patches, batch.grid, TOKENIZER)
    uncached = caption_without_caches(model, batch.patches, batch.grid, TOKENIZER)
    assert [found.ids for found in cached] == [ids for ids, _ in uncached]


def test_a_padded_panorama_is_scored_and_teacher_forced_as_alone(model):
    batch = random_batch(model.config, size=2, num_tokens=(5, 5), grids=[(5, 5), (2, 6)])
    words = ["a small red ring", "star"]
    padded = score(model, batch.patches[1:], batch.grid[1:], TOKENIZER, words)
    alone = score(model, batch.patches[1:, :12], batch.grid[1:], TOKENIZER, words)
    assert torch.allclose(padded, alone, atol=1e-4), float((padded - alone).abs().max())
    both = teacher_forced(model, batch.patches[[1, 0], :12], torch.tensor([[2, 6], [3, 4]]), 4)
    one = teacher_forced(model, batch.patches[1:, :12], batch.grid[1:], 4)
    assert (both[0].int() - one[0].int()).abs().max() <= 1
    with pytest.raises(ValueError, match="equal size"):
        teacher_forced(model, batch.patches, batch.grid, 4)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Scenes in mixed shapes: 48 to train on, 24 held out."""
    folder = tmp_path_factory.mktemp("data") / "scenes_native"
    for split, count in (("train", 48), ("val", 24)):
        with ShardWriter(folder / split) as writer:
            for i in range(count):
                key, image, alt, metadata = encoded_scene((split, i, 32, 0, 3.0))
                writer.write(key, image, "png", alt, metadata)
    return folder


@pytest.mark.slow
def test_a_trained_run_becomes_native_and_is_sampled_on_a_panorama(trained, mixed, tmp_path):
    run, out = tmp_path / "native", tmp_path / "panorama.png"
    flags = [f"--{k}={v}" for k, v in TINY.items()]
    flags += [f"--init={trained[0]}", f"--data={mixed}:synthetic", "--native_area=2,5", "--steps=3",
              "--batch_size=6", "--eval_images=12", "--save_every=0", "--log_every=1"]
    done = run_script("train.py", "--preset=toy-native", *flags, f"--run_dir={run}")
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 0 and rows[0]["val_loss_text"] > 0, done.stdout
    assert colour_shares(run / "samples.png")[128, 128, 128] > 0.01, "patches that were not given"
    Image.fromarray(make_scene("val", 0, size=40)[0]).resize((90, 30)).save(tmp_path / "wide.png")
    run_script("sample.py", f"--run_dir={run}", "--complete=0.5", "--size=24", f"--out={out}",
               f"--image={tmp_path}/wide.png,lessons/figures/toy_samples.png")
    assert colour_shares(out)[128, 128, 128] > 0.005


def test_sizes_measures_runs_over_sizes_and_shapes(trained, learned, mixed, tmp_path):
    done = run_script("-m", "nano_aimv2.lab.sizes", f"--run_dir={trained[0]},{learned[0]}",
                      "--sizes=16,28", f"--data={mixed}:synthetic", "--images=5", "--device=cpu",
                      f"--out={tmp_path}/sizes")
    rows = json.loads((tmp_path / "sizes.json").read_text())
    assert {(r["run"], r["size"], r["shape"]) for r in rows} == {
        (run, size, shape) for run in ("tiny", "learned") for size in (16, 28)
        for shape in ("up to 4:3", "4:3 to 2:1", "beyond 2:1")}
    for row in rows:
        assert 1 <= row["images"] <= 5 and row["loss_image"] > 0 and 0 <= row["caption_exact"] <= 1
    assert (tmp_path / "sizes.md").read_text().strip() in done.stdout
    colours = colour_shares(tmp_path / "sizes.png")
    assert min(colours[GREY], colours[BLUE]) > 5e-5, "a curve for each run"


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    (["--run_dir=/nowhere", "--sizes=16"], "/nowhere has no config.json"),
    (["--run_dir={run}", "--sizes=16,x"], "--sizes=16,x must be whole numbers"),
    (["--run_dir={run}", "--sizes=18"], "must be a multiple of patch_size=4"),
])
def test_sizes_says_what_is_wrong_in_one_line(trained, flags, message):
    flags = [flag.format(run=trained[0]) for flag in flags]
    done = run_script("-m", "nano_aimv2.lab.sizes", *flags, check=False)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr
