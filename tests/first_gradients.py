"""The gradients of a run's first step, as train.py's own loop has them when the optimizer steps.

    torchrun --nproc_per_node=2 tests/first_gradients.py OUT.safetensors [--key=value ...]

The first rank saves them, gathered from all ranks; then all ranks leave.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import save_file  # noqa: E402

import train  # noqa: E402
from nano_aimv2.training import distributed  # noqa: E402
from nano_aimv2.training.optim import make_optimizer  # noqa: E402


class Saved(Exception):
    """The gradients are saved: nothing is left to do."""


def main(out, flags):
    def make_and_watch(model, *settings):
        optimizer = make_optimizer(model, *settings)
        optimizer.register_step_pre_hook(lambda *_: save_gradients(model, out))
        return optimizer

    train.make_optimizer = make_and_watch
    try:
        train.main([*flags, "--clip_grad=1e9", f"--run_dir={out}.run"])
    except Saved:
        return
    raise AssertionError("the run ended without a step")


def save_gradients(model, out):
    gradients = {}
    for name, p in model.named_parameters():
        whole = p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad  # under FSDP2
        gradients[name] = whole.clone()
    if int(os.environ.get("RANK", 0)) == 0:
        save_file(gradients, out)
    raise Saved


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
    distributed.stop()
    distributed.leave()
