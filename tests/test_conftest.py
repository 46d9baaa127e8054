"""Where the host tests cannot run, the others pass and one line says why."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).with_name("conftest.py")
PACKAGE = "surely-not-installed"


@pytest.fixture
def comfyui(tmp_path):
    folder = tmp_path / "ComfyUI"
    (folder / "comfy").mkdir(parents=True)
    (folder / "main.py").touch()
    (folder / "requirements.txt").write_text(
        f"Pytest>=1\n# a comment\n{PACKAGE}~=2.0\ntorchaudio\n\n#non essential:\nmore\n"
    )
    return folder


def reason(monkeypatch, comfyui_path):
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui_path))
    spec = importlib.util.spec_from_file_location("conftest_under_test", CONFTEST)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert ("host" in module.collect_ignore) == (module.no_host_line() is not None)
    assert module.collect_ignore != ["host"]  # without a host nothing in a browser either
    return module.no_host_line()


def test_what_is_missing_is_named(monkeypatch, comfyui):
    text = reason(monkeypatch, comfyui)
    assert f"lacks {PACKAGE} of the requirements of {comfyui}; " in text
    assert "RETRIEVAL_PYTHON" in text and text.endswith(".") and "\n" not in text
    (comfyui / "requirements.txt").write_text("".join(f"{PACKAGE}-{i}\n" for i in range(8)))
    assert f"{PACKAGE}-4 and 3 more of" in reason(monkeypatch, comfyui)


def test_a_missing_chromium_is_named(monkeypatch, comfyui):
    (comfyui / "requirements.txt").write_text("pytest\n")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("COMFYUI_PATH", str(comfyui))
    spec = importlib.util.spec_from_file_location("conftest_under_test", CONFTEST)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.collect_ignore == ["browser"]
    assert "apt install chromium" in module.no_chromium_line()


def test_a_complete_environment_runs_them(monkeypatch, comfyui):
    (comfyui / "requirements.txt").write_text("pytest\n")
    assert reason(monkeypatch, comfyui) is None
    (comfyui / "requirements.txt").unlink()
    assert reason(monkeypatch, comfyui) is None


def test_a_wrong_folder_is_named(monkeypatch, tmp_path):
    assert f"COMFYUI_PATH={tmp_path} has no main.py" in reason(monkeypatch, tmp_path)


def test_the_others_pass_without_the_hosts_packages(comfyui, tmp_path):
    tests = tmp_path / "pack" / "tests"
    (tests / "host").mkdir(parents=True)
    shutil.copy(CONFTEST, tests)
    (tests / "host" / "conftest.py").write_text("import surely_not_installed\n")
    (tests / "host" / "test_host.py").write_text("def test_host(): assert False\n")
    (tests / "test_core.py").write_text("def test_core(): pass\n")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--rootdir", str(tests.parent)],
        cwd=tests.parent,
        env={**os.environ, "COMFYUI_PATH": str(comfyui)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("Host tests (tests/host) skipped: ") == 1
