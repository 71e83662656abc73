"""Real photographs in the format of VQA v2: write them, read them, train on them.

python examples/real_photos.py
python examples/real_photos.py --short

The 14 photographs ship inside scikit-image (pip install scikit-image); photo_questions.json, next to this
file, has 89 questions about them with ten answers each. The official data set is read in the same way:
VQAv2.from_root("folder with the official files").
"""

import argparse
import json
import tempfile
from pathlib import Path

from mmenvs_agents.evaluation import evaluate
from PIL import Image
from stable_baselines3 import PPO

import mmenvs
from mmenvs import MultimodalExtractor
from mmenvs.datasets import VQAv2

try:
    import skimage
except ImportError:
    raise SystemExit("the photographs are those of scikit-image: pip install scikit-image") from None

ID = "MMRL/VQA-v0"
PART = "train2014"
# Those of the official question types that occur; a question has the longest one that it begins with.
TYPES = (
    "what color is the|what color are the|what animal is|what is in the|what is on the|what is the|what is|"
    "what are the|what does the|what|where is the|is the|is there a|is there|are there|are the|how many"
).split("|")


def build(folder: Path) -> Path:
    """Write photographs, questions, annotations and captions as the official releases have them."""
    pictures = json.loads(Path(__file__).with_name("photo_questions.json").read_text())["pictures"]
    questions, annotations, captions = [], [], []
    for directory in (folder / PART, folder / "annotations"):
        directory.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        image_id = picture["image_id"]
        photograph = Image.open(Path(skimage.__file__).parent / "data" / picture["file"]).convert("RGB")
        photograph.thumbnail((640, 640))
        photograph.save(folder / PART / name_of(image_id), quality=95)
        for i, (question, counts) in enumerate(picture["questions"]):
            shared = {"image_id": image_id, "question_id": 1000 * image_id + i}
            questions.append({**shared, "question": question})
            annotations.append({**shared, **annotation(question, counts)})
        for caption in picture["captions"]:
            captions.append({"image_id": image_id, "id": len(captions), "caption": caption})
    images = [{"id": p["image_id"], "file_name": name_of(p["image_id"])} for p in pictures]
    files = {
        f"v2_OpenEnded_mscoco_{PART}_questions.json": {"data_subtype": PART, "questions": questions},
        f"v2_mscoco_{PART}_annotations.json": {"data_subtype": PART, "annotations": annotations},
        f"annotations/captions_{PART}.json": {"images": images, "annotations": captions},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def name_of(image_id: int) -> str:
    return f"COCO_{PART}_{image_id:012d}.jpg"


def annotation(question: str, counts: dict[str, int]) -> dict:
    """The official annotation of a question; ``counts`` says how many people gave each answer."""
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    best = max(counts, key=lambda answer: counts[answer])
    fitting = [name for name in TYPES if question.lower().startswith(name + " ")]
    return {
        "question_type": max(fitting, key=len, default="none of the above"),
        "answer_type": "yes/no" if best in ("yes", "no") else "number" if best.isdigit() else "other",
        "multiple_choice_answer": best,
        "answers": [
            {"answer": answer, "answer_confidence": "yes", "answer_id": i + 1}
            for i, answer in enumerate(answers)
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60_000)
    parser.add_argument("--num-envs", type=int, default=64)
    parser.add_argument("--short", action="store_true", help="two rollouts, to see that it runs")
    arguments = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        source = VQAv2.from_root(build(Path(folder)), cache=folder)
        envs = mmenvs.integrations.sb3.make_vec_env(ID, arguments.num_envs, seed=0, source=source)
        print(f"{source}, {len(source.answers)} answers, {len(source.vocabulary)} words")
        print(envs.env.observation_space)
        model = PPO(
            "MultiInputPolicy",
            envs,
            learning_rate=1e-3,
            n_steps=16,
            batch_size=256,
            n_epochs=4,
            ent_coef=0.01,
            policy_kwargs={
                "features_extractor_class": MultimodalExtractor,
                "features_extractor_kwargs": {"fusion": "cross_attention", "width": 32, "features_dim": 64},
            },
            seed=0,
        )
        model.learn(2 * 16 * arguments.num_envs if arguments.short else arguments.steps)

        # Two unseen photographs say nothing about generalisation: they show how it would be measured.
        for split in ("train", "test"):
            print(f"\n{split}: {source.select(split).size} questions, official accuracy")
            for agent in (model, "most_frequent", "random", "oracle"):
                result = evaluate(agent, ID, split=split, episodes=1000, env_kwargs={"source": source})
                print(f"  {agent if isinstance(agent, str) else 'PPO':13} {result.mean_return:.3f}")


if __name__ == "__main__":
    main()
