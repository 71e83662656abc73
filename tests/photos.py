"""The photographs and annotations of examples/real_photos.py, and small data sets in the same format."""

import importlib.util
import json
from pathlib import Path

from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "examples"
QUESTIONS = "v2_OpenEnded_mscoco_train2014_questions.json"
ANNOTATIONS = "v2_mscoco_train2014_annotations.json"
CAPTIONS = "annotations/captions_train2014.json"
TRAIN = (1, 2, 3, 4, 5, 6, 7, 9, 10)  # image ids that the hash puts into the training split
VAL, TEST = (8, 11), (15, 21)


def example():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("real_photos", EXAMPLES / "real_photos.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write(folder, items, size=(8, 6)):
    """A data set of one-coloured photographs.

    Args:
        folder: is created.
        items: (image id, question, its ten answers) of each question.
        size: of the photographs.
    """
    (folder / "train2014").mkdir(parents=True)
    (folder / "annotations").mkdir()
    questions, annotations = [], []
    ids = sorted({image_id for image_id, *_ in items})
    for image_id in ids:
        Image.new("RGB", size, (10 * image_id, 0, 0)).save(picture(folder, image_id))
    for i, (image_id, question, answers) in enumerate(items):
        questions.append({"image_id": image_id, "question_id": i, "question": question})
        annotations.append(
            {
                "image_id": image_id,
                "question_id": i,
                "question_type": question.split(" ")[0],
                "multiple_choice_answer": max(answers, key=answers.count),
                "answers": [{"answer": answer} for answer in answers],
            }
        )
    images = [{"id": i, "file_name": picture(folder, i).name} for i in ids]
    captions = [
        {"image_id": image_id, "id": i, "caption": question}
        for i, (image_id, question, _) in enumerate(items)
    ]
    for name, content in {
        QUESTIONS: {"data_subtype": "train2014", "questions": questions},
        ANNOTATIONS: {"annotations": annotations},
        CAPTIONS: {"images": images, "annotations": captions},
    }.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def small(folder):
    """Twelve questions about twelve photographs; all splits have some."""
    ids = (*TRAIN[:8], *VAL, *TEST)
    return write(folder, [(i, f"what number is {i % 3} ?", [f"n{i % 3}"] * 6 + ["other"] * 4) for i in ids])


def picture(folder, image_id):
    return folder / "train2014" / f"COCO_train2014_{image_id:012d}.jpg"


def change(path, edit):
    """Rewrite a JSON file; ``edit`` gets its content and changes it or returns another."""
    content = json.loads(path.read_text())
    changed = edit(content)
    path.write_text(json.dumps(content if changed is None else changed))
