"""Lab: everything that measures, compares or draws, as `python -m nano_aimv2.lab.NAME`."""
