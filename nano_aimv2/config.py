"""Config: every setting of a run in one flat, frozen dataclass, and the presets.

The shape alphabet used in every file and lesson:

    B  images in the batch           P  values of a patch, p*p*3       D  width (De, Dd: enc., dec.)
    A  patches, padding included     T  text tokens, padding included  V  vocabulary size
    n  valid patches of an image     S  decoder sequence length        M  prefix length, 1 .. n-1

A user's mistake is reported here, before anything is slow: the value, the rule and the fix.
Lesson: 10.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from nano_aimv2.files import write_text
from nano_aimv2.flags import as_text, check_at_least, check_choice, nearest, parse, read_flags

CHOICES = {
    "positions": ("sincos", "learned"), "prefix": ("random", "causal", "full"),
    "device": ("auto", "cpu", "cuda", "mps"), "dtype": ("auto", "float32", "bfloat16", "float16"),
    "parallel": ("auto", "none", "ddp", "fsdp", "hybrid"), "compile": ("auto", "true", "false")}
AT_LEAST = dict(
    image_size=1, patch_size=1, max_tokens=2, vocab_size=2, embed_dim=1, num_blocks=1, num_heads=1,
    decoder_dim=1, decoder_blocks=1, decoder_heads=1, mlp_multiple=1, steps=1, batch_size=1,
    grad_accum=1, encoder_lr=0, warmup_steps=0, min_lr=0, weight_decay=0, alpha=0, text_weight=0,
    num_workers=0, log_every=1, eval_every=0, eval_images=1, save_every=0, keep=1, seed=0)


@dataclass(frozen=True)
class Config:
    """One run: `Config.from_preset("toy", steps=100)`, `.from_flags(argv)` or `.load(path)`."""

    # run
    preset: str = "toy"  # where the defaults come from
    run_dir: str = ""  # folder for everything the run writes; empty: runs/PRESET
    seed: int = 0  # everything random follows from it and the step
    init: str = ""  # start from the weights of a run, or of an encoder (a folder or repository id)

    # data
    data: str = "data/scenes:synthetic:85,data/scenes:alt:15"  # path:kind:weight,..
    val_data: str = ""  # path:kind; empty: val/ beside the largest source's train/
    max_tokens: int = 32  # a caption with its end token is cut here
    tokenizer: str = "toy.tiktoken"  # a rank file, or the name of a tiktoken encoding such as gpt2
    vocab_size: int = 768  # at least the tokenizer's; the rest is padding that is never predicted
    crop_scale: float = 1.0  # a random crop's least share of area; 1: centre square (native: all)
    flip: bool = False  # mirror half of the images; falsifies captions that say left or right
    pixel_mean: tuple = (0.485, 0.456, 0.406)  # of ImageNet, as in Apple's training code
    pixel_std: tuple = (0.229, 0.224, 0.225)  # likewise

    # encoder
    image_size: int = 48  # pixels, height and width
    patch_size: int = 12  # pixels
    embed_dim: int = 192  # width De
    num_blocks: int = 3  # transformer blocks
    num_heads: int = 6  # attention heads
    native_area: tuple = ()  # low,high: batches of 2^low .. 2^high patches; empty: one square grid
    positions: str = "sincos"  # sincos (any grid) or learned (one grid)

    # decoder
    decoder_dim: int = 192  # width Dd
    decoder_blocks: int = 2  # transformer blocks
    decoder_heads: int = 6  # attention heads
    mlp_multiple: int = 32  # SwiGLU hidden size: 8/3 of the width, rounded up to a multiple of this

    # optimisation
    steps: int = 5000  # optimizer steps
    batch_size: int = 16  # global: images per step, over all ranks and micro-batches
    grad_accum: int = 1  # micro-batches per step and rank
    lr: float = 6e-4  # peak learning rate
    encoder_lr: float = 1.0  # the encoder's learning rate, as a multiple of lr; 0: it is frozen
    min_lr: float = 1e-5  # where the cosine ends
    warmup_steps: int = 100  # linear warm-up; a run of fewer steps does not reach the peak
    weight_decay: float = 1e-4  # fully decoupled, as in the paper: multiplied by lr_t / lr
    beta_1: float = 0.9  # AdamW
    beta_2: float = 0.95  # AdamW
    clip_grad: float = 1.0  # global gradient norm
    alpha: float = 0.4  # weight of the image loss
    text_weight: float = 1.0  # weight of the caption loss; the paper has 1, or 0 for images only
    prefix: str = "random"  # M in training: random, 1 .. n-1; causal, 1; full, n (captions only)
    raw_pixels: bool = False  # predict patches as they are, not normalised one by one

    # how it runs
    device: str = "auto"  # auto, cpu, cuda or mps
    dtype: str = "auto"  # of the matmuls; weights, losses and optimizer are float32
    num_workers: int = 0  # processes that read data; 0: a thread does, the fastest on few cores
    parallel: str = "auto"  # none, ddp, fsdp, hybrid (fsdp per node); auto: ddp under torchrun
    recompute: bool = False  # activation checkpointing: run each block again in the backward pass
    compile: str = "auto"  # torch.compile: true, false; auto: on GPUs
    log_every: int = 20  # steps between rows of metrics.jsonl
    eval_every: int = 1000  # steps between evaluations; 0: at the end only
    eval_images: int = 512  # held-out images per set
    save_every: int = 1000  # steps between checkpoints; 0: at the end only
    keep: int = 2  # how many of the newest checkpoints are kept

    def __post_init__(self):
        if not self.run_dir:
            object.__setattr__(self, "run_dir", f"runs/{self.preset}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if parse(field.name, as_text(value), field.type) != value:  # what a flag can say
                raise ValueError(f"{field.name}={value!r} must be of type {field.type.__name__}")
        for name, choices in CHOICES.items():
            check_choice(name, getattr(self, name), choices)
        check_at_least(self, **AT_LEAST)
        for is_kept, message in rules(self):
            if not is_kept:
                raise ValueError(message)

    @property
    def patch_dim(self):
        """P: values of a patch."""
        return self.patch_size**2 * 3

    @property
    def betas(self):
        return self.beta_1, self.beta_2

    @property
    def mlp_hidden_dim(self):
        return swiglu_hidden(self.embed_dim, self.mlp_multiple)

    @property
    def decoder_mlp_hidden_dim(self):
        return swiglu_hidden(self.decoder_dim, self.mlp_multiple)

    @classmethod
    def from_preset(cls, preset="toy", **overrides):
        """A preset's settings with some replaced.

        Raises: ValueError on an unknown preset or setting, or a value that breaks a rule.
        """
        check_choice("preset", preset, PRESETS)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in names:
                raise ValueError(f"unknown setting {name!r}{nearest(name, names)}; --help lists "
                                 "all")
        return cls(**{"preset": preset, **PRESETS[preset][1], **overrides})

    @classmethod
    def from_flags(cls, argv, doc="", *others, adopt=dict):
        """Read `--key=value` flags; `--preset` chooses the defaults.

        Args: doc: what --help prints first; others: dataclasses with further flags of a command;
            adopt: called with the settings that were given, returns those to use.
        Returns: Config, or (Config, the values given for each of the others).
        Raises: ValueError on anything that is not a known setting with a value of its type.
        """
        given, *rest = read_flags(argv, cls, *others, doc=doc, epilog=presets_text())
        config = cls.from_preset(**adopt(given))
        return (config, *rest) if others else config

    def save(self, path):
        """Write the settings as JSON to the file `path`."""
        write_text(path, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path):
        """Read the settings that `save` wrote. Raises ValueError if the file is not a config."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is not a config of this version ({error}): train again, or "
                             "correct it") from error


