"""docs/own_preferences.md, command by command, on the demo's model: in this process, with fewer images and steps."""

import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState
from helpers import encode
from orpo.config import CheckConfig, LabellingConfig, MakingConfig, TrainingConfig
from orpo.labelling.questions import make_questions
from orpo.labelling.session import Session, Settings
from orpo.labelling.votes import read_votes
from orpo.pairs.listing import read_listing
from PIL import Image

from faces import ALL_KINDS, draw_face


ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "own_preferences.md"
# Appended to a command: of a flag that is given twice, the last one counts.
LESS = {
    "make_preferences": "--num_inference_steps=2 --num_images_per_prompt=4 --num_prompts=3",
    "check_preferences": "--num_workers=0",
    "train_diffusion_orpo_sdxl_lora": "--max_train_steps=2 --train_batch_size=2 --report_to=none",
    "evaluate_lora": "--num_inference_steps=2 --num_images_per_prompt=1 --num_prompts=2",
}


def commands() -> list[str]:
    """Every command of the page, in order, each on one line."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    loop = re.search(r"^for .*?^done; done > prompts.txt$", text, flags=re.DOTALL | re.MULTILINE)[0]
    return [loop, *text.replace(loop, "").splitlines()]


def judge(folder: Path) -> None:
    """What a person does at the page, which tests/labelling/test_page.py tries: prefers the brighter image."""
    at_work = Session(folder, "me", make_questions(folder, read_listing(folder), 2)[0], Settings(2, 0.2, 0))
    while at_work.asked:
        left, right = (
            sum(Image.open(folder / i.name).resize((1, 1)).getpixel((0, 0))) for i in at_work.shown(at_work.asked)
        )
        at_work.answer(at_work.asked.id, "best", int(right > left), int(right <= left), 1.0)
    at_work.close()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A copy of the example's place in the repository."""
    (tmp_path / "diffusion_orpo").mkdir()
    (tmp_path / "demo").symlink_to(ROOT / "examples" / "demo")
    monkeypatch.chdir(tmp_path / "diffusion_orpo")
    for i, kind in enumerate(ALL_KINDS[:3]):
        Path("my_images").mkdir(exist_ok=True)
        Path(f"my_images/{i}.png").write_bytes(encode(draw_face(kind, 0.9), "PNG"))
        Path(f"my_images/{i}.txt").write_text(kind.prompt)
    return tmp_path / "diffusion_orpo"


def test_every_command_of_the_page_runs(folder):
    variables, ran = {}, []
    for line in commands():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        if assigned := re.fullmatch(r'([A-Z]+)="?([^"]*)"?', line.strip()):
            variables[assigned[1]] = assigned[2]
            continue
        words = shlex.split(line) if not line.startswith("for ") else ["for"]
        if words[:1] == ["for"]:
            subprocess.run(["bash", "-c", line], check=True)
            ran.append("for")
        elif words and words[0] not in ("cd", "pip"):
            assert words[:2] == ["accelerate", "launch"] or words[0] == "python", line
            script = next(word for word in words if word.endswith(".py")).removesuffix(".py")
            flags = words[words.index(f"{script}.py") + 1 :]
            ran.append(script)
            if script == "label_preferences" and not any(flag.startswith("--export") for flag in flags):
                assert importlib.import_module(script).parse_args(flags).images_dir == "round1/images"
                judge(Path("round1/images"))
                continue
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
            PartialState._reset_state()
            more = (
                LESS.get(script, "") if not any("winners_dir" in flag for flag in flags) else "--num_inference_steps=2"
            )
            assert importlib.import_module(script).main(flags + shlex.split(more)) in (None, 0), line
    assert len(Path("prompts.txt").read_text().splitlines()) == 12
    assert ran.count("make_preferences") == 3 and ran.count("train_diffusion_orpo_sdxl_lora") == 2
    assert len(read_votes(Path("round1/images"))["me"]) == 6
    second = pq.read_table("round2/pairs/train.parquet")
    assert set(second["model_0"].to_pylist()) == {"../demo/base + lora1"}
    assert min(second["seed_0"].to_pylist()) >= 1000
    assert pq.read_table("style/pairs/train.parquet").num_rows == 3
    for made in ("evaluation1/index.html", "lora2/pytorch_lora_weights.safetensors"):
        assert Path(made).exists()


def test_the_page_names_only_flags_that_there_are():
    text = PAGE.read_text()
    flags = set()
    for config in (MakingConfig, LabellingConfig, CheckConfig, TrainingConfig):
        flags |= set(config.settings())
    named = set(re.findall(r"`--(\w+)", text))
    assert named <= flags and named >= {"ranking", "annotator", "overlap", "combine", "weights", "min_margin", "pairs"}
