"""Distributed: one process or many, on whatever device there is, by the same calls.

`torchrun` tells each process its rank in environment variables; without it there is one process.
Every rank holds the model (DDP) or a slice of it (FSDP2) and works on its rows of the global batch.
Gradients are *summed*: the losses are divided by counts that were summed over all ranks before
(losses.py), so the split never shows.

Lesson: 10.
"""

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
import timeit
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn

from nano_aimv2.flags import check_choice

TIMEOUT_MINUTES = 10  # a rank that does not answer for so long ends the run


@dataclass(frozen=True)
class Runtime:
    """What this process is and what it computes on."""

    rank: int
    world: int
    device: torch.device
    dtype: torch.dtype  # of the matmuls
    parallel: str  # none, ddp, fsdp or hybrid
    compile: bool

    @property
    def is_main(self):
        return self.rank == 0

    @property
    def is_cuda(self):
        return self.device.type == "cuda"

    @property
    def is_sharded(self):
        """Each rank holds only a slice of the weights."""
        return self.parallel in ("fsdp", "hybrid")

    def settings(self):
        """Device, precision, parallelism and compilation as settings of a Config."""
        return dict(device=self.device.type, dtype=str(self.dtype).removeprefix("torch."),
                    parallel=self.parallel, compile=str(self.compile).lower())

    def autocast(self):
        """Matmuls in `dtype`, everything that needs it in float32."""
        enabled = self.dtype != torch.float32
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled)

    def sum(self, *values):
        """Numbers summed over all ranks, as a list of floats. They are summed on the CPU."""
        if self.world == 1:
            return [float(v) for v in values]
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value):
        """The `value` of every rank, in the order of the ranks: any object that can be pickled."""
        if self.world == 1:
            return [value]
        values = [None] * self.world
        dist.all_gather_object(values, value)
        return values

    def move(self, tensor):
        """A CPU tensor on the device. Pinned memory is copied without waiting for the GPU."""
        return (tensor.pin_memory() if self.is_cuda else tensor).to(self.device, non_blocking=True)

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def start(device="auto", dtype="auto", parallel="auto", compile="auto"):
    """Join the other processes, choose device and precision. Rank 0 chooses the precision of all.

    Raises: ValueError if the machine does not have what is asked for.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        rank, world = join_processes(device)
    if parallel == "auto":
        parallel = "ddp" if world > 1 else "none"
    elif parallel == "none" and world > 1:
        raise ValueError(f"parallel=none with {world} processes would train {world} models: use "
                         "--parallel=ddp, fsdp or hybrid")
    elif parallel != "none" and world == 1:
        parallel = "none"  # one process has nothing to share
    dtypes = [choose_dtype(dtype, device) if rank == 0 else None]  # by timing, on a CPU
    if world > 1:
        dist.broadcast_object_list(dtypes)
    compiled = device.type == "cuda" if compile == "auto" else compile == "true"
    if compiled and sys.platform == "win32":
        print("torch.compile needs a compiler that Windows does not have: running without it")
        compiled = False
    return Runtime(rank, world, device, getattr(torch, dtypes[0]), parallel, compiled)


def single_process(device="cpu"):
    """The Runtime of one process in float32 without compilation: to measure a finished run."""
    return Runtime(0, 1, torch.device(device), torch.float32, "none", False)


def join_processes(device):
    """Meet the other ranks that torchrun started; returns (rank, world)."""
    backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    timeout = timedelta(minutes=TIMEOUT_MINUTES)
    store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
    store = dist.PrefixStore(agree_on_store_prefix(store, rank, world), store)
    dist.init_process_group(backends, store=store, rank=rank, world_size=world, timeout=timeout)
    return rank, world


def agree_on_store_prefix(store, rank, world):
    """A prefix for the keys that all ranks write into `store` in this start.

    After `torchrun --max-restarts` brings ranks back, torchrun's store still holds the addresses of
    the dead ones (pytorch issue 135712), and a rank that reads one finds nobody there. So rank 0
    draws a prefix and answers each other rank under the nonce that this rank has just drawn: an
    answer from an earlier start does not fit.
    """
    mine = uuid4().hex
    store.set(f"nonce of {rank}", mine)
    if rank:
        prefix = store.get(f"prefix for {mine}").decode()  # waits for it
        store.set(f"{prefix} reached {rank}", "")
        return prefix
    for other in range(1, world):
        while not store.check([f"{mine} reached {other}"]):
            store.set(f"prefix for {store.get(f'nonce of {other}').decode()}", mine)
            time.sleep(0.01)
    return mine


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(failure=None):
    """End this process, after `stop`: with code 0, or with `failure` on stderr and code 1.

    One rank of several skips interpreter shutdown: after FSDP2 over gloo on a busy CPU, one run in
    about thirty aborted there ("terminate called without an active exception"), and torchrun
    reported a finished run as failed.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(failure)
    if failure:
        print(failure, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failure else 0)


