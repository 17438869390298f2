"""The lessons: every notebook runs from a clean kernel with its exercises solved, and reads well as
it is committed."""

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from helpers import ROOT, environment
from nbclient import NotebookClient

LESSONS = sorted((ROOT / "lessons").glob("*.ipynb"))
SOLUTION = re.compile(r"<summary>Solution</summary>(?:(?!</details>).)*?```python\n(.*?)```\s*"
                      r"</details>", re.DOTALL)
MACHINE_PATH = re.compile(r"(?<![\w.])/(home|tmp|work|root|Users)/|ipykernel_")

pytestmark = pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)


def exercises(notebook):
    """[(solution, stub cell, check cell)]: a question with its folded solution is followed by a
    stub and a check."""
    found, cells = [], notebook.cells
    for i, cell in enumerate(cells):
        match = SOLUTION.search(cell.source) if cell.cell_type == "markdown" else None
        if match:
            found.append((match[1], cells[i + 1], cells[i + 2]))
    return found


def printed(cell):
    return "".join(output.text for output in cell.outputs
                   if output.output_type == "stream" and output.name == "stdout")


def without_images(output):
    """The text of a cell's output: images are bytes in which any path could turn up by chance."""
    data = {kind: value for kind, value in output.get("data", {}).items() if kind != "image/png"}
    return json.dumps(data) + output.get("text", "")


def run_lesson(path):
    """The notebook of a lesson with its exercises solved, executed in a clean kernel."""
    notebook = nbformat.read(path, as_version=4)
    found = exercises(notebook)
    assert len(found) == 3, f"{len(found)} exercises"
    for solution, stub, _ in found:
        assert stub.cell_type == "code" and "..." in stub.source, f"no stub: {stub.source!r}"
        stub.source = solution
    client = NotebookClient(notebook, timeout=120, kernel_name="python3",
                            resources={"metadata": {"path": str(path.parent)}})
    asyncio.run(client.async_execute(env=environment()))
    return [printed(check).strip() for _, _, check in found]


@pytest.fixture(scope="module")
def running(request):
    """{lesson: future of `run_lesson`} of those asked for: two at a time, with one thread each."""
    asked = [item.callspec.params["path"] for item in request.session.items
             if item.name.startswith("test_a_lesson_runs")]
    with ThreadPoolExecutor(2) as pool:
        yield {path: pool.submit(run_lesson, path) for path in asked}


@pytest.mark.slow
def test_a_lesson_runs_from_a_clean_kernel_and_its_solutions_are_right(path, running):
    for i, check in enumerate(running[path].result(), 1):
        assert check.endswith("right"), f"exercise {i} prints {check!r}"


def test_a_committed_lesson_is_short_executed_and_free_of_noise(path):
    notebook = nbformat.read(path, as_version=4)
    assert len(notebook.cells) <= 70, f"{len(notebook.cells)} cells"
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
    assert [printed(check).strip() for _, _, check in exercises(notebook)] == ["not solved yet"] * 3
    assert path.stat().st_size < 500_000, f"{path.stat().st_size} bytes"


def test_the_map_of_the_lessons_names_it(path):
    assert f"]({path.name})" in (ROOT / "lessons/README.md").read_text()
