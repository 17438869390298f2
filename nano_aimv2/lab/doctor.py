"""Doctor: does this machine compute the right numbers, and what can it be expected to do?

    python -m nano_aimv2.lab.doctor                     # two minutes; a page to paste into an issue
    python -m nano_aimv2.lab.doctor --data=data/dfn2b   # reads at random from these shards

*Numbers.* A golden step (features, losses, gradients, the weights after three AdamW steps) is
computed on the CPU in float32, and compared with numbers of this file. Then one factor at a time
changes: device, precision, compilation, parallelism. Each is compared with the golden step stage by
stage; the first stage beyond its tolerance is where to look. The exit code is 1 if there is one.

*Expectations.* The largest preset that fits: its attention kernel, time, MFU and memory, what the
data loader gives and the disk must, and the line that starts the run.

Lesson: 10.
"""

import math
import multiprocessing
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend

from nano_aimv2.config import Config
from nano_aimv2.data.batches import TrainingData, make_loader
from nano_aimv2.data.shards import Shards
from nano_aimv2.data.tokenizer import Tokenizer
from nano_aimv2.flags import read_flags, run_command
from nano_aimv2.lab import bench, budget
from nano_aimv2.layers import WRITTEN_OUT
from nano_aimv2.model import AIMv2
from nano_aimv2.prefix_mask import step_prefix_len
from nano_aimv2.training import distributed
from nano_aimv2.training.optim import clipped_parameters, make_optimizer

GOLDEN = dict(image_size=32, patch_size=8, embed_dim=64, num_blocks=2, num_heads=2, decoder_dim=64,
              decoder_blocks=2, decoder_heads=2, mlp_multiple=64, max_tokens=16, vocab_size=256,
              batch_size=8, lr=1e-3)
STAGES = ("features", "losses", "gradients", "weights")
# Largest |a - b| / |b| of each stage (Euclidean norms; of a parameter for the last two; weights:
# of the change in three steps, where Adam turns small gradients into full steps).
TOLERANCES = {"float32": (1e-5, 1e-5, 1e-4, 1e-2), "tf32": (3e-3, 2e-4, 1e-2, 0.2),
              "float16": (3e-3, 2e-4, 1e-2, 0.2), "bfloat16": (2e-2, 2e-3, 8e-2, 0.6)}
RECORDED = {"features": 90.50949, "text loss": 5.715027, "image loss": 1.302056,
            "gradient norm": 3.357754}  # of the golden step: norms and losses
PRESETS_TO_TRY = ("3b", "1b", "huge", "large", "base")  # the first that fits
IMAGES = 64  # of a micro-batch, at most


@dataclass(frozen=True)
class Setting:
    """How a golden step is computed."""

    device: str = "cpu"
    dtype: str = "float32"  # tf32: float32 with the GPU's TF32 matmuls
    compile: str = "false"
    parallel: str = "none"  # others: two processes

    def __str__(self):
        compiled = " compiled" if self.compile == "true" else ""
        return f"{self.device} {self.dtype}{compiled}" + (
            f" {self.parallel} x 2" if self.parallel != "none" else "")


@dataclass
class Options:
    device: str = "auto"  # auto, cpu, cuda or mps
    data: str = ""  # shards for the random reads; empty: some that are written for the purpose


# Numbers


