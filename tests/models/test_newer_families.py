"""Z-Image, FLUX.2 klein and Qwen-Image: predictions, latents and prompts are those of their pipelines."""

import pytest
import torch
from families import FAMILIES, load_pipeline, save_tiny

from tiny_qwen import build_qwen_tokenizer


NAMES = ("z_image", "flux2", "qwen_image")
PROMPTS = ["a red ball", "a prompt that is longer than these flags allow, whichever of the models is asked " * 3]
NO_GUIDANCE = {
    "z_image": {"guidance_scale": 0.0},
    "flux2": {"guidance_scale": 1.0},
    "qwen_image": {"true_cfg_scale": 1.0},
}


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


@pytest.fixture(scope="module")
def family(name):
    return FAMILIES[name]


@pytest.fixture(scope="module")
def model(name, models) -> str:
    return models[name]


@pytest.fixture(scope="module")
def loaded(family, model):
    return family.load(model)


def patches(latents: torch.Tensor) -> torch.Tensor:
    """Latents (N, C, h, w) in 2x2 patches (N, 4C, h/2, w/2), each built by itself."""
    rows = [
        torch.stack(
            [latents[:, :, i : i + 2, j : j + 2].flatten(1) for j in range(0, latents.shape[3], 2)], dim=-1
        )  # (N, 4C, w/2)
        for i in range(0, latents.shape[2], 2)
    ]
    return torch.stack(rows, dim=2)


def tokens(patched: torch.Tensor) -> torch.Tensor:
    """(N, C, h, w) as (N, h * w, C)."""
    return patched.flatten(2).transpose(1, 2)


# Latents as the denoiser's pipeline has them in its loop, from those that training has.
IN_THE_PIPELINE = {"z_image": lambda x: x, "flux2": tokens, "qwen_image": lambda x: tokens(patches(x))}


@pytest.mark.parametrize("height, width", [(64, 64), (48, 80)])
def test_a_prediction_is_what_the_pipeline_hands_to_its_scheduler(name, family, model, loaded, height, width):
    """For four images, the winners of two pairs before the losers, and prompts of different lengths."""
    shape = (4, 16, height // 16, width // 16) if name == "flux2" else (4, 4, height // 8, width // 8)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    pipeline, calls = load_pipeline(model), []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda velocity, t, *args, **named: (
        calls.append((velocity, t)) or step(velocity, t, *args, **named)
    )
    given = IN_THE_PIPELINE["qwen_image"](latents) if name == "qwen_image" else latents
    size = {"height": height, "width": width, "num_inference_steps": 3, "output_type": "latent"}
    options = NO_GUIDANCE[name] | {"max_sequence_length": family.call_options["max_sequence_length"]}
    pipeline(prompt=PROMPTS * 2, latents=given, **size, **options)
    expected, timestep = calls[0]
    with torch.no_grad():
        ours = loaded.predict(loaded.denoiser, latents, timestep.expand(4), loaded.encode_prompts(PROMPTS), {})
    assert ours.shape == latents.shape and ours.std() > 1e-3
    torch.testing.assert_close(IN_THE_PIPELINE[name](ours), expected, rtol=0, atol=1e-5)


def test_embeddings_of_a_batch_are_those_of_each_prompt_alone(loaded):
    """As a cache needs them: of one shape, whatever else was in the batch."""
    together = loaded.encode_prompts(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        for key, rows in loaded.encode_prompts([prompt]).items():
            torch.testing.assert_close(rows[0], together[key][i], rtol=1e-4, atol=1e-5)
            assert rows.shape[1:] == together[key].shape[1:]


def test_prompts_are_left_as_they_are(loaded):
    """Z-Image's pipeline writes into the list that it is handed."""
    prompts = list(PROMPTS)
    loaded.encode_prompts(prompts)
    assert prompts == PROMPTS


def test_moments_are_those_of_normalised_latents(name, loaded, model):
    """By the statistics that each pipeline undoes before it decodes, in float64."""
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    vae = load_pipeline(model).vae
    images = pixels / 127.5 - 1
    with torch.no_grad():
        posterior = vae.encode(images.unsqueeze(2) if name == "qwen_image" else images).latent_dist
    mean, std = posterior.mean.double(), posterior.std.double()
    if name == "z_image":
        shift, scale = vae.config.shift_factor, 1 / vae.config.scaling_factor
    elif name == "flux2":
        mean, std = patches(mean), patches(std)
        shift = vae.bn.running_mean.double().view(1, -1, 1, 1)
        scale = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt().view(1, -1, 1, 1)
    else:
        mean, std = mean[:, :, 0], std[:, :, 0]
        shift, scale = (
            torch.tensor(v).double().view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
        )
    ours_mean, ours_log_variance = loaded.encode_images(pixels).double().chunk(2, dim=1)
    torch.testing.assert_close(ours_mean, (mean - shift) / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close((ours_log_variance / 2).exp(), std / scale, rtol=1e-4, atol=1e-6)


def test_decoding_undoes_encoding(loaded):
    """Up to what the VAE itself loses: the decoder's own image of the mean."""
    pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    module = loaded.pipeline.vae
    mean, _ = loaded.encode_images(pixels).chunk(2, dim=1)
    images = pixels / 127.5 - 1
    with torch.no_grad():
        if images.ndim < module.encoder.conv_in.weight.ndim:
            expected = module.decode(module.encode(images.unsqueeze(2)).latent_dist.mode()).sample.squeeze(2)
        else:
            expected = module.decode(module.encode(images).latent_dist.mode()).sample
        torch.testing.assert_close(loaded.vae.decode(module, mean), expected, rtol=1e-3, atol=1e-4)


def test_the_lora_of_flux2_covers_both_kinds_of_blocks(tmp_path):
    """As in diffusers' script: attention of the double blocks, and both fused projections of the single ones."""
    model = save_tiny("flux2", tmp_path, num_layers=1, num_single_layers=2)
    denoiser = FAMILIES["flux2"].load(model).denoiser
    modules = {name for name, module in denoiser.named_modules() if hasattr(module, "lora_A")}
    double = {f"transformer_blocks.0.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")}
    single = {f"single_transformer_blocks.{i}.attn.{name}" for i in (0, 1) for name in ("to_qkv_mlp_proj", "to_out")}
    assert modules == double | single


def test_the_tiny_tokenizer_makes_qwen_images_template_34_tokens():
    """Which the pipeline drops; were it another number, prompts would be cut or the template kept."""
    template = (
        "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
        "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n"
    )
    assert len(build_qwen_tokenizer(["red"])(template).input_ids) == 34
