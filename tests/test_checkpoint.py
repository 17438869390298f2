"""Checkpoints: whole or not taken, the right ones kept, and a run resumed by its content."""

import json
import os
import pickle
import shutil

import pytest
import torch
from damage import damaged
from helpers import run_script, simple_shards, tiny_config
from torch import nn

from nano_aimv2.config import Config
from nano_aimv2.data.batches import TrainingData
from nano_aimv2.data.tokenizer import Tokenizer, find_file
from nano_aimv2.training import checkpoint, distributed

RUNTIME = distributed.single_process()
slow = pytest.mark.slow


# Saving and restoring: a tiny module


class Tiny:
    """A module, an optimizer and a gradient scaler; `set(step)` gives all of them new values."""

    def __init__(self, run_dir):
        self.run_dir = run_dir
        self.model = nn.Linear(2, 3)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3)
        self.scaler = torch.amp.GradScaler("cpu")

    def set(self, step):
        self.model(torch.full((1, 2), float(step))).sum().backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.weight.fill_(step)
        state = self.scaler.state_dict()
        self.scaler.load_state_dict({**state, "scale": 2.0**step, "_growth_tracker": step})
        return self

    def save(self, step, keep=9):
        checkpoint.save(self.run_dir, step, self.set(step).model, self.optimizer, RUNTIME, keep,
                        self.scaler)

    def restore(self):
        """The step that is restored, after a look at every part of the state."""
        step = checkpoint.restore(self.run_dir, self.model, self.optimizer, RUNTIME, self.scaler)
        if step:
            assert (self.model.weight == step).all()
            state = self.scaler.state_dict()
            assert (state["scale"], state["_growth_tracker"]) == (2.0**step, step)
        return step


@pytest.fixture
def tiny(tmp_path):
    """Checkpoints 5 and 9 of a tiny module."""
    tiny = Tiny(tmp_path / "run")
    tiny.save(5)
    tiny.save(9)
    return tiny


def files_of(tiny, step):
    folder = tiny.run_dir / f"checkpoints/step-{step:08d}"
    return {path.name: path for path in folder.iterdir()}


def steps_of(tiny):
    return [int(path.name[5:]) for path in sorted((tiny.run_dir / "checkpoints").glob("step-*"))]


def point_to(tiny, text):
    (tiny.run_dir / "checkpoints/latest").write_text(text)


def latest_of(tiny):
    return (tiny.run_dir / "checkpoints/latest").read_text()


def test_weights_moments_scaler_and_step_are_restored(tiny):
    moments = {k: v.clone() for k, v in tiny.optimizer.state[tiny.model.weight].items()}
    other = Tiny(tiny.run_dir).set(3)
    assert other.restore() == 9
    restored = other.optimizer.state[other.model.weight]
    assert all(torch.equal(moments[name], restored[name]) for name in moments)


def test_a_run_without_checkpoints_starts_at_step_0(tmp_path):
    assert Tiny(tmp_path).restore() == 0


def test_200_damages_of_a_checkpoint_are_all_found(tiny, capsys):
    """One file is damaged at a time: the checkpoint before it is restored, and the file named."""
    files, found = sorted(files_of(tiny, 9).items()), 0
    assert [name for name, _ in files] == [".metadata", "__0_0.distcp", "checksums.json"]
    for seed, (name, path) in enumerate(files):
        whole = path.read_bytes()
        for what, data in damaged(whole, 67, seed):
            path.write_bytes(data)
            expected = 9 if data == whole else 5
            assert tiny.restore() == expected, f"{name}: {what}"
            output = capsys.readouterr().out
            if expected == 5:
                found += 1
                assert "step-00000009: missing or damaged: " in output, f"{name}: {what}"
                assert (name in output) or name == "checksums.json", f"{what}: {output}"
            path.write_bytes(whole)
            point_to(tiny, "step-00000009")
    assert found > 190, "the damages changed something"


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "checksums.json"])
def test_a_missing_file_is_named_and_the_checkpoint_before_is_used(name, tiny, capsys):
    files_of(tiny, 9)[name].unlink()
    assert tiny.restore() == 5
    assert f"step-00000009: missing or damaged: {name}" in capsys.readouterr().out
    assert latest_of(tiny) == "step-00000005"


