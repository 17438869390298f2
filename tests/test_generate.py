"""Captions, scores and completions: cached as uncached, together as alone."""

import math

import pytest
import torch
from helpers import (
    ROOT,
    caption_without_caches,
    complete_without_caches,
    liven_sampler,
    random_batch,
    run_script,
    tiny_config,
)
from PIL import Image

import sample
from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.generate import caption, choose, complete, score, teacher_forced
from nano_aimv2.model import AIMv2

TOKENIZER = Tokenizer("toy.tiktoken")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = AIMv2(tiny_config()).eval()
    with torch.no_grad():  # untrained heads are nearly flat: make choices clear
        model.decoder.text_head.weight.mul_(8)
    liven_sampler(model)
    return model


@pytest.mark.parametrize("settings", [
    {}, {"temperature": 0.9, "seed": 3}, {"temperature": 1.0, "top_k": 5, "top_p": 0.8},
    {"prompt": "top left a"}, {"max_tokens": 3}])
def test_cached_captions_equal_uncached_ones(model, settings):
    grids = [(5, 5), (3, 4), (5, 5), (2, 6)]
    batch = random_batch(model.config, size=4, num_tokens=(5,) * 4, grids=grids)
    cached = caption(model, batch.patches, batch.grid, TOKENIZER, **settings)
    uncached = caption_without_caches(model, batch.patches, batch.grid, TOKENIZER, **settings)
    for found, (ids, log_prob) in zip(cached, uncached, strict=True):
        assert found.ids == ids and found.text == TOKENIZER.decode(ids)
        assert found.log_prob == pytest.approx(log_prob, abs=1e-3)
        assert found.text.startswith(settings.get("prompt", ""))
        assert len(found.ids) <= settings.get("max_tokens", 24)


def test_a_batch_of_mixed_sizes_is_captioned_like_each_image_alone(model):
    batch = random_batch(model.config, size=3, grids=[(5, 5), (3, 4), (2, 6)])
    together = caption(model, batch.patches, batch.grid, TOKENIZER)
    for i, n in enumerate(batch.grid.prod(dim=1).tolist()):
        (alone,) = caption(model, batch.patches[i : i + 1, :n], batch.grid[i : i + 1], TOKENIZER)
        assert alone.ids == together[i].ids
        assert alone.log_prob == pytest.approx(together[i].log_prob, abs=1e-4)


def test_the_score_of_a_generated_caption_is_its_log_probability(model):
    batch = random_batch(model.config, size=1, num_tokens=(5,))
    compared = 0
    for seed in (1, 94, 290, 337):
        (found,) = caption(model, batch.patches, batch.grid, TOKENIZER, temperature=1.0, seed=seed)
        scores = score(model, batch.patches, batch.grid, TOKENIZER, [found.text or "x", "a cat"])
        assert scores.shape == (2,) and bool((scores < 0).all())
        if TOKENIZER.encode(found.text or "x", 24) == found.ids:  # as the tokenizer would split it
            assert float(scores[0]) == pytest.approx(found.log_prob, abs=1e-3)
            compared += 1
    assert compared, "no sampled caption was one that the tokenizer would write"


def test_a_score_does_not_depend_on_the_other_captions(model):
    batch = random_batch(model.config, size=1, num_tokens=(5,))
    both = score(model, batch.patches, batch.grid, TOKENIZER, ["a small red ring", "star"])
    alone = score(model, batch.patches, batch.grid, TOKENIZER, ["star"])
    assert float(alone[0]) == pytest.approx(float(both[1]), abs=1e-4)


