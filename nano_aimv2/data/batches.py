"""Batches: the batch of a step, as a pure function of (seed, step).

Which samples, which of their captions, which crop, which native area: each is computed from the
address (seed, step, row of the global batch). So a run resumes by asking for the next step; one
process or sixty-four, with any number of data workers, see the same global batch; and no loader
has a state that could be lost. A sample that cannot be read is named, counted and replaced by
another of its source: the batch stays full.

Pipeline: shards, mixture -> **Batch** -> encoder and decoder. Source: paper Table A1 (crops).
Lesson: 08.
"""

import os
import shutil
import signal
import threading
import time
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from nano_aimv2.data import images as im
from nano_aimv2.data.mixture import deal, open_sources, pick_caption, sample_of
from nano_aimv2.data.tokenizer import pad_tokens
from nano_aimv2.native_res import batch_sizes, best_grid, draw_areas

TRIES = 50  # samples in a row that may be unreadable before a pause
LONG = 64  # patches; below, rounding a native length up to a multiple of 8 would cost too much
PREFETCH = 4  # batches that each worker reads ahead
PAUSES = (1, 2, 4, 8, 15, 30, 60, 60, 60)  # seconds: a disk or a network may come back


@dataclass
class Batch:
    """Some rows of the global batch of one step."""

    patches: torch.Tensor  # u8[B, A, P] raw pixels, zero patches at the end of small images
    grid: torch.Tensor  # i64[B, 2] (rows, cols) of the valid patches
    tokens: torch.Tensor  # i64[B, T] ids with EOS, padded at the end
    num_tokens: torch.Tensor  # i64[B] ids that count
    rows: slice  # which rows of the global batch these are
    global_size: int  # rows of the global batch
    skipped: list = field(default_factory=list)  # names and reasons of samples that were replaced
    is_full: bool = False  # every image fills its grid: A = rows * cols, no padding
    first_row: int = 0  # of the run, counted from step 0: the patch sampler's noise follows from it

    def to(self, device):
        """The batch on another device; pinned memory is copied without waiting."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self):
        return self.map(torch.Tensor.pin_memory)

    def map(self, function):
        """The batch with `function` applied to each of its tensors."""
        tensors = [f.name for f in fields(self) if f.type is torch.Tensor]
        return replace(self, **{name: function(getattr(self, name)) for name in tensors})


class TrainingData(torch.utils.data.Dataset):
    """`data[k]` is micro-batch k of this rank: step k // grad_accum, part k % grad_accum.

    Args: config; tokenizer; rank and world: which part of the global batch this process takes;
        gather: see `tar_index.open_index`.
    """

    def __init__(self, config, tokenizer, rank=0, world=1, gather=None):
        self.config, self.tokenizer = config, tokenizer
        self.rank, self.world = rank, world
        self.sources = open_sources(config.data, gather=gather)
        self.area = (config.image_size // config.patch_size) ** 2
        whole = self.area * config.batch_size
        least, native, lower = config.batch_size, "", ""
        if config.native_area:
            self.areas = draw_areas(config.seed, config.steps, *config.native_area)
            self.sizes = batch_sizes(self.areas, whole)
            native = f", native_area={','.join(map('{:g}'.format, config.native_area))}"
            lower = ", a lower native_area"
            least = batch_sizes(np.int64(2.0 ** config.native_area[1] + 1e-9), whole)
        else:
            self.areas, self.sizes = None, np.full(config.steps, config.batch_size)
        parts = world * config.grad_accum
        if least < parts:  # a batch never depends on how it is split
            raise ValueError(f"the smallest batch has {least} images (batch_size="
                             f"{config.batch_size}{native}), fewer than {world} ranks x "
                             f"grad_accum={config.grad_accum}, and every rank needs an image in "
                             f"every micro-batch: use a larger batch_size{lower}, fewer ranks or a "
                             "smaller grad_accum")
        check_shared_memory(config, whole // parts)
        self.starts = np.cumsum(self.sizes) - self.sizes  # row of the run that begins each step

    def __len__(self):
        return self.config.steps * self.config.grad_accum

    def __getitem__(self, k):
        return self.read(*self.place(k))

    def names(self, k):
        """Shard and member of each sample of micro-batch k (replacements are not looked up)."""
        start, rows, _, _ = self.place(k)
        return [self.sources[s].shards.name(self.address(row, s, i, 0)[0])
                for row, s, i in self.dealt(start, rows)]

    def dealt(self, start, rows):
        """[(row of the run, source, index within the source)] of `rows` behind row `start`."""
        absolute = np.arange(start + rows.start, start + rows.stop)
        source, index = deal(self.sources, self.config.seed, absolute)
        return list(zip(absolute.tolist(), source.tolist(), index.tolist(), strict=True))

    def place(self, k):
        """Where micro-batch k lies: (row of the run that begins its step, its rows of the step's
        batch, rows of the step's batch, area in patches)."""
        step, part = divmod(k, self.config.grad_accum)
        parts = self.world * self.config.grad_accum
        part += self.rank * self.config.grad_accum
        size = int(self.sizes[step])
        rows = slice(size * part // parts, size * (part + 1) // parts)
        area = self.area if self.areas is None else int(self.areas[step])
        return int(self.starts[step]), rows, size, area

    def read(self, start, rows, size, area):
        """Rows `rows` of the batch of `size` rows that begins at row `start` of the run, as a Batch
        of `area` patches per image, in long native batches rounded up to a multiple of 8."""
        images, ids, skipped = [], [], []
        for row, k, index in self.dealt(start, rows):
            pixels, token_ids = self.row(row, k, index, area, skipped)
            images.append(pixels)
            ids.append(token_ids)
        if self.areas is not None and area > LONG:  # GPU kernels want a length that 8 divides
            area = -(-area // 8) * 8
        batch = collate(images, ids, area, self.config.patch_size, rows, size, skipped)
        return replace(batch, first_row=start + rows.start)

    def row(self, row, k, index, area, skipped):
        """(pixels, token ids) of row `row` of the run, which is row `index` of source k.

        Raises: OSError if for minutes no sample of the source could be read.
        """
        source = self.sources[k]
        for i, pause in enumerate((*PAUSES, 0)):
            addresses = (self.address(row, k, index, i * TRIES + t) for t in range(TRIES))
            readable = im.read_or_skip(
                addresses, read=lambda address: self.sample(source, *address, area),
                name=lambda address: source.shards.name(address[0]), skipped=skipped)
            for _, found in readable:
                return found
            time.sleep(pause)
        raise OSError(f"{TRIES * (i + 1)} samples in a row of {source.path} ({source.kind}) could "
                      f"not be read, the last: {skipped[-1]}; check the disk and the shards, and "
                      "start again: the run goes on from its last checkpoint")

    def address(self, row, k, index, attempt):
        """(sample, random generator for its crop and caption) of row `row`, which is row `index` of
        source k. Later attempts replace a damaged sample by any other of the source."""
        rng = np.random.default_rng([self.config.seed, 2, row, attempt])
        if attempt:
            return self.sources[k].sample(int(rng.integers(len(self.sources[k])))), rng
        return sample_of(self.sources, self.config.seed, k, index), rng

    def sample(self, source, sample, rng, area):
        """(pixels u8[H, W, 3] of a training view, token ids) of one sample."""
        token_ids = self.tokenizer.encode(pick_caption(source, sample, rng), self.config.max_tokens)
        return self.view(im.open_image(source.shards.image(sample)), area, rng), token_ids

    def view(self, image, area, rng):
        """A training view: a random crop on the batch's grid, perhaps mirrored: u8[H, W, 3]."""
        config, p = self.config, self.config.patch_size
        width, height = im.upright_size(image)
        native = self.areas is not None
        aspect = width / height if native else 1.0
        box = im.crop_box(width, height, config.crop_scale, rng, aspect)
        grid = best_grid(box[2] - box[0], box[3] - box[1], area) if native else fixed_grid(config)
        pixels = im.resize(image, (grid[1] * p, grid[0] * p), box)
        return pixels[:, ::-1] if config.flip and rng.random() < 0.5 else pixels


def fixed_grid(config):
    """(rows, cols) of a square image of `image_size` pixels."""
    return (config.image_size // config.patch_size,) * 2


def evaluation_pixels(image, config):
    """The evaluation view of a PIL image -> u8[H, W, 3], both sides multiples of the patch size.

    Fixed resolution: the centre square, scaled to image_size. Native: the whole image at its own
    aspect ratio, on the grid that best fills the area of such a square.
    """
    if not config.native_area:
        square = im.centre_box(*im.upright_size(image), 1.0)
        return im.resize(image, (config.image_size,) * 2, square)
    rows, cols = best_grid(*im.upright_size(image), (config.image_size // config.patch_size) ** 2)
    return im.resize(image, (cols * config.patch_size, rows * config.patch_size))


def to_patches(pixels, p):
    """Pixels u8[H, W, 3] -> patches u8[n, P] in the layout of `patchify`, by numpy."""
    rows, cols = pixels.shape[0] // p, pixels.shape[1] // p
    return pixels.reshape(rows, p, cols, p, 3).swapaxes(1, 2).reshape(rows * cols, p * p * 3)


def pad_patches(images, p, area=None):
    """Images of equal size or not, each u8[H, W, 3] -> (patches u8[B, A, P], zero patches at the
    end of small images; grid i64[B, 2]). A is `area`, or the largest image's patches."""
    sequences = [to_patches(pixels, p) for pixels in images]
    area = area or max(map(len, sequences))
    patches = np.zeros((len(images), area, p * p * 3), dtype=np.uint8)
    for row, sequence in zip(patches, sequences, strict=True):
        row[: len(sequence)] = sequence
    grid = torch.tensor([(pixels.shape[0] // p, pixels.shape[1] // p) for pixels in images])
    return torch.from_numpy(patches), grid


def collate(images, ids, area, p, rows, size, skipped=()):
    """Pixels of each image and token ids of each caption -> Batch of `area` patches per image."""
    tokens, num_tokens = map(torch.from_numpy, pad_tokens(ids))
    patches, grid = pad_patches(images, p, area)
    is_full = bool((grid.prod(dim=1) == patches.shape[1]).all())
    return Batch(patches, grid, tokens, num_tokens, rows, size, list(skipped), is_full)


class Record(NamedTuple):
    """A held-out sample in the evaluation view."""

    pixels: np.ndarray  # u8[H, W, 3]
    token_ids: list
    sample: int  # its index in the source's shards
    label_name: object  # from its .json; None without one


def read_in_order(source, config, tokenizer, count, accept=None):
    """The first `count` readable samples of a source in order.

    Args: accept: accept(PIL image) says whether to take a sample.
    Returns: ([Record], names and reasons of those that were skipped).
    """
    def read(sample):
        label_name = source.shards.metadata(sample).get("label_name")
        token_ids = tokenizer.encode(pick_caption(source, sample), config.max_tokens)
        image = im.open_image(source.shards.image(sample))
        if accept and not accept(image):
            return None
        return Record(evaluation_pixels(image, config), token_ids, sample, label_name)

    skipped = []
    samples = map(source.sample, range(len(source)))
    readable = im.read_or_skip(samples, read, source.shards.name, skipped)
    return list(islice((record for _, record in readable if record), count)), skipped


def describe(data):
    """Lines that say what will be read: sources, shares, epochs, and what will be skipped."""
    rows, lines = int(data.sizes.sum()), []
    if len(data.sources) > 1:
        lines.append(f"a mixture of {len(data.sources)} sources, their weights scaled to sum to 1:")
    for source in data.sources:
        epochs = rows * source.weight / len(source)
        all_samples = len(source.shards)
        some = f" of {all_samples:,}" if len(source) < all_samples else ""
        bad = {reason: n for reason, n in source.shards.report.items() if n}
        lines.append(f"{source.path} ({source.kind}): {len(source):,}{some} samples, "
                     f"{source.weight:.1%} of the mixture, {epochs:.1f} epochs"
                     + (f"; skipped: {bad}" if bad else ""))
        lines += capped(source.shards.damaged)
    return lines


def capped(lines, most=10):
    """Lines for the screen: the first `most`, and how many there are beyond them."""
    more = len(lines) - most
    return [*lines[:most], f"... and {more:,} more"] if more > 0 else list(lines)


def make_loader(data, first, num_workers, pin):
    """Iterate `data[first]`, `data[first + 1]`, .., read ahead while the model computes.

    Args: num_workers: processes that read; 0: a thread does, which on a few cores is faster, since
        nothing is copied between processes; pin: into pinned memory, for a GPU.

    What a batch holds is decided by its number alone: readers have no state, and their number
    changes nothing.
    """
    if num_workers == 0:
        return read_in_thread(data, first, pin)
    return read_in_workers(torch.utils.data.DataLoader(
        data, batch_size=None, sampler=range(first, len(data)), num_workers=num_workers,
        pin_memory=pin, prefetch_factor=PREFETCH, worker_init_fn=start_worker))


def check_shared_memory(config, patches, folder="/dev/shm"):
    """Raise ValueError if the batches that workers read ahead do not fit into shared memory.

    Containers have 64 MB of it by default, and a worker that finds no room is killed.

    Args: patches: in a micro-batch.
    """
    if not config.num_workers or not os.path.isdir(folder):
        return
    free = shutil.disk_usage(folder).free
    need = (patches * config.patch_dim * config.num_workers * PREFETCH
            * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    if need > free:
        raise ValueError(
            f"num_workers={config.num_workers} needs {need / 1e6:,.0f} MB of shared memory, and "
            f"{folder} has {free / 1e6:,.0f} MB free: use --num_workers=0 (a thread reads), fewer "
            "workers, or start the container with --shm-size=16g")


def read_in_workers(loader):
    """The batches of a DataLoader; an error of a worker ends in one line, without its traceback."""
    batches = iter(loader)
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        # torch's handler raises wherever the run happens to be; `next` notices within 5 seconds
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    failure = None
    while not failure:
        try:
            yield next(batches)
        except StopIteration:
            return
        except Exception as error:  # a killed worker leaves half a message behind
            failure = (str(error) or type(error).__name__).strip().splitlines()[-1]
    raise OSError(f"a data worker failed: {failure}; --num_workers=0 reads without workers")


def read_in_thread(data, first, pin, depth=2):
    """The loader of one thread, `depth` batches ahead."""
    def read(k):
        batch = data[k]
        return batch.pin_memory() if pin else batch

    with ThreadPoolExecutor(1) as thread:
        ahead = deque()
        for k in range(first, len(data) + depth):
            if k < len(data):
                ahead.append(thread.submit(read, k))
            if k >= first + depth and ahead:
                yield ahead.popleft().result()


def start_worker(_):
    """A data worker computes on one thread.

    A request to stop reaches every process. A worker then gives the training process ten seconds to
    save and exit: if the worker died at once, the loader would report a crash.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):  # not on Windows
        signal.signal(signal.SIGTERM, lambda *_: signal.alarm(10))
