"""The pages are true: commands parse and run, flags, files and links exist, snippets and tables are those of the code."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from diffusion_orpo_loss import OrpoMetrics, odds_ratio_objective
from helpers import encode
from orpo.labelling.questions import make_questions
from orpo.labelling.session import Session, Settings
from orpo.labelling.votes import read_votes
from orpo.pairs.image_folder import read_listing
from PIL import Image

from faces import ALL_KINDS, draw_face


ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "diffusion_orpo"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("examples/**/*.md"),
        *ROOT.glob("tests/**/*.md"),
    ]
}
SCRIPTS = {path.stem for path in EXAMPLE.glob("*.py")}
PUBLISHED = {  # what commands name, and what stands for it here
    "stabilityai/stable-diffusion-xl-base-1.0": "{sdxl}",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "{sd}",
    "stabilityai/stable-diffusion-3.5-medium": "{sd3}",
    "black-forest-labs/FLUX.1-dev": "{flux}",
    "black-forest-labs/FLUX.2-klein-base-4B": "{flux2}",
    "Tongyi-MAI/Z-Image": "{z_image}",
    "Qwen/Qwen-Image": "{qwen_image}",
    "MODEL": "{sdxl}",
    "data-is-better-together/open-image-preferences-v1-binarized": "{data}",
}
# Of a command that runs, in place of its own.
LESS = {
    "check_preferences": "--num_workers=1",
    "convert_to_webdataset": "--resolution=64 --mixed_precision=no",
    "evaluate_lora": "--resolution=64 --num_inference_steps=2 --num_images_per_prompt=1 --num_prompts=2 --scorers saturation",
    "make_preferences": "--num_inference_steps=2 --num_images_per_prompt=4 --num_prompts=3",
    "train_diffusion_orpo_lora": "--resolution=64 --max_train_steps=2 --train_batch_size=2 --gradient_accumulation_steps=1"
    " --num_validation_pairs=2 --validation_inference_steps=1 --report_to=none --mixed_precision=no",
}


def commands(text: str) -> list[str]:
    """Each command of a page's blocks on one line, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = re.sub(r"^(for .*; do)\n *(.*)\n(done.*)$", r"\1 \2; \3", "\n".join(blocks), flags=re.MULTILINE)
    return [re.sub(r"\s+#.*", "", line) for line in lines.replace("\\\n", " ").splitlines()]


def script_and_flags(line: str) -> tuple[str, list[str]] | None:
    words = shlex.split(line)
    place = next((i for i, word in enumerate(words) if word.removesuffix(".py") in SCRIPTS), None)
    return None if place is None else (words[place].removesuffix(".py"), words[place + 1 :])


def here(flags: list[str], models, data: str = "unused") -> list[str]:
    """The flags with this machine's models and data in place of published ones."""
    changed = []
    for flag in flags:
        name, _, value = flag.partition("=")
        if value in PUBLISHED:
            stand_in = PUBLISHED[value].strip("{}")
            flag = f"{name}={data if stand_in == 'data' else models[stand_in]}"
        if name != "--pretrained_vae_model_name_or_path":
            changed.append(flag)
    return changed


def shorter(flags: list[str], less: str) -> list[str]:
    """The flags with those of `less` in their places."""
    names = {word.partition("=")[0] for word in less.split() if word.startswith("--")}
    kept, keep = [], True
    for word in flags:
        keep = word.partition("=")[0] not in names if word.startswith("--") else keep
        kept += [word] if keep else []
    return kept + shlex.split(less)


def start(script: str, flags: list[str]) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    PartialState._reset_state()
    assert importlib.import_module(script).main(flags) in (None, 0), (script, flags)


def test_every_command_parses(models, monkeypatch):
    monkeypatch.chdir(EXAMPLE)
    parsed = 0
    for page, text in PAGES.items():
        for line in commands(text):
            if "..." in line or "$" in line or not (found := script_and_flags(line)) or "single_file" in page:
                continue
            script, flags = found
            importlib.import_module(script).parse_args(here(flags, models))
            parsed += 1
    assert parsed >= 12


def test_the_command_of_every_model_parses(models):
    page = PAGES["docs/models.md"]
    base = next(line for line in commands(page) if "=MODEL " in line)
    rows = re.findall(r"^\| [^|]+ \| `([\w./-]+/[\w./-]+)` \| `(--[^`]+)`", page, flags=re.MULTILINE)
    assert len(rows) == 7
    for model, more in rows:
        script, flags = script_and_flags(f"{base.replace('=MODEL', f'={model}')} {more}")
        config = importlib.import_module(script).parse_args(here(flags, models))
        assert (config.rank, config.seed, config.dataset_path) == (8, 0, ())


