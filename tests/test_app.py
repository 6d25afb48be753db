"""The local page in use: a real file dropped on it in a real browser."""

import base64
import os
import signal
import socket
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from browsing import open_page, requests_of
from PIL import Image

from attn_cifar.data import load_data
from attn_cifar.models import create_model
from attn_cifar.predict import load_classifier
from attn_cifar.training import fit

DROP = """
const carried = new DataTransfer();
for (const [name, content] of arguments[0])
  carried.items.add(new File([Uint8Array.from(atob(content), letter => letter.charCodeAt(0))], name, {type: 'image/png'}));
const input = document.querySelector('input[type=file]');
const place = input.closest('button, [aria-dropeffect]') || input.parentElement;
for (const kind of ['dragenter', 'dragover', 'drop'])
  place.dispatchEvent(new DragEvent(kind, {dataTransfer: carried, bubbles: true, cancelable: true}));
"""


ROWS = """
const tops = [...document.querySelector('#answers section').querySelectorAll('figure')].map(figure => figure.offsetTop);
return [...new Set(tops)].map(top => tops.filter(other => other === top).length);
"""
EDGES = """
const input = document.querySelector('input[type=file]').closest('.block');
const boxes = [document.querySelector('h1'), input, document.querySelector('#answers h3')];
return new Set(boxes.map(box => Math.round(box.getBoundingClientRect().left))).size;
"""
PROXIES = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}  # nobody answers there


def free_port() -> int:
    """Return a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def page_of(model: str, home: Path):
    """Serve the page of a model in a separate process; give its address and process, and stop it with Ctrl-C."""
    pytest.importorskip("gradio", reason="the page is an optional extra: pip install gradio")
    port = free_port()
    command = [sys.executable, "-m", "attn_cifar", "app", model, "--port", str(port)]
    (home / "tmp").mkdir()
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores Ctrl-C, and children inherit it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "HOME": str(home), "TMPDIR": str(home / "tmp"), **PROXIES})
    signal.signal(signal.SIGINT, handler)
    line = process.stdout.readline()
    assert f"http://127.0.0.1:{port}" in line, line + process.stderr.read()
    yield f"http://127.0.0.1:{port}"
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0 and "Traceback" not in process.stderr.read()
    assert list((home / "tmp").iterdir()) == [], "uploaded pictures are left behind"


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Return the home directory of the page's process."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def address(home):
    """Serve the page of attn_tiny."""
    with page_of("attn_tiny", home) as served:
        yield served


def until(condition, seconds: float = 60):
    """Wait until a condition returns something true; return that."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "timed out"
        time.sleep(0.2)
    return value


def drop(browser, *files: Path) -> None:
    """Drop files on the page, all at once."""
    browser.execute_script(DROP, [[file.name, base64.b64encode(file.read_bytes()).decode()] for file in files])


def text_of(browser) -> str:
    """Return the answers that the page shows."""
    return browser.execute_script("return document.querySelector('#answers')?.innerText || ''")


def allowed(address: str) -> tuple[str, ...]:
    """Return the beginnings of what the page may ask for. Gradio 5 asks for a script elsewhere, which the policy blocks."""
    import gradio

    blocked = () if gradio.__version__ >= "6" else ("https://cdnjs.cloudflare.com/ajax/libs/iframe-resizer/",)
    return (address, "data:", "blob:", *blocked)


def complaints(browser) -> list[str]:
    """Return the console's errors, without Gradio's own about that script and about files it does not have."""
    messages = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    own = "iframe-resizer", "manifest", "upload_progress", "/assets/"
    return [text for text in messages if not any(part in text for part in own)]


def wait_for_field(browser) -> None:
    """Wait until files can be dropped."""
    until(lambda: browser.execute_script("return document.querySelector('input[type=file]') !== null"))


