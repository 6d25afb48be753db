"""Folders of images as people have them: names of parts, hidden files, formats, copies, memory."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

from attn_cifar.core import IMAGE_SUFFIXES, InputError
from attn_cifar.data import Augmentation, Batches, ImageData, load_data, read_image
from attn_cifar.data import folders as module
from attn_cifar.explain import Explanation
from attn_cifar.files import own_folder, regular_file, remove_leftovers, write_text
from attn_cifar.training import Evaluation

CLASSES = "cat", "dog"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Give each test an empty cache."""
    monkeypatch.setenv("ATTN_CIFAR_CACHE", str(tmp_path / "cache"))


def picture(number: int, size: int = 12) -> Image.Image:
    """Return noise that depends on the number alone."""
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8))


numbers = itertools.count()


def fill(folder: Path, count: int, names=CLASSES, size: int = 12) -> Path:
    """Write `count` images of each class, all different."""
    for name in names:
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            picture(next(numbers), size).save(folder / name / f"{i}.png")
    return folder


def counts(data: ImageData) -> tuple[int, int]:
    return len(data.train_labels), len(data.test_labels)


PAIRS = [("train", "test"), ("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Testing"), ("training_set", "test_set"),
         ("seg_train", "seg_test"), ("train", "validation"), ("train", "valid"), ("train", "dev"), ("train", "eval"),
         ("train", "evaluation"), ("Training Set", "Test Set"), ("train-images", "test-images"), ("TrainData", "TestData"),
         ("train2017", "val2017"), ("images_train", "images_val")]


@pytest.mark.parametrize("first, second", PAIRS)
def test_training_and_test_folders_by_many_names(tmp_path, caplog, first, second):
    root = tmp_path / "photos"
    fill(root / first, 4), fill(root / second, 2)
    data = load_data(root)
    assert (data.class_names, counts(data)) == (CLASSES, (8, 4))
    told = f"training images from {first}, test images from {second}" in caplog.text
    assert told is ((first, second) != ("train", "test")), "the usual names need no line"
    expected = {np.asarray(Image.open(path).resize((12, 12))).tobytes() for path in (root / second).rglob("*.png")}
    small = load_data(root, image_size=12)
    assert {image.tobytes() for image in small.test_images} == expected, "the test images are those of the test folder"


def test_one_more_level(tmp_path):
    root = tmp_path / "intel"
    fill(root / "seg_train" / "seg_train", 4), fill(root / "seg_test" / "seg_test", 2)
    (root / "seg_pred" / "seg_pred").mkdir(parents=True)
    picture(1).save(root / "seg_pred" / "seg_pred" / "1.png")
    assert (load_data(root).class_names, counts(load_data(root))) == (CLASSES, (8, 4))
    fill(tmp_path / "flowers" / "flowers", 6)
    assert load_data(tmp_path / "flowers").class_names == CLASSES


def test_validation_images_are_not_used_beside_test_images(tmp_path, caplog):
    root = tmp_path / "photos"
    for part, count in (("train", 4), ("val", 3), ("test", 2)):
        fill(root / part, count)
    assert counts(load_data(root)) == (8, 4) and "val is not used" in caplog.text


def test_train_can_be_a_class(tmp_path):
    root = fill(tmp_path / "vehicles", 6, ("bus", "car", "train"))
    assert load_data(root).class_names == ("bus", "car", "train")
    root = fill(tmp_path / "check", 6, ("invalid", "valid"))
    assert load_data(root).class_names == ("invalid", "valid")
    root = fill(tmp_path / "places", 6, ("test_tube", "train_station"))
    assert load_data(root).class_names == ("test_tube", "train_station")


def test_train_alone_holds_out(tmp_path):
    root = tmp_path / "photos"
    fill(root / "train", 12)
    data = load_data(root)
    assert data.class_names == CLASSES and sum(counts(data)) == 24 and counts(data)[1] >= 2


