"""Hostile input: a clear error or a right answer, never a traceback, a hang, or a file changed elsewhere."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import zlib
from collections import Counter
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from attn_cifar.cli import main
from attn_cifar.core import InputError
from attn_cifar.data import Batches, cache_folder, load_data, read_image
from attn_cifar.lr_finder import LRRangeTest
from attn_cifar.models import create_model
from attn_cifar.predict import load_classifier
from attn_cifar.files import read_tensors, write_tensors
from attn_cifar.training import TrainingState
from attn_cifar.training import fit, load_run

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = {"image": 100, "archive": 15, "checkpoint": 45, "tree": 40, "configuration": 60, "edited": 40, "planted": 30,
            "command": 30}
LONGEST = 10  # seconds that one input may take


@contextmanager
def in_time():
    """Fail after `LONGEST` seconds, where the system has alarms."""
    def late(*_):
        raise TimeoutError(f"took more than {LONGEST} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(function) -> str:
    """Say whether an input was answered or refused; any other error is the test's failure."""
    with in_time():
        try:
            function()
        except InputError as error:
            assert str(error).strip() and len(str(error)) < 2000
            return "refused"
    return "answered"


def files(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder and its content's checksum."""
    return {str(path.relative_to(folder)): zlib.crc32(path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Return a folder with images, a run, and a bystander that nothing may touch."""
    folder = tmp_path_factory.mktemp("hostile")
    (folder / "bystander").mkdir()
    (folder / "bystander" / "letter.txt").write_text("untouched")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / "photos" / name).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / "photos" / name / f"{i}.png")
    fit(create_model("basic_attn", 2), load_data(folder / "photos"), out=folder / "run", epochs=1, batch_size=4, device="cpu",
        precision="float32", compile=False, verbose=False)
    LRRangeTest(np.geomspace(1e-6, 1, 12), np.ones(12), np.ones(12), 0.01, trials=[(0.01, 1.0)]).save(
        folder / "run" / "lr_find.json")
    return folder


def encodings() -> list[tuple[str, bytes]]:
    """Return one picture in many forms."""
    rng = np.random.default_rng(1)
    colours = Image.fromarray(np.kron(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))
    deep = Image.fromarray(rng.integers(0, 65536, (40, 40)).astype(np.uint16))
    forms = [("png", colours), ("png", colours.convert("P")), ("png", colours.convert("RGBA")), ("png", colours.convert("1")),
             ("png", deep), ("jpeg", colours), ("jpeg", colours.convert("CMYK")), ("jpeg", colours.convert("L")),
             ("gif", colours), ("webp", colours), ("bmp", colours), ("tiff", colours), ("tiff", deep)]
    made = []
    for form, picture in forms:
        buffer = io.BytesIO()
        picture.save(buffer, form, **({"compression": "tiff_lzw"} if form == "tiff" else {}))
        made.append((form, buffer.getvalue()))
    return made


def mutated(data, content: bytes) -> bytes:
    """Change bytes: overwrite, cut, repeat, or put in a number that is far too large."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 8))):
        if not content:
            break
        at = data.draw(st.integers(0, len(content) - 1))
        what = data.draw(st.sampled_from(("byte", "cut", "repeat", "number", "head")))
        if what == "byte":
            content[at] = data.draw(st.integers(0, 255))
        elif what == "head":  # where formats keep their sizes
            content[at % min(len(content), 64)] = data.draw(st.integers(0, 255))
        elif what == "cut":
            del content[at:at + data.draw(st.integers(1, len(content)))]
        elif what == "repeat":
            content[at:at] = content[at:at + data.draw(st.integers(1, 64))]
        else:
            content[at:at + 4] = data.draw(st.sampled_from((b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0")))
    return bytes(content)


NASTY = st.sampled_from((None, True, -1, 0, 1e308, float("nan"), 10**30, "", "x" * 300, "../../bystander", "\x00", "\ud800",
                         "load", [], [[]], {}, {"a": 1}, [None, "a"], ["cat", "cat"]))


def replaced(data, value):
    """Return a JSON value in which one part is another one, or is missing."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 4)):
        keys = sorted(value, key=str) if isinstance(value, dict) else list(range(len(value)))
        key = data.draw(st.sampled_from(keys))
        copied = dict(value) if isinstance(value, dict) else list(value)
        if data.draw(st.integers(0, 5)) == 0:
            del copied[key]
        else:
            copied[key] = replaced(data, value[key])
        return copied
    return data.draw(NASTY)


def image(data, place: Path) -> str:
    """A file that says it is an image, read alone."""
    form, content = data.draw(st.sampled_from(encodings()))
    path = place / f"input.{form}"
    path.write_bytes(mutated(data, content))

    def read():
        pixels = read_image(path)
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8

    try:
        return outcome(read)
    finally:
        path.unlink()


def archive(data, place: Path) -> str:
    """An archive in the cache that is not CIFAR-10's: nothing of it is unpacked or unpickled."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name in ("cifar-10-batches-py/data_batch_1", "../bystander/letter.txt", "/tmp/escaped"):
            member = tarfile.TarInfo(name)
            member.size = 4
            tar.addfile(member, io.BytesIO(b"evil"))
    folder = cache_folder() / "cifar10"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cifar-10-python.tar.gz").write_bytes(mutated(data, buffer.getvalue()))
    try:
        result = outcome(lambda: load_data("cifar10"))
        assert result == "refused" and [path.name for path in folder.iterdir()] == ["cifar-10-python.tar.gz"]
        return result
    finally:
        shutil.rmtree(folder)


def checkpoint(data, place: Path) -> str:
    """A checkpoint, weights or evaluation with other bytes."""
    name = data.draw(st.sampled_from(("checkpoint/state.safetensors", "model.safetensors", "evaluation.safetensors")))
    whole = (place / "run" / name).read_bytes()
    content = mutated(data, whole)
    path = place / "input.safetensors"
    path.write_bytes(content)
    try:
        result = outcome(lambda: read_tensors(path))
        assert result == "refused" or content == whole, "a changed byte was not noticed"
        return result
    finally:
        path.unlink()


def tree(data, place: Path) -> str:
    """A checkpoint with another content and a checksum that fits: it is restored, or refused and nothing has changed."""
    stored = read_tensors(place / "run" / "checkpoint" / "state.safetensors")
    torch.manual_seed(1)
    model = create_model("basic_attn", 2)
    batches = Batches(np.zeros((4, 32, 32, 3), np.uint8), np.arange(4) % 2, 4, mean=(0.5,) * 3, std=(0.5,) * 3)
    optimizer = torch.optim.Adam(model.parameters())
    state = TrainingState(model, batches, optimizer=optimizer)
    stored["state"] = {name: stored["state"][name] for name in state.parts}
    path = place / "input.safetensors"
    changed = replaced(data, stored)
    try:
        write_tensors(path, changed)
    except (TypeError, UnicodeError):
        return "cannot be written"
    before = state.capture()
    try:
        result = outcome(lambda: state.load(path))
    finally:
        path.unlink()
    if result == "refused":
        after = state.capture()
        assert all(torch.equal(a, b) for a, b in zip(before["model"]["weights"].values(), after["model"]["weights"].values(),
                                                     strict=True))
        assert before["loader"] == after["loader"] and before["random"]["python"] == after["random"]["python"]
    return result


def configuration(data, place: Path) -> str:
    """A run whose files say something else, read and used."""
    name = data.draw(st.sampled_from(("config.json", "config.json", "config.json", "metrics.csv", "timing.csv", "steps.csv")))
    content = (place / "run" / name).read_bytes()
    if name == "config.json" and data.draw(st.booleans()):
        content = json.dumps(replaced(data, json.loads(content))).encode()
    else:
        content = mutated(data, content)
    run = place / "changed"
    shutil.copytree(place / "run", run, ignore=shutil.ignore_patterns("tensorboard", "checkpoint", "figures"))
    (run / name).write_bytes(content)
    try:
        result = outcome(lambda: load_run(run))
        with in_time():
            code = main(["predict", str(run), str(place / "photos" / "cat" / "0.png"), "--json"])
        assert code == (2 if result == "refused" else 0)
        return result
    finally:
        shutil.rmtree(run)


RUN_FILES = ("config.json", "metrics.csv", "timing.csv", "steps.csv", "lr_find.json", "model.safetensors",
             "evaluation.safetensors", "checkpoint/state.safetensors")
USES = ["load", "predict", "evaluate", "compare", "resume"]
SLOW_USES = ["explain", "report", "train"]  # half a second and more


def use(what: str, run: Path, place: Path) -> str:
    """Use a run folder as a command would; a refusal is one line."""
    photos, image, lines = str(place / "photos"), str(place / "photos" / "cat" / "0.png"), io.StringIO()
    if what == "load":
        return outcome(lambda: load_classifier(run))
    if what == "resume":
        return outcome(lambda: fit(create_model("basic_attn", 2), load_data(photos), out=run, resume=True, epochs=1, batch_size=4,
                                   device="cpu", precision="float32", compile=False, verbose=False))
    words = {"predict": ["predict", str(run), image], "evaluate": ["evaluate", str(run), "--data", photos],
             "explain": ["explain", str(run), image, "-o", str(run / "why.png")],
             "compare": ["report", str(place / "run"), str(run), "--data", photos, "-o", str(run / "page.html")],
             "report": ["report", str(run), "--data", photos],
             "train": ["train", "--resume", "--out", str(run), "--data", photos, "--device", "cpu", "--epochs", "2"]}[what]
    with in_time(), redirect_stderr(lines), redirect_stdout(io.StringIO()) as printed:
        code = main([*words, "--json"])
    assert code in (0, 1, 2)
    if code:
        last = [line for line in lines.getvalue().splitlines() if not line.startswith("attn-cifar: note:")]
        assert len(last) == 1 and len(last[0]) < 2000, last
    else:
        json.loads(printed.getvalue(), parse_constant=pytest.fail)
    return "refused" if code else "answered"


def edited(data, place: Path) -> str:
    """A run one of whose files has another content of the right form, with a checksum that fits."""
    name, run = data.draw(st.sampled_from(RUN_FILES)), place / "changed"
    shutil.copytree(place / "run", run)
    try:
        if name.endswith("safetensors"):
            try:
                write_tensors(run / name, replaced(data, read_tensors(run / name)))
            except (TypeError, UnicodeError):
                return "cannot be written"
        elif name.endswith("json"):
            (run / name).write_text(json.dumps(replaced(data, json.loads((run / name).read_text()))))
        else:
            lines = (run / name).read_text().splitlines()
            row = data.draw(st.integers(0, len(lines) - 1))
            cells = lines[row].split(",")
            cells[data.draw(st.integers(0, len(cells) - 1))] = data.draw(st.sampled_from(
                ("nan", "inf", "-1", "1e999", "1e308", "", "x", '"', "1_0", "\0", "9" * 5000)))
            lines[row] = ",".join(cells)
            (run / name).write_text("\n".join(lines))
        return use(data.draw(st.sampled_from(USES)), run, place)
    finally:
        shutil.rmtree(run)


def planted(data, place: Path) -> str:
    """A run with a link, a pipe, a folder or nothing in the place of a file or folder: nothing is followed out of it."""
    run = place / "changed"
    shutil.copytree(place / "run", run)
    path = run / data.draw(st.sampled_from((*RUN_FILES, ".lock", "report.html", "checkpoint", "figures", "tensorboard")))
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    letter = place / "bystander" / "letter.txt"
    kinds = {"pipe": lambda: os.mkfifo(path), "folder": path.mkdir, "nothing": lambda: None,
             "device": lambda: path.symlink_to("/dev/zero"),
             "file": lambda: path.symlink_to(letter), "elsewhere": lambda: path.symlink_to(letter.parent),
             "gone": lambda: path.symlink_to("gone"), "loop": lambda: path.symlink_to(path.name), "whole": path.touch}
    try:
        kinds[data.draw(st.sampled_from(sorted(kinds)))]()
        return use(data.draw(st.sampled_from(USES)), run, place)
    finally:
        shutil.rmtree(run)


WORDS = ("", "-", "--", "-1", "0", "1", "1e309", "nan", "inf", "auto", "x" * 5000, "../..", "~nobody/x", "/dev/null", "/dev/zero",
         "é", "\u202e", "\ud800", "$(id)", "%s", "{}", "shapes", "cifar11", "spatial_attn", "basic_attn", "plain", "upstream",
         "cpu", "cuda", "attn_tiny", "--from", "--help", "--version", "--data", "--model", "--epochs", "--out", "--seed",
         "--max-lr",
         "--batch-size", "--json",
         "--resume", "--device", "--image-size", "--recipe", "--top", "RUN", "PHOTOS", "IMAGE", "NEW")


def command(data, place: Path) -> str:
    """A command line."""
    known = {"RUN": place / "run", "PHOTOS": place / "photos", "IMAGE": place / "photos" / "cat" / "0.png", "NEW": place / "new"}
    commands = "train", "train", "find-lr", "evaluate", "predict", "report", "models", "study", "nonsense"
    first = data.draw(st.sampled_from(commands))
    words = [first, *data.draw(st.lists(st.sampled_from(WORDS), max_size=6))]
    if first in ("train", "find-lr", "study"):  # never the whole built-in set: that is no hang, but it takes its time
        words = [word for word in words if word != "shapes"] + ["--data", "PHOTOS"]
        words += ["--epochs", "1", "--out", "NEW"] if first == "train" else []
    if first == "study" and {"demo", "reproduction", "speed"} & set(words):
        return "left out"
    words = [str(known.get(word, word)) for word in words]
    try:
        with in_time():
            code = main(words)
    except SystemExit as stop:  # --help and --version
        code = stop.code
    finally:
        shutil.rmtree(place / "new", ignore_errors=True)
    assert code in (0, 1, 2)
    return "refused" if code else "answered"


def fuzz(kind: str, examples: int, place: Path) -> dict[str, int]:
    """Try mutated inputs of a kind; return how many had which outcome."""
    seen: Counter[str] = Counter()

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.data())
    def attack(data):
        seen[globals()[kind](data, place)] += 1

    before = files(place)
    attack()
    assert files(place) == before, "a file was changed elsewhere"
    assert {path.name for path in Path.cwd().iterdir()} <= {"cache"}, "a file was written elsewhere"
    assert not Path("/tmp/escaped").exists()
    return dict(seen)


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Work in an empty folder, with an empty cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTN_CIFAR_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("kind", EXAMPLES)
def test_hostile_input(kind, place, elsewhere):
    seen = fuzz(kind, EXAMPLES[kind], place)
    assert sum(seen.values()) >= EXAMPLES[kind] and seen["refused"] >= EXAMPLES[kind] / 10, seen


@pytest.mark.long
def test_much_hostile_input(place, elsewhere, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "USES", USES + SLOW_USES)
    seen = {kind: fuzz(kind, 10 * examples, place) for kind, examples in EXAMPLES.items()}
    (ROOT / "nbs" / "studies" / "results" / "fuzz.json").write_text(json.dumps(seen, indent=1) + "\n")


# What random changes hardly find.


def png(path: Path, width: int, height: int) -> None:
    """Write a PNG of one colour, without ever holding its pixels."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    packed = zlib.compressobj(9)
    row = bytes(1 + width)
    content = b"".join(packed.compress(row) for _ in range(height)) + packed.flush()
    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 0, 0, 0, 0])
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", content) + chunk(b"IEND", b""))


def photos(folder: Path, names=("cat", "dog")) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            Image.fromarray(np.full((8, 8, 3), 40 * i, np.uint8)).save(folder / name / f"{i}.png")
    return folder


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [9_000, 30_000])
def test_a_decompression_bomb_is_refused(tmp_path, side):
    png(tmp_path / "bomb.png", side, side)
    assert (tmp_path / "bomb.png").stat().st_size < 2_000_000
    with in_time(), pytest.raises(InputError, match="million pixels|exceeds limit"):
        read_image(tmp_path / "bomb.png")


def test_a_header_of_fifty_thousand_pixels_a_side_is_refused_before_decoding(tmp_path):
    png(tmp_path / "small.png", 8, 8)
    content = bytearray((tmp_path / "small.png").read_bytes())
    content[16:24] = (50_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    (tmp_path / "huge.png").write_bytes(content)
    for command in (["predict", "attn_tiny"], ["explain", "attn_tiny"]):
        with in_time():
            done = subprocess.run([sys.executable, "-m", "attn_cifar", *command, str(tmp_path / "huge.png")], capture_output=True,
                                  text=True, cwd=tmp_path)
        assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
        assert "million pixels" in done.stderr or "exceeds limit" in done.stderr


def test_links_in_circles_pipes_and_dead_links_do_not_hang(tmp_path, elsewhere):
    folder = photos(tmp_path / "photos")
    (folder / "cat" / "back").symlink_to(folder, target_is_directory=True)
    (folder / "cat" / "self.png").symlink_to(folder / "cat" / "self.png")
    (folder / "cat" / "gone.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "dog" / "pipe.png")
    with in_time():
        data = load_data(folder)
        assert len(data.train_labels) + len(data.test_labels) == 6
        with pytest.raises(InputError, match="named pipe"):
            read_image(folder / "dog" / "pipe.png")


def test_names_of_any_kind(tmp_path, elsewhere, capsys):
    """Class and file names in any script, with markup, dollars, line breaks, no valid text at all, and as long as they may be."""
    names = ["犬", "e\u0301t\u00e9 \u202e", "$x^", "<b>&amp;\"'", "a\nb", "n" * 255, os.fsdecode(b"\xff\xfe")]
    folder = photos(tmp_path / "photos", names)
    words = ["train", "--data", str(folder), "--epochs", "1", "--batch-size", "4", "--max-lr", "0.001", "--device", "cpu",
             "--out"]
    assert main([*words, "run"]) == 0, capsys.readouterr().err
    assert "<b>" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    image = str(folder / names[-1] / "0.png")
    assert main(["predict", "run", image]) == 0
    assert main(["predict", "run", "missing" + names[-1]]) == 2


def test_a_file_that_changes_while_it_is_read(tmp_path, elsewhere, monkeypatch):
    """A file is cut after it was listed: it is named; whole again, it is read anew, and not from the cache."""
    import attn_cifar.data.folders as module

    folder = photos(tmp_path / "photos")
    victim, decode = folder / "cat" / "1.png", module._decode
    whole = victim.read_bytes()

    def cut_first(path, size):
        victim.write_bytes(whole[:40])
        return decode(path, size)

    monkeypatch.setattr(module, "_decode", cut_first)
    with pytest.raises(InputError, match="1.png is not a readable image"):
        load_data(folder)
    monkeypatch.setattr(module, "_decode", decode)
    victim.write_bytes(whole)
    assert len(load_data(folder).class_names) == 2
    Image.fromarray(np.full((8, 8, 3), 250, np.uint8)).save(victim)
    data = load_data(folder)
    assert 250 in np.concatenate([data.train_images, data.test_images])


def test_a_damaged_cache_is_made_anew(tmp_path, elsewhere, caplog):
    folder = photos(tmp_path / "photos")
    expected = load_data(folder)
    entry, = (cache_folder() / "decoded").iterdir()
    for name, content in (("data.json", b"{"), ("train_images.npy", b"\x93NUMPY"), ("test_labels.npy", b"cos\nsystem\n")):
        (entry / name).write_bytes(content)
        data = load_data(folder)
        assert (np.array(data.train_images) == np.array(expected.train_images)).all()
        assert (np.array(data.test_labels) == np.array(expected.test_labels)).all()
    assert caplog.text.count("damaged") == 3


@pytest.mark.parametrize("source", ["train_labels.npy", "checkpoint.safetensors"])
def test_nothing_that_is_read_is_executed(tmp_path, source):
    """A pickle in the place of an array or of weights stays unread."""
    import pickle

    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path = tmp_path / source
    if source.endswith("npy"):
        np.save(path, np.array([Bomb()], dtype=object), allow_pickle=True)
        from attn_cifar.data import map_array
        with pytest.raises(ValueError, match="pickle|objects"):
            map_array(path)
    else:
        path.write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(InputError, match="damaged"):
            read_tensors(path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, "{}", '{"suggestion": NaN}', f'{{"suggestion": {"9" * 400}}}', "null"])
def test_a_range_test_that_is_none_is_refused(tmp_path, content):
    path = tmp_path / "lr_find.json"
    path.write_text(content)
    with pytest.raises(InputError, match="holds no LR range test"):
        LRRangeTest.load(path)


def test_an_evaluation_that_is_none_is_refused(place, tmp_path):
    shutil.copytree(place / "run", tmp_path / "run")
    shutil.copy(place / "run" / "model.safetensors", tmp_path / "run" / "evaluation.safetensors")
    with pytest.raises(InputError, match="holds no evaluation"):
        load_run(tmp_path / "run")


def test_a_full_disk_costs_one_line_and_not_the_last_checkpoint(tmp_path):
    """Files may not grow beyond some size, so a checkpoint's write breaks off, as on a full disk."""
    folder = photos(tmp_path / "photos")
    words = [sys.executable, "-m", "attn_cifar", "train", "--data", str(folder), "--batch-size", "4", "--max-lr", "0.001",
             "--device", "cpu", "--epochs", "40", "--out", str(tmp_path / "run")]
    environment = {**os.environ, "ATTN_CIFAR_CACHE": str(tmp_path / "cache")}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    checkpoint = tmp_path / "run" / "checkpoint" / "state.safetensors"
    for line in process.stdout:
        if line.startswith("epoch   2/"):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
    errors = "".join(line for line in process.stderr if "note:" not in line)
    code = process.wait()
    if code == 0:
        pytest.skip("the training was over before the disk was full")
    assert code == 1 and len(errors.splitlines()) == 1 and errors.startswith("attn-cifar: "), errors
    history = read_tensors(checkpoint)["notes"]["history"]
    assert history and not list((tmp_path / "run").rglob(".*.tmp"))
    done = subprocess.run([*words, "--resume"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and load_run(tmp_path / "run").history[-1]["epoch"] == 40, done.stderr


def test_a_folder_that_cannot_be_written_is_named(tmp_path, elsewhere, capsys):
    folder = photos(tmp_path / "photos")
    (tmp_path / "file").touch()
    words = ["train", "--data", str(folder), "--epochs", "1", "--batch-size", "4", "--max-lr", "0.001", "--device", "cpu",
             "--out"]
    assert main([*words, str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert main([*words, "/proc/attn_cifar"]) == 2


def test_what_is_left_out_is_said_each_time(tmp_path, elsewhere, caplog):
    """The second time, the decoded images come from the cache."""
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for i in range(4):
            Image.fromarray(np.full((32, 32, 3), 40 * i, np.uint8)).save(tmp_path / "photos" / name / f"{i}.png")
    (tmp_path / "photos" / "cat" / "broken.png").write_bytes(b"no image")
    (tmp_path / "photos" / "bird").mkdir()
    for _ in range(2):
        caplog.clear()
        assert len(load_data(str(tmp_path / "photos"), skip_bad=True).class_names) == 2
        assert "1 of the 9 files in photos are left out" in caplog.text and "bird holds no images" in caplog.text
