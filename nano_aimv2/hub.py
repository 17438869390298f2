"""Hub: encoder weights in and out, under Apple's names and under transformers' names.

The architecture is the same everywhere; only names and layouts differ. transformers keeps q, k and
v apart (here they are one matrix of three stacked parts). Its patch embedding is a convolution,
whose kernel lies (channel, row, column) where our patches lie (row, column, channel). The learned
position table has a leading 1 in Apple's files. `views` says all of that once: it shows the
encoder's own weights under the other names and in the other shapes, as views of the same memory.
Loading copies a file into the views, saving writes them out.

Pipeline: folder or repository -> **Encoder** -> your features. Names: apple/ml-aim and
transformers' `aimv2`.
"""

import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nano_aimv2.config import Config
from nano_aimv2.encoder import Encoder
from nano_aimv2.files import is_lfs_pointer, replacing, write_text

# OpenAI-CLIP's, which all released weights use
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
NATIVE_AREA = (7, 12)  # the native checkpoint was trained on 2^7 .. 2^12 patches (section 2.4)
PREPROCESSORS = "preprocessor_config.json", "processor_config.json"  # transformers 5: the second
FILES = ["config.json", *PREPROCESSORS, "*.safetensors", "*.safetensors.index.json"]
MODEL_TYPES = ("aimv2", "aimv2_vision_model")
# Settings that this encoder fixes, under the names that the other implementations use.
FIXED = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "num_channels": 3, "qkv_bias": False,
         "mlp_bias": False, "use_bias": False, "attention_bias": False, "qk_norm": False}
SIZES = {"hidden_size": "embed_dim", "intermediate_size": "mlp_hidden_dim",
         "num_hidden_layers": "num_blocks", "num_attention_heads": "num_heads",
         "patch_size": "patch_size"}
# A config of image and text towers leaves out what equals transformers' defaults, AIMv2-L's.
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24,
         "num_attention_heads": 8, "patch_size": 14}
# Weights in published files that are not part of the encoder: attention pool and text tower of the
# zero-shot (LiT) models.
NOT_OURS = re.compile(
    r"(vision_model\.)?head\.(cls_token|k_proj\.weight|v_proj\.weight|output_proj\.(weight|bias))"
    r"|text_model\..*|visual_projection\.weight|text_projection\.weight|logit_scale")

# From our names to theirs, one substitution after the other
APPLE = ((r"^(proj|norm)\.", r"preprocessor.patchifier.\1."),
         (r"^positions\.table", "preprocessor.pos_embed"))
TRANSFORMERS = (
    (r"^proj\.", "embeddings.patch_embed."), (r"^norm\.", "embeddings.rms_norm."),
    (r"^positions\.table", "embeddings.position_embedding.weight"),
    (r"^trunk\.post_trunk_norm", "rms_norm"), (r"^trunk\.blocks", "encoder.layers"),
    (r"norm_([12])", r"rms_norm\1"), (r"attn\.proj", "attention.out_proj"),
    (r"mlp\.fc1", "ffn.gate_proj"), (r"mlp\.fc2", "ffn.down_proj"), (r"mlp\.fc3", "ffn.up_proj"))


@dataclass(frozen=True)
class EncoderConfig:
    """What `load_encoder` knows of a published encoder: the fields of Config that it needs."""

    image_size: int  # pixels, height and width of the fixed view
    patch_size: int
    embed_dim: int
    num_blocks: int
    num_heads: int
    mlp_hidden_dim: int
    positions: str  # sincos or learned
    native_area: tuple = ()  # not empty: made for any size and aspect ratio
    pixel_mean: tuple = CLIP_MEAN
    pixel_std: tuple = CLIP_STD
    recompute: bool = False  # only training recomputes blocks

    @property
    def patch_dim(self):
        return self.patch_size**2 * 3


def load_encoder(path_or_repo):
    """An encoder from a run folder, a folder of published weights, or a repository id.

    Args: path_or_repo: a folder of a run, of Apple's files or of transformers', with config.json
        and model.safetensors (or its shards and their index); or an id such as
        "apple/aimv2-large-patch14-224" (needs the package huggingface_hub and a network).
    Returns: Encoder in evaluation mode, float32, on the CPU. `.config` has image_size, patch_size,
        pixel_mean, pixel_std, positions and native_area (empty for a fixed size).
    Raises: ValueError that lists missing, surplus and misshapen weights, or settings of another
        architecture.

        encoder = load_encoder("runs/toy")
        patches = patchify(images, encoder.config.patch_size)  # u8[B, 3, H, W] -> u8[B, n, P]
        features = encoder(patches, grid)  # grid i64[B, 2] -> f[B, n, D]
    """
    folder, config = find_weights(path_or_repo)
    is_run = isinstance(config, Config)
    with torch.device("meta"):
        encoder = Encoder(config)  # no memory and no random numbers for what the file replaces
    encoder.to_empty(device="cpu").set_pixel_scale()
    weights = {name: tensor for path in weight_files(folder)
               for name, tensor in read_weights(path).items()}
    is_apple = any(name.startswith("preprocessor.patchifier.") for name in weights)
    names = "encoder." if is_run else APPLE if is_apple else TRANSFORMERS
    dropped = re.compile(r"(?!encoder\.).*") if is_run else NOT_OURS
    weights = {name.removeprefix("vision_model."): tensor for name, tensor in weights.items()
               if not dropped.fullmatch(name)}
    fit_weights(views(encoder, names), weights, folder)
    return encoder.eval()


