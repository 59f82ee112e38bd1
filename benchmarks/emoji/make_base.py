"""Trains the base from scratch on the drawings of all three artists: a tiny SDXL whose captions do not name the artist.

    python benchmarks/emoji/make_base.py --work work       # VAE, then U-Net and text encoders; run it again to go on

`work` keeps where each of the two was left. `base/` gets the pipeline, in half precision, every `--save_steps`.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path


import drawings  # noqa: F401, isort: skip

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from drawings import HERE, SIZE, Emoji, load_emoji
from sampling import load_pipeline
from tiny_sdxl import build_text_config, build_tiny_sdxl, build_tokenizer


BASE = HERE / "base"
CHANNELS = (32, 64, 128)  # of the U-Net, at 16, 8 and 4 latent pixels
VAE_CHANNELS = (16, 32, 48)
CROP = (
    32  # pixels of the drawings' parts that the VAE is trained on: it has no attention, so it is the same at any size
)
VAE_BATCH = UNET_BATCH = 16
VAE_RATE, UNET_RATE = 2e-3, 1.5e-3
WARMUP, DECAY = 100, 0.2  # steps, and the share of all steps in which the rate falls to 0


def build_pipeline(captions: list[str]) -> StableDiffusionXLPipeline:
    """A tiny SDXL with random weights in whose tokenizers each word of the captions is one token."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([])
    words = sorted({word for caption in captions for word in caption.split()})
    tokenizer.add_tokens([AddedToken(word, single_word=True, normalized=False) for word in words])
    text_config = build_text_config(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=1,
        attention_head_dim=tuple(channels // 32 for channels in CHANNELS),
        cross_attention_dim=2 * text_config.hidden_size,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + text_config.projection_dim,
        norm_num_groups=16,
        use_linear_projection=True,
    )
    vae = AutoencoderKL(
        block_out_channels=VAE_CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
        force_upcast=False,
    )
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config),
        text_encoder_2=CLIPTextModelWithProjection(text_config),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=build_tiny_sdxl([]).scheduler,
        add_watermarker=False,
    )


class Run:
    """A training run that can be left and taken up again: weights, their moving average, optimizer and position."""

    def __init__(self, module: torch.nn.Module, rate: float, steps: int, file: Path) -> None:
        self.module, self.rate, self.steps, self.file, self.step = module, rate, steps, file, 0
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=rate, weight_decay=1e-3)
        self.average = EMAModel(module.parameters(), decay=0.999)
        if file.exists():
            state = torch.load(file)
            module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.load_state_dict(state["average"])
            self.step = state["step"]

    def update(self, loss: torch.Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        scale = min(1.0, (self.step + 1) / WARMUP, (self.steps - self.step) / (DECAY * self.steps))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * scale
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.step(self.module.parameters())
        self.step += 1

    def save(self) -> None:
        state = {name: getattr(self, name).state_dict() for name in ("module", "optimizer", "average")}
        aside = self.file.with_suffix(".aside")
        torch.save(state | {"step": self.step}, aside)
        os.replace(aside, self.file)


def train_vae(vae: AutoencoderKL, images: torch.Tensor, steps: int, work: Path, save_steps: int) -> None:
    """On random parts of the drawings, uint8 (N, 3, SIZE, SIZE), with the edges' errors in the loss."""
    run = Run(vae, VAE_RATE, steps, work / "vae.pt")
    for step in range(run.step, steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(images), (VAE_BATCH,), generator=generator)
        top, left = torch.randint(SIZE - CROP + 1, (2,), generator=generator).tolist()
        x = images[rows, :, top : top + CROP, left : left + CROP] / 127.5 - 1
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample(generator)).sample - x
        edges = sum(error.diff(dim=dim).abs().mean() for dim in (2, 3))
        run.update(error.abs().mean() + error.square().mean() + edges + 1e-6 * posterior.kl().mean())
        report("VAE", run, error.square().mean().item(), save_steps)
    run.average.copy_to(vae.parameters())


