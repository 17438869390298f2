"""Init: start a run from the weights of another run, or of a published encoder.

    python train.py --preset=toy-highres --init=runs/toy                  # encoder and decoder
    python train.py --init=apple/aimv2-large-patch14-224 --data=...       # encoder; a new decoder

What the weights settle (sizes, patch, pixel scale; of a run also the decoder and the tokenizer) is
taken from them; a flag that says otherwise is an error. Grid and positions may change: a learned
position table is resized, and sin-cos positions replace it.

Pipeline: weights -> **settings, model** -> training. Lesson: 14.
"""

from pathlib import Path

from nano_aimv2.config import POST_TRAINING, Config, swiglu_hidden
from nano_aimv2.flags import as_text
from nano_aimv2.hub import find_weights, fit_weights, load_encoder, read_weights
from nano_aimv2.positions import resize_table
from nano_aimv2.training.checkpoint import need_trained, recorded, resumable, tokenizer_content

# What weights settle. Some of these do not change the shape of any weight: another number of heads
# would load, and be wrong.
ENCODER = ("patch_size", "embed_dim", "num_blocks", "num_heads", "mlp_multiple", "pixel_mean",
           "pixel_std")
DECODER = ("max_tokens", "vocab_size", "decoder_dim", "decoder_blocks", "decoder_heads",
           "raw_pixels", "tokenizer")
GRID = ("image_size", "positions", "native_area")  # taken from the weights, and may be chosen
TABLE = "encoder.positions.table"


def adopt_init(given):
    """Complete settings with those that the weights of `init` settle.

    Args: given: {name: value} of the settings that a user chose, as for `Config.from_preset`.
    Returns: the same, and what comes from `given["init"]`, or from the run that the run folder
        holds already. A post-training preset keeps its own grid and positions.
    Raises: ValueError if the weights cannot be read, or if a given setting contradicts them.
    """
    preset = Config.from_preset(given.get("preset", "toy"))
    claimed = Path(given.get("run_dir") or preset.run_dir, "config.json")
    if claimed.exists():
        old = Config.load(claimed)
        return {name: getattr(old, name) for name in (*ENCODER, *DECODER, *GRID)
                if old.init} | given
    if not given.get("init"):
        return given
    settled = settings_of(given["init"], preset, given)
    for name, theirs in settled.items():
        if name in given and given[name] != theirs and name not in GRID:
            raise ValueError(f"{name}={as_text(given[name])} must be as in {given['init']}, whose "
                             f"weights this run starts from: use --{name}={as_text(theirs)}")
    kept = GRID if preset.preset in POST_TRAINING else ()
    wanted = settled | {name: getattr(preset, name) for name in kept} | given
    if wanted["positions"] == "learned" != settled["positions"]:
        raise ValueError("positions='learned' needs a position table, and "
                         f"{given['init']} has none: use --positions={settled['positions']}")
    return wanted


def settings_of(init, preset, given):
    """{name: value} of the settings that the weights `init` settle; `preset`: its Config."""
    folder, theirs = find_weights(init)
    if isinstance(theirs, Config):
        need_trained(folder, "train one, or correct --init")
        settled = {name: getattr(theirs, name) for name in (*ENCODER, *DECODER, *GRID)}
        shipped = folder / "tokenizer.tiktoken"
        settled["tokenizer"] = str(shipped) if shipped.exists() else theirs.tokenizer
        own = given.get("tokenizer") or preset.tokenizer
        if tokenizer_content(own) == tokenizer_content(settled["tokenizer"]):
            settled["tokenizer"] = own  # the same, wherever it lies
        return settled
    settled = {name: getattr(theirs, name) for name in (*ENCODER, *GRID) if name != "mlp_multiple"}
    hidden = theirs.mlp_hidden_dim
    for multiple in (given.get("mlp_multiple") or preset.mlp_multiple, 256, 32, hidden):
        if swiglu_hidden(theirs.embed_dim, multiple) == hidden:
            return settled | {"mlp_multiple": multiple}
    raise ValueError(f"init={init}: its MLP has {hidden} hidden values at a width of "
                     f"{theirs.embed_dim}; an encoder that is trained here has 8/3 of the width, "
                     "rounded up")


def describe_init(config):
    """A line that says which settings of the preset gave way to those of `init`."""
    if not config.init:
        return []
    preset = Config.from_preset(config.preset)
    changed = [f"{name}={as_text(getattr(config, name))} (preset: {as_text(old)})"
               for name in (*ENCODER, *DECODER, *GRID)
               if (old := getattr(preset, name)) != getattr(config, name)]
    return [f"starts from {config.init}" + (": " if changed else "") + ", ".join(changed)]


def load_init(model, config, encoder_only=False):
    """Start from the weights of `config.init`, fitted to this run's grid. An encoder's weights, or
    of a run those of the encoder only, leave the rest of the model as it is.

    A learned position table is resized to another grid. A run with sin-cos positions drops the
    table: a table of one grid says nothing about others. What that costs shows in the log at step
    0, before any training.

    Raises: ValueError if the weights do not fit.
    """
    folder, theirs = find_weights(config.init)
    own = model.state_dict()
    if isinstance(theirs, Config) and not encoder_only:
        weights = read_weights(folder / "model.safetensors")
    else:
        weights = {f"encoder.{name}": tensor for name, tensor
                   in load_encoder(folder).state_dict().items()}
        own = {name: tensor for name, tensor in own.items() if name.startswith("encoder.")}
    if config.positions == "sincos":
        weights.pop(TABLE, None)
    elif TABLE in weights:
        grids = [(round(len(table) ** 0.5),) * 2 for table in (weights[TABLE], own[TABLE])]
        weights[TABLE] = resize_table(weights[TABLE], *grids)
    fit_weights(own, weights, folder)


def open_run(config):
    """Look at the run folder before anything slow.

    Returns: (config, see `recorded`; whether the run is new, so that `init` counts).
    Raises: ValueError if a post-training preset has nothing to start from.
    """
    config = recorded(config)
    if config.preset in POST_TRAINING and not config.init:
        raise ValueError(f"init={config.init!r}: preset {config.preset!r} starts from the weights "
                         f"of a trained run; name its folder, --init=runs/"
                         f"{config.preset.split('-')[0]}")
    return config, not resumable(Path(config.run_dir) / "checkpoints")
