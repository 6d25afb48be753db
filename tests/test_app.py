"""The local page in use: a real file dropped on it in a real browser."""

import base64
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from browsing import open_page, requests_of
from PIL import Image

from attn_cifar.data import load_data
from attn_cifar.predict import load_classifier

DROP = """
const [name, content] = arguments, bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
const carried = new DataTransfer();
carried.items.add(new File([bytes], name, {type: 'image/png'}));
const input = document.querySelector('input[type=file]');
const place = input.closest('button, [aria-dropeffect]') || input.parentElement;
for (const kind of ['dragenter', 'dragover', 'drop'])
  place.dispatchEvent(new DragEvent(kind, {dataTransfer: carried, bubbles: true, cancelable: true}));
"""


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Start the page in a separate process, and stop it with Ctrl-C."""
    pytest.importorskip("gradio", reason="the page is an optional extra: pip install gradio")
    port, home = free_port(), tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "attn_cifar", "app", "attn_tiny", "--port", str(port)]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and children inherit it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "HOME": str(home)})
    signal.signal(signal.SIGINT, handler)
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, line + process.stderr.read()
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and "Traceback" not in process.stderr.read()


def until(condition, seconds: float = 60):
    """Wait until a condition returns something true; return that."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)
    return value


@pytest.mark.parametrize("width", [390, 1440])
def test_a_dropped_picture_is_named_and_explained(address, browser, tmp_path, width):
    data = load_data("shapes")
    Image.fromarray(data.test_images[3]).resize((200, 150)).save(tmp_path / "dropped.png")
    (tmp_path / "words.png").write_text("no picture")
    classifier = load_classifier("attn_tiny")
    expected = classifier.predict(classifier.read([tmp_path / "dropped.png"])[1])[0]

    def drop(file: Path) -> None:
        browser.execute_script(DROP, file.name, base64.b64encode(file.read_bytes()).decode())

    def text() -> str:
        return browser.execute_script("return document.querySelector('#answer')?.innerText || ''")

    requests = open_page(browser, address, width, "light")
    until(lambda: browser.execute_script("return document.querySelector('input[type=file]') !== null"))
    drop(tmp_path / "dropped.png")
    words = until(lambda: text() if "%" in text() else "")  # until then, a timer is shown there
    assert words.startswith(f"{classifier.class_names[int(expected.argmax())]}, {float(expected.max()):.0%}")
    pictures = "return [...document.querySelectorAll('#maps img')].filter(i => i.naturalWidth == 32 && i.alt).length"
    until(lambda: browser.execute_script(pictures) == 4)
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width, "it scrolls sideways"
    assert "believable" in browser.execute_script("return document.body.innerText")
    requests += requests_of(browser)
    assert all(request.startswith((address, "data:", "blob:")) for request in requests), "it asks other servers"
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]  # not Gradio's own warnings
    assert errors == [], "the console complains"

    browser.execute_script("document.querySelector('[aria-label=\"Clear\"], [aria-label=\"Remove this file\"]').click()")
    until(lambda: not text())
    drop(tmp_path / "words.png")
    until(lambda: "words.png is not a readable image" in text())


def test_no_other_address_reaches_it(address):
    port = int(address.rsplit(":", 1)[1])
    entries = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    others = {entry[4][0] for entry in entries} - {"127.0.0.1", "127.0.1.1"}
    for other in others:
        with socket.socket() as probe:
            probe.settimeout(5)
            assert probe.connect_ex((other, port)) != 0, f"the page answers at {other}"
