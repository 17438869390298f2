"""Checkpoint: everything that a run needs to resume as if nothing had happened.

Weights, optimizer, gradient scaler and step. Data and prefixes follow from the step (batches.py),
so nothing else has a state. A checkpoint is written beside the others under a temporary name,
renamed when it is whole, and only then does `latest` point to it: a kill or a full disk in the
middle leaves the previous one. torch's distributed checkpoint writes one file per rank and can be
read by another number of ranks; a checksum of each file is compared before anything is unpickled.

A run folder also holds `model.safetensors`, `config.json` and the tokenizer, `load_model` needs no
more, and `contents.json`: what the run learns from. Data and tokenizer may move; their content must
stay.

Lesson: 10.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
import warnings
from pathlib import Path
from uuid import uuid4

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sharded

from nano_aimv2.config import Config
from nano_aimv2.data.tokenizer import Tokenizer, find_file
from nano_aimv2.files import remove, write_text
from nano_aimv2.hub import fit_weights, read_weights, write_weights
from nano_aimv2.model import AIMv2
from nano_aimv2.training.metrics import say

# A run may be resumed with other values of these; all other settings change its numbers. What
# paths point to is compared by content.
MAY_CHANGE = ("run_dir", "init", "data", "val_data", "tokenizer", "device", "num_workers",
              "parallel", "compile", "recompute", "log_every", "save_every", "keep", "grad_accum")
PATIENCE = 10  # seconds until a file of rank 0 must be visible to all


def recorded(config):
    """The config with what its run folder has settled: precision `auto` and an empty `init` mean
    those of the run that the folder holds."""
    path = Path(config.run_dir) / "config.json"
    if not path.exists():
        return config
    old = Config.load(path)
    return dataclasses.replace(config, init=config.init or old.init,
                               dtype=old.dtype if config.dtype == "auto" else config.dtype)


def check_run(config, contents=None):
    """Compare a config with the run that its folder holds, if any.

    Args: contents: of `contents_of`; None: only settings are compared.
    Returns: lines that say which settings differ that may differ.
    Raises: ValueError if anything else differs: mixing would spoil both runs.
    """
    folder = Path(config.run_dir)
    if not (folder / "config.json").exists():
        return []
    old, new = dataclasses.asdict(Config.load(folder / "config.json")), dataclasses.asdict(config)
    if contents:
        try:
            old |= json.loads((folder / "contents.json").read_text(encoding="utf-8"))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"{folder}/contents.json says what the run learns from and cannot be "
                             f"read ({error}): restore it, or choose another --run_dir") from error
        new |= contents
    texts = {k: f"{k}={old.get(k)} there, {new.get(k)} asked for" for k in {**old, **new}
             if old.get(k) != new.get(k)}
    wrong = [text for k, text in texts.items() if k not in MAY_CHANGE]
    if wrong:
        own, fix = folder / "tokenizer.tiktoken", ""
        if "tokenizer content" in texts:
            fix = f"use --tokenizer={own if own.exists() else old['tokenizer']}, or "
        if any(k.startswith("data part") for k in texts):
            fix += "give the data of these parts as it was, or "
        raise ValueError(f"run folder {folder} holds another run ({'; '.join(wrong)}): {fix}choose "
                         "another --run_dir")
    return [f"changed since the last start: {text}" for text in texts.values()]


def contents_of(data):
    """What a run learns from, wherever it lies: {part: text} of a TrainingData."""
    contents = {"tokenizer content": tokenizer_content(data.tokenizer.source)}
    for i, part in enumerate(data.sources, 1):
        contents[f"data part {i}"] = (f"{len(part)} samples ({part.kind}, {part.weight:.4%}, "
                                      f"fingerprint {part.shards.fingerprint})")
    return contents


def tokenizer_content(source):
    """What a tokenizer is, wherever it lies: the checksum of a rank file, or an encoding's name."""
    path = find_file(source)
    return f"sha256 {digest(path)}" if path else str(source)


def begin_run(config, data, runtime):
    """Claim the run folder: its config.json, contents.json and copy of the tokenizer.

    Returns: config with device, precision, parallelism and compilation as `runtime` has them.
    Raises: ValueError if the folder holds another run, or if not all ranks see it.
    """
    config = dataclasses.replace(config, **runtime.settings())
    folder = Path(config.run_dir)
    check_shared(folder, runtime)
    if runtime.is_main:
        contents = contents_of(data)
        say(runtime, *check_run(config, contents))
        source, copy = find_file(data.tokenizer.source), folder / "tokenizer.tiktoken"
        if source and not (copy.exists() and digest(copy) == digest(source)):
            data.tokenizer.save(folder)
        write_text(folder / "contents.json", json.dumps(contents, indent=1) + "\n")
        config.save(folder / "config.json")  # the last: it claims the folder
    runtime.barrier()
    return config


def check_shared(folder, runtime):
    """Make the run folder. Raises ValueError unless every rank sees there what rank 0 writes."""
    mark = folder / f"{runtime.gather(uuid4().hex)[0]}.tmp"
    folder.mkdir(parents=True, exist_ok=True)
    if runtime.is_main:
        mark.touch()
    runtime.barrier()
    end = time.monotonic() + PATIENCE  # a network file system may take its time
    while not mark.exists() and time.monotonic() < end:
        time.sleep(0.05)
    blind = [rank for rank, sees in enumerate(runtime.gather(mark.exists())) if not sees]
    if runtime.is_main:
        remove(mark)
    if blind:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty
        raise ValueError(f"run folder {folder}: ranks {blind} do not see what rank 0 writes there; "
                         "all machines must share it: give --run_dir=/PATH on a shared disk")


