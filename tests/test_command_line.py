"""The command line in the hands of a user: what it chooses, what it says while one waits, and what it never touches."""

import errno
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from attn_cifar import cli
from attn_cifar.cli import main
from attn_cifar.core import InputError
from attn_cifar.models import create_model, load_pretrained
from attn_cifar.studies import gpu
from attn_cifar.training import load_run
from attn_cifar.training.recipes import default_batch_size
from attn_cifar.training.runs import read_config

SLOW = """
import sys, time
import attn_cifar.cli as cli

def slow(arguments):
    "Wait as an import or a compilation would."
    cli._progress.info("drawing circles")
    for step in range({steps}):
        cli._progress.info("drawing circles", extra={{"done": step, "total": {steps}}})
        time.sleep({pause})
    return cli._Result({{"done": True}}, ["done"])

cli._SILENCE.update({silence})
cli._COMMANDS["models"] = (slow, ("--json",))
sys.exit(cli.main(["models", *sys.argv[1:]]))
"""


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Return a folder of images, in an empty working directory with an empty cache; reports are left out."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for name in ("cat", "dog", "owl"):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
                    tmp_path / "photos" / part / name / f"{i}.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATTN_CIFAR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("attn_cifar.report.sections.make_report", lambda run, data: Path(run, "report.html"))
    return tmp_path / "photos"


def train(*words: str, out: str = "run", model: str = "basic_attn") -> int:
    """Train for a moment."""
    return main(["train", "--model", model, "--epochs", "1", "--max-lr", "0.001", "--device", "cpu", "--out", out, *words])


# Defaults.


def test_the_default_network_and_the_rule_for_the_batch_size(photos, capsys):
    assert main(["train", "--data", str(photos), "--epochs", "1", "--device", "cpu", "--out", "run"]) == 0
    recipe, stored = read_config("run")["recipe"], read_config("run")
    assert (stored["model"], recipe["max_lr"], recipe["batch_size"]) == ("attn_tiny", 0.035, 8), "not 18 images in batches of 8"
    assert "note" not in capsys.readouterr().err, "a warning about what the user did not choose"
    for images in (1, 20, 255, 256, 400, 1200, 9_999, 50_000, 10**6):
        size = default_batch_size(images, 128)
        assert size <= 128 and (images / size >= 32 or size == 8) and (images / (2 * size) < 32 or size == 128), images


def test_one_piece_of_advice_about_the_batch_size(photos, caplog):
    assert train("--data", str(photos), "--batch-size", "16") == 0
    assert "the batch size would be 8 without --batch-size" in caplog.text and "smaller" not in caplog.text


@pytest.mark.parametrize(("words", "decided"), [
    ((), True), (("--model", "attn_small"), True), (("--model", "spatial_attn"), False), (("--model", "hybrid_attn"), False),
    (("--model", "spatial_attn", "--recipe", "tiny"), True), (("--max-lr", "auto"), False), (("--max-lr", "0.1"), True)])
def test_who_chooses_the_learning_rate(words, decided):
    arguments = cli.make_parser().parse_args(["train", *words])
    cli._complete(arguments)
    assert cli._choose_recipe(arguments)[1] == decided


# Resuming and fine-tuning.


def test_a_run_to_resume_keeps_its_options(photos):
    words = ("--data", str(photos), "--seed", "5", "--batch-size", "9")
    assert train(*words) == 0
    (Path("run") / "checkpoint" / "state.safetensors").rename("checkpoint")
    first = {key: value.clone() for key, value in load_run("run").model.state_dict().items()}
    assert main(["train", "--out", "run", "--resume", "--device", "cpu"]) == 0, "it needs what the run has recorded"
    again = load_run("run").model.state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first), "not the same run"
    assert read_config("run")["seed"] == 5


def test_a_run_without_a_source_asks_for_it(photos, capsys):
    assert train("--data", str(photos)) == 0
    config = json.loads(Path("run/config.json").read_text())
    config["notes"] = {}
    Path("run/config.json").write_text(json.dumps(config))
    assert main(["train", "--out", "run", "--resume"]) == 2
    assert "give --data" in capsys.readouterr().err


@pytest.mark.parametrize("start", ["attn_tiny", "run"])
def test_fine_tuning_starts_from_the_weights(photos, monkeypatch, start):
    if start == "run":
        assert train("--data", str(photos), model="attn_tiny") == 0
    weights = load_pretrained("attn_tiny").state_dict() if start == "attn_tiny" else load_run("run").model.state_dict()
    seen = []

    def record(model, data, **options):
        seen.append((model, len(data.class_names), options))
        raise InputError("far enough")

    monkeypatch.setattr("attn_cifar.training.loop.fit", record)
    assert main(["train", "--from", start, "--data", str(photos / "train"), "--out", "tuned"]) == 2
    model, classes, options = seen[0]
    other = create_model("attn_tiny", 7).state_dict()
    for key, value in model.state_dict().items():
        head = value.shape != other[key].shape
        assert (len(value) == classes) if head else torch.equal(value, weights[key].to(value)), key
    assert options["notes"]["from"].endswith(start)