def test_a_test_folder_beside_classes(tmp_path):
    root = fill(tmp_path / "photos", 4)
    fill(root / "test", 2)
    assert (load_data(root).class_names, counts(load_data(root))) == (CLASSES, (8, 4))


def flat(root: Path) -> None:
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        for i in range(3):
            picture(next(numbers)).save(root / part / f"{i}.png")


def unlabeled_test(root: Path) -> None:
    fill(root, 3), (root / "test").mkdir()
    picture(3).save(root / "test" / "0.png")


@pytest.mark.parametrize("make, words", [
    (flat, "no class folders"),
    (unlabeled_test, "without class folders"),
    (lambda root: (fill(root / "val", 2), fill(root / "test", 2)), "no folder of training images"),
    (lambda root: (fill(root / "train", 2), fill(root / "Training", 2), fill(root / "test", 2)), "for the same"),
    (lambda root: (fill(root / "train", 2), (root / "test").mkdir()), "holds no images in class folders"),
    (lambda root: (fill(root / "train", 2), fill(root / "test", 2, ("cat", "cow"))), "lack: cow"),
    (lambda root: (fill(root, 4, ("cat",)), fill(root, 1, ("dog",))), "'dog'.*has one image only"),
])
def test_what_cannot_be_understood_is_refused(tmp_path, make, words):
    make(tmp_path / "photos")
    with pytest.raises(InputError, match=words) as refused:
        load_data(tmp_path / "photos")
    assert len(str(refused.value).splitlines()) == 1 and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".thumbnails", "@eaDir", "__MACOSX", "deep/.hidden"])
def test_hidden_folders_are_ignored_at_every_depth(tmp_path, hidden):
    root = fill(tmp_path / "photos", 6)
    for folder in (root, *root.iterdir()):
        fill(folder / hidden, 2, ("cat",)), picture(next(numbers)).save(folder / hidden / "x.png")
    picture(1).save(root / "cat" / "._0.png")
    assert (load_data(root).class_names, sum(counts(load_data(root)))) == (CLASSES, 12)


FORMATS = {".jpg": "JPEG", ".JPEG": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP",
           ".dib": "DIB", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM",
           ".pnm": "PPM",
           "": "JPEG", ".avif": "AVIF", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".jpx": "JPEG2000"}


def test_every_suffix_is_read(tmp_path, caplog):
    missing = {"AVIF": not features.check("avif"), "JPEG2000": not features.check("jpg_2000")}
    able = {suffix: form for suffix, form in FORMATS.items() if not missing.get(form)}
    for name in CLASSES:
        (tmp_path / "photos" / name).mkdir(parents=True)
        for suffix, form in able.items():
            picture(next(numbers), 32).save(tmp_path / "photos" / name / f"a{suffix}", format=form)
    data = load_data(tmp_path / "photos")
    assert sum(counts(data)) == 2 * len(able) and "left out" not in caplog.text
    assert {suffix.lower() for suffix in FORMATS if suffix} <= IMAGE_SUFFIXES


def test_other_files_are_counted(tmp_path, caplog):
    root = fill(tmp_path / "photos", 3)
    for name in ("a.txt", "b.txt", "c.HEIC", "LICENSE", ".hidden"):
        (root / "cat" / name).write_bytes(b"BM but no image")
    picture(0).save(root / "loose.png")
    for _ in range(2):  # decoded, and from the cache
        caplog.clear()
        assert sum(counts(load_data(root))) == 6
        assert "5 other files are left out" in caplog.text and "2 .txt" in caplog.text and "convert to JPEG" in caplog.text


def test_heic_is_explained(tmp_path):
    root = fill(tmp_path / "photos", 3)
    (root / "cow").mkdir()
    content = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100)
    (root / "cow" / "1.heic").write_bytes(content)
    with pytest.raises(InputError, match="cow.*convert to JPEG"):
        load_data(root)
    (root / "cow" / "1.heic").rename(root / "cat" / "phone.jpg")
    for call in (lambda: load_data(root), lambda: read_image(root / "cat" / "phone.jpg")):
        with pytest.raises(InputError, match="convert to JPEG"):
            call()