def report(name: str, run: Run, loss: float, save_steps: int) -> None:
    if run.step % save_steps == 0 or run.step == run.steps:
        run.save()
        print(time.strftime("%H:%M:%S"), name, run.step, f"{loss:.4f}", f"{time.process_time():.0f} s", flush=True)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Latents (N, 4, SIZE / 4, SIZE / 4) of uint8 images, scaled as the U-Net has them."""
    batches = [vae.encode(batch / 127.5 - 1).latent_dist.mode() for batch in images.split(64)]
    return torch.cat(batches) * vae.config.scaling_factor


def train_unet(
    pipeline: StableDiffusionXLPipeline,
    latents: torch.Tensor,
    captions: list[str],
    steps: int,
    work: Path,
    save_steps: int,
) -> None:
    """U-Net and text encoders together, on latents (N, 4, SIZE / 4, SIZE / 4)."""
    module = torch.nn.ModuleList([pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2])
    run = Run(module, UNET_RATE, steps, work / "unet.pt")
    noise_scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    time_ids = torch.tensor([[SIZE, SIZE, 0, 0, SIZE, SIZE]] * UNET_BATCH)
    for step in range(run.step, steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(latents), (UNET_BATCH,), generator=generator)
        kept = (torch.rand(UNET_BATCH, generator=generator) >= 0.1).float()  # SDXL's empty prompt is zeros
        texts = [captions[row] for row in rows]
        prompt_embeds, _, pooled, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False)
        noise = torch.randn(UNET_BATCH, *latents.shape[1:], generator=generator)
        timesteps = torch.randint(1000, (UNET_BATCH,), generator=generator)
        conditions = {"text_embeds": pooled * kept[:, None], "time_ids": time_ids}
        noisy_latents = noise_scheduler.add_noise(latents[rows], noise, timesteps)
        pred = pipeline.unet(
            noisy_latents, timesteps, prompt_embeds * kept[:, None, None], added_cond_kwargs=conditions
        )
        loss = F.mse_loss(pred.sample, noise)
        run.update(loss)
        report("U-Net", run, loss.item(), save_steps)
        if run.step % (10 * save_steps) == 0 or run.step == run.steps:
            run.average.store(module.parameters())
            run.average.copy_to(module.parameters())
            save_half(pipeline)
            run.average.restore(module.parameters())


def save_half(pipeline: StableDiffusionXLPipeline) -> None:
    """Writes the pipeline to `base/` in half precision, and leaves it as it is."""
    with tempfile.TemporaryDirectory() as whole:
        pipeline.save_pretrained(whole)
        StableDiffusionXLPipeline.from_pretrained(whole, dtype=torch.float16).save_pretrained(BASE)


def load_base() -> StableDiffusionXLPipeline:
    return load_pipeline(str(BASE))


def make_base(emoji: Emoji, work: Path, vae_steps: int, unet_steps: int, save_steps: int) -> None:
    """Trains from where `work` was left, and writes the pipeline to `base/`.

    Raises:
        SystemExit: the U-Net in `work` is of a VAE that would be trained further.
    """
    if (work / "unet.pt").exists() and torch.load(work / "vae.pt")["step"] < vae_steps:
        raise SystemExit(
            f"{work} holds a U-Net of a VAE with fewer steps than --vae_steps={vae_steps}: keep --vae_steps, or take another --work."
        )
    images = emoji.images.flatten(0, 1)
    captions = [caption for caption in emoji.captions for _ in range(emoji.images.shape[1])]
    pipeline = build_pipeline(emoji.captions)
    for module in (pipeline.vae, pipeline.unet):
        module.to(memory_format=torch.channels_last)
    train_vae(pipeline.vae, images, vae_steps, work, save_steps)
    latents = encode(pipeline.vae, images)
    pipeline.vae.register_to_config(scaling_factor=round(pipeline.vae.config.scaling_factor / latents.std().item(), 5))
    train_unet(pipeline, latents / latents.std(), captions, unet_steps, work, save_steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder that keeps where training was left.")
    parser.add_argument("--vae_steps", type=int, default=8000)
    parser.add_argument("--unet_steps", type=int, default=60000)
    parser.add_argument("--save_steps", type=int, default=100, help="Steps between two checkpoints.")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    make_base(load_emoji(), **vars(args))


if __name__ == "__main__":
    main()
