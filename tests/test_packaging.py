"""The package holds all that it should, imports cheaply, and is called only by its own name."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import lxt

try:
    import tomllib
except ImportError:  # Python 3.10
    from pip._vendor import tomli as tomllib

SAFELY = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4
ROOT = Path(__file__).resolve().parent.parent
MAPPED = {"lxt.patches": "patches", "lxt.triton_kernels": "triton_kernels"}
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def source_files() -> set[str]:
    """The Python files as they are called inside the wheel."""
    real = {"lxt": ROOT / "lxt"} | {name.replace(".", "/"): ROOT / folder for name, folder in MAPPED.items()}
    found = set()
    for prefix, folder in real.items():
        for path in folder.rglob("*.py"):  # rglob doesn't follow the symlinks inside lxt/
            found.add(f"{prefix}/{path.relative_to(folder).as_posix()}")
    return found


def test_every_subpackage_is_listed():
    packages = {str(Path(name).parent).replace("/", ".") for name in source_files() if name.endswith("/__init__.py")}
    assert packages == set(SETUPTOOLS["packages"])


def test_symlinks_and_mapping_name_the_same_folders():
    assert SETUPTOOLS["package-dir"] == MAPPED
    for name, folder in MAPPED.items():
        link = ROOT / name.replace(".", "/")
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


def build(kind: str, source: Path, out: Path) -> Path:
    result = python(f"import setuptools.build_meta as b; b.build_{kind}({str(out)!r})", folder=source)
    assert result.returncode == 0, result.stderr
    return next(out.glob("lxt-*"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy to build in, so that nothing is left behind in the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    copy = tmp_path_factory.mktemp("source") / "lxt"
    copy.mkdir()
    skip = shutil.ignore_patterns("__pycache__")
    for folder in ("lxt", "patches", "triton_kernels"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True, ignore=skip)
    for file in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, copy)
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    with zipfile.ZipFile(build("wheel", source, tmp_path_factory.mktemp("wheel"))) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_module(wheel):
    assert {name for name in wheel if name.endswith(".py")} == source_files()


def test_wheel_holds_the_typing_marker_the_licence_and_the_bundled_model(wheel):
    assert "lxt/py.typed" in wheel
    assert any(name.endswith("licenses/LICENSE") for name in wheel)
    tiny = {path.name for path in (ROOT / "lxt" / "tiny").iterdir() if path.suffix in (".safetensors", ".json", ".md")}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= tiny
    assert {f"lxt/tiny/{name}" for name in tiny} <= wheel
    assert not [name for name in wheel if name.startswith(("tests", "examples", "docs", "patches", "triton_kernels"))]


def test_wheel_holds_the_explorers_page(wheel):
    page = {f"lxt/show/page/{path.name}" for path in (ROOT / "lxt" / "show" / "page").iterdir()}
    assert {"lxt/show/page/explorer.html", "lxt/show/page/explorer.css", "lxt/show/page/explorer.js"} <= page <= wheel


def test_a_wheel_from_the_source_distribution_is_the_same(source, wheel, tmp_path):
    with tarfile.open(build("sdist", source, tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", **SAFELY)
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    with zipfile.ZipFile(build("wheel", unpacked, tmp_path / "wheel")) as archive:
        assert set(archive.namelist()) == wheel


def test_version_is_the_installed_one():
    try:
        installed = version("lxt")
    except PackageNotFoundError:
        pytest.skip("lxt is used from a checkout that isn't installed")
    assert installed == lxt.__version__


def test_importing_lxt_takes_nothing_heavy_with_it():
    code = (
        "import sys, time; start = time.perf_counter(); import lxt; print(time.perf_counter() - start); "
        "print(sorted({'torch', 'transformers', 'triton', 'matplotlib', 'rich', 'numpy'} & set(sys.modules)))"
    )
    result = python(code)
    seconds, heavy = result.stdout.split("\n", 1)
    print(f"import lxt: {float(seconds) * 1000:.0f} ms")
    assert heavy.strip() == "[]"


@pytest.mark.parametrize("name", ["lxt.mode", "lxt.rules", "lxt.patching"])
def test_the_engine_loads_without_transformers_and_triton(name):
    result = python(f"import sys, {name}; print(sorted({{'transformers', 'triton'}} & set(sys.modules)))")
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("name", sorted(lxt.__all__))
def test_public_names_are_there(name):
    assert getattr(lxt, name) is not None
    assert name in dir(lxt)


def test_public_names_are_those_that_type_checkers_see():
    # pyright checks the other direction: that what TYPE_CHECKING imports exists.
    assert set(lxt._HOME) | {"audit", "neurons", "steering"} == set(lxt.__all__)  # these are modules


def test_unknown_name_says_what_there_is():
    with pytest.raises(AttributeError, match=r"has no attribute 'monkeypatch'; it has .*monkey_patch"):
        lxt.monkeypatch  # noqa: B018


@pytest.mark.parametrize("name", sorted(MAPPED))
def test_mapped_packages_refuse_their_bare_names(name):
    # triton_kernels is another project's package too: from the repository's root, ours must not pass for it.
    bare = name.removeprefix("lxt.")
    result = python(f"import {bare}")
    assert result.returncode != 0
    assert f"import them as {name}" in result.stderr
    assert python(f"import {name}").returncode == 0