def test_postscript_is_never_run(tmp_path, monkeypatch):
    """PIL goes by the content: by default, it would give this file to Ghostscript."""
    (tmp_path / "x.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\n%%EOF\n")
    assert Image.open(tmp_path / "x.png").format == "EPS"
    monkeypatch.setattr(subprocess, "check_call", lambda *a, **k: pytest.fail("started a program"))
    with pytest.raises(InputError, match="not one of the formats"):
        read_image(tmp_path / "x.png")


def test_copies_never_lie_on_both_sides(tmp_path):
    """Also copies in other classes, and in any number; everything is kept."""
    root = fill(tmp_path / "photos", 20)
    for i in range(20):
        for copy in range(3):
            shutil.copy(root / "cat" / f"{i}.png", root / ("cat", "dog")[copy % 2] / f"copy{copy} of {i}.png")
    data = load_data(root)
    train, test = ({image.tobytes() for image in images} for images in (data.train_images, data.test_images))
    assert sum(counts(data)) == 100 and train and test and not train & test
    assert set(data.train_labels) == set(data.test_labels) == {0, 1}


def test_a_class_of_copies_is_refused(tmp_path):
    root = fill(tmp_path / "photos", 4)
    for path in list((root / "dog").glob("[123].png")):
        shutil.copy(root / "dog" / "0.png", path)
    with pytest.raises(InputError, match="4 copies of it"):
        load_data(root)


def test_the_split_of_existing_folders_stays(tmp_path):
    """Without copies, a hash of the names decides, as it did before copies were looked for."""
    root = fill(tmp_path / "photos", 30)
    files = {name: [str(root / name / f"{i}.png") for i in sorted(range(30), key=lambda i: f"{i}.png")] for name in CLASSES}
    _, test = module._hold_out_test(root, files)
    assert test == {name: [path for path in paths if module._is_test(Path(path))] for name, paths in files.items()}


MEASURE = """
import resource, sys, threading, time
import numpy as np
from PIL import Image
from attn_cifar.data import InputError, load_data, read_image
Image.init()
from pathlib import Path
import tqdm, tempfile
warm = tempfile.mkdtemp() + "/warm.png"; Image.new("RGB", (8, 8)).save(warm); read_image(warm)
def peak(): return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    exec(sys.argv[1])
except InputError as error:
    print(error)
print(peak() - before)
"""


def peak_memory(tmp_path, program: str) -> tuple[str, int]:
    """Run a program in a fresh process; return what it printed, and by how many bytes its largest memory grew."""
    done = subprocess.run([sys.executable, "-c", MEASURE, program], capture_output=True, text=True,
                          env={**os.environ, "ATTN_CIFAR_CACHE": str(tmp_path / "cache"), "PYTHONWARNINGS": "ignore"})
    assert done.returncode == 0, done.stderr[-2000:]
    *lines, grown = done.stdout.splitlines()
    return "\n".join(lines), int(grown)


def test_reading_a_folder_needs_little_more_than_its_images(tmp_path):
    root = fill(tmp_path / "photos", 1, size=64)
    for name in CLASSES:
        for i in range(1, 1000):
            os.link(root / name / "0.png", root / name / f"{i}.png")
        picture(next(numbers), 64).save(root / name / "x.png")
    _, grown = peak_memory(tmp_path, f"data = load_data({str(root)!r}, image_size=128)")
    decoded = 2002 * 128 * 128 * 3
    assert grown <= 1.3 * decoded, f"{grown / decoded:.2f} times the decoded size"


