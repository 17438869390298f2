"""Train AIMv2, from a laptop to a cluster.

    python train.py                                        # the toy run: minutes on two CPU cores
    python train.py --preset=toy --steps=200 --run_dir=runs/try
    python train.py --preset=3b --dry_run                  # what a run takes, without training it
    torchrun --nproc_per_node=8 train.py --preset=large    # the paper's AIMv2-L on 8 GPUs

A run lives in runs/NAME: config.json, metrics.jsonl, checkpoints, model.safetensors, loss.png and
samples.png. Started again, it resumes from its last checkpoint.
"""

import sys
from pathlib import Path

import torch

from data.scenes import SETS, make_scenes
from nano_aimv2.config import Config
from nano_aimv2.data.batches import TrainingData, describe, make_loader
from nano_aimv2.data.mixture import parse_mixture
from nano_aimv2.data.tokenizer import tokenizer_of
from nano_aimv2.flags import safe_console
from nano_aimv2.lab import budget, plots
from nano_aimv2.model import AIMv2
from nano_aimv2.prefix_mask import step_prefix_len
from nano_aimv2.training import checkpoint, distributed, init, metrics
from nano_aimv2.training.evaluate import describe_held_out, evaluate, held_out_sets
from nano_aimv2.training.optim import clipped_parameters, lr_at, make_optimizer, set_lr


def main(argv):
    config, plan = Config.from_flags(argv, __doc__, budget.Plan, adopt=init.adopt_init)
    if plan:
        budget.main(config, **plan)
        return
    config, is_new = init.open_run(config)

    # Processes, data
    runtime = distributed.start(config.device, config.dtype, config.parallel, config.compile)
    make_toy_data(config, runtime)
    tokenizer = tokenizer_of(config)
    data = TrainingData(config, tokenizer, runtime.rank, runtime.world, runtime.gather)
    held_out = held_out_sets(config, tokenizer, config.eval_images, runtime.gather)
    metrics.say(runtime, *init.describe_init(config), *describe(data), *describe_held_out(held_out))

    # Model and optimizer: from random weights, another run's, or this run's last checkpoint
    torch.manual_seed(config.seed)
    model = AIMv2(config)
    if config.init and is_new:
        init.load_init(model, config)
    config = checkpoint.begin_run(config, data, runtime)
    trained = distributed.parallelize(model, runtime)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.betas,
                               config.encoder_lr)
    clipped = clipped_parameters(model)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.dtype == torch.float16)
    first_step = checkpoint.restore(config.run_dir, model, optimizer, runtime, scaler)
    metrics.say(runtime, describe_run(model, config, runtime, first_step))

    # The loop: `step` is how many optimizer steps are done
    stop_request = distributed.StopRequest()
    progress = metrics.Progress(config, runtime, first_step)
    loader = make_loader(data, first_step * config.grad_accum, config.num_workers, runtime.is_cuda)
    finite = metrics.FiniteCheck(data, scaler)
    def save():
        finite.read()
        with progress.paused():
            checkpoint.save(config.run_dir, step, model, optimizer, runtime, config.keep, scaler)

    for step in range(first_step, config.steps + 1):
        first_look = config.init and step == 0  # what the weights of --init do as they are
        if held_out and (is_due(step, first_step, config.eval_every, config.steps) or first_look):
            with progress.paused():
                progress.evaluation(step, evaluate(model, trained, held_out, runtime))
        if is_due(step, first_step, config.save_every, config.steps):
            save()
        if step == config.steps:
            break

        # The micro-batches of this step, their prefixes, and the number of targets of all ranks
        batches = progress.wait_for(next(loader) for _ in range(config.grad_accum))
        prefixes = [step_prefix_len(b.grid.prod(dim=1), config.seed, step, b.rows, b.global_size,
                                    config.prefix) for b in batches]
        targets = [count_targets(b, M) for b, M in zip(batches, prefixes, strict=True)]
        image_count, text_count, stops = runtime.sum(*map(sum, zip(*targets, strict=True)),
                                                     stop_request.asked)
        if stops:
            metrics.say(runtime, f"asked to stop: saving step {step}")
            save()
            return

        # Forward and backward; gradients are exchanged after the last micro-batch
        sums = torch.zeros(3, device=runtime.device)
        for i, batch in enumerate(batches):
            with distributed.sync_gradients(trained, runtime, is_last=i == len(batches) - 1):
                with runtime.autocast():
                    batch, prefix_len = batch.to(runtime.device), runtime.move(prefixes[i])
                    losses = trained(batch, prefix_len, targets[i])
                    loss = losses.total(config.alpha, image_count, text_count, config.text_weight)
                # DDP and FSDP average gradients over ranks; the sum is wanted
                scaler.scale(loss * runtime.world).backward()
            sums += losses.sums()

        # Clip, step, log
        scaler.unscale_(optimizer)
        grad_norm = distributed.clip_gradients(clipped, config.clip_grad, runtime)
        lr = lr_at(step, config.lr, config.min_lr, config.warmup_steps, config.steps)
        set_lr(optimizer, lr)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        finite.add(step, text_loss=sums[0], image_loss=sums[1], sampler_loss=sums[2],
                   gradient_norm=grad_norm)
        progress.step(step, batches, lr, grad_norm, lambda: metrics.mean_losses(
            config, runtime.sum(*sums), image_count, text_count))

    # Goodbye: weights for others to use, and images to look at
    progress.close()
    checkpoint.save_model(config.run_dir, model, runtime)
    distributed.stop()  # the other ranks do not wait for the images
    draw_results(config, runtime, has_samples=bool(held_out))