def test_fine_tuning_is_resumed_from_the_same_weights(photos, monkeypatch):
    """Stopped before its first checkpoint, it must not go on from random weights."""
    assert train("--data", str(photos), "--from", "attn_tiny", model="attn_tiny", out="tuned") == 0
    tuned = {key: value.clone() for key, value in load_run("tuned").model.state_dict().items()}
    for path in sorted(Path("tuned").rglob("*"), reverse=True):
        if path.name != "config.json":
            path.rmdir() if path.is_dir() else path.unlink()
    assert main(["train", "--out", "tuned", "--resume", "--device", "cpu"]) == 0
    assert all(torch.equal(value, tuned[key]) for key, value in load_run("tuned").model.state_dict().items())


# Outputs and inputs.


def test_outputs_never_overwrite_inputs(photos, capsys):
    before = {path: path.read_bytes() for path in photos.rglob("*.png")}
    images = [str(path) for path in sorted(before)[:6]]
    assert train("--data", str(photos)) == 0
    Path("why-2.png").write_bytes(Path(images[0]).read_bytes())
    Path("hard.png").hardlink_to(images[1])
    Path("soft.png").symlink_to(images[2])
    (Path("run") / "figures" / "cat").mkdir(parents=True)
    commands = [("explain", "attn_tiny", *images[:5], "why-2.png", "-o", "why.png"),
                ("explain", "attn_tiny", *images, "-o", "hard.png"), ("explain", "attn_tiny", *images, "-o", "soft.png"),
                ("explain", "run", images[0], "-o", "run/figures/history.png"),
                ("explain", "attn_tiny", images[0], "-o", images[1] + "/why.png"),
                ("explain", "attn_tiny", images[0], "-o", "run"),
                ("find-lr", "--data", str(photos), "--out", str(photos / "train" / "cat" / "curve.png")),
                ("train", "--data", str(photos), "--out", str(photos / "train" / "cat" / "run")),
                ("train", "--data", "run/figures", "--out", "run", "--resume"), ("report", "run", "-o", "page.html"),
                ("report", "run", "run", "-o", "run/config.json")]
    capsys.readouterr()
    for words in commands:
        assert main(words) == 2, words
        output, errors = capsys.readouterr()
        assert output == "" and errors.count("\n") == 1, (words, errors)
    assert before == {path: path.read_bytes() for path in photos.rglob("*.png")} and not Path("why.png").exists()


# What is printed.


def test_a_loop_of_links_is_refused_in_one_line(photos, capsys):
    assert train("--data", str(photos)) == 0
    shutil.rmtree("run/checkpoint")
    Path("run/checkpoint").symlink_to("checkpoint")
    capsys.readouterr()
    assert main(["train", "--out", "run", "--resume", "--epochs", "2"]) == 2
    assert "run/checkpoint is not a folder" in capsys.readouterr().err


def test_control_characters_in_names_are_printed_escaped(photos, capsys):
    name = str(photos / "a\n\x1b[31m\u202egnp.exe.png")
    Image.new("RGB", (8, 8)).save(name)
    for words, stream in ((["predict", "attn_tiny", name], 0), (["predict", "attn_tiny", name + "\r"], 1)):
        main(words)
        printed = capsys.readouterr()[stream]
        assert printed.count("\n") == 1 and not set(printed) & set("\x1b\r\u202e") and r"\x1b[31m\u202e" in printed


def test_json_has_no_nan():
    values = {"a": [1.0, float("nan"), {"b": (float("inf"), "NaN")}], "c": True, "d": None}

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = json.dumps(cli._json_value(values), allow_nan=False)
    assert json.loads(text, parse_constant=refuse) == {"a": [1.0, None, {"b": [None, "NaN"]}], "c": True, "d": None}


@pytest.mark.parametrize("command", ["--help | true", "models | head -1", "models --json | true", "models >/dev/full",
                                     *(pytest.param(f"models {closed}", marks=pytest.mark.long) for closed in (">&-", "2>&-"))])
def test_an_output_that_is_closed(command):
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m attn_cifar {command}"], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    full = os.strerror(errno.ENOSPC) in done.stderr
    assert full == ("full" in command) and done.stderr.count("\n") == full


# Nothing is silent.


def slow(steps: int, pause: float, silence: dict) -> list[str]:
    """Return a command that takes a while."""
    return [sys.executable, "-c", SLOW.format(steps=steps, pause=pause, silence=silence)]


def watch(words: list[str], terminal: bool) -> tuple[str, float]:
    """Run a command; return what it printed and the longest time without a byte, from its first one on."""
    reading, writing = pty.openpty() if terminal else os.pipe()
    process = subprocess.Popen(words, stdout=writing, stderr=writing, stdin=subprocess.DEVNULL)
    os.close(writing)
    times, printed = [], b""
    while True:
        select.select([reading], [], [])
        try:
            content = os.read(reading, 4096)
        except OSError:  # the terminal's other end is closed
            content = b""
        if not content:
            break
        times.append(time.monotonic())
        printed += content
    os.close(reading)
    assert process.wait() == 0, printed
    return printed.decode(), max(np.diff(times), default=0.0)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_slow_stage_is_reported(terminal):
    """The limits are shortened to a third of a second; the stage takes two."""
    printed, silent = watch(slow(10, 0.2, {True: 0.3, False: 0.3}), terminal)
    assert silent < 1 and "drawing circles" in printed and printed.rstrip().endswith("done"), (silent, printed)
    assert re.search(r"\d/10 \[00:0\d<00:0\d", printed), "there is no estimate"
    if terminal:
        assert "\r" in printed and printed.rsplit("\x1b[K", 1)[1].strip() == "done", "the line is left behind"
    else:
        assert "\r" not in printed.replace("\r\n", "\n") and "\x1b" not in printed


