"""Sample from a trained run: captions of images, and images completed patch by patch.

    python sample.py                                      # held-out images: runs/toy/samples.png
    python sample.py --image=cat.jpg,dog.jpg              # captions, with their log-probability
    python sample.py --image=cat.jpg --prompt="top left" --temperature=0.8 --top_p=0.9 --seed=1
    python sample.py --image=cat.jpg --choices="a cat|a dog"    # rank captions by likelihood
    python sample.py --image=cat.jpg --complete=0.5       # keep half of the patches, draw the rest
    python sample.py --image=cat.jpg --complete=0.5 --num_samples=4 --seed=1
    python sample.py --run_dir=runs/toy-native --image=panorama.png --size=96

Before any training, the trained toy model of the lessons stands in for runs/toy.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from data.scenes import make_scenes
from nano_aimv2 import generate
from nano_aimv2.data.batches import evaluation_pixels, pad_patches
from nano_aimv2.data.images import STILL_FORMATS, open_image
from nano_aimv2.flags import check_at_least, read_flags, run_command
from nano_aimv2.lab.plots import completions, held_out_samples, samples_page
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.distributed import choose_device

# Flags of one kind of output exclude those of the others.
OUTPUTS = ({"prompt", "temperature", "top_k", "top_p", "max_tokens"}, {"choices"},
           {"complete", "num_samples"})
TRAINED = Path(__file__).resolve().parent / "lessons/models/toy"


@dataclass
class Options:
    run_dir: str = "runs/toy"  # a trained run
    image: str = ""  # files, with commas between; empty: held-out images of the run's data
    prompt: str = ""  # beginning of the caption
    temperature: float = 0.0  # 0: always the likeliest token
    top_k: int = 0  # sample from the k likeliest tokens only; 0: from all
    top_p: float = 1.0  # sample from the likeliest tokens that together have this probability
    seed: int = 0  # random seed for sampling
    max_tokens: int = 0  # stop here; 0: as long as in training
    choices: str = ""  # captions to rank by likelihood, with | between (commas if there is no |)
    size: int = 0  # pixels per side (native runs: of a square of equal area); 0: as in training
    complete: float = 0.0  # keep this fraction of the patches (at least one), draw the rest
    num_samples: int = 3  # with --complete: how many ways to go on
    out: str = ""  # image to write; empty: samples.png or complete.png in the run's folder
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        check_at_least(self, max_tokens=0, size=0, seed=0, num_samples=1)


def main(argv):
    given = read_flags(argv, Options, doc=__doc__)[0]
    options = Options(**given)
    names = [name for name in options.image.split(",") if name]
    if "complete" in given and not 0 < options.complete < 1:
        raise ValueError(f"--complete={options.complete} must be a fraction of the image above 0 "
                         "and below 1: at least one patch is given, and one is drawn")
    about_image = given.keys() - {"run_dir", "image", "out", "device"}
    if about_image and not names:
        raise ValueError(f"--{min(about_image)} needs an image: add --image=FILE")
    if "num_samples" in given and "complete" not in given:
        raise ValueError("--num_samples needs --complete=FRACTION")
    if {"seed", "choices"} <= given.keys():
        raise ValueError("--seed and --choices exclude each other: leave one out")
    outputs = [min(given.keys() & flags) for flags in OUTPUTS if given.keys() & flags]
    if len(outputs) > 1:
        raise ValueError(f"--{outputs[0]} and --{outputs[1]} exclude each other: leave one out")
    device = choose_device(options.device)
    folder = results = Path(options.run_dir)
    if "run_dir" not in given and not folder.exists():
        folder, results = TRAINED, Path()
        print(f"{options.run_dir} does not exist yet (train it: python train.py): this is the "
              "trained toy model of the lessons, lessons/models/toy")
    if not names:
        out = options.out or results / "samples.png"
        with tempfile.TemporaryDirectory() as scenes:
            data = ""
            if folder.resolve() == TRAINED:
                data = f"{scenes}/toy:synthetic:1"
                make_scenes(f"{scenes}/toy", train=1, val=4, novel=4)
            samples = held_out_samples(folder, device=device, data=data)
        samples_page(*samples, out, f"{folder.name}: images it has never seen")
        print(f"written: {out}")
        return
    model, config, tokenizer = load_model(folder, device)
    try:
        config = replace(config, image_size=options.size or config.image_size)
    except ValueError as error:
        raise ValueError(str(error).replace("image_size", "size")) from None
    images = [read_image(name, config) for name in names]
    patches, grid = (tensor.to(device) for tensor in pad_patches(images, config.patch_size))
    if "choices" in given:
        rank_choices(model, patches, grid, tokenizer, names, options.choices)
    elif options.complete:
        out = options.out or results / "complete.png"
        completed = completions(model, patches, grid, options.complete, options.num_samples,
                                options.seed)
        captioned = [(completed[i][0], name, None) for i, name in enumerate(names)]
        title = f"The first {100 * options.complete:.3g}% of the patches given, the rest drawn"
        samples_page(captioned, completed, out, title)
        print(f"written: {out}")
    else:
        found = generate.caption(
            model, patches, grid, tokenizer, options.prompt, options.temperature, options.top_k,
            options.top_p, options.seed, options.max_tokens or None)
        for name, c in zip(names, found, strict=True):
            print(f"{name}: {c.text}  (log-probability {c.log_prob:.2f})")


def rank_choices(model, patches, grid, tokenizer, names, choices):
    """Print each image's captions by likelihood, with their shares of the probability."""
    captions = [c.strip() for c in choices.split("|" if "|" in choices else ",")]
    for i, name in enumerate(names):
        n = int(grid[i].prod())
        scores = generate.score(model, patches[i : i + 1, :n], grid[i : i + 1], tokenizer, captions)
        shares = scores.softmax(dim=0).tolist()
        print(name)
        for k in scores.argsort(descending=True).tolist():
            print(f"  {shares[k]:6.1%}  log-probability {scores[k]:8.2f}  {captions[k]}")


def read_image(name, config):
    """An image file as the model sees it: u8[H, W, 3]. Raises ValueError naming the file."""
    try:
        return evaluation_pixels(open_image(name, STILL_FORMATS), config)
    except FileNotFoundError:
        raise ValueError(f"image {name!r} does not exist: give an image file, "
                         "--image=FILE") from None
    except Exception as error:  # decoders fail in many ways
        raise ValueError(f"image {name!r} cannot be read ({type(error).__name__}: {error}): give a "
                         "whole JPEG, PNG or WebP file") from error


if __name__ == "__main__":
    run_command(main)
