"""Models that are not what they seem are refused from their configuration files: no weights are read, and none are there."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from families import FAMILIES, save_tiny
from helpers import without_weights
from orpo.config import ModelConfig
from orpo.models.sd3 import StableDiffusion3
from orpo.models.sdxl import StableDiffusionXL

from diffusers import AutoencoderKL, DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, UNet2DConditionModel


SDXL_LAYERS = "to_q,to_v"


@pytest.fixture
def folder(tiny_sdxl, tmp_path) -> Path:
    """A tiny SDXL without weights."""
    return without_weights(tiny_sdxl, tmp_path / "model")


def check(folder, **options) -> None:
    StableDiffusionXL.check(
        ModelConfig(pretrained_model_name_or_path=str(folder), **{"lora_layers": SDXL_LAYERS} | options)
    )


def change(file: Path, **fields) -> None:
    """Changes fields of a JSON file; None removes one."""
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_configuration_files_are_enough(folder):
    check(folder)


SCHEDULERS = {
    "EDM": ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler.*another kind"),
    "flow matching": ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "FlowMatchEulerDiscreteScheduler"),
    "flow in another sampler": (
        {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True},
        "DPMSolverMultistepScheduler with use_flow_sigmas",
    ),
    "of no library": ({"_class_name": "MyScheduler"}, "the scheduler MyScheduler"),
    "no betas": (
        {"beta_start": None, "beta_schedule": None},
        "lacks beta_start, beta_schedule in scheduler_config.json",
    ),
    "unknown betas": ({"beta_schedule": "spiral"}, "beta_schedule 'spiral'"),
    "predicts the image": ({"prediction_type": "sample"}, "predicts 'sample'"),
    "zero terminal SNR": ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr.*--prediction_type=v_prediction"),
}


@pytest.mark.parametrize("case", SCHEDULERS)
def test_noise_of_another_kind_is_refused(folder, case):
    fields, message = SCHEDULERS[case]
    change(folder / "scheduler" / "scheduler_config.json", **fields)
    with pytest.raises(ValueError, match=message):
        check(folder)


@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, EulerDiscreteScheduler])
def test_the_schedule_is_the_models_whatever_its_sampler(folder, scheduler_class):
    """Betas, their rescaling and the prediction type come from it; in float64 from their definitions."""
    fields = {"beta_start": 0.001, "beta_end": 0.015, "beta_schedule": "scaled_linear", "steps_offset": 1}
    fields |= {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    scheduler_class(**fields).save_pretrained(folder / "scheduler")
    model = StableDiffusionXL(
        ModelConfig(pretrained_model_name_or_path=str(folder), lora_layers=SDXL_LAYERS, snr_gamma=5.0),
        torch.device("cpu"),
        torch.float32,
    )
    betas = torch.linspace(0.001**0.5, 0.015**0.5, 1000, dtype=torch.float64) ** 2
    roots = (1 - betas).cumprod(0).sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])  # arXiv 2305.08891, algorithm 1
    timesteps = torch.tensor([0, 500, 999])
    latents, noise = torch.randn(2, 3, 4, 8, 8).unbind()
    root = roots[timesteps].view(3, 1, 1, 1)
    noisy = model.noise_process.add_noise(latents, noise, timesteps)
    expected = root * latents + (1 - root**2).sqrt() * noise
    torch.testing.assert_close(noisy.double(), expected.double(), rtol=0, atol=2e-3)
    assert model.noise_process.weights(timesteps).isfinite().all()


def test_edm_of_diffusers_own_making_is_refused(folder):
    EDMEulerScheduler().save_pretrained(folder / "scheduler")
    with pytest.raises(ValueError, match="EDMEulerScheduler"):
        check(folder)


def test_a_vaes_mean_and_std_normalise_the_latents_and_are_taken_back_to_draw(tiny_sdxl, tmp_path):
    """As Playground 2.5 has them: the pipeline decodes latents * std / factor + mean."""
    mean, std = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
    vae = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae")
    vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    options = ModelConfig(
        pretrained_model_name_or_path=tiny_sdxl,
        pretrained_vae_model_name_or_path=str(tmp_path),
        lora_layers=SDXL_LAYERS,
    )
    model = StableDiffusionXL.load(options, torch.device("cpu"), torch.float32)
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        posterior = vae.encode(pixels / 127.5 - 1).latent_dist
    sample = posterior.sample([torch.Generator().manual_seed(i) for i in range(2)])
    latents = model.sample_latents(model.encode_images(pixels), [torch.Generator().manual_seed(i) for i in range(2)])
    decoded = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.5 + torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(decoded, sample, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        image, expected = model.vae.decode(model.pipeline.vae, latents), vae.decode(sample).sample
    torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-3)


def test_statistics_that_the_pipeline_does_not_apply_are_refused(folder):
    change(folder / "vae" / "config.json", shift_factor=0.1)
    with pytest.raises(ValueError, match="shift_factor"):
        check(folder)


def test_a_vae_of_another_class_is_refused(folder):
    change(folder / "vae" / "config.json", _class_name="AutoencoderTiny")
    with pytest.raises(ValueError, match="AutoencoderTiny: an AutoencoderKL is needed"):
        check(folder)


@pytest.mark.parametrize(
    ("field", "message"), [("in_channels", "takes 9 channels"), ("time_cond_proj_dim", "guidance")]
)
def test_unets_for_something_else_are_refused(folder, field, message):
    change(folder / "unet" / "config.json", **{field: 9})
    with pytest.raises(ValueError, match=message):
        check(folder)


def test_modules_that_are_not_there_are_named(folder):
    """As in SDXL's refiner, which lacks the first text encoder; and in a download that was not finished."""
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(ValueError, match="the text_encoder_2 in .* is missing. Download"):
        check(folder)
    change(folder / "model_index.json", text_encoder=[None, None], tokenizer=[None, None])
    with pytest.raises(ValueError, match="saved without text_encoder, tokenizer"):
        check(folder)


