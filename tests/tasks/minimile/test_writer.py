from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from kvbench.errors import UserError
from kvbench.tasks.milebench import TASKS
from kvbench.tasks.minimile import FOLDERS, VERSION, default_root, draw, make, sample_rng
from kvbench.tasks.minimile import folder as folder_module
from kvbench.tasks.minimile import writer as writer_module


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    root = tmp_path_factory.mktemp("written") / "set"
    make(root, seed=5, samples=4)
    return root


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder and a default set of two samples a task, for speed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(writer_module, "SAMPLES", 2)
    return tmp_path / "cache" / "kvbench"


def tree(root):
    return {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_annotations_have_the_layout_of_milebench(written):
    path = written / "nuscenes" / "nuscenes.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    meta, data = content["meta_data"], content["data"]
    assert meta["question_type"] == "multi-choice"
    assert meta["num_sample"] == len(data) == 4
    assert (meta["dataset"], meta["split"]) == ("nuscenes", "test")
    assert len(meta["task_instruction"]) == 2
    assert [entry["sample_id"] for entry in data] == [0, 1, 2, 3]
    assert [entry["task_instruction_id"] for entry in data] == [0, 1, 0, 1]
    first = data[0]["task_instance"]
    assert first["images_path"] == [f"0_{k}.png" for k in range(1, 7)]
    assert data[0]["response"] in first["choice_list"]
    assert data[0]["image_quantity_level"] == "Medium"
    assert sorted(first) == ["choice_list", "context", "images_path"]


def test_images_on_disk_are_those_that_draw_returns(written):
    for folder in FOLDERS:
        drawing = draw(folder, sample_rng("test", folder, 5, 3))
        for number, pixels in enumerate(drawing.images, start=1):
            with Image.open(written / folder / "images" / f"3_{number}.png") as image:
                assert image.mode == "RGB"
                np.testing.assert_array_equal(np.array(image), pixels)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "easy_vqa"])
def test_the_benchmark_reader_and_scorer_take_every_task(written, name):
    task = TASKS[name]
    data = task.load(written)
    assert len(data.samples) == 4
    for sample in data.samples:
        for letter, option in zip("ABCD", sample.choices, strict=False):
            right = option == sample.truth
            for answer in (f"{letter}. {option}", f"{letter}.", option):
                score = task.score(sample, answer)
                assert (score.correct, score.strict) == (right, right), answer
                assert not score.unparsable


def test_the_image_level_follows_the_count(written):
    levels = {
        folder: Counter(
            entry["image_quantity_level"]
            for entry in json.loads((written / folder / f"{folder}.json").read_text())["data"]
        )
        for folder in FOLDERS
    }
    assert {folder for folder, level in levels.items() if "Few" in level} == {
        "ObjectInteraction",
        "StateChange",
        "WebQA",
        "TQA",
        "MultiModalQA",
    }
    assert {name for level in levels.values() for name in level} == {"Few", "Medium"}


def test_two_runs_write_the_same_bytes_and_seeds_differ(written, tmp_path):
    make(tmp_path / "again", seed=5, samples=4)
    assert tree(tmp_path / "again") == tree(written)
    make(tmp_path / "other", seed=6, samples=4)
    assert tree(tmp_path / "other").keys() == tree(written).keys()
    hashes = [
        json.loads((root / "minimile.json").read_text())["sha256"]
        for root in (tmp_path / "other", written)
    ]
    assert all(hashes[0][folder] != hashes[1][folder] for folder in FOLDERS)


def test_more_samples_only_add_samples(written, tmp_path):
    make(tmp_path / "more", seed=5, samples=6, folders=("TQA",))
    path = "TQA/TQA.json"
    few, more = (json.loads((r / path).read_text())["data"] for r in (written, tmp_path / "more"))
    assert more[:4] == few
    assert [p.name for p in (tmp_path / "more").iterdir() if p.is_dir()] == ["TQA"]


def test_the_manifest_says_what_was_made(written):
    manifest = json.loads((written / "minimile.json").read_text(encoding="utf-8"))
    assert manifest["generator"] == "minimile"
    assert (manifest["version"], manifest["seed"], manifest["samples"]) == (VERSION, 5, 4)
    assert manifest["images"]["EgocentricNavigation"] == 48
    assert set(manifest["sha256"]) == set(FOLDERS)


