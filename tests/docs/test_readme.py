"""The READMEs say what is so: their commands parse, their snippets run, their tables name what is logged."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusion_orpo_loss import OrpoMetrics

import train_diffusion_orpo_sdxl_lora_wds
from train_diffusion_orpo_sdxl_lora import parse_args


ROOT = Path(__file__).parents[2]
README, EXAMPLE_README = (ROOT / "README.md").read_text(), (ROOT / "examples/diffusion_orpo/README.md").read_text()


@pytest.mark.parametrize("text", [README, EXAMPLE_README])
def test_the_training_command_parses(text):
    (command,) = re.findall(r"accelerate launch train_diffusion_orpo_sdxl_lora.py (\\\n.*?)```", text, flags=re.DOTALL)
    args = parse_args(shlex.split(command.replace("\\\n", " ")))
    assert (args.rank, args.seed, args.loser_share, args.report_to) == (8, 0, 0.375, "wandb")


def test_the_command_for_shards_parses():
    command = re.findall(r"train_diffusion_orpo_sdxl_lora_wds.py (\\\n.*?)```", EXAMPLE_README, flags=re.DOTALL)[0]
    args = train_diffusion_orpo_sdxl_lora_wds.parse_args(shlex.split(command.replace("\\\n", " ")))
    assert args.dataset_path == ("pipe:aws s3 cp s3://diffusion-preference-opt/{00000..00644}.tar -",)
    assert (args.train_batch_size, args.dataloader_num_workers, args.max_train_steps) == (8, 8, 50000)


def test_the_loss_snippet_runs():
    (snippet,) = re.findall(r"```python\n(from diffusion_orpo_loss.*?)```", README, flags=re.DOTALL)
    layer = torch.nn.Conv2d(4, 4, 1)
    names = {
        "torch": torch,
        "latents_w": torch.randn(3, 4, 8, 8),
        "latents_l": torch.randn(3, 4, 8, 8),
        "noise": torch.randn(3, 4, 8, 8),
        "timesteps": torch.tensor([1, 2, 3]),
        "prompt_embeds": torch.randn(3, 7, 16),
        "noise_scheduler": type("Scheduler", (), {"add_noise": lambda self, x, noise, t: x + noise})(),
        "unet": lambda x, t, text: type("Output", (), {"sample": layer(x)}),
    }
    exec(snippet, names)
    assert layer.weight.grad.abs().sum() > 0
    assert set(names["metrics"]) == set(OrpoMetrics.__annotations__)


def test_the_table_of_metrics_is_complete():
    section = EXAMPLE_README.split("## What is logged")[1].split("##")[0]
    assert set(re.findall(r"`([\w/]+)`", section)) >= {"loss", "grad_norm", "lr", *OrpoMetrics.__annotations__}


def test_links_lead_somewhere():
    for path in ROOT.glob("**/*.md"):
        if ".venv" in path.parts or "demo-output" in path.parts:
            continue
        for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
            assert link.startswith("https://") or (path.parent / link).exists(), f"{path}: {link}"


def test_the_gain_by_cached_latents_is_that_of_the_stored_runs():
    low, high, bound = map(
        float, re.search(r"(\d\.\d) to (\d\.\d) times as fast.*?(\d\.\d+) is", README, re.DOTALL).groups()
    )
    step, earlier = (
        json.loads((ROOT / f"benchmarks/performance/results/{name}.json").read_text()) for name in ("step", "earlier")
    )
    runs = [step["not cached over cached"]["median"]]
    runs += [run["milliseconds"]["not cached"] / run["milliseconds"]["cached"] for run in (step, earlier)]
    assert [round(min(runs), 1), round(max(runs), 1), round(step["bound"], 2)] == [low, high, bound]


PAGES = [path for path in sorted(ROOT.rglob("*.md")) if ".venv" not in path.parts and ".git" not in path.parts]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tests_that_a_page_names_exist(page):
    named = re.findall(r"tests/[\w/]+\.py", page.read_text())
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_no_file_holds_the_marks_of_an_unfinished_merge():
    for path in ROOT.rglob("*"):
        is_text = path.suffix in (".md", ".py", ".template", ".toml", ".txt") or path.name == "Makefile"
        if is_text and not any(part.startswith(".") for part in path.relative_to(ROOT).parts):
            assert not re.search(r"^(<{7}|>{7}) ", path.read_text(encoding="utf-8"), flags=re.MULTILINE), path
