"""Config: every setting of a run in one flat, frozen dataclass; presets; strict `--key=value` flags.

The shape alphabet used in every file and lesson:

    B  images in the batch          P  values of a patch, p*p*3      D  width (De encoder, Dd decoder)
    A  patches, padding included    T  text tokens, padding included V  vocabulary size
    n  valid patches of an image    S  decoder sequence length       M  prefix length, 1 .. n-1

A user's mistake is met here, before anything is slow, with the value, the rule and the fix. Lesson: 08.
"""

import dataclasses
import difflib
import inspect
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

CHOICES = {"positions": ("sincos", "learned"), "prefix": ("random", "causal", "full"), "device": ("auto", "cpu", "cuda", "mps"),
           "dtype": ("auto", "float32", "bfloat16", "float16"), "parallel": ("auto", "none", "ddp", "fsdp", "hybrid"),
           "compile": ("auto", "true", "false")}
AT_LEAST = {"image_size": 1, "patch_size": 1, "max_tokens": 2, "vocab_size": 2, "embed_dim": 1, "num_blocks": 1,
            "num_heads": 1, "decoder_dim": 1, "decoder_blocks": 1, "decoder_heads": 1, "mlp_multiple": 1, "steps": 1,
            "batch_size": 1, "grad_accum": 1, "warmup_steps": 0, "min_lr": 0, "weight_decay": 0, "alpha": 0, "text_weight": 0,
            "num_workers": 0, "log_every": 1, "eval_every": 0, "eval_images": 1, "save_every": 0, "keep": 1, "seed": 0}
ABOVE_ZERO = ("lr", "clip_grad")
# A run may be continued under other values of these; everything else shapes its numbers.
MAY_CHANGE = ("run", "device", "num_workers", "parallel", "compile", "recompute", "log_every", "save_every", "keep", "grad_accum")