def test_flags_files_and_links_exist():
    known = set(re.findall(r"^\| `--(\w+)`", PAGES["examples/diffusion_orpo/FLAGS.md"], flags=re.MULTILINE))
    others = {
        "help",
        "multi_gpu",
        "num_machines",
        "num_processes",
        "machine_rank",
        "main_process_ip",
        "signal",
        "requeue",
    }
    code = [path for folder in ("examples", "benchmarks", "tests") for path in ROOT.glob(f"{folder}/**/*.py")]
    others |= set(re.findall(r"add_argument\(\s*\"--(\w+)", "\n".join(path.read_text() for path in code)))
    unknown, missing = [], []
    for page, text in PAGES.items():
        if page in ("CHANGELOG.md", "docs/plug_in.md", "docs/upstream.md"):  # flags of other scripts
            continue
        unknown += [(page, name) for name in re.findall(r"(?<![\w-])--(\w+)", text) if name not in known | others]
        named = re.findall(r"(?:tests|benchmarks)/[\w/]+\.py", text)
        missing += [(page, name) for name in named if not (ROOT / name).exists()]
        for target, anchor in re.findall(r"\]\((?!https://)([^)#]*)#?([\w-]*)\)", text):
            path = ROOT / Path(page).parent / target if target else ROOT / page
            if not path.exists():
                missing.append((page, target))
            elif anchor:
                headings = re.findall(r"^#+ (.*)$", path.read_text(), flags=re.MULTILINE)
                anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
                missing += [] if anchor in anchors else [(page, f"{target}#{anchor}")]
    assert (unknown, missing) == ([], [])


def test_the_commands_of_readme_and_shards_run(faces, models, tmp_path, monkeypatch):
    """From the pairs to the evaluation, and from shards and encoded shards, two steps each."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for page in ("README.md", "docs/evaluate.md", "docs/shards.md"):
        for line in commands(PAGES[page].split("## Your own preferences")[0]):
            if "my_pairs" in line or not (found := script_and_flags(line.replace("pickapic_v2", faces))):
                continue
            script, flags = found
            less = "" if script == "convert_to_webdataset" and "--encode" not in flags else LESS[script]
            start(script, shorter(here(flags, models, faces), less))
            ran.append(script)
    assert [ran.count(name) for name in LESS] == [0, 3, 1, 0, 3]
    assert (tmp_path / "evaluation" / "index.html").exists()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the example's place in the repository, with some images of one's own."""
    (tmp_path / "diffusion_orpo" / "my_images").mkdir(parents=True)
    (tmp_path / "demo").symlink_to(ROOT / "examples" / "demo")
    monkeypatch.chdir(tmp_path / "diffusion_orpo")
    for i, kind in enumerate(ALL_KINDS[:3]):
        Path(f"my_images/{i}.png").write_bytes(encode(draw_face(kind, 0.9), "PNG"))
        Path(f"my_images/{i}.txt").write_text(kind.prompt)
    return tmp_path / "diffusion_orpo"


def label(folder: Path) -> None:
    """What a person does at the page, which tests/labelling/test_page.py tries: prefers the brighter image."""
    at_work = Session(folder, "me", make_questions(folder, read_listing(folder), 2)[0], Settings(2, 0.2, 0))
    while at_work.asked:
        left, right = (sum(Image.open(folder / i.name).resize((1, 1)).getpixel((0, 0))) for i in at_work.asked.images)
        at_work.answer(at_work.asked.id, "best", int(right > left), int(right <= left), 1.0)
    at_work.close()


def test_the_commands_of_own_preferences_run(folder):
    variables, ran = {}, []
    for line in commands(PAGES["docs/evaluate.md"].split("## Your own preferences")[1]):
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        if assigned := re.fullmatch(r'([A-Z]+)="?([^"]*)"?', line.strip()):
            variables[assigned[1]] = assigned[2]
        elif line.startswith("for "):
            subprocess.run(["bash", "-c", line], check=True)
        elif found := script_and_flags(line):
            script, flags = found
            ran.append(script)
            if script == "label_preferences" and not any(flag.startswith("--export") for flag in flags):
                assert importlib.import_module(script).parse_args(flags).images_dir == "round1/images"
                label(Path("round1/images"))
                continue
            less = LESS.get(script, "") if "--chosen_dir=my_images" not in flags else "--num_inference_steps=2"
            start(script, shorter(flags, less))
    assert len(Path("prompts.txt").read_text().splitlines()) == 12
    assert ran.count("make_preferences") == 3 and ran.count("train_diffusion_orpo_lora") == 2
    assert len(read_votes(Path("round1/images"))["me"]) == 6
    second = pq.read_table("round2/pairs/train.parquet")
    assert min(second["seed_0"].to_pylist()) >= 1000
    assert pq.read_table("style/pairs/train.parquet").num_rows == 3
    assert Path("evaluation1/index.html").exists() and Path("lora2/pytorch_lora_weights.safetensors").exists()


def test_the_loss_snippet_runs():
    (snippet,) = re.findall(r"```python\n(from diffusion_orpo_loss.*?)```", PAGES["README.md"], flags=re.DOTALL)
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
    section = PAGES["docs/train.md"].split("## What is logged")[1].split("\n## ")[0]
    assert set(re.findall(r"`([\w/]+)`", section)) >= {"loss", "grad_norm", "lr", *OrpoMetrics.__annotations__}


def test_the_shares_of_betas_are_those_of_the_loss():
    header, _, *rows = (
        re.search(r"\| error \| beta.*?\n\n", PAGES["docs/train.md"], flags=re.DOTALL)[0].strip().splitlines()
    )
    betas = [float(beta) for beta in re.findall(r"beta ([\d.]+)", header)]
    assert len(betas) == 4 and len(rows) == 5
    for row in rows:
        error, *shares = map(float, row.strip("|").split("|"))
        for beta, share in zip(betas, shares):
            errors = [torch.tensor([error], dtype=torch.float64, requires_grad=True) for _ in range(2)]
            on_w, on_l = torch.autograd.grad(odds_ratio_objective(*errors, beta), errors)
            assert share == pytest.approx((-on_l / (on_w - on_l)).item(), abs=0.0051)
