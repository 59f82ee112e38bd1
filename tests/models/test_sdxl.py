"""The SDXL family: against diffusers' own pipeline wherever that computes the same thing."""

import json
import os

import numpy as np
import pytest
import torch
from helpers import arguments
from orpo.models.sdxl import StableDiffusionXL
from safetensors import safe_open

from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from train_diffusion_orpo_sdxl_lora import parse_args


PROMPTS = ["a red ball", "", "a prompt that is much longer than the tokenizer of this model allows " * 3]


def load(source: str, dtype=torch.float32, **flags) -> StableDiffusionXL:
    args = parse_args(arguments(source, "unused", "unused", **flags))
    return StableDiffusionXL.load(args, torch.device("cpu"), dtype)


def randomize_lora(model: StableDiffusionXL) -> None:
    """A fresh LoRA adds nothing, its B matrices being zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)


def predict(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    x, text, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 24, 64), (2, 32)))
    time_ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)
    with torch.no_grad():
        return unet(
            x, torch.tensor([3, 700]), text, added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids}
        ).sample


def time_ids_given_to_the_unet(model, batch: dict) -> torch.Tensor:
    given = []
    unet = lambda *args, added_cond_kwargs, return_dict: given.append(added_cond_kwargs["time_ids"]) or (None,)  # noqa: E731
    model.predict(unet, torch.zeros(2, 4, 8, 8), torch.tensor([5, 5]), model.encode_prompts(batch["prompts"]), batch)
    return given[0]


def test_prompts_are_encoded_as_the_pipeline_does(tiny_sdxl):
    model = load(tiny_sdxl)
    embeds = model.encode_prompts(PROMPTS)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    expected, _, expected_pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    assert torch.equal(embeds["prompt_embeds"], expected)
    assert torch.equal(embeds["pooled_prompt_embeds"], expected_pooled)


def test_time_ids_are_those_of_the_pipeline(tiny_sdxl):
    model = load(tiny_sdxl)
    batch = {
        "prompts": ["a"],
        "original_sizes": torch.tensor([[480, 640], [900, 700]]),
        "crop_top_lefts": torch.tensor([[0, 10], [9, 0]]),
    }
    expected = [
        model.pipeline._get_add_time_ids(size, corner, (64, 64), torch.float32, text_encoder_projection_dim=32)
        for size, corner in (((480, 640), (0, 10)), ((900, 700), (9, 0)))
    ]
    assert torch.equal(time_ids_given_to_the_unet(model, batch), torch.cat(expected))


def test_latents_are_samples_of_the_vaes_posterior(tiny_sdxl):
    """Mean and spread over many seeds against the posterior's own; scaled; one generator per image."""
    model = load(tiny_sdxl, vae_encode_batch_size=3)
    pixel_values = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    posterior = model.pipeline.vae.encode(pixel_values / 127.5 - 1).latent_dist
    moments = model.encode_images(pixel_values)
    draws = torch.stack(
        [model.sample_latents(moments, [torch.Generator().manual_seed(s + k) for k in (0, 1000)]) for s in range(400)]
    )
    scale = model.pipeline.vae.config.scaling_factor
    error = (draws.mean(dim=0) - scale * posterior.mean) / (scale * posterior.std / 20)
    assert error.abs().max() < 5.5
    torch.testing.assert_close(draws.std(dim=0), scale * posterior.std, rtol=0.25, atol=0)


def test_vae_encode_batch_size_bounds_the_batch_and_changes_nothing(tiny_sdxl):
    pixel_values = torch.randint(0, 256, (5, 3, 64, 64), dtype=torch.uint8)
    latents, sizes = {}, {}
    for size in (1, 2, 8):
        model = load(tiny_sdxl, vae_encode_batch_size=size)
        encode, sizes[size] = model.pipeline.vae.encode, []
        model.pipeline.vae.encode = lambda x, encode=encode, seen=sizes[size]: seen.append(len(x)) or encode(x)
        latents[size] = model.encode_images(pixel_values)
    assert sizes == {1: [1] * 5, 2: [2, 2, 1], 8: [5]}
    torch.testing.assert_close(latents[1], latents[8], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latents[2], latents[8], rtol=1e-4, atol=1e-5)


