"""Runs the real scripts on models of published size with random weights: seconds, peak memory, sizes on disk, LoRA keys.

    python benchmarks/true_size.py --model sdxl                         # whole: 7 GB on disk, 9 GB of memory
    python benchmarks/true_size.py --model flux2 qwen_image z_image     # published widths, two blocks of each kind

What fits no CPU is cut in depth, denoiser and text encoders alike, and never in width; its LoRA's names are those of the
blocks that are there. It trains on cached latents and short prompts, in float32 where that fits. Lines of JSON go to --output
as each stage ends, so that a run that is stopped has not run for nothing.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoTokenizer, CLIPTokenizer

import diffusers


REPOSITORY = Path(__file__).resolve().parents[1]
EXAMPLE, DEMO = REPOSITORY / "examples" / "diffusion_orpo", REPOSITORY / "examples" / "demo"
sys.path[:0] = [str(REPOSITORY / "benchmarks"), str(EXAMPLE), str(DEMO)]
import published  # noqa: E402
import published_lora  # noqa: E402
from orpo.models.registry import FLUX, FLUX2_KLEIN, QWEN_IMAGE, SD3, SDXL, Z_IMAGE  # noqa: E402

from bases import base_folder  # noqa: E402


FAMILIES = {"sdxl": SDXL, "sd3": SD3, "flux": FLUX, "z_image": Z_IMAGE, "flux2": FLUX2_KLEIN, "qwen_image": QWEN_IMAGE}
WHOLE = ("sdxl",)
BLOCKS = 2  # of each kind, in the copies that are cut
SHALLOW = {
    "sd3": {"num_layers": BLOCKS},
    "flux": {"num_layers": BLOCKS, "num_single_layers": BLOCKS},
    "z_image": {"n_layers": BLOCKS, "n_refiner_layers": BLOCKS},
    "flux2": {"num_layers": BLOCKS, "num_single_layers": BLOCKS},
    "qwen_image": {"num_layers": BLOCKS},
}
DEEP_ENCODERS = ("flux2",)  # its pipeline reads the hidden states of the 27th layer: 28 take 13 GB in float32
TOKENS = 64  # that a copy which is cut reads of a prompt: a text encoder's time grows with them
STAGES = ("train", "resume", "cached", "encode")


def build(name: str, folder: Path) -> dict[str, float]:
    """Writes the pipeline, module by module, in bfloat16 with random weights and the demo's tokenizers; returns GB of each."""
    base = base_folder(name)
    index = json.loads((base / "model_index.json").read_text())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    for part in index:
        if part.startswith("tokenizer"):
            tokenizer = AutoTokenizer.from_pretrained(base / part)
            tokenizer.model_max_length = 77 if isinstance(tokenizer, CLIPTokenizer) else 1024
            tokenizer.save_pretrained(folder / part)
    published.denoiser(name, **({} if name in WHOLE else SHALLOW[name])).save_pretrained(
        folder / ("unet" if name == "sdxl" else "transformer")
    )
    published.vae(name).save_pretrained(folder / "vae")
    encoders = published.text_encoders(name, shallow=name not in WHOLE)
    for i, encoder in enumerate(encoders):
        encoder.save_pretrained(folder / ("text_encoder" if i == 0 else f"text_encoder_{i + 1}"))
    torch.set_default_dtype(torch.float32)
    shutil.copytree(base / "scheduler", folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps(index))
    return {path.name: gigabytes(path) for path in sorted(folder.iterdir()) if gigabytes(path) > 0.01}


def gigabytes(path: Path) -> float:
    return round(sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e9, 3)


def run(script: str, *arguments: str) -> dict[str, float]:
    """Runs one of the example's scripts as a process of its own; returns its seconds and its peak resident set."""
    started = time.perf_counter()
    environment = os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, str(EXAMPLE / script), *arguments], env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise SystemExit(f"{script} failed with {process.returncode}.")
    return {"seconds": round(time.perf_counter() - started), "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2)}


def lora_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    with safe_open(folder / "pytorch_lora_weights.safetensors", "pt") as file:
        return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}


def compare_lora(name: str, folder: Path, rank: int) -> dict[str, object]:
    """Keys and shapes against the list from the architecture."""
    found, expected = lora_shapes(folder), published_lora.tensors(name, rank, None if name in WHOLE else BLOCKS)
    unknown = [key for key, shape in found.items() if expected.get(key) != shape]
    missing = len(expected.keys() - found.keys())
    size = (folder / "pytorch_lora_weights.safetensors").stat().st_size
    return {"tensors": len(found), "unknown": len(unknown), "missing": missing, "lora_mb": round(size / 1e6, 1)}


