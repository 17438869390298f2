"""What the lessons share: the map, one scene, a small world to train on, a trained model, and the
pieces of drawings. Importing it lets a notebook import the project.

The first code cell of every lesson begins with

    from helper import start
    start("04")

Drawings that explain one concept are in drawings.py.
"""

import ast
import inspect
import io
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import ipywidgets as widgets  # noqa: E402
import matplotlib.pyplot as plt  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from IPython import get_ipython  # noqa: E402
from IPython.display import Markdown, display  # noqa: E402
from PIL import Image  # noqa: E402

from data.scenes import make_scene, make_scenes  # noqa: E402
from nano_aimv2.lab.plots import BLUE, GREY, STYLE, WIDTH  # noqa: E402
from nano_aimv2.training.checkpoint import load_model  # noqa: E402

PALE = "#edf2f7"
TOY = ROOT / "lessons/models/toy"
# Of the processes that lessons start: one thread each, and the package is found from any folder
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
# The way of a sample through the project. station: (lessons, (column, row), what it reads)
MAP = {
    "data": ("08", (0, 1), ("your images",)),
    "patches": ("01", (1, 1), ("data", "other sizes")),
    "text": ("07", (2, 0), ("data",)),
    "prefix mask": ("02", (2, 2), ()),
    "encoder": ("03, 04", (2, 1), ("patches", "prefix mask")),
    "decoder": ("05", (3, 1), ("encoder", "text")),
    "losses": ("06", (4, 1), ("decoder",)),
    "training": ("09, 10", (5, 1), ("losses",)),
    "captions": ("11", (4, 0), ("decoder",)),
    "images": ("12", (5, 0), ("captions",)),
    "features": ("13", (3, 2), ("encoder",)),
    "other sizes": ("14", (1, 2), ()),
    "studies": ("15", (5, 2), ("training",)),
    "your images": ("16", (0, 2), ()),
}


def start(lesson):
    """Set the style of figures, use one thread, and show the map with the stations of a lesson in
    blue: `start("04")`."""
    plt.rcParams.update(STYLE)
    torch.set_num_threads(1)  # models this small gain nothing from more
    show_map([name for name, (lessons, *_) in MAP.items() if lesson in lessons])
    if get_ipython():  # now, since the first figure sets the formats of a notebook
        get_ipython().display_formatter.formatters["image/png"].for_type(plt.Figure, small_png)


def small_png(figure):
    """A figure as a PNG of 256 colours, half the usual size: notebooks store their figures."""
    full, small = io.BytesIO(), io.BytesIO()
    figure.savefig(full, format="png", dpi=figure.dpi, bbox_inches="tight")
    image = Image.open(full).convert("RGB").quantize(256, dither=Image.Dither.NONE)
    image.save(small, "PNG", optimize=True)
    return small.getvalue()


def show_map(here):
    """The way of a sample through the project, with the stations `here` in blue."""
    _, axis = canvas(5.9, 2.8, 2.1)
    axis.set(xlim=(-0.45, 5.45), ylim=(-0.4, 2.4))
    for name, (lessons, (x, y), sources) in MAP.items():
        for source in sources:
            u, v = MAP[source][1]
            if u == x:  # above or below
                arrow(axis, (u, v + (y - v) * 0.27), (x, y - (y - v) * 0.27))
            elif x - u > 1:  # from data to text, below the patches
                arrow(axis, (u + 0.37, v - 0.27), (x - 0.37, y))
            else:
                arrow(axis, (u + 0.37, v), (x - 0.37, y))
        plural = "s" if "," in lessons else ""
        box(axis, (x, y), f"{name}\nlesson{plural} {lessons}", 0.74, 0.54, name in here)
    plt.show()


# The one scene that goes through all lessons, and the model that has learnt such scenes


@dataclass
class Scene:
    """`pixels`: u8[48, 48, 3]; `caption`: everything in it; `alt_text`: little of it."""

    pixels: np.ndarray
    caption: str
    alt_text: str

    @property
    def image(self):
        """u8[1, 3, 48, 48]: a batch of one, as `patchify` takes it."""
        return torch.from_numpy(self.pixels).permute(2, 0, 1)[None]


def the_scene(index=529):
    """A scene of the toy set that no model has been trained on: "top left a small red star, bottom
    right a large cyan heart". Another `index` from 512 on gives another one."""
    pixels, alt_text, caption, _ = make_scene("val", index)
    return Scene(pixels, caption, alt_text)


def the_model():
    """(AIMv2, Config, Tokenizer) of the toy model that comes with the lessons."""
    return load_model(TOY)


# A small world, and a short training on it


def small_world(train=96, val=16, size=48):
    """A temporary folder with a folder `scenes` of toy scenes, as `train.py` reads them. It is
    removed when the returned object is: `world = small_world()`, then `Path(world.name)`."""
    world = tempfile.TemporaryDirectory()
    make_scenes(Path(world.name) / "scenes", train=train, val=val, novel=val, size=size)
    return world


