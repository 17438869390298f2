"""nano_aimv2: AIMv2 pre-training (arXiv 2411.14402), one file per concept. Start at `train.py` or `lessons/`."""
