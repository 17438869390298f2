"""Hub: encoder weights in and out, under Apple's names and under transformers' names.

The architecture is the same everywhere; only names and layouts differ. Three things to know: transformers keeps q, k and v
apart (here one matrix of three stacked parts); its patch embedding is a convolution, whose kernel lies (channel, row,
column) where our patches lie (row, column, channel); the fixed position table has a leading 1 in Apple's files. `views`
says all of that once: it shows the encoder's own weights under the other names and in the other shapes, as views of the
same memory. Loading copies a file into the views, saving writes them out.

Way: folder or repository -> **Encoder** -> your features. Names: apple/ml-aim and transformers' `aimv2`.
"""

import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from nano_aimv2.config import Config
from nano_aimv2.encoder import Encoder

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # all released weights use them
NATIVE_AREA = (7, 12)  # areas that the native checkpoint was trained on, 2^7 .. 2^12 patches (paper section 2.4)
FILES = ("config.json", "preprocessor_config.json", "model*.safetensors", "model.safetensors.index.json")
MODEL_TYPES = ("aimv2", "aimv2_vision_model")
# Settings that this encoder fixes, as both of the other codes call them.
FIXED = {"hidden_act": "silu", "rms_norm_eps": 1e-5, "num_channels": 3, "qkv_bias": False, "mlp_bias": False, "use_bias": False,
         "attention_bias": False, "qk_norm": False}
SIZES = {"hidden_size": "embed_dim", "intermediate_size": "mlp_hidden_dim", "num_hidden_layers": "num_blocks",
         "num_attention_heads": "num_heads", "patch_size": "patch_size"}
# A config of image and text towers leaves out what equals transformers' defaults, which are AIMv2-L.
LARGE = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24, "num_attention_heads": 8, "patch_size": 14}
# Parts of published files that are no part of the encoder: attention pool and text tower of the zero-shot (LiT) models.
NOT_OURS = re.compile(r"(vision_model\.)?head\.(cls_token|k_proj\.weight|v_proj\.weight|output_proj\.(weight|bias))"
                      r"|text_model\..*|visual_projection\.weight|text_projection\.weight|logit_scale")

APPLE = {"proj.weight": "preprocessor.patchifier.proj.weight", "proj.bias": "preprocessor.patchifier.proj.bias",
         "norm.weight": "preprocessor.patchifier.norm.weight", "positions.table": "preprocessor.pos_embed"}
TRANSFORMERS = {"proj.weight": "embeddings.patch_embed.weight", "proj.bias": "embeddings.patch_embed.bias",
                "norm.weight": "embeddings.rms_norm.weight", "positions.table": "embeddings.position_embedding.weight",
                "trunk.post_trunk_norm.weight": "rms_norm.weight"}
TRANSFORMERS_BLOCK = {"norm_1": "rms_norm1", "attn.proj": "attention.out_proj", "norm_2": "rms_norm2",
                      "mlp.fc1": "ffn.gate_proj", "mlp.fc2": "ffn.down_proj", "mlp.fc3": "ffn.up_proj"}


@dataclass(frozen=True)
class EncoderConfig:
    """What `load_encoder` knows of a published encoder: the fields of Config that an encoder and its pixels need."""

    image_size: int  # pixels, height and width of the fixed view
    patch_size: int
    embed_dim: int
    num_blocks: int
    num_heads: int
    mlp_hidden_dim: int
    positions: str  # sincos or learned
    native_area: tuple = ()  # not empty: made for any size and proportions
    pixel_mean: tuple = CLIP_MEAN
    pixel_std: tuple = CLIP_STD
    recompute: bool = False  # blocks in the backward pass; only training asks for it

    @property
    def patch_dim(self):
        return self.patch_size**2 * 3


