"""The local page as people use it: a real file dropped on it in a real browser."""

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

from attn_cifar.predict import load_classifier
from attn_cifar.data import load_data

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
    """Return a port that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Start the page in a process of its own, and stop it as a person would."""
    pytest.importorskip("gradio", reason="the page is an optional extra: pip install gradio")
    port, home = free_port(), tmp_path_factory.mktemp("home")
    command = [sys.executable, "-m", "attn_cifar", "app", "attn_tiny", "--port", str(port)]
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore Ctrl-C, and hand that on
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "HOME": str(home)})
    signal.signal(signal.SIGINT, heard)
    said = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in said, said + process.stderr.read()
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and "Traceback" not in process.stderr.read()


def until(question, seconds: float = 60):
    """Ask until there is an answer."""
    end = time.monotonic() + seconds
    while not (answer := question()):
        assert time.monotonic() < end, "no answer"
        time.sleep(0.2)
    return answer


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

    asked = open_page(browser, address, width, "light")
    until(lambda: browser.execute_script("return document.querySelector('input[type=file]') !== null"))
    drop(tmp_path / "dropped.png")
    words = until(lambda: text() if "%" in text() else "")  # before, it counts seconds there
    assert words.startswith(f"{classifier.class_names[int(expected.argmax())]}, {float(expected.max()):.0%}")
    pictures = "return [...document.querySelectorAll('#maps img')].filter(i => i.naturalWidth == 32 && i.alt).length"
    until(lambda: browser.execute_script(pictures) == 4)
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width, "it scrolls sideways"
    assert "believable" in browser.execute_script("return document.body.innerText")
    asked += requests_of(browser)
    assert all(request.startswith((address, "data:", "blob:")) for request in asked), "it asks other servers"
    errors = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]  # Gradio warns of its own
    assert errors == [], "the console complains"

    browser.execute_script("document.querySelector('[aria-label=\"Clear\"], [aria-label=\"Remove this file\"]').click()")
    until(lambda: not text())
    drop(tmp_path / "words.png")
    until(lambda: "words.png is not a readable image" in text())


def test_nobody_else_can_reach_it(address):
    port = int(address.rsplit(":", 1)[1])
    found = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    others = {entry[4][0] for entry in found} - {"127.0.0.1", "127.0.1.1"}
    for other in others:
        with socket.socket() as probe:
            probe.settimeout(5)
            assert probe.connect_ex((other, port)) != 0, f"the page answers at {other}"
