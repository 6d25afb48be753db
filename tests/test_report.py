"""A run as people see it: its report in a real browser, its folder in a real TensorBoard."""

import base64
import csv
import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from browsing import open_page
from PIL import Image

from attn_cifar.cli import make_parser
from attn_cifar.core import InputError
from attn_cifar.data import ImageData, load_data
from attn_cifar.explain import METHODS, read_faithfulness
from attn_cifar.lr_finder import LRRangeTest, find_lr
from attn_cifar.models import create_model
from attn_cifar.report import figures, make_comparison, make_report, paired_difference, remake_command, sections, verdicts
from attn_cifar.report.chart import CHART_STYLE, Chart, Matrix
from attn_cifar.training import RECIPES, Evaluation, Run, fit, load_run
from attn_cifar.visualization import plot_lr_find
from attn_cifar.visualization.style import new_axes

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
    assert look["images"] > 60 and look["smallest"] >= 12
    assert look["scripts"] == 1 and HOSTILE in look["text"]
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
    assert words.text == f"epoch 1: training {100 * row['train_accuracy']:.2f}, test {100 * row['test_accuracy']:.2f}"


WORDS = {"believable", "unproven", "misleading", "indifferent", "empty"}


def test_every_method_has_one_verdict(browser, run_folder):
    open_page(browser, (run_folder / "report.html").resolve().as_uri(), 390, "light")
    for panel in ("grad-cam", "attention-rollout", "gradient-attention", "attention"):
        browser.execute_script("document.getElementById(arguments[0] + '-tab').click()", panel)
        lines = [line.text for line in browser.find_elements("css selector", f"#{panel} .strip > div")]
        assert len(lines) == 1 and lines[0].rpartition(": ")[2] in WORDS, panel
        captions = [caption.text for caption in browser.find_elements("css selector", f"#{panel} figcaption")]
        assert not WORDS - {"empty"} & set(captions), "a verdict is about a method, not about a picture"
    stored = {check.method: check for check in read_faithfulness(run_folder)}
    assert set(stored) == set(METHODS) and all(check.images >= 10 for check in stored.values()), "it is kept with the run"


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
    assert {link.removeprefix("#") for link in page.all("href", "a")} <= set(page.all("id"))
    assert len(set(page.all("id"))) == len(page.all("id")), "an id is used twice"
    assert len(page.all("href", "a")) == 5, "four groups, and the link that skips them"
    panels = {"confusion", "classes", "pairs", "calibration", "grad-cam", "attention-rollout", "gradient-attention", "attention",
              "environment", "training-images", "schedule", "range-test", "network", "remake"}
    assert panels | {"overview", "curves", "confusions", "mistakes", "explanations"} <= set(page.all("id"))
    assert all(page.all("alt", "img")) and len(page.all("alt", "img")) == html.count("<img") > 60
    assert all(address.startswith("data:image/") for address in page.all("src") + page.all("href", "link"))
    assert not any(word in html for word in ("http:", "https:", "url(", "@import"))
    assert [tag for tag, _ in page.found].count("script") == 1
    assert f"{100 * run.evaluation.accuracy:.1f}\N{NO-BREAK SPACE}%" in page.text and f"{run.config['parameters']:,}" in page.text
    assert not list(run_folder.rglob("*.tmp"))


@pytest.mark.long
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
    assert titles == ["Result", "Mistakes", "Why", "Setup"]
    assert press(Keys.TAB).startswith("Skip")
    assert [press(Keys.TAB) for _ in titles] == titles, "the contents come next, in the order of the groups"
    press(Keys.ENTER)
    seen = "const box = document.querySelector(location.hash).getBoundingClientRect(); return [box.top, innerHeight]"
    deadline = time.monotonic() + 5
    while not 0 <= browser.execute_script(seen)[0] < browser.execute_script(seen)[1] and time.monotonic() < deadline:
        time.sleep(0.05)  # scrolling is smooth
    top, height = browser.execute_script(seen)
    assert 0 <= top < height, "the last link leads to the last group"