def test_a_checkpoint_that_is_not_there_is_named_and_the_one_before_is_used(tiny, capsys):
    shutil.rmtree(tiny.run_dir / "checkpoints/step-00000009")
    assert tiny.restore() == 5
    assert "latest says 'step-00000009': resumed from step-00000005" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "step-9", "\0\udcff", "../../step-00000009"])
def test_a_latest_that_names_no_checkpoint_means_the_newest(text, tiny, capsys):
    (tiny.run_dir / "checkpoints/latest").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert tiny.restore() == 9
    assert "latest says" in capsys.readouterr().out and latest_of(tiny) == "step-00000009"


def test_no_whole_checkpoint_is_one_line_with_the_files_and_the_fix(tiny):
    for step in (5, 9):
        files_of(tiny, step)[".metadata"].write_bytes(b"")
    with pytest.raises(ValueError) as error:
        tiny.restore()
    message = str(error.value)
    assert "step-00000005: missing or damaged: .metadata" in message and "step-00000009" in message
    assert "another --run_dir" in message and len(message.splitlines()) == 1
    assert steps_of(tiny) == [5, 9], "nothing is deleted"


class Trap:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_nothing_is_unpickled_before_its_checksum_was_compared(tiny, tmp_path):
    for name in (".metadata", "__0_0.distcp"):
        files_of(tiny, 9)[name].write_bytes(pickle.dumps(Trap(tmp_path / "sprung")))
        assert tiny.restore() == 5
        assert not (tmp_path / "sprung").exists(), name
        point_to(tiny, "step-00000009")


def test_a_checkpoint_of_another_model_is_one_line(tiny):
    other = Tiny(tiny.run_dir)
    other.model = nn.Sequential(nn.Linear(2, 3))
    other.optimizer = torch.optim.AdamW(other.model.parameters())
    with pytest.raises(ValueError, match="step-00000009 does not fit this run") as error:
        other.restore()
    assert len(str(error.value).splitlines()) == 1, error.value


def test_a_step_that_is_saved_whole_is_not_saved_again(tiny):
    before = {name: path.stat().st_ino for name, path in files_of(tiny, 9).items()}
    tiny.save(9)
    assert {name: path.stat().st_ino for name, path in files_of(tiny, 9).items()} == before


def test_a_damaged_step_is_saved_again(tiny):
    files_of(tiny, 9)["__0_0.distcp"].write_bytes(b"")
    assert tiny.restore() == 5
    tiny.save(9)
    assert tiny.restore() == 9


def test_after_a_roll_back_the_steps_of_the_branch_that_was_left_go(tiny):
    tiny.save(12)
    point_to(tiny, "step-00000005")
    assert tiny.restore() == 5
    tiny.save(7, keep=2)
    assert steps_of(tiny) == [5, 7] and latest_of(tiny) == "step-00000007"
    assert tiny.restore() == 7


def test_a_roll_back_to_the_step_before_replaces_the_next_one(tiny):
    point_to(tiny, "step-00000005")
    before = files_of(tiny, 9)["__0_0.distcp"].stat().st_ino
    tiny.save(9)
    assert files_of(tiny, 9)["__0_0.distcp"].stat().st_ino != before and tiny.restore() == 9


def test_what_a_killed_save_left_is_removed_by_the_next(tiny):
    shutil.copytree(tiny.run_dir / "checkpoints/step-00000009",
                    tiny.run_dir / "checkpoints/step-00000011.tmp")
    assert tiny.restore() == 9
    tiny.save(12)
    assert steps_of(tiny) == [5, 9, 12]


