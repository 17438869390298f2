"""The documents: every command that they show is one that its script understands."""

import importlib
import re
import shlex
from pathlib import Path

import pytest
from helpers import ROOT

from nano_aimv2 import config, flags

SCRIPTS = {"train.py": "train", "sample.py": "sample", "data/pack.py": "data.pack",
           "data/scenes.py": "data.scenes", "data/train_tokenizer.py": "data.train_tokenizer"}
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "data/README.md",
             *sorted((ROOT / "lessons").glob("**/*.md")), ROOT / "train.py", ROOT / "sample.py",
             *sorted((ROOT / "nano_aimv2").glob("**/*.py")), *sorted((ROOT / "data").glob("*.py")),
             ROOT / ".github/workflows/ci.yml"]


class Understood(Exception):
    """Raised behind the reading of a command line, before anything is done."""


def commands(path):
    """The command lines of ours that a document shows: [(module, [words behind the script])]."""
    text = path.read_text(encoding="utf-8").replace("\\\\\n", " ").replace("\\\n", " ")
    for line in text.splitlines():
        for part in line.split("&&"):
            found = re.match(r"[`\s]*(?:- run: )?(?:\$ )?(?:(?:[\w./-]*python|torchrun)\b.*?) "
                             r"(-m nano_aimv2\.lab\.\w+|[\w./-]*\w+\.py)(?: (.*))?$", part)
            if not found or found[2] is None:
                continue
            script = found[1].removeprefix("-m ")
            module = SCRIPTS.get(script, script if script.startswith("nano_aimv2.lab.") else None)
            rest = re.split(r"`|  +#|\s#|  +\(", found[2])[0]
            if module and "..." not in rest:
                yield module, shlex.split(rest)


SHOWN = [(path, module, words) for path in DOCUMENTS for module, words in commands(path)]


def test_the_documents_show_every_script():
    lab = {f"nano_aimv2.lab.{path.stem}" for path in (ROOT / "nano_aimv2/lab").glob("*.py")
           if "run_command(main)" in path.read_text()}
    missing = {*SCRIPTS.values(), *lab} - {module for _, module, _ in SHOWN}
    assert not missing and len(SHOWN) > 60, (missing, len(SHOWN))


@pytest.mark.parametrize("path, module, words", [
    pytest.param(*shown, id=f"{Path(shown[0]).name}: {shown[1]} {' '.join(shown[2])}"[:90])
    for shown in SHOWN])
def test_a_command_of_the_documents_is_understood(path, module, words, monkeypatch):
    def read(*args, **kwargs):
        given = flags.read_flags(*args, **kwargs)
        raise Understood(given)

    command = importlib.import_module(module)
    monkeypatch.setattr(config, "read_flags", read)
    monkeypatch.setattr(command, "read_flags", read, raising=False)
    with pytest.raises((Understood, SystemExit)):  # SystemExit: --help
        command.main([word.rstrip(",;") for word in words])
