"""FLUX.2 dev: read by Mistral 3, and told a guidance scale. Its processor needs torchvision, so a tokenizer stands there."""

from dataclasses import replace

import pytest
import torch
from families import DEMO_BASE, FAMILIES, WORDS, load_pipeline
from orpo.models.flux2 import Flux2
from transformers import Mistral3Config, Mistral3ForConditionalGeneration

from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel
from tiny_flux2 import to_flux2_vae
from tiny_qwen import build_qwen_tokenizer


TOKENS = 256  # the pipeline's system message is spelled out by the tiny tokenizer
PROMPTS = ["a red ball", "a blue ball with a face"]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}{{ part.text }}{% endfor %}<|im_end|>\n{% endfor %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    torch.manual_seed(0)
    tokenizer = build_qwen_tokenizer(WORDS)
    tokenizer.chat_template = CHAT_TEMPLATE
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 30, "num_attention_heads": 4}
    text |= {"model_type": "mistral", "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.2}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"model_type": "pixtral", "head_dim": 8, "image_size": 32, "patch_size": 16}
    config = Mistral3Config(text_config=text | {"vocab_size": len(tokenizer)}, vision_config=vision)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        timestep_guidance_channels=64,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=True,
    )
    folder = tmp_path_factory.mktemp("flux2-dev")
    Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=to_flux2_vae(AutoencoderKL.from_pretrained(DEMO_BASE / "vae")),
        text_encoder=Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,
        transformer=transformer,
    ).save_pretrained(folder)
    return str(folder)


def test_a_prediction_is_what_the_pipeline_hands_to_its_scheduler(model):
    """With the guidance scale that the transformer is told."""
    family = replace(FAMILIES["flux2"], cls=Flux2)
    latents = torch.randn(4, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    pipeline, calls = load_pipeline(model), []
    step = pipeline.scheduler.step
    pipeline.scheduler.step = lambda velocity, t, *args, **named: (
        calls.append((velocity, t)) or step(velocity, t, *args, **named)
    )
    size = {"height": 64, "width": 64, "num_inference_steps": 3, "output_type": "latent"}
    pipeline(prompt=PROMPTS * 2, latents=latents, guidance_scale=2.5, max_sequence_length=TOKENS, **size)
    expected, timestep = calls[0]
    args = family.parse_args(model, guidance_scale=2.5, max_sequence_length=TOKENS)
    loaded = Flux2.load(args, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        ours = loaded.predict(loaded.denoiser, latents, timestep.expand(4), loaded.encode_prompts(PROMPTS), {})
    torch.testing.assert_close(ours.flatten(2).transpose(1, 2), expected, rtol=0, atol=1e-5)


def test_the_script_of_flux2_trains_it(model, faces, tmp_path):
    lora = FAMILIES["flux2"].train(
        model, faces, tmp_path, max_train_steps=2, max_sequence_length=TOKENS, learning_rate=0.01
    )
    assert any(value.abs().max() > 1e-4 for key, value in lora.items() if "lora_B" in key)
    assert "Flux2Pipeline" in (tmp_path / "README.md").read_text()
