"""A preference at the edge of wide and tall images: ORPO on square crops against ORPO in aspect-ratio buckets.

    python benchmarks/buckets/edge.py --work work

The demo's model draws two images of each prompt at 80 x 48 or 48 x 80 pixels, in which its faces are stretched. Preferred is the
one whose ends, the outer 12 pixels, show less besides the background. A square crop keeps the middle 48 pixels, and so nothing of
what was judged. Both ways get the same pairs, learning rate, number of steps and nearly the same area of an image, from three
seeds each; then images of other seeds, in both shapes, are judged by the same reward.

Results are appended to `results.jsonl`, one line for each run; runs that are there are not made again.
"""

import argparse
import io
import json
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image


HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [
    str(REPOSITORY),
    str(REPOSITORY / "examples" / "diffusion_orpo"),
    str(REPOSITORY / "examples" / "demo"),
]

from accelerate.state import AcceleratorState, GradientState  # noqa: E402
from datasets import Dataset, Features, Value  # noqa: E402

import train_diffusion_orpo_sdxl_lora  # noqa: E402
from diffusers import StableDiffusionXLPipeline  # noqa: E402
from faces import ALL_KINDS, BACKGROUNDS, Kind  # noqa: E402


RESULTS = HERE / "results.jsonl"
BASE = REPOSITORY / "examples" / "demo" / "base"
SHAPES = ((48, 80), (80, 48))  # height and width
END = 12  # pixels; a square crop begins at 16
WAYS = {"squares": {}, "buckets": {"aspect_ratio_buckets": "64,64;48,80;80,48"}}
SEEDS = (1, 2, 3)
STEPS, PAIRS, IMAGES, AT_ONCE = 200, 480, 96, 12
FEATURES = Features(chosen=Value("binary"), rejected=Value("binary"), prompt=Value("string"))


def reward(image: Image.Image, kind: Kind) -> float:
    """How little the ends differ from the background that was asked for: 0 is not at all, -1 as much as can be."""
    pixels = np.asarray(image, dtype=float)
    if pixels.shape[0] > pixels.shape[1]:
        pixels = pixels.transpose(1, 0, 2)
    ends = np.concatenate([pixels[:, :END], pixels[:, -END:]], axis=1)
    return -float(np.abs(ends - BACKGROUNDS[kind.background]).mean() / 255)


def draw(count: int, first_seed: int, lora: Path | None = None) -> list[tuple[Kind, Image.Image]]:
    """Images of all kinds in turn, each kind in both shapes."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    drawn = []
    for first in range(0, count, AT_ONCE):
        kinds = [ALL_KINDS[number % len(ALL_KINDS)] for number in range(first, first + AT_ONCE)]
        height, width = SHAPES[first // len(ALL_KINDS) % 2]
        images = pipeline(
            [kind.prompt for kind in kinds],
            height=height,
            width=width,
            num_inference_steps=12,
            guidance_scale=3.0,
            generator=[torch.Generator().manual_seed(first_seed + first + i) for i in range(AT_ONCE)],
        ).images
        drawn += zip(kinds, images)
    return drawn


def draw_pairs() -> list[dict]:
    """Pairs of the model's own images, the better one first."""
    rows = []
    for (kind, image), (_, other) in zip(draw(PAIRS, 0), draw(PAIRS, 1_000_000)):
        chosen, rejected = sorted((image, other), key=lambda image: -reward(image, kind))
        rows.append({"chosen": encode(chosen), "rejected": encode(rejected), "prompt": kind.prompt})
    return rows


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def rewards(lora: Path | None = None) -> list[float]:
    return [round(reward(image, kind), 4) for kind, image in draw(IMAGES, 10_000_000, lora)]


def run(way: str, seed: int, data: Path, work: Path) -> dict:
    """Trains one way, and draws."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    flags = WAYS[way] | {
        "pretrained_model_name_or_path": BASE,
        "dataset_name": data,
        "output_dir": work / f"{way}-{seed}",
        "cache_dir": work / "cache",
        "resolution": 64,
        "rank": 8,
        "beta_orpo": 0.5,
        "learning_rate": 1e-3,
        "train_batch_size": 16,
        "max_train_steps": STEPS,
        "seed": seed,
        "report_to": "none",
        "num_validation_pairs": 64,
    }
    line = [f"--{name}={value}" for name, value in flags.items()] + ["--cache_latents", "--run_validation"]
    line += [
        f"--validation_steps={STEPS}",
        "--validation_prompts",
        ALL_KINDS[0].prompt,
        "--validation_inference_steps=1",
    ]
    train_diffusion_orpo_sdxl_lora.main(line)
    metrics = json.loads((work / f"{way}-{seed}" / "eval_results.json").read_text())
    return {
        "way": way,
        "seed": seed,
        "accuracy": round(metrics["eval_rewards/accuracies"], 3),
        "rewards": rewards(work / f"{way}-{seed}"),
    }


def known() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def add(line: dict) -> None:
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="Folder for data and LoRAs.")
    args = parser.parse_args()
    torch.set_num_threads(1)
    data = args.work.resolve() / "pairs"
    if not data.exists():
        data.mkdir(parents=True)
        Dataset.from_list(draw_pairs(), features=FEATURES).to_parquet(data / "train.parquet")
    if not any(line["way"] == "base" for line in known()):
        add({"way": "base", "seed": None, "accuracy": None, "rewards": rewards()})
    for seed in SEEDS:
        for way in WAYS:
            if not any((line["way"], line["seed"]) == (way, seed) for line in known()):
                add(run(way, seed, data, args.work.resolve()))
                print(way, seed, np.mean(known()[-1]["rewards"]), known()[-1]["accuracy"], flush=True)


if __name__ == "__main__":
    main()