@pytest.mark.long
@pytest.mark.parametrize(("terminal", "limit"), [(True, 5), (False, 30)])
def test_a_slow_stage_is_reported_in_time(terminal, limit):
    printed, silent = watch(slow(1, 2.5 * limit, {}), terminal)
    assert silent < limit and printed.count("drawing circles") >= 2


def test_reports_stay_out_of_json():
    done = subprocess.run([*slow(10, 0.1, {False: 0.2}), "--json"], capture_output=True, text=True)
    assert json.loads(done.stdout) == {"done": True} and "drawing circles" in done.stderr


# Threads that wait.


@pytest.mark.parametrize(("given", "expected"), [({}, "1000 None"), ({"GOMP_SPINCOUNT": "7"}, "7 None"),
                                                 ({"OMP_WAIT_POLICY": "active"}, "None active")])
def test_waiting_threads_sleep_early_unless_the_user_decides(given, expected):
    program = ("import os, sys; import attn_cifar.cli as cli; assert 'torch' not in sys.modules; cli.main([]);"
               "print(os.environ.get('GOMP_SPINCOUNT'), os.environ.get('OMP_WAIT_POLICY'))")
    environment = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment | given)
    assert done.stdout.strip() == expected


@pytest.mark.long
def test_two_busy_processes_slow_a_command_three_times_at_most(photos):
    """Medians of three runs each, interleaved; on a machine with two free cores."""
    if len(os.sched_getaffinity(0)) < 2 or os.getloadavg()[0] > 0.5:
        pytest.skip("this machine is busy")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    image = str(next(photos.rglob("*.png")))
    seconds: dict[int, list[float]] = {0: [], 2: []}
    for busy in [0, 2] * 3:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
        started = time.perf_counter()
        subprocess.run([sys.executable, "-m", "attn_cifar", "explain", "attn_tiny", image], check=True, env=environment)
        seconds[busy].append(time.perf_counter() - started)
        for process in others:
            process.kill()
            process.wait()
    assert np.median(seconds[2]) <= 3 * np.median(seconds[0]), seconds


def test_the_thread_ends_with_the_command():
    before = threading.active_count()
    assert main(["models", "--json"]) == 0 and threading.active_count() == before


def test_the_help_of_study_lists_all_of_them():
    from attn_cifar.studies import STUDIES

    *most, last = STUDIES
    assert cli._POSITIONALS["name"]["help"] == f"{', '.join(most)} or {last}"


@pytest.mark.parametrize(("words", "message"), [
    (("speed", "--minutes", "6"), "study speed does not take --minutes: only gpu can"),
    (("ladder", "--rehearse"), "study ladder does not take --rehearse: only gpu can"),
    (("demo", "--minutes", "6", "--rehearse"), "study demo does not take --minutes: only gpu can"),
    (("lr_finders", "--out", "there"), "study lr_finders does not take --out: only demo, reproduction, ladder, beyond, gpu can"),
    (("gpu", "--minutes", "0"), "argument --minutes: must be a whole number from 1 to 1440, not '0'"),
    (("gpu", "--data", "shapes"), "study gpu needs a GPU, and PyTorch sees none; --rehearse runs it without one, at reduced "
                                  "size"),
])
def test_no_option_of_a_study_is_ignored(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["study", *words]) == 2
    captured = capsys.readouterr()
    assert captured.err.splitlines() == [f"attn-cifar: {message}"] or "must be a whole number" in captured.err
    assert captured.out == "" and not list(tmp_path.iterdir())


def test_a_rehearsal_of_the_gpu_study_is_no_result(tmp_path, monkeypatch, capsys):
    """It writes each part at once, continues, and cannot be continued as if it were a measurement."""
    monkeypatch.setattr("attn_cifar.studies.gpu.PARTS", [
        gpu.Part(name, seconds, lambda bench, name=name: {"number": 1 / (name != "b")}) for name, seconds in
        (("a", 1), ("b", 1), ("c", 10_000))])
    for _ in range(2):
        assert main(["study", "gpu", "--data", "shapes", "--minutes", "6", "--rehearse", "--out", str(tmp_path)]) == 0
        assert "not enough time for c (1000 s): run the same command again" in capsys.readouterr().out
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["rehearsal"] and [(row["part"], "error" in row) for row in stored["parts"]] == [("a", False), ("b", True)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert main(["study", "gpu", "--data", "shapes", "--out", str(tmp_path)]) == 2
    assert "holds the results of a rehearsal: name another folder with --out" in capsys.readouterr().err
