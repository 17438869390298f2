"""The lessons: every notebook runs from a clean kernel with its exercises solved, and reads well as
it is committed; train.py is quoted whole; the helper and the model that comes with them."""

import ast
import asyncio
import json
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from helpers import ROOT, environment
from nbclient import NotebookClient
from test_layout import AVOIDED, CODE, missing_targets

from nano_aimv2.data.batches import pad_patches
from nano_aimv2.generate import caption

sys.path.insert(0, str(ROOT / "lessons"))
import helper  # noqa: E402

FOLDER = ROOT / "lessons"
LESSONS = sorted(FOLDER.glob("*.ipynb"))
SOLUTION = re.compile(r"<summary>Solution</summary>(.*?)</details>", re.DOTALL)
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|tmp|work|root|Users)/|ipykernel_")

each_lesson = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def read_lesson(path):
    return nbformat.read(path, as_version=4)


def exercises(notebook):
    """[(code of the solution or None, cell to change, check cell)]: a question with its folded
    solution is followed by a cell to change and a check. One on paper has no code."""
    found, cells = [], notebook.cells
    for i, cell in enumerate(cells):
        match = SOLUTION.search(cell.source) if cell.cell_type == "markdown" else None
        if match:
            code = re.search(r"```python\n(.*?)```", match[1], re.DOTALL)
            found.append((code[1], cells[i + 1], cells[i + 2]) if code else (None, None, None))
    return found


def checked(notebook):
    return [exercise for exercise in exercises(notebook) if exercise[0]]


def printed(cell):
    return "".join(output.text for output in cell.outputs
                   if output.output_type == "stream" and output.name == "stdout")


def without_images(output):
    """The text of a cell's output: images are bytes in which any path could turn up by chance."""
    data = {kind: value for kind, value in output.get("data", {}).items() if kind != "image/png"}
    return json.dumps(data) + output.get("text", "")


def run_lesson(path):
    """The notebook of a lesson with its exercises solved, executed in a clean kernel."""
    notebook = read_lesson(path)
    found = checked(notebook)
    for solution, stub, _ in found:
        assert stub.cell_type == "code", f"no cell to change: {stub.source!r}"
        stub.source = solution
    client = NotebookClient(notebook, timeout=120, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}})
    asyncio.run(client.async_execute(env=environment()))
    return [printed(check).strip() for _, _, check in found]


@pytest.fixture(scope="module")
def running(request):
    """{lesson: future of `run_lesson`} of those asked for: two at a time, with one thread each, the
    last first, which take longest."""
    asked = [item.callspec.params["path"] for item in request.session.items
             if item.name.startswith("test_a_lesson_runs")]
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run_lesson, path) for path in reversed(asked)}


@pytest.mark.slow
@each_lesson
def test_a_lesson_runs_from_a_clean_kernel_and_its_solutions_are_right(path, running):
    for i, check in enumerate(running[path].result(), 1):
        assert check.endswith("right"), f"checked exercise {i} prints {check!r}"


@each_lesson
def test_a_committed_lesson_is_executed_and_free_of_noise(path):
    notebook = read_lesson(path)
    assert notebook.metadata.kernelspec.name == "python3"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    counts = [cell.execution_count for cell in code]
    assert counts == list(range(1, len(code) + 1)), "not executed once from top to bottom"
    for cell in code:
        for output in cell.outputs:
            is_noise = output.output_type == "error" or output.get("name") == "stderr"
            assert not is_noise, f"{cell.source!r} prints {output}"
            text = without_images(output)
            assert not MACHINE_PATH.search(text), f"a path of a machine: {text}"
    assert path.stat().st_size < 500_000, f"{path.stat().st_size} bytes"


@each_lesson
def test_a_code_cell_fits_on_a_glance(path):
    for cell in read_lesson(path).cells:
        if cell.cell_type == "code":
            lines = cell.source.splitlines()
            assert len(lines) <= 12, f"{len(lines)} lines:\n{cell.source}"
            assert max(map(len, lines)) <= 100, f"a line beyond column 100:\n{cell.source}"