@dataclass(frozen=True)
class Config:
    """One run. `Config.from_preset("toy", steps=100)`, `Config.from_flags(sys.argv[1:])`, `Config.load(folder)`."""

    # run
    preset: str = "toy"  # where the defaults come from
    run: str = ""  # folder for everything the run writes; empty: runs/PRESET
    seed: int = 0  # everything random follows from it and the step
    init: str = ""  # start from the weights of this run folder (post-training)

    # data
    data: str = "data/scenes:synthetic:85,data/scenes:alt:15"  # path:caption-kind:weight,... (kinds alt, synthetic)
    val_data: str = ""  # one path:caption-kind; empty: the val/ folder beside the first source's train/
    max_tokens: int = 32  # a caption with its end token is cut here
    tokenizer: str = "data/toy.tiktoken"  # a rank file, or the name of a tiktoken encoding such as gpt2
    vocab_size: int = 768  # at least the tokenizer's; more is padding that is never predicted
    crop_scale: float = 1.0  # RandomResizedCrop keeps at least this share of the area; 1: the whole image
    flip: bool = False  # mirror half of the images: only where captions do not tell left from right
    pixel_mean: tuple = (0.485, 0.456, 0.406)  # of ImageNet, as in Apple's training code
    pixel_std: tuple = (0.229, 0.224, 0.225)

    # encoder
    image_size: int = 48  # pixels, height and width
    patch_size: int = 12  # pixels
    embed_dim: int = 192
    num_blocks: int = 3
    num_heads: int = 6
    native_area: tuple = ()  # low,high: each batch draws its area, 2^low .. 2^high patches; empty: one square grid
    positions: str = "sincos"  # sincos (any grid) or learned (one grid)

    # decoder
    decoder_dim: int = 192
    decoder_blocks: int = 2
    decoder_heads: int = 6
    mlp_multiple: int = 32  # SwiGLU hidden size: 8/3 of the width, rounded up to a multiple of this

    # optimisation
    steps: int = 5000
    batch_size: int = 16  # global: images a step, over all ranks and accumulation steps
    grad_accum: int = 1  # micro-batches a step and rank
    lr: float = 6e-4  # peak
    min_lr: float = 1e-5  # where the cosine ends
    warmup_steps: int = 100
    weight_decay: float = 1e-4  # fully decoupled, as in the paper: multiplied by lr_t / lr
    beta_1: float = 0.9
    beta_2: float = 0.95
    clip_grad: float = 1.0  # global gradient norm
    alpha: float = 0.4  # weight of the image loss
    text_weight: float = 1.0  # weight of the caption loss; the paper has 1, and 0 where it compares with image only
    prefix: str = "random"  # M in training: random, 1 .. n-1; causal, 1; full, n, which leaves no patch to predict
    raw_pixels: bool = False  # predict patches as they are, not normalised one by one

    # how it runs
    device: str = "auto"
    dtype: str = "auto"  # of the matmuls; weights, losses and optimizer are float32
    num_workers: int = 1  # processes that read data
    parallel: str = "auto"  # ddp, fsdp, hybrid (fsdp within a node, ddp between nodes) or none; auto: ddp under torchrun
    recompute: bool = False  # activation checkpointing: keep each block's input only, run the block again in backward
    compile: str = "auto"  # torch.compile; auto: on GPUs
    log_every: int = 20  # steps between rows of metrics.jsonl
    eval_every: int = 1000  # steps; 0: at the end only
    eval_images: int = 512  # held-out images for the losses, and for captions where the data is the toy set
    save_every: int = 1000  # steps between checkpoints; 0: at the end only
    keep: int = 2  # newest checkpoints kept

    def __post_init__(self):
        if not self.run:
            object.__setattr__(self, "run", f"runs/{self.preset}")
        for field in dataclasses.fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}{nearest(str(value), choices)}")
        for name, least in AT_LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ABOVE_ZERO:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be a number above 0")
        if not 0 < self.crop_scale <= 1:
            raise ValueError(f"crop_scale={self.crop_scale} must be above 0 and at most 1 (1 keeps the whole image)")
        if not (0 <= self.beta_1 < 1 and 0 <= self.beta_2 < 1):
            raise ValueError(f"beta_1={self.beta_1} and beta_2={self.beta_2} must be at least 0 and below 1")
        if self.image_size % self.patch_size or self.image_size == self.patch_size:
            raise ValueError(f"image_size={self.image_size} must be a multiple of patch_size={self.patch_size}, and at "
                             f"least twice it: try --image_size={max(2, self.image_size // self.patch_size) * self.patch_size}")
        for width, heads in (("embed_dim", "num_heads"), ("decoder_dim", "decoder_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width}={getattr(self, width)} must be a multiple of {heads}={getattr(self, heads)}")
        if self.positions == "sincos" and self.embed_dim % 4:
            raise ValueError(f"embed_dim={self.embed_dim} must be a multiple of 4 for sincos positions")
        for name in ("pixel_mean", "pixel_std"):
            if len(getattr(self, name)) != 3 or (name == "pixel_std" and min(self.pixel_std) <= 0):
                raise ValueError(f"{name}={getattr(self, name)} must be three numbers, one a colour channel"
                                 + (", above 0" if name == "pixel_std" else ""))
        if self.prefix == "full" and self.alpha > 0:
            raise ValueError(f"prefix='full' shows the encoder every patch and leaves none to predict; alpha={self.alpha} must "
                             "be 0 with it")
        if not self.alpha + self.text_weight > 0:
            raise ValueError(f"alpha={self.alpha} and text_weight={self.text_weight} leave nothing to learn: one must be above 0")
        if self.batch_size < self.grad_accum:
            raise ValueError(f"batch_size={self.batch_size} must be at least grad_accum={self.grad_accum}")
        if self.native_area:
            if len(self.native_area) != 2 or not 1 <= self.native_area[0] <= self.native_area[1] <= 16:
                raise ValueError(f"native_area={self.native_area} must be two exponents low,high with 1 <= low <= high <= 16")
            if self.positions != "sincos":
                raise ValueError(f"positions={self.positions!r} knows one grid only; native_area needs positions='sincos'")

    @property
    def patch_dim(self):
        """P: values of a patch."""
        return self.patch_size**2 * 3

    @property
    def mlp_hidden_dim(self):
        return swiglu_hidden(self.embed_dim, self.mlp_multiple)

    @property
    def decoder_mlp_hidden_dim(self):
        return swiglu_hidden(self.decoder_dim, self.mlp_multiple)

    @classmethod
    def from_preset(cls, preset, **overrides):
        """The preset's settings with some replaced. Raises ValueError on an unknown preset, setting or value."""
        if preset not in PRESETS:
            raise ValueError(f"unknown preset {preset!r}{nearest(preset, PRESETS)}; there are {', '.join(PRESETS)}")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in overrides:
            if name not in names:
                raise ValueError(f"unknown setting {name!r}{nearest(name, names)}; --help lists all")
        return cls(**{"preset": preset, **PRESETS[preset], **overrides})

    @classmethod
    def from_flags(cls, argv):
        """Read `--key=value` flags; `--preset` chooses the defaults. `--help` prints all settings and exits.

        Raises: ValueError on anything that is not a known setting with a value of its type.
        """
        if "--help" in argv or "-h" in argv:
            print(help_text())
            sys.exit(0)
        types = {field.name: field.type for field in dataclasses.fields(cls)}
        given = {}
        for flag in argv:
            match = re.fullmatch(r"--([A-Za-z0-9_-]+)=(.*)", flag, flags=re.DOTALL)
            if not match:
                raise ValueError(f"cannot read {flag!r}: settings are written --key=value; --help lists all")
            name = match[1].replace("-", "_")
            if name not in types:
                raise ValueError(f"unknown flag --{match[1]}{nearest(name, types, '--')}; --help lists all")
            given[name] = parse(name, match[2], types[name])
        return cls.from_preset(given.pop("preset", "toy"), **given)

    def save(self, path):
        """Write the settings as JSON to the file `path`."""
        Path(path).write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path):
        """Read the settings that `save` wrote. Raises ValueError if the file is not one."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
        except (json.JSONDecodeError, TypeError, UnicodeDecodeError, AttributeError) as error:
            raise ValueError(f"{path} is not a config of this version ({error}): train again, or correct it") from error


def swiglu_hidden(dim, multiple):
    """2/3 of 4 D rounded up to a multiple: with its third matrix the gated MLP is as large as a plain one of 4 D."""
    return -(-8 * dim // (3 * multiple)) * multiple


def nearest(word, choices, prefix=""):
    """' (did you mean X?)' for a misspelt word, or nothing."""
    found = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {prefix}{found[0]}?)" if found else ""


def parse(name, text, kind):
    """One flag's text to its type. Booleans are true or false and nothing else."""
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is tuple:
            return tuple(float(part) for part in text.split(","))
        return kind(text)
    except (ValueError, KeyError):
        want = {bool: "true or false", int: "a whole number", float: "a number", tuple: "numbers with commas between"}
        raise ValueError(f"--{name}={text} must be {want[kind]}") from None


