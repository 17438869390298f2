"""Train AIMv2, from a laptop to a cluster.

    python train.py                                          # the toy run: data made on first use, minutes on two cores
    python train.py --preset=toy --steps=200 --run=runs/try  # every setting is --key=value; --help lists them
    python train.py --preset=3b --dry_run                    # parameters, FLOPs, memory a rank, days: nothing is trained
    torchrun --nproc_per_node=8 -- train.py --preset=large   # the paper's AIMv2-L on 8 GPUs (-- lets torchrun pass --run on)

A run lives in runs/NAME: config.json, metrics.jsonl, checkpoints, model.safetensors, loss.png, samples.png. Started
again, it goes on from its last checkpoint.
"""

import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nano_aimv2 import budget, checkpoint, distributed, metrics
from nano_aimv2.config import Config
from nano_aimv2.data import TrainingData, describe, parse_mixture
from nano_aimv2.evaluate import held_out_sets
from nano_aimv2.loader import make_loader
from nano_aimv2.model import AIMv2
from nano_aimv2.optim import lr_at, make_optimizer
from nano_aimv2.prefix_mask import step_prefix_len
from nano_aimv2.tokenizer import tokenizer_of


def main(argv):
    if any(flag.startswith("--dry_run") for flag in argv):
        budget.main(argv)
        return

    # Settings, processes, run folder
    config = Config.from_flags(argv)
    checkpoint.check_init(config)
    runtime = distributed.start(config.device, config.dtype, config.parallel, config.compile)
    say = tqdm.write if runtime.is_main else lambda line: None
    if runtime.is_main:
        make_toy_data(config)
    runtime.barrier()

    # Data
    tokenizer = tokenizer_of(config)
    data = TrainingData(config, tokenizer, runtime.rank, runtime.world)
    held_out = held_out_sets(config, tokenizer, config.eval_images)
    for line in [*describe(data), *(f"left out: {line}" for e in held_out.values() for line in e.skipped)]:
        say(line)
    if not held_out:
        say("nothing is held out: there is no val folder beside the training shards; give --val_data=PATH:KIND to validate")

    # Model, optimizer, and where the run left off
    torch.manual_seed(config.seed)
    model = AIMv2(config)
    if config.init:
        checkpoint.load_init(model, config)
    if runtime.is_main:
        checkpoint.claim_run(config)
        tokenizer.save(config.run)
    runtime.barrier()
    trained = distributed.parallelize(model, runtime)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, (config.beta_1, config.beta_2))
    objective = [p for name, p in model.named_parameters() if "stats_head" not in name]  # whose gradient norm is clipped
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    first_step = checkpoint.restore(config.run, model, optimizer, runtime)
    say(f"{config.run}: {sum(p.numel() for p in model.parameters()):,} parameters on {runtime.world} x {runtime.device.type}, "
        f"{str(runtime.dtype).removeprefix('torch.')} matmuls, parallel {runtime.parallel}, step {first_step} of {config.steps}")

    # The loop
    log = metrics.MetricsLog(Path(config.run) / "metrics.jsonl", first_step) if runtime.is_main else None
    loader = make_loader(data, first_step * config.grad_accum, config.num_workers, pin=runtime.device.type == "cuda")
    signal.signal(signal.SIGTERM, ask_to_stop)
    bar = tqdm(total=config.steps, initial=first_step, unit="step", disable=not (runtime.is_main and sys.stderr.isatty()))
    window, skipped = metrics.Window(config, runtime.device), 0
    unchecked = None
    for step in range(first_step, config.steps + 1):
        last = step == config.steps
        evaluating, saving = (last or bool(every and step > first_step and step % every == 0)
                              for every in (config.eval_every, config.save_every))
        evaluating = evaluating or bool(config.init and step == 0)  # what the weights can do on the new data before any step
        if evaluating or saving:
            unchecked = check_finite(unchecked, data, config, scaler)
        if evaluating and held_out:
            row = evaluate(model, trained, held_out, runtime)
            say(f"step {step}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items()))
            if log:
                log.write(step=step, **row)
            window = metrics.Window(config, runtime.device)
        if saving:
            checkpoint.save(config.run, step, model, optimizer, runtime, config.keep)
        if last:
            break

        # The micro-batches of this step, their prefixes, and how many targets all ranks have together
        begin = time.perf_counter()
        batches = [next(loader) for _ in range(config.grad_accum)]
        data_s = time.perf_counter() - begin
        prefixes = [step_prefix_len(b.grid.prod(dim=1), config.seed, step, b.rows, b.global_size, config.prefix)
                    for b in batches]
        counts = count_targets(batches, prefixes)
        image_count, text_count, stops = runtime.sum(*(sum(c) for c in zip(*counts, strict=True)), ask_to_stop.asked)
        if stops:
            say(f"asked to stop: saving step {step}")
            check_finite(unchecked, data, config, scaler)
            checkpoint.save(config.run, step, model, optimizer, runtime, config.keep)
            return

        # Step
        sums = backward(trained, batches, prefixes, counts, (image_count, text_count), config, runtime, scaler)
        scaler.unscale_(optimizer)
        grad_norm = torch.nn.utils.clip_grad_norm_(objective, config.clip_grad)
        grad_norm = grad_norm.full_tensor() if runtime.is_sharded else grad_norm
        lr = lr_at(step, config.lr, config.min_lr, config.warmup_steps, config.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        check_finite(unchecked, data, config, scaler)  # the step before this one, while the device computes this one
        unchecked = step, distributed.ReadLater(torch.cat([sums, grad_norm.reshape(1).to(sums)]))

        # Log
        window.add(batches, data_s)
        for line in (line for batch in batches for line in batch.skipped):
            tqdm.write(f"step {step}: skipped {line}")  # by the rank that met it
            skipped += 1
        bar.update()
        if (step + 1) % config.log_every == 0 or step + 1 == config.steps:
            text_sum, image_sum, stats_sum, skipped_all = runtime.sum(*sums, skipped)
            text, image, stats = text_sum / text_count, image_sum / max(image_count, 1), stats_sum / max(image_count, 1)
            row = dict(step=step + 1, loss=config.text_weight * text + config.alpha * image, loss_text=text, loss_image=image,
                       loss_stats=stats, lr=lr, grad_norm=float(grad_norm), skipped=int(skipped_all),
                       **window.rates(runtime))
            if log:
                log.write(**row)
                line = f"text {text:.3f}, image {image:.3f}, {row['img_per_s']:.0f} images/s"
                bar.set_postfix_str(line)
                if bar.disable and (step + 1) % (10 * config.log_every) == 0:
                    left = (config.steps - step - 1) * row["step_ms"] / 1e3
                    say(f"step {step + 1} of {config.steps}: {line}, {left / 60:.1f} min left")
            window = metrics.Window(config, runtime.device)
    bar.close()

    # Goodbye: weights for others to use, and pictures to look at
    checkpoint.save_model(config.run, model, runtime)
    if runtime.is_main:
        finish(config, held_out, log)
    runtime.barrier()


def count_targets(batches, prefixes):
    """(patches, tokens) to predict in each micro-batch."""
    return [(int((b.grid.prod(dim=1) - m).sum()), int(b.num_tokens.sum())) for b, m in zip(batches, prefixes, strict=True)]


def backward(trained, batches, prefixes, counts, total_counts, config, runtime, scaler):
    """Forward and backward of a step's micro-batches: adds to .grad, exchanged over ranks after the last of them.

    Args: counts: (image, text) targets of each micro-batch; total_counts: of all micro-batches and ranks together.
    Returns: f[3] on the device, this rank's sums of the text, image and statistics losses.
    """
    sums = 0
    for i, (batch, prefix_len) in enumerate(zip(batches, prefixes, strict=True)):
        with distributed.sync_gradients(trained, runtime, is_last=i == len(batches) - 1):
            with runtime.autocast():
                losses = trained(batch.to(runtime.device), prefix_len.to(runtime.device), counts[i])
                # DDP and FSDP average over ranks where we want the sum
                loss = losses.total(config.alpha, *total_counts, config.text_weight) * runtime.world
            scaler.scale(loss).backward()
        sums = sums + torch.stack([losses.text_sum, losses.image_sum, losses.stats_sum]).detach()
    return sums


def check_finite(unchecked, data, config, scaler):
    """Stop the run if the numbers of `unchecked` (step, ReadLater) are not finite; the norm is the same on every rank.

    Raises: FloatingPointError that names the step, the term and this rank's samples.
    """
    if unchecked is None:
        return
    step, report = unchecked
    numbers = dict(zip(("text loss", "image loss", "statistics loss", "gradient norm"), report.read(), strict=True))
    if scaler.is_enabled():
        del numbers["gradient norm"]  # float16: the scaler skips such a step and lowers its factor
    if all(map(math.isfinite, numbers.values())):
        return
    bad = [name for name, value in numbers.items() if not math.isfinite(value)]
    names = [name for part in range(config.grad_accum) for name in data.names(step * config.grad_accum + part)]
    raise FloatingPointError(
        f"step {step}: not finite: {', '.join(bad)} ({', '.join(f'{k} {v:.4g}' for k, v in numbers.items())}, sums of rank "
        f"{data.rank}); its samples: {', '.join(names[:16])}{f' and {len(names) - 16} more' if len(names) > 16 else ''}. "
        f"The last checkpoint is good: lower --lr (now {config.lr}), or look at these samples")


def make_toy_data(config):
    """Draw the toy scenes where a run asks for them and they are not there."""
    from data.scenes import SETS, make_scenes

    for source in parse_mixture(config.data):
        folder = Path(source.path)
        if folder.name in SETS and not folder.exists():
            make_scenes(folder, **SETS[folder.name])


def evaluate(model, trained, held_out, runtime):
    """A row of held-out losses and, where it is known what the images show, how many greedy captions say it."""
    row = {}
    for split, evaluation in held_out.items():
        suffix = "" if split == "val" else f"_{split}"
        row["val_loss_text" + suffix], row["val_loss_image" + suffix] = evaluation.losses(trained, runtime)
        known = "novel" in held_out or any(evaluation.label_names)  # the toy set, or pictures with labels
        if known and runtime.is_main and not runtime.is_sharded:  # a sharded model cannot be called by one rank alone
            row |= {name + suffix: score for name, score in evaluation.caption_scores(model, runtime).items()}
    return row


def finish(config, held_out, log):
    """loss.png and samples.png, from the files that the run has written."""
    from nano_aimv2.plots import loss_curves
    from sample import held_out_page

    folder = Path(config.run)
    loss_curves(metrics.read_metrics(log.path), folder / "loss.png", config.vocab_size, config.patch_dim)
    if held_out:
        held_out_page(config.run, folder / "samples.png")
    print(f"see {folder}/loss.png{f' and {folder}/samples.png' if held_out else ''}; captions of your own pictures: "
          f"python sample.py --run={config.run} --image=FILE")


def ask_to_stop(*_):
    ask_to_stop.asked = True


ask_to_stop.asked = False

if __name__ == "__main__":
    failure = None
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError) as error:
        failure = f"train.py: {type(error).__name__}: {error}"
    finally:
        distributed.stop()
    distributed.leave(failure)