def test_a_killed_save_never_leaves_latest_without_a_checkpoint(tiny, monkeypatch):
    """Whatever file operation is the last one: what is restored is whole."""
    class Killed(Exception):
        pass

    def killed_after(count):
        def counted(function):
            def called(*args):
                nonlocal count
                count -= 1
                if count < 0:
                    raise Killed
                return function(*args)
            return called

        patches = [(checkpoint.os, "replace"), (checkpoint, "remove"), (checkpoint, "write_text")]
        for module, name in patches:
            monkeypatch.setattr(module, name, counted(getattr(module, name)))

    for count in range(12):
        step = 20 + count
        with monkeypatch.context() as monkeypatch:
            killed_after(count)
            try:
                tiny.save(step, keep=2)
            except Killed:
                step = None
        restored = tiny.restore()
        assert restored == step or step is None and restored >= 9, (count, restored)
    assert step == 31, "the last save was not killed"


# A run folder: settings by value, data and tokenizer by content


@pytest.fixture
def run(tmp_path):
    """(settings, begin): `begin(**changes)` claims the run folder as a start of training does."""
    shutil.copy(find_file("toy.tiktoken"), tmp_path / "own.tiktoken")
    simple_shards(tmp_path / "one", 10)
    simple_shards(tmp_path / "two", 9, "b")
    settings = dict(data=f"{tmp_path}/one:alt:3,{tmp_path}/two:synthetic:1", batch_size=4, steps=2,
                    tokenizer=f"{tmp_path}/own.tiktoken", run_dir=f"{tmp_path}/run")

    def begin(**changes):
        config = checkpoint.recorded(tiny_config(**{**settings, **changes}))
        runtime = distributed.start(config.device, config.dtype, config.parallel, config.compile)
        data = TrainingData(config, Tokenizer(config.tokenizer))
        return checkpoint.begin_run(config, data, runtime)

    begin()
    return settings, begin


def permute_vocabulary(path):
    """Give the ranks of a rank file to other tokens: the same size, other meanings."""
    lines = path.read_bytes().splitlines()
    tokens, ranks = zip(*(line.split() for line in lines), strict=True)
    tokens = [*tokens[:256], *reversed(tokens[256:])]
    path.write_bytes(b"\n".join(map(b" ".join, zip(tokens, ranks, strict=True))) + b"\n")


def test_another_vocabulary_under_the_same_path_is_refused(run, tmp_path):
    settings, begin = run
    copy = tmp_path / "run/tokenizer.tiktoken"
    before = copy.read_bytes()
    permute_vocabulary(tmp_path / "own.tiktoken")
    with pytest.raises(ValueError, match=rf"tokenizer content=sha256 .* use --tokenizer={copy}"):
        begin()
    assert copy.read_bytes() == before, "the run's own copy stays"
    begin(tokenizer=str(copy))  # the fix


@pytest.mark.parametrize("change", ["more shards", "fewer samples", "another folder"])
def test_other_samples_under_the_same_path_are_refused(change, run, tmp_path):
    settings, begin = run
    if change == "more shards":
        shutil.copy(tmp_path / "two/00000.tar", tmp_path / "one/00009.tar")
    elif change == "fewer samples":
        (tmp_path / "one/00001.tar").unlink()
    else:
        shutil.rmtree(tmp_path / "one")
        shutil.copytree(tmp_path / "two", tmp_path / "one")
    with pytest.raises(ValueError, match=r"data part 1=10 samples \(alt, 75.0000%, .*asked for"
                                         r".*give the data of these parts as it was") as error:
        begin()
    assert "part 2" not in str(error.value) and "delete" not in str(error.value)


