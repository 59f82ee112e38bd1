"""The JSON file of --bnb_quantization_config_path: what it may say, and what is refused."""

import inspect
import json

import pytest
import torch
from helpers import arguments
from orpo.models.quantization import KEYS, quantization_options, read_bnb_config

from diffusers import BitsAndBytesConfig
from train_diffusion_orpo_sdxl_lora import parse_args


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def parse(path, **flags):
    return parse_args(arguments("unused", "unused", "unused", bnb_quantization_config_path=str(path), **flags))


def write(folder, content: object):
    path = folder / "bnb.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def config_of(args) -> BitsAndBytesConfig:
    options = quantization_options(args, "unet", torch.bfloat16)
    return options["quantization_config"].quant_mapping["unet"]


def test_the_keys_are_those_of_diffusers():
    assert KEYS.keys() == inspect.signature(BitsAndBytesConfig).parameters.keys() - {"kwargs"}


def test_a_file_says_what_its_short_name_says(tmp_path):
    by_flag = parse("nf4")
    assert config_of(parse(write(tmp_path, NF4))).to_dict() == config_of(by_flag).to_dict()


def test_everything_that_the_file_says_counts(tmp_path):
    """Also in a file that BitsAndBytesConfig wrote."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype="float16", llm_int8_skip_modules=["proj_out"]
    )
    args = parse(write(tmp_path, config.to_dict()))
    assert config_of(args).to_dict() == config.to_dict()
    assert json.loads(args.bnb_quantization_config_path)["bnb_4bit_compute_dtype"] == "float16"


def test_the_flag_is_what_the_file_says_and_not_where_it_is(tmp_path):
    """So that a resumed run finds out whether the file has changed."""
    (tmp_path / "a").mkdir()
    assert read_bnb_config(str(write(tmp_path, NF4))) == read_bnb_config(
        str(write(tmp_path / "a", json.dumps(dict(reversed(NF4.items())), indent=1)))
    )
    assert read_bnb_config(str(write(tmp_path, NF4 | {"bnb_4bit_quant_type": "fp4"}))) != json.dumps(NF4)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ([1], "it must hold an object"),
        ({}, "exactly one of load_in_8bit and load_in_4bit"),
        (NF4 | {"load_in_8bit": True}, "exactly one of"),
        (NF4 | {"bnb_4bit_quant_typ": "nf4"}, "BitsAndBytesConfig has no bnb_4bit_quant_typ. It takes load_in_8bit,"),
        (NF4 | {"bnb_4bit_quant_type": "nf5"}, "bnb_4bit_quant_type must be one of fp4, nf4; got 'nf5'"),
        (NF4 | {"bnb_4bit_compute_dtype": "bf16"}, "bnb_4bit_compute_dtype must be one of float16"),
        ({"load_in_4bit": "true"}, "load_in_4bit must be true or false; got 'true'"),
        ({"load_in_8bit": True, "llm_int8_threshold": 6}, "llm_int8_threshold must be 6.0 or another float; got 6"),
        (NF4 | {"bnb_4bit_quant_type": ["nf4"]}, "bnb_4bit_quant_type must be one of"),
    ],
)
def test_a_file_that_would_fail_or_be_ignored_is_refused(tmp_path, content, message, capsys):
    path = write(tmp_path, content)
    with pytest.raises(SystemExit):
        parse(path)
    error = " ".join(capsys.readouterr().err.split())
    assert f"--bnb_quantization_config_path={path}" in error and message in error


def test_a_missing_file_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse(tmp_path / "none.json")
    assert "none.json can't be read" in capsys.readouterr().err


def test_caption_dropout_is_another_name_of_proportion_empty_prompts():
    """As diffusers' newest scripts call it."""
    assert parse_args(arguments("a", "b", "c", caption_dropout=0.25)).proportion_empty_prompts == 0.25