def test_the_hash_covers_pixels_and_words(tmp_path, monkeypatch):
    def shas(root):
        make(root, samples=1, folders=("TQA",))
        return json.loads((root / "minimile.json").read_text())["sha256"]["TQA"]

    plain = shas(tmp_path / "plain")

    def spoiled(folder, rng):
        drawing = draw(folder, rng)
        drawing.images[0][0, 0, 0] ^= 1
        return drawing

    monkeypatch.setattr(writer_module, "draw", spoiled)
    assert shas(tmp_path / "pixel") != plain
    monkeypatch.setattr(writer_module, "draw", draw)
    monkeypatch.setitem(writer_module.INSTRUCTIONS, "TQA", ("Other words.",))
    assert shas(tmp_path / "words") != plain


def test_an_empty_folder_is_filled_and_a_whole_set_left_alone(tmp_path):
    (tmp_path / "set").mkdir()
    make(tmp_path / "set", samples=1, folders=("TQA",))
    before = (tmp_path / "set" / "minimile.json").stat().st_mtime_ns
    make(tmp_path / "set", samples=1, folders=("TQA",))
    assert (tmp_path / "set" / "minimile.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("what", ["foreign", "other seed", "file"])
def test_what_somebody_else_put_there_is_refused_and_kept(tmp_path, what):
    root = tmp_path / "set"
    if what == "other seed":
        make(root, seed=1, samples=1, folders=("TQA",))
    elif what == "file":
        root.write_text("mine")
    else:
        root.mkdir()
        (root / "thesis.txt").write_text("mine")
    before = root.read_text() if what == "file" else tree(root)
    with pytest.raises(UserError, match="new or empty folder"):
        make(root, samples=1, folders=("TQA",))
    assert (root.read_text() if what == "file" else tree(root)) == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 0}, "0 samples"),
        ({"samples": -3}, "-3 samples"),
        ({"folders": ("TQA", "OCR-VQA")}, "'OCR-VQA'"),
        ({"folders": ()}, "empty list"),
    ],
)
def test_bad_arguments_write_nothing(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        make(tmp_path / "set", **arguments)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        make(tmp_path / "file" / "set", samples=1, folders=("TQA",))


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(root, folder, drawings, instructions):
        (root / folder / "images").mkdir(parents=True)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer_module, "write_task", fail)
    with pytest.raises(UserError, match="No space left on device"):
        make(tmp_path / "set", samples=1)
    assert not list(tmp_path.iterdir())


def test_the_default_set_is_made_once(cache, monkeypatch):
    root = default_root()
    assert root == cache / f"minimile-{VERSION}-seed0-2"
    assert sorted(p.name for p in root.iterdir()) == sorted([*FOLDERS, "minimile.json"])
    before = tree(root)
    monkeypatch.setattr(folder_module, "create", lambda *_: pytest.fail("made again"))
    assert default_root() == root
    assert tree(root) == before


@pytest.mark.parametrize("damage", ["manifest", "image", "annotation", "broken manifest"])
def test_a_damaged_default_set_is_made_anew(cache, damage):
    root = default_root()
    before = tree(root)
    if damage == "manifest":
        (root / "minimile.json").unlink()
    elif damage == "image":
        (root / "TQA" / "images" / "1_2.png").unlink()
    elif damage == "annotation":
        shutil.rmtree(root / "DocVQA")
    else:
        (root / "minimile.json").write_text('{"generator": "minimile"')
    assert default_root() == root
    assert tree(root) == before


def test_a_killed_process_leaves_no_half_set(cache):
    """The maker is killed while it writes; the next one starts over and clears up."""
    code = (
        "from kvbench.tasks.minimile import writer, default_root\n"
        "writer.SAMPLES = 2\n"
        "import time\n"
        "old = writer.draw\n"
        "def slow(folder, rng):\n"
        "    time.sleep(0.05)\n"
        "    return old(folder, rng)\n"
        "writer.draw = slow\n"
        "default_root()\n"
    )
    path = os.pathsep.join(entry for entry in sys.path if entry)
    maker = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path})
    deadline = time.monotonic() + 60
    while not list(cache.glob(".*.partial/*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    maker.send_signal(signal.SIGKILL)
    assert maker.wait() == -signal.SIGKILL
    assert list(cache.glob(".*.partial"))
    root = cache / f"minimile-{VERSION}-seed0-2"
    assert not root.exists()
    assert default_root() == root
    assert len(list((root / "TQA" / "images").iterdir())) == 8
    assert not list(cache.glob(".*.partial"))


def test_threads_that_ask_at_once_share_one_making(cache, monkeypatch):
    made, roots = [], []
    original = folder_module.create

    def counting(*arguments):
        made.append(1)
        original(*arguments)

    monkeypatch.setattr(folder_module, "create", counting)
    threads = [threading.Thread(target=lambda: roots.append(default_root())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert len(set(roots)) == 1 and len(roots) == 4


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        default_root()
