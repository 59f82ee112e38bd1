"""The demo aligns: its bars on a full run, and its instrument against drawings whose smile is known."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from faces import ALL_KINDS, draw_face, read_face


DEMO = Path(__file__).parents[2] / "examples" / "demo"


def test_smiles_are_read_as_drawn_whatever_else_changes():
    rng = np.random.default_rng(0)
    for i in range(120):
        kind, curvature = ALL_KINDS[i % len(ALL_KINDS)], rng.uniform(-1, 1)
        face = draw_face(kind, curvature, rng.uniform(19, 25), 32 + rng.uniform(-2, 2), 34 + rng.uniform(-2, 2))
        reading = read_face(face)
        assert reading.kind == kind
        assert reading.smile == pytest.approx(curvature, abs=0.1)
        blurred = read_face(face.filter(ImageFilter.GaussianBlur(0.7)))
        assert blurred.smile == pytest.approx(curvature, abs=0.2)


def test_no_mouth_and_no_face_are_the_deepest_frown():
    faceless = Image.new("RGB", (64, 64), (16, 16, 16))
    assert read_face(faceless).smile == -1
    eyes_only = np.array(draw_face(ALL_KINDS[0], 1.0))
    eyes_only[36:50, 16:48] = eyes_only[34, 32]
    assert read_face(Image.fromarray(eyes_only)).smile == -1


def test_the_shipped_base_is_small_and_half_precision():
    from safetensors import safe_open

    files = list(DEMO.glob("base/*/*.safetensors"))
    assert sum(path.stat().st_size for path in files) <= 3_000_000
    for path in files:
        with safe_open(path, "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} <= {"F16", "I64"}


@pytest.mark.parametrize(
    "size, bar",
    [
        (["--num_pairs=400", "--steps=150"], 0.55),
        pytest.param([], 0.7, marks=pytest.mark.campaign),
    ],
    ids=["short", "full"],
)
def test_the_demo_meets_its_bars(size, bar, tmp_path):
    command = [sys.executable, DEMO / "run_demo.py", f"--output_dir={tmp_path}", *size]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    comparison, held_out = results["comparison"], results["held_out"]
    print(comparison)
    assert 0.05 < results["pairs"]["noise"] < 0.25
    assert comparison["win_rate_low"] > bar
    assert comparison["new_wrong"] <= (2 if size else 0)
    gain = held_out["eval_rewards/accuracies"] - held_out["eval_rewards/accuracies_without_lora"]
    assert gain > (0 if size else 0.1)
    assert Image.open(tmp_path / "grid.png").width >= 1000
    assert f"{comparison['win_rate']:.3f}" in result.stdout
