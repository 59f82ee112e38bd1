"""The flags as a whole: each says what it does, each is tried by a test, and the README lists them all."""

import ast
from pathlib import Path

import pytest
from flag_tables import flag_table, flags

import train_diffusion_orpo_flux_lora
import train_diffusion_orpo_sd3_lora
import train_diffusion_orpo_sd_lora
import train_diffusion_orpo_sdxl_lora
import train_diffusion_orpo_sdxl_lora_wds


SCRIPTS = (
    train_diffusion_orpo_sdxl_lora,
    train_diffusion_orpo_sdxl_lora_wds,
    train_diffusion_orpo_sd_lora,
    train_diffusion_orpo_sd3_lora,
    train_diffusion_orpo_flux_lora,
)


def set_by_tests() -> set[str]:
    """Names given as keywords to the functions that run a script or parse its flags, and keys of dicts of flags."""
    names = set()
    for path in Path(__file__).parents[1].rglob("test_*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
                "train",
                "arguments",
                "load",
                "setup",
                "open_data",
            ):
                names |= {keyword.arg for keyword in node.keywords}
            elif isinstance(node, ast.Dict):
                names |= {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return names


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_has_a_help_text_and_is_set_by_some_test(script):
    assert [name for name, action in flags(script).items() if not action.help] == []
    always = {"pretrained_model_name_or_path", "dataset_name", "output_dir"}  # positional for `train` and its like
    assert sorted(set(flags(script)) - set_by_tests() - always) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_readmes_table_lists_every_flag_as_it_is(script):
    readme = (Path(__file__).parents[2] / "examples" / "diffusion_orpo" / "README.md").read_text()
    missing = [line for line in flag_table(script).splitlines() if line not in readme]
    assert missing == []
