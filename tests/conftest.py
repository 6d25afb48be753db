"""What several test files share."""

import os
import shutil
from pathlib import Path

import pytest


@pytest.fixture
def real_images() -> Path:
    """Return the folder of real images in ATTN_CIFAR_DATA; a test that asks for it is skipped, visibly, without it."""
    folder = os.environ.get("ATTN_CIFAR_DATA")
    if not folder:
        pytest.skip("ATTN_CIFAR_DATA names no folder of real images")
    return Path(folder)


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Start Chromium without a window; tests that need it are skipped, visibly, where there is none."""
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not binary or not driver:
        pytest.skip("no Chromium and chromedriver on this machine")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking",
                 "no-first-run", "disable-component-update", "disable-sync",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chromium = webdriver.Chrome(options=options, service=Service(driver))
    yield chromium
    chromium.quit()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "long: takes minutes; runs with --long")


LONGEST = "test_processes", "test_main_job", "test_resume", "test_load", "test_hostile"  # first, so that no worker ends last


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    if not config.getoption("--long"):
        for item in items:
            if "long" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes: give --long"))