def load_encoder(path_or_repo):
    """An encoder from a folder of Apple's or transformers' files, from a run folder of ours, or from a repository id.

    Args: path_or_repo: a folder with config.json and model.safetensors (or its shards and their index), or an id such as
        "apple/aimv2-large-patch14-224" (needs the package huggingface_hub and a network).
    Returns: Encoder in evaluation mode, float32, on the CPU. `.config` tells image_size, patch_size, pixel_mean, pixel_std,
        positions and native_area (empty for a fixed size). `encoder(patches, grid)` wants `pixels_to_float` patches.
    Raises: ValueError that lists missing, surplus and misshapen weights, or settings of another architecture.

        encoder = load_encoder("runs/toy")
        patches = patchify(images, encoder.config.patch_size)
        patches = pixels_to_float(patches, encoder.config.pixel_mean, encoder.config.pixel_std)
        features = encoder(patches, grid)  # u8[B, 3, H, W], i64[B, 2] -> f[B, n, D]
    """
    folder = Path(path_or_repo)
    if not folder.is_dir():
        folder = fetch(str(path_or_repo))
    settings = read_json(folder / "config.json")
    is_run = "preset" in settings
    config = Config.load(folder / "config.json") if is_run else published_config(settings, folder)
    with torch.device("meta"):
        encoder = Encoder(config)  # no memory and no random numbers for what the file replaces
    encoder.to_empty(device="cpu")
    files = weight_files(folder)
    own = views(encoder, "encoder." if is_run else naming(files))
    copy_weights(files, own, re.compile(r"decoder\..*") if is_run else NOT_OURS, folder)
    return encoder.eval()


