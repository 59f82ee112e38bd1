"""The whole job, small and offline: pairs from a tiny model, ORPO training with the real script, and the result.

    python run_demo.py                # SDXL
    python run_demo.py --family=sd3   # or sd, or flux

The labels prefer the face that smiles more, with noise; no prompt names the mouth. Writes pairs, LoRA, the
before/after picture and `results.json` into --output_dir.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from bases import assemble_base, base_folder
from compare import compare
from make_pairs import make_pairs
from tiny_t5 import T5_LENGTH


SCRIPTS = Path(__file__).resolve().parent.parent / "diffusion_orpo"


def train(family: str, base: str, pairs: Path, output_dir: Path, steps: int) -> None:
    """Starts the training script as a user does."""
    script = SCRIPTS / "train_diffusion_orpo_lora.py"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes=1", str(script)]
    command += [f"--max_sequence_length={T5_LENGTH}"] if family in ("sd3", "flux") else []
    command += [
        f"--pretrained_model_name_or_path={base}",
        f"--dataset_name={pairs}",
        f"--output_dir={output_dir}",
        "--resolution=64",
        "--train_batch_size=32",
        f"--max_train_steps={steps}",
        "--rank=8",
        "--learning_rate=1e-3",
        "--seed=0",
        "--run_validation",
        f"--validation_steps={steps}",
        "--num_validation_pairs=128",
        "--validation_prompts",
        "a yellow ball with a face, white background",
        "a blue cat with a face, black background",
    ]
    subprocess.run(command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=["sdxl", "sd", "sd3", "flux"], default="sdxl", help="Which model.")
    parser.add_argument("--output_dir", type=Path, default="demo-output", help="Folder for all that is made.")
    parser.add_argument("--num_pairs", type=int, default=1152, help="Preference pairs to generate.")
    parser.add_argument("--steps", type=int, default=300, help="Optimizer steps of 32 pairs.")
    args = parser.parse_args()
    lora = args.output_dir / "lora"
    shutil.rmtree(lora, ignore_errors=True)
    if args.family == "sdxl":
        base = str(base_folder("sdxl"))
    else:
        base = assemble_base(args.family, args.output_dir / "base")

    print("1/3 The base model generates pairs; the face that smiles more is preferred, with noise.", flush=True)
    pairs = make_pairs(base, args.output_dir / "pairs", args.num_pairs)
    print("2/3 ORPO trains a LoRA on them.", flush=True)
    train(args.family, base, args.output_dir / "pairs", lora, args.steps)
    print("3/3 Base model and LoRA generate images of the same prompts from the same seeds.", flush=True)
    comparison = compare(base, str(lora), str(args.output_dir / "grid.png"))
    held_out = json.loads((lora / "eval_results.json").read_text())

    results = {"pairs": pairs, "held_out": held_out, "comparison": asdict(comparison)}
    (args.output_dir / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    accuracy = "eval_rewards/accuracies"
    print(
        f"""
Labels against the rule (noise):  {pairs["noise"]:.1%}
Held-out preference accuracy:     {held_out[f"{accuracy}_without_lora"]:.3f} base, {held_out[accuracy]:.3f} with the LoRA
Win rate of LoRA against base:    {comparison.win_rate:.3f}, 95 % interval {comparison.win_rate_low:.3f} to {comparison.win_rate_high:.3f} ({comparison.images} images)
Mean smile, -1 to 1:              {comparison.smile_base:+.2f} base, {comparison.smile_lora:+.2f} with the LoRA
Images unlike their prompt:       {comparison.wrong_base} base, {comparison.wrong_lora} with the LoRA ({comparison.new_wrong} that the base got right)
Before and after:                 {args.output_dir / "grid.png"}"""
    )


if __name__ == "__main__":
    main()
