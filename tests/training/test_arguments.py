"""The flags as a whole: each says what it does, each is tried by a test, and FLAGS.md lists them all."""

import ast
from pathlib import Path

import pytest
from orpo.data.flags import IMAGES
from orpo.models.registry import FAMILIES
from orpo.runtime.flags import all_flags
from orpo.training.flags import TRAINING

import train_diffusion_orpo_flux_lora
import train_diffusion_orpo_sd3_lora
import train_diffusion_orpo_sd_lora
import train_diffusion_orpo_sdxl_lora
import train_diffusion_orpo_sdxl_lora_wds
from flags_page import PAGE, flags_page


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
    for path in Path(__file__).parents[1].rglob("*.py"):
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
    declared = all_flags(script.FLAGS)
    assert [flag.name for flag in declared if not flag.help] == []
    always = {"pretrained_model_name_or_path", "dataset_name", "output_dir"}  # positional for `train` and its like
    assert sorted({flag.name for flag in declared} - set_by_tests() - always) == []


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.slug)
def test_a_familys_defaults_are_of_flags_that_there_are(family):
    assert set(family.defaults) <= {flag.name for flag in all_flags([*family.flags, IMAGES, *TRAINING])}


def test_the_page_of_flags_is_what_the_scripts_declare():
    assert PAGE.read_text(encoding="utf-8") == flags_page(), "run `make flags`"
