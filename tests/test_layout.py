"""The house: rooms and who may import whom, sizes, words, and what the documents promise."""

import ast
import importlib.util
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
from helpers import ROOT, run_script

PACKAGE = ROOT / "nano_aimv2"
# From the bottom up. A file imports from the rooms below its own, and from its own room only what
# stands before it here.
ROOMS = {
    "method": "files flags config patchify prefix_mask positions layers encoder decoder losses "
              "patch_sampler model native_res generate hub",
    "data": "tokenizer images tar_index shards mixture batches",
    "training": "optim distributed metrics checkpoint init evaluate",
    "lab": "plots budget drawn heads encode probe contrastive search sizes claims pixels study "
           "bench doctor",
}
LAB_OF_SCRIPTS = {"train": {"nano_aimv2.lab.plots", "nano_aimv2.lab.budget", "data.scenes"},
                  "sample": {"nano_aimv2.lab.plots", "data.scenes"}}
LIBRARIES = {"torch", "numpy", "tiktoken", "PIL", "matplotlib", "tqdm", "safetensors"}
OPTIONAL = {("hub", "huggingface_hub"), ("bench", "transformers")}  # in a function that says so
# What STYLE.md replaces by the words that readers search for.
AVOIDED = ("how-manieth", "passed over", "farewell", "nats a token", "images a step",
           "cannot be told")


def module_name(room, stem):
    return f"nano_aimv2.{stem}" if room == "method" else f"nano_aimv2.{room}.{stem}"


ORDER = [module_name(room, stem) for room, stems in ROOMS.items() for stem in stems.split()]
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
DATA_SCRIPTS = sorted((ROOT / "data").glob("[a-z]*.py"))
MODULES = {module_name(room, stem): PACKAGE / ("" if room == "method" else room) / f"{stem}.py"
           for room, stems in ROOMS.items() for stem in stems.split()}
CODE = [*MODULES.values(), *SCRIPTS, *DATA_SCRIPTS]
TESTS = sorted((ROOT / "tests").glob("*.py"))
LESSON_FILES = sorted((ROOT / "lessons").glob("*.py"))
DOCUMENTS = [*sorted(ROOT.glob("*.md")), ROOT / "data/README.md",
             *sorted((ROOT / "lessons").glob("**/*.md"))]


def read(path):
    return path.read_text(encoding="utf-8")


def imports(path):
    """The modules that a file imports, inside functions too."""
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            if (ROOT / node.module.replace(".", "/") / "__init__.py").exists():  # a package
                yield from (f"{node.module}.{alias.name}" for alias in node.names)
            else:
                yield node.module


def functions(path):
    """[(function, whether it stands at the top of the file)] of a file."""
    tree = ast.parse(read(path))
    found = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    return [(node, node in tree.body) for node in found]


def missing_targets(text, folder):
    """What the links and images of a Markdown text point to in vain, seen from a folder."""
    targets = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text)
    return [target for target in targets if not target.startswith(("http", "mailto:"))
            and not (folder / target).exists()]


def num_lines(paths):
    return sum(len(read(path).splitlines()) for path in paths)


# Rooms