def find_weights(path_or_repo):
    """(folder, config) of the weights that `load_encoder` reads: Config of a run, EncoderConfig of
    published weights. A repository is fetched. Raises ValueError as `load_encoder` does."""
    folder = Path(path_or_repo)
    folder = folder if folder.is_dir() else fetch(str(path_or_repo))
    settings = read_json(folder / "config.json")
    if "preset" in settings:
        return folder, Config.load(folder / "config.json")
    return folder, published_config(settings, folder)


def save_encoder(encoder, folder):
    """Write an encoder as transformers reads it.

    Args: encoder: of `load_encoder`, or `load_model(run_dir)[0].encoder`; folder: new or empty.

    The folder then holds config.json, model.safetensors and preprocessor_config.json:
    `transformers.Aimv2VisionModel.from_pretrained(folder)` and `AutoImageProcessor.from_pretrained(
    folder)` load it. A fixed size is written as shortest edge and centre crop; native weights as
    the image's own size, as Apple ships them.
    Raises: ValueError if the folder holds something; OSError if the disk refuses.
    """
    folder, c = Path(folder), encoder.config
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: choose another folder, or delete it "
                         "first")
    settings = FIXED | {theirs: getattr(c, ours) for theirs, ours in SIZES.items()} | {
        "architectures": ["Aimv2VisionModel"], "model_type": "aimv2_vision_model",
        "dtype": "float32", "attention_dropout": 0.0, "image_size": c.image_size,
        "is_native": c.positions == "sincos", "use_head": False}
    fixed, side = not c.native_area, c.image_size
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": fixed,
        "do_center_crop": fixed, "size": {"shortest_edge": side}, "resample": 3,
        "crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(c.pixel_mean), "image_std": list(c.pixel_std)}
    weights = {name: view.cpu().float().contiguous()
               for name, view in views(encoder, TRANSFORMERS).items()}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with replacing(folder) as temporary:
        temporary.mkdir()
        write_weights(temporary / "model.safetensors", weights, {"format": "pt"})
        write_text(temporary / "config.json", json.dumps(settings, indent=2))
        write_text(temporary / "preprocessor_config.json", json.dumps(preprocessor, indent=2))


def views(encoder, names):
    """The encoder's weights as {name in the file: view of the weight in the file's shape}.

    Args: names: APPLE, TRANSFORMERS, or a prefix before our own names.
    """
    p = encoder.config.patch_size
    found = {}
    for name, weight in encoder.named_parameters():
        weight = weight.detach()
        if isinstance(names, str):
            found[names + name] = weight
            continue
        if name == "proj.weight":  # [D, (row, column, channel)] -> [D, channel, row, column]
            weight = weight.unflatten(1, (p, p, 3)).permute(0, 3, 1, 2)
        if name == "positions.table" and names is APPLE:
            weight = weight[None]
        theirs = name
        for ours, replacement in names:
            theirs = re.sub(ours, replacement, theirs)
        if names is TRANSFORMERS and "attn.qkv" in name:
            for part, third in zip("qkv", weight.chunk(3), strict=True):
                found[theirs.replace("attn.qkv", f"attention.{part}_proj")] = third
        else:
            found[theirs] = weight
    return found


def weight_files(folder):
    """The paths of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    if index.exists():
        names = set(read_json(index).get("weight_map", {}).values())
        return [folder / name for name in sorted(names)]
    raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json: "
                     "give a folder of safetensors weights, or a finished run")


def read_weights(path):
    """The tensors of a safetensors file by name. Raises ValueError if it is missing or damaged."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type for a damaged file
        if Path(path).is_file() and is_lfs_pointer(path):
            raise ValueError(f"{path} is a Git LFS pointer, not the weights: run `git lfs pull` in "
                             "its folder") from error
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or not a safetensors "
                         "file; copy or download it again") from error


def write_weights(path, weights, metadata=None):
    """Write {name: contiguous tensor} as a safetensors file, whole or not at all.

    Raises: OSError if the disk refuses.
    """
    with replacing(path) as temporary:
        try:
            save_file(weights, temporary, metadata)
        except SafetensorError as error:
            raise OSError(f"{path} could not be written ({error}): free some space and start "
                          "again") from error


