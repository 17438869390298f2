"""Drawn: are the patches that a run draws like real ones? Numbers, and a picture.

    python -m nano_aimv2.lab.drawn --run_dir=runs/toy --judge=runs/toy-seed1

Held-out images are completed from half of their patches. What came out is compared with real
training images, and so are the held-out images themselves: that is the floor, real against real.

- *Fréchet distance* between the features of two sets of images, as two Gaussians (Heusel et al.,
  arXiv 1706.08500), by the encoder of another run, the judge: of whole images, and of the lower
  half alone. It grows with wrong content and with missing variety.
- *Gradient energy*: mean squared difference of neighbouring pixels in the lower half (0..255).
- *Seams*: the same across borders of patches, over that within patches.
- *Names*: share of images in whose caption the judge names something below ("bottom", toy scenes),
  or the image's label (photographs).
- *Continued*: given three quarters, the share of images that continue what the border cuts.

Everything is drawn with several seeds; +- is the standard deviation over them.

Lesson: 12.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

import torch

from nano_aimv2.data.mixture import open_sources
from nano_aimv2.files import write_text
from nano_aimv2.flags import check_at_least, read_flags, run_command
from nano_aimv2.generate import caption, complete
from nano_aimv2.lab.plots import completions, samples_page
from nano_aimv2.patchify import patchify, unpatchify
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.distributed import choose_device
from nano_aimv2.training.evaluate import Evaluation, held_out_sources

SHOWN = 8  # images of the picture


@dataclass
class Options:
    run_dir: str = "runs/toy"  # the run that draws
    judge: str = ""  # another run: its encoder compares, its captions name
    data: str = ""  # held-out images as path:kind; empty: the run's own
    images: int = 1000  # at most so many held-out and as many training images
    seeds: int = 3  # random seeds of the patches
    out: str = ""  # folder for drawn.json and drawn.png; empty: the run's
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        check_at_least(self, images=50, seeds=1)
        if not self.judge or Path(self.judge).resolve() == Path(self.run_dir).resolve():
            raise ValueError(f"judge={self.judge!r} must be another run than the one that draws: "
                             "train one with another --seed and give --judge=RUN")


def frechet_distance(a, b):
    """Between Gaussians fitted to two sets of vectors, f[N, D] and f[M, D]: |mean difference|^2 +
    tr(Ca + Cb - 2 (Ca Cb)^(1/2)). Source: arXiv 1706.08500."""
    a, b = a.double(), b.double()
    values, vectors = torch.linalg.eigh(a.T.cov())
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.T.cov() @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + values.sum() + b.T.cov().trace()
                 - 2 * cross)


def pixel_numbers(patches, grid, p):
    """(gradient energy, seams) of the lower half of images: patches u8[B, n, P]."""
    pixels = unpatchify(patches, grid, p).float()[:, :, grid[0] // 2 * p :]
    down, right = pixels.diff(dim=2).square(), pixels.diff(dim=3).square()
    at_seam = [(torch.arange(d.shape[dim]) + 1) % p == 0 for d, dim in ((down, 2), (right, 3))]
    seams = torch.cat([down[:, :, at_seam[0]].flatten(), right[..., at_seam[1]].flatten()]).mean()
    inside = torch.cat([down[:, :, ~at_seam[0]].flatten(), right[..., ~at_seam[1]].flatten()])
    return float(down.mean() + right.mean()) / 2, float(seams / inside.mean())


def continued(images, real, border, depth):
    """Share of images that continue the object which a border cuts, among those where it cuts one.

    Args: images, real: u8[N, 3, H, W]; equal above row `border`. depth: rows below it, in pixels.

    A column is cut where the real pixel above the border is far from the median of its row (by 60
    of 255 in a channel) and the real pixel `depth` below is like it (by 30). Four columns are an
    object. It is continued if in at least half of them the pixel is nearer to the object than to
    the median.
    """
    above = real[:, :, border - 1].float()  # [N, 3, W]
    usual = above.median(dim=2, keepdim=True).values

    def far(a, b):
        return (a.float() - b).abs().amax(dim=1)  # [N, W]

    below = border - 1 + depth
    is_cut = (far(above, usual) > 60) & (far(real[:, :, below], above) < 30)
    has_object = is_cut.sum(dim=1) >= 4
    goes_on = far(images[:, :, below], above) < far(images[:, :, below], usual)
    share = (is_cut & goes_on).sum(dim=1) / is_cut.sum(dim=1).clamp(min=1)
    return float((share[has_object] >= 0.5).float().mean())


def split(patches, grid, size=64):
    """Parts of at most `size` images with their grids: (u8[K, n, P], i64[K, 2]); `grid`: one for
    all images."""
    for part in patches.split(size):
        yield part, torch.tensor([grid] * len(part), device=part.device)


class Judge:
    """What another run's encoder and captions say of images."""

    def __init__(self, run_dir, device):
        self.model, self.config, self.tokenizer = load_model(run_dir, device)

    @torch.inference_mode()
    def features(self, patches, grid):
        """Mean features f[N, D] of whole images, and of their lower halves; `grid`: one for all."""
        parts, half = [], grid[0] // 2 * grid[1]
        for part, grids in split(patches, grid):
            f = self.model.encoder(part, grids).float()
            parts.append((f.mean(dim=1), f[:, half:].mean(dim=1)))
        return [torch.cat(column).cpu() for column in zip(*parts, strict=True)]

    def naming(self, patches, grid, labels):
        """Share of captions that name something below, or the label of the image."""
        texts = []
        for part, grids in split(patches, grid):
            texts += [c.text for c in caption(self.model, part, grids, self.tokenizer)]
        named = [label in text if label else "bottom" in text
                 for text, label in zip(texts, labels, strict=True)]
        return mean(named)

    def numbers(self, patches, grid, labels, real):
        """All numbers of images u8[N, n, P] against the features of real ones."""
        found = self.features(patches, grid)
        energy, seams = pixel_numbers(patches.cpu(), grid, self.config.patch_size)
        return {"frechet": frechet_distance(found[0], real[0]),
                "frechet_lower_half": frechet_distance(found[1], real[1]),
                "gradient_energy": energy, "seams": seams,
                "named": self.naming(patches, grid, labels)}


