"""Package attn_cifar from settings.ini, which nbdev reads too: every fact about the package is written there once."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(root / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
readme = root / "README.md"


class BuildWithResults(build_py):
    """Put what the studies measured into the wheel; an editable install reads the repository's."""

    def run(self):
        """Build, then copy."""
        super().run()
        if not self.editable_mode:
            results = Path(self.build_lib, "attn_cifar", "results")
            self.mkpath(str(results))
            for path in sorted((root / "nbs" / "studies" / "results").glob("*.json")):
                self.copy_file(str(path), str(results / path.name))


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    license=settings["license"],
    classifiers=["Intended Audience :: Education", "Programming Language :: Python :: 3", "Typing :: Typed"],
    packages=find_packages(include=["attn_cifar", "attn_cifar.*"]),
    package_data={"attn_cifar": ["py.typed", "pretrained/*/*", "report/*.html", "report/*.css"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[f"{name}_requirements"].split() for name in ("dev", "app", "onnx", "docs", "bench")},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    cmdclass={"build_py": BuildWithResults},
    zip_safe=False,
)