SHOWN_PANELS = "return [...document.querySelectorAll('.panel')].filter(p => p.offsetHeight).map(p => p.id)"


def test_tabs_follow_the_arrow_keys(browser, run_folder):
    from selenium.webdriver.common.keys import Keys

    open_page(browser, (run_folder / "report.html").resolve().as_uri(), 1440, "light")
    assert browser.execute_script(SHOWN_PANELS) == ["confusion", "grad-cam", "training-images"]
    tabs = browser.find_elements("css selector", "#confusions [role=tab]")
    assert [tab.get_attribute("aria-selected") for tab in tabs] == ["true", "false", "false", "false"]
    tabs[0].send_keys(Keys.ARROW_RIGHT)
    assert browser.execute_script("return document.activeElement.id") == "classes-tab"
    assert browser.execute_script(SHOWN_PANELS)[0] == "classes"
    for key, expected in ((Keys.END, "calibration"), (Keys.ARROW_RIGHT, "confusion"), (Keys.ARROW_LEFT, "calibration"),
                          (Keys.HOME, "confusion")):
        browser.switch_to.active_element.send_keys(key)
        assert browser.execute_script(SHOWN_PANELS)[0] == expected
    browser.switch_to.active_element.send_keys(Keys.TAB)
    assert not browser.execute_script(
        "return document.activeElement.closest('#confusions [role=tablist]')"), "one stop for all tabs"
    open_page(browser, (run_folder / "report.html").resolve().as_uri() + "#pairs", 1440, "light")
    assert browser.execute_script(SHOWN_PANELS)[0] == "pairs", "a link can lead to a panel"


@pytest.mark.parametrize("way", ["without a script", "in print"])
def test_all_panels_show(browser, run_folder, way):
    commands = {"without a script": ("Emulation.setScriptExecutionDisabled", {"value": True}, {"value": False}),
                "in print": ("Emulation.setEmulatedMedia", {"media": "print"}, {"media": ""})}
    command, on, off = commands[way]
    try:
        if way == "without a script":
            browser.execute_cdp_cmd(command, on)
        open_page(browser, (run_folder / "report.html").resolve().as_uri(), 1440, "light")
        browser.execute_cdp_cmd(command, on)
        panels = browser.find_elements("css selector", ".panel")
        assert len(panels) == 14 and all(panel.is_displayed() for panel in panels)
        assert all(panel.find_element("css selector", "h4").is_displayed() for panel in panels)
        assert not any(tab.is_displayed() for tab in browser.find_elements("css selector", "[role=tab]"))
    finally:
        browser.execute_cdp_cmd(command, off)


def test_the_report_is_short_on_a_phone(browser, run_folder):
    open_page(browser, (run_folder / "report.html").resolve().as_uri(), 390, "light")
    assert browser.execute_script("return document.scrollingElement.scrollHeight") <= 6 * 844
    sizes = browser.execute_script("return [...document.images].map(i => i.clientWidth).filter(width => width)")
    assert min(sizes) >= 40, "pictures must be legible"