def golden_steps(setting):
    """Three training steps by the code that train.py runs.

    Returns: {stage: {name: tensor f64 on the CPU}}; of several ranks, rank 0's rows of features.
    """
    config = Config.from_preset("toy", **GOLDEN)
    dtype = setting.dtype.replace("tf32", "float32")
    runtime = distributed.start(setting.device, dtype, setting.parallel, setting.compile)
    torch.set_float32_matmul_precision("high" if setting.dtype == "tf32" else "highest")
    torch.manual_seed(0)
    model = AIMv2(config)
    before = {name: p.detach().double() for name, p in own_parameters(model)}
    torch.manual_seed(1)  # the batch does not follow from the number of parameters
    whole = bench.random_batch(config)
    size = config.batch_size // runtime.world
    rows = slice(runtime.rank * size, (runtime.rank + 1) * size)
    batch = replace(whole.map(lambda tensor: tensor[rows]), first_row=rows.start)
    batch = batch.to(runtime.device)
    found, seen = {}, {}
    model.encoder.register_forward_hook(
        lambda _, inputs, out: seen.update(encoder=as_double(out)))
    trained = distributed.parallelize(model, runtime)
    optimizer = make_optimizer(model, config.lr, config.weight_decay, config.betas)
    scaler = torch.amp.GradScaler(runtime.device.type, init_scale=1024,
                                  enabled=runtime.dtype == torch.float16)
    for step in range(3):
        prefix_len = step_prefix_len(whole.grid.prod(dim=1), 0, step, whole.rows, len(whole.grid))
        image_count = int((16 - prefix_len).sum())
        text_count = int(whole.num_tokens.sum())
        with runtime.autocast():
            losses = trained(batch, prefix_len[rows].to(runtime.device))
            loss = losses.total(config.alpha, image_count, text_count)
        scaler.scale(loss * runtime.world).backward()
        scaler.unscale_(optimizer)
        if step == 0:
            found["features"] = dict(seen)
            text, image, _ = runtime.sum(*losses.sums())
            found["losses"] = {"text loss": torch.tensor([text / text_count]),
                               "image loss": torch.tensor([image / image_count])}
            found["gradients"] = {name: as_double(p.grad) for name, p in own_parameters(model)}
        distributed.clip_gradients(clipped_parameters(model), config.clip_grad, runtime)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    found["weights"] = {name: as_double(p) - before[name] for name, p in own_parameters(model)}
    return found


def own_parameters(model):
    """[(name, parameter)] of the paper's objective. The patch sampler, much of which starts at
    zero, has gradients in its first steps that are mere rounding."""
    return [item for item in model.named_parameters() if not item[0].startswith("sampler.")]


def as_double(tensor):
    """A tensor, sharded or not, as f64 on the CPU."""
    tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return tensor.detach().cpu().double()


def run_rank(setting, rank, port, path):
    """One process of `measured`."""
    if setting.parallel != "none":
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                          LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    found = golden_steps(setting)
    if rank == 0:
        torch.save(found, path)
    distributed.stop()
    distributed.leave()


