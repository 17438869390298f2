"""One grammar for the command lines of all commands."""

import importlib
import io
import re
import subprocess
import sys
from dataclasses import dataclass, field, fields

import pytest
from helpers import ROOT, run_script, run_together

from nano_aimv2 import config
from nano_aimv2.flags import (
    as_text,
    check_at_least,
    check_choice,
    field_notes,
    nearest,
    read_flags,
    run_command,
    safe_console,
)


@dataclass
class Options:
    steps: int = 100  # optimizer steps
    rate: float = 0.5  # share, 50% if not given
    flip: bool = False  # mirror half of the images
    sizes: tuple = ()  # pixels, with commas between; empty: the run's own
    run_dir: str = "runs/toy"  # a trained run


@dataclass
class More:
    files: list = field(default_factory=list)  # image files
    max_tokens: int = 0  # stop here


def read(*argv):
    return read_flags(argv, Options)[0]


@pytest.mark.parametrize("argv", [
    ["--steps=7", "--run_dir=runs/a"],
    ["--steps", "7", "--run_dir", "runs/a"],
    ["--run-dir=runs/a", "--steps=7"],
    ["--run-dir", "runs/a", "--steps", "7"],
])
def test_a_value_follows_an_equals_sign_or_a_blank_and_dashes_are_underscores(argv):
    assert read(*argv) == {"steps": 7, "run_dir": "runs/a"}


def test_a_bare_boolean_is_true_and_leaves_the_files_behind_it_alone():
    for argv in (["--flip", "cat.png"], ["cat.png", "--flip"], ["--flip", "True", "cat.png"]):
        given, more = read_flags(argv, Options, More, words="files")
        assert given == {"flip": True} and more == {"files": ["cat.png"]}, argv
    assert read("--flip", "--steps=2") == {"flip": True, "steps": 2}
    assert read("--flip", "False") == {"flip": False}


def test_only_what_was_given_is_returned():
    assert read() == {}
    assert Options(**read("--rate=1")) == Options(rate=1.0)


def test_a_value_keeps_its_dashes_equals_signs_and_blanks():
    assert read("--run-dir=my-runs/a=b c")["run_dir"] == "my-runs/a=b c"
    assert read("--run_dir=")["run_dir"] == ""


def test_values_have_the_type_of_their_field():
    given = read("--steps=12", "--rate=1e-3", "--sizes=48,72.5", "--flip=true")
    assert given == {"steps": 12, "rate": 1e-3, "sizes": (48.0, 72.5), "flip": True}
    assert type(given["steps"]) is int and read("--sizes=")["sizes"] == ()
    assert read("--rate", "-0.5")["rate"] == -0.5


@pytest.mark.parametrize("word, value", [
    ("--flip", True), ("--flip=true", True), ("--flip=True", True), ("--flip=false", False),
    ("--flip=FALSE", False)])
def test_a_boolean_is_true_or_false(word, value):
    assert read(word)["flip"] is value


@pytest.mark.parametrize("argv, message", [
    (["--step=7"], r"^unknown flag --step \(did you mean --steps\?\); --help lists all$"),
    (["--stepz=7"], r"unknown flag --stepz \(did you mean --steps\?\)"),
    (["--run-dirr=x"], r"unknown flag --run_dirr \(did you mean --run_dir\?\)"),
    (["--zebra", "--steps=7"], r"^unknown flag --zebra; --help lists all$"),
    (["--steps"], "^cannot read '--steps': it needs a value, --steps=VALUE; --help lists all"),
    (["--run-dir", "--steps=7"], "cannot read '--run_dir': it needs a value, --run_dir=VALUE"),
    (["steps=7"], "cannot read 'steps=7': .*--key=value; --help lists all"),
    (["-steps=7"], "cannot read '-steps=7'"),
    (["--steps=ten"], "^--steps=ten must be a whole number$"),
    (["--steps=1.5"], "--steps=1.5 must be a whole number"),
    (["--steps="], "--steps= must be a whole number"),
    (["--rate=fast"], "--rate=fast must be a number"),
    (["--rate=nan"], "^--rate=nan must be a number, not nan or inf$"),
    (["--rate=-inf"], "--rate=-inf must be a number, not nan or inf"),
    (["--rate=1e999"], "--rate=1e999 must be a number, not nan or inf"),
    (["--sizes=48,x"], "--sizes=48,x must be numbers with commas between"),
    (["--sizes=48,nan"], "^--sizes=48,nan must be numbers with commas between, not nan or inf$"),
    (["--sizes=48,"], "--sizes=48, must be numbers with commas between"),
    (["--flip=yes"], "^--flip=yes must be true or false$"),
    (["--flip=1"], "--flip=1 must be true or false"),
    (["--flip=0"], "--flip=0 must be true or false"),
    (["--flip="], "--flip= must be true or false"),
    (["--flip", "maybe"], "--flip=maybe must be true or false"),
])
def test_a_mistake_is_a_value_error_with_the_word_and_the_rule(argv, message):
    with pytest.raises(ValueError, match=message) as error:
        read(*argv)
    assert "\n" not in str(error.value)