def bomb(path: Path, form: str, mode: str, side: int) -> None:
    """Write an image of one value that is small as a file and large as an array."""
    image = Image.new(mode, (side, side))
    options = {"compression": "tiff_lzw"} if form == "TIFF" else {}
    if form in ("GIF", "WEBP"):
        options = {"save_all": True, "append_images": [Image.new(mode, (side, side), 1)] * 3}
    image.save(path, form, **options)


BOMBS = [("PNG", "I;16"), ("PNG", "RGBA"), *(pytest.param(*bomb, marks=pytest.mark.long) for bomb in (
    ("PNG", "P"), ("PNG", "LA"), ("PNG", "1"), ("TIFF", "I;16"), ("GIF", "P"), ("WEBP", "RGB")))]


@pytest.mark.parametrize("form, mode", BOMBS)
def test_decoding_is_bounded(tmp_path, form, mode):
    """25 million pixels in a small file: 16 bits needed 900 MB once."""
    path = tmp_path / f"bomb.{form.lower()}"
    bomb(path, form, mode, 5000)
    assert path.stat().st_size < 1_200_000
    _, grown = peak_memory(tmp_path, f"read_image({str(path)!r})")
    assert grown < 25e6 * (18 if form == "WEBP" else 12), f"{grown / 1e6:.0f} MB"


def test_the_note_counts_images_that_lose_a_part(tmp_path, caplog):
    """Resizing a square loses nothing, so it needs no note; a phone's sideways picture is as long as an upright one."""
    sideways = Image.Exif()
    sideways[0x0112] = 6  # rotate by 90°
    for split, sizes in (("train", [(64, 64), (32, 32), (16, 16), (64, 48), (32, 33)]), ("test", [(64, 64), (32, 32)])):
        for name in ("cat", "dog"):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for index, size in enumerate(sizes):
                picture = Image.new("RGB", size, (40 * index, 90, 200 if name == "cat" else 30))
                picture.save(tmp_path / "photos" / split / name / f"{index}.png", exif=sideways)
    load_data(tmp_path / "photos")
    assert [record.getMessage() for record in caplog.records] == [
        "4 of 10 training images are not square and lose a part: the square in their middle is used"]


def test_strips_give_the_same_pixels(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rgba = Image.fromarray(rng.integers(0, 256, (50, 40, 4), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (50, 40)).astype(np.uint16))
    palette = rgba.convert("RGB").quantize(16)
    for image in (rgba, deep, palette, rgba.convert("LA"), rgba.convert("CMYK"), rgba.convert("1")):
        whole = np.asarray(module._to_rgb(image))
        monkeypatch.setattr(module, "_STRIP", 130)
        assert (np.asarray(module._convert(image)) == whole).all(), image.mode
        monkeypatch.setattr(module, "_STRIP", 2**20)


def test_what_does_not_fit_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    root = fill(tmp_path / "photos", 6)
    monkeypatch.setattr(module, "_available_memory", lambda: 30_000_000)
    monkeypatch.setattr(module, "_decode", lambda *a: pytest.fail("decoded"))
    with pytest.raises(InputError, match="12 images of 1024×1024 pixels need 0.0 GB"):
        load_data(root, image_size=1024)


@pytest.mark.parametrize("size", [8, 1024])
def test_the_smallest_and_the_largest_images(tmp_path, size):
    data = load_data(fill(tmp_path / "photos", 2), image_size=size)
    images, labels = next(iter(Batches.train(data, 4, Augmentation(cutout_prob=1, rotate_prob=1, flip_prob=0.5))))
    assert images.shape[1:] == (3, size, size) and images.isfinite().all() and labels.dtype == torch.int64


@pytest.mark.parametrize("size", [7, 1025, 32.5, "32", None])
def test_other_sizes_are_refused(tmp_path, size):
    with pytest.raises(InputError, match="image_size"):
        load_data(tmp_path, image_size=size)


def test_listing_is_linear(tmp_path, monkeypatch):
    """Once, a list was searched for every file: 80,000 files took minutes."""
    files = {name: [f"/{name}/{i}.png" for i in range(40_000)] for name in CLASSES}
    monkeypatch.setattr(module, "_originals", lambda paths: {path: path for path in paths})
    import time
    started = time.process_time()
    train, test = module._hold_out_test(Path("/"), files)
    assert time.process_time() - started < 5 and len(train["cat"]) + len(test["cat"]) == 40_000


# Arrays of other people's making


def arrays(height: int = 9, width: int = 14, count: int = 12) -> dict:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (count, height, width, 3), dtype=np.uint8), np.arange(count) % 3
    return dict(train_images=images, train_labels=labels, test_images=images[:6], test_labels=labels[:6],
                class_names=("a", "b", "c"), mean=(.5, .5, .5), std=(.25, .25, .25), name="mine")


