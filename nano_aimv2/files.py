"""Files: what this project writes appears whole under its name, or not at all.

A kill or a full disk in the middle of a write must never leave half a checkpoint where a whole one
stood. So everything is written under a temporary name beside its final one, and renamed at the end.
"""

import contextlib
import os
import shutil
from pathlib import Path


@contextlib.contextmanager
def replacing(path):
    """Write a file, or a new folder, that appears under `path` only when the block ends well.

    Yields: the temporary path to write to; it is removed if the block fails.
    Raises: OSError if the disk refuses, or if `path` is a folder that is not empty.

        with replacing("runs/toy/model.safetensors") as temporary:
            save_file(weights, temporary)
    """
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    remove(temporary)  # left by a killed process of the same number
    try:
        yield temporary
        if temporary.is_file():  # some libraries write files that only their owner can read
            os.chmod(temporary, 0o666 & ~default_umask())
        os.replace(temporary, path)
    finally:
        remove(temporary)


def write_text(path, text):
    """Replace a text file (UTF-8) as a whole."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove(path):
    """Delete a file or a folder if it is there."""
    if Path(path).is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            os.remove(path)


def is_lfs_pointer(path):
    """Whether a file is a Git LFS pointer: three lines of text in place of a large file."""
    with open(path, "rb") as file:
        return file.read(24) == b"version https://git-lfs."


def default_umask():
    """The permission bits that new files of this process do not get."""
    mask = os.umask(0)  # it can only be read by setting it
    os.umask(mask)
    return mask
