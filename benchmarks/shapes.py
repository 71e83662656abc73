"""What the joint embedding `shapes` keeps, on scenes of the val split: the tables of its model card.

OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 python benchmarks/shapes.py
"""

from __future__ import annotations

import argparse
import os

for _name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import torch

from mmenvs.embeddings import load_embedding
from mmenvs.embeddings.cost import cost
from mmenvs.embeddings.probes import probe_report
from mmenvs.world.pairs import PairedScenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--scenes", type=int, default=2048)
    parser.add_argument("--difficulties", type=int, nargs="*", default=[0, 1, 2, 3])
    options = parser.parse_args()
    torch.set_num_threads(1)
    spaces = {d: PairedScenes(1, difficulty=d, split="val").observation_space for d in options.difficulties}
    reports = {
        d: probe_report(load_embedding("shapes", space), "pairs", difficulty=d, n=options.scenes)
        for d, space in spaces.items()
    }
    first = next(iter(reports.values()))

    print(f"Recall@1 out of 256, {options.scenes} scenes of the val split\n")
    print("| from | to | " + " | ".join(f"difficulty {d}" for d in reports) + " |")
    print("|---|---|" + "---:|" * len(reports))
    for pair in first["pairs"]:
        for direction, (a, b) in {"a_to_b": pair.split("-"), "b_to_a": pair.split("-")[::-1]}.items():
            values = (
                report["pairs"][pair]["retrieval"][direction]["recall@1"] for report in reports.values()
            )
            print(f"| {a} | {b} | " + " | ".join(f"{value:.3f}" for value in values) + " |")

    print(
        "\nLinear probes: is an object with this value in the scene, mean accuracy over the values; and how many objects\n"
    )
    print("| modality | of | " + " | ".join(f"difficulty {d}" for d in reports) + " |")
    print("|---|---|" + "---:|" * len(reports))
    for modality in first["modalities"]:
        for target in ("shape", "colour", "size", "texture", "count"):
            cells = (report["modalities"][modality]["probes"][target] for report in reports.values())
            values = (f"{cell['linear']:.3f}" if "linear" in cell else "constant" for cell in cells)
            print(f"| {modality} | {target} | " + " | ".join(values) + " |")

    costs = cost(load_embedding("shapes", next(iter(spaces.values()))), next(iter(spaces.values())))
    print(f"\n{costs['parameters']:,} parameters, {costs['weight_bytes'] / 1e6:.2f} MB, ", end="")
    print(f"{costs['flops'] / 1e6:.1f} MFLOP for a picture, its caption and its sound together")


if __name__ == "__main__":
    main()
