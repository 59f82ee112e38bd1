"""`make_preferences.py` as a user runs it, on tiny models: what is generated, judged and written; kills; bad input."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import PartialState
from helpers import arguments, encode, train
from orpo.config import BUILT_IN
from orpo.models.sdxl import StableDiffusionXL
from orpo.scoring.image_statistics import STATISTICS, saturation
from orpo.scoring.reward_models import REWARD_MODELS
from PIL import Image

import check_preferences
import label_preferences
import make_preferences
from diffusers import DiffusionPipeline
from faces import ALL_KINDS, draw_face
from train_diffusion_orpo_sdxl_lora import parse_args


PROMPTS = ["a red ball", 'a face | "quoted" & <b>bold</b>', "red face"]


@pytest.fixture
def run(tiny_sdxl, tmp_path):
    """Runs the script in this process; returns the output folder."""
    prompt_file = tmp_path / "prompts.txt"
    prompt_file.write_text("\n".join(PROMPTS) + "\n")

    def run(**flags) -> Path:
        PartialState._reset_state()
        defaults = {
            "pretrained_model_name_or_path": tiny_sdxl,
            "prompt_file": prompt_file,
            "output_dir": tmp_path / "out",
            "resolution": 64,
            "num_inference_steps": 2,
        }
        flags = {name: value for name, value in (defaults | flags).items() if value is not None}
        line = []
        for name, value in flags.items():
            line += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        make_preferences.main(line)
        return Path(flags["output_dir"])

    return run


def listed(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "images" / "metadata.jsonl").read_text().splitlines()]


def rows(out: Path) -> list[dict]:
    return pq.read_table(out / "pairs" / "train.parquet").to_pylist()


def pixels(encoded: bytes | Path) -> np.ndarray:
    import io

    return np.asarray(Image.open(io.BytesIO(encoded) if isinstance(encoded, bytes) else encoded), dtype=int)


def pngs(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((out / "images").glob("*.png"))}


def generate_one(folder: str, prompt: str, seed: int, lora: str | None = None, **options) -> np.ndarray:
    """What a user generates, one image at a time."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    if lora is not None:
        pipeline.load_lora_weights(lora)
    size = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 5.0} | options
    generator = torch.Generator().manual_seed(seed)
    return np.asarray(pipeline(prompt=prompt, generator=generator, **size).images[0], dtype=int)


def test_images_are_those_a_user_generates_and_pairs_are_the_scorers(run, tiny_sdxl, tmp_path):
    out = run(num_images_per_prompt=3, scorers=["saturation"], seed=7, min_margin=0, pairs="all")
    images = listed(out)
    assert [(image["prompt"], image["seed"]) for image in images] == [
        (prompt, 7 + 3 * i + j) for i, prompt in enumerate(PROMPTS) for j in range(3)
    ]
    for image in images[::4]:
        generated = generate_one(tiny_sdxl, image["prompt"], image["seed"])
        assert abs(pixels(out / "images" / image["file_name"]) - generated).max() <= 1
    by_seed = {image["seed"]: image for image in images}
    pairs = rows(out)
    assert len(pairs) == 9
    for row in pairs:
        for i in (0, 1):
            image = by_seed[row[f"seed_{i}"]]
            assert row[f"jpg_{i}"] == (out / "images" / image["file_name"]).read_bytes()
            assert row["caption"] == image["prompt"] and row[f"model_{i}"] == tiny_sdxl
            (value,) = saturation([Image.open(out / "images" / image["file_name"])], [""])
            assert row[f"score_saturation_{i}"] == image["score_saturation"] == pytest.approx(value)
        assert row["label_0"] == float(row["score_saturation_0"] > row["score_saturation_1"]) and row["margin"] > 0
    assert {row["label_0"] for row in pairs} == {0.0, 1.0}  # winners stand on either side


