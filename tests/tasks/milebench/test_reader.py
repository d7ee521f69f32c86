from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvbench.errors import UserError
from kvbench.tasks.milebench import TASKS
from kvbench.tasks.milebench.prompt import place_markers
from kvbench.tasks.milebench.reader import image_level, read_task


def set_instance(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Sets a key of the second sample's task_instance."""
    return lambda content: content["data"][1]["task_instance"].__setitem__(key, value)


def set_entry(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["data"][1].__setitem__(key, value)


def set_meta(key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["meta_data"].__setitem__(key, value)


def drop(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        holder: Any = content
        for step in path[:-1]:
            holder = holder[step]
        del holder[path[-1]]

    return edit


def test_samples_in_file_order(make_task) -> None:
    root = make_task("TQA", samples=3, edit=lambda content: content["data"].reverse())
    data = TASKS["tqa"].load(root)
    assert data.question_type == "multi-choice"
    assert [sample.sample_id for sample in data.samples] == [2, 1, 0]
    sample = data.samples[1]
    assert sample.instruction == "Look and choose."
    assert sample.context == "{image#1}{image#2}Which colour does image 1 show?"
    assert sample.choices == ("red", "green", "blue")
    assert sample.truth == "green"
    folder = (root / "TQA" / "images").resolve()
    assert sample.images == (folder / "1_0.png", folder / "1_1.png")


def test_unknown_extra_keys_are_tolerated(make_task) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["more"] = content["meta_data"]["more"] = content["data"][0]["more"] = [None]
        content["data"][0]["task_instance"]["combined_1_images"] = ["0-0.jpg"]

    assert len(read_task(make_task(edit=edit), "TQA").samples) == 2


def test_a_byte_order_mark_is_tolerated(make_task) -> None:
    root = make_task()
    path = root / "TQA" / "TQA.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert len(read_task(root, "TQA").samples) == 2


def test_a_numeric_response_becomes_text(make_task) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["data"][1]["response"] = 7
        content["data"][1]["task_instance"]["choice_list"] = ["5", "7"]

    assert read_task(make_task(edit=edit), "TQA").samples[1].truth == "7"


def test_the_truth_is_compared_after_normalisation(make_task) -> None:
    data = read_task(make_task(edit=set_entry("response", " GREEN. ")), "TQA")
    assert data.samples[1].truth == " GREEN. "


def test_open_ended_samples_need_no_options(make_task) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["meta_data"]["question_type"] = "open-ended"
        for item in content["data"]:
            del item["task_instance"]["choice_list"]
            item["response"] = "anything"

    data = read_task(make_task("IEdit", edit=edit), "IEdit")
    assert [(s.choices, s.question_type) for s in data.samples] == [(None, "open-ended")] * 2


def test_second_instruction(make_task) -> None:
    data = read_task(make_task(edit=set_entry("task_instruction_id", 1)), "TQA")
    assert [sample.instruction for sample in data.samples] == ["Look and choose.", "Choose."]


def test_image_levels() -> None:
    levels = [(2, "Few"), (5, "Few"), (6, "Medium"), (31, "Medium"), (32, "Many"), (109, "Many")]
    assert [(count, image_level(count)) for count, _ in levels] == levels


def test_the_level_is_recomputed(make_task) -> None:
    data = read_task(make_task(edit=set_entry("image_quantity_level", "Many")), "TQA")
    assert data.samples[1].image_level == "Few"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        # Missing keys, at every level.
        (drop("meta_data"), "TQA.json: key 'meta_data' is missing"),
        (drop("data"), "TQA.json: key 'data' is missing"),
        (drop("meta_data", "task_instruction"), "meta_data: key 'task_instruction' is missing"),
        (drop("meta_data", "question_type"), "meta_data: key 'question_type' is missing"),
        (drop("data", 1, "sample_id"), "entry 2 of data: key 'sample_id' is missing"),
        (drop("data", 1, "task_instance"), "sample 1: key 'task_instance' is missing"),
        (drop("data", 1, "task_instruction_id"), "sample 1: key 'task_instruction_id' is missing"),
        (drop("data", 1, "response"), "sample 1: key 'response' is missing"),
        (
            drop("data", 1, "image_quantity_level"),
            "sample 1: key 'image_quantity_level' is missing",
        ),
        (drop("data", 1, "task_instance", "context"), "sample 1: key 'context' is missing"),
        (drop("data", 1, "task_instance", "images_path"), "sample 1: key 'images_path' is missing"),
        (drop("data", 1, "task_instance", "choice_list"), "sample 1: key 'choice_list' is missing"),
        # Options.
        (set_instance("choice_list", None), "sample 1: choice_list is null; list the options"),
        (set_instance("choice_list", []), "sample 1: choice_list is empty"),
        (set_instance("choice_list", "green"), 'sample 1: choice_list must be a list, not "green"'),
        (
            set_instance("choice_list", ["green", 3]),
            "sample 1: entry 2 of choice_list must be a string, not 3; put it in quotes",
        ),
        (
            set_instance("choice_list", ["green", None]),
            "sample 1: entry 2 of choice_list must be a string, not null",
        ),
        (
            set_entry("response", "violet"),
            "sample 1: the response 'violet' is not among its 3 options",
        ),
        (set_entry("response", None), "sample 1: response must be a string or a number, not null"),
        (set_entry("response", ["green"]), "sample 1: response must be a string or a number"),
        # Ids.
        (set_entry("sample_id", "1"), 'entry 2 of data: sample_id must be an integer, not "1"'),
        (set_entry("sample_id", 1.0), "entry 2 of data: sample_id must be an integer, not 1.0"),
        (set_entry("sample_id", True), "entry 2 of data: sample_id must be an integer, not true"),
        (set_entry("sample_id", None), "entry 2 of data: sample_id must be an integer, not null"),
        (set_entry("sample_id", 0), "sample 0: this sample_id is used twice"),
        (set_entry("sample_id", 2**63), "entry 2 of data: sample_id 9223372036854775808 doesn't"),
        # Instructions.
        (
            set_entry("task_instruction_id", 2),
            "sample 1: task_instruction_id 2 is out of range, the file has instructions 0 to 1",
        ),
        (set_entry("task_instruction_id", -1), "sample 1: task_instruction_id -1 is out of range"),
        (
            set_entry("task_instruction_id", False),
            "task_instruction_id must be an integer, not fal",
        ),
        (set_meta("task_instruction", {"0": "x"}), "task_instruction must be a list"),
        (set_meta("task_instruction", []), "task_instruction is empty"),
        (set_meta("task_instruction", ["<ImageHere>"]), "an instruction holds <ImageHere>"),
        # Images and placeholders.
        (set_instance("images_path", []), "sample 1: images_path is empty"),
        (set_instance("images_path", ["1_0.png"]), "placeholder {image#2} has no image, images_pa"),
        (set_instance("context", "{table#0}?"), "sample 1: placeholder {table#0} has no image"),
        (set_instance("context", "{image#x}?"), "sample 1: placeholder {image#x} has no image"),
        (set_instance("context", "{image#1}{table#1}"), "placeholder number 1 is used twice"),
        (
            set_instance("choice_list", ["green", "{image#2}"]),
            "sample 1: placeholder number 2 is used twice",
        ),
        (set_instance("context", "<ImageHere>?"), "sample 1: the text holds <ImageHere> itself"),
        (set_instance("images_path", ["gone.png", "1_1.png"]), "sample 1: image 'gone.png' is not"),
        (set_instance("images_path", ["", "1_1.png"]), "sample 1: image '' is not in"),
        (set_instance("images_path", ["a\0b", "1_1.png"]), "sample 1: image 'a\\x00b' is not in"),
        (set_instance("images_path", ["x" * 300, "1_1.png"]), "is not in"),
        # Half a character, which no tokenizer takes.
        (set_instance("context", "a\ud83d"), r"sample 1: the text holds '\ud83d', which is half"),
        (set_instance("choice_list", ["green", "\ud83d"]), "which is half a character"),
        (set_meta("task_instruction", ["a", "\ude00"]), "meta_data: the text holds '\\ude00'"),
        (set_instance("images_path", ["\ud83d", "1_1.png"]), r"sample 1: image '\ud83d' is not in"),
        # Shapes.
        (set_meta("question_type", "essay"), "TQA: question_type 'essay' is unknown"),
        (set_meta("question_type", None), "question_type must be a string, not null"),
        (lambda content: content["data"].clear(), "TQA.json: data holds no samples"),
        (lambda content: content["data"].append([]), "entry 3 of data: must be an object, not []"),
        (lambda content: content.update(data={}), "TQA.json: data must be a list, not {}"),
    ],
)
def test_bad_annotations(make_task, edit, message: str) -> None:
    root = make_task(edit=edit)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_task(root, "TQA")
    assert str(root.resolve() / "TQA" / "TQA.json") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["../../secret.png", "/etc/passwd", "a/../../x.png", "..", "C:\\x.png", "..\\x.png"]
)
def test_image_names_that_leave_the_folder(make_task, root: Path, name: str) -> None:
    make_task(edit=set_instance("images_path", [name, "1_1.png"]))
    (root.parent / "secret.png").write_bytes((root / "TQA/images/1_0.png").read_bytes())
    message = f"sample 1: image name {name!r} leads out of the images folder"
    with pytest.raises(UserError, match=re.escape(message)):
        read_task(root, "TQA")


def test_a_link_out_of_the_folder_is_refused(make_task, root: Path) -> None:
    make_task()
    outside = root.parent / "outside.png"
    image = root / "TQA" / "images" / "1_0.png"
    image.rename(outside)
    image.symlink_to(outside)
    with pytest.raises(UserError, match=r"sample 1: image '1_0.png' is a link that leaves"):
        read_task(root, "TQA")


def test_a_link_inside_the_folder_is_followed(make_task, root: Path) -> None:
    make_task()
    images = root / "TQA" / "images"
    (images / "1_0.png").unlink()
    (images / "1_0.png").symlink_to("0_0.png")
    assert read_task(root, "TQA").samples[1].images[0].name == "0_0.png"


def test_a_link_that_points_at_itself_is_a_missing_image(make_task, root: Path) -> None:
    make_task()
    image = root / "TQA" / "images" / "1_0.png"
    image.unlink()
    image.symlink_to(image)
    with pytest.raises(UserError, match=r"sample 1: image '1_0.png' is not in"):
        read_task(root, "TQA")


def test_the_task_folder_itself_may_be_a_link(make_task, root: Path, tmp_path: Path) -> None:
    make_task()
    (root / "TQA").rename(tmp_path / "elsewhere")
    (root / "TQA").symlink_to(tmp_path / "elsewhere")
    assert len(read_task(root, "TQA").samples) == 2


def test_a_folder_in_place_of_an_image(make_task, root: Path) -> None:
    make_task()
    (root / "TQA/images/1_0.png").unlink()
    (root / "TQA/images/1_0.png").mkdir()
    with pytest.raises(UserError, match=r"sample 1: image '1_0.png' is not in"):
        read_task(root, "TQA")


def test_missing_root(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data root .*nowhere is not a folder; pass --data-root"):
        read_task(tmp_path / "nowhere", "TQA")


def test_missing_task_folder(make_task) -> None:
    root = make_task("TQA")
    with pytest.raises(UserError, match=r"task folder nuscenes is missing in data root"):
        TASKS["su"].load(root)


def test_missing_annotation_file(make_task) -> None:
    root = make_task("TQA")
    (root / "TQA" / "TQA.json").unlink()
    with pytest.raises(UserError, match=r"TQA\.json is missing; unpack"):
        read_task(root, "TQA")


@pytest.mark.parametrize("text", [b'{"data": [', b"", b"\xff\xfe\xff", b"[" * 100_000])
def test_broken_json(make_task, text: bytes) -> None:
    root = make_task("TQA")
    (root / "TQA" / "TQA.json").write_bytes(text)
    with pytest.raises(UserError, match=r"TQA\.json: not valid JSON \(.*restore"):
        read_task(root, "TQA")


def test_json_that_is_no_object(make_task) -> None:
    root = make_task("TQA")
    (root / "TQA" / "TQA.json").write_text(json.dumps([1]))
    with pytest.raises(UserError, match=r"must hold an object with meta_data and data"):
        read_task(root, "TQA")


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"data": [', '"data": [], "data": [', "data"),
        ('"response"', '"response": "red", "response"', "response"),
        ('"context"', '"context": "", "context"', "context"),
    ],
)
def test_a_key_that_stands_twice(make_task, old: str, new: str, key: str) -> None:
    """Plain JSON readers drop the first of two values, samples and all."""
    root = make_task("TQA")
    path = root / "TQA" / "TQA.json"
    path.write_text(path.read_text().replace(old, new, 1))
    message = rf"TQA\.json: not valid JSON \(key '{key}' stands twice in one object\); restore"
    with pytest.raises(UserError, match=message):
        read_task(root, "TQA")


@pytest.mark.parametrize(
    "edit",
    [
        set_entry("response", "violet\n" * 1000),
        set_entry("sample_id", "x" * 9000),
        set_instance("images_path", ["x\n" * 1000, "1_1.png"]),
        set_instance("images_path", ["../" * 1000, "1_1.png"]),
        set_instance("context", "{image#" + "\n" * 1000 + "}"),
        set_meta("question_type", "essay\n" * 1000),
        set_entry("response", functools.reduce(lambda inner, _: [inner], range(900), [])),
    ],
)
def test_messages_stay_one_short_line(make_task, edit) -> None:
    with pytest.raises(UserError) as caught:
        read_task(make_task(edit=edit), "TQA")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600


def test_placeholders_of_many_images_take_one_pass() -> None:
    """Replacing one number after the other takes hours for such a sample."""
    text = "{image#1}{table#20000}{image#20001}{image#0}" + "x" * 1_000_000
    marked = place_markers(text, 20_000)
    assert marked == "<ImageHere>" * 2 + "{image#20001}{image#0}" + "x" * 1_000_000
