"""Package attn_cifar from settings.ini, which nbdev reads too: every fact about the package is written there once."""

import re
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


def relink(text: str) -> str:
    """Make README's relative links absolute, as package indexes need them; without git_url, keep only their text."""
    url, branch = settings["git_url"], settings["branch"]

    def link(match: re.Match) -> str:
        image, words, path = match.groups()
        if not url:
            return "" if image else words
        return f"{image}[{words}]({url}/{'raw' if image else 'blob'}/{branch}/{path})"

    return re.sub(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)]*)\)", link, text)


def project_urls() -> dict:
    """Return the addresses of source, changes and book that settings.ini knows."""
    url, host = settings["git_url"], settings["doc_host"]
    urls = {"Source": url, "Changelog": f"{url}/blob/{settings['branch']}/CHANGELOG.md"} if url else {}
    return {**urls, "Documentation": host + settings["doc_baseurl"]} if host else urls


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=relink(readme.read_text(encoding="utf-8")) if readme.exists() else "",
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    license=settings["license"],
    classifiers=["Intended Audience :: Education", "Intended Audience :: Science/Research", "Typing :: Typed",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence", "Programming Language :: Python :: 3",
                 *(f"Programming Language :: Python :: {version}" for version in settings["python_versions"].split())],
    project_urls=project_urls(),
    packages=find_packages(include=["attn_cifar", "attn_cifar.*"]),
    package_data={"attn_cifar": ["py.typed", "pretrained/*/*", "report/*.html", "report/*.css"]},
    python_requires=">=" + settings["min_python"],
    install_requires=settings["requirements"].split(),
    extras_require={name: settings[f"{name}_requirements"].split() for name in ("dev", "app", "onnx", "docs", "bench")},
    entry_points={"console_scripts": settings["console_scripts"].split()},
    cmdclass={"build_py": BuildWithResults},
    zip_safe=False,
)