class StopRequest:
    """SIGTERM or Ctrl-C as a flag: `asked` is True once somebody asked this process to stop.

    A second Ctrl-C ends it at once, but not within two seconds: torchrun passes on the first one,
    which a terminal has already sent to every process.
    """

    def __init__(self):
        self.asked, self.again_from = False, math.inf
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.ask)

    def ask(self, number, _):
        if number == signal.SIGINT and time.monotonic() > self.again_from:
            os._exit(128 + number)
        self.asked, self.again_from = True, min(self.again_from, time.monotonic() + 2)


class ReadLater:
    """Numbers copied from the device now and read a step later, when they have arrived."""

    def __init__(self, numbers):
        self.copy = numbers.detach().to("cpu", non_blocking=numbers.is_cuda)
        self.arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrived:
            self.arrived.record()

    def read(self):
        if self.arrived:
            self.arrived.synchronize()
        return self.copy.tolist()


def choose_device(name, local_rank=0):
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. Raises ValueError if it is not available."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
                 "cpu": True}
    check_choice("device", name, ("auto", *available))
    here = [kind for kind, is_available in available.items() if is_available]
    name = here[0] if name == "auto" else name
    if name not in here:
        raise ValueError(f"device={name} is not available; this machine has {', '.join(here)}: "
                         "use --device=auto")
    if name != "cuda":
        return torch.device(name)
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"process {local_rank} has no GPU of its own; this machine has "
                         f"{torch.cuda.device_count()}: start as many processes (--nproc_per_node)")
    return torch.device("cuda", local_rank)


def choose_dtype(name, device):
    """'auto' -> the fastest sound precision of the matmuls: bfloat16 where it is faster."""
    if name != "auto":
        return name
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bf16 else "float16"
    if device.type == "mps" or not torch.backends.mkldnn.is_available():
        return "float32"
    return "bfloat16" if bf16_speedup() > 1.3 else "float32"


def bf16_speedup(size=768, repeats=5):
    """How much faster this CPU multiplies bfloat16 than float32: 2 on some, 0.5 on others."""
    def seconds(dtype):
        a = torch.ones(size, size, dtype=dtype)
        return min(timeit.repeat(lambda: a @ a, number=1, repeat=repeats))

    return seconds(torch.float32) / seconds(torch.bfloat16)


def keep_memory():
    """Let the C library keep freed memory. A training step frees and takes the same gigabyte again
    and again, and fresh pages from the system cost more than the arithmetic on them. Linux with
    glibc only; elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def parallelize(model, runtime):
    """Move the model to the device, compile its blocks, share it; returns what to call."""
    model.to(runtime.device)
    blocks = [block for part in model.modules() for block in getattr(part, "blocks", ())]
    if runtime.compile:
        for block in blocks:
            block.compile()
    if runtime.parallel == "ddp":
        ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(
            model, device_ids=ids, forward_sync_buffers=False, gradient_as_bucket_view=True)
    if runtime.is_sharded:
        shard(model, blocks, runtime)
    return model


def shard(model, blocks, runtime):
    """FSDP2: each rank keeps a slice of every block and of the rest."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    shape = (runtime.world,)
    if runtime.parallel == "hybrid":  # slices within a node, whole copies on every node
        local = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world))
        shape = (runtime.world // local, local)
    names = ("nodes", "ranks")[-len(shape):]
    mesh = init_device_mesh(runtime.device.type, shape, mesh_dim_names=names)
    param_dtype = None if runtime.dtype == torch.float32 else runtime.dtype
    policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32,
                                  cast_forward_inputs=False)
    for part in (*blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)


@contextlib.contextmanager
def sync_gradients(model, runtime, is_last):
    """Exchange gradients only in the backward pass of a step's last micro-batch."""
    if runtime.is_sharded:
        model.set_requires_gradient_sync(is_last)
    skip = runtime.parallel == "ddp" and not is_last
    with model.no_sync() if skip else contextlib.nullcontext():
        yield


def clip_gradients(parameters, limit, runtime):
    """Scale gradients down to a global norm of at most `limit`; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    return norm.full_tensor() if runtime.is_sharded else norm