def measured(setting, folder):
    """`golden_steps` in processes of their own; None if they fail."""
    path = Path(folder) / "found.pt"
    path.unlink(missing_ok=True)
    context, port = multiprocessing.get_context("spawn"), random.randint(20_000, 60_000)
    ranks = [context.Process(target=run_rank, args=(setting, rank, port, path))
             for rank in range(1 if setting.parallel == "none" else 2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(timeout=180)
        process.kill()
    return torch.load(path) if path.exists() else None


def settings_to_try(device):
    """The reference, then each factor changed alone on `device`."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else []) + (
        ["mps"] if torch.backends.mps.is_available() else [])
    yield from (Setting(kind) for kind in kinds)
    base = Setting(device.type)
    dtypes = ["bfloat16", "float16"] + (["tf32"] if device.type == "cuda" else [])
    yield from (replace(base, dtype=dtype) for dtype in dtypes)
    if bench.has_compiler():
        yield replace(base, compile="true")
    pair = base if torch.cuda.device_count() > 1 else Setting("cpu")
    if torch.distributed.is_available():
        yield from (replace(pair, parallel=parallel) for parallel in ("ddp", "fsdp", "hybrid"))


def differences(found, golden):
    """{stage: (largest relative difference, where)}."""
    worst = {}
    for stage in STAGES:
        expected = golden[stage]
        floor = 1e-2 * max(float(value.norm()) for value in expected.values())
        worst[stage] = max(
            (float((found[stage][name][: len(value)] - value[: len(found[stage][name])]).norm())
             / max(float(value.norm()), floor), name) for name, value in expected.items())
    return worst


def check_numbers(device, folder):
    """Print how far each setting is from the golden step; returns whether all are close enough."""
    print("numbers: relative differences from the golden step (CPU, float32)\n"
          f"  {'':26}" + "".join(f"{stage:>11}" for stage in STAGES))
    golden, good = None, True
    for setting in settings_to_try(device):
        found = measured(setting, folder)
        if found is None:
            print(f"  {setting!s:26} FAILED: its error stands above", flush=True)
            good = False
            continue
        golden = golden or found
        worst = differences(found, golden)
        line = f"  {setting!s:26}" + "".join(f"{value:11.0e}" for value, _ in worst.values())
        limits = dict(zip(STAGES, TOLERANCES[setting.dtype], strict=True))
        beyond = [stage for stage in STAGES if not worst[stage][0] <= limits[stage]]
        if beyond:
            value, where = worst[beyond[0]]
            line += f"\n    FIRST BEYOND ITS TOLERANCE: {beyond[0]} ({where}): {value:.1e} > " \
                    f"{limits[beyond[0]]:.0e}"
        print(line, flush=True)
        good &= not beyond
    return good and golden is not None and is_as_recorded(golden)


def is_as_recorded(golden):
    """Whether the CPU's golden step has the numbers of RECORDED; says so if not."""
    gradients = torch.cat([gradient.flatten() for gradient in golden["gradients"].values()])
    found = {"features": float(golden["features"]["encoder"].norm()),
             **{name: float(value) for name, value in golden["losses"].items()},
             "gradient norm": float(gradients.norm())}
    wrong = [f"{name} {found[name]:.7g}, recorded {value:.7g}" for name, value in RECORDED.items()
             if not abs(found[name] - value) <= 1e-4 * value]
    if wrong:
        print(f"  THE CPU IN FLOAT32 DIFFERS FROM THE NUMBERS IN doctor.py: {'; '.join(wrong)}")
    return not wrong


# Expectations


def largest_that_fits(device):
    """(Config, bytes that it should take) of the largest preset that trains on one such device."""
    room = 0
    if device.type == "cuda":
        room = 0.9 * torch.cuda.get_device_properties(device).total_memory
    elif device.type == "mps":
        room = 0.9 * torch.mps.recommended_max_memory()
    for preset in PRESETS_TO_TRY if room else ():
        config = Config.from_preset(preset, parallel="none", grad_accum=1, batch_size=IMAGES)
        state, _ = budget.memory_per_rank(config, *budget.count_parameters(config)[::2], 1, "none")
        images = min(IMAGES, int((room - state) // budget.activation_bytes(config, 1)) // 8 * 8)
        if images > 0:
            kept = budget.activation_bytes(config, images)
            return replace(config, batch_size=images), state + kept
    config = Config.from_preset("photos")
    parameters, _, block = budget.count_parameters(config)
    return config, sum(budget.memory_per_rank(config, parameters, block, 1, "none"))


def expect_step(config, expected_bytes, device):
    """Print attention, time and memory of a training step; returns its images per second."""
    runtime = distributed.start(device.type, config.dtype, "none", config.compile)
    s, flops, parameters = bench.measure_step(config, runtime, repeats=5)
    print(f"\nstep of {config.preset}: {parameters / 1e6:,.1f}M parameters, "
          f"{config.batch_size} images, {bench.mode_text(runtime)}\n"
          f"  {s * 1e3:,.0f} ms, {config.batch_size / s:,.0f} images/s, "
          f"{bench.speed_text(flops, s, runtime.device)}\n"
          f"  attention: {attention_kernels(config, runtime)}\n"
          f"  peak memory {bench.peak_memory(runtime.device)}; computed, without libraries: "
          f"{expected_bytes / 2**30:.2f} GiB", flush=True)
    return config.batch_size / s


def attention_kernels(config, runtime):
    """Which kernels compute attention in training: with the prefix mask, and causal."""
    device, dtype = runtime.device, runtime.dtype if runtime.is_cuda else torch.float32
    n, names = (config.image_size // config.patch_size) ** 2, []
    for name, length, dim, heads in (
            ("encoder", n, config.embed_dim, config.num_heads),
            ("decoder", n + config.max_tokens, config.decoder_dim, config.decoder_heads)):
        q = torch.zeros(1, heads, length, dim // heads, dtype=dtype, device=device)
        bias = q.new_zeros(1, 1, length, length) if name == "encoder" else None
        chosen = torch._fused_sdp_choice(q.requires_grad_(), q, q, bias, 0.0, bias is None)
        is_written_out = device.type == "cpu" and length <= WRITTEN_OUT.get(runtime.dtype, 0)
        kernel = "the formula written out" if is_written_out else SDPBackend(chosen).name
        names.append(f"{name} {kernel} ({length} positions)")
    return ", ".join(names)


def expect_data(rate, folder, data):
    """Print what one data worker gives, what the disk gives, and what a step eats.

    Args: rate: images per second of a step; folder: to write in; data: shards to read at random.
    """
    bench.write_jpegs(Path(folder), 400)
    config = Config.from_preset("toy", data=f"{folder}:alt:1", image_size=224, patch_size=14,
                                crop_scale=0.4, batch_size=40, steps=10)
    loader = make_loader(TrainingData(config, Tokenizer(config.tokenizer)), 0, 1, pin=False)
    next(loader)  # the worker has started
    begin = time.perf_counter()
    images = sum(len(batch.patches) for batch in loader)
    of_worker = images / (time.perf_counter() - begin)
    shards = Shards(data or f"{folder}/train")
    if hasattr(os, "posix_fadvise"):  # read from the disk, not from memory
        for tar in shards.index.tars:
            with open(os.path.join(shards.folder, tar.name), "rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    samples = random.Random(0).sample(range(len(shards)), min(len(shards), 2000))
    begin, count = time.perf_counter(), 0
    for i in samples:
        shards.image(i)
        count += 1
        if time.perf_counter() - begin > 3:
            break
    reads = count / (time.perf_counter() - begin)
    print(f"\ndata: one worker gives {of_worker:,.0f} images/s (JPEGs of 500 x 375 to crops of 224 "
          "px),\n"
          f"  the step takes {rate:,.0f}: --num_workers={math.ceil(rate / of_worker)}\n"
          f"  {reads:,.0f} reads/s at random from {data or 'a new file'}, one after another; the "
          f"step needs {2 * rate:,.0f}\n"
          "  (an image and its caption each). 30,000 images/s need 60,000 reads/s: NVMe disks in "
          "the nodes,\n"
          "  not a network disk. From an object store, copy the shards to these disks first.",
          flush=True)


def launch_line(config, device):
    """The command that trains what was measured."""
    if device.type != "cuda":
        return f"python train.py --preset={config.preset}"
    world, whole = torch.cuda.device_count(), Config.from_preset(config.preset).batch_size
    accumulate = math.ceil(whole / (world * config.batch_size))
    return (f"torchrun --nproc_per_node={world} train.py --preset={config.preset} "
            f"--grad_accum={accumulate}")


def describe_machine():
    """The first lines of the page: what is needed to understand the others."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor}"
             for gpu in gpus] or (["Apple MPS"] if torch.backends.mps.is_available() else ["none"])
    return (f"nano_aimv2 doctor: torch {torch.__version__}, Python {platform.python_version()}, "
            f"{platform.platform()}\n  {torch.get_num_threads()} threads, "
            f"{torch.backends.cpu.get_cpu_capability()}; GPU: {'; '.join(names)}")


def main(argv):
    options = Options(**read_flags(argv, Options, doc=__doc__)[0])
    device = distributed.choose_device(options.device)
    print(f"```\n{describe_machine()}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        is_good = check_numbers(device, folder)
        config, expected_bytes = largest_that_fits(device)
        rate = expect_step(config, expected_bytes, device)
        expect_data(rate, folder, options.data)
    print(f"\nto train it: {launch_line(config, device)}\n"
          f"{'the numbers are right' if is_good else 'THE NUMBERS ARE NOT RIGHT'}\n```")
    if not is_good:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
