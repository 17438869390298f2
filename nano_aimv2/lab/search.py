"""Search: rank images by a text or by another image, and label them without training.

    python -m nano_aimv2.lab.search --run_dir=runs/toy-lit --text="a small red star" photos/
    python -m nano_aimv2.lab.search --run_dir=runs/toy-lit --classes="a dog|a cat" photos/
    python -m nano_aimv2.lab.search --weights=apple/aimv2-large-patch14-224 --image=cat.jpg photos/
    python -m nano_aimv2.lab.search --run_dir=runs/toy-lit --data=data/scenes  # measures it

Texts need a run of contrastive.py, whose towers turn images and texts into vectors of one space. An
image as query works with any encoder: its vector is the mean of its patch features. Images are
ranked by cosine similarity; --classes prints the most probable of the texts. The best are drawn
into search.png. Vectors are kept beside it as `.npy`, for the same weights and unchanged images.

--data measures on held-out shards: how often is an image most similar to its own caption among 512,
a caption to its image (equal captions are right), an image to its label written as a caption?

Pipeline: images, texts -> vectors -> **ranking**. Source: CLIP (arXiv 2103.00020), section 3.1.
"""

import hashlib
import itertools
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nano_aimv2.data.batches import pad_patches
from nano_aimv2.data.images import read_or_skip
from nano_aimv2.data.mixture import largest_source
from nano_aimv2.data.tokenizer import pad_tokens
from nano_aimv2.files import replacing
from nano_aimv2.flags import check_at_least, read_flags, run_command
from nano_aimv2.hub import load_encoder, read_weights
from nano_aimv2.lab.contrastive import CLIP, mean_of_valid, valid_patches
from nano_aimv2.lab.encode import default_area, find_images, read_pixels
from nano_aimv2.lab.heads import CHUNK, accuracy
from nano_aimv2.lab.plots import search_page
from nano_aimv2.lab.probe import read_labelled
from nano_aimv2.training.checkpoint import load_model
from nano_aimv2.training.distributed import choose_device
from nano_aimv2.training.evaluate import held_out_sets

QUESTIONS = ("text", "image", "classes", "data")
SAMPLES = 512  # with --data: held-out samples to choose from
TOY_PROMPT = "{} a {} {} {}"  # place, size, colour and shape, as in the captions of data/scenes.py
PROMPT = "A photo of a {}"  # any other label
VERSION = 1  # of the cached vectors


@dataclass
class Options:
    files: tuple = ()  # images, or folders of images
    run_dir: str = ""  # a run of contrastive.py
    weights: str = ""  # instead, for --image: a run, published weights, or a repository id
    text: str = ""  # rank the images by how well they fit this text
    image: str = ""  # rank the images by how similar they are to this one
    classes: str = ""  # label the images: texts with | between
    data: str = ""  # measure on the held-out shards of this folder
    out: str = "features"  # folder to write to
    top: int = 16  # images on the sheet, at most
    batch_size: int = 8  # images that are encoded together
    device: str = "auto"  # auto, cpu, cuda or mps

    def __post_init__(self):
        check_at_least(self, top=1, batch_size=1)


def read_options(argv):
    """Flags -> (Options, which of QUESTIONS is asked, its texts: of classes one each). Raises
    ValueError unless exactly one is asked, of what can answer it."""
    [given] = read_flags(argv, Options, doc=__doc__, words="files")
    options, asked = Options(**given), [name for name in QUESTIONS if name in given]
    if len(asked) != 1:
        raise ValueError(f"{len(asked)} questions are given ({', '.join(asked) or 'none'}): give "
                         "one of --text, --image and --classes with images, or --data")
    [asked] = asked
    texts = given[asked].split("|") if asked == "classes" else [given[asked]]
    texts = [text.strip() for text in texts]
    if not all(texts):
        raise ValueError(f"--{asked}={given[asked]!r} has an empty text: write what to search for")
    if asked == "classes" and len({*texts}) < max(2, len(texts)):
        raise ValueError(f"--classes={options.classes!r} must be at least two texts that differ: "
                         'try --classes="a dog|a cat"')
    if asked != "data" and not options.files:
        raise ValueError("no images: name files, or folders of files, behind the flags")
    if bool(options.weights) == bool(options.run_dir) or (options.weights and asked != "image"):
        raise ValueError(f"--{asked} needs --run_dir=RUN, a run of lab.contrastive, without "
                         "--weights; only --image can use --weights of any encoder instead")
    return options, asked, texts


