"""Sample from a trained run: captions of pictures, and pictures completed patch by patch.

    python sample.py                                        # held-out images, written as runs/toy/samples.png
    python sample.py --image=cat.jpg,dog.jpg                # captions, with their log-probability
    python sample.py --image=cat.jpg --prompt="top left" --temperature=0.8 --top_p=0.9 --seed=1
    python sample.py --image=cat.jpg --choices="a cat|a dog"            # rank captions by likelihood
    python sample.py --image=cat.jpg --complete=0.5         # keep the first half of the patches, generate the rest
    python sample.py --run=runs/toy-native --image=panorama.png --size=96   # native: its own proportions, 96 x 96 px in area
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path

from nano_aimv2 import distributed, generate
from nano_aimv2.checkpoint import load_model
from nano_aimv2.config import read_flags
from nano_aimv2.data import collate, evaluation_pixels
from nano_aimv2.evaluate import Evaluation, held_out_sources
from nano_aimv2.images import open_image
from nano_aimv2.patchify import unpatchify


@dataclass
class Options:
    run: str = "runs/toy"  # a trained run
    image: str = ""  # files, with commas between; empty: held-out images of the run's data
    prompt: str = ""  # beginning of the caption
    temperature: float = 0.0  # 0: always the likeliest word
    top_k: int = 0  # draw from the k likeliest words only; 0: all
    top_p: float = 1.0  # draw from the likeliest words that together have this probability
    seed: int = 0  # of the draws
    max_tokens: int = 0  # stop here; 0: as long as in training
    choices: str = ""  # captions to rank by likelihood, with | between (commas where there is no |)
    size: int = 0  # show the model pictures of this many pixels a side (native runs: as many in area); 0: as in training
    complete: float = 0.0  # keep this fraction of the patches and generate the rest
    out: str = ""  # picture to write; empty: samples.png or complete.png in the run's folder
    device: str = "auto"  # auto, cpu, cuda or mps


def read_options(argv):
    """`--key=value` flags -> Options. Raises ValueError on an unknown flag or a wrong value."""
    options, words = read_flags(Options, argv)
    if words:
        raise ValueError(f"cannot read {words[0]!r}: options are written --key=value; --help shows examples")
    if not 0 <= options.complete < 1:
        raise ValueError(f"--complete={options.complete} must be a fraction of the image between 0 and 1")
    if options.max_tokens < 0:
        raise ValueError(f"--max_tokens={options.max_tokens} must be at least 0")
    return options


def main(argv):
    if "--help" in argv or "-h" in argv:
        print(__doc__)
        return
    options = read_options(argv)
    device = distributed.choose_device(options.device)
    if not options.image:
        out = options.out or Path(options.run) / "samples.png"
        held_out_page(options.run, out, device=device)
        print(f"written: {out}")
        return
    model, config, tokenizer = load_model(options.run, device)
    config = replace(config, image_size=options.size or config.image_size)
    names = [name for name in options.image.split(",") if name]
    images = [read_image(name, config) for name in names]
    patches, grid = as_batch(images, config, device)
    if options.choices:
        captions = [c.strip() for c in options.choices.split("|" if "|" in options.choices else ",")]
        for i, name in enumerate(names):
            n = int(grid[i].prod())
            scores = generate.score(model, patches[i : i + 1, :n], grid[i : i + 1], tokenizer, captions)
            shares = scores.softmax(dim=0).tolist()
            print(name)
            for k in scores.argsort(descending=True).tolist():
                print(f"  {shares[k]:6.1%}  log-probability {scores[k]:8.2f}  {captions[k]}")
    elif options.complete:
        out = options.out or Path(options.run) / "complete.png"
        completion_page(model, patches, grid, options.complete, names, out)
        print(f"written: {out}")
    else:
        found = generate.caption(model, patches, grid, tokenizer, options.prompt, options.temperature, options.top_k,
                                 options.top_p, options.seed, options.max_tokens or None)
        for name, c in zip(names, found, strict=True):
            print(f"{name}: {c.text}  (log-probability {c.log_prob:.2f})")


def read_image(name, config):
    """A picture file as the model sees it: u8[H, W, 3]. Raises ValueError naming the file."""
    try:
        return evaluation_pixels(open_image(name), config)
    except FileNotFoundError:
        raise ValueError(f"image {name!r} does not exist: give a picture file, --image=FILE") from None
    except Exception as error:  # decoders fail in many ways
        raise ValueError(f"image {name!r} cannot be read ({type(error).__name__}: {error}): give a whole JPEG, PNG or WebP "
                         "file") from error


def as_batch(images, config, device):
    """Pixels, of equal size or not -> (patches u8[B, A, P] with zero patches at the end of small images, grid i64[B, 2])."""
    p = config.patch_size
    batch = collate(images, [[0]] * len(images), max(i.shape[0] // p * (i.shape[1] // p) for i in images), p,
                    slice(0, len(images)), len(images))
    return batch.patches.to(device), batch.grid.to(device)


HELD_OUT_FRACTIONS = (0.5, 0.75)  # of the patches given: half a picture, and a cut through what stands below


def completions(model, patches, grid, fraction):
    """[(original, given, generated, teacher-forced)] as u8[H, W, 3], in the order of the images; those of one grid are
    generated together."""
    pictures = [None] * len(grid)
    for rows_cols in grid.unique(dim=0):
        n = int(rows_cols.prod())
        same = (grid == rows_cols).all(dim=1).nonzero()[:, 0]
        whole, grids = patches[same, :n], grid[same]
        num_given = min(max(1, round(fraction * n)), n - 1)
        given = whole.clone()
        given[:, num_given:] = 128
        versions = (whole, given, generate.complete(model, whole, grids, num_given),
                    generate.teacher_forced(model, whole, grids, num_given))
        versions = [unpatchify(v, tuple(rows_cols.tolist()), model.config.patch_size).permute(0, 2, 3, 1).cpu().numpy()
                    for v in versions]
        for row, images in zip(same.tolist(), zip(*versions, strict=True), strict=True):
            pictures[row] = images
    return pictures


def completion_page(model, patches, grid, fraction, names, out):
    """Write original | given | generated | teacher-forced of every image."""
    from nano_aimv2.plots import samples_page

    pictures = completions(model, patches, grid, fraction)
    captioned = [(images[0], name, None) for images, name in zip(pictures, names, strict=True)]
    samples_page(captioned, pictures, out, f"The first {fraction:.0%} of the patches given, the rest generated")


def held_out_page(run, out, count=8, device="cpu"):
    """Write captions and completions of `count` images that the run has never seen, half of them with novel pairs if
    there are any. Raises ValueError if the run's data has no held-out part."""
    from nano_aimv2.plots import samples_page

    model, config, tokenizer = load_model(run, device)
    sources = held_out_sources(config)
    if not sources:
        raise ValueError(f"{config.data} has no val folder: give pictures with --image=FILE")
    captioned, completed = [], []
    for source in sources.values():
        batch = Evaluation(source, config, tokenizer, count // len(sources))
        patches, grid = batch.batches[0].patches.to(device), batch.batches[0].grid.to(device)
        half = len(patches) // 2
        pictures = [picture for rows, fraction in zip((slice(0, half), slice(half, None)), HELD_OUT_FRACTIONS, strict=True)
                    if len(patches[rows]) for picture in completions(model, patches[rows], grid[rows], fraction)]
        found = generate.caption(model, patches, grid, tokenizer)
        captioned += [(p[0], c.text, written) for p, c, written in zip(pictures, found, batch.captions, strict=True)]
        completed += pictures
    samples_page(captioned, completed, out, f"{Path(run).name}: images it has never seen, seed {config.seed}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        sys.exit(f"sample.py: {error}")