def training_flags(name: str, work: Path, args: argparse.Namespace) -> list[str]:
    """What all runs of the training script have in common."""
    flags = {
        "pretrained_model_name_or_path": work / "model",
        "dataset_name": work / "pairs",
        "cache_dir": work / "cache",
        "resolution": args.resolution,
        "rank": args.rank,
        "mixed_precision": precision(name),
        "vae_encode_batch_size": 1,
        "train_batch_size": 1,
        "max_train_steps": 2,
        "checkpointing_steps": 1,
        "seed": 0,
        "report_to": "none",
    }
    if name not in WHOLE:
        flags["max_sequence_length"] = TOKENS
    return [f"--{flag}={value}" for flag, value in flags.items()] + ["--gradient_checkpointing"]


def stages(name: str, work: Path, args: argparse.Namespace):
    """Yields the name of each stage that is asked for, and what was measured."""
    script = "train_diffusion_orpo_lora.py"
    pairs = Dataset.from_parquet(str(REPOSITORY / "tests" / "fixtures" / "pairs_sd" / "*.parquet"))
    (work / "pairs").mkdir()
    pairs.select(range(args.pairs)).to_parquet(work / "pairs" / "train.parquet")
    common = training_flags(name, work, args)
    # A copy that is cut draws nothing worth the time, and never has its text encoders and its denoiser in memory at once.
    more = ["--cache_latents"]
    if name in WHOLE:
        more = [
            "--run_validation",
            "--num_validation_pairs=0",
            "--validation_prompts",
            "a face",
            "--validation_steps=9",
        ]
        more += [f"--validation_inference_steps={args.drawing_steps}", "--validation_guidance_scale=1"]
    if "train" in args.stages:
        measured = run(script, *common, f"--output_dir={work / 'whole'}", *more)
        measured |= compare_lora(name, work / "whole", args.rank)
        yield "train", measured | {"checkpoint_mb": megabytes(work / "whole" / "checkpoint-1")} | cache_size(work)
    if "resume" in args.stages:
        shutil.copytree(work / "whole" / "checkpoint-1", work / "resumed" / "checkpoint-1")
        again = [] if name in WHOLE else ["--cache_latents"]
        resumed = [f"--output_dir={work / 'resumed'}", "--resume_from_checkpoint=latest"]
        measured = run(script, *common, *resumed, *again)
        loras = [load_file(work / which / "pytorch_lora_weights.safetensors") for which in ("whole", "resumed")]
        same = all(torch.equal(value, loras[1][key]) for key, value in loras[0].items())
        yield "resume", measured | {"bit_for_bit": same}
    if "cached" in args.stages and name in WHOLE:
        measured = run(script, *common, f"--output_dir={work / 'cached'}", "--cache_latents")
        yield "cached", measured | cache_size(work)
    if "encode" in args.stages:
        line = [flag for flag in common if flag.startswith(("--pretrained", "--resol", "--mixed", "--max_seq"))]
        line += ["--encode", f"--dataset_path={work / 'pairs'}", f"--output_dir={work / 'shards'}"]
        yield "encode", run("convert_to_webdataset.py", *line) | {"shards_mb": megabytes(work / "shards")}


def precision(name: str) -> str:
    """A CPU without bfloat16 instructions is four times as fast in float32, which is for what fits the memory in it."""
    return "bf16" if name in (*WHOLE, *DEEP_ENCODERS) else "no"


def megabytes(path: Path) -> float:
    return round(1000 * gigabytes(path), 1)


def cache_size(work: Path) -> dict[str, float]:
    return {"cache_mb": megabytes(work / "cache")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=list(FAMILIES), default=["sdxl"], help="Which models.")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="Which runs. Default: all.")
    parser.add_argument("--resolution", type=int, default=256, help="Of the images.")
    parser.add_argument("--pairs", type=int, default=4, help="Pairs of the data set.")
    parser.add_argument(
        "--drawing_steps", type=int, default=2, help="Of the validation image, with and without the LoRA."
    )
    parser.add_argument("--rank", type=int, default=8, help="Of the LoRA.")
    parser.add_argument("--work", type=Path, help="Folder for models and outputs. Default: a temporary one.")
    parser.add_argument("--output", type=Path, default=Path("true_size.jsonl"), help="File that gets the lines.")
    args = parser.parse_args()
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "resolution": args.resolution}
    versions |= {"pairs": args.pairs, "cores": os.cpu_count()}
    for name in args.model:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            started = time.perf_counter()
            sizes = build(name, Path(work) / "model")
            built = {"seconds": round(time.perf_counter() - started), "gb": sizes}
            with args.output.open("a") as output:
                report(output, name, "build", built | versions | {"mixed_precision": precision(name)})
                for stage, measured in stages(name, Path(work), args):
                    report(output, name, stage, measured)


def report(output, name: str, stage: str, measured: dict) -> None:
    line = json.dumps({"model": name, "stage": stage, **measured})
    print(line, flush=True)
    output.write(f"{line}\n")
    output.flush()


if __name__ == "__main__":
    main()
