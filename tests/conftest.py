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