def test_every_file_has_its_place_in_a_room():
    found = {path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    assert found == set(MODULES.values())


@pytest.mark.parametrize("name", ORDER)
def test_a_file_imports_only_from_rooms_below_and_files_before_it(name):
    for other in imports(MODULES[name]):
        if other.split(".")[0] == "nano_aimv2":
            assert other in ORDER, f"{name} imports {other}, which stands in no room"
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"


def test_train_and_sample_import_little_of_the_lab():
    for path in SCRIPTS:
        above = {name for name in imports(path)
                 if name.startswith("nano_aimv2.lab") or name.split(".")[0] in ("data", "sample")}
        assert above <= LAB_OF_SCRIPTS[path.stem], f"{path.name} imports {above}"


def test_scripts_that_make_data_need_only_the_method_and_the_data_room():
    for path in DATA_SCRIPTS:
        for name in imports(path):
            assert not name.startswith(("nano_aimv2.training", "nano_aimv2.lab")), (path, name)


def test_the_package_needs_nothing_beyond_its_requirements():
    for path in [*MODULES.values(), *SCRIPTS]:
        for name in imports(path):
            top = name.split(".")[0]
            is_ours = top == "nano_aimv2" or (path in SCRIPTS and top == "data")
            known = is_ours or top in LIBRARIES or top in sys.stdlib_module_names
            assert known or (path.stem, top) in OPTIONAL, f"{path.name} imports {name}"


def test_matplotlib_is_imported_by_plots_alone():
    users = {path.stem for path in CODE
             if any(name.split(".")[0] == "matplotlib" for name in imports(path))}
    assert users == {"plots"}


# Sizes


@pytest.mark.parametrize("path", [*CODE, *LESSON_FILES, *TESTS],
                         ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_end_by_column_100_and_functions_fit_on_a_screen(path):
    long = [i for i, line in enumerate(read(path).splitlines(), 1) if len(line) > 100]
    assert not long, f"lines {long} go beyond column 100"
    for node, _ in functions(path):
        length = node.end_lineno - node.lineno + 1
        assert length <= 50 or node.name == "main", f"{node.name} has {length} lines"


def test_the_house_stays_small():
    """Lines with docstrings, comments and blanks. An addition says which file it makes
    unnecessary."""
    method = list(PACKAGE.glob("*.py"))
    core = [*method, *SCRIPTS]
    core += [*(PACKAGE / "data").glob("*.py"), *(PACKAGE / "training").glob("*.py")]
    found = {"method": num_lines(method), "core": num_lines(core),
             "lab": num_lines((PACKAGE / "lab").glob("*.py")), "train.py": num_lines(SCRIPTS[:1])}
    limits = {"method": 2050, "core": 5070, "lab": 3950, "train.py": 200}
    assert all(found[part] <= limits[part] for part in limits), f"{found} lines, at most {limits}"


def test_main_of_train_reads_as_a_page():
    (main,) = (node for node, _ in functions(ROOT / "train.py") if node.name == "main")
    assert main.end_lineno - main.lineno + 1 <= 91


# Words and names


def test_every_file_says_what_it_is():
    for path in [*CODE, *LESSON_FILES, *TESTS, *PACKAGE.rglob("__init__.py")]:
        assert ast.get_docstring(ast.parse(read(path))), path


def test_no_two_public_functions_have_one_name():
    homes = defaultdict(list)
    for path in CODE:
        for node, at_top in functions(path):
            if at_top and not node.name.startswith("_") and node.name != "main":
                homes[node.name].append(str(path.relative_to(ROOT)))
    twice = {name: paths for name, paths in homes.items() if len(paths) > 1}
    assert not twice


@pytest.mark.parametrize("path", [
    *CODE, *LESSON_FILES, *(path for path in TESTS if path.name != "test_layout.py"),
    ROOT / "README.md", ROOT / "data/README.md", ROOT / "CONTRIBUTING.md", ROOT / "LOG.md",
], ids=lambda path: str(path.relative_to(ROOT)))
def test_words_are_those_that_readers_search_for(path):
    text = re.sub(r"[\s#]+", " ", read(path)).lower()
    for word in AVOIDED:
        assert word not in text.replace(f"not {word}", ""), f"{path.name} says {word!r}"


# Documents


def test_the_readme_maps_every_file_in_at_most_14_kb():
    text = read(ROOT / "README.md")
    assert len(text.encode()) <= 14 * 1024, f"README.md has {len(text.encode())} bytes"
    for path in CODE:
        assert path.stem in re.findall(r"\w+", text), f"README.md does not name {path.name}"


def test_ci_runs_the_command_of_the_readme():
    command = read(ROOT / ".ci/run").strip().splitlines()[-1]
    assert "pytest" in command and command in read(ROOT / "README.md").splitlines()
    assert ".ci/run" in read(ROOT / ".github/workflows/ci.yml")


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_images_exist(path):
    missing = missing_targets(read(path), path.parent)
    assert not missing, f"{path.name} points to {missing}"


@pytest.mark.slow
def test_the_python_of_the_readme_runs(trained, tmp_path):
    """In a folder with a finished run, runs/toy, and a photograph, cat.jpg."""
    blocks = re.findall(r"(?ms)^```python\n(.*?)^```", read(ROOT / "README.md"))
    assert blocks, "README.md shows no Python"
    shutil.copytree(trained[0], tmp_path / "runs/toy")
    shutil.copy(ROOT / "lessons/figures/toy_samples.png", tmp_path / "cat.jpg")
    run_python("\n".join(blocks), tmp_path, ROOT)


# The package from elsewhere


def run_python(code, cwd, path):
    """Run code in the folder `cwd`, with the package found in `path`."""
    return run_script("-c", code, cwd=cwd, env={"PYTHONPATH": str(path)}).stdout


def test_the_bare_import_is_quick_and_names_what_it_offers(tmp_path):
    run_python("import sys, nano_aimv2\n"
               "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
               "assert {'Config', 'load_model'} <= set(nano_aimv2.__all__)\n"
               "try:\n    nano_aimv2.nothing\n"
               "except AttributeError as error:\n    assert 'nothing' in str(error)\n"
               "else:\n    raise AssertionError\n", tmp_path, ROOT)


def test_the_package_works_from_any_folder(trained, tmp_path):
    out = run_python(
        "from nano_aimv2 import (AIMv2, Config, caption, complete, load_encoder, load_model,\n"
        "                        save_encoder)\n"
        f"model, config, tokenizer = load_model({str(trained[0])!r})\n"
        "assert isinstance(model, AIMv2) and isinstance(config, Config)\n"
        "assert Config.from_preset('toy', steps=100).steps == 100\n"
        "from nano_aimv2.data.tokenizer import Tokenizer\n"
        "for each in (tokenizer, Tokenizer('toy.tiktoken')):\n"
        "    print(each.encode('a red ring', 9))\n", tmp_path, ROOT)
    own, shipped = out.splitlines()
    assert own == shipped


@pytest.mark.slow
@pytest.mark.skipif(not all(map(importlib.util.find_spec, ("pip", "setuptools"))),
                    reason="pip or setuptools is not installed here, and without a network they "
                           "cannot be fetched")
@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"),
                    reason="asks git which files belong to the project")
def test_pip_installs_the_package_and_nothing_else(tmp_path):
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (tmp_path / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / "copy" / name)
    target = tmp_path / "target"
    run_script("-m", "pip", "install", "--no-index", "--no-deps", "--no-build-isolation",
               "--disable-pip-version-check", "--target", target, ".", cwd=tmp_path / "copy")
    version = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]["version"]
    installed = sorted(path.name for path in target.iterdir())
    assert installed == ["nano_aimv2", f"nano_aimv2-{version}.dist-info"]
    out = run_python(
        "import nano_aimv2\n"
        "from nano_aimv2 import AIMv2, Config, caption, complete, load_encoder, load_model\n"
        "from nano_aimv2.data.tokenizer import Tokenizer\n"
        "from nano_aimv2.lab import bench, encode, probe\n"
        "assert Tokenizer('toy.tiktoken').encode('a red ring', 9)\n"
        "AIMv2(Config.from_preset('toy'))\n"
        "print(nano_aimv2.__file__)\n", tmp_path, target)
    assert Path(out.strip()).is_relative_to(target)


def test_requirements_lie_within_the_ranges_of_pyproject():
    project = tomllib.loads(read(ROOT / "pyproject.toml"))["project"]
    ranges = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
    bounds = dict(re.fullmatch(r"([\w-]+)>=([\d.]+),<\d+", line).groups() for line in ranges)
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)", read(ROOT / "requirements.txt"), re.MULTILINE))
    assert pins.keys() == bounds.keys()
    for name, version in pins.items():
        assert version.startswith(bounds[name]), f"{name}: {version} and >={bounds[name]}"
