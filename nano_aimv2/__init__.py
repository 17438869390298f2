"""nano_aimv2: AIMv2 pre-training (arXiv 2411.14402), one file per concept.

    from nano_aimv2 import AIMv2, Config, load_model, load_encoder, save_encoder, caption, complete

The method lies in this folder; `data/` feeds it, `training/` runs it, `lab/` examines it. Start at
`train.py` or `lessons/`. The names above are imported when they are first used, so that
`import nano_aimv2` is quick.
"""

import importlib

HOME = {"Config": "config", "AIMv2": "model", "load_encoder": "hub", "save_encoder": "hub",
        "caption": "generate", "complete": "generate", "load_model": "training.checkpoint"}
__all__ = list(HOME)


def __getattr__(name):
    if name not in HOME:
        raise AttributeError(f"module 'nano_aimv2' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nano_aimv2.{HOME[name]}"), name)
