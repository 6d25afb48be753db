"""What is shipped: an sdist, a wheel made from that sdist alone, and the wheel's package somewhere else than here."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def build(kind: str, source: Path, folder: Path) -> Path:
    """Build an sdist or a wheel with the installed setuptools, which needs no network."""
    code = f"from setuptools.build_meta import build_{kind}; print(build_{kind}({str(folder)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source") / "attn_cifar"
    unwanted = shutil.ignore_patterns(".venv*", ".git", "runs", "build", "dist", "*.egg-info", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, source, ignore=unwanted)
    return build("sdist", source, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist, tmp_path_factory) -> Path:
    unpacked = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extraction_filter = getattr(tarfile, "data_filter", None)  # Python 3.12 warns without one
        archive.extractall(unpacked)
    return build("wheel", next(unpacked.iterdir()), tmp_path_factory.mktemp("wheel"))


def package_files(folder: Path) -> set[str]:
    """Return the files of the package by their paths from the folder above it."""
    kinds = {".py", ".typed", ".json", ".safetensors", ".csv", ".md", ".html", ".css"}
    return {str(p.relative_to(folder)) for p in (folder / "attn_cifar").rglob("*") if p.suffix in kinds}


def test_wheel_holds_the_package_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert "attn_cifar/py.typed" in names
    results = {f"attn_cifar/results/{path.name}" for path in (ROOT / "nbs" / "studies" / "results").glob("*.json")}
    assert results and names == package_files(ROOT) | results


def test_wheel_needs_no_development_tool(wheel):
    archive = zipfile.ZipFile(wheel)
    metadata = archive.read(next(n for n in archive.namelist() if n.endswith("/METADATA"))).decode()
    needs = [line.split(": ")[1] for line in metadata.splitlines() if line.startswith("Requires-Dist: ")]
    for_users = [need for need in needs if "extra ==" not in need]
    assert any(need.startswith("torch>=") for need in for_users)
    assert any(need.startswith("nbdev") and "extra ==" in need for need in needs)
    assert not any(need.startswith(("nbdev", "fastcore", "execnb", "jupyter", "pytest")) for need in for_users)


@pytest.mark.parametrize("url", ["", "https://example.org/us/attn_cifar"])
def test_links_work_on_a_package_index(tmp_path, url):
    """README's links are relative; an index shows it elsewhere."""
    for name in ("setup.py", "settings.ini", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path / name)
    settings = tmp_path / "settings.ini"
    settings.write_text(settings.read_text().replace("git_url =", f"git_url = {url}"))
    (tmp_path / "attn_cifar").mkdir()
    (tmp_path / "attn_cifar" / "__init__.py").touch()
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare; prepare('metadata')"
    (tmp_path / "metadata").mkdir()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = next((tmp_path / "metadata").rglob("METADATA")).read_text()
    targets = re.findall(r"\]\(([^)]*)\)", text)
    assert targets and all(target.startswith(("https:", "#")) for target in targets), targets
    for place in ("blob/main/nbs/01_data.ipynb", "raw/main/nbs/images/overview.png"):
        assert (f"({url}/{place})" in text) is bool(url) and (url or place not in text)
    assert text.count("Project-URL: ") == (2 if url else 0)


def test_wheel_runs_where_the_repository_is_not(wheel, tmp_path):
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    run = {"cwd": tmp_path, "capture_output": True, "text": True}
    run["env"] = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    where = subprocess.run([sys.executable, "-c", "import attn_cifar; print(attn_cifar.__file__)"], **run).stdout
    assert where.startswith(str(tmp_path)), "the repository was tested instead of the wheel"
    done = subprocess.run([sys.executable, "-m", "attn_cifar", "--help"], **run)
    assert done.returncode == 0 and "train" in done.stdout, done.stderr
    load = "from attn_cifar.models import load_pretrained; print(load_pretrained('attn_tiny').training)"
    done = subprocess.run([sys.executable, "-c", load], **run)
    assert done.stdout.strip() == "False", f"the weights are not in the wheel: {done.stderr}"
    load = "from attn_cifar.runs import load_results; print(load_results('ladder')['study'])"
    done = subprocess.run([sys.executable, "-c", load], **run)
    assert done.stdout.strip() == "ladder", f"the studies' results are not in the wheel: {done.stderr}"