def read_images(source, config, tokenizer, count, device):
    """(patches u8[N, n, P], grid (rows, cols), label or None of each image)."""
    evaluation = Evaluation(source, config, tokenizer, count)
    grids = torch.cat([batch.grid for batch in evaluation.batches])
    if len(grids.unique(dim=0)) > 1:
        raise ValueError(f"{source.path}: images on several grids; a native run cannot be measured")
    patches = torch.cat([batch.patches for batch in evaluation.batches]).to(device)
    return patches, tuple(grids[0].tolist()), evaluation.label_names


def draw_and_measure(options):
    """(rows {name: numbers or lists of numbers over seeds}, what the picture shows)."""
    device = choose_device(options.device)
    model, config, tokenizer = load_model(options.run_dir, device)
    judge = Judge(options.judge, device)
    if (judge.config.image_size, judge.config.patch_size) != (config.image_size, config.patch_size):
        raise ValueError(f"judge={options.judge} was trained on other sizes than {options.run_dir}")
    sources = (open_sources(options.data, "val") if options.data
               else list(held_out_sources(config).values()))
    if not sources:
        raise ValueError(f"{config.data} has no val folder: give --data=PATH:KIND")
    train = max(open_sources(config.data), key=lambda source: source.weight)
    real, grid, _ = read_images(train, config, tokenizer, options.images, device)
    held, _, labels = read_images(sources[0], config, tokenizer, options.images, device)
    real_features = judge.features(real, grid)
    rows = {"real": judge.numbers(held, grid, labels, real_features)}
    drawn, p, cut = [], config.patch_size, grid[0] * 3 // 4
    whole = unpatchify(held, grid, p)

    def draw(rows, seed):
        return torch.cat([complete(model, part, grids, rows * grid[1], seed)
                          for part, grids in split(held, grid, 250)])

    def count_continued(patches):
        return continued(unpatchify(patches, grid, p), whole, cut * p, max(2, p // 3))

    rows["real"]["continued"] = count_continued(held)
    for seed in range(options.seeds):
        half = draw(grid[0] // 2, seed)
        drawn.append(judge.numbers(half, grid, labels, real_features))
        drawn[-1]["continued"] = count_continued(draw(cut, seed))
    rows["drawn"] = {name: [row[name] for row in drawn] for name in drawn[0]}
    rows["images"] = [len(held), len(real)]
    rows["ms_alone"] = round(1000 * seconds_alone(model, held, grid), 1)
    shown, grids = next(split(held, grid, SHOWN))
    completed = completions(model, shown, grids, 0.5)
    third = torch.stack([torch.as_tensor(versions[-2]).permute(2, 0, 1) for versions in completed])
    texts = caption(judge.model, patchify(third, p).to(device), grids, judge.tokenizer)
    captioned = [(versions[-2], c.text, None) for versions, c in zip(completed, texts, strict=True)]
    return rows, (captioned, completed)


def seconds_alone(model, patches, grid):
    """Seconds to complete one image from half, without a batch: the median of nine."""
    one, grids = next(split(patches, grid, 1))
    seconds = []
    for _ in range(9):
        begin = time.perf_counter()
        complete(model, one, grids, grid[0] // 2 * grid[1]).cpu()
        seconds.append(time.perf_counter() - begin)
    return sorted(seconds)[4]


def table_of(rows):
    """Lines of the table."""
    lines = [f"{'':20}{'real':>9}{'drawn':>9}{'+-':>7}{'ratio':>8}"]
    for name, values in rows["drawn"].items():
        real, spread = rows["real"][name], stdev(values) if len(values) > 1 else float("nan")
        lines.append(f"{name:20}{real:9.3f}{mean(values):9.3f}{spread:7.3f}"
                     f"{mean(values) / real if real else float('nan'):8.2f}")
    return [*lines, f"{rows['ms_alone']:.0f} ms for one image alone"]


def main(argv):
    options = Options(**read_flags(argv, Options, doc=__doc__)[0])
    rows, shown = draw_and_measure(options)
    out = Path(options.out or options.run_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "drawn.json", json.dumps(rows, indent=1) + "\n")
    samples_page(*shown, out / "drawn.png", f"{Path(options.run_dir).name}: lower halves drawn "
                 "three times, and what the judge says of the third")
    print("\n".join(table_of(rows)))
    print(f"written: {out}/drawn.json, {out}/drawn.png")


if __name__ == "__main__":
    run_command(main)