def test_pixels_are_rounded_once(tiny_sdxl):
    """In half precision, 256 levels from -1 to 1 are the nearest numbers that there are."""
    model, seen = load(tiny_sdxl, torch.bfloat16), []
    model.pipeline.vae.to(torch.bfloat16)
    model.pipeline.vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    model.encode_images(levels)
    assert torch.equal(seen[0], (levels.double() / 127.5 - 1).to(torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_lora_is_float32_and_alone_trains(tiny_sdxl, dtype):
    model = load(tiny_sdxl, dtype)
    for name, parameter in model.denoiser.named_parameters():
        assert parameter.requires_grad == ("lora" in name)
        assert parameter.dtype == (torch.float32 if "lora" in name else dtype)
    for module in (model.pipeline.vae, model.pipeline.text_encoder, model.pipeline.text_encoder_2):
        assert not any(parameter.requires_grad for parameter in module.parameters())
        assert module.dtype == dtype


def test_the_lora_stays_float32_when_it_is_loaded(tiny_sdxl, tmp_path):
    model = load(tiny_sdxl, torch.bfloat16)
    randomize_lora(model)
    before = {name: p.clone() for name, p in model.denoiser.named_parameters() if p.requires_grad}
    model.save_lora(tmp_path)
    model.load_lora(tmp_path)
    after = {name: p for name, p in model.denoiser.named_parameters() if p.requires_grad}
    assert all(p.dtype == torch.float32 for p in after.values())
    torch.testing.assert_close(after, before, rtol=0, atol=0)


def test_a_vae_that_overflows_in_half_precision_stays_float32(tiny_sdxl, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae")
    vae.register_to_config(force_upcast=True)
    vae.save_pretrained(tmp_path)
    model = load(tiny_sdxl, torch.bfloat16, pretrained_vae_model_name_or_path=tmp_path)
    assert model.pipeline.vae.dtype == torch.float32
    assert model.denoiser.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):  # as accelerate wraps the U-Net's forward pass
        (image,) = model.generate(["a red ball"], [0], steps=2, guidance_scale=3.0)
    assert image.size == (64, 64)


def test_the_vae_named_by_the_flag_is_used(tiny_sdxl, tmp_path):
    vae = AutoencoderKL.from_pretrained(tiny_sdxl, subfolder="vae")
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    assert load(tiny_sdxl, pretrained_vae_model_name_or_path=tmp_path).pipeline.vae.config.scaling_factor == 0.5


def test_rank_alpha_layers_and_dropout_reach_the_lora(tiny_sdxl):
    model = load(tiny_sdxl, rank=3, lora_alpha=7.5, lora_layers="to_q, to_v", lora_dropout=0.25)
    config = model.denoiser.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 7.5, 0.25)
    names = {
        name.split(".lora")[0].rsplit(".", 1)[1] for name, p in model.denoiser.named_parameters() if "lora" in name
    }
    assert names == {"to_q", "to_v"}
    assert load(tiny_sdxl, rank=3).denoiser.peft_config["default"].lora_alpha == 3


def test_lora_dropout_acts_in_training_only(tiny_sdxl):
    model = load(tiny_sdxl, lora_dropout=0.5)
    randomize_lora(model)
    model.denoiser.train()
    assert not torch.equal(predict(model.denoiser), predict(model.denoiser))
    model.denoiser.eval()
    assert torch.equal(predict(model.denoiser), predict(model.denoiser))


def test_unknown_lora_layers_are_an_error(tiny_sdxl):
    with pytest.raises(ValueError, match="no module called no_such_layer"):
        load(tiny_sdxl, lora_layers="to_q,no_such_layer")


@pytest.mark.parametrize("alpha", [None, 1.5])
def test_the_saved_lora_gives_the_training_time_output_in_a_fresh_pipeline(tiny_sdxl, tmp_path, alpha):
    model = load(tiny_sdxl, rank=4, lora_alpha=alpha)
    base = predict(model.denoiser)
    randomize_lora(model)
    trained = predict(model.denoiser.eval())
    model.save_lora(tmp_path)

    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.load_lora_weights(tmp_path)
    config = next(iter(pipeline.unet.peft_config.values()))
    assert (config.r, config.lora_alpha) == (4, alpha or 4)
    assert (trained - base).abs().max() > 0.01
    torch.testing.assert_close(predict(pipeline.unet), trained, rtol=1e-4, atol=1e-5)


def test_a_lora_of_other_modules_is_refused(tiny_sdxl, tmp_path):
    load(tiny_sdxl, lora_layers="to_q").save_lora(tmp_path)
    with pytest.raises(ValueError, match="other modules"):
        load(tiny_sdxl).load_lora(tmp_path)


def test_gradient_checkpointing_is_switched_on_and_changes_no_gradient(tiny_sdxl):
    gradients = []
    for flag in (False, True):
        model = load(tiny_sdxl, gradient_checkpointing=flag)
        randomize_lora(model)
        assert model.denoiser.is_gradient_checkpointing == flag
        model.denoiser.train()
        x, text = torch.ones(1, 4, 8, 8), torch.ones(1, 24, 64)
        extra = {"text_embeds": torch.ones(1, 32), "time_ids": torch.ones(1, 6)}
        model.denoiser(x, torch.tensor([5]), text, added_cond_kwargs=extra).sample.square().mean().backward()
        gradients.append([p.grad for p in model.denoiser.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)


def test_drawing_is_a_function_of_prompt_and_seed(tiny_sdxl):
    model = load(tiny_sdxl)
    images = [np.asarray(model.generate(["a red ball"], [seed], steps=2, guidance_scale=3.0)[0]) for seed in (0, 0, 1)]
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])