def test_check_and_training_take_the_pairs(run, tiny_sdxl, output_dir, tmp_path):
    pairs = run(scorers=["saturation"], min_margin=0) / "pairs"
    check = [f"--dataset_name={pairs}", f"--output_dir={tmp_path / 'check'}", "--num_workers=0"]
    assert check_preferences.main(check) == 0
    assert any(value.abs().sum() > 0 for value in train(tiny_sdxl, str(pairs), output_dir).values())


def test_a_second_round_generates_with_the_lora(run, tiny_sdxl, tmp_path):
    model = StableDiffusionXL.load(
        parse_args(arguments(tiny_sdxl, "unused", "unused", rank=2)),
        torch.device("cpu"),
        torch.float32,
    )
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    lora = tmp_path / "lora"
    model.save_lora(lora)
    out = run(lora_weights=lora, scorers=["saturation"], min_margin=0)
    image = listed(out)[5]
    generated = pixels(out / "images" / image["file_name"])
    assert abs(generated - generate_one(tiny_sdxl, image["prompt"], image["seed"], str(lora))).max() <= 1
    assert abs(generated - generate_one(tiny_sdxl, image["prompt"], image["seed"])).max() > 5
    assert rows(out)[0]["model_0"] == f"{tiny_sdxl} + {lora}"
    weights = lora / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"1234")  # another LoRA under the same name
    with pytest.raises(ValueError, match="generated differently: lora_sha256 was"):
        run(lora_weights=lora)


def test_images_without_scorers_go_to_the_page(run, capsys):
    out = run(num_images_per_prompt=2)
    assert not (out / "pairs").exists()
    assert f"label_preferences.py --images_dir={out / 'images'}" in capsys.readouterr().out
    questions, left_over = label_preferences.make_questions(
        out / "images", label_preferences.read_listing(out / "images"), 2
    )
    assert [question.prompt for question in questions] == PROMPTS and left_over == 0