def rules(c):
    """Rules that settings keep with each other: yields (whether it is kept, what to say if not)."""
    for name in ("lr", "clip_grad"):
        yield getattr(c, name) > 0, f"{name}={getattr(c, name)} must be a number above 0"
    yield c.min_lr <= c.lr, (
        f"min_lr={c.min_lr} must be at most lr={c.lr}, its peak: try --min_lr={c.lr / 100:g}")
    yield 0 < c.crop_scale <= 1, (
        f"crop_scale={c.crop_scale} must be above 0 and at most 1 (1: no random crop)")
    fix = min(max(2, c.image_size // c.patch_size), 256) * c.patch_size
    yield c.image_size == fix, (
        f"image_size={c.image_size} must be a multiple of patch_size={c.patch_size}, and at least "
        f"twice it (at most 256 times): try --image_size={fix}")
    for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
        D, num_heads = getattr(c, width), getattr(c, heads)
        yield D % num_heads == 0, f"{width}={D} must be a multiple of {heads}={num_heads}"
    yield c.positions == "learned" or c.embed_dim % 4 == 0, (
        f"embed_dim={c.embed_dim} must be a multiple of 4 for sincos positions")
    yield len(c.pixel_mean) == 3, f"pixel_mean={c.pixel_mean} must be three numbers"
    yield len(c.pixel_std) == 3 and min(c.pixel_std) > 0, (
        f"pixel_std={c.pixel_std} must be three numbers above 0")
    yield 0 <= c.beta_1 < 1 and 0 <= c.beta_2 < 1, (
        f"beta_1={c.beta_1} and beta_2={c.beta_2} must be at least 0 and below 1")
    yield c.prefix != "full" or c.alpha == 0, (
        "prefix='full' shows the encoder every patch and leaves none to predict; "
        f"alpha={c.alpha} must be 0 with it")
    yield c.alpha + c.text_weight > 0, (f"alpha={c.alpha} and text_weight={c.text_weight} leave "
                                        "nothing to learn: one must be above 0")
    yield c.batch_size >= c.grad_accum, (
        f"batch_size={c.batch_size} must be at least grad_accum={c.grad_accum}")
    if c.native_area:
        area = c.native_area
        yield len(area) == 2 and 1 <= area[0] <= area[1] <= 16, (
            f"native_area={area} must be two exponents low,high with 1 <= low <= high <= 16")
        yield c.positions == "sincos", (
            f"positions={c.positions!r} knows one grid only; native_area needs positions='sincos'")


def swiglu_hidden(dim, multiple):
    """2/3 of 4 D, rounded up to a multiple: a gated MLP of three matrices is then as large as a
    plain one of two matrices and 4 D."""
    return -(-8 * dim // (3 * multiple)) * multiple


def presets_text():
    """One line for each preset, for --help."""
    return "\n".join(["presets:", *(f"  {name:14}{about}" for name, (about, _) in PRESETS.items())])


# The paper's recipe (section 4 and Table A1) for every size: patch 14, 224 px, one decoder of
# 12 x 1024, AdamW with warm-up 12,500 and cosine to 1e-5 over 1.5M steps of 8,192 images, random
# crops and flips, bf16. `data` names the paper's Table 2 mixture as it would be written for local
# copies: DFN-2B 30 / 30, COYO 9, HQITP (not public) 28 / 3.
PAPER = dict(
    image_size=224, patch_size=14, positions="learned", max_tokens=77, tokenizer="gpt2",
    vocab_size=50304, crop_scale=0.4, flip=True, decoder_dim=1024, decoder_blocks=12,
    decoder_heads=8, mlp_multiple=256,
    data="data/dfn2b:alt:30,data/dfn2b:synthetic:30,data/coyo:alt:9,data/hqitp:alt:28,"
         "data/hqitp:synthetic:3",
    steps=1_500_000, batch_size=8192, warmup_steps=12_500, num_workers=8,
    log_every=50, eval_every=10_000, eval_images=8192, save_every=5_000,
)
LARGE = dict(PAPER, embed_dim=1024, num_blocks=24, num_heads=8)

# Post-training (section 2.4) starts from a run's weights with a new optimizer: --init=RUN. From the
# paper: at high resolution weight decay 0, no synthetic captions and 2B pairs; native areas of
# 2^7 .. 2^12 patches. The paper gives neither learning rate nor schedule, nor the number of pairs
# of the native stage. Ours: a tenth of L's peak, a short warm-up, the same cosine, 2B pairs again.
TUNE = dict(LARGE, lr=1e-4, warmup_steps=2_500, steps=244_000)
HIGHRES = dict(TUNE, weight_decay=0.0, data="data/dfn2b:alt:30,data/coyo:alt:9,data/hqitp:alt:28")
# The toy versions keep synthetic captions, unlike the paper: toy alt-texts do not mention places,
# and the synthetic caption is what is measured. Peak and steps are ours; native has more to learn.
TOY_TUNE = dict(lr=3e-4, steps=1000, eval_every=100, eval_images=256)

# name: (one line for --help, what differs from the fields' defaults, which are the toy's).
# Encoder sizes are Table 1's. `base` exists in Apple's code only, without a peak lr: L's is used.
PRESETS = {
    "toy": ("small coloured scenes, drawn at first use; minutes on two CPU cores", {}),
    "photos": ("your photographs, packed by data/pack.py into data/photos; half an hour", dict(
        data="data/photos:synthetic:1,data/photos:alt:1", image_size=32, patch_size=4,
        crop_scale=0.5, flip=True, embed_dim=128, num_blocks=6, num_heads=4, decoder_dim=128,
        decoder_blocks=2, decoder_heads=4, batch_size=32, lr=1e-3, warmup_steps=200, steps=8500,
        eval_images=1000)),
    "base": ("the paper's recipe with ViT-B (85.6M encoder)", dict(
        PAPER, embed_dim=768, num_blocks=12, num_heads=6, lr=1e-3)),
    "large": ("the paper's AIMv2-L (309M encoder); on 8 GPUs --grad_accum=8", dict(
        LARGE, lr=1e-3, parallel="ddp")),
    "huge": ("AIMv2-H (681M encoder), FSDP; on 8 GPUs --grad_accum=10", dict(
        PAPER, embed_dim=1536, num_blocks=24, num_heads=12, lr=8e-4, parallel="fsdp",
        grad_accum=2)),
    "1b": ("AIMv2-1B, FSDP, recomputed blocks; on 8 GPUs --grad_accum=2", dict(
        PAPER, embed_dim=2048, num_blocks=24, num_heads=16, lr=8e-4, parallel="fsdp",
        recompute=True)),
    "3b": ("AIMv2-3B, FSDP, recomputed blocks; on 8 GPUs --grad_accum=3", dict(
        PAPER, embed_dim=3072, num_blocks=24, num_heads=24, lr=4e-4, parallel="fsdp",
        recompute=True)),
    "large-336": ("AIMv2-L at 336 px: --init=runs/large", dict(HIGHRES, image_size=336)),
    "large-448": ("AIMv2-L at 448 px: --init=runs/large", dict(HIGHRES, image_size=448)),
    "large-native": ("AIMv2-L at native resolution: --init=runs/large", dict(
        TUNE, native_area=(7.0, 12.0), positions="sincos")),
    "toy-highres": ("the toy at 72 px, as 336 is to 224: --init=runs/toy", dict(
        TOY_TUNE, image_size=72, weight_decay=0.0,
        data="data/scenes_highres:synthetic:85,data/scenes_highres:alt:15")),
    "toy-native": ("the toy in 8 to 64 patches of any shape: --init=runs/toy", dict(
        TOY_TUNE, native_area=(3.0, 6.0), lr=6e-4, steps=12_000, eval_every=2000,
        data="data/scenes_native:synthetic:85,data/scenes_native:alt:15")),
}
POST_TRAINING = ("large-336", "large-448", "large-native", "toy-highres", "toy-native")