@each_lesson
def test_exercises_are_of_several_kinds_and_their_checks_say_what_is_off(path):
    notebook = read_lesson(path)
    found = exercises(notebook)
    assert len(found) >= 3, f"{len(found)} exercises"
    is_stub = [code is not None and "..." in stub.source for code, stub, _ in found]
    assert not all(is_stub), "all exercises are stubs"
    for _, stub, check in checked(notebook):
        assert printed(check).strip().startswith("not solved yet"), (stub.source, printed(check))
        for node in ast.walk(ast.parse(check.source)):
            if isinstance(node, ast.Assert):
                assert node.msg, f"says nothing when it fails: {ast.unparse(node)}"


@each_lesson
def test_a_lesson_says_where_it_stands(path):
    """The map, what it needs and gives, the minutes, its neighbours, and its line in the table."""
    notebook = read_lesson(path)
    number, index = path.stem[:2], LESSONS.index(path)
    code = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert "from helper import" in code.source and f'start("{number}")' in code.source
    first, last = notebook.cells[0].source, notebook.cells[-1].source
    assert first.startswith(f"# {number} · ")
    for words in ("You need", "You get", "minutes"):
        assert words in first, f"the first cell does not say {words!r}"
    for neighbour in LESSONS[max(0, index - 1) : index + 2]:
        assert neighbour == path or f"({neighbour.name})" in last, f"no link to {neighbour.name}"
    assert f"]({path.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")


def reading_minutes(notebook):
    """200 words, 12 lines of code or 3 figures per minute, and 3 minutes per exercise."""
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    outputs = [output.get("data", {}) for cell in code for output in cell.outputs]
    lines = [cell.source for cell in code] + [data.get("text/markdown", "") for data in outputs]
    num_lines = sum(bool(line.strip()) for part in lines for line in part.splitlines())
    words = re.sub(r"<details>.*?</details>", "", text, flags=re.DOTALL).split()
    figures = sum("image/png" in data for data in outputs)
    return len(words) / 200 + num_lines / 12 + figures / 3 + 3 * text.count("<summary>Solution")


@each_lesson
def test_the_minutes_of_a_lesson_follow_from_its_length(path):
    notebook = read_lesson(path)
    counted = reading_minutes(notebook)
    (stated,) = re.findall(r"Time: about (\d+) minutes", notebook.cells[0].source)
    row = next(line for line in (FOLDER / "README.md").read_text(encoding="utf-8").splitlines()
               if f"]({path.name})" in line)
    assert row.endswith(f"| {stated} |"), row
    assert abs(int(stated) - counted) <= 4, f"{stated} minutes stated, {counted:.0f} counted"


@each_lesson
def test_words_of_a_lesson_are_those_that_readers_search_for(path):
    text = " ".join(cell.source for cell in read_lesson(path).cells)
    for word in AVOIDED:
        assert word not in re.sub(r"\s+", " ", text).lower(), f"it says {word!r}"


@each_lesson
def test_links_of_a_lesson_exist(path):
    for cell in read_lesson(path).cells:
        if cell.cell_type == "markdown":
            missing = missing_targets(cell.source, FOLDER)
            assert not missing, f"points to {missing}"


