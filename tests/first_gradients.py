"""The gradients of a run's first step, by train.py's own pieces, gathered from all ranks and saved by the first of them.

    torchrun --nproc_per_node=2 -- tests/first_gradients.py OUT.safetensors [--key=value ...]
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from nano_aimv2 import distributed  # noqa: E402
from nano_aimv2.config import Config  # noqa: E402
from nano_aimv2.data import TrainingData  # noqa: E402
from nano_aimv2.model import AIMv2  # noqa: E402
from nano_aimv2.prefix_mask import step_prefix_len  # noqa: E402
from nano_aimv2.tokenizer import Tokenizer  # noqa: E402
from train import backward, count_targets  # noqa: E402

config = Config.from_flags(sys.argv[2:])
runtime = distributed.start(config.device, config.dtype, config.parallel, config.compile)
data = TrainingData(config, Tokenizer(config.tokenizer), runtime.rank, runtime.world)
torch.manual_seed(config.seed)
model = AIMv2(config)
trained = distributed.parallelize(model, runtime)
batches = [data[k] for k in range(config.grad_accum)]
prefixes = [step_prefix_len(b.grid.prod(dim=1), config.seed, 0, b.rows, b.global_size) for b in batches]
counts = count_targets(batches, prefixes)
total_counts = runtime.sum(*(sum(c) for c in zip(*counts, strict=True)))
scaler = torch.amp.GradScaler(runtime.device.type, enabled=False)
backward(trained, batches, prefixes, counts, total_counts, config, runtime, scaler)
gradients = {name: (p.grad.full_tensor() if runtime.is_sharded else p.grad).clone() for name, p in model.named_parameters()}
if runtime.is_main:
    save_file(gradients, sys.argv[1])
runtime.barrier()
distributed.stop()
distributed.leave()
