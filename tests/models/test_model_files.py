"""A base of which a file is missing or broken is refused before any weights load, in one sentence with the way out."""

import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, load_pipeline
from orpo.config import ModelConfig
from orpo.models.sdxl import StableDiffusionXL

from diffusers import StableDiffusionXLPipeline


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n"


@pytest.fixture(scope="module")
def pipeline(tiny_sdxl):
    return load_pipeline(tiny_sdxl)


@pytest.fixture(scope="module")
def saved(tiny_sdxl, pipeline, tmp_path_factory) -> dict[str, Path]:
    """The same pipeline in all the forms that diffusers saves."""
    folder = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder / "fp16", variant="fp16")
    pipeline.save_pretrained(folder / "bin", safe_serialization=False)
    pipeline.save_pretrained(folder / "sharded", max_shard_size="100KB")
    pipeline.save_pretrained(folder / "sharded-fp16", max_shard_size="100KB", variant="fp16")
    return {"plain": Path(tiny_sdxl)} | {path.name: path for path in folder.iterdir()}


@pytest.fixture
def model(saved, tmp_path):
    """Makes a copy of one of these."""
    return lambda form: Path(shutil.copytree(saved[form], tmp_path / "model"))


def load(folder, check_only: bool = True, **options):
    options = ModelConfig(pretrained_model_name_or_path=str(folder), lora_layers="to_q", resolution=64, **options)
    StableDiffusionXL.check(options)
    return None if check_only else StableDiffusionXL.load(options, torch.device("cpu"), torch.float32)


def refusal(folder, **options) -> str:
    with pytest.raises(ValueError) as raised:
        load(folder, **options)
    message = str(raised.value)
    assert "\n" not in message and message.endswith((".", "=fp16."))
    return message


@pytest.mark.parametrize("form", ["plain", "fp16", "bin", "sharded", "sharded-fp16"])
def test_every_form_that_diffusers_saves_loads(form, saved, pipeline):
    variant = "fp16" if "fp16" in form else None
    model = load(saved[form], check_only=False, variant=variant)
    frozen = {name: value for name, value in model.denoiser.state_dict().items() if "lora" not in name}
    expected = pipeline.unet.state_dict()
    assert all(torch.equal(value, expected[name.replace(".base_layer", "")]) for name, value in frozen.items())


@pytest.mark.parametrize("form", ["fp16", "sharded-fp16"])
def test_a_variant_that_was_not_asked_for(form, saved):
    message = refusal(saved[form])
    assert "the unet in" in message and "has only fp16 files: give --variant=fp16." in message


def test_a_variant_that_is_not_there(saved):
    message = refusal(saved["plain"], variant="fp16")
    assert "the unet in" in message and "has no fp16 files: leave out --variant=fp16" in message


def test_modules_without_the_variant_load_without_it_as_in_diffusers(model, saved):
    folder = model("fp16")
    for name in ("vae", "text_encoder"):
        shutil.rmtree(folder / name)
        shutil.copytree(saved["plain"] / name, folder / name)
    StableDiffusionXLPipeline.from_pretrained(folder, variant="fp16")
    load(folder, check_only=False, variant="fp16")


MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")
BROKEN = {
    "missing": (lambda file: file.unlink(), "has no weights, such as"),
    "cut in half": (lambda file: file.write_bytes(file.read_bytes()[:-1000]), "is cut off after"),
    "cut in the header": (lambda file: file.write_bytes(file.read_bytes()[:100]), "is cut off after 100 of"),
    "empty": (lambda file: file.write_bytes(b""), "is cut off after 0"),
    "an LFS pointer": (
        lambda file: file.write_bytes(POINTER),
        "is a Git LFS pointer, not the file itself. Run `git lfs",
    ),
}


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("module", MODULES)
def test_a_file_of_weights(module, broken, model):
    folder = model("plain")
    (file,) = (folder / module).glob("*.safetensors")
    change, part = BROKEN[broken]
    change(file)
    message = refusal(folder)
    assert f"the {module} in {folder / module}" in message and part in message
    assert "ownload" in message


def test_an_older_file_is_used_where_there_is_no_safetensors(model):
    folder = model("bin")
    load(folder)
    (file,) = (folder / "unet").glob("*.bin")
    file.write_bytes(file.read_bytes()[:-1000])
    assert "the unet in" in (message := refusal(folder)) and f"{file.name} is cut off after" in message


@pytest.mark.parametrize("form", ["sharded", "sharded-fp16"])
def test_a_part_of_several(form, model):
    folder = model(form)
    variant = "fp16" if "fp16" in form else None
    last = sorted((folder / "unet").glob("*-of-*.safetensors"))[-1]
    last.write_bytes(POINTER)
    assert f"{last.name} is a Git LFS pointer" in refusal(folder, variant=variant)
    last.unlink()
    assert f"lacks {last.name}, which " in refusal(folder, variant=variant)


SMALL = [
    ("scheduler/scheduler_config.json", "the scheduler in"),
    ("tokenizer/tokenizer.json", "the tokenizer in"),
    ("tokenizer_2/tokenizer.json", "the tokenizer_2 in"),
    ("unet/config.json", "the unet in"),
    ("vae/config.json", "the vae in"),
    ("text_encoder/config.json", "the text_encoder in"),
]


@pytest.mark.parametrize("name, where", SMALL)
def test_a_file_of_settings_or_of_words(name, where, model):
    folder = model("plain")
    content = (folder / name).read_bytes()
    for written, part in (
        (POINTER, "is a Git LFS pointer"),
        (b"", "is cut off after 0"),
        (content[:-20], "is not JSON"),
        (None, "has no "),
    ):
        (folder / name).unlink() if written is None else (folder / name).write_bytes(written)
        message = refusal(folder)
        assert where in message and part in message and Path(name).name in message
    shutil.rmtree((folder / name).parent)
    assert where in (message := refusal(folder)) and "is missing. Download the whole model" in message


def test_a_vae_of_its_own_and_a_model_for_validation_are_checked_too(tiny_sdxl, tmp_path):
    vae = Path(shutil.copytree(Path(tiny_sdxl) / "vae", tmp_path / "vae"))
    load(tiny_sdxl, pretrained_vae_model_name_or_path=str(vae))
    (vae / "diffusion_pytorch_model.safetensors").unlink()
    message = refusal(tiny_sdxl, pretrained_vae_model_name_or_path=str(vae))
    assert message.startswith("--pretrained_vae_model_name_or_path: the VAE in") and "has no weights" in message
    other = Path(shutil.copytree(tiny_sdxl, tmp_path / "other"))
    (other / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    message = refusal(tiny_sdxl, validation_model_path=str(other))
    assert message.startswith("--validation_model_path=") and "Git LFS" in message


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_is_checked(name, models, tmp_path):
    family, folder = FAMILIES[name], Path(shutil.copytree(models[name], tmp_path / "model"))
    options = ModelConfig(
        pretrained_model_name_or_path=str(folder),
        lora_layers="to_q",
        resolution=64,
        max_sequence_length=12,
        guidance_scale=1.0,
    )
    family.cls.check(options)
    modules = [family.cls.denoiser_name, "vae", *family.cls.text_encoder_names]
    for module in modules:
        (file,) = (folder / module).glob("*.safetensors")
        content = file.read_bytes()
        file.write_bytes(content[:-100])
        with pytest.raises(ValueError, match=f"the {module} in .* is cut off"):
            family.cls.check(options)
        file.write_bytes(content)
    (folder / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="the tokenizer in .* has no tokenizer.json or vocab.json with merges.txt"):
        family.cls.check(options)