@pytest.mark.parametrize("module", CODE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_names_its_lessons_and_they_explain_it(module):
    numbers = re.findall(r"(?m)Lessons?: ((?:\d\d(?:, | and )?)+)", ast.get_docstring(
        ast.parse(module.read_text(encoding="utf-8"))))
    for number in re.findall(r"\d\d", " ".join(numbers)):
        (path,) = FOLDER.glob(f"{number}_*.ipynb")
        text = " ".join(cell.source for cell in read_lesson(path).cells)
        name = str(module.relative_to(ROOT))
        assert f"({'../' + name})" in text, f"lesson {number} does not link to {name}"


def test_the_lesson_of_the_script_quotes_each_line_of_main():
    source = (ROOT / "train.py").read_text(encoding="utf-8")
    (main,) = (node for node in ast.parse(source).body if getattr(node, "name", "") == "main")
    lines = [line.strip() for line in source.splitlines()[main.lineno - 1 : main.end_lineno]]
    (path,) = FOLDER.glob("10_*.ipynb")
    blocks = [block for cell in read_lesson(path).cells if cell.cell_type == "markdown"
              for block in re.findall(r"```python\n(.*?)```", cell.source, re.DOTALL)]
    quoted = [line.strip() for block in blocks for line in block.splitlines()]
    at = 0
    for line in filter(None, lines):
        assert line in quoted[at:], f"train.py has {line!r}, and the lesson does not quote it there"
        at = quoted.index(line, at) + 1
    assert max(len(block.splitlines()) for block in blocks) <= 12, "a quoted block is too long"


# The helper, and the model that comes with the lessons


@pytest.fixture
def figure_of(monkeypatch):
    """figure_of(draw, *args): the figure that a function shows."""
    plt.switch_backend("agg")  # no window
    figures = []
    monkeypatch.setattr(plt, "show", lambda: figures.append(plt.gcf()))
    num_threads = torch.get_num_threads()

    def shown(draw, *args):
        draw(*args)
        plt.close(figures[-1])
        return figures[-1]

    with plt.rc_context():  # `start` sets style and threads for a whole notebook
        yield shown
    torch.set_num_threads(num_threads)


def test_the_map_shows_where_a_lesson_stands(figure_of):
    (axis,) = figure_of(helper.start, "04").axes
    blue = [text.get_text() for text in axis.texts if text.get_color() == "white"]
    assert blue == ["encoder\nlessons 03, 04"]
    stations = [text.get_text() for text in axis.texts if "lesson" in text.get_text()]
    assert len(stations) == len(axis.patches) == len(helper.MAP)
    named = set(re.findall(r"\d\d", " ".join(stations)))
    assert named == {path.stem[:2] for path in LESSONS} - {"00"}


def test_a_slider_draws_again_when_it_is_moved():
    plt.switch_backend("agg")
    drawn = []

    def draw(M, p=0.5, kind="b"):
        drawn.append((M, p, kind))
        plt.figure(figsize=(1, 1)).text(0, 0.5, f"{drawn[-1]}")
        plt.show()

    box = helper.box_of_controls(draw, dict(M=(1, 4), p=(0.0, 1.0), kind=["a", "b"]))
    M, p, kind, image = box.children
    before = bytes(image.value)
    assert drawn == [(2, 0.5, "b")] and before.startswith(b"\x89PNG")
    M.value, p.value, kind.value = 4, 0.3, "a"
    assert drawn[1:] == [(4, 0.5, "b"), (4, 0.3, "b"), (4, 0.3, "a")]
    assert bytes(image.value) != before and not plt.get_fignums()


def test_the_model_of_the_lessons_captions_scenes_it_has_never_seen():
    """In the precision in which it comes, bfloat16."""
    model, config, tokenizer = helper.the_model()
    assert (helper.TOY / "model.safetensors").stat().st_size < 9_000_000
    scenes = [helper.the_scene(index) for index in range(600, 664)]
    patches, grid = pad_patches([scene.pixels for scene in scenes], config.patch_size)
    found = [each.text for each in caption(model, patches, grid, tokenizer)]
    right = sum(text == scene.caption for text, scene in zip(found, scenes, strict=True))
    assert right >= 58, f"{right} of 64 captions are exact"


def test_shown_code_is_that_of_the_package_without_docstrings(monkeypatch):
    shown = []
    monkeypatch.setattr(helper, "display", lambda code: shown.append(code.data))
    helper.show_code(helper.the_scene, helper.Scene)
    (text,) = shown
    assert text.startswith("```python\n") and text.endswith("\n```")
    assert "def the_scene(index=529):\n    pixels, alt_text" in text and '"""' not in text
    assert "class Scene" in text and "def image(self)" in text


def test_a_short_training_says_what_it_reached_and_why_it_failed():
    with pytest.raises(RuntimeError, match="batch_size=0"):
        helper.train("runs/none", batch_size=0)
