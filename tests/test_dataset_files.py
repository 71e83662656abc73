"""JSON files and arguments of the readers of data sets: whatever is wrong with them is told."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmenvs.datasets import CocoCaptions, VQAv2
from mmenvs.datasets import reader as readers
from tests import photos


@pytest.fixture
def small(tmp_path):
    return photos.small(tmp_path / "data")


# JSON files -----------------------------------------------------------------------------------------------


def put(key, value, index=3, records="annotations"):
    def edit(content):
        content[records][index][key] = value

    return edit


def drop(key, records="annotations"):
    return lambda content: content[records][3].pop(key) and None


def asked(key, value):
    return put(key, value, records="questions")


@pytest.mark.parametrize(
    "file, edit, match",
    [
        (photos.QUESTIONS, lambda c: [], "questions.json: expected a JSON object"),
        (photos.QUESTIONS, lambda c: {"questions": []}, "'questions' holds no records"),
        (photos.QUESTIONS, lambda c: {"questions": {}}, "'questions' must be a list, got {}"),
        (photos.QUESTIONS, lambda c: {"questions": [3]}, r"questions\[0\]: must be an object, got 3"),
        (photos.QUESTIONS, drop("question", "questions"), r"questions\[3\]: 'question' must be a string, got no such key"),
        (photos.QUESTIONS, asked("question", 5), r"questions\[3\]: 'question' must be a string, got 5"),
        (photos.QUESTIONS, asked("image_id", "4"), r"'image_id' must be a whole number of at most 15 digits, got '4'"),
        (photos.QUESTIONS, asked("image_id", -4), "'image_id' must be a whole number"),
        (photos.QUESTIONS, asked("image_id", True), "'image_id' must be a whole number"),
        (photos.QUESTIONS, asked("image_id", 10**30), "'image_id' must be a whole number"),
        (photos.QUESTIONS, asked("image_id", 5), r"annotations\[3\]: 'image_id' must be 5 as in .*questions.json, got 4"),
        (photos.QUESTIONS, asked("question_id", 1), r"questions\[3\]: 'question_id' 1 has occurred before"),
        (photos.QUESTIONS, asked("question_id", 99), r"annotations\[3\]: 'question_id' 3 isn't in .*questions.json"),
        (photos.QUESTIONS, lambda c: {**c, "data_subtype": "../../etc"}, "'data_subtype' must be letters and digits"),
        (photos.ANNOTATIONS, put("answers", []), r"annotations\[3\]: 'answers' must hold 10 answers, got 0"),
        (photos.ANNOTATIONS, put("answers", ["no"] * 10), r"annotations\[3\]: answers\[0\]: must be an object with a string"),
        (photos.ANNOTATIONS, put("answers", [{"answer": None}] * 10), "must be an object with a string 'answer'"),
        (photos.ANNOTATIONS, put("question_id", 2), r"annotations\[3\]: 'question_id' 2 has occurred before"),
        (photos.ANNOTATIONS, put("multiple_choice_answer", None), "'multiple_choice_answer' must be a string, got None"),
        (photos.ANNOTATIONS, drop("question_type"), "'question_type' must be a string, got no such key"),
        (photos.ANNOTATIONS, lambda c: c["annotations"].pop() and None, "1 questions of .* aren't annotated, the first is 11"),
        (photos.CAPTIONS, put("caption", "dog " * 201), r"annotations\[3\]: 'caption' must have at most 200 words, got 201"),
        (photos.CAPTIONS, put("image_id", 77), r"annotations\[3\]: 'image_id' 77 isn't among the images"),
        (photos.CAPTIONS, put("id", 1, records="images"), r"images\[3\]: 'id' 1 has occurred before"),
        (photos.CAPTIONS, put("file_name", "../../secret.jpg", records="images"), "'file_name' must be the name of a file"),
        (photos.CAPTIONS, put("file_name", "..", records="images"), "'file_name' must be the name of a file"),
        (photos.CAPTIONS, lambda c: c["annotations"].pop() and None, "1 images have no caption, the first has 'id' 21"),
    ],
)  # fmt: skip
def test_wrong_records(small, tmp_path, file, edit, match):
    photos.change(small / file, edit)
    reader = CocoCaptions if file == photos.CAPTIONS else VQAv2
    for on_error in ("raise", "skip"):
        with pytest.raises(ValueError, match=match):
            reader.from_root(small, cache=tmp_path, on_error=on_error)


@pytest.mark.parametrize("content", [b"{", b"", b"\xff\xfe{}\x80", b"[" * 200_000, b"9" * 5000])
@pytest.mark.parametrize("file", [photos.QUESTIONS, photos.ANNOTATIONS, photos.CAPTIONS])
def test_malformed_json(small, tmp_path, file, content):
    (small / file).write_bytes(content)
    reader = CocoCaptions if file == photos.CAPTIONS else VQAv2
    with pytest.raises(ValueError, match=f"{file}: malformed JSON"):
        reader.from_root(small, cache=tmp_path)


def test_large_json(small, tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_JSON_BYTES", 1000)
    with pytest.raises(ValueError, match=r"\.json: \d,\d+ bytes of JSON, at most 1,000 are read"):
        VQAv2.from_root(small, cache=tmp_path)


def test_too_many_references(small, tmp_path, monkeypatch):
    monkeypatch.setattr("mmenvs.datasets.coco.MAX_REFERENCE_IDS", 50)
    with pytest.raises(ValueError, match="12 photographs x 1 captions x 5 words are more than 50"):
        CocoCaptions.from_root(small, cache=tmp_path)


JUNK = (None, [], {}, "x", "", -1, 0, 1.5, True, 10**30, [{}], {"answer": 1})


@settings(max_examples=150, deadline=None)
@given(data=st.data(), file=st.sampled_from([photos.QUESTIONS, photos.ANNOTATIONS, photos.CAPTIONS]))
def test_junk_anywhere(tmp_path_factory, data, file):
    folder = tmp_path_factory.mktemp("junk")
    photos.small(folder / "data")
    path = folder / "data" / file
    content = json.loads(path.read_text())
    place = content
    while True:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(st.sampled_from(JUNK))
    path.write_text(json.dumps(content))
    reader = CocoCaptions if file == photos.CAPTIONS else VQAv2
    try:
        source = reader.from_root(folder / "data", cache=folder)
        source.prepare(32)
    except (ValueError, FileNotFoundError) as error:
        assert str(folder) in str(error)


@pytest.mark.parametrize(
    "arguments, error, match",
    [
        ({"answers": 1}, ValueError, "answers must be from 2"),
        ({"answers": "all"}, TypeError, "answers must be an integer"),
        ({"words": 0}, ValueError, "words must be from 1"),
        ({"question_length": 0}, ValueError, "question_length must be from 1"),
        ({"on_error": None}, ValueError, "on_error must be one of"),
        ({"questions": "/nowhere.json"}, FileNotFoundError, "/nowhere.json"),
        ({"images": "/nowhere"}, FileNotFoundError, "images must be a folder of photographs, got '/nowhere'"),
    ],
)
def test_reader_arguments(small, arguments, error, match):
    places = {
        "questions": small / photos.QUESTIONS,
        "annotations": small / photos.ANNOTATIONS,
        "images": small / "train2014",
    }
    with pytest.raises(error, match=match):
        VQAv2(**{**places, **arguments})


def test_captions_arguments(small):
    for arguments, match in (
        ({"words": 70_000}, "words must be"),
        ({"caption_length": 1}, "caption_length must be"),
    ):
        with pytest.raises(ValueError, match=match):
            CocoCaptions.from_root(small, **arguments)
    with pytest.raises(FileNotFoundError, match="images must be a folder"):
        CocoCaptions(small / photos.CAPTIONS, small / "nowhere")