def save_encoder(encoder, folder):
    """Write an encoder as transformers reads it: config.json, model.safetensors, preprocessor_config.json.

    Args: encoder: of `load_encoder`, or `load_model(run)[0].encoder`; folder: must not exist, or be empty. It is written
        under another name and renamed when it is whole.
    `transformers.Aimv2VisionModel.from_pretrained(folder)` and `AutoImageProcessor.from_pretrained(folder)` load it. A fixed
    size is written as shortest edge and centre crop; native weights as the picture's own size, as Apple ships them.
    Raises: ValueError if the folder holds something; OSError if the disk refuses.
    """
    folder, config = Path(folder), encoder.config
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is not empty: choose another folder, or delete it first")
    settings = {theirs: getattr(config, ours) for theirs, ours in SIZES.items()} | {
        "architectures": ["Aimv2VisionModel"], "model_type": "aimv2_vision_model", "dtype": "float32", "attention_dropout": 0.0,
        "image_size": config.image_size, "is_native": config.positions == "sincos", "use_head": False, "hidden_act": "silu",
        "rms_norm_eps": 1e-5, "num_channels": 3, "qkv_bias": False, "mlp_bias": False}
    fixed = not config.native_area
    preprocessor = {
        "image_processor_type": "CLIPImageProcessor", "do_convert_rgb": True, "do_resize": fixed, "do_center_crop": fixed,
        "size": {"shortest_edge": config.image_size}, "crop_size": {"height": config.image_size, "width": config.image_size},
        "resample": 3, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
        "image_mean": list(config.pixel_mean), "image_std": list(config.pixel_std)}
    temporary = folder.with_name(f"{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        weights = {name: view.cpu().float().contiguous() for name, view in views(encoder, TRANSFORMERS).items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        for name, values in (("config.json", settings), ("preprocessor_config.json", preprocessor)):
            (temporary / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


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
        if name == "proj.weight":  # [D, P] with P = (row, column, channel) -> [D, channel, row, column]
            weight = weight.unflatten(1, (p, p, 3)).permute(0, 3, 1, 2)
        block = re.fullmatch(r"trunk\.blocks\.(\d+)\.(.+)\.weight", name)
        if names is APPLE:
            found[names.get(name, name)] = weight[None] if name == "positions.table" else weight
        elif block and block[2] == "attn.qkv":
            for part, third in zip("qkv", weight.chunk(3), strict=True):
                found[f"encoder.layers.{block[1]}.attention.{part}_proj.weight"] = third
        elif block:
            found[f"encoder.layers.{block[1]}.{TRANSFORMERS_BLOCK[block[2]]}.weight"] = weight
        else:
            found[names[name]] = weight
    return found


def naming(files):
    """APPLE or TRANSFORMERS, from the names in the files."""
    return APPLE if any(name.startswith("preprocessor.patchifier.") for name in files) else TRANSFORMERS


def copy_weights(files, own, dropped, folder):
    """Fill the views `own` from the files. Nothing is copied unless everything fits."""
    plain = {name.removeprefix("vision_model."): (name, path) for name, path in files.items() if not dropped.fullmatch(name)}
    wrong = [f"missing {name}" for name in own.keys() - plain.keys()]
    wrong += [f"surplus {name}" for name in plain.keys() - own.keys()]
    readers = {path: safe_open(path, framework="pt") for path in set(files.values())}
    for name in own.keys() & plain.keys():
        theirs, path = plain[name]
        shape = tuple(readers[path].get_slice(theirs).get_shape())
        if shape != tuple(own[name].shape):
            wrong.append(f"{name} is {shape}, its config.json wants {tuple(own[name].shape)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"the weights in {folder} do not fit an AIMv2 encoder of its config.json: {'; '.join(sorted(wrong)[:8])}"
                         f"{more}. All weights must be there and no others: take the config.json that belongs to them, and the "
                         "encoder without added heads")
    for name, view in own.items():
        theirs, path = plain[name]
        view.copy_(readers[path].get_tensor(theirs))  # half precision becomes float32


def weight_files(folder):
    """{name of a weight: file that holds it}: of model.safetensors, or of the shards that its index names."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        paths = [folder / "model.safetensors"]
    elif index.exists():
        paths = [folder / name for name in sorted(set(read_json(index).get("weight_map", {}).values()))]
    else:
        raise ValueError(f"{folder} has neither model.safetensors nor model.safetensors.index.json: give a folder of safetensors "
                         "weights, or a finished run")
    found = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                found.update(dict.fromkeys(file.keys(), path))
        except Exception as error:  # safetensors raises its own type for a damaged file
            raise ValueError(f"{path} cannot be read ({error}): fetch it again") from error
    return found


def published_config(settings, folder):
    """EncoderConfig of a published config.json and preprocessor_config.json.

    Raises: ValueError that lists every setting of another architecture.
    """
    towers = "vision_config" in settings  # image and text together
    if settings.get("model_type") not in MODEL_TYPES:
        raise ValueError(f"{folder} holds model_type={settings.get('model_type')!r}; only AIMv2 encoders are read "
                         f"({', '.join(MODEL_TYPES)})")
    vision = {**LARGE, **settings["vision_config"]} if towers else settings
    wrong = [f"{name}={vision[name]!r} (must be {value!r})" for name, value in FIXED.items() if vision.get(name, value) != value]
    wrong += [f"{name}={vision.get(name)!r} (must be a whole number above 0)" for name in SIZES
              if not isinstance(vision.get(name), int) or vision[name] < 1]
    if wrong:
        raise ValueError(f"{folder / 'config.json'} is another architecture than AIMv2's encoder: {'; '.join(wrong)}")
    # Apple's own config.json has no is_native: its native model has no image_size.
    native = vision.get("is_native", not towers and "image_size" not in vision)
    path = folder / "preprocessor_config.json"
    preprocessor = read_json(path) if path.exists() else {}
    any_size = native and not preprocessor.get("do_center_crop", False)
    config = EncoderConfig(
        **{ours: vision[theirs] for theirs, ours in SIZES.items()}, image_size=vision.get("image_size", 224),
        positions="sincos" if native else "learned", native_area=NATIVE_AREA if any_size else (),
        pixel_mean=tuple(preprocessor.get("image_mean", CLIP_MEAN)), pixel_std=tuple(preprocessor.get("image_std", CLIP_STD)))
    size, p, D, heads = config.image_size, config.patch_size, config.embed_dim, config.num_heads
    if not isinstance(size, int) or size < p or (size % p and not any_size):
        raise ValueError(f"{folder / 'config.json'}: image_size={size!r} must be a multiple of patch_size={p}")
    if D % heads or (native and D % 4):
        raise ValueError(f"{folder / 'config.json'}: hidden_size={D} must be a multiple of num_attention_heads={heads}"
                         + (" and of 4, for sin-cos positions" if native else ""))
    return config


def fetch(repo):
    """Download a repository's weights and settings (or find them in the cache) -> their folder."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise ValueError(f"{repo} is no folder and no repository id: give a folder with config.json and model.safetensors, or an "
                         "id such as apple/aimv2-large-patch14-224")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ValueError(f"{repo} is no folder here; to fetch it from Hugging Face, pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(repo, allow_patterns=list(FILES)))
    except Exception as error:  # no network, no such repository, no permission: each its own type
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        raise ValueError(f"{repo} is no folder here and cannot be fetched ({type(error).__name__}: {reason}): download it where "
                         "there is a network, and give the folder") from error


def read_json(path):
    """The object in a JSON file. Raises ValueError if it is missing or holds none."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path.parent} has no {path.name}: give a folder of AIMv2 weights, or a finished run") from None
    except ValueError as error:
        raise ValueError(f"{path} is no JSON ({error}): fetch it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold one JSON object, not {type(values).__name__}: fetch it again")
    return values
