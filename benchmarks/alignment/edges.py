"""The table of `benchmarks/buckets/edge.py`: a preference at the edge, trained on squares and in aspect-ratio buckets."""

import json

import numpy as np

import paths
from bootstrap import Bootstrap
from tables import NOT_YET, rows


RESULTS = paths.REPOSITORY / "benchmarks" / "buckets" / "results.jsonl"


def edge_table() -> str:
    """Gain in reward over the base, with its interval over seeds and prompts, and held-out accuracy."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    base = [np.array(line["rewards"]) for line in lines if line["way"] == "base"]
    cells = []
    for way in ("squares", "buckets"):
        runs = [line for line in lines if line["way"] == way]
        if runs and base:
            gains = np.array([line["rewards"] for line in runs]) - base[0]
            estimate = Bootstrap(len(runs), np.arange(gains.shape[1]) % 24).mean(gains)
            accuracies = ", ".join(f"{line['accuracy']:.2f}" for line in runs)
            cells.append([way, str(len(runs)), f"{estimate:+.3f}", accuracies])
    return rows(["trained on", "seeds", "gain in reward", "held-out accuracy"], cells) if cells else NOT_YET
