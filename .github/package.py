"""Install the built wheel and sdist in clean environments, a Python at a time, and run the tests there: `make test-package`."""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
QUICK = "test_main_job.py", "test_pretrained.py", "test_cifar10.py", "test_engine.py"
REPOSITORY = "test_repository.py", "test_package.py", "test_colab.py"  # what a package cannot answer
FLOORS = ["torch==2.4.*", "torchvision==0.19.*", "albumentations==2.0.8"]  # the oldest that settings.ini allows
TOOLS = ["pytest", "pytest-xdist", "hypothesis", "selenium", "gradio"]


def pythons() -> list[str]:
    """Return the interpreters on the path that the package supports, oldest first."""
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    oldest = int(settings["DEFAULT"]["min_python"].split(".")[1])
    return [found for minor in range(oldest, oldest + 10) if (found := shutil.which(f"python3.{minor}"))]


def build(python: str, folder: Path) -> tuple[Path, Path]:
    """Build the sdist, and the wheel from it alone, as a release does."""
    source = shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(".venv*", ".git", "runs", "_docs", "build"))
    subprocess.run([python, "-m", "venv", str(folder / "builder")], check=True)
    builder = [str(folder / "builder" / "bin" / "python"), "-m"]
    subprocess.run([*builder, "pip", "install", "-q", "build"], check=True)
    subprocess.run([*builder, "build", "-o", str(folder / "dist"), str(source)], check=True, capture_output=True)
    return next((folder / "dist").glob("*.whl")), next((folder / "dist").glob("*.tar.gz"))


def try_out(python: str, package: Path, folder: Path, constraints: list[str], tests: list[str]) -> bool:
    """Install into an environment of its own, and run tests outside the repository; tell whether all passed."""
    environment = folder / "environment"
    subprocess.run([python, "-m", "venv", str(environment)], check=True)
    bin_ = environment / "bin"
    try:
        wanted = [str(package), *constraints, *TOOLS]
        if subprocess.run([str(bin_ / "python"), "-m", "pip", "install", "-q", *wanted]).returncode:
            return False
        subprocess.run([str(bin_ / "python"), "-m", "pip", "check"], check=True, capture_output=True)
        alone = folder / "alone"
        shutil.copytree(ROOT / "tests", alone / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        variables = {"PATH": f"{bin_}:{os.environ['PATH']}", "HOME": str(folder), "OMP_NUM_THREADS": "1"}  # as in `make test`
        run = {"cwd": alone, "env": {**os.environ, **variables}}
        command = [str(bin_ / "python"), "-m", "pytest", "-q", "-n", "2", *(f"tests/{name}" for name in tests)]
        return subprocess.run(command, **run).returncode == 0
    finally:
        shutil.rmtree(environment)  # six gigabytes
        shutil.rmtree(folder / "alone", ignore_errors=True)


def main() -> int:
    """Try every combination and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pythons", nargs="*", help="interpreters, oldest first; without any, those on the path. On the "
                                                   "last one the wheel runs every test that needs no repository")
    arguments = parser.parse_args()
    everything = [path.name for path in sorted((ROOT / "tests").glob("test_*.py")) if path.name not in REPOSITORY]
    chosen, lines = arguments.pythons or pythons(), []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel, sdist = build(sys.executable, folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB, {sdist.name}: {sdist.stat().st_size / 1e6:.2f} MB", flush=True)
        trials = [(python, wheel, [], "wheel") for python in chosen]
        trials += [(chosen[0], wheel, FLOORS, "wheel, oldest requirements"), (chosen[0], sdist, [], "sdist")]
        for python, package, constraints, words in trials:
            tests = everything if words == "wheel" and python == chosen[-1] else list(QUICK)
            version = subprocess.run([python, "--version"], capture_output=True, text=True, check=True).stdout.strip()
            passed = try_out(python, package, folder, constraints, tests)
            lines.append(f"{version}, {words}, {len(tests)} test files: {'passed' if passed else 'FAILED'}")
            print(lines[-1], flush=True)
    print("\n".join(["", *lines]))
    return any(line.endswith("FAILED") for line in lines)


if __name__ == "__main__":
    sys.exit(main())