@pytest.mark.parametrize("labels", [np.int8, np.uint8, np.int32, np.uint64, lambda a: a[:, None], list, torch.tensor])
def test_labels_of_any_integer_type(labels):
    content = arrays()
    numpy_type = isinstance(labels, type) and issubclass(labels, np.generic)
    changed = content["train_labels"].astype(labels) if numpy_type else labels(content["train_labels"])
    data = ImageData(**content | {"train_labels": changed}).check()
    assert data.train_labels.dtype == np.int64 and (data.train_labels == content["train_labels"]).all()


WRONG = {"from 1": dict(train_labels=np.arange(12) % 3 + 1), "negative": dict(train_labels=np.arange(12) % 3 - 1),
         "floats": dict(train_labels=np.zeros(12)), "too few": dict(train_labels=np.arange(11) % 3),
         "one-hot": dict(train_labels=np.eye(3, dtype=int)[np.arange(12) % 3]),
         "0..1": dict(train_images=np.zeros((12, 9, 14, 3))),
         "int64 pixels": dict(test_images=np.zeros((6, 9, 14, 3), int)),
         "gray": dict(train_images=np.zeros((12, 9, 14), np.uint8)),
         "channels first": dict(train_images=np.zeros((12, 3, 9, 14), np.uint8)),
         "alpha": dict(train_images=np.zeros((12, 9, 14, 4), np.uint8)),
         "none": dict(train_images=np.zeros((0, 9, 14, 3), np.uint8), train_labels=np.zeros(0, int)),
         "no test": dict(test_images=np.zeros((0, 9, 14, 3), np.uint8), test_labels=np.zeros(0, int)),
         "no pixels": dict(train_images=np.zeros((12, 0, 14, 3), np.uint8)),
         "other size": dict(test_images=np.zeros((6, 9, 9, 3), np.uint8)),
         "two means": dict(mean=(.5, .5)), "std 0": dict(std=(.2, 0, .2)), "std < 0": dict(std=(.2, -.1, .2)), "mean of bytes":
         dict(mean=(125., 122., 113.)), "nan": dict(std=(.2, float("nan"), .2)), "same names": dict(class_names=("a", "b", "a")),
         "one text": dict(class_names="abc"), "ragged": dict(train_labels=[[0], [1, 2]]), "None": dict(train_images=None)}


@pytest.mark.parametrize("wrong", WRONG)
def test_other_arrays_are_refused_in_one_line(wrong):
    data = ImageData(**arrays() | WRONG[wrong])
    for use in (data.check, lambda: Batches.train(data, 4, Augmentation()), lambda: Batches.test(data), lambda: data.split(3),
                lambda: data.subset(3, 3)):
        with pytest.raises(InputError) as refused:
            use()
        assert len(str(refused.value).splitlines()) == 1
    assert repr(data)


def test_mapped_arrays_are_neither_copied_nor_read(tmp_path):
    """A sparse file of 8 GB: reading it would take longer than this test."""
    np.lib.format.open_memmap(tmp_path / "images.npy", "w+", np.uint8, (2_700_000, 32, 32, 3))
    images = np.load(tmp_path / "images.npy", mmap_mode="r")
    data = ImageData(**arrays(32, 32) | {"train_images": images, "train_labels": np.zeros(len(images), np.int32)}).check()
    assert data.train_images is images
    batch, _ = next(iter(Batches.train(data, 4, Augmentation())))
    assert batch.shape == (4, 3, 32, 32)