def test_scores_add_up_token_by_token(model):
    batch = random_batch(model.config, size=1, num_tokens=(5,))
    ids = TOKENIZER.encode("a red star", 24)
    features = model.encoder(batch.patches, batch.grid)
    _, states = model.decoder(features, batch.grid.prod(dim=1), torch.tensor([ids[:-1]]))
    log_probs = model.decoder.text_head(states[0]).log_softmax(-1).detach()
    expected = sum(float(log_probs[t, token]) for t, token in enumerate(ids))
    found = score(model, batch.patches, batch.grid, TOKENIZER, ["a red star"])
    assert float(found[0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("num_given", [1, 12, 24])
def test_cached_completions_equal_uncached_ones(model, num_given):
    batch = random_batch(model.config, size=2, num_tokens=(5, 5))
    cached = complete(model, batch.patches, batch.grid, num_given)
    uncached = complete_without_caches(model, batch.patches, batch.grid, num_given)
    assert (cached.int() - uncached.int()).abs().max() <= 1  # a rounding edge at most
    assert torch.equal(cached[:, :num_given], batch.patches[:, :num_given])


def test_completion_never_looks_at_what_it_generates(model):
    batch = random_batch(model.config, size=2, num_tokens=(5, 5))
    hidden = batch.patches.clone()
    hidden[:, 10:] = 0
    seen, unseen = (complete(model, p, batch.grid, 10) for p in (batch.patches, hidden))
    assert torch.equal(seen, unseen)


def test_the_first_generated_patch_is_the_first_teacher_forced_one(model):
    batch = random_batch(model.config, size=2, num_tokens=(5, 5))
    generated = complete(model, batch.patches, batch.grid, 10)
    forced = teacher_forced(model, batch.patches, batch.grid, 10)
    assert (generated[:, 10].int() - forced[:, 10].int()).abs().max() <= 1
    assert not torch.equal(generated[:, 12:], forced[:, 12:])


def test_a_grid_that_is_not_square_is_completed(model):
    batch = random_batch(model.config, size=2, num_tokens=(5, 5), grids=[(2, 6)] * 2)
    assert complete(model, batch.patches, batch.grid, 5).shape == (2, 12, 48)


def test_greedy_takes_the_likeliest_and_top_k_and_top_p_cut_the_tail():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()[None].expand(4000, 4)
    generator = torch.Generator().manual_seed(0)

    def drawn(**settings):
        settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
        return torch.bincount(choose(logits, generator=generator, **settings), minlength=4) / 4000

    assert drawn(temperature=0)[0] == 1
    assert (drawn() - torch.tensor([0.5, 0.3, 0.15, 0.05])).abs().max() < 0.03
    assert (drawn(top_k=2) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.03
    assert (drawn(top_p=0.7) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.03
    assert drawn(top_p=0.4)[0] == 1
    hot = torch.tensor([0.5, 0.3, 0.15, 0.05]) ** 0.5
    assert (drawn(temperature=2.0) - hot / hot.sum()).abs().max() < 0.03


def test_sampling_repeats_with_its_seed(model):
    batch = random_batch(model.config)
    runs = []
    for seed in (1, 1, 2):
        found = caption(model, batch.patches, batch.grid, TOKENIZER, temperature=1.0, seed=seed)
        runs.append([c.ids for c in found])
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("temperature", [1e-320, 1e-45, 1e-40, 1e-7])
def test_a_temperature_near_zero_is_greedy(model, temperature):
    batch = random_batch(model.config)
    greedy = caption(model, batch.patches, batch.grid, TOKENIZER)
    cold = caption(model, batch.patches, batch.grid, TOKENIZER, temperature=temperature, seed=5)
    assert [c.ids for c in cold] == [c.ids for c in greedy]


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e6, 1e38])
@pytest.mark.parametrize("top", [{"top_k": 0, "top_p": 1.0}, {"top_k": 2, "top_p": 0.5}])
def test_every_temperature_that_samples_gives_a_token(temperature, top):
    logits = torch.tensor([[-300.0, 1e5, 0.0, 1e5], [30.0, -30.0, 0.0, 1.0]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        token = choose(logits, temperature, generator=generator, **top)
        assert bool(((token >= 0) & (token < 4)).all())


@pytest.mark.parametrize("settings, message", [
    ({"prompt": "red " * 50}, "tokens; at most 23 fit and leave one to generate: shorten it"),
    ({"temperature": -1}, "temperature=-1"), ({"temperature": math.nan}, "temperature=nan"),
    ({"temperature": math.inf}, "temperature=inf"), ({"top_p": math.nan}, "top_p=nan"),
    ({"top_p": 0}, "top_p=0"), ({"top_k": -2}, "top_k=-2")])
def test_bad_sampling_settings_are_refused(model, settings, message):
    batch = random_batch(model.config)
    with pytest.raises(ValueError, match=message):
        caption(model, batch.patches, batch.grid, TOKENIZER, **settings)


@pytest.mark.parametrize("num_given", [0, 25, -1])
def test_a_completion_needs_something_given_and_something_left(model, num_given):
    batch = random_batch(model.config)
    with pytest.raises(ValueError, match="of 25 patches given"):
        complete(model, batch.patches, batch.grid, num_given)


def test_an_empty_choice_is_refused(model):
    batch = random_batch(model.config, size=1, num_tokens=(5,))
    with pytest.raises(ValueError, match="empty caption"):
        score(model, batch.patches, batch.grid, TOKENIZER, ["a cat", " "])
    assert math.isfinite(float(score(model, batch.patches, batch.grid, TOKENIZER, ["a cat"])[0]))


# sample.py

IMAGE = f"--image={ROOT}/lessons/figures/toy_samples.png"


@pytest.mark.parametrize("flags, message", [
    ([IMAGE, "--size=22"], r"^size=22 must be a multiple of patch_size=4.*: try --size=20$"),
    ([IMAGE, "--size=4"], "^size=4 must be .* at least twice it .*: try --size=8$"),
    ([IMAGE, "--size=90000"], r"^size=90000 must be .*\(at most 256 times\): try --size=1024$"),
    (["--image=lessons"], "image 'lessons' cannot be read .*: give a whole JPEG, PNG or WebP file"),
    ([IMAGE, "--complete=nan"], "--complete=nan must be a number, not nan or inf"),
    ([IMAGE, "--complete=1"], "--complete=1.0 must be a fraction of the image"),
    ([IMAGE, "--complete=0"], "above 0 and below 1: at least one patch is given, and one is drawn"),
    ([IMAGE, "--complete=0.5", "--num_samples=0"], "num_samples=0 must be at least 1"),
    ([IMAGE, "--num_samples=2"], "--num_samples needs --complete=FRACTION"),
    ([IMAGE, "--choices=a|b", "--seed=1"], "--seed and --choices exclude each other"),
    ([IMAGE, "--seed=-1"], "seed=-1 must be at least 0"),
    ([IMAGE, "--temperature=nan"], "--temperature=nan must be a number, not nan or inf"),
    ([IMAGE, "--top_p=nan"], "--top_p=nan must be a number, not nan or inf"),
    ([IMAGE, "--choices="], "empty caption: a caption needs at least one character"),
    ([IMAGE, "--choices=a||b"], "empty caption: a caption needs at least one character"),
    ([IMAGE, f"--prompt={'red ' * 50}"], "tokens; at most 23 fit .*: shorten it"),
    ([IMAGE, "--choices=a|b", "--complete=0.5"], "--choices and --complete exclude each other"),
    ([IMAGE, "--temperature=1", "--choices=a"], "--temperature and --choices exclude each other"),
    (["--prompt=red"], "--prompt needs an image: add --image=FILE"),
    (["--image=,", "--size=24"], "--size needs an image: add --image=FILE"),
])
def test_sample_refuses_what_it_cannot_do_or_would_ignore(trained, flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=message) as error:
        sample.main([f"--run_dir={trained[0]}", "--device=cpu", *flags])
    assert "\n" not in str(error.value)


def test_sample_draws_as_many_continuations_as_asked_for_even_from_one_patch(trained, tmp_path):
    flags = [f"--run_dir={trained[0]}", "--device=cpu", IMAGE, "--complete=0.001"]
    pages = []
    for i, more in enumerate((["--num_samples=1"], ["--num_samples=4"],
                              ["--num_samples=1", "--seed=3"], ["--num_samples=1", "--seed=0"])):
        sample.main([*flags, *more, f"--out={tmp_path}/{i}.png"])
        pages.append((tmp_path / f"{i}.png").read_bytes())
    assert pages[0] == pages[3], "the same seed drew another image"
    assert len({*pages}) == 3, "another seed or another number of samples changed nothing"


@pytest.mark.slow
def test_before_any_training_sample_takes_the_model_of_the_lessons(tmp_path, monkeypatch, capsys):
    """In a folder without runs/toy, where nothing is written but the page that was asked for."""
    out = run_script(ROOT / "sample.py", "--device=cpu", cwd=tmp_path).stdout
    assert out.startswith("runs/toy does not exist yet (train it: python train.py): this is the "
                          "trained toy model of the lessons, lessons/models/toy\n"), out
    assert out.endswith("written: samples.png\n") and len(out.splitlines()) == 2, out
    assert [path.name for path in tmp_path.iterdir()] == ["samples.png"]
    with Image.open(tmp_path / "samples.png") as page:  # eight images above, four lines below
        assert min(page.size) > 800
    asked = run_script(ROOT / "sample.py", "--run_dir=runs/toy", cwd=tmp_path, check=False)
    assert "runs/toy has no config.json" in asked.stderr, asked.stderr
    monkeypatch.chdir(ROOT)  # and by its name, without data/scenes
    sample.main(["--run_dir=lessons/models/toy", "--device=cpu", f"--out={tmp_path}/page"])
    assert capsys.readouterr().out == f"written: {tmp_path}/page\n"
    assert (tmp_path / "page").stat().st_size > 10_000


def test_sample_reads_the_other_still_formats_and_never_an_eps(trained, tmp_path, capsys):
    with Image.open(ROOT / "lessons/figures/toy_samples.png") as image:
        for name, kind in (("a.bmp", "BMP"), ("b.gif", "GIF"), ("c.tif", "TIFF"), ("d.jpg", "EPS")):
            image.convert("RGB").save(tmp_path / name, kind)
    flags = [f"--run_dir={trained[0]}", "--device=cpu", "--max_tokens=2"]
    sample.main([*flags, f"--image={tmp_path}/a.bmp,{tmp_path}/b.gif,{tmp_path}/c.tif"])
    assert capsys.readouterr().out.count("log-probability") == 3
    with pytest.raises(ValueError, match="d.jpg' cannot be read .ValueError: not a whole file"):
        sample.main([*flags, f"--image={tmp_path}/d.jpg"])


@pytest.mark.parametrize("encoding", ["cp1252", pytest.param("ascii", marks=pytest.mark.slow)])
def test_a_damaged_image_with_a_chinese_name_ends_in_one_line(trained, tmp_path, encoding):
    (tmp_path / "\u732b.png").write_bytes(b"no image")
    done = run_script("sample.py", f"--run_dir={trained[0]}", f"--image={tmp_path}/\u732b.png",
                      "--device=cpu", env={"PYTHONIOENCODING": encoding}, check=False)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr
    assert "\\u732b.png' cannot be read" in done.stderr