@pytest.mark.parametrize("width", [390, 1440])
def test_dropped_pictures_are_named_and_explained(address, browser, tmp_path, home, width):
    data = load_data("shapes")
    files = [tmp_path / "wide.png", tmp_path / "small.png"]
    for file, image, size in zip(files, data.test_images[[3, 4]], ((200, 150), (32, 32)), strict=True):
        Image.fromarray(image).resize(size).save(file)
    (tmp_path / "words.png").write_text("no picture")
    classifier = load_classifier("attn_tiny")
    expected = classifier.predict(classifier.read(files)[1])

    requests = open_page(browser, address, width, "light")
    wait_for_field(browser)
    assert "84.4% of its answers were right" in browser.execute_script("return document.body.innerText")
    drop(browser, *files, tmp_path / "words.png")
    words = until(lambda: text if "words.png is not a readable image" in (text := text_of(browser)) else "")
    for file, row in zip(files, expected, strict=True):
        name = classifier.class_names[int(row.argmax())]
        share = ">99%" if row.max() > 0.99 else f"{float(row.max()):.0%}"
        assert f"{file.name}" in words and f"{name}, {share}. Of " in words
    assert "Your picture\n200×150 pixels" in words and "the square in the middle" in words
    assert "based on" in words or "No single part decides" in words
    pictures = "return [...document.querySelectorAll('#answers img')].map(i => [i.naturalWidth, i.alt.length])"
    sizes = until(lambda: shown if len(shown := browser.execute_script(pictures)) == 10 and all(w for w, _ in shown) else None)
    assert [width for width, _ in sizes] == [200, 32, 150, 150, 150] + [32] * 5 and all(length for _, length in sizes)
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= width, "it scrolls sideways"
    assert browser.execute_script(ROWS) == ([2, 2, 1] if width == 390 else [5]), "pictures stand side by side"
    assert browser.execute_script(EDGES) == 1, "text, field and answers begin at different places"
    requests += requests_of(browser)
    assert all(request.startswith(allowed(address)) for request in requests), "it asks other servers"
    assert complaints(browser) == [], "the console complains"
    uploads, = (home / "tmp").glob("attn-cifar-*")
    assert stat.S_IMODE(uploads.stat().st_mode) == 0o700 and list(uploads.rglob("wide.png")), "uploads can be read by others"


def test_names_with_markup_stay_text(browser, tmp_path, home):
    """A class folder and a file whose names are HTML: nothing of it is run, and no server is asked."""
    hostile = "<img src=http:&#47;&#47;198.51.100.1&#47;x onerror=document.title=1>${1+1}{{1+1}}"
    data = load_data("shapes").subset(60, 30)
    data = replace(data, class_names=(hostile, *data.class_names[1:]))
    torch.manual_seed(0)
    run = fit(create_model("basic_attn"), data, epochs=1, batch_size=20, max_lr=1e-3, out=tmp_path / "run", verbose=False)
    (tmp_path / "home").mkdir()
    with page_of(str(run.folder), tmp_path / "home") as served:
        requests = open_page(browser, served, 1440, "light")
        wait_for_field(browser)
        Image.fromarray(data.test_images[0]).save(tmp_path / f"{hostile}.png")
        drop(browser, tmp_path / f"{hostile}.png")
        until(lambda: "%" in text_of(browser) and "onerror" in text_of(browser))  # Gradio leaves out a part of file names
        body = browser.execute_script("return document.body.innerText")
        assert f"{hostile}, " in body, "the class names are not shown as they are"
        assert browser.execute_script("return document.title") == "What is on this picture?"
        time.sleep(1)
        requests += requests_of(browser)
        assert all(request.startswith(allowed(served)) for request in requests), "it asks other servers"


def test_the_browser_is_told_to_ask_no_other_server(address):
    with urllib.request.urlopen(address) as answer:
        assert answer.headers["content-security-policy"].startswith("default-src 'self'")


@pytest.mark.parametrize("headers", [{"Host": "evil.example"}, {"Host": "evil.example:7860"}, {"Origin": "http://evil.example"},
                                     {"Origin": "null"}, {"Origin": "http://127.0.0.1.evil.example"}, {"Host": "[::1"}])
def test_other_sites_get_no_answer(address, headers):
    """A name that leads to this machine, and a page elsewhere that sends a form."""
    body = b"--x\r\nContent-Disposition: form-data; name=\"files\"; filename=\"a.png\"\r\n\r\n1\r\n--x--\r\n"
    for path, data in (("/", None), ("/config", None), ("/gradio_api/upload", body)):
        more = {"Content-Type": "multipart/form-data; boundary=x"} if data else {}
        with pytest.raises(urllib.error.HTTPError, match="403"):
            urllib.request.urlopen(urllib.request.Request(address + path, data, {**headers, **more}))
    with urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "localhost:8000"})) as answer:  # a tunnel
        assert answer.status == 200


def test_a_large_file_is_refused(address, home):
    """21 MB, sent as a browser sends it."""
    head = b"--x\r\nContent-Disposition: form-data; name=\"files\"; filename=\"large.png\"\r\n\r\n"
    body = head + bytes(21 << 20) + b"\r\n--x--\r\n"
    request = urllib.request.Request(f"{address}/gradio_api/upload", body, {"Content-Type": "multipart/form-data; boundary=x"})
    with pytest.raises((urllib.error.HTTPError, urllib.error.URLError)) as refused:
        urllib.request.urlopen(request)
    assert getattr(refused.value, "code", 413) in (400, 413)
    assert not list((home / "tmp").rglob("large.png"))


def test_no_other_address_reaches_it(address):
    port = int(address.rsplit(":", 1)[1])
    entries = socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)
    others = {entry[4][0] for entry in entries} - {"127.0.0.1", "127.0.1.1"}
    for other in others:
        with socket.socket() as probe:
            probe.settimeout(5)
            assert probe.connect_ex((other, port)) != 0, f"the page answers at {other}"
