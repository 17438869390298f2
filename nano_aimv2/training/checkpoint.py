"""Checkpoint: everything that a run needs to resume as if nothing had happened.

Weights, optimizer and step. Data and prefixes follow from the step (batches.py), so nothing else
has a state. A checkpoint is written beside the others under a temporary name, renamed when it is
whole, and only then does `latest` point to it: a kill or a full disk in the middle leaves the
previous one. torch's distributed checkpoint writes one file per rank and can be read by another
number of ranks.

A run folder also holds `model.safetensors`, `config.json` and the tokenizer: `load_model` needs no
more.

Lesson: 08.
"""

import dataclasses
import os
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sharded

from nano_aimv2.config import POST_TRAINING, Config
from nano_aimv2.data.tokenizer import Tokenizer, find_file
from nano_aimv2.files import remove, write_text
from nano_aimv2.hub import fit_weights, read_weights, write_weights
from nano_aimv2.model import AIMv2
from nano_aimv2.positions import resize_table

# A run may be resumed with other values of these; all other settings change its numbers.
MAY_CHANGE = ("run_dir", "device", "num_workers", "parallel", "compile", "recompute", "log_every",
              "save_every", "keep", "grad_accum")
# What a run that starts from another run's weights (--init) must share with it. Some of these do
# not change the shape of any weight: another number of heads would load, and be wrong.
SHARED = ("patch_size", "max_tokens", "vocab_size", "pixel_mean", "pixel_std", "embed_dim",
          "num_blocks", "num_heads", "decoder_dim", "decoder_blocks", "decoder_heads",
          "mlp_multiple", "raw_pixels")
TABLE = "encoder.positions.table"


