"""Checkpoint: everything that a run needs to go on as if nothing had happened.

Weights, optimizer and step; the data and the prefixes follow from the step (data.py), so nothing else has a state. A
checkpoint is written beside the others under another name, renamed when it is whole, and only then does `latest` point
to it: a kill or a full disk in the middle leaves the previous one. torch's distributed checkpoint writes one file a rank
and can be read by another number of ranks.

A run folder also holds `model.safetensors`, `config.json` and the tokenizer: that is all `load_model` needs.

Lesson: 08.
"""

import dataclasses
import os
import shutil
import warnings
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)

from nano_aimv2.config import MAY_CHANGE, POST_TRAINING, SHARED, Config
from nano_aimv2.model import AIMv2
from nano_aimv2.positions import resize_table
from nano_aimv2.tokenizer import Tokenizer, find_file


def claim_run(config):
    """Make the run folder, or check that it belongs to this configuration. Returns True if the run had begun before.

    Raises: ValueError if the folder holds a run of other settings: they would be mixed, and neither could be repeated.
    """
    folder = Path(config.run)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    if not path.exists():
        config.save(path)
        return False
    old = dataclasses.asdict(Config.load(path))
    new = dataclasses.asdict(config)
    changed = [f"{k}={old[k]} there, {new[k]} asked for" for k in new if new[k] != old[k] and k not in MAY_CHANGE]
    if changed:
        raise ValueError(f"run folder {folder} holds another configuration ({'; '.join(changed)}): choose another --run, or "
                         "delete the folder to start again")
    return True