def test_words_that_are_not_flags_go_to_the_field_that_asks_for_them():
    given = read_flags(["a.jpg", "--max-tokens=3", "b.jpg"], More, words="files")[0]
    assert given == {"files": ["a.jpg", "b.jpg"], "max_tokens": 3}
    assert read_flags([], More, words="files")[0] == {}
    with pytest.raises(ValueError, match="unknown flag --files"):
        read_flags(["--files=a.jpg"], More, words="files")


def test_the_flags_of_several_dataclasses_are_sorted_to_them():
    given = read_flags(["--steps=7", "a.jpg", "--max_tokens=3"], Options, More, words="files")
    assert given == [{"steps": 7}, {"files": ["a.jpg"], "max_tokens": 3}]


def test_the_comment_behind_a_field_is_its_help(capsys):
    assert field_notes(Options)["sizes"] == "pixels, with commas between; empty: the run's own"
    with pytest.raises(SystemExit) as stop:
        read_flags(["--help"], Options, doc="What it does.\n\n    an example", epilog="The end.")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["What it does.", "", "    an example"] and lines[-1] == "The end."
    for line in ("--steps=100", "--rate=0.5", "--flip=false", "--sizes=", "--run_dir=runs/toy"):
        assert any(found.split()[0] == line for found in lines if found.startswith("  --")), line
    assert any("share, 50% if not given" in line for line in lines)


def test_the_nearest_name_is_offered_only_if_it_is_near():
    assert nearest("stepz", ["steps", "seed"], "--") == " (did you mean --steps?)"
    assert nearest("zebra", ["steps", "seed"]) == ""


def test_choices_and_limits_name_the_value_and_the_rule():
    check_choice("device", "cpu", ("auto", "cpu"))
    with pytest.raises(ValueError, match="device='gpu' must be one of auto, cpu"):
        check_choice("device", "gpu", ("auto", "cpu"))
    check_at_least(Options(), steps=100)
    with pytest.raises(ValueError, match="steps=0 must be at least 1"):
        check_at_least(Options(steps=0), steps=1)
    with pytest.raises(ValueError, match="rate=nan must be at least 0"):
        check_at_least(Options(rate=float("nan")), rate=0)


# The console


@pytest.mark.parametrize("encoding, shown", [
    ("cp1252", "caf\xe9 \\u732b"), ("ascii", "caf\\xe9 \\u732b"), ("utf-8", "caf\xe9 \u732b")])
def test_a_name_that_the_console_cannot_show_is_printed_with_escapes(encoding, shown, monkeypatch):
    screens = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
    for stream, screen in zip(("stdout", "stderr"), screens, strict=True):
        monkeypatch.setattr(sys, stream, screen)

    def main(argv):
        print("caf\xe9 \u732b", flush=True)
        raise ValueError("caf\xe9 \u732b")

    with pytest.raises(SystemExit) as stop:
        run_command(main)
    print(stop.value.code.partition(": ")[2], file=sys.stderr, flush=True)
    for screen in screens:
        assert screen.buffer.getvalue().decode(encoding).strip() == shown


def test_a_name_that_is_not_text_is_printed_with_escapes(monkeypatch):
    """What Linux makes of a Latin-1 file name."""
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", screen)
    safe_console()
    print(b"caf\xe9.jpg".decode("utf-8", "surrogateescape"), flush=True)
    assert screen.buffer.getvalue().strip() == b"caf\\udce9.jpg"


def test_a_stream_that_cannot_be_changed_is_left_alone(monkeypatch):
    for stream in (io.StringIO(), None):  # a notebook's, and that of a program without a console
        monkeypatch.setattr(sys, "stdout", stream)
        safe_console()