def oracle(image: np.ndarray, drawn: dict, i: int, pad: int) -> np.ndarray:
    """Crop, flip and erase one normalized image (H, W, 3) by slicing."""
    height, width = image.shape[:2]
    padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), constant_values=0)
    padded[:pad], padded[pad + height:], padded[:, :pad], padded[:, pad + width:] = BORDER, BORDER, BORDER, BORDER
    y, x = int(drawn["crop_y"][i]), int(drawn["crop_x"][i])
    cropped = padded[y:y + height, x:x + width].copy()
    cropped = cropped[:, ::-1].copy() if drawn["flip"][i] else cropped
    cropped[drawn["top"][i]:drawn["bottom"][i], drawn["left"][i]:drawn["right"][i]] = 0
    return cropped


BORDER = np.array([.4, .5, .6], np.float32)


@pytest.mark.parametrize("height, width", [(9, 14), (20, 11), (32, 64), (1, 5)])
def test_images_that_are_not_square(height, width):
    """Crop, flip and cutout against slicing; rotation by 180 degrees against flipping both axes."""
    images = torch.from_numpy(arrays(height, width)["train_images"])
    mean, std = tuple(BORDER.tolist()), (.25, .2, .3)
    augmentation = Augmentation(rotate_prob=0, cutout=6, cutout_prob=.7, flip_prob=.5)
    drawn = augmentation.draw(len(images), (height, width), torch.Generator().manual_seed(0))
    batch = augmentation.apply(images, drawn, mean, std).permute(0, 2, 3, 1).numpy()
    normal = (images.numpy() / 255 - np.array(mean)) / np.array(std)
    for i in range(len(images)):
        assert np.allclose(batch[i], oracle(normal[i].astype(np.float32), drawn, i, 4), atol=1e-5)
    from attn_cifar.data.augmentation import _rotate
    turned = _rotate(images, torch.full((len(images),), 180.0))
    assert (turned.int() - images.flip(1, 2).int()).abs().max() <= 1


def test_a_batch_of_images_that_are_not_square(tmp_path):
    from attn_cifar.data.cache import cached
    stored = cached("wide", lambda: ImageData(**arrays()))
    assert stored.train_images.shape == (12, 9, 14, 3) and "9×14" in repr(stored)
    images, _ = next(iter(Batches.train(stored, 12, Augmentation(rotate_prob=1))))
    assert images.shape == (12, 3, 9, 14) and images.isfinite().all()


# Files


def test_links_pipes_and_sockets(tmp_path):
    import socket
    (tmp_path / "run").mkdir(), (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("untouched")
    os.mkfifo(tmp_path / "run" / "pipe")
    (tmp_path / "run" / "link").symlink_to(tmp_path / "elsewhere" / "secret")
    (tmp_path / "run" / "figures").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / "run" / "socket"))
        kinds = {"pipe": "named pipe", "link": "link", "socket": "socket", "figures": "link", "none": "no file"}
        for name, word in kinds.items():
            with pytest.raises(InputError, match=word):
                regular_file(tmp_path / "run" / name)
    with pytest.raises(InputError, match="link"):
        write_text(tmp_path / "run" / "figures" / "a.txt", "x", below=tmp_path / "run")
    with pytest.raises(InputError, match="outside"):
        own_folder(tmp_path / "run" / ".." / "elsewhere", below=tmp_path / "run")
    write_text(tmp_path / "run" / "link", "new", below=tmp_path / "run")
    assert (tmp_path / "elsewhere" / "secret").read_text() == "untouched" and (tmp_path / "run" / "link").read_text() == "new"


