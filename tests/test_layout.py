"""The house: who may import whom, and what the README promises."""

import ast
import re
from pathlib import Path

from conftest import ROOT

LAYERS = [
    ["config", "patchify", "prefix_mask", "positions", "layers", "tokenizer", "optim", "distributed", "metrics", "plots",
     "images", "shards", "native_res", "loader", "heads"],
    ["encoder", "decoder", "losses", "data"],
    ["model", "hub"],
    ["generate", "evaluate", "checkpoint", "encode"],
    ["probe", "contrastive"],
    ["bench", "study", "budget"],
]
RANK = {name: i for i, layer in enumerate(LAYERS) for name in layer}
PACKAGES = {"torch", "numpy", "tiktoken", "PIL", "matplotlib", "tqdm", "safetensors", "nano_aimv2"}
OPTIONAL = {("hub", "huggingface_hub"), ("bench", "transformers")}  # inside a function, with a plain word where it is absent


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module == "nano_aimv2":
                yield from (f"nano_aimv2.{alias.name}" for alias in node.names)
            else:
                yield node.module


def test_a_file_imports_only_from_layers_above_it():
    files = [p for p in (ROOT / "nano_aimv2").glob("*.py") if p.stem != "__init__"]
    assert len(files) > 15
    for path in files:
        for name in imports(path):
            if name.startswith("nano_aimv2."):
                other = name.split(".")[1]
                # generate, checkpoint and evaluate stand on one row and in this order
                down = RANK[other] < RANK[path.stem] or (path.stem == "evaluate" and other in ("generate", "checkpoint"))
                assert down, f"{path.stem} imports {other}"


def test_the_package_needs_nothing_beyond_its_requirements():
    import sys

    for path in [*(ROOT / "nano_aimv2").glob("*.py"), ROOT / "train.py", ROOT / "sample.py"]:
        for name in imports(path):
            top = name.split(".")[0]
            if (path.stem, top) in OPTIONAL:
                continue
            assert top in PACKAGES or top in sys.stdlib_module_names or top in ("data", "sample"), f"{path.name} imports {name}"


def test_matplotlib_is_imported_by_plots_alone():
    users = {p.stem for p in (ROOT / "nano_aimv2").glob("*.py") if any("matplotlib" in name for name in imports(p))}
    assert users == {"plots"}


def test_every_file_says_what_it_is():
    for path in [*(ROOT / "nano_aimv2").glob("*.py"), *(ROOT / "data").glob("*.py"), ROOT / "train.py", ROOT / "sample.py"]:
        assert ast.get_docstring(ast.parse(path.read_text())), path


def test_the_readme_maps_every_file():
    text = (ROOT / "README.md").read_text()
    for path in [*(ROOT / "nano_aimv2").glob("*.py"), *(ROOT / "data").glob("*.py")]:
        if path.stem != "__init__":
            assert path.name in text, f"README does not name {path.name}"


def test_ci_runs_the_command_of_the_readme():
    command = (ROOT / ".ci/run").read_text().strip().splitlines()[-1]
    assert "pytest" in command and command in (ROOT / "README.md").read_text().splitlines()


def test_the_readmes_links_and_pictures_exist():
    for document in ROOT.glob("*.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
            if not target.startswith("http"):
                assert (Path(document.parent) / target).exists(), f"{document.name} points to {target}"
