"""run.py's set-up on a copy with no packages to install: made once, mended, never half done."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

PACK = Path(__file__).resolve().parent.parent
PYTHON = getattr(sys, "_base_executable", None) or sys.executable


@pytest.fixture
def pack(tmp_path):
    folder = tmp_path / "a pack, copied"
    folder.mkdir()
    shutil.copy(PACK / "run.py", folder)
    (folder / "requirements-dev.txt").write_text("# nothing\n")
    world = folder / "retrieval_core" / "paperdoll"
    world.mkdir(parents=True)
    (folder / "retrieval_core" / "__init__.py").touch()
    (world / "__init__.py").touch()
    (world / "demo.py").write_text(
        "import os, sys\nprint(sys.prefix, os.getcwd(), sys.argv[1:])\nsys.exit(7)\n"
    )
    return folder


def run(pack, *arguments, cwd=None, **variables):
    environment = {k: v for k, v in os.environ.items() if k not in ("RETRIEVAL_PYTHON",)}
    return subprocess.run(
        [PYTHON, str(pack / "run.py"), *arguments],
        capture_output=True,
        text=True,
        cwd=cwd or pack,
        env={**environment, **variables},
        timeout=300,
    )


def refused(result):
    """The one sentence of a refusal."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1 and lines and "Traceback" not in result.stderr, result
    assert lines[-1].endswith("."), lines
    return lines[-1]


def test_set_up_once_then_pass_arguments_folder_and_exit_code_on(pack, tmp_path):
    first = run(pack, "demo", "--reference", "a b.png:face", cwd=tmp_path)
    assert first.returncode == 7 and "Setting up" in first.stdout
    assert str(pack / ".venv") in first.stdout and "['--reference', 'a b.png:face']" in first.stdout
    second = run(pack, "demo", cwd=tmp_path)
    assert second.returncode == 7 and "Setting up" not in second.stdout
    assert f" {tmp_path} " in second.stdout

    (pack / "requirements-dev.txt").write_text("# changed\n")
    assert "Setting up" in run(pack, "setup").stdout

    link = pack / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    link.unlink()  # as after an upgrade of the system's Python
    assert "Setting up" in run(pack, "setup").stdout


@pytest.mark.skipif(os.name == "nt", reason="kills a process group")
def test_killed_set_up_is_started_afresh(pack):
    running = subprocess.Popen(
        [PYTHON, str(pack / "run.py"), "setup"], cwd=pack, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while not (pack / ".venv" / "pyvenv.cfg").exists():
        assert time.monotonic() < deadline and running.poll() is None
        time.sleep(0.01)
    busy = run(pack, "setup")
    os.killpg(running.pid, signal.SIGKILL)
    running.wait()
    assert "Another run.py" in refused(busy)
    (pack / ".venv" / "half-written").touch()
    result = run(pack, "setup")
    assert result.returncode == 0 and "Setting up" in result.stdout
    assert not (pack / ".venv" / "half-written").exists()


def test_failed_installation_is_not_taken_for_done(pack):
    (pack / "requirements-dev.txt").write_text("./no-such-package-here\n")
    for _ in range(2):
        assert "could not be installed" in refused(run(pack, "setup"))


def test_environment_of_the_users_own_is_left_alone(pack):
    (pack / ".venv").mkdir()
    (pack / ".venv" / "mine").touch()
    assert "was not made by this script" in refused(run(pack, "setup"))
    assert (pack / ".venv" / "mine").exists()


def test_given_python(pack, tmp_path):
    assert "does not run" in refused(run(pack, "demo", RETRIEVAL_PYTHON=str(tmp_path / "none")))
    subprocess.run([PYTHON, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    bare = tmp_path / "bare" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    assert "lacks torch, numpy" in refused(run(pack, "demo", RETRIEVAL_PYTHON=str(bare)))
    result = run(pack, "demo", RETRIEVAL_PYTHON=sys.executable)
    assert result.returncode == 7 and sys.prefix in result.stdout
    assert not (pack / ".venv").exists()


def test_wrong_commands(pack):
    assert "no command 'demos'" in refused(run(pack, "demos"))
    assert "takes no arguments" in refused(run(pack, "setup", "now"))
    assert "python run.py demo" in run(pack).stdout


def test_comfyui_manager_installs_what_the_project_names():
    """Two files because ComfyUI-Manager reads only requirements.txt; they must not drift."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 reads TOML")
    project = tomllib.loads((PACK / "pyproject.toml").read_text())["project"]
    lines = (PACK / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]
    assert not any(line.startswith("torch") for line in project["dependencies"])


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_environment_behind_a_link_is_left_alone(pack, tmp_path):
    shared = tmp_path / "shared"
    (shared / "bin").mkdir(parents=True)
    (shared / "retrieval-setup").write_text("of other requirements")
    (pack / ".venv").symlink_to(shared)
    assert "was not made by this script" in refused(run(pack, "setup"))
    assert (shared / "bin").is_dir()
