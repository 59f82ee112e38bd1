"""Draws many images with a pipeline, in batches, each from its own seed."""

import torch
from PIL.Image import Image
from tqdm.auto import tqdm

from diffusers import DiffusionPipeline, Flux2KleinPipeline, QwenImagePipeline, ZImagePipeline
from faces import RESOLUTION
from tiny_qwen import PROMPT_LENGTH
from tiny_t5 import T5_LENGTH


def load_pipeline(path: str) -> DiffusionPipeline:
    """Loads the pipeline of any family."""
    pipeline = DiffusionPipeline.from_pretrained(path, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    desc: str,
    steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 48,
) -> list[Image]:
    """Draws an image per prompt.

    Args:
        pipeline: with or without a LoRA.
        prompts: one per image.
        seeds: one per image: the same prompt and seed give the same initial noise, in any batch.
        desc: names the progress bar.
        steps: of the sampler.
        guidance_scale: of classifier-free guidance, 1 for none; with FLUX, the scale that the model is told.
        batch_size: images at once.
    """
    images: list[Image] = []
    with tqdm(total=len(prompts), desc=desc) as bar:
        for i in range(0, len(prompts), batch_size):
            batch = prompts[i : i + batch_size]
            images += pipeline(
                prompt=batch,
                height=RESOLUTION,
                width=RESOLUTION,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[i : i + batch_size]],
                **call_options(pipeline, guidance_scale, len(batch)),
            ).images
            bar.update(len(batch))
    return images


def call_options(pipeline: DiffusionPipeline, guidance_scale: float, count: int) -> dict:
    """Guidance and prompt length as a pipeline of the demo wants them for `count` prompts."""
    if isinstance(pipeline, QwenImagePipeline):
        # The demo's base was trained with prompts left out as "", and not as " ", which the published one is guided away from.
        return {"true_cfg_scale": guidance_scale, "negative_prompt": [""] * count}
    if isinstance(pipeline, (ZImagePipeline, Flux2KleinPipeline)):
        return {"guidance_scale": guidance_scale, "max_sequence_length": PROMPT_LENGTH}
    length = {"max_sequence_length": T5_LENGTH} if hasattr(pipeline, "transformer") else {}
    return {"guidance_scale": guidance_scale, **length}