def test_numbers_do_not_wrap(browser, run_folder):
    for width in (390, 1440):
        open_page(browser, (run_folder / "report.html").resolve().as_uri(), width, "light")
        browser.execute_script("document.querySelectorAll('.panel').forEach(panel => panel.style.display = 'block');"
                               "document.querySelectorAll('details').forEach(details => details.open = true)")
        wrapped = browser.execute_script("""
            return [...document.querySelectorAll('.value, .facts strong, .tiles dd, .bar, td.number')].filter(element => {
              const range = document.createRange();
              range.selectNodeContents(element);
              const tops = [...range.getClientRects()].filter(box => box.height > 11).map(box => Math.round(box.top));
              return Math.max(...tops) - Math.min(...tops) > 8;
            }).map(element => element.innerText)""")
        assert wrapped == []
        overlapping = browser.execute_script("""
            const boxes = [...document.querySelectorAll('.tiles div, .facts div, figcaption, td, [role=tab], nav a')]
              .filter(e => e.offsetHeight).map(e => [e.innerText, e.getBoundingClientRect()]);
            return boxes.flatMap(([a, p], i) => boxes.slice(i + 1).filter(([b, q]) => p.left < q.right - 1 && q.left < p.right - 1
              && p.top < q.bottom - 1 && q.top < p.bottom - 1).map(([b]) => a + ' | ' + b))""")
        assert overlapping == []
        clipped = browser.execute_script("""
            return [...document.querySelectorAll('.chart text')].filter(text => {
              const inner = text.getBoundingClientRect(), outer = text.closest('svg').getBoundingClientRect();
              return inner.width && (inner.left < outer.left - 1 || inner.right > outer.right + 1
                || inner.bottom > outer.bottom + 1);
            }).map(text => text.textContent)""")
        assert clipped == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast(browser, run_folder, scheme):
    open_page(browser, (run_folder / "report.html").resolve().as_uri(), 1440, scheme)
    browser.execute_script("document.querySelectorAll('.panel').forEach(panel => panel.style.display = 'block')")
    poor = browser.execute_script("""
        const numbers = color => color.match(/[\\d.]+/g).map(Number);
        const light = color => numbers(color).slice(0, 3).map(v => v / 255)
          .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
          .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
        const ground = e => { const c = getComputedStyle(e).backgroundColor, n = numbers(c);
          return n.length > 3 && n[3] === 0 ? ground(e.parentElement) : c; };
        const ratio = (a, b) => { const [x, y] = [light(a), light(b)].sort((p, q) => q - p); return (x + .05) / (y + .05); };
        return [...document.querySelectorAll('body *')]
          .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()))
          .filter(e => e.tagName !== 'SCRIPT' && e.tagName !== 'title')
          .map(e => [e.closest('svg') ? getComputedStyle(e).fill : getComputedStyle(e).color,
                     ground(e.closest('svg')?.parentElement ?? e), e])
          .filter(([a, b]) => ratio(a, b) < 4.5).map(([a, b, e]) => `${e.textContent.slice(0, 30)}: ${a} on ${b}`)""")
    assert poor == []


