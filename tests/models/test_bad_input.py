"""The newer families refuse what does not fit before any weights load, and say what would."""

import json
import re
import shutil
from pathlib import Path

import pytest
from families import FAMILIES

from diffusers import AutoencoderKL, AutoencoderKLQwenImage, DiffusionPipeline


NAMES = ("z_image", "flux2", "qwen_image")
VAES = {"z_image": "AutoencoderKL", "flux2": "AutoencoderKLFlux2", "qwen_image": "AutoencoderKLQwenImage"}


@pytest.fixture(params=NAMES)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def no_weights(models, monkeypatch):
    """Loading any would fail with another error than the one expected."""
    assert all(map(models.__getitem__, FAMILIES))  # made, which loads the demo's VAE
    for loader in (DiffusionPipeline, AutoencoderKL, AutoencoderKLQwenImage):
        monkeypatch.setattr(loader, "from_pretrained", None)


def refusal(name: str, model: str, **flags) -> str:
    family = FAMILIES[name]
    with pytest.raises(ValueError) as raised:
        family.cls.check(family.parse_args(model, **flags))
    return str(raised.value)


def save_vae(folder: Path, blocks: int = 4, channels: int = 4) -> str:
    AutoencoderKL(
        block_out_channels=(8,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=4,
    ).save_pretrained(folder)
    return str(folder)


def test_a_pipeline_of_another_family(name, models):
    for other in NAMES:
        if other != name:
            pipelines = [FAMILIES[which].cls.pipeline_class.__name__ for which in (other, name)]
            message = refusal(name, models[other])
            assert f"is a {pipelines[0]}: this script trains" in message and message.endswith(f"a {pipelines[1]}.")


def test_the_vae_of_another_family(name, models):
    for other in NAMES:
        if other != name:
            vae = str(Path(models[other]) / "vae")
            message = refusal(name, models[name], pretrained_vae_model_name_or_path=vae)
            assert message.endswith(f"is an {VAES[other]}: an {VAES[name]} is needed.")


def test_a_vae_with_other_channels(models, tmp_path):
    vae = save_vae(tmp_path / "kl", channels=16)
    assert "takes 4 channels, and the VAE in" in refusal(
        "z_image", models["z_image"], pretrained_vae_model_name_or_path=vae
    )
    shutil.copytree(Path(models["qwen_image"]) / "vae", tmp_path / "qwen")
    config = json.loads((tmp_path / "qwen" / "config.json").read_text())
    config |= {"z_dim": 8, "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8}
    (tmp_path / "qwen" / "config.json").write_text(json.dumps(config))
    message = refusal("qwen_image", models["qwen_image"], pretrained_vae_model_name_or_path=str(tmp_path / "qwen"))
    assert "takes 16 channels, and the VAE in" in message and "makes 32" in message


def test_a_vae_that_reduces_by_another_factor(models, tmp_path):
    """Its latents have the right channels, but half of the height and width that the transformer knows."""
    vae = save_vae(tmp_path / "deep", blocks=5)
    message = refusal("z_image", models["z_image"], pretrained_vae_model_name_or_path=vae)
    assert re.search("one latent of 16 pixels along a side, and that of .* one of 8", message)


def test_more_tokens_than_the_flag_or_the_encoder_allows(name, models, tmp_path, capsys):
    """The pipeline's limit is the flag's; a text encoder may have a smaller one."""
    highest = 1024 if name == "qwen_image" else 512
    with pytest.raises(SystemExit):
        FAMILIES[name].parse_args(models[name], max_sequence_length=highest + 1)
    assert f"--max_sequence_length must be between 1 and {highest}; got {highest + 1}" in capsys.readouterr().err
    model = shutil.copytree(models[name], tmp_path / "model")
    file = model / "text_encoder" / "config.json"
    config = json.loads(file.read_text())
    config.get("text_config", config)["max_position_embeddings"] = 16
    file.write_text(json.dumps(config))
    message = refusal(name, str(model), max_sequence_length=20)
    assert (
        "--max_sequence_length=20: the text_encoder of" in message
        and "Give --max_sequence_length=16 or less" in message
    )