def test_drawing_equals_the_pipeline(tiny_sdxl):
    model = load(tiny_sdxl)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    expected = pipeline(
        "a red ball",
        height=64,
        width=64,
        num_inference_steps=3,
        guidance_scale=4.0,
        generator=torch.Generator().manual_seed(5),
    ).images[0]
    (drawn,) = model.generate(["a red ball"], [5], steps=3, guidance_scale=4.0)
    assert np.abs(np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_revision_variant_and_cache_dir_reach_every_download(tiny_sdxl, tmp_path, monkeypatch):
    """The Hub is out of reach here: what the loaders would ask it for is recorded on the way in."""
    seen = []
    StableDiffusionXLPipeline.from_pretrained(tiny_sdxl).save_pretrained(tmp_path, variant="fp16")
    for cls in (AutoencoderKL, StableDiffusionXLPipeline):
        original = cls.from_pretrained.__func__

        def record(cls, source, original=original, **options):
            seen.append(
                (cls.__name__, {name: options.pop(name, None) for name in ("revision", "variant", "cache_dir")})
            )
            return original(cls, source, variant="fp16", **options)

        monkeypatch.setattr(cls, "from_pretrained", classmethod(record))
    load(str(tmp_path), revision="abc", variant="fp16", cache_dir="/a/cache")
    assert [name for name, _ in seen] == ["AutoencoderKL", "StableDiffusionXLPipeline"]
    assert all(options == {"revision": "abc", "variant": "fp16", "cache_dir": "/a/cache"} for _, options in seen)


def test_the_variants_files_are_loaded(tiny_sdxl, tmp_path):
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_sdxl)
    pipeline.unet.conv_out.bias.data.fill_(3.0)
    pipeline.save_pretrained(tmp_path, variant="fp16")
    assert load(str(tmp_path), variant="fp16").denoiser.conv_out.bias.eq(3.0).all()


def test_sizes_are_not_rounded_in_half_precision(tiny_sdxl):
    model = load(tiny_sdxl, torch.bfloat16)
    sizes = torch.tensor([[1023, 1365], [1537, 771]])
    batch = {"prompts": ["a"], "original_sizes": sizes, "crop_top_lefts": torch.tensor([[0, 357], [301, 0]])}
    time_ids = time_ids_given_to_the_unet(model, batch)
    assert time_ids[:, :4].tolist() == [[1023, 1365, 0, 357], [1537, 771, 301, 0]]


def test_prediction_type_is_the_schedulers_unless_given(tiny_sdxl):
    assert load(tiny_sdxl).noise_process.scheduler.config.prediction_type == "epsilon"
    model = load(tiny_sdxl, prediction_type="v_prediction")
    assert model.noise_process.scheduler.config.prediction_type == "v_prediction"
    assert model.pipeline.scheduler.config.prediction_type == "v_prediction"  # which draws


def test_a_prompt_that_is_cut_is_named_once(tiny_sdxl, caplog):
    from orpo.models.pipeline import first_truncation

    first_truncation.seen = False
    model = load(tiny_sdxl)
    for _ in range(3):
        model.encode_prompts(PROMPTS)
    (message,) = [record.message for record in caplog.records]
    assert "tokens is truncated because CLIP reads 24: a prompt that is much longer" in message


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o027])
def test_the_lora_has_the_mode_that_the_umask_gives(tiny_sdxl, tmp_path, mask):
    model, before = load(tiny_sdxl), os.umask(mask)
    try:
        model.save_lora(tmp_path)
        model.save_for_other_programs(tmp_path)
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == dict.fromkeys(
        ("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors"), 0o666 & ~mask
    )


def test_the_metadata_holds_what_decides_the_lora_and_nothing_else(tiny_sdxl, tmp_path):
    """An older PEFT refuses a field that it does not know."""
    load(tiny_sdxl, rank=4, lora_alpha=6, lora_layers="to_v,to_k").save_lora(tmp_path)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    assert metadata == {
        "unet.r": 4,
        "unet.lora_alpha": 6,
        "unet.target_modules": ["to_k", "to_v"],
        "unet.lora_dropout": 0.0,
        "unet.bias": "none",
        "unet.rank_pattern": {},
        "unet.alpha_pattern": {},
    }