def test_a_planted_link_is_not_followed(tmp_path):
    """The name of 0.1.0's temporary file, as a link to another file."""
    (tmp_path / "victim").write_text("untouched")
    (tmp_path / ".state.json.tmp").symlink_to(tmp_path / "victim")
    write_text(tmp_path / "state.json", "new")
    assert (tmp_path / "victim").read_text() == "untouched" and (tmp_path / "state.json").read_text() == "new"


def test_leftovers_of_dead_processes_are_removed(tmp_path):
    program = ("import os, sys; from attn_cifar.files import replacing, replacing_folder\n"
               "with replacing(sys.argv[1] + '/a.txt') as a, replacing_folder(sys.argv[1] + '/b') as b: os._exit(9)")
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == 9
    old, young, ours = tmp_path / ".partial-abcd_123", tmp_path / ".partial-abcd_124", tmp_path / ".vimrc.tmp"
    for folder in (old, young):
        folder.mkdir()
    ours.touch()
    os.utime(old, (0, 0)), os.utime(ours, (0, 0))
    assert len(list(tmp_path.iterdir())) == 5
    remove_leftovers(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([young, ours])


def test_no_home(tmp_path, monkeypatch):
    """A user of a container who is in no list of users, and has no home."""
    from attn_cifar.data import cache_folder

    for name in ("ATTN_CIFAR_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", classmethod(lambda cls: Path("~nobody-at-all").expanduser()))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert cache_folder() == tmp_path / f"attn_cifar-{os.getuid()}" and cache_folder().stat().st_mode & 0o777 == 0o700
    cache_folder().rmdir()
    (tmp_path / f"attn_cifar-{os.getuid()}").symlink_to(tmp_path)
    with pytest.raises(InputError, match="ATTN_CIFAR_CACHE"):
        cache_folder()


def test_checked_bytes_are_the_loaded_ones(tmp_path, monkeypatch):
    """CIFAR-10's archive is read once: what is exchanged after the check is never seen."""
    from attn_cifar.data import sources

    opened = []
    real = sources.open_file
    monkeypatch.setattr(sources, "open_file", lambda path, *a, **k: opened.append(str(path)) or real(path, *a, **k))
    path = tmp_path / "archive"
    path.write_bytes(b"content")
    assert sources._read_checked(path, "9a0364b9e99bb480dd25e1f0284c8555") == b"content" and len(opened) == 1
    assert sources._read_checked(tmp_path / "none", "") is None


def test_the_advice_for_pixels_in_0_to_1_works():
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    data = ImageData(pixels / 255, np.arange(4) % 2, pixels, np.arange(4) % 2, ("a", "b"), (0.5,) * 3, (0.25,) * 3, "floats")
    with pytest.raises(InputError) as refused:
        data.check()
    advice = re.search(r"convert them with (.+?) if they lie in 0\.\.1", str(refused.value))[1]
    assert np.array_equal(eval(advice, {"images": pixels / 255, "np": np}), pixels), "not a line to copy"


@pytest.mark.parametrize("count", [1, 2])
def test_messages_agree_with_their_numbers(count):
    images = np.zeros((count, 8, 8, 3), np.uint8)
    labels, names = np.zeros(count, int), ("a", "b")[:count]
    data = ImageData(images, labels, images, labels, names, (0.5,) * 3, (0.25,) * 3, "few")
    maps = Explanation("grad_cam", "layer", torch.zeros(count, 2, 2), torch.zeros(count), torch.ones(count))
    evaluation = Evaluation(torch.zeros(count, 2), torch.zeros(count, dtype=torch.int64), ("a", "b"))
    text = f"{data!r} {maps!r} {evaluation!r}"
    for words, right in ((("test image", "map", "image", "class"), 1), (("test images", "maps", "images", "classes"), 2)):
        assert all(bool(re.search(rf"\b{count} {word}\b", text)) == (count == right) for word in words), text
