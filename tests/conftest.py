"""What several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def real_images() -> Path:
    """Return the folder of real images in ATTN_CIFAR_DATA; a test that asks for it is skipped, visibly, without it."""
    folder = os.environ.get("ATTN_CIFAR_DATA")
    if not folder:
        pytest.skip("ATTN_CIFAR_DATA names no folder of real images")
    return Path(folder)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes; runs with --long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: give --long"))
