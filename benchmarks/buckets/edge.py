"""A preference at the edge of wide and tall images: ORPO on square crops against ORPO in aspect-ratio buckets.

    python benchmarks/buckets/edge.py --work work

Pairs show the demo's faces in the middle of images of 80 x 48 and 48 x 80 pixels, with a bar at either end. Winner and loser differ
in the bars alone: blue ones are preferred to red ones. A square crop keeps the middle 48 pixels, and with them the inner quarter of
each bar. Both ways get the same pairs, learning rate, number of steps and area of an image, from three seeds each; what is drawn
afterwards in both shapes is judged by the colour of its ends.

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
from faces import ALL_KINDS, draw_face  # noqa: E402


RESULTS = HERE / "results.jsonl"
BASE = REPOSITORY / "examples" / "demo" / "base"
WIDE, TALL = (48, 80), (80, 48)  # height and width
BAR = 20  # pixels of either end; a square crop begins at 16
BLUE, RED = (40, 70, 230), (230, 50, 40)
WAYS = {"squares": {}, "buckets": {"aspect_ratio_buckets": "64,64;48,80;80,48"}}
SEEDS = (1, 2, 3)
STEPS, PAIRS, IMAGES = 300, 480, 48
FEATURES = Features(chosen=Value("binary"), rejected=Value("binary"), prompt=Value("string"))


def draw_pair(number: int) -> dict:
    """A face in the middle, and bars at the ends, blue for the winner."""
    rng = np.random.default_rng(number)
    kind = ALL_KINDS[number % len(ALL_KINDS)]
    face = draw_face(kind, rng.uniform(-0.8, 0.8)).resize((48, 48))
    images = []
    for color in (BLUE, RED):
        pixels = np.zeros((48, 80, 3), np.uint8)
        pixels[:] = np.array(face)[0, 0]
        pixels[:, 16:64] = np.array(face) if number % 2 else np.array(face).transpose(1, 0, 2)
        pixels[:, :BAR], pixels[:, -BAR:] = color, color
        images.append(Image.fromarray(pixels if number % 2 else pixels.transpose(1, 0, 2)))
    return {"chosen": encode(images[0]), "rejected": encode(images[1]), "prompt": kind.prompt}


def encode(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def blueness(image: Image.Image) -> float:
    """Blue minus red at the ends that a square crop drops, from -1 to 1."""
    pixels = np.asarray(image, dtype=float) / 255
    if pixels.shape[0] > pixels.shape[1]:
        pixels = pixels.transpose(1, 0, 2)
    ends = np.concatenate([pixels[:, :12], pixels[:, -12:]], axis=1)
    return float((ends[..., 2] - ends[..., 0]).mean())


def draw(lora: Path | None) -> list[float]:
    """The blueness of images in both shapes, with a LoRA or without."""
    pipeline = StableDiffusionXLPipeline.from_pretrained(BASE, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    values = []
    for number in range(IMAGES):
        height, width = (WIDE, TALL)[number % 2]
        image = pipeline(
            ALL_KINDS[number % len(ALL_KINDS)].prompt,
            height=height,
            width=width,
            num_inference_steps=12,
            guidance_scale=3.0,
            generator=torch.Generator().manual_seed(10_000 + number),
        ).images[0]
        values.append(round(blueness(image), 3))
    return values


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
        "learning_rate": 2e-3,
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
        "blueness": draw(work / f"{way}-{seed}"),
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
        Dataset.from_list([draw_pair(i) for i in range(PAIRS)], features=FEATURES).to_parquet(data / "train.parquet")
    if not any(line["way"] == "base" for line in known()):
        add({"way": "base", "seed": None, "accuracy": None, "blueness": draw(None)})
    for seed in SEEDS:
        for way in WAYS:
            if not any((line["way"], line["seed"]) == (way, seed) for line in known()):
                add(run(way, seed, data, args.work.resolve()))
                print(way, seed, np.mean(known()[-1]["blueness"]), known()[-1]["accuracy"], flush=True)


if __name__ == "__main__":
    main()