def command_of(run_dir, **settings):
    """The command line of train.py with these settings, on the CPU with one thread per process."""
    settings = {"device": "cpu", "num_workers": 0, "run_dir": run_dir, **settings}
    return [sys.executable, "train.py", *(f"--{name}={value}" for name, value in settings.items())]


def train(run_dir, **settings):
    """Run train.py with these settings, to its end. Returns the lines that it printed about its
    losses, without times, which differ from machine to machine.

    Raises: RuntimeError with its messages if it fails.
    """
    return [", ".join(line.split(", ")[:2]) for line in lines_of(command_of(run_dir, **settings))
            if line.startswith("step")]


def torchrun(script, *arguments):
    """`torchrun --nproc_per_node=2 SCRIPT ARGUMENTS`: a script in two processes, ranks 0 and 1.
    Returns the lines that they print.

    Raises: RuntimeError with their messages if one fails.
    """
    return lines_of([sys.executable, "-m", "torch.distributed.run", "--standalone",
                     "--nproc_per_node=2", script, *arguments])


def lines_of(command):
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=ENVIRONMENT)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout.splitlines()


def slider(draw, **values):
    """A control for each argument of a function that draws a figure, and the figure below it.

    `slider(draw, M=(1, 15), kind=["prefix", "causal"])`: a pair (low, high), or (low, high, step),
    is a slider, whole numbers if its ends are; a list is a menu. They start at the defaults of
    `draw`, or in the middle. Where notebooks are only shown, one line stands in its place, below a
    static figure. (ipywidgets' own `interact` now and then leaves nbclient waiting forever.)
    """
    shown = box_of_controls(draw, values)._repr_mimebundle_()
    display(shown | {"text/plain": "(Run this notebook to move the controls here.)"}, raw=True)


def box_of_controls(draw, values):
    image = widgets.Image(format="png")
    defaults = inspect.signature(draw).parameters
    controls = {name: control(name, value, defaults[name].default)
                for name, value in values.items()}

    def redraw(_=None):
        with mock.patch.object(plt, "show"):
            draw(**{name: each.value for name, each in controls.items()})
        image.value = small_png(plt.gcf())
        plt.close()

    for each in controls.values():
        each.observe(redraw, names="value")
    redraw()
    return widgets.VBox([*controls.values(), image])


def control(name, value, default):
    has_default = default is not inspect.Parameter.empty
    if isinstance(value, list):
        return widgets.Dropdown(options=value, value=default if has_default else value[0],
                                description=name)
    low, high, *step = value
    kind, size, middle = widgets.FloatSlider, 0.1, (low + high) / 2
    if isinstance(low, int):
        kind, size, middle = widgets.IntSlider, 1, (low + high) // 2
    return kind(value=default if has_default else middle, min=low, max=high,
                step=step[0] if step else size, description=name)


# The package's own code, and drawings


def show_code(*things):
    """Show the source of functions or classes of the package, without their docstrings."""
    text = "\n\n\n".join(without_docstrings(inspect.getsource(thing)) for thing in things)
    display(Markdown(f"```python\n{text}\n```"))


def without_docstrings(source):
    lines = textwrap.dedent(source).rstrip().splitlines()
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            first = node.body[0]
            end = first.end_lineno
            if end < len(lines) and not lines[end]:  # the blank line that follows
                end += 1
            lines[first.lineno - 1 : end] = [None] * (end - first.lineno + 1)
    return "\n".join(line for line in lines if line is not None)


def canvas(width, height, inches, title=""):
    """(figure, axis) to draw boxes on: `width` x `height` units from the lower left, on a figure
    that is `inches` high."""
    figure, axis = plt.subplots(figsize=(WIDTH, inches), layout="constrained")
    axis.set(xlim=(0, width), ylim=(0, height), title=title)
    axis.set_axis_off()
    return figure, axis


def box(axis, centre, text, width, height, is_blue=False, colour=None):
    """A labelled box around a centre (x, y); blue for what the drawing is about, or a colour."""
    x, y = centre
    face = colour or (BLUE if is_blue else PALE)
    axis.add_patch(plt.Rectangle((x - width / 2, y - height / 2), width, height, facecolor=face,
                                 edgecolor=GREY, lw=0.8))
    axis.text(x, y, text, ha="center", va="center", color="white" if is_blue else "black")


def arrow(axis, start, end, text="", colour=GREY, style="->"):
    """An arrow from one point to another, with a text beside its middle."""
    axis.annotate("", end, start, arrowprops={"arrowstyle": style, "color": colour})
    if text:
        x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
        axis.annotate(text, (x, y), (3, 3), textcoords="offset points", color=colour, fontsize=8)
