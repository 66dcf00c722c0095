"""The wheel alone, in an environment that has nothing else, is a working program."""

import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "src" / "f2llm"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True)
    (path,) = folder.glob("f2llm-*.whl")
    return path


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    ours = {
        f"f2llm/{path.relative_to(PACKAGE).as_posix()}"
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    assert "f2llm/py.typed" in ours
    assert ours == {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_command_of_the_wheel_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    environment, empty = tmp_path / "environment", tmp_path / "empty"
    empty.mkdir()
    venv.create(environment, with_pip=True)
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}

    def call(program: str, *arguments: str) -> str:
        command = [str(environment / "bin" / program), *arguments]
        result = subprocess.run(command, cwd=empty, env=clean, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        return result.stdout

    # The pins of `make install` are what pip has just fetched, so its cache serves them again.
    call("python", "-m", "pip", "install", "-qq", "-c", str(ROOT / "constraints.txt"), str(wheel))
    assert "run" in call("f2llm", "--help").split()
    origin = call("python", "-c", "import f2llm; print(f2llm.__file__)").strip()
    assert Path(origin).is_relative_to(environment)
