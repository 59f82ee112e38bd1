"""The one file aligns: the demo's bars, on the demo's model and pairs."""

import sys

from helpers import lora_weights
from launching import assert_ok, run
from single_file_script import SCRIPT

from compare import compare
from make_pairs import make_pairs


def test_it_meets_the_demos_bars(demo_base, tmp_path):
    made = make_pairs(demo_base, tmp_path / "pairs", 1152)
    assert 0.05 < made["noise"] < 0.25
    line = [
        f"--pretrained_model_name_or_path={demo_base}",
        f"--dataset_name={tmp_path / 'pairs'}",
        f"--output_dir={tmp_path / 'lora'}",
        "--resolution=64",
        "--train_batch_size=32",
        "--max_train_steps=300",
        "--rank=8",
        "--learning_rate=1e-3",
        "--beta_orpo=0.5",
        "--report_to=none",
    ]
    assert_ok(run(["accelerate.commands.launch", "--cpu", "--num_processes=1"], line, SCRIPT, timeout=1200))
    assert all(8 in weights.shape for weights in lora_weights(tmp_path / "lora").values())
    comparison = compare(demo_base, str(tmp_path / "lora"), str(tmp_path / "grid.png"))
    print(comparison, file=sys.stderr)
    assert comparison.win_rate_low > 0.7
    assert comparison.new_wrong == 0
