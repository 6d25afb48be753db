"""A run as people see it: its report in a real browser, its folder in a real TensorBoard."""

import csv
import json
import shlex
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from browsing import open_page

from attn_cifar.cli import make_parser
from attn_cifar.data import load_data
from attn_cifar.lr_finder import find_lr
from attn_cifar.models import create_model
from attn_cifar.report import SECTIONS, make_report, remake_command
from attn_cifar.training import RECIPES, fit, load_run

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """Train for a moment on the built-in images, one class of which has a hostile name, and report on it."""
    data = load_data("shapes").subset(500, 200)
    data = replace(data, class_names=(HOSTILE, *data.class_names[1:]))
    torch.manual_seed(0)
    model = create_model("spatial_attn")
    found = find_lr(model, data, recipe=replace(RECIPES["upstream"], batch_size=32), num_steps=20)
    run = fit(model, data, epochs=1, batch_size=50, out=tmp_path_factory.mktemp("runs") / "run", verbose=False)
    found.save(run.folder / "lr_find.json")
    make_report(run.folder, data)
    return run.folder


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
def test_report_opens_from_a_file(browser, run_folder, width, scheme):
    path = run_folder / "report.html"
    requests = open_page(browser, path.resolve().as_uri(), width, scheme)
    assert requests and requests[0] == path.resolve().as_uri()
    assert all(address.startswith("data:") for address in requests[1:])
    assert browser.get_log("browser") == [], "the console complains"
    look = browser.execute_script("""
        const images = [...document.images], shown = element => element.getBoundingClientRect();
        return {
          width: document.scrollingElement.scrollWidth,
          broken: images.filter(image => !image.complete || !image.naturalWidth).map(image => image.alt),
          wide: images.filter(image => shown(image).right > arguments[0]).map(image => image.alt),
          unnamed: images.filter(image => !image.alt).length,
          images: images.length,
          scripts: document.scripts.length,
          dead: [...document.querySelectorAll('a')].filter(a => !document.querySelector(a.getAttribute('href'))).length,
          ground: getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0],
          smallest: Math.min(...[...document.querySelectorAll('body *')].map(e => parseFloat(getComputedStyle(e).fontSize))),
          text: document.body.innerText
        }""", width)
    assert look["width"] <= width, "it scrolls sideways"
    assert (look["broken"], look["wide"], look["unnamed"], look["dead"]) == ([], [], 0, 0)
    assert look["images"] > 90 and look["smallest"] >= 12
    assert look["scripts"] == 0 and HOSTILE in look["text"]
    assert (look["ground"] < 64) == (scheme == "dark")


def test_curves_tell_the_value_under_the_pointer(browser, run_folder):
    from selenium.webdriver import ActionChains

    path = run_folder / "report.html"
    assert path.stat().st_size < 3_000_000
    open_page(browser, path.resolve().as_uri(), 1440, "light")
    strip = browser.find_elements("css selector", ".chart .hit")[0]
    words = strip.find_element("css selector", "text")
    assert words.value_of_css_property("visibility") == "hidden"
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", strip)
    ActionChains(browser).move_to_element(strip.find_element("css selector", "rect")).perform()
    assert words.value_of_css_property("visibility") == "visible"
    row = load_run(run_folder).history[0]
    assert words.text == f"epoch 1: training {row['train_loss']:.4f}, test {row['test_loss']:.4f}"


def test_every_map_has_a_verdict(browser, run_folder):
    open_page(browser, (run_folder / "report.html").resolve().as_uri(), 390, "light")
    browser.execute_script("document.querySelectorAll('details').forEach(details => details.open = true)")
    for section in ("grad-cam", "attention-rollout", "gradient-attention", "attention"):
        cells = browser.find_elements("css selector", f"[aria-labelledby={section}] tbody tr td:nth-child(2)")
        words = {cell.text for cell in cells}
        assert words and words <= {"believable", "unproven", "misleading", "indifferent", "empty"}, section


class Page(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, html: str):
        super().__init__()
        self.found, self.text = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, attribute: str, *tags: str) -> list[str]:
        return [values[attribute] for tag, values in self.found if attribute in values and (not tags or tag in tags)]


