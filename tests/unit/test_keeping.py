from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_pipeline.errors import BusyError, MissingError, ParamsError
from lora_pipeline.keeping import Keep, content_key, kept, locked


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source.txt"
    path.write_text("one")
    return path


def build(keep: Keep, text: str = "made") -> None:
    """Writes a folder out of one file, as most stages do."""
    keep.building[0].mkdir()
    (keep.building[0] / "file").write_text(text)


def test_out_appears_only_when_the_block_ends(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "deep" / "out"
    with kept("train@a", [out], [source], dict, tmp_path) as keep:
        build(keep)
        assert not out.exists()
        assert keep.building[0].parent == out.parent  # a rename elsewhere could be a copy
    assert (out / "file").read_text() == "made"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_failure_leaves_the_old_out_as_it_was(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), kept("train@a", [out], [source], dict, tmp_path) as keep:
        build(keep)
        raise ZeroDivisionError
    assert (out / "file").read_text() == "old"
    assert not keep.building[0].exists()


def test_an_old_folder_is_replaced_whole(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "stale").write_text("old")
    with kept("train@a", [out], [source], dict, tmp_path) as keep:
        build(keep)
    assert [path.name for path in out.iterdir()] == ["file"]


def test_a_kill_between_the_two_renames_is_undone(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("old")
    script = """
import os, signal, sys
from pathlib import Path
from lora_pipeline import keeping
out, source = Path(sys.argv[1]), Path(sys.argv[2])
Path.replace = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
with keeping.kept("train@a", [out], [source], dict, out.parent) as keep:
    keep.building[0].mkdir()
"""
    ended = subprocess.run([sys.executable, "-c", script, out, source], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(ZeroDivisionError), kept("train@a", [out], [source], dict, tmp_path):
        raise ZeroDivisionError
    assert (out / "file").read_text() == "old"


def test_work_survives_a_failure_and_goes_with_success(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ZeroDivisionError), kept("train@a", [out], [source], dict, tmp_path) as keep:
        (keep.work / "checkpoint").write_text("step 3")
        raise ZeroDivisionError
    with kept("train@a", [out], [source], dict, tmp_path) as again:
        assert (again.work / "checkpoint").read_text() == "step 3"
        build(again)
    assert not again.work.exists()


def test_lasting_work_stays_for_what_it_lasts_for_until_other_work_is_done(tmp_path: Path, source: Path) -> None:
    section = {"steps": 3, "rank": 4}

    def made() -> tuple[Path, list[str]]:
        with kept("t@a", [tmp_path / "out"], [source], section.copy, tmp_path, lambda: section["rank"]) as keep:
            found = sorted(path.name for path in keep.work.iterdir())
            (keep.work / f"checkpoint{section['steps']}").touch()
            keep.building[0].write_text("made")
        return keep.work, found

    first, nothing = made()
    section["steps"] = 5
    longer, found = made()
    assert (longer, nothing, found) == (first, [], ["checkpoint3", "finished"])
    section["rank"] = 8
    other, nothing = made()
    assert nothing == []
    assert [path.name for path in first.parent.iterdir()] == [other.name]


def test_work_is_never_that_of_other_inputs(tmp_path: Path, source: Path) -> None:
    out, section, works = tmp_path / "out", {"rank": 4}, []
    for rank in (4, 8):
        section["rank"] = rank
        with kept("train@a", [out], [source], section.copy, tmp_path) as keep:
            works.append(keep.work)
            build(keep)
    assert works[0] != works[1]


@pytest.mark.parametrize("edited", ["input", "params"])
def test_an_edit_while_running_records_nothing(tmp_path: Path, source: Path, edited: str) -> None:
    out, section = tmp_path / "out", {"rank": 4}
    with pytest.raises(ParamsError, match="changed"), kept("t@a", [out], [source], section.copy, tmp_path) as keep:
        build(keep)
        if edited == "input":
            source.write_text("two")
        else:
            section["rank"] = 8
    assert not out.exists()


def test_a_second_writer_is_refused_and_does_no_harm(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with kept("train@a", [out], [source], dict, tmp_path) as keep:
        build(keep)
        with pytest.raises(BusyError), kept("train@a", [out], [source], dict, tmp_path):
            pass
    assert (out / "file").read_text() == "made"


def test_a_killed_holder_lets_go_of_its_lock(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
from lora_pipeline.keeping import locked
with locked("x", Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(BusyError), locked("x", tmp_path):
            pass
        holder.kill()
    with locked("x", tmp_path):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_stage_dies_with_its_parent() -> None:
    child = """
import sys, time
from lora_pipeline.keeping import die_with_parent
die_with_parent()
print("ready", flush=True)
time.sleep(60)
"""
    parent = (
        "import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1]]).pid, flush=True); input()"
    )
    command = [sys.executable, "-c", parent, child]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        said = {process.stdout.readline().strip(), process.stdout.readline().strip()}
        pid = int((said - {"ready"}).pop())
        process.kill()
    deadline = time.monotonic() + 5
    while running(pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)


def running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"  # nobody may be there to bury it


def test_key_depends_on_names_contents_and_params_and_on_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "b").write_text("B")
    (folder / "a").write_text("A")
    key = content_key({"x": 1, "y": 2}, [folder])
    os.utime(folder / "a", (0, 0))
    assert content_key({"y": 2, "x": 1}, [folder]) == key
    changed = {content_key({"x": 1, "y": 3}, [folder])}
    (folder / "a").rename(folder / "c")
    changed.add(content_key({"x": 1, "y": 2}, [folder]))
    (folder / "c").rename(folder / "a")
    (folder / "a").write_text("AA")
    changed.add(content_key({"x": 1, "y": 2}, [folder]))
    assert len(changed | {key}) == 4
    assert len(key) == hashlib.sha256().digest_size * 2


def test_a_missing_input_is_told_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="nowhere"), kept("t@a", [tmp_path / "o"], [Path("nowhere")], dict, tmp_path):
        pass


def test_outs_of_the_same_inputs_are_made_one_after_the_other(tmp_path: Path, source: Path) -> None:
    """Two temporary DVC experiments have outs of their own, and one work folder."""
    with kept("train@a", [tmp_path / "one"], [source], dict, tmp_path) as keep:
        build(keep)
        (keep.work / "checkpoint").write_text("step 3")
        with pytest.raises(BusyError), kept("train@a", [tmp_path / "two"], [source], dict, tmp_path):
            pass
        assert (keep.work / "checkpoint").read_text() == "step 3"


def test_what_python_compiles_is_no_content(tmp_path: Path) -> None:
    (tmp_path / "room.py").write_text("x = 1")
    key = content_key({}, [tmp_path])
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "room.cpython-311.pyc").write_bytes(b"1")
    assert content_key({}, [tmp_path]) == key