def claim_run(config):
    """Make the run folder, or check that it is this config's.

    Raises: ValueError if the folder holds a run with other settings: mixing would spoil both.
    """
    folder = Path(config.run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if not path.exists():
        config.save(path)
        return
    old = dataclasses.asdict(Config.load(path))
    new = dataclasses.asdict(config)
    changed = [f"{k}={old[k]} there, {new[k]} asked for" for k in new
               if new[k] != old[k] and k not in MAY_CHANGE]
    if changed:
        raise ValueError(f"run folder {folder} holds another configuration ({'; '.join(changed)}): "
                         "choose another --run_dir, or delete the folder to start again")


def begin_run(config, tokenizer, runtime):
    """Rank 0 claims the run folder and copies the tokenizer into it; the others wait."""
    if runtime.is_main:
        claim_run(config)
        tokenizer.save(config.run_dir)
    runtime.barrier()


def save(run_dir, step, model, optimizer, runtime, keep):
    """Write checkpoint `step` of all ranks; delete all but the newest `keep`.

    Raises: OSError if the disk refuses; earlier checkpoints stay.
    """
    folder = Path(run_dir) / "checkpoints"
    final, temporary = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    if runtime.is_main:
        remove(temporary)
        temporary.mkdir(parents=True)
    runtime.barrier()
    weights, moments = sharded.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": torch.tensor(step)}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process without a process group is fine
            dcp.save(state, checkpoint_id=temporary, no_dist=runtime.world == 1)
    except dcp.api.CheckpointException as error:
        remove(temporary)
        reason, _ = next(iter(error.failures.values()))  # of the first rank that failed
        raise OSError(f"checkpoint {final} could not be written ({reason}); the earlier ones are "
                      "whole: free some space and start again") from error
    if runtime.is_main:
        remove(final)
        os.replace(temporary, final)
        write_text(folder / "latest", final.name)
        for old in sorted(folder.glob("step-*[0-9]"))[:-keep]:
            remove(old)
    runtime.barrier()


def restore(run_dir, model, optimizer, runtime):
    """Load the latest checkpoint into model and optimizer; returns its step, or 0 if there is none.

    Raises: ValueError if there is none and the run has weights: training anew would overwrite them.
    """
    folder = Path(run_dir) / "checkpoints"
    if not (folder / "latest").exists():
        if (Path(run_dir) / "model.safetensors").exists():
            raise ValueError(f"run folder {run_dir} holds finished weights, and no checkpoint to "
                             "resume from: choose another --run_dir, or delete the folder to start "
                             "again")
        return 0
    path = folder / (folder / "latest").read_text().strip()
    weights, moments = sharded.get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": torch.tensor(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=runtime.world == 1)
    sharded.set_state_dict(model, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
    return int(state["step"])


def save_model(run_dir, model, runtime):
    """Write `run_dir`/model.safetensors: all weights in float32, gathered from all ranks."""
    options = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = sharded.get_model_state_dict(model, options=options)
    if runtime.is_main:
        weights = {name: tensor.contiguous() for name, tensor in weights.items()}
        write_weights(Path(run_dir) / "model.safetensors", weights)
    runtime.barrier()


def load_model(run_dir, device="cpu", kind=AIMv2):
    """Load a trained run: `load_model("runs/toy")` -> (AIMv2, Config, Tokenizer).

    The model is in evaluation mode.

    Args: kind: the class of the model; `contrastive.CLIP` for a run of that file.
    Raises: ValueError if the folder does not hold a finished run, or weights of another shape.
    """
    folder = Path(run_dir)
    need_trained(folder, f"train one with `python train.py --run_dir={folder}`")
    config = Config.load(folder / "config.json")
    shipped = folder / "tokenizer.tiktoken"
    tokenizer = Tokenizer(shipped if shipped.exists() else config.tokenizer)
    model = kind(config)
    fit_weights(model.state_dict(), read_weights(folder / "model.safetensors"), folder)
    return model.to(device).eval(), config, tokenizer


def need_trained(folder, fix):
    """Raise ValueError, with the fix, if a folder does not hold a finished run."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} has no {name}: it is not a trained run; {fix}")


def check_init(config):
    """Check before anything slow that a run can start from the weights of the run `config.init`.

    Raises: ValueError if a post-training preset has no `init`, if `init` is not a finished run, or
        if it differs in a setting that both must share.
    """
    if not config.init:
        if config.preset in POST_TRAINING:
            raise ValueError(f"init={config.init!r}: preset {config.preset!r} starts from the "
                             "weights of a trained run; name its folder, "
                             f"--init=runs/{config.preset.split('-')[0]}")
        return
    folder = Path(config.init)
    need_trained(folder, "train one, or correct --init")
    parent = Config.load(folder / "config.json")
    for name in SHARED:
        old, new = getattr(parent, name), getattr(config, name)
        if old != new:
            given = ",".join(map(str, old)) if isinstance(old, tuple) else old
            raise ValueError(f"{name}={new} must be as in {folder}, whose weights this run starts "
                             f"from: use --{name}={given}")
    check_same_tokenizer(config, parent, folder)
    if config.positions == "learned" != parent.positions:
        raise ValueError(f"positions='learned' needs a position table, and {folder} was trained "
                         f"with positions={parent.positions!r} and has none: use "
                         f"--positions={parent.positions}")


def check_same_tokenizer(config, parent, folder):
    """Raise ValueError unless both runs have one tokenizer; files are compared byte by byte."""
    shipped, own = folder / "tokenizer.tiktoken", find_file(config.tokenizer)
    theirs = shipped if shipped.exists() else parent.tokenizer
    if shipped.exists():
        same = own and shipped.read_bytes() == own.read_bytes()
    else:
        same = theirs == config.tokenizer
    if not same:
        raise ValueError(f"tokenizer={config.tokenizer!r} must be the one of {folder}, whose "
                         "weights this run starts from: use "
                         f"--tokenizer={shipped if shipped.exists() else parent.tokenizer}")


def load_init(model, config):
    """Start from the weights of the run `config.init`, fitted to this run's grid.

    A learned position table is resized to another grid. A run with sin-cos positions drops the
    table: a table of one grid says nothing about others. What that costs shows in the log at step
    0, before any training.

    Raises: ValueError if the weights do not fit.
    """
    path = Path(config.init) / "model.safetensors"
    weights, own = read_weights(path), model.state_dict()
    if config.positions == "sincos":
        weights.pop(TABLE, None)
    elif TABLE in weights:
        grids = [(round(len(table) ** 0.5),) * 2 for table in (weights[TABLE], own[TABLE])]
        weights[TABLE] = resize_table(weights[TABLE], *grids)
    fit_weights(own, weights, path)