def count_targets(batch, prefix_len):
    """(patches, tokens) to predict in one micro-batch."""
    return int((batch.grid.prod(dim=1) - prefix_len).sum()), int(batch.num_tokens.sum())


def is_due(step, first_step, every, steps):
    """Whether something that happens every `every` steps (0: at the end only) happens now."""
    return step == steps or bool(every and step > first_step and step % every == 0)


def describe_run(model, config, runtime, first_step):
    parameters = sum(p.numel() for p in model.parameters())
    return (f"{config.run_dir}: {parameters:,} parameters on {runtime.world} x {config.device}, "
            f"{config.dtype} matmuls, parallel {config.parallel}, step {first_step} of "
            f"{config.steps}")


def make_toy_data(config, runtime):
    """Draw the toy sets that the presets name and a run asks for, where they are missing. Another
    folder that is missing may be a disk that is not mounted: that is an error."""
    for source in parse_mixture(config.data):
        if runtime.is_main and source.path in SETS and not Path(source.path).exists():
            make_scenes(source.path, **SETS[source.path])
    runtime.barrier()


def draw_results(config, runtime, has_samples):
    """loss.png and samples.png, by rank 0 from the files that the run has written. A model that was
    sharded may be too large for one rank: it draws no samples."""
    if not runtime.is_main:
        return
    folder = Path(config.run_dir)
    rows = metrics.read_metrics(folder / "metrics.jsonl")
    plots.loss_curves(rows, folder / "loss.png", config.vocab_size, config.patch_dim)
    print(f"written: {folder}/loss.png")
    if has_samples and runtime.is_sharded:
        print(f"captions of held-out images: python sample.py --run_dir={config.run_dir}")
    elif has_samples:
        title = f"{folder.name}: images it has never seen, seed {config.seed}"
        samples = plots.held_out_samples(folder, device=runtime.device)
        plots.samples_page(*samples, folder / "samples.png", title)
        print(f"written: {folder}/samples.png")
    print(f"captions of your own images: python sample.py --run_dir={config.run_dir} --image=FILE")


if __name__ == "__main__":
    safe_console()
    failure = None
    try:
        main(sys.argv[1:])
    except (ValueError, OSError, FloatingPointError, KeyboardInterrupt) as error:
        failure = f"train.py: {type(error).__name__}: {error}"
    except RuntimeError as error:
        if "by peer" not in str(error):  # gloo's words for a connection that the other end closed
            raise
        failure = "train.py: another rank has ended, and its message says why"
    finally:
        distributed.stop()
    distributed.leave(failure)
