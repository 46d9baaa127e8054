#!/usr/bin/env python3
"""Sets up and runs the pack on its own, without ComfyUI. Standard library only.

    python run.py setup     makes .venv next to this file and installs the tested packages
    python run.py demo      shows the method at work (arguments go to retrieval_core.paperdoll.demo)
    python run.py test      runs the tests (arguments go to pytest)
    python run.py train     trains the bundled weights (arguments: retrieval_core.paperdoll.train)

demo, test and train do the set-up first if it is needed. To use an environment of your own, which
must hold the packages of requirements-dev.txt, set RETRIEVAL_PYTHON to its Python.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import urllib.request

MINIMUM = (3, 10)
if sys.version_info < MINIMUM:
    sys.exit(
        "Python {}.{} is too old; run this with Python {}.{} or newer.".format(
            *sys.version_info[:2], *MINIMUM
        )
    )

from pathlib import Path  # noqa: E402

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
STAMP = VENV / "retrieval-setup"
REQUIREMENTS = ROOT / "requirements-dev.txt"
TORCH_FOR_CPU = "https://download.pytorch.org/whl/cpu"
UNFINISHED = "unfinished"
NEEDED = (
    "torch", "numpy", "PIL", "einops", "safetensors", "huggingface_hub", "matplotlib", "tqdm",
    "pytest",
)  # fmt: skip
COMMANDS = {
    "demo": ["-m", "retrieval_core.paperdoll.demo"],
    "test": ["-m", "pytest"],
    "train": ["-m", "retrieval_core.paperdoll.train"],
}


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    command, *rest = arguments
    if command not in ("setup", *COMMANDS):
        sys.exit(f"There is no command '{command}'; use one of setup, {', '.join(COMMANDS)}.")
    if command == "setup" and rest:
        sys.exit(f"setup takes no arguments, but got {' '.join(rest)}; leave them out.")
    python = find_python()
    if command == "setup":
        print(f"Ready: {python}")
        return 0
    return hand_over(python, [*COMMANDS[command], *rest], cwd=ROOT if command == "test" else None)


def find_python() -> Path:
    """The Python to run with; sets .venv up first if it is missing, unfinished or out of date."""
    given = os.environ.get("RETRIEVAL_PYTHON")
    if given:
        return check_python(given)
    python = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if read_stamp() == wanted and python.is_file():
        return python
    with lock_set_up():
        if read_stamp() != wanted or not python.is_file():  # another run may just have done it
            set_up(python)
            STAMP.write_text(wanted, encoding="utf-8")
    return python


def check_python(given: str) -> Path:
    """The path of the user's Python, if it has the needed packages; installs nothing."""
    # Not resolved: a virtual environment is known by the path of its link.
    python = Path(os.path.abspath(shutil.which(given) or given))
    check = (
        "import importlib.util, sys; print(sys.version_info >= (3, 10) and 'ok', "
        f"*(m for m in {NEEDED!r} if importlib.util.find_spec(m) is None))"
    )
    try:
        answer = subprocess.check_output([str(python), "-c", check], text=True).split()
    except (OSError, subprocess.CalledProcessError) as error:
        sys.exit(f"RETRIEVAL_PYTHON is '{given}', which does not run ({error}); name a Python.")
    if answer[0] != "ok":
        sys.exit(f"RETRIEVAL_PYTHON is '{given}', which is older than Python 3.10; name another.")
    if answer[1:]:
        sys.exit(
            f"RETRIEVAL_PYTHON is '{given}', which lacks {', '.join(answer[1:])}; install "
            f"{REQUIREMENTS.name} into it, or unset RETRIEVAL_PYTHON."
        )
    return python


def read_stamp() -> str:
    """The hash of the requirements that .venv was set up for; empty without one."""
    try:
        return STAMP.read_text(encoding="utf-8")
    except OSError:
        return ""


def set_up(python: Path) -> None:
    """Makes .venv and installs into it; STAMP says UNFINISHED meanwhile."""
    made_elsewhere = VENV.exists() and not STAMP.is_file() and any(VENV.iterdir())
    if made_elsewhere or VENV.is_symlink():
        sys.exit(
            f"The folder {VENV} was not made by this script; rename it, or set RETRIEVAL_PYTHON to "
            "the Python in it."
        )
    VENV.mkdir(exist_ok=True)
    STAMP.write_text(UNFINISHED, encoding="utf-8")
    print("Setting up .venv; this is done once and takes a few minutes.", flush=True)
    # Half-written packages look installed to pip, so an old environment is emptied first.
    for entry in VENV.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        elif entry != STAMP:
            entry.unlink()
    # The base, because this may have been started from within the environment just emptied.
    maker = getattr(sys, "_base_executable", None) or sys.executable
    if subprocess.call([maker, "-m", "venv", str(VENV)]) != 0:
        sys.exit(
            f"{maker} could not make a virtual environment; install its venv module (on Debian and "
            "Ubuntu: sudo apt install python3-venv) and run this again."
        )
    pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--no-input"]
    if not sys.stdout.isatty():
        pip.append("--quiet")
    torch = [word for word in REQUIREMENTS.read_text().split() if word.startswith("torch==")]
    if torch and wants_cpu_torch():
        # Without its dependencies, so that nothing but torch comes from there. If it fails, the
        # next call installs torch from PyPI.
        subprocess.call([*pip, "--no-deps", "--index-url", TORCH_FOR_CPU, *torch])
    if subprocess.call([*pip, "-r", str(REQUIREMENTS)]) != 0:
        sys.exit(
            "The packages could not be installed (pip's own message is above); check the network "
            f"and the free space on {VENV.parent}, and run this again."
        )


def wants_cpu_torch() -> bool:
    """Whether to install torch's CPU build: on Linux without an NVIDIA GPU PyPI's adds CUDA."""
    if not sys.platform.startswith("linux") or shutil.which("nvidia-smi"):
        return False
    try:
        with urllib.request.urlopen(f"{TORCH_FOR_CPU}/torch/", timeout=10):
            return True
    except (OSError, ValueError):
        return False


@contextlib.contextmanager
def lock_set_up():
    """Locks out a second set-up; the system frees the lock when the process ends in any way."""
    with open(ROOT / ".venv.lock", "a+b") as file:
        file.seek(0)
        try:
            if os.name == "nt":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            sys.exit("Another run.py is setting up .venv; wait until it is done, then repeat.")
        yield


def hand_over(python: Path, arguments: list[str], cwd: Path | None) -> int:
    """Runs Python with the pack importable; returns the child's exit code."""
    line = [str(python), *arguments]
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    if os.name != "nt":  # becoming the child, so that signals reach it and not us
        if cwd is not None:
            os.chdir(cwd)
        sys.stdout.flush()
        os.execve(line[0], line, variables)
    with subprocess.Popen(line, env=variables, cwd=cwd) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:  # the child got it too, and may be saving its work
                continue


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("Interrupted; run the same command again to continue.")
    except OSError as error:
        sys.exit(f"This could not be done ({error}); check permissions and free space, and repeat.")