def test_motion_and_warning_colors_are_used_sparingly(browser, run_folder):
    media = {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    open_page(browser, (run_folder / "report.html").resolve().as_uri(), 1440, "light")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    assert browser.execute_script("return getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


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


def make_run(folder: Path, logits: torch.Tensor, labels: torch.Tensor, history: list | None = None, **steps: list) -> tuple[Run,
    ImageData]:
    """Make a run without a model, and its images, from logits alone; it trained for three epochs."""
    folder.mkdir(parents=True, exist_ok=True)
    classes, count = logits.shape[1], len(labels)
    names = tuple(f"class {index}" for index in range(classes))
    images = np.random.default_rng(0).integers(0, 256, (max(classes, count), 8, 8, 3), np.uint8)
    data = ImageData(images[:classes], np.arange(classes), images[:count], labels.numpy(), names, (0.5,) * 3, (0.25,) * 3,
                     "noise")
    config = {"model": "spatial_attn", "parameters": 0, "seed": 0, "deterministic": False, "processes": 1, "machine": {},
              "notes": {},
              "recipe": vars(RECIPES["plain"]) | {"augmentation": vars(RECIPES["plain"].augmentation)},
              "engine": {"device": "cpu", "precision": "float32", "compile": False},
              "data": {"name": "noise", "train": classes, "test": count, "class_names": list(names), "image_size": 8,
                       "mean": [0.5] * 3, "std": [0.25] * 3}}
    row = {"train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 1.0, "test_accuracy": 0.5, "lr": 0.1, "seconds": 1.0}
    history = history or [{"epoch": epoch, **row} for epoch in (1.0, 2.0, 3.0)]
    return Run(folder, config, history, {"lr": [0.1, 0.2], "momentum": [0.9, 0.8], "loss": [1.0, 1.0], **steps}, None,
               Evaluation(logits, labels, names)), data


ODD = [0.0, math.nan, math.inf, -math.inf, 1e300]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", ODD)
def test_every_number_can_be_zero_or_undefined(tmp_path, number):
    logits, labels = torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    good = {"epoch": 1.0, "train_loss": 1.0, "train_accuracy": 0.5, "test_loss": 1.0, "test_accuracy": 0.5, "lr": 0.1,
            "seconds": 1.0}
    run, data = make_run(tmp_path / "run", logits, labels, [good, dict.fromkeys(good, number)], lr=[number, 0.1],
                         momentum=[number] * 2)
    run.config["recipe"]["max_lr"] = number
    html = make_report(run, data).read_text(encoding="utf-8")
    assert "Fit" in html and "nan\N{NO-BREAK SPACE}%" not in html


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_logit_can_be_undefined(tmp_path, number):
    logits = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    logits[0, 0] = number
    html = make_report(*make_run(tmp_path / "run", logits, torch.arange(40) % 3)).read_text(encoding="utf-8")
    assert ("1 of 40 test images are NaN or infinite" in html) == (number != -math.inf), "a logit of -inf is a probability of 0"


def test_a_diverged_run_is_reported(tmp_path):
    rows = [{"epoch": epoch, "train_loss": math.nan, "train_accuracy": 0.1, "test_loss": math.nan, "test_accuracy": 0.1,
             "lr": 0.1,
             "seconds": 1.0} for epoch in (1.0, 2.0)]
    run, data = make_run(tmp_path / "run", torch.full((40, 3), math.nan), torch.arange(40) % 3, rows)
    text = Page(make_report(run, data).read_text(encoding="utf-8")).text
    assert "the outputs for 40 of 40 test images are NaN or infinite" in text and "diverged" in text
    assert "33.3" not in text, "no accuracy is made of outputs that are no numbers"


def test_rare_mistakes_are_not_zero_percent(tmp_path):
    labels = torch.arange(4000) % 2
    guess = labels.clone()
    guess[0] = 1
    run, data = make_run(tmp_path / "run", torch.nn.functional.one_hot(guess, 2).float(), labels)
    html = make_report(run, data).read_text(encoding="utf-8")
    text = Page(html).text
    assert "<1\N{NO-BREAK SPACE}%" in text and ">99.9\N{NO-BREAK SPACE}%" in text and "> 0.0\N{NO-BREAK SPACE}%" not in text
    matrix = html[html.index('id="confusion"'):html.index('id="classes"')]
    assert matrix.count("&lt;1</text>") == 1 and ">0</text>" not in matrix


def test_one_mistake_is_described_as_one(tmp_path):
    labels = torch.arange(40) % 2
    labels[-1] = 2
    guess = torch.where(labels == 2, 0, labels)
    run, data = make_run(tmp_path / "run", torch.nn.functional.one_hot(guess, 3).float(), labels, epochs_of([1.0]))
    text = Page(make_report(run, data).read_text(encoding="utf-8")).text
    assert "Misclassified: 1 of 40 test images. This is it:" in text and "The only mistake" in text and "These are" not in text
    assert "of the only image of class 2 is recognized; most often mistaken for class 0 (1)." in text and "1 of 1 time." in text
    assert "after one epoch: a trend takes at least two" in text
    assert "over 1 epoch:" in (run.folder / "report.html").read_text(encoding="utf-8")


def test_columns_without_content_are_left_out(tmp_path):
    labels = torch.arange(40) % 2
    run, data = make_run(tmp_path / "run", torch.nn.functional.one_hot(labels, 2).float(), labels)
    text = Page(make_report(run, data).read_text(encoding="utf-8")).text
    assert "Mistaken for" not in text and "No mistakes." in text
    before = (tmp_path / "run" / "report.html").read_bytes()
    assert make_report(run, data).read_bytes() == before, "a report made again is the same"


@pytest.mark.parametrize(("wrong", "poor"), [(10, True), (1, False)])
def test_the_baseline_is_the_most_common_class(tmp_path, wrong, poor):
    labels = torch.tensor([0] * 90 + [1] * 10)
    guess = torch.where(torch.arange(100) < 100 - wrong, labels, 0)
    run, data = make_run(tmp_path / "run", torch.nn.functional.one_hot(guess, 2).float(), labels)
    html = make_report(run, data).read_text(encoding="utf-8")
    assert "always answering class 0, the most common class, 90.0\N{NO-BREAK SPACE}%" in html and "guessing" not in html
    assert ('class="score poor"' in html) == poor, "the color of warnings is for results no better than the baseline"
    accuracy, advice = verdicts(run)[0], verdicts(run)[-1]
    assert advice[:2] == ("Next", "Another max_lr," if poor else "A larger network") and advice[2] in html, "what to do next"
    assert ("not distinguishable" in accuracy[2]) == poor and "95 % interval" in accuracy[2]


def make_hot(folder: Path, guess: torch.Tensor, labels: torch.Tensor, history: list | None = None) -> tuple[Run, ImageData]:
    """Make a run that is sure of its answers."""
    return make_run(folder, 50 * torch.nn.functional.one_hot(guess, int(labels.max()) + 1).float(), labels, history)


def epochs_of(losses: list[float], train_accuracy: float = 0.5) -> list[dict]:
    """Make the history of a run from its test losses."""
    return [{"epoch": float(epoch), "train_loss": 1.0, "train_accuracy": train_accuracy, "test_loss": loss, "test_accuracy": 0.5,
             "lr": 0.1, "seconds": 1.0} for epoch, loss in enumerate(losses, 1)]


def test_a_network_that_learned_nothing_is_not_praised(tmp_path):
    labels = torch.arange(100) % 10
    run, _ = make_hot(tmp_path / "run", labels * 0, labels, epochs_of([2.3], train_accuracy=0.1))
    lines = {question: (number, sentence) for question, number, sentence in verdicts(run)}
    assert "overfitting" not in lines["Fit"][1] and "not learned its training images" in lines["Fit"][1]
    assert lines["Next"][0] == "Another max_lr,", "more epochs alone do not help"
    assert lines["Weakest"][1].startswith("of the 10 images of class 1 are recognized;"), "of how many images"


def test_a_perfect_run_asks_for_other_images(tmp_path):
    labels = torch.arange(40) % 2
    run, data = make_hot(tmp_path / "run", labels, labels, epochs_of([1e-3, 1e-9]))
    html = make_report(run, data).read_text(encoding="utf-8")
    assert "more epochs" not in html.lower() and "Harder test images," in html and "which has settled" in html
    card = html[html.index('id="mistakes"'):html.index('id="setup"')]
    assert "least confident answers" in card and card.count("<img") == sections.MISTAKES, "no empty card"


def test_a_doubted_suggestion_is_no_advice(run_folder):
    found = LRRangeTest.load(run_folder / "lr_find.json")
    labels = torch.arange(100) % 10
    run, _ = make_hot(run_folder.parent / "doubt", labels * 0, labels)
    lines = [verdicts(run, replace(found, suggestion=0.0321, doubt=doubt)) for doubt in (None, "the loss did not fall")]
    assert ["0.0321" in one[-1][2] for one in lines] == [True, False] and "doubts it" in lines[1][-2][2]


def test_what_comes_next_stands_under_the_accuracy(browser, run_folder):
    for width in (390, 1440):
        open_page(browser, (run_folder / "report.html").resolve().as_uri(), width, "light")
        order = browser.execute_script("""return ['.score', '.advice', '.facts', '.tiles'].map(name => {
            const box = document.querySelector(name).getBoundingClientRect(); return [box.top, box.left] })""")
        tops = [top for top, _ in order]
        assert tops[0] < tops[1] < tops[3] and (tops[1] < tops[2] if width == 390 else order[1][1] < order[2][1])


def test_one_epoch_is_drawn_from_zero(run_folder):
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    curves = html[html.index('id="curves"'):html.index('id="confusions"')]
    ticks = [float(words.partition("<")[0]) for words in curves.split('text-anchor="end">')[1:] if words[0].isdigit()]
    assert ticks.count(0) == 2 and len(load_run(run_folder).history) == 1


def test_nothing_is_cut_off_on_a_phone(browser, run_folder):
    """Explained images are large, class names whole, and small print scrolls."""
    open_page(browser, (run_folder / "report.html").resolve().as_uri(), 390, "light")
    maps = "return [...document.querySelectorAll('#explanations .current img')].map(image => image.clientWidth)"
    assert min(browser.execute_script(maps)) > 90
    heights = browser.execute_script("return [...document.querySelectorAll('#confusions [role=tab]')].map(tab => tab.offsetTop)")
    assert len(set(heights)) == 1, "the tabs need two rows"
    browser.execute_script("document.getElementById('classes-tab').click(); document.getElementById('network-tab').click()")
    lines = browser.execute_script("""return [...document.querySelectorAll('#classes tbody th span')].map(span => {
        const range = document.createRange();
        range.selectNodeContents(span);
        return [span.innerText, range.getClientRects().length] })""")
    assert {name: count for name, count in lines if name != HOSTILE} == dict.fromkeys(load_data("shapes").class_names[1:], 1)
    assert browser.execute_script("const plot = document.querySelector('#network .plot');"
                                  "return plot.scrollWidth > plot.clientWidth && plot.tabIndex === 0")


@pytest.mark.parametrize("name", ["schedule", "calibration"])
def test_no_title_leaves_its_figure(tmp_path, name):
    labels = torch.arange(40) % 2
    run, data = make_hot(tmp_path / "run", 1 - labels, labels)
    run.steps["lr"] = [0.001, 0.01]  # with long numbers at the axis, less room remains
    drawn = figures.FIGURES[name](figures.RunResults(run, data))
    drawn.figure.set_dpi(160)  # as it is saved
    drawn.figure.draw_without_rendering()
    title = drawn._left_title.get_window_extent()
    assert title.width and title.x1 <= drawn.figure.bbox.x1


def test_nothing_covers_the_curve_of_a_range_test():
    """The doubt stands above the data, the legend below the axes."""
    losses = np.linspace(2.5, 2.3, 50)
    found = LRRangeTest(np.logspace(-4, 0, 50), losses, losses, 0.01, None, {}, doubt="no evidence of learning: " + "long " * 20)
    ax = plot_lr_find(found, new_axes(3.2, figures.NARROW))
    ax.figure.draw_without_rendering()
    text, legend = (part.get_window_extent() for part in (ax.texts[-1], ax.get_legend()))
    points = ax.transData.transform(np.stack([found.lrs, losses], 1))
    assert text.y0 > points[:, 1].max() and legend.y1 < ax.bbox.y0 and ax.bbox.x0 <= text.x0 and text.x1 <= ax.bbox.x1


def test_lines_differ_in_more_than_their_color(browser, tmp_path):
    lines = {f"{index}": [index, index + 1] for index in range(6)}
    (tmp_path / "page.html").write_text(f"<style>{CHART_STYLE}</style>{Chart('', lines, [1, 2], '').svg}", encoding="utf-8")
    open_page(browser, (tmp_path / "page.html").resolve().as_uri(), 390, "light")
    for kind in ("polyline", ".sample"):
        dashes = browser.execute_script("return [...document.querySelectorAll(arguments[0])].map(line => "
                                        "getComputedStyle(line).strokeDasharray)", kind)
        assert len(set(dashes)) == 6


@pytest.mark.parametrize("longest", ["a", "hourglass", "a name that is shortened"])
def test_the_room_under_a_matrix_fits_its_names(longest):
    below = [float(Matrix([name, "b"], [[1, 1], [1, 1]], "").svg.partition('viewBox="0 0 360 ')[2].partition('"')[0])
             for name in ("b", longest)]
    assert below[1] - below[0] == pytest.approx(0.75 * min(7 * (len(longest) - 1), 73), abs=8)


@pytest.mark.parametrize(("classes", "count"), [(2, 10_000), (1000, 2000), pytest.param(100, 10_000, marks=pytest.mark.long)])
def test_many_images_and_classes(browser, tmp_path, classes, count):
    labels = torch.arange(count) % classes
    run, data = make_run(tmp_path / "run", torch.randn(count, classes) + torch.nn.functional.one_hot(labels, classes), labels)
    start = time.process_time()
    path = make_report(run, data)
    assert time.process_time() - start < 10 and path.stat().st_size < 3e6
    open_page(browser, path.resolve().as_uri(), 390, "light")
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= 390
    assert browser.execute_script("return [...document.images].every(image => image.naturalWidth)")
    assert browser.execute_script("return document.scrollingElement.scrollHeight") <= 6 * 844
    matrix = browser.find_elements("css selector", "#confusion .plot")
    assert all(plot.get_property("scrollWidth") <= plot.get_property("clientWidth") for plot in matrix), "a part is out of sight"


@pytest.mark.parametrize("name", ["figures", "tensorboard"])
def test_nothing_is_written_through_a_link(tmp_path, name):
    run, data = make_run(tmp_path / "run", torch.randn(40, 3), torch.arange(40) % 3)
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "run" / name).symlink_to(outside)
    with pytest.raises(InputError, match="is a link"):
        make_report(run, data)
    assert not list(outside.iterdir()) and not [path for path in (tmp_path / "run").rglob("*") if path.is_file()]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_named_pipes_do_not_block(tmp_path):
    run, data = make_run(tmp_path / "run", torch.randn(40, 3), torch.arange(40) % 3)
    (tmp_path / "run" / "figures").mkdir()
    for name in ("lr_find.json", "figures/odd.png", "figures/lr_find.png"):
        os.mkfifo(tmp_path / "run" / name)
    assert "range test" in make_report(run, data).read_text(encoding="utf-8")


def test_comparison(browser, tmp_path):
    labels = torch.arange(400) % 4
    right = torch.nn.functional.one_hot(labels, 4).float()
    (first, data), (second, _) = (make_run(tmp_path / name, 3 * right + torch.randn(400, 4), labels) for name
                                  in ("<b>one", "two"))
    data = replace(data, class_names=(HOSTILE, *data.class_names[1:]))
    for run in (first, second):
        run.config["data"]["class_names"] = list(data.class_names)
    second.config["recipe"] = second.config["recipe"] | {"max_lr": 0.123}
    path = make_comparison([first, second, second], data)
    assert path == tmp_path / "comparison.html"
    requests = open_page(browser, path.resolve().as_uri(), 390, "light")
    assert all(address.startswith("data:") for address in requests[1:]) and browser.get_log("browser") == []
    text = browser.execute_script("return document.body.innerText")
    assert browser.execute_script("return document.scrollingElement.scrollWidth") <= 390
    assert HOSTILE in text and "<b>one" in text and "0.123" in text and "recipe.max_lr" in text
    differing = int((first.evaluation.predictions != second.evaluation.predictions).sum())
    assert f"for {differing:,} of 400 test images" in text
    difference, margin = paired_difference(second.evaluation, first.evaluation)
    assert f"{100 * difference:+.1f} ± {100 * margin:.1f}" in text
    assert "without a clear difference" in text and ": right, " in text and "differ in one setting" in text
    look = browser.execute_script("""return [document.querySelector('nav').offsetHeight,
        [...document.querySelectorAll('.scroll')].map(box => box.scrollWidth - box.clientWidth)]""")
    assert look[0] < 60, "the contents take one line"
    assert max(look[1]) <= 0, "a column is out of sight"
    with pytest.raises(InputError, match="two to"):
        make_comparison([first], data)
    with pytest.raises(InputError, match="not the images of the run"):
        make_comparison([first, second], replace(data, test_labels=data.test_labels[::-1].copy()))


def shown_images(path: Path) -> dict[str, np.ndarray]:
    """Decode the explained images of a report and Grad-CAM's maps over them, by what they show."""
    page = Page(path.read_text(encoding="utf-8"))
    pictures = [values for tag, values in page.found if tag == "img" and values["alt"].startswith(("test image", "Grad-CAM"))]
    decoded = [Image.open(io.BytesIO(base64.b64decode(values["src"].partition(",")[2]))).convert("RGB") for values in pictures]
    return {f"{values['alt']} {place}" if values["alt"].startswith("Grad") else values["alt"]: np.asarray(image)
            for place, (values, image) in enumerate(zip(pictures, decoded, strict=True))}


def test_explanations_lie_over_the_photographs(browser, tmp_path, monkeypatch):
    """The squares in the middle of the files, in their resolution; after a change of the files, the network's own input."""
    why, = ((group, card, panels[:1]) for group, card, panels in sections.LAYOUT if group == "Why")
    monkeypatch.setattr(sections, "LAYOUT", (why,))
    monkeypatch.setattr(figures, "FIGURES", {})  # this test makes three reports, and looks at one card
    rng, root = np.random.default_rng(0), tmp_path / "photos"
    for part, count in (("train", 4), ("test", 6)):
        for name in ("cat", "dog"):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
                coarse.resize((160, 120), Image.Resampling.BICUBIC).save(root / part / name / f"{number}.png")
    (root / "test" / "cat" / "0 broken.png").write_bytes(b"no image: from here on, indices and files differ by one")
    data = load_data(root, skip_bad=True)
    torch.manual_seed(0)
    run = fit(create_model("spatial_attn", 2), data, epochs=1, batch_size=4, max_lr=1e-3, out=tmp_path / "run", verbose=False,
              notes={"source": str(root)})
    files = [path for name in ("cat", "dog") for path in sorted((root / "test" / name).glob("[0-5].png"))]
    path = make_report(run, data)
    shown = shown_images(path)
    larger = {alt: image for alt, image in shown.items() if alt.startswith("test image") and "as the network" not in alt}
    assert len(larger) == 5
    for alt, image in larger.items():
        index = int(alt.split()[2].strip(","))
        expected = np.asarray(Image.open(files[index]).crop((20, 0, 140, 120))).astype(int)
        assert image.shape == (120, 120, 3) and np.abs(image - expected).mean() < 4, "another photograph, or another part"
        small = shown[f"test image {index} as the network gets it"]
        assert np.array_equal(small, data.test_images[index]), "the network's input is shown exactly"
    maps = [image for alt, image in shown.items() if alt.startswith("Grad-CAM")]
    assert maps and all(image.shape == (120, 120, 3) for image in maps)
    open_page(browser, path.resolve().as_uri(), 390, "light")
    assert browser.execute_script("return document.querySelector('#explanations .small').getBoundingClientRect().width") < 50

    Image.open(files[0]).rotate(90).save(files[0])
    for other in files[1:]:
        Image.open(files[0]).save(other)  # every file has become the same photograph
    changed = shown_images(make_report(run, data))
    for alt, image in changed.items():
        assert image.shape == (32, 32, 3) and "as the network" not in alt
        if alt.startswith("test image"):
            assert np.array_equal(image, data.test_images[int(alt.split()[2].strip(","))]), "a photograph of something else"
    shutil.rmtree(root)
    assert shown_images(make_report(run, data)).keys() == changed.keys(), "without the folder, the report is the same"


def test_a_script_that_slips_in_does_not_run(browser, run_folder, tmp_path):
    html = (run_folder / "report.html").read_text(encoding="utf-8")
    (tmp_path / "loose.html").write_text(html.replace("<h1>", "<script>document.title = 'it ran'</script><h1 onclick=alert(1)>"))
    open_page(browser, (tmp_path / "loose.html").resolve().as_uri(), 1440, "light")
    assert browser.title == "spatial_attn on shapes"
    assert browser.execute_script(SHOWN_PANELS), "the page's own script runs"
    browser.get_log("browser")  # the browser's complaint