def load(options, device):
    """(CLIP, tokenizer) of a run on the device, or (Encoder, None). Raises ValueError if the run is
    not one of contrastive.py."""
    if options.weights:
        return load_encoder(options.weights).to(device), None
    path = Path(options.run_dir, "model.safetensors")
    if path.exists() and "log_scale" not in read_weights(path):
        raise ValueError(f"{options.run_dir} is not a run of lab.contrastive: train a text tower "
                         "for it with `python -m nano_aimv2.lab.contrastive --lock=true "
                         f"--init={options.run_dir}`, or use --weights with --image")
    model, _, tokenizer = load_model(options.run_dir, device, kind=CLIP)
    return model, tokenizer


@torch.inference_mode()
def embed(model, patches, grid):
    """Patches u8[B, A, P], grid i64[B, 2] -> vectors f32[B, D] of unit length, on the CPU: CLIP's,
    or the mean features of an Encoder."""
    patches, grid = (t.to(next(model.parameters()).device) for t in (patches, grid))
    if isinstance(model, CLIP):
        return model.image_vectors(patches, grid).cpu()
    mean = mean_of_valid(model(patches, grid).float(), valid_patches(grid, patches.shape[1]))
    return F.normalize(mean, dim=-1).cpu()


@torch.inference_mode()
def embed_texts(model, tokenizer, texts):
    """Texts -> f32[C, D] of unit length, on the CPU. Raises ValueError if one is too long."""
    most, device = model.config.max_tokens, next(model.parameters()).device
    ids = [tokenizer.encode(text, most + 1) for text in texts]
    for text, found in zip(texts, ids, strict=True):
        if len(found) > most:
            raise ValueError(f"{text!r} has more than the {most - 1} tokens that the text tower "
                             "reads: shorten it")
    tokens, num_tokens = (torch.from_numpy(array).to(device) for array in pad_tokens(ids))
    return model.text_vectors(tokens, num_tokens).cpu()


def read_view(model, path):
    """An image file as the model sees it, u8[H, W, 3]: encode.py's view."""
    return read_pixels(path, model.config, default_area(model.config))


def model_hash(model):
    """Hexadecimal digits that change with everything but the image that a vector depends on."""
    settings = {**asdict(model.config), "run_dir": "", "version": VERSION}
    key = hashlib.sha256(f"{type(model).__name__} {settings}".encode())
    for name, weight in model.state_dict().items():
        key.update(name.encode())
        key.update(weight.cpu().numpy().tobytes())
    return key.hexdigest()


def vectors_of(model, paths, options):
    """Vectors of image files, from the output folder where they are known: the name of a cached
    vector ends with a hash of the model, and of the image's path, size and time of the last change.

    Returns: ({path: f32[D]}, lines that name each skipped file and the reason).
    """
    Path(options.out).mkdir(parents=True, exist_ok=True)
    skipped, weights, p = [], model_hash(model), model.config.patch_size

    def cache_of(path):
        file = path.stat()
        key = repr((weights, str(path.resolve()), file.st_size, file.st_mtime_ns)).encode()
        return Path(options.out, f"{path.stem}.{hashlib.sha256(key).hexdigest()[:16]}.npy")

    caches = dict(read_or_skip(paths, cache_of, str, skipped))
    unknown = [path for path, cache in caches.items() if not cache.exists()]
    readable = read_or_skip(unknown, lambda path: read_view(model, path), str, skipped)
    while group := list(itertools.islice(readable, options.batch_size)):
        vectors = embed(model, *pad_patches([pixels for _, pixels in group], p)).numpy()
        for (path, _), vector in zip(group, vectors, strict=True):
            with replacing(caches[path]) as temporary, open(temporary, "wb") as file:
                np.save(file, vector)
    return {path: np.load(cache) for path, cache in caches.items() if cache.exists()}, skipped


@torch.inference_mode()
def retrieval(model, evaluation, device):
    """How often an image is most similar to its caption among all of an Evaluation, and a caption
    to its image: {direction: `accuracy`, with "chance"}."""
    pairs = [model(batch.to(device)) for batch in evaluation.batches]
    images, texts = (torch.cat(part).cpu() for part in zip(*pairs, strict=True))
    ids = torch.from_numpy(np.unique(evaluation.captions, return_inverse=True)[1])
    is_right = ids[:, None] == ids  # bool[N, N]
    similarity, rows = images @ texts.T, torch.arange(len(ids))
    found = {"image -> caption": similarity.argmax(1), "caption -> image": similarity.argmax(0)}
    chance = {"chance": float(is_right.float().mean())}
    return {name: accuracy(is_right[rows, nearest]) | chance for name, nearest in found.items()}