@pytest.mark.parametrize("swap", ["order", "weights", "kinds"])
def test_another_mixture_of_the_same_folders_is_refused(swap, run, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    mixture = {"order": f"{two}:synthetic:1,{one}:alt:3",
               "weights": f"{one}:alt:2,{two}:synthetic:1",
               "kinds": f"{one}:synthetic:3,{two}:synthetic:1"}[swap]
    with pytest.raises(ValueError, match="data part 1"):
        run[1](data=mixture)


def test_moved_data_tokenizer_and_run_folder_are_resumed_and_recorded(run, tmp_path, capsys):
    settings, begin = run
    old = Config.load(tmp_path / "run/config.json")
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for name in ("one", "two", "own.tiktoken", "run"):
        shutil.move(tmp_path / name, moved / name)
    begin(**{name: text.replace(str(tmp_path), str(moved)) for name, text in settings.items()
             if isinstance(text, str)})
    new = Config.load(moved / "run/config.json")
    assert new.data == old.data.replace(str(tmp_path), str(moved)) != old.data
    assert new.tokenizer == f"{moved}/own.tiktoken"
    output = capsys.readouterr().out
    assert f"changed since the last start: tokenizer={old.tokenizer} there" in output


def test_weights_that_sum_to_another_number_are_the_same_shares(run, tmp_path):
    run[1](data=f"{tmp_path}/one:alt:75,{tmp_path}/two:synthetic:25")


def test_auto_means_the_recorded_precision_and_another_one_is_refused(run, tmp_path, monkeypatch):
    settings, begin = run
    monkeypatch.setattr(distributed, "bf16_speedup", lambda: 2.0)  # auto is bfloat16 here
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert begin(dtype="auto").dtype == "float32"
    with pytest.raises(ValueError, match="dtype=float32 there, bfloat16 asked for"):
        begin(dtype="bfloat16")
    fresh = f"{tmp_path}/fresh"
    begin(dtype="auto", run_dir=fresh)
    assert Config.load(tmp_path / "fresh/config.json").dtype == "bfloat16"
    monkeypatch.setattr(distributed, "bf16_speedup", lambda: 0.5)  # and float32 on another machine
    assert begin(dtype="auto", run_dir=fresh).dtype == "bfloat16"


def test_device_parallel_and_compile_are_recorded_as_resolved_and_may_change(run, tmp_path):
    path = tmp_path / "run/config.json"
    recorded = json.loads(path.read_text())
    assert [recorded[k] for k in ("device", "parallel", "compile")] == ["cpu", "none", "false"]
    run[1](compile="true", num_workers=1)
    assert json.loads(path.read_text()) == {**recorded, "compile": "true", "num_workers": 1}


def test_a_record_that_cannot_be_read_is_named(run, tmp_path):
    for text in ("{", "3", None):
        path = tmp_path / "run/contents.json"
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(ValueError, match="run/contents.json says what the run learns from"):
            run[1]()


def test_a_damaged_copy_of_the_tokenizer_is_made_again(run, tmp_path):
    copy = tmp_path / "run/tokenizer.tiktoken"
    copy.write_bytes(b"half")
    run[1]()
    assert copy.read_bytes() == (tmp_path / "own.tiktoken").read_bytes()


def test_a_folder_that_cannot_be_written_is_one_line_at_the_start(run):
    with pytest.raises(OSError) as error:
        run[1](run_dir="/proc/nowhere/run")
    assert len(str(error.value).splitlines()) == 1 and "/proc/nowhere" in str(error.value)


@slow
def test_a_post_training_run_needs_its_parent_until_it_has_a_checkpoint(trained, tiny_flags,
                                                                        tmp_path):
    parent, folder = shutil.copytree(trained[0], tmp_path / "parent"), tmp_path / "child"
    flags = [*tiny_flags, "--image_size=24", "--steps=4", "--save_every=2", "--keep=9",
             f"--run_dir={folder}"]
    run_script("train.py", *flags, f"--init={parent}")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    (folder / "checkpoints/latest").write_text("step-00000002")
    shutil.rmtree(parent)
    run_script("train.py", *flags)  # --init may be left out: config.json knows it
    assert (folder / "model.safetensors").read_bytes() == weights
    assert Config.load(folder / "config.json").init == str(parent)
    shutil.rmtree(folder / "checkpoints")
    (folder / "model.safetensors").unlink()
    done = run_script("train.py", *flags, check=False)
    assert f"{parent} is neither a folder nor a repo" in done.stderr and done.returncode == 1