def read_flags(kind, argv):
    """A script's `--key=value` flags -> (an instance of the dataclass `kind`, the words that are no flags).

    Raises: ValueError on an unknown flag or a wrong value.
    """
    types = {field.name: field.type for field in dataclasses.fields(kind)}
    given, words = {}, []
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            words.append(word)
        elif not equals:
            raise ValueError(f"cannot read {word!r}: options are written --key=value; --help shows examples")
        elif name not in types:
            raise ValueError(f"unknown flag --{name}{nearest(name, types, '--')}; there are {', '.join('--' + t for t in types)}")
        else:
            given[name] = parse(name, value, types[name])
    return kind(**given), words


def check_type(name, value, kind):
    wide = (int, float) if kind is float else kind
    if not isinstance(value, wide) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name}={value!r} must be of type {kind.__name__}")


def help_text():
    """All settings with the toy preset's values; the explanations are the comments behind the fields above."""
    notes = dict(re.findall(r"^    (\w+): \w+ = .*?  # (.*)$", inspect.getsource(Config), flags=re.MULTILINE))
    lines = ["Settings, as --key=value (shown: the defaults, before a preset)", ""]
    for field in dataclasses.fields(Config):
        value = ",".join(map(str, field.default)) if field.type is tuple else field.default
        lines.append(f"  --{field.name}={str(value).lower() if field.type is bool else value}"
                     + (f"\n        {notes[field.name]}" if field.name in notes else ""))
    return "\n".join([*lines, "", f"presets: {', '.join(PRESETS)}"])


# The paper's recipe (its section 4 and Table A1) for every size: patch 14, 224 px, one decoder of 12 x 1024, AdamW with
# warm-up 12,500 and cosine to 1e-5 over 1.5M steps of 8,192 images, bf16. `data` names the paper's Table 2 mixture as it
# would be written for local copies: DFN-2B 30 / 30, COYO 9, HQITP (not public) 28 / 3.
PAPER = dict(
    image_size=224, patch_size=14, positions="learned", max_tokens=77, tokenizer="gpt2", vocab_size=50304,
    crop_scale=0.4, decoder_dim=1024, decoder_blocks=12, decoder_heads=8, mlp_multiple=256,
    data="data/dfn2b:alt:30,data/dfn2b:synthetic:30,data/coyo:alt:9,data/hqitp:alt:28,data/hqitp:synthetic:3",
    steps=1_500_000, batch_size=8192, warmup_steps=12_500, num_workers=8,
    log_every=50, eval_every=10_000, eval_images=8192, save_every=5_000,
)

