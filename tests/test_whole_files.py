"""Files and folders that appear whole or not at all."""

import os
from pathlib import Path

import pytest

from cfgrl_gym.whole_files import LEFT_OVER_AFTER, remove_folder, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a[1].json"
    path.write_text("before")
    with whole_file(path) as new, whole_file(path) as other:  # as two processes might
        new.write_text("after")
        other.write_text("meanwhile")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert names(tmp_path) == ["a[1].json"]


def test_a_file_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), whole_file(path) as new:  # noqa: PT012
        new.write_text("half")
        raise ZeroDivisionError
    assert (path.read_text(), names(tmp_path)) == ("before", ["a"])


def test_what_a_killed_process_left_is_deleted_later(tmp_path: Path) -> None:
    old, recent, other = (tmp_path / name for name in (".a.1.new", ".a.2.new", ".b.1.new"))
    for file in (old, recent, other):
        file.write_text("half")
    for file in (old, other):
        os.utime(file, (0, file.stat().st_mtime - 2 * LEFT_OVER_AFTER))
    with whole_file(tmp_path / "a") as new:
        new.write_text("whole")
    assert names(tmp_path) == [".a.2.new", ".b.1.new", "a"]


@pytest.mark.parametrize("durable", [False, True])
def test_a_folder_takes_its_place_when_it_is_complete(durable: bool, tmp_path: Path) -> None:
    path = tmp_path / "runs" / "policy"
    for content in ("first", "second"):
        with whole_folder(path, durable) as new:
            (new / content).write_text(content)
            assert not (path / content).exists()
        assert names(path) == [content]
    with pytest.raises(ZeroDivisionError), whole_folder(path, durable) as new:  # noqa: PT012
        (new / "third").write_text("half")
        raise ZeroDivisionError
    assert names(path) == ["second"]
    (path.parent / ".policy.new").mkdir()  # of a process that was killed
    (path.parent / ".policy.new" / "half").write_text("half")
    with whole_folder(path, durable) as new:
        assert names(new) == []
    assert names(path.parent) == ["policy"]
    remove_folder(path)
    assert names(path.parent) == []