def test_my_images_are_preferred_to_those_that_the_model_generates_from_their_captions(run, tiny_sdxl, tmp_path):
    mine = tmp_path / "mine"
    mine.mkdir()
    for i, kind in enumerate(ALL_KINDS[:3]):
        (mine / f"{i}.jpg").write_bytes(encode(draw_face(kind, 0.9).resize((96, 80))))
        (mine / f"{i}.txt").write_text(kind.prompt + "\n")
    (mine / "2.txt").write_text(ALL_KINDS[0].prompt)  # two images of a caption
    out = run(chosen_dir=mine, prompt_file=None, num_images_per_prompt=2)
    found = rows(out)
    assert [row["seed_1"] for row in found] == list(range(6)) and {row["label_0"] for row in found} == {1.0}
    for i, row in enumerate(found):
        assert row["jpg_0"] == (mine / f"{i // 2}.jpg").read_bytes()
        assert row["caption"] == ALL_KINDS[[0, 1, 0][i // 2]].prompt
        assert (row["model_0"], row["model_1"]) == (None, tiny_sdxl)
    assert abs(pixels(found[3]["jpg_1"]) - generate_one(tiny_sdxl, found[3]["caption"], 3)).max() <= 1
    assert check_preferences.main([f"--dataset_name={out / 'pairs'}", f"--output_dir={tmp_path / 'c'}"]) == 0

    (mine / "00.png").write_bytes(encode(draw_face(ALL_KINDS[5], 0.9), "PNG"))  # one more, before the others
    (mine / "00.txt").write_text(ALL_KINDS[5].prompt)
    (mine / "1.txt").write_text("a better caption")
    run(chosen_dir=mine, prompt_file=None, num_images_per_prompt=2)
    again = rows(out)
    assert [row["jpg_1"] for row in again if row["seed_1"] in (0, 1, 4, 5)] == [
        found[i]["jpg_1"] for i in (0, 1, 4, 5)
    ]
    assert sorted({row["seed_1"] for row in again}) == [0, 1, 4, 5, 6, 7, 8, 9]
    for row in again:
        (name,) = [path for path in mine.glob("*.[jp]*") if path.read_bytes() == row["jpg_0"]]
        assert row["caption"] == name.with_suffix(".txt").read_text().strip()

    (mine / "1.txt").unlink()
    (mine / "0.caption").write_text("another")
    with pytest.raises((SystemExit, ValueError)) as error:
        run(chosen_dir=mine, prompt_file=None, output_dir=tmp_path / "other")
    assert "0.jpg: two caption files" in str(error.value) and "1.jpg: no caption file beside it" in str(error.value)


@pytest.mark.parametrize(
    "scorer, problem",
    [
        ("return [float('nan')] * len(images)", "fails on two grey images.*nan"),
        ("return [1.0]", "fails on two grey images.*1 scores for 2 images"),
        (
            "return [float('inf') if i.getextrema()[0][0] < 128 else 0.0 for i in images]",
            "returned inf for an image of",
        ),
        ("return [0.0] * len(images)", "No pair of images differs by --min_margin=0.25 according to mine"),
    ],
)
def test_scores_that_decide_nothing_are_said(run, tmp_path, scorer, problem):
    path = tmp_path / "scorer.py"
    path.write_text(f"def mine(images, prompts):\n    {scorer}\n")
    with pytest.raises(ValueError, match=problem):
        run(scorers=[f"{path}:mine"])
    assert not (tmp_path / "out" / "pairs").exists()


def test_pairs_of_an_earlier_scorer_do_not_stay_where_another_finds_none(run, tmp_path):
    out = run(scorers=["saturation"], min_margin=0)
    assert rows(out)
    with pytest.raises(ValueError, match="No pair of images differs"):
        run(scorers=["saturation"], min_margin=100)
    assert not (out / "pairs").exists()


def test_more_images_and_prompts_are_added_to_those_that_are_there(run, tmp_path):
    """What the message about pairs that differ too little advises, and what a user does who has thought of a prompt."""
    out = run(num_images_per_prompt=2)
    first, times = pngs(out), {path: path.stat().st_mtime_ns for path in (out / "images").glob("*.png")}
    more = tmp_path / "more.txt"
    more.write_text("\n".join(["one more", *PROMPTS]))
    run(num_images_per_prompt=3, prompt_file=more)
    assert {path: path.stat().st_mtime_ns for path in times} == times and len(pngs(out)) == 12
    images = listed(out)
    assert [image["prompt"] for image in images] == [prompt for prompt in ["one more", *PROMPTS] for _ in range(3)]
    assert len({image["seed"] for image in images}) == 12
    assert {image["file_name"]: image["seed"] for image in images if image["file_name"] in first} == {
        f"{i:05d}-{j}.png": 2 * i + j for i in range(3) for j in range(2)
    }
    run(num_images_per_prompt=2)  # asked for fewer, the others stay, and aren't listed
    assert len(pngs(out)) == 12 and [image["file_name"] for image in listed(out)] == [*first]


@pytest.mark.parametrize(
    "flags, problem",
    [
        ({"num_images_per_prompt": 1}, "must be at least 2"),
        ({"chosen_dir": "x"}, "--prompt_file: has no effect with --chosen_dir"),
        ({"dataset_name": "x"}, "--prompt_file and --dataset_name: choose one"),
        ({"scorers": ["a.py:f", "b.py:f"]}, "names must differ; f is given twice"),
        ({"scorers": ["clip"], "weights": [1]}, "--weights: one for each"),
        ({"scorers": ["clip"], "combine": "sum", "weights": [-1]}, "--weights must be positive"),
        ({"min_margin": -1}, "--min_margin must be at least 0"),
        ({"min_margin": "nan"}, "--min_margin must be at least 0"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
    ],
)
def test_flags_that_make_no_sense_stop_at_once(run, capsys, flags, problem):
    with pytest.raises(SystemExit):
        run(**flags)
    assert problem in capsys.readouterr().err


def test_help_names_the_scorers_there_are():
    assert BUILT_IN == (*REWARD_MODELS, *STATISTICS)
