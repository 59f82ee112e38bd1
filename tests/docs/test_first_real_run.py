"""docs/first_real_run.md, command by command, on the demo's model: in this process, with fewer steps and images."""

import importlib
import re
import shlex
from pathlib import Path

from accelerate.state import AcceleratorState, GradientState, PartialState


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "first_real_run.md").read_text()
# Appended to a command: of a flag that is given twice, the last one counts.
LESS = {
    "check_preferences": "--num_workers=0",
    "train_diffusion_orpo_sdxl_lora": "--resolution=64 --max_train_steps=4 --train_batch_size=2 --gradient_accumulation_steps=1"
    " --mixed_precision=no --validation_steps=2 --checkpointing_steps=2 --num_validation_pairs=4 --report_to=none"
    " --validation_inference_steps=2",
    "evaluate_lora": "--resolution=64 --num_inference_steps=2 --num_images_per_prompt=1 --num_prompts=2 --scorers saturation",
}
REAL = {
    "--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0": "--pretrained_model_name_or_path={base}",
    "--pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix": "",
    "--dataset_name=data-is-better-together/open-image-preferences-v1-binarized": "--dataset_name={data}",
}


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if line]


def on_the_demo(words: list[str], base: str, data: str) -> list[str]:
    changed = [REAL.get(word, word).format(base=base, data=data) for word in words]
    return [word for word in changed if word]


def test_every_command_runs(faces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran = []
    for words in commands():
        if words[0] == "cd":
            continue
        assert words[:2] == ["accelerate", "launch"] or words[0] == "python"
        place = next(i for i, word in enumerate(words) if word.endswith(".py"))
        script = words[place].removesuffix(".py")
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state(**({"reset_partial_state": True} if state is AcceleratorState else {}))
        flags = on_the_demo(words[place + 1 :], str(ROOT / "examples" / "demo" / "base"), faces)
        assert not importlib.import_module(script).main([*flags, *LESS[script].split()])
        ran.append(script)
    assert ran == ["check_preferences", *["train_diffusion_orpo_sdxl_lora"] * 2, *["evaluate_lora"] * 2]
    for folder in ("sft", "orpo"):
        assert (tmp_path / folder / "eval_results.json").exists() and (tmp_path / folder / "checkpoint-2").exists()
        assert (tmp_path / f"evaluation-{folder}" / "index.html").exists()


def test_both_runs_differ_in_nothing_but_the_strength():
    first, second = [set(words) for words in commands() if words[0] == "accelerate"]
    assert first - second == {"--output_dir=sft", "--beta_orpo=0"}
    assert second - first == {"--output_dir=orpo", "--loser_share=0.375"}


def test_the_hours_are_what_the_operations_take():
    """From the table of docs/performance.md, which the benchmark of operations makes."""
    table = (ROOT / "docs" / "performance.md").read_text()
    tflop = {
        name: float(re.search(rf"^\| {name} \| ([\d.]+)", table, flags=re.MULTILINE)[1])
        for name in ("U-Net, forward alone", "the same with gradient checkpointing", "VAE, encoding both images")
        + ("text encoders, once for both images",)
    }
    forward, *step = tflop.values()
    pairs, validations = 2000 * 16 * sum(step), (2000 // 200 + 1) * 64 * 12 * forward
    hours = (pairs + validations) / 125 / 3600
    assert f"**{hours:.1f} hours per\nrun**, {2 * float(f'{hours:.1f}'):.1f} for both" in PAGE
    assert f"{pairs / 1e6:.2f} EFLOP" in PAGE and f"{validations / 1e6:.2f} EFLOP" in PAGE
