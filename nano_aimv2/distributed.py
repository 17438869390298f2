"""Distributed: one process or many, on whatever device there is, by the same calls.

`torchrun` tells each process its place in environment variables; without it there is one process. Every rank holds the
model (DDP) or a slice of it (FSDP2), works on its rows of the global batch, and gradients are *summed*: the losses are
divided by counts that were summed over all ranks first (losses.py), so the split never shows.

Lesson: 08.
"""

import contextlib
import ctypes
import os
import sys
import time
from dataclasses import dataclass
from datetime import timedelta
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import nn

TIMEOUT_MINUTES = 10  # a rank that does not answer for so long ends the run


@dataclass(frozen=True)
class Runtime:
    """Where this process stands and what it computes on."""

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
    def is_sharded(self):
        """Each rank holds a slice of the weights only."""
        return self.parallel in ("fsdp", "hybrid")

    def autocast(self):
        """Matmuls in `dtype`, everything that needs it in float32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype != torch.float32)

    def sum(self, *values):
        """Numbers summed over all ranks, as a list of floats. Numbers of the CPU are summed there: no GPU is waited for."""
        if self.world == 1:
            return [float(v) for v in values]
        total = torch.tensor([float(v) for v in values], dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def barrier(self):
        if self.world > 1:
            dist.barrier()


def start(device="auto", dtype="auto", parallel="auto", compile="auto"):
    """Join the other processes, choose device and precision. Raises ValueError if the machine has not what is asked for."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = choose_device(device, local_rank)
    if device.type == "cpu":
        keep_memory()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    if world > 1:
        backends = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        timeout = timedelta(minutes=TIMEOUT_MINUTES)
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        store = dist.PrefixStore(name_of_start(store, rank, world), store)
        dist.init_process_group(backends, store=store, rank=rank, world_size=world, timeout=timeout)
    if parallel == "auto":
        parallel = "ddp" if world > 1 else "none"
    elif parallel == "none" and world > 1:
        raise ValueError(f"parallel=none with {world} processes would train {world} models: use --parallel=ddp, fsdp or hybrid")
    elif parallel != "none" and world == 1:
        parallel = "none"  # one process has nobody to share with
    dtype = getattr(torch, choose_dtype(dtype, device))
    compiled = device.type == "cuda" if compile == "auto" else compile == "true"
    if compiled and sys.platform == "win32":
        print("torch.compile needs a compiler that Windows does not have: running without it")
        compiled = False
    return Runtime(rank, world, device, dtype, parallel, compiled)


def alone(device="cpu"):
    """The Runtime of one process that computes in float32 and compiles nothing: to measure a finished run."""
    return Runtime(0, 1, torch.device(device), torch.float32, "none", False)


def name_of_start(store, rank, world):
    """A name for what the ranks write into `store` (torch.distributed's) in this start; every rank gets the same.

    After `torchrun --max-restarts` brings ranks back, torchrun's store still holds the addresses of those that died
    (pytorch issue 135712), and a rank that reads one finds nobody there. So rank 0 draws a name and hands it to each other
    rank under the nonce which that rank drew now: no answer of an earlier start fits.
    """
    mine = uuid4().hex
    store.set(f"nonce of {rank}", mine)
    if rank:
        name = store.get(f"name for {mine}").decode()  # waits for it
        store.set(f"{name} came to {rank}", "")
        return name
    for other in range(1, world):
        while not store.check([f"{mine} came to {other}"]):
            store.set(f"name for {store.get(f'nonce of {other}').decode()}", mine)
            time.sleep(0.01)
    return mine


def stop():
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(failure=None):
    """End this process, after `stop`: with code 0, or with the words `failure` on stderr and code 1.

    A rank of several goes without the interpreter's farewell: after FSDP2 over gloo on a busy CPU, one run in about thirty
    aborted there ("terminate called without an active exception"), and torchrun took a finished run for a failed one.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(failure)
    if failure:
        print(failure, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if failure else 0)


class ReadLater:
    """Numbers of the device, copied now and read a step later, when they have long come: reading them stops nothing."""

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
    """'auto', 'cpu', 'cuda' or 'mps' -> torch.device. Raises ValueError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        raise ValueError(f"device={name} is not there; this machine has {', '.join(k for k, v in there.items() if v)}: "
                         "use --device=auto")
    if name == "cuda" and local_rank >= torch.cuda.device_count():
        raise ValueError(f"process {local_rank} has no GPU of its own; this machine has {torch.cuda.device_count()}: "
                         "start as many processes (--nproc_per_node)")
    return torch.device(name, local_rank) if name == "cuda" else torch.device(name)


def choose_dtype(name, device):
    """'auto' -> the fastest sound precision of the matmuls: bfloat16 where the hardware multiplies it faster."""
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "mps" or not torch.backends.mkldnn.is_available():
        return "float32"
    return "bfloat16" if bf16_speedup() > 1.3 else "float32"


def bf16_speedup(size=768, repeats=5):
    """How much faster this CPU multiplies bfloat16 than float32 matrices: 2 on some, 0.5 on others, so it is measured."""
    best = []
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(size, size, dtype=dtype)
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            torch.mm(a, a)
            times.append(time.perf_counter() - begin)
        best.append(min(times))
    return best[0] / best[1]


def keep_memory():
    """Have the C library keep freed memory: a training step frees and takes the same gigabyte again and again, and
    fresh pages from the system cost more than the arithmetic on them. Linux with glibc only; elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def parallelize(model, runtime):
    """Move the model to the device, compile its blocks, share it between the ranks; returns what to call."""
    model.to(runtime.device)
    blocks = [block for part in model.modules() for block in getattr(part, "blocks", ())]  # of its trunks
    if runtime.compile:
        for block in blocks:
            block.compile()
    if runtime.parallel == "ddp":
        ids = [runtime.device.index] if runtime.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    if runtime.is_sharded:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        shape = (runtime.world,)
        if runtime.parallel == "hybrid":  # slices within a node, whole copies on every node
            local = int(os.environ.get("LOCAL_WORLD_SIZE", runtime.world))
            shape = (runtime.world // local, local)
        mesh = init_device_mesh(runtime.device.type, shape, mesh_dim_names=("nodes", "ranks")[-len(shape):])
        param_dtype = None if runtime.dtype == torch.float32 else runtime.dtype
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
        for part in (*blocks, model):
            fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


@contextlib.contextmanager
def sync_gradients(model, runtime, is_last):
    """Exchange gradients only in the backward pass of a step's last micro-batch."""
    if runtime.is_sharded:
        model.set_requires_gradient_sync(is_last)
    with model.no_sync() if runtime.parallel == "ddp" and not is_last else contextlib.nullcontext():
        yield