def test_report_has_every_section_and_loads_nothing(run_folder):
    run, html = load_run(run_folder), (run_folder / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert {link.removeprefix("#") for link in page.all("href", "a")} == set(page.all("id"))
    assert len(page.all("id")) == len(SECTIONS)
    assert all(page.all("alt", "img")) and len(page.all("alt", "img")) == html.count("<img") > 90
    assert all(address.startswith("data:image/") for address in page.all("src") + page.all("href", "link"))
    assert not any(word in html for word in ("http:", "https:", "url(", "@import"))
    assert "script" not in {tag for tag, _ in page.found}
    assert f"{100 * run.evaluation.accuracy:.1f}\N{NO-BREAK SPACE}%" in page.text and f"{run.config['parameters']:,}" in page.text
    assert not list(run_folder.rglob("*.tmp"))


def test_a_report_made_again_is_the_same(run_folder):
    data = load_data("shapes").subset(500, 200)
    data = replace(data, class_names=(HOSTILE, *data.class_names[1:]))
    before = (run_folder / "report.html").read_bytes()
    assert make_report(run_folder, data).read_bytes() == before


def test_report_can_be_walked_with_the_keyboard(browser, run_folder):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, (run_folder / "report.html").resolve().as_uri(), 1440, "light")

    def press(key: str) -> str:
        browser.switch_to.active_element.send_keys(key)
        return browser.execute_script("return document.activeElement.innerText.trim()")

    titles = browser.execute_script("return [...document.querySelectorAll('h2')].map(h => h.innerText)")
    assert press(Keys.TAB).startswith("Skip")
    assert [press(Keys.TAB) for _ in titles] == titles, "the contents come next, in the order of the sections"
    press(Keys.ENTER)
    seen = "const box = document.querySelector(location.hash).getBoundingClientRect(); return [box.top, innerHeight]"
    top, height = browser.execute_script(seen)
    assert 0 <= top < height, "the last link leads to the last section"


def test_the_command_line_understands_the_command_to_make_it_again(run_folder):
    run = load_run(run_folder)
    words = shlex.split(remake_command(run).replace("\\\n", " "))
    given = make_parser().parse_args(words[1:])
    recipe = run.config["recipe"]
    assert (given.epochs, given.batch_size, given.max_lr) == (1, 50, recipe["max_lr"])
    assert (given.data, given.model, given.seed, given.recipe) == ("shapes", "spatial_attn", 0, "upstream")


@pytest.fixture
def tensorboard(run_folder, tmp_path):
    """Serve the run folder on loopback; return a function that asks it for JSON."""
    log, plain = tmp_path / "log", urllib.request.build_opener(urllib.request.ProxyHandler({}))
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(run_folder), "--host", "127.0.0.1", "--port", "0"]
    with open(log, "wb") as file:
        server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        deadline, address = time.monotonic() + 40, ""
        while not address:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
            address = next((word for word in log.read_text().split() if word.startswith("http://127.0.0.1:")), "")

        def ask(route: str, **options: str) -> object:
            query = urllib.parse.urlencode(options)
            with plain.open(f"{address}data/plugin/{route}?{query}", timeout=20) as answer:
                return json.load(answer)

        yield ask
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def test_tensorboard_shows_the_run(tensorboard, run_folder):
    deadline, tags = time.monotonic() + 30, {}
    while "Acc/Test" not in tags and time.monotonic() < deadline:  # it reads the files after it has started to serve
        time.sleep(0.3)
        tags = next(iter(tensorboard("scalars/tags").values()), {})
    assert {"Train loss", "LR", "Acc/Train", "Test loss", "Acc/Test"} <= tags.keys()
    (name, images), = tensorboard("images/tags").items()
    assert {"Train-Images", "Test-Misclassified_Imgs"} <= images.keys()
    figures = {path.stem for path in (run_folder / "figures").glob("*.png")}
    assert {f"figures/{figure}" for figure in figures} <= images.keys() and {"grad_cam", "attention", "calibration"} <= figures
    with open(run_folder / "metrics.csv", newline="") as file:
        row = list(csv.DictReader(file))[-1]
    for tag, column in (("Acc/Test", "test_accuracy"), ("Test loss", "test_loss"), ("Acc/Train", "train_accuracy")):
        (_, epoch, value), = tensorboard("scalars/scalars", run=name, tag=tag)
        assert epoch == 1 and value == pytest.approx(float(row[column]), rel=1e-6)
    assert len(tensorboard("scalars/scalars", run=name, tag="LR")) == 10  # 500 images in batches of 50