# Post-training (the paper's section 2.4): a run's weights, a new optimizer; every preset of it needs --init=RUN. From the
# paper: weight decay 0 and no synthetic captions at high resolution, 2B pairs; native areas of 2^7 .. 2^12 patches. The paper
# gives neither learning rate nor schedule, nor the pairs of the native stage: a tenth of L's peak, a short warm-up, the
# same cosine, and 2B pairs again are ours.
TUNE = dict(PAPER, embed_dim=1024, num_blocks=24, num_heads=8, lr=1e-4, warmup_steps=2_500, steps=244_000)
SHARP = dict(TUNE, weight_decay=0.0, data="data/dfn2b:alt:30,data/coyo:alt:9,data/hqitp:alt:28")
# Their toy twins keep dense captions, against the paper: toy alt-texts say nothing of places, and what is measured is the
# dense caption. The peak (half of the toy's; all of it for native, which has more to learn) and the steps are ours.
TOY_TUNE = dict(lr=3e-4, steps=1000, eval_every=100, eval_images=256)

PRESETS = {
    # Real photographs on one machine: a folder packed by data/pack.py, small pictures, half an hour on two cores.
    # python data/pack.py PHOTOS --out=data/photos && python train.py --preset=photos
    "photos": {"data": "data/photos:synthetic:1,data/photos:alt:1", "image_size": 32, "patch_size": 4, "crop_scale": 0.5,
               "flip": True, "embed_dim": 128, "num_blocks": 6, "num_heads": 4, "decoder_dim": 128, "decoder_blocks": 2,
               "decoder_heads": 4, "batch_size": 32, "lr": 1e-3, "warmup_steps": 200, "steps": 8500, "eval_images": 1000},
    # A laptop's CPU, minutes: small colour scenes, made on the first run. python train.py
    "toy": {},
    # Encoder sizes of the paper's Table 1; `base` exists in Apple's code only (its peak lr is not given: L's is used).
    "base": dict(PAPER, embed_dim=768, num_blocks=12, num_heads=6, lr=1e-3),
    # On 64 H100s (8 nodes): torchrun --nnodes=8 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:29500
    #     -- train.py --preset=NAME. Memory a GPU is computed and images/s are projected at an MFU of 40%, both by
    #     `python train.py --preset=NAME --dry_run --world=64`; neither was measured.
    # 569M with its decoder. 66 GiB a GPU, 30,000 images/s, 5 days. On 8 GPUs: --grad_accum=8.
    "large": dict(PAPER, embed_dim=1024, num_blocks=24, num_heads=8, lr=1e-3, parallel="ddp"),
    # 941M. 40 GiB, 18,000 images/s, 8 days. On 8 GPUs: --grad_accum=10.
    "huge": dict(PAPER, embed_dim=1536, num_blocks=24, num_heads=12, lr=8e-4, parallel="fsdp", grad_accum=2),
    # 1.50G. 16 GiB, 11,000 images/s less the recomputation, 13 days. On 8 GPUs: --grad_accum=2.
    "1b": dict(PAPER, embed_dim=2048, num_blocks=24, num_heads=16, lr=8e-4, parallel="fsdp", recompute=True),
    # 2.98G. 22 GiB, 5,500 images/s less the recomputation, 26 days. On 8 GPUs: --grad_accum=3.
    "3b": dict(PAPER, embed_dim=3072, num_blocks=24, num_heads=24, lr=4e-4, parallel="fsdp", recompute=True),
    # torchrun --nproc_per_node=8 -- train.py --preset=large-336 --init=runs/large
    "large-336": dict(SHARP, image_size=336),
    "large-448": dict(SHARP, image_size=448),
    "large-native": dict(TUNE, native_area=(7.0, 12.0), positions="sincos"),
    # python train.py --preset=toy-highres --init=runs/toy: half as large again, as 336 px is to 224
    "toy-highres": dict(TOY_TUNE, image_size=72, weight_decay=0.0,
                        data="data/scenes_highres:synthetic:85,data/scenes_highres:alt:15"),
    # python train.py --preset=toy-native --init=runs/toy: 8 to 64 patches around the toy's 16
    "toy-native": dict(TOY_TUNE, native_area=(3.0, 6.0), lr=6e-4, steps=12_000, eval_every=2000,
                       data="data/scenes_native:synthetic:85,data/scenes_native:alt:15"),
}
POST_TRAINING = ("large-336", "large-448", "large-native", "toy-highres", "toy-native")
# What a run that starts from another's weights (--init) must share with it. Not all of these change a weight's shape:
# another number of heads, or another order of tokens, would load without a word and be wrong.
SHARED = ("patch_size", "max_tokens", "vocab_size", "pixel_mean", "pixel_std", "embed_dim", "num_blocks", "num_heads",
          "decoder_dim", "decoder_blocks", "decoder_heads", "mlp_multiple", "raw_pixels")