def fit_weights(own, weights, where):
    """Copy weights into a model, in the model's own precision; nothing unless everything fits.

    Args:
        own: {name: tensor of the model, or a view of one}; weights: {name: tensor}.
        where: the file or folder that they come from, for the message.
    Raises: ValueError that lists missing, surplus and misshapen weights.
    """
    if any(".stats_head." in name for name in weights):
        raise ValueError(f"the weights in {where} are of a run made before the patch sampler "
                         "replaced the statistics head: train it again, or keep its encoder "
                         "alone, save_encoder(load_encoder(RUN), FOLDER) and --init=FOLDER")
    wrong = [f"missing {name}" for name in own.keys() - weights.keys()]
    wrong += [f"surplus {name}" for name in weights.keys() - own.keys()]
    for name in own.keys() & weights.keys():
        theirs, ours = tuple(weights[name].shape), tuple(own[name].shape)
        if theirs != ours:
            wrong.append(f"{name} is {theirs}, its config.json wants {ours}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"the weights in {where} do not fit the model of its config.json: "
                         f"{'; '.join(sorted(wrong)[:8])}{more}. All weights must be there and no "
                         "others: take the config.json that belongs to them, without added heads")
    for name, tensor in own.items():
        tensor.copy_(weights[name])


def published_config(settings, folder):
    """EncoderConfig of a published config.json and preprocessor_config.json.

    Raises: ValueError that lists every setting of another architecture.
    """
    path, has_towers = folder / "config.json", "vision_config" in settings  # image and text
    if settings.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{folder} holds model_type={settings.get('model_type')!r}; only AIMv2 "
                         f"encoders are read ({', '.join(MODEL_TYPES)})")
    vision = {**LARGE, **settings["vision_config"]} if has_towers else settings
    wrong = [f"{name}={vision[name]!r} (must be {value!r})" for name, value in FIXED.items()
             if vision.get(name, value) != value]
    wrong += [f"{name}={vision.get(name)!r} (must be a whole number above 0)" for name in SIZES
              if not isinstance(vision.get(name), int) or vision[name] < 1]
    if wrong:
        raise ValueError(f"{path} is another architecture than AIMv2's encoder: {'; '.join(wrong)}")
    # Apple's own config.json has no is_native: its native model has no image_size.
    native = vision.get("is_native", not has_towers and "image_size" not in vision)
    preprocessor = read_preprocessor(folder)
    any_size = native and not preprocessor.get("do_center_crop", False)
    config = EncoderConfig(
        **{ours: vision[theirs] for theirs, ours in SIZES.items()},
        image_size=vision.get("image_size", 224), positions="sincos" if native else "learned",
        native_area=NATIVE_AREA if any_size else (),
        pixel_mean=tuple(preprocessor.get("image_mean", CLIP_MEAN)),
        pixel_std=tuple(preprocessor.get("image_std", CLIP_STD)))
    size, p, D, heads = config.image_size, config.patch_size, config.embed_dim, config.num_heads
    if not isinstance(size, int) or size < p or (size % p and not any_size):
        raise ValueError(f"{path}: image_size={size!r} must be a multiple of patch_size={p}")
    if D % heads or (native and D % 4):
        also = " and of 4, for sin-cos positions" if native else ""
        raise ValueError(f"{path}: hidden_size={D} must be a multiple of "
                         f"num_attention_heads={heads}{also}")
    return config


def read_preprocessor(folder):
    """The settings of the image preprocessor, {} if the folder has none. Warns if they do not say
    the pixel mean and deviation."""
    settings = {}
    for name in reversed(PREPROCESSORS):
        if (folder / name).exists():
            found = read_json(folder / name)
            settings |= found.get("image_processor", found)
    if not {"image_mean", "image_std"} <= settings.keys():
        warnings.warn(f"{folder}: neither {' nor '.join(PREPROCESSORS)} says the pixel mean and "
                      f"deviation: CLIP's are assumed ({CLIP_MEAN}, {CLIP_STD}), as in Apple's "
                      "weights", stacklevel=2)
    return settings


def fetch(repo):
    """Download a repository's weights and settings (or find them in the cache) -> their folder."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise ValueError(f"{repo} is neither a folder nor a repository id: give a folder with "
                         "config.json and model.safetensors, or an id such as "
                         "apple/aimv2-large-patch14-224")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{repo} is not a folder here; to fetch it from Hugging Face, "
                         "pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(repo, allow_patterns=FILES))
    except Exception as error:  # no network, no such repository, no permission: each its own type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ValueError(f"{repo} is not a folder here and cannot be fetched "
                         f"({type(error).__name__}: {reason}): download it where there is a "
                         "network, and give the folder") from error


def read_json(path):
    """The object in a JSON file. Raises ValueError if it is missing or holds something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: give a folder of AIMv2 weights, or a "
                         "finished run") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one JSON object, not {type(values).__name__}: fetch it "
                         "again")
    return values
