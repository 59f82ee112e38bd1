"""Z-Image: a Qwen3 text encoder, prompts of different lengths, and flow matching with the prediction negated."""

import torch

from diffusers import ZImagePipeline

from .latent_diffusion import Batch, Denoiser, Embeds, FlowTransformer
from .registry import Z_IMAGE


class ZImage(FlowTransformer):
    pipeline_class = ZImagePipeline
    text_encoder_names = ("text_encoder",)
    name, slug = Z_IMAGE.name, Z_IMAGE.slug
    license = "apache-2.0"

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Embeds:
        """Qwen3's hidden states (B, max_sequence_length, 2560), zero from each prompt's length (B,) on."""
        # The pipeline writes its chat template into the list that it is handed.
        rows, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, do_classifier_free_guidance=False, **self.call_options
        )
        embeds = rows[0].new_zeros(len(rows), self.options.max_sequence_length, rows[0].shape[1])
        for padded, row in zip(embeds, rows):
            padded[: len(row)] = row
        return {"prompt_embeds": embeds, "prompt_lengths": torch.tensor([len(row) for row in rows])}

    def predict(
        self, denoiser: Denoiser, noisy_latents: torch.Tensor, timesteps: torch.Tensor, embeds: Embeds, batch: Batch
    ) -> torch.Tensor:
        # Those of a batch never left the CPU: reading them back would make the step wait for the device.
        lengths = batch.get("embeds", embeds)["prompt_lengths"].tolist()
        prompts = [row[:length] for row, length in zip(embeds["prompt_embeds"], lengths)]
        # An image is one frame of a video, (C, 1, h, w), and time runs from noise, 0, to image, 1.
        frames = list(noisy_latents.to(self.dtype).unsqueeze(2))
        model_pred = denoiser(frames, (1000 - timesteps) / 1000, prompts * 2, return_dict=False)[0]
        return -torch.stack(model_pred).squeeze(2)
