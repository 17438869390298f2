"""Images ranked by texts and images, labelled without training, and how well that is measured."""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import as_run, random_batch, tiny_config
from PIL import Image
from safetensors.torch import save_file
from test_encode import random_image
from test_hub import tiny_encoder

from nano_aimv2.data.batches import evaluation_pixels, pad_patches
from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.hub import save_encoder
from nano_aimv2.lab import encode, search
from nano_aimv2.lab.contrastive import CLIP
from nano_aimv2.lab.probe import Labelled
from nano_aimv2.training.checkpoint import load_model


def save_towers(folder, seed=0):
    """A finished locked run of random weights."""
    torch.manual_seed(seed)
    model = CLIP(tiny_config(encoder_lr=0.0, data="photos:alt:1"))
    folder.mkdir()
    model.config.save(folder / "config.json")
    Tokenizer("toy.tiktoken").save(folder)
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture
def run(tmp_path):
    return save_towers(tmp_path / "lit")


@pytest.fixture
def photos(tmp_path):
    """Three images of different shapes, and a damaged one."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i, width in enumerate((30, 50, 41)):
        random_image(folder / f"p{i}.png", width, 44)
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    return folder


def ranking(capsys):
    """What was printed: ({file name: (score, label or "")} in order, the last line, stderr)."""
    out, err = capsys.readouterr()
    rows = re.findall(r"(?m)^(-?\d\.\d{3})  (?:(.*)  )?.*?([\w.]+)$", out)
    return ({name: (float(score), label) for score, label, name in rows},
            out.splitlines()[-1], err)


def unit(x):
    return x / np.linalg.norm(x)


# Ranking


def test_images_are_ranked_by_their_similarity_to_a_text(run, photos, tmp_path, capsys):
    out = tmp_path / "out"
    search.main([f"--run_dir={run}", "--text=a red star", str(photos), f"--out={out}"])
    found, last, err = ranking(capsys)
    model, config, tokenizer = load_model(run, kind=CLIP)
    ids = tokenizer.encode("a red star", 24)
    with torch.no_grad():
        text = model.text_vectors(torch.tensor([ids]), torch.tensor([len(ids)]))[0]
        expected = {}
        for path in sorted(photos.glob("*.png")):
            view = pad_patches([evaluation_pixels(Image.open(path), config)], 4)
            expected[path.name] = float(model.image_vectors(*view)[0] @ text)
    assert list(found) == sorted(expected, key=expected.get, reverse=True)
    for name, (score, _) in found.items():
        assert score == pytest.approx(expected[name], abs=6e-4)
    assert last == f"3 images ranked, drawn in {out / 'search.png'}, 1 skipped"
    assert "search: skipped" in err and "cut.jpg: ValueError: not a whole file" in err
    with Image.open(out / "search.png") as sheet:
        assert sheet.width > sheet.height > 100


@pytest.mark.parametrize("native", [False, True])
def test_an_image_query_ranks_by_encodes_mean_features_of_any_encoder(
        native, photos, tmp_path, capsys):
    weights, out = tmp_path / "weights", tmp_path / "out"
    save_encoder(tiny_encoder("sincos", native_area=(2, 6)) if native else tiny_encoder(), weights)
    query = photos / "../photos/p1.png"  # the same file under another name
    search.main([f"--weights={weights}", f"--image={query}", str(photos), f"--out={out}"])
    found, _, _ = ranking(capsys)
    encode.main([f"--weights={weights}", str(photos), f"--out={out}", "--draw=false"])
    means = {f"p{i}.png": unit(np.load(out / f"p{i}.npz")["mean"]) for i in range(3)}
    expected = {name: means["p1.png"] @ means[name] for name in ("p0.png", "p2.png")}
    assert list(found) == sorted(expected, key=expected.get, reverse=True), "without the query"
    for name, (score, _) in found.items():
        assert score == pytest.approx(expected[name], abs=6e-4)


def test_each_image_gets_its_most_probable_class(run, photos, tmp_path, capsys):
    model, _, tokenizer = load_model(run, kind=CLIP)
    paths, names = sorted(photos.glob("*.png")), ["a dog", "two cats", "blue ring"]
    options = search.Options(out=str(tmp_path / "out"))
    vectors = torch.from_numpy(np.stack(list(search.vectors_of(model, paths, options)[0].values())))
    logits = vectors @ search.embed_texts(model, tokenizer, names).T / 0.07
    shares = (logits.exp() / logits.exp().sum(dim=1, keepdim=True)).numpy()
    search.main([f"--run_dir={run}", f"--classes={'| '.join(names)}", str(photos),
                 f"--out={tmp_path / 'out'}", "--top=2"])
    found, _, _ = ranking(capsys)
    assert len(found) == 3
    for path, row in zip(paths, shares, strict=True):
        score, label = found[path.name]
        assert (score, label) == (pytest.approx(row.max(), abs=6e-4), names[row.argmax()])


def test_known_vectors_are_used_again_but_not_for_other_images_or_weights(
        run, photos, tmp_path, capsys, monkeypatch):
    counts, embed = [], search.embed

    def counted(model, patches, grid):
        counts.append(len(patches))
        return embed(model, patches, grid)

    def scores(run, out="out"):
        counts.clear()
        search.main([f"--run_dir={run}", "--text=red", str(photos), f"--out={tmp_path / out}",
                     "--batch_size=2"])
        return ranking(capsys)[0], sum(counts)

    monkeypatch.setattr(search, "embed", counted)
    first, computed = scores(run)
    assert computed == 3
    assert scores(run) == (first, 0)
    status = (photos / "p2.png").stat()
    pixels = np.asarray(Image.open(photos / "p2.png"))
    Image.fromarray(255 - pixels).save(photos / "p2.png")
    os.utime(photos / "p2.png", ns=(status.st_atime_ns, status.st_mtime_ns + 1000))
    changed, computed = scores(run)
    assert computed == 1 and changed["p2.png"] != first["p2.png"]
    assert {**changed, "p2.png": 0} == {**first, "p2.png": 0}
    assert changed == scores(run, "elsewhere")[0], "cached vectors are those of a new folder"
    other = save_towers(tmp_path / "other", seed=1)
    found, computed = scores(other)
    assert computed == 3 and found == scores(other, "elsewhere")[0] != changed


# Measured


class Told(CLIP):
    """Knows what is in an image: its first value is the index of its caption. A vector counts the
    words of a caption."""

    def __init__(self, captions):
        super().__init__(tiny_config(max_tokens=40))
        self.captions, self.tokenizer = captions, Tokenizer("toy.tiktoken")
        self.words = sorted({word for caption in captions for word in caption.split()})

    def count_words(self, captions):
        counts = [[caption.split().count(word) for word in self.words] for caption in captions]
        return torch.nn.functional.normalize(torch.tensor(counts).float(), dim=-1)

    def image_vectors(self, patches, grid):
        return self.count_words([self.captions[i] for i in patches[:, 0, 0]])

    def text_vectors(self, tokens, num_tokens):
        return self.count_words(map(self.tokenizer.decode, tokens.tolist()))


def test_retrieval_is_top_1_in_both_directions_and_equal_captions_are_right():
    captions = ["red star", "blue ring", "red star", "pink moon"]
    model = Told(captions)
    batch = random_batch(model.config, 4, (3, 3, 3, 3))
    batch.patches[:, 0, 0] = torch.tensor([0, 1, 1, 1])  # the last two look like a blue ring
    ids = [model.tokenizer.encode(caption, 12) for caption in captions]
    batch.tokens, batch.num_tokens = map(torch.from_numpy, search.pad_tokens(ids))
    evaluation = SimpleNamespace(batches=[batch], captions=captions)
    found = search.retrieval(model, evaluation, "cpu")
    assert found["image -> caption"]["top1"] == 2 / 4
    assert found["caption -> image"]["top1"] == 3 / 4
    assert found["image -> caption"]["chance"] == 6 / 16, "two of four captions are equal"


def test_zero_shot_labels_are_found_by_the_words_of_captions():
    objects = [("top left", "small", "red", "star"), ("top left", "large", "red", "moon"),
               ("bottom right", "small", "blue", "moon")]
    model = Told([search.TOY_PROMPT.format(*each) for each in objects])
    patches = np.zeros((3, 25, 48), np.uint8)
    patches[:, 0, 0] = range(3)
    labels = {name: list(values) for name, values in
              zip(("place", "size", "colour", "shape"), zip(*objects, strict=True), strict=True)}
    labels["colour"][1] = "blue"  # a wrong label
    found = search.zero_shot(model, model.tokenizer, Labelled(patches, (5, 5), labels))
    assert [found[name]["top1"] for name in found] == pytest.approx([1, 1, 2 / 3, 1])
    assert found["size"]["chance"] == 2 / 3
    model = Told(["A photo of a dog", "A photo of a cat"])
    images = Labelled(patches[[0, 1, 1]], (5, 5), {"label": ["dog", "cat", "dog"]})
    assert search.zero_shot(model, model.tokenizer, images)["label"]["top1"] == pytest.approx(2 / 3)


def test_the_measurement_reads_every_held_out_part(run, scenes, tmp_path, capsys):
    search.main([f"--run_dir={run}", f"--data={scenes}"])
    out, err = capsys.readouterr()
    names = ("image -> caption", "caption -> image", "place", "size", "colour", "shape")
    assert [line[:24].split() for line in out.splitlines()] == [
        [split, *name.split()] for split in ("val", "novel") for name in names], out
    assert "24 images" in out and "16 images" in out and not err
    with pytest.raises(ValueError, match="has no folder val of held-out shards"):
        search.main([f"--run_dir={run}", f"--data={tmp_path}"])


# Mistakes


@pytest.mark.parametrize("argv, message", [
    (["--run_dir=r", "cat.png"], "0 questions .*none.*give one of --text"),
    (["--run_dir=r", "--text=a", "--image=b", "cat.png"], "2 questions are given .text, image.:"),
    (["--run_dir=r", "--text= ", "cat.png"], "--text=' ' has an empty text"),
    (["--run_dir=r", "--classes=a dog", "cat.png"], "'a dog' must be at least two texts"),
    (["--run_dir=r", "--classes=a|b|a", "cat.png"], "'a|b|a' must be at least two texts that dif"),
    (["--run_dir=r", "--classes=a||b", "cat.png"], "has an empty text"),
    (["--run_dir=r", "--text=a"], "no images: name files"),
    (["--text=a", "cat.png"], "--text needs --run_dir=RUN"),
    (["--weights=w", "--text=a", "cat.png"], "--text needs --run_dir=RUN.*without --weights"),
    (["--weights=w", "--run_dir=r", "--image=a", "cat.png"], "--image needs --run_dir=RUN"),
    (["--weights=w", "--image=q.png", "--top=0", "cat.png"], "top=0 must be at least 1"),
    (["--weights=none", "--image=q.png", "cat.png"], "none is neither a folder nor a repository"),
    (["--run_dir=none", "--text=a", "cat.png"], "none has no config.json: it is not a trained run"),
])
def test_a_mistake_is_explained(argv, message):
    with pytest.raises(ValueError, match=message):
        search.main(argv)


def test_what_cannot_be_searched_is_refused(run, photos, tmp_path):
    as_run(tmp_path / "aimv2")
    out = f"--out={tmp_path / 'out'}"
    for argv, message in (
            ([f"--run_dir={tmp_path / 'aimv2'}", "--text=red", str(photos)],
             "is not a run of lab.contrastive: train a text tower for it with .*--lock=true"),
            ([f"--run_dir={run}", f"--text={'red ' * 40}", str(photos)],
             "has more than the 23 tokens"),
            ([f"--run_dir={run}", "--text=red", str(tmp_path)], "has no image files"),
            ([f"--run_dir={run}", "--text=red", str(photos / "cut.jpg")],
             "none of 1 images could be read"),
            ([f"--run_dir={run}", f"--image={photos / 'cut.jpg'}", str(photos)],
             "cut.jpg cannot be read: .*cut.jpg: ValueError: not a whole file")):
        with pytest.raises(ValueError, match=message):
            search.main([*argv, out])