def zero_shot(model, tokenizer, images):
    """How often an image is most similar to its own label: {attribute: `accuracy`, with "chance",
    the share of the most common label}, of probe.py's Labelled images.

    A word of the toy set is the mean of all captions of one object that have it.
    """
    names = {attribute: sorted({*found}) for attribute, found in images.labels.items()}
    rows = list(itertools.product(*names.values()))
    template = TOY_PROMPT if len(names) > 1 else PROMPT
    texts = embed_texts(model, tokenizer, [template.format(*row) for row in rows])
    vectors = torch.cat([embed(model, part, torch.tensor([images.grid] * len(part)))
                         for part in torch.from_numpy(images.patches).split(CHUNK)])
    results = {}
    for column, (attribute, classes) in enumerate(names.items()):
        means = [texts[[row[column] == name for row in rows]].mean(dim=0) for name in classes]
        nearest = (vectors @ F.normalize(torch.stack(means), dim=-1).T).argmax(dim=1).tolist()
        own = images.labels[attribute]
        right = [classes[i] == name for i, name in zip(nearest, own, strict=True)]
        chance = max(map(own.count, classes)) / len(own)
        results[attribute] = accuracy(torch.tensor(right)) | {"chance": chance}
    return results


def print_scores(model, tokenizer, options, device):
    """Print `retrieval` and `zero_shot` for each held-out part of the data set."""
    kind = largest_source(model.config.data).kind
    config = replace(model.config, data=f"{options.data}:{kind}:1", val_data="")
    held_out = held_out_sets(config, tokenizer, SAMPLES)
    if not held_out:
        raise ValueError(f"--data={options.data} has no folder val of held-out shards: pack images "
                         "with data/pack.py")
    for split, evaluation in held_out.items():
        rows = retrieval(model, evaluation, device)
        try:
            images, _ = read_labelled(Path(options.data, split), config, sys.maxsize)
            rows |= zero_shot(model, tokenizer, images)
        except ValueError as error:
            print(f"search: no zero-shot accuracy: {error}", file=sys.stderr)
        for name, s in rows.items():
            print(f"{split:<6}{name:<18}{s['top1']:.3f} [{s['low']:.3f} {s['high']:.3f}], chance "
                  f"{s['chance']:.3f}, {s['images']:,} images")


def main(argv):
    options, asked, texts = read_options(argv)
    query = Path(options.image)
    paths = [path for name in options.files for path in find_images([name]).values()]
    paths = [path for path in paths if path.resolve() != query.resolve()]
    device = choose_device(options.device)
    model, tokenizer = load(options, device)
    if asked == "data":
        print_scores(model, tokenizer, options, device)
        return
    if asked == "image":
        vectors, skipped = vectors_of(model, [query, *paths], options)
        if query not in vectors:
            raise ValueError(f"--image={query} cannot be read: "
                             + next(line for line in skipped if line.startswith(str(query))))
        queries = torch.from_numpy(vectors.pop(query))[None]
    else:
        queries = embed_texts(model, tokenizer, texts)
        vectors, skipped = vectors_of(model, paths, options)
    for line in skipped:
        print(f"search: skipped {line}", file=sys.stderr)
    if not vectors:
        raise ValueError(f"none of {len(paths)} images could be read: give whole JPEG, PNG or WebP "
                         "files")
    scores = torch.from_numpy(np.stack(list(vectors.values()))) @ queries.T  # [N, C]
    if asked == "classes":
        scores = (scores * model.log_scale.exp().item()).softmax(dim=1)
    scores, best = scores.max(dim=1)
    rows = zip(scores.tolist(), best.tolist(), vectors, strict=True)
    rows = sorted(rows, key=lambda row: -row[0])
    sheet = [(read_view(model, query), "query")] if asked == "image" else []
    for rank, (score, i, path) in enumerate(rows):
        print(f"{score:.3f}  {texts[i] + '  ' if asked == 'classes' else ''}{path}")
        if rank < options.top:
            label = texts[i] if asked == "classes" else path.name
            sheet.append((read_view(model, path), f"{score:.3f}  {label[:40]}"))
    page = Path(options.out, "search.png")
    search_page(sheet, page, f"{asked} {'|'.join(texts)!r}: best of {len(rows)} images")
    note = f", {len(skipped)} skipped" if skipped else ""
    print(f"{len(rows)} image{'s' * (len(rows) > 1)} ranked, drawn in {page}{note}")


if __name__ == "__main__":
    run_command(main)