def test_what_is_no_folder_of_a_pipeline_is_refused_with_the_way_out(folder, tmp_path):
    (tmp_path / "xl.safetensors").touch()
    with pytest.raises(ValueError, match="single file.*from_single_file.*save_pretrained") as error:
        check(tmp_path / "xl.safetensors")
    assert "import StableDiffusionXLPipeline" in str(error.value)
    (folder / "model_index.json").unlink()
    with pytest.raises(ValueError, match="model_index.json can't be read"):
        check(folder)


def test_a_vae_in_a_single_file_is_refused(folder):
    with pytest.raises(ValueError, match="--pretrained_vae_model_name_or_path=.*single file"):
        check(folder, pretrained_vae_model_name_or_path="vae.safetensors")


LAYERS = {
    "": "--lora_layers is empty",
    "to_q,": "nothing",
    "norm1": "norm1 in the unet is a GroupNorm",
    "to_out": "to_out in the unet is a ModuleList",
    "to_q,all-linear": "no module called all-linear",
    "o_q": "no module called o_q",  # a part of to_q
}


@pytest.mark.parametrize("layers", LAYERS)
def test_layers_that_can_have_no_lora_are_refused(folder, layers):
    with pytest.raises(ValueError, match=LAYERS[layers]):
        check(folder, lora_layers=layers)


def test_layers_may_be_convolutions_and_ends_of_names(folder):
    check(folder, lora_layers="conv1, attn2.to_out.0,mid_block.attentions.0.proj_in")
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(folder, subfolder="unet"))
    assert isinstance(unet.get_submodule("mid_block.resnets.0.conv1"), torch.nn.Conv2d)


def test_sd3_without_t5_reads_prompts_as_its_pipeline_does(tmp_path):
    """The usual way to save memory: T5's hidden states are zeros."""
    import diffusers

    family = FAMILIES["sd3"]
    folder = Path(save_tiny("sd3", tmp_path / "model"))
    for name in ("text_encoder_3", "tokenizer_3"):
        shutil.rmtree(folder / name)
    change(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    loaded = family.load(str(folder))
    for_cache = StableDiffusion3.load(loaded.options, loaded.device, loaded.dtype, denoiser=False)
    pipeline = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    expected, _, pooled, _ = pipeline.encode_prompt(["a red ball"], None, None, **family.call_options)
    for model in (loaded, for_cache):
        embeds = model.encode_prompts(["a red ball"])
        torch.testing.assert_close(embeds["prompt_embeds"], expected)
        torch.testing.assert_close(embeds["pooled_prompt_embeds"], pooled)
    assert "text_encoder_3=None" in loaded.inference_snippet("lora", "a red ball", 4, 1.0)
    identity = StableDiffusion3.encoding_identity(loaded.options, torch.float32)
    assert identity["text_encoder_3"] == identity["tokenizer_3"] == "none"


def test_a_distilled_model_is_pointed_out(tiny_sdxl, tmp_path, caplog):
    folder = shutil.copytree(tiny_sdxl, tmp_path / "sdxl-turbo")
    for source, is_distilled in ((tiny_sdxl, False), (folder, True)):
        caplog.clear()
        StableDiffusionXL.load(
            ModelConfig(pretrained_model_name_or_path=str(source), lora_layers=SDXL_LAYERS),
            torch.device("cpu"),
            torch.float32,
            encoders=False,
        )
        assert ("distilled to generate in few steps" in caplog.text) == is_distilled