def digest(path):
    """SHA-256 of a file in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_of(model, optimizer, scaler, step=0):
    """What a checkpoint holds, as torch's distributed checkpoint takes it."""
    weights, moments = sharded.get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments, "step": torch.tensor(step),
            "scaler": scaler.state_dict() if scaler else {}}


def save(run_dir, step, model, optimizer, runtime, keep, scaler=None):
    """Write checkpoint `step` of all ranks, unless `latest` names it already. Of all others only
    the newest `keep` - 1 before it stay: later ones are of a branch that the run has left.

    Raises: OSError if the disk refuses; earlier checkpoints stay.
    """
    folder = Path(run_dir) / "checkpoints"
    final, temporary = folder / f"step-{step:08d}", folder / f"step-{step:08d}.tmp"
    if runtime.gather(latest(folder) == final.name)[0]:
        return
    if runtime.is_main:
        for unfinished in folder.glob("*.tmp"):
            remove(unfinished)
        temporary.mkdir(parents=True)
    runtime.barrier()
    state = state_of(model, optimizer, scaler, step)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one process without a process group is fine
            dcp.save(state, checkpoint_id=temporary, no_dist=runtime.world == 1)
    except dcp.api.CheckpointException as error:
        remove(temporary)
        raise OSError(f"checkpoint {final} could not be written ({reason_of(error)}); the earlier "
                      "ones are whole: free some space and start again") from error
    files = [*temporary.glob(f"__{runtime.rank}_*"), *temporary.glob(".metadata")]
    parts = runtime.gather({path.name: digest(path) for path in files})
    if runtime.is_main:
        checksums = {name: value for part in parts for name, value in part.items()}
        write_text(temporary / "checksums.json", json.dumps(checksums))
        remove(final)  # of a branch that the run has left: `latest` names another
        os.replace(temporary, final)
        write_text(folder / "latest", final.name)
        steps = sorted(folder.glob("step-*[0-9]"))
        kept = [path for path in steps if path.name <= final.name][-keep:]
        for path in steps:
            if path not in kept:
                remove(path)
    runtime.barrier()


def reason_of(error):
    """Why the first rank that failed could not read or write a checkpoint."""
    return next(iter(error.failures.values()))[0]


def latest(folder):
    """The text of the file `latest`, which a user may write to go back to an earlier step."""
    path = folder / "latest"
    return path.read_text(encoding="utf-8", errors="replace").strip() if path.exists() else ""


def resumable(folder):
    """Names of the checkpoints to resume from, the first choice first: the one that `latest` names
    and those before it; all, if it names none."""
    names, first = {path.name for path in folder.glob("step-*[0-9]")}, latest(folder)
    if re.fullmatch(r"step-\d{8}", first):
        names = {first, *(name for name in names if name < first)}
    return sorted(names, reverse=True)


def damaged_files(path, runtime):
    """Names of a checkpoint's files that are missing or not as they were written. Every rank reads
    a part of the files; all return the same names."""
    text, checksums, damaged = "", {}, []
    with contextlib.suppress(OSError, ValueError, TypeError):
        text = (path / "checksums.json").read_text(encoding="utf-8")
        checksums = dict(json.loads(text))
    text, checksums = runtime.gather((text, checksums))[0]
    files = {".metadata", *(file.name for file in path.glob("*.distcp"))}
    if text != json.dumps(checksums) or not files <= checksums.keys():
        damaged.append("checksums.json")
    for name in sorted(checksums)[runtime.rank :: runtime.world]:
        try:
            is_same = digest(path / name) == checksums[name]
        except (OSError, ValueError):
            is_same = False
        damaged += [] if is_same else [name]
    return sorted({name for part in runtime.gather(damaged) for name in part})


def restore(run_dir, model, optimizer, runtime, scaler=None):
    """Load the latest whole checkpoint into model, optimizer and scaler.

    Returns: its step, or 0 if the run has none.
    Raises: ValueError if none is whole, or if there is none and the run has weights: training anew
        would overwrite them.
    """
    folder, problems = Path(run_dir) / "checkpoints", []
    for name in runtime.gather(resumable(folder))[0]:
        damaged = damaged_files(folder / name, runtime)
        if not damaged:
            break
        problems.append(f"{folder / name}: missing or damaged: {', '.join(damaged)}")
    else:
        if problems:
            raise ValueError(f"{'; '.join(problems)}; no other checkpoint is left: restore these "
                             "files, or choose another --run_dir")
        if (Path(run_dir) / "model.safetensors").exists():
            raise ValueError(f"run folder {run_dir} holds finished weights, and no checkpoint to "
                             "resume from: choose another --run_dir, or delete the folder to start "
                             "again")
        return 0
    state = state_of(model, optimizer, scaler)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dcp.load(state, checkpoint_id=folder / name, no_dist=runtime.world == 1)
    except dcp.api.CheckpointException as error:
        raise ValueError(f"checkpoint {folder / name} does not fit this run; another version of "
                         f"this code or of torch may have written it ({reason_of(error)}): choose "
                         "another --run_dir") from error
    sharded.set_state_dict(model, optimizer, model_state_dict=state["model"],
                           optim_state_dict=state["optimizer"])
    if scaler:
        scaler.load_state_dict(state["scaler"])
    steps = runtime.gather(int(state["step"]))
    if len(set(steps)) > 1:
        raise ValueError(f"the ranks have read different steps from {folder / name} ({steps}): all "
                         "machines must share one run folder")
    if runtime.is_main and name != latest(folder):
        say(runtime, *problems, f"{folder}/latest says {latest(folder)!r}: resumed from {name}")
        write_text(folder / "latest", name)
    return steps[0]


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
