"""The wheel, as a server's machine installs it: everything is in it, and it works without the checkout."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import pytest

import genarm
from builders.tiny import save_member, tiny_model
from genarm.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "genarm"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, by the script of the Dockerfile; what it depends on is that of this one."""
    place = tmp_path_factory.mktemp("wheel") / "venv"
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    site = next(place.glob("lib/python*/site-packages"))
    for old in site.glob("setuptools*"):  # of Python 3.11, too old to build with: that of this environment is found
        shutil.rmtree(old)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {**os.environ, "PYTHON": str(place / "bin" / "python"), "PIP_NO_BUILD_ISOLATION": "false"}
    environment.pop("PYTHONPATH", None)
    script = [str(ROOT / "scripts" / "install-server"), "cpu", "--no-deps"]
    subprocess.run(script, env=environment, check=True, timeout=300)
    return place


def run(installed: Path, *command: str, **options: object) -> str:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    words = [str(installed / "bin" / command[0]), *command[1:]]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stderr
    return str(done.stdout)


def test_everything_is_in_the_wheel(installed: Path) -> None:
    def files(folder: Path) -> set[str]:
        found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        return {name for name in found if "__pycache__" not in name}

    package = next(installed.glob("lib/python*/site-packages/genarm"))
    assert files(package) == files(SOURCE)
    assert {"server/page/index.html", "py.typed", "model/remote_code.py"} <= files(package)


def test_it_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    assert run(installed, "genarm", "--version", cwd=tmp_path) == f"genarm {genarm.__version__}\n"
    assert "usage: genarm serve" in run(installed, "genarm", "serve", "--help", cwd=tmp_path)
    first_step = (
        "import genarm, sys\n"
        "from pathlib import Path\n"
        "from rich.console import Console\n"
        "from genarm.lab.demo.base import BaseSettings, train_base\n"
        "from genarm.lab.demo.world import split_requests\n"
        f"assert Path(genarm.__file__).is_relative_to({str(installed)!r})\n"
        "small = BaseSettings(replies=200, hidden=32, heads=2, batch_size=16)\n"
        "train_base(Path('base'), split_requests(0).train, settings=small, seed=0, console=Console())\n"
    )
    run(installed, "python", "-c", first_step, cwd=tmp_path)
    assert (tmp_path / "base" / "model.safetensors").exists()
    save_member(tiny_model(), tmp_path / "model")
    command = [str(installed / "bin" / "genarm"), "serve", "model", "--port", "0", "--device", "cpu"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = next(line.split()[-1] for line in server.stdout if "is served at" in line)
            page = urllib.request.urlopen(url).read().decode()
            parts = re.findall(r'(?:src|href)="([^"#:]+)"', page)
            assert parts
            for part in parts:
                assert urllib.request.urlopen(f"{url}/{part.lstrip('/')}").status == 200
        finally:
            server.terminate()


def test_the_dockerfile_holds_together() -> None:
    """No image can be built here: what it copies is there, and what it starts is a command line of ours."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()[:-1])
    wanted = {name for line in re.findall(r"^COPY (.*)$", text, flags=re.MULTILINE) for name in line.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert wanted == {name.removeprefix("!") for name in ignored if name.startswith("!")}
    start, arguments = (re.search(rf"^{word} \[(.*)\]$", text, flags=re.MULTILINE) for word in ("ENTRYPOINT", "CMD"))
    assert start is not None
    assert arguments is not None
    words = shlex.split(f"{start[1]}, {arguments[1]}".replace(",", " "))
    assert words[0] == "genarm"
    build_parser().parse_args(words[1:])
    (run_line,) = re.findall(r"^RUN (.*)$", text, flags=re.MULTILINE)
    assert 'scripts/install-server "$TORCH"' in run_line
