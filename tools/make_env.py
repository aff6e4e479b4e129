#!/usr/bin/env python3
"""Make `.venv` in this checkout: a thin environment over a shared one for pyproject.toml's dependencies.

The heavy packages (torch, DALI: 5.5 GB) live in ~/.cache/psla_fast/venv-HASH ($PSLA_FAST_CACHE moves it)
with the hash of the dependencies, so they are installed once for all checkouts. `.venv` adds this checkout,
editable, and the commands. Uses the standard library only.
"""

import fcntl
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CACHE = Path(os.environ.get("PSLA_FAST_CACHE", "~/.cache/psla_fast")).expanduser()
EXTRAS = ["dali", "dev", "export", "lite", "serve", "timm"]
# argparse of Python 3.11 stops at --run, an option of psla_fast.train, as short for torchrun's --run-path
TORCHRUN = """\
import sys

from torch.distributed import run

make_parser = run.get_args_parser


def get_args_parser():
    parser = make_parser()
    parser.allow_abbrev = False
    return parser


run.get_args_parser = get_args_parser
sys.exit(run.main())
"""


def run(*command: str | Path) -> None:
    """Run a command; its failure ends the script."""
    status = subprocess.run([str(part) for part in command], check=False).returncode
    if status:
        sys.exit(f"make env: `{' '.join(map(str, command))}` failed with status {status}")


def declared_requirements(pyproject: Path) -> list[str]:
    """Every dependency that pyproject.toml names, the extras of EXTRAS included."""
    import tomllib

    project = tomllib.loads(pyproject.read_text())["project"]
    return project["dependencies"] + [r for extra in EXTRAS for r in project["optional-dependencies"][extra]]


def make_shared(shared: Path, requirements: list[str]) -> None:
    """Install the declared packages into `shared`, once; an install that was cut off is done again."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(f"{shared}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (shared / "complete").exists():
            return
        start = time.monotonic()
        print(f"make env: installing the packages into {shared} (about 5.5 GB, some minutes) …", flush=True)
        run(sys.executable, "-m", "venv", "--clear", shared)
        listed = shared / "requirements.txt"
        listed.write_text("\n".join(requirements) + "\n")
        pip = [shared / "bin/python", "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
        run(*pip, "setuptools>=65", "wheel")
        run(*pip, "-r", listed)
        (shared / "complete").touch()
        print(f"make env: installed in {time.monotonic() - start:.0f} s", flush=True)


def make_thin(shared: Path, venv: Path) -> None:
    """Lay `.venv` over `shared`: its packages, this checkout editable, its commands with our Python."""
    if venv.is_symlink():
        venv.unlink()
    run(sys.executable, "-m", "venv", "--clear", "--without-pip", venv)
    packages = Path("lib") / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (venv / packages / "shared.pth").write_text(f"import site; site.addsitedir({str(shared / packages)!r})\n")
    python = venv / "bin/python"
    for command in sorted((shared / "bin").iterdir()):
        own = venv / "bin" / command.name
        if own.exists() or not command.is_file() or not os.access(command, os.X_OK):
            continue
        with open(command, "rb") as file:
            head = file.readline()
            body = file.read()
        if head.startswith(b"#!") and b"python" in head:
            body = TORCHRUN.encode() if command.name == "torchrun" else body
            own.write_bytes(f"#!{python}\n".encode() + body)
            own.chmod(0o755)
        else:
            own.symlink_to(command)
    pip = [
        python,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "install",
        "--quiet",
        "--root-user-action=ignore",
    ]
    run(*pip, "--no-deps", "--no-build-isolation", "--editable", ROOT)


def main() -> None:
    """Make what is missing or out of date; nothing otherwise."""
    if sys.version_info < (3, 11):  # noqa: UP036 - run by whatever Python there is
        sys.exit(f"make env: Python {sys.version.split()[0]} found, 3.11 needed: make env PYTHON=python3.11")
    if os.name != "posix":
        sys.exit("make env: needs Linux or macOS; elsewhere: pip install -e .[dev,export,lite,serve,timm]")
    requirements = declared_requirements(ROOT / "pyproject.toml")
    key = hashlib.sha256("\n".join([*requirements, sys.version]).encode()).hexdigest()[:16]
    shared, venv = CACHE / f"venv-{key}", ROOT / ".venv"
    stamp = venv / "made-for"
    wanted = f"{shared}\n{ROOT}\n"
    make_shared(shared, requirements)
    if not (stamp.exists() and stamp.read_text() == wanted):
        make_thin(shared, venv)
        stamp.write_text(wanted)


if __name__ == "__main__":
    main()
