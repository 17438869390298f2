"""Files appear whole under their names, or not at all."""

import os
import stat

import pytest
from helpers import full_disk

from nano_aimv2.files import remove, replacing, write_text

posix = pytest.mark.skipif(os.name != "posix", reason="this system has no permission bits")


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_block_that_ends_well_replaces_the_file(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path and temporary != path, "a rename within one folder"
        assert path.read_text() == "old", "until the block has ended"
    assert path.read_text() == "new" and names(tmp_path) == ["notes.txt"]


def test_a_block_that_fails_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "old")

    def write_half():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old" and names(tmp_path) == ["notes.txt"]


def test_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "notes.txt"
    write_text(path, "old")
    with full_disk(room=1000), pytest.raises(OSError):
        write_text(path, "new" * 1000)
    assert path.read_text() == "old" and names(tmp_path) == ["notes.txt"]


def test_a_temporary_of_a_killed_process_is_replaced(tmp_path):
    path = tmp_path / "folder"
    with replacing(path) as temporary:
        temporary.mkdir()
        (temporary / "new").touch()
    leftover = tmp_path / temporary.name
    leftover.mkdir()
    (leftover / "half").touch()
    remove(path)
    with replacing(path) as temporary:
        assert temporary == leftover and not temporary.exists()
        temporary.mkdir()
    assert names(tmp_path) == ["folder"] and names(path) == []


def test_a_folder_that_holds_something_is_not_replaced(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    (path / "precious").touch()

    def replace_it():
        with replacing(path) as temporary:
            temporary.mkdir()

    with pytest.raises(OSError):
        replace_it()
    assert names(tmp_path) == ["folder"] and names(path) == ["precious"]


def test_a_missing_folder_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        write_text(tmp_path / "nowhere/notes.txt", "text")


@posix
@pytest.mark.parametrize("umask, expected", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_permissions_follow_the_umask(tmp_path, umask, expected):
    before = os.umask(umask)
    try:
        write_text(tmp_path / "text", "text")
        with replacing(tmp_path / "private") as temporary:  # as safetensors writes its files
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert mode(tmp_path / "text") == mode(tmp_path / "private") == expected


@posix
def test_the_weights_of_a_run_are_as_readable_as_its_config(trained):
    folder, _ = trained
    assert mode(folder / "model.safetensors") == mode(folder / "config.json")
    assert mode(folder / "model.safetensors") & 0o077 or not mode(folder / "metrics.jsonl") & 0o077


def test_text_is_utf_8_whatever_the_system_prefers(tmp_path):
    write_text(tmp_path / "text", "Grüße, 猫\n")
    assert (tmp_path / "text").read_bytes() == "Grüße, 猫\n".encode()


def test_remove_takes_files_folders_and_nothing(tmp_path):
    (tmp_path / "folder/inside").mkdir(parents=True)
    (tmp_path / "file").touch()
    for name in ("folder", "file", "nothing"):
        remove(tmp_path / name)
    assert names(tmp_path) == []