# Every command

COMMANDS = ("train", "sample", "data.pack", "data.scenes", "data.train_tokenizer",
            *(f"nano_aimv2.lab.{name}" for name in
              ("bench", "contrastive", "encode", "probe", "sizes", "study")))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_lists_every_setting(name, capsys, monkeypatch):
    module, asked = importlib.import_module(name), []

    def spy(argv, *kinds, words=None, **rest):
        asked.extend(f for kind in kinds for f in fields(kind) if f.name != words)
        return read_flags(argv, *kinds, words=words, **rest)

    for reader in (module, config):
        if hasattr(reader, "read_flags"):
            monkeypatch.setattr(reader, "read_flags", spy)
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(module.__doc__.splitlines()[0])
    assert asked, f"{name} does not use nano_aimv2.flags"
    for setting in asked:
        assert f"  --{setting.name}={as_text(setting.default)}" in text
        note = help_of(setting.name, text)
        assert note and not note.endswith((":", ",")), f"--{setting.name} is explained as {note!r}"


def help_of(name, text):
    """What --help prints behind a flag, on its line and on those below it."""
    lines = text.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith(f"  --{name}="))
    note = [lines[at].strip().partition("  ")[2]]
    for line in lines[at + 1 :]:
        if not line or line.startswith("  --"):
            break
        note.append(line.strip())
    return " ".join(note).strip()


def as_typed(name):
    """The words behind `python` that start a command."""
    if name.startswith("nano_aimv2"):
        return ("-m", name)
    return (name.replace(".", "/") + ".py",)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=[] if name == "train" else pytest.mark.slow) for name in COMMANDS])
def test_help_and_a_misspelt_flag_end_without_a_traceback(name, tmp_path):
    shown, done = run_together((*as_typed(name), "--help"), (*as_typed(name), "--zebra=1"))
    assert shown.returncode == 0 and "--help" in shown.stdout and not shown.stderr, shown.stderr
    assert done.returncode == 1 and "unknown flag --zebra" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


@pytest.mark.parametrize("script", ["train.py", pytest.param("sample.py", marks=pytest.mark.slow)])
def test_a_device_that_does_not_exist_is_one_line_with_the_choices(script, tmp_path):
    done = run_script(script, "--device=gpu", f"--run_dir={tmp_path}/x", check=False)
    assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1, done.stderr
    choices = re.search(r"device='gpu' must be one of ([\w, ]+)", done.stderr)[1].split(", ")
    assert {"auto", "cpu", "cuda", "mps"} <= {choice.split()[0] for choice in choices}
    assert not (tmp_path / "x").exists()


def test_no_command_reads_its_words_by_itself():
    scripts = [ROOT / "train.py", ROOT / "sample.py", *(ROOT / "data").glob("*.py"),
               *(ROOT / "nano_aimv2").rglob("*.py")]
    for path in scripts:
        if path.name != "flags.py":
            code = path.read_text(encoding="utf-8")
            assert "argparse." not in code, f"{path.name} parses flags by itself"
            assert code.count("sys.argv[") == code.count("main(sys.argv[1:])"), path.name


@pytest.mark.parametrize("words, shown", [
    (["-c", "import data.scenes; print(data.scenes.__doc__)"], "scenes"),
    pytest.param(["train.py", "--dry_run=true"], "parameters", marks=pytest.mark.slow),
    pytest.param(["data/scenes.py", "--help"], "--out", marks=pytest.mark.slow)])
def test_an_installed_package_named_data_does_not_hide_ours(words, shown, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/__init__.py").write_text("raise ImportError('the other data')\n")
    assert shown in run_script(*words, env={"PYTHONPATH": str(tmp_path)}).stdout


def test_a_reader_that_stops_early_is_not_an_error(tmp_path):
    script = tmp_path / "talk.py"
    script.write_text("import sys\n"
                      f"sys.path.insert(0, {str(ROOT)!r})\n"
                      "from nano_aimv2.flags import run_command\n"
                      "run_command(lambda argv: print('line\\n' * 100_000))\n")
    talking = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True)
    assert talking.stdout.readline() == "line\n"
    talking.stdout.close()
    errors = talking.stderr.read()
    talking.stderr.close()
    assert talking.wait(timeout=60) == 0 and errors == "", errors