def save(run, step, model, optimizer, runtime, keep):
    """Write checkpoint `step` of all ranks into `run`/checkpoints and forget all but the newest `keep`.

    Raises: OSError if the disk refuses; earlier checkpoints stay.
    """
    folder = Path(run) / "checkpoints"
    final, temporary = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    if runtime.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    runtime.barrier()
    weights, moments = get_state_dict(model, optimizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process without a process group is fine
            dcp.save({"model": weights, "optimizer": moments, "step": torch.tensor(step)}, checkpoint_id=temporary,
                     no_dist=runtime.world == 1)
    except dcp.api.CheckpointException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"checkpoint {final} could not be written ({error}); the earlier ones are whole: free some space and "
                      "start again") from error
    if runtime.is_main:
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        write_text(folder / "latest", final.name)
        for old in sorted(folder.glob("step-*[0-9]"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    runtime.barrier()


def restore(run, model, optimizer, runtime):
    """Load the latest checkpoint into model and optimizer; returns its step, or 0 if there is none.

    Raises: ValueError if there is none and the run has weights: they would be trained anew and lost.
    """
    folder = Path(run) / "checkpoints"
    if not (folder / "latest").exists():
        if (Path(run) / "model.safetensors").exists():
            raise ValueError(f"run folder {run} holds finished weights, and no checkpoint to go on from: choose another "
                             "--run, or delete the folder to start again")
        return 0
    path = folder / (folder / "latest").read_text().strip()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "step": torch.tensor(0)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=path, no_dist=runtime.world == 1)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return int(state["step"])


def save_model(run, model, runtime):
    """Write `run`/model.safetensors: all weights in float32, gathered from all ranks."""
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if runtime.is_main:
        path = Path(run) / "model.safetensors"
        save_file({k: v.contiguous() for k, v in weights.items()}, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    runtime.barrier()


def load_model(run, device="cpu", kind=AIMv2):
    """Load a trained run: `load_model("runs/toy")` -> (AIMv2 in evaluation mode, Config, Tokenizer).

    kind: the class of the model, `contrastive.CLIP` for a run of that file.

    Raises: ValueError if the folder holds no finished run, or weights of another shape.
    """
    folder = Path(run)
    need_trained(folder, f"train one with `python train.py --run={folder}`")
    config = Config.load(folder / "config.json")
    shipped = folder / "tokenizer.tiktoken"
    tokenizer = Tokenizer(shipped if shipped.exists() else config.tokenizer)
    model = kind(config)
    load_weights(model, folder / "model.safetensors")
    return model.to(device).eval(), config, tokenizer


def need_trained(folder, fix):
    """Raise ValueError, with what to do about it, if a folder holds no finished run."""
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).exists():
            raise ValueError(f"{folder} has no {name}: it is not a trained run; {fix}")


def load_weights(model, path):
    """Read a safetensors file into a model. Raises ValueError that lists missing, surplus and misshapen weights."""
    fit_weights(model, read_weights(path), path)


def read_weights(path):
    """The tensors of a safetensors file by name. Raises ValueError if it is damaged."""
    try:
        return load_file(path)
    except Exception as error:  # safetensors raises its own type for a damaged file
        raise ValueError(f"{path} cannot be read ({error}): it is damaged or no safetensors file") from error


def fit_weights(model, weights, path):
    """Put the tensors of `path` into a model. Raises ValueError that lists missing, surplus and misshapen ones."""
    own = model.state_dict()
    wrong = [f"missing {k}" for k in own.keys() - weights.keys()] + [f"surplus {k}" for k in weights.keys() - own.keys()]
    wrong += [f"{k} is {tuple(weights[k].shape)}, the model needs {tuple(own[k].shape)}"
              for k in own.keys() & weights.keys() if own[k].shape != weights[k].shape]
    if wrong:
        raise ValueError(f"{path} does not fit this model: {'; '.join(sorted(wrong)[:8])}"
                         + (f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""))
    model.load_state_dict(weights)


TABLE = "encoder.positions.table"


def check_init(config):
    """See before anything slow that a run can start from the weights of the run `config.init`.

    Raises: ValueError if a post-training preset has no `init`, if `init` is no finished run, or if it differs in a
        setting that both must share.
    """
    if not config.init:
        if config.preset in POST_TRAINING:
            raise ValueError(f"init={config.init!r}: preset {config.preset!r} starts from the weights of a trained run; name its "
                             f"folder, --init=runs/{config.preset.split('-')[0]}")
        return
    folder = Path(config.init)
    need_trained(folder, "train one, or correct --init")
    parent = Config.load(folder / "config.json")
    for name in SHARED:
        old, new = getattr(parent, name), getattr(config, name)
        if old != new:
            given = ",".join(map(str, old)) if isinstance(old, tuple) else old
            raise ValueError(f"{name}={new} must be as in {folder}, whose weights this run starts from: use --{name}={given}")
    shipped, own = folder / "tokenizer.tiktoken", find_file(config.tokenizer)
    same = own and shipped.read_bytes() == own.read_bytes() if shipped.exists() else parent.tokenizer == config.tokenizer
    if not same:
        raise ValueError(f"tokenizer={config.tokenizer!r} must be the one of {folder}, whose weights this run starts from: use "
                         f"--tokenizer={shipped if shipped.exists() else parent.tokenizer}")
    if config.positions == "learned" != parent.positions:
        raise ValueError(f"positions='learned' needs a position table, and {folder} was trained with "
                         f"positions={parent.positions!r} and has none: use --positions={parent.positions}")


def load_init(model, config):
    """Start from the weights of the run `config.init`, fitted to this run's grid.

    A learned position table is resized to another grid. A run with sin-cos positions drops it: a table of one grid says
    nothing of the others. What that costs stands in the log as step 0, before any training.

    Raises: ValueError if the weights do not fit.
    """
    path = Path(config.init) / "model.safetensors"
    weights, own = read_weights(path), model.state_dict()
    if config.positions == "sincos":
        weights.pop(TABLE, None)
    elif TABLE in weights:
        grids = [(round(len(t) ** 0.5),) * 2 for t in (weights[TABLE], own[TABLE])]
        weights[TABLE] = resize_table(weights[TABLE], *grids)
    fit_weights(model, weights, path)


def write_text(path, text):
    """Replace a small file at once, never half."""
    temporary = Path(f"{path}.tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
