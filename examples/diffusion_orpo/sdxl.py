"""Everything that knows SDXL: loading, prompt encoding, micro-conditioning, sampling, LoRA in and out."""

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers, convert_unet_state_dict_to_peft
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict


@dataclass
class StableDiffusionXL:
    """SDXL's modules, frozen but for the LoRA in the U-Net.

    Attributes:
        pipeline: holds all modules, on the device; images are drawn with it.
        noise_scheduler: adds noise in training.
        dtype: of the frozen U-Net and text encoders.
        resolution: pixels a side, the target size of the micro-conditioning.
        vae_encode_batch_size: images that the VAE encodes at once.
    """

    pipeline: StableDiffusionXLPipeline
    noise_scheduler: DDPMScheduler
    dtype: torch.dtype
    resolution: int
    vae_encode_batch_size: int

    name = "SDXL"
    tags = ("stable-diffusion-xl", "stable-diffusion-xl-diffusers")
    license = "openrail++"

    @classmethod
    def load(cls, args, device: torch.device, dtype: torch.dtype) -> "StableDiffusionXL":
        """Loads the modules that the flags name, and adds a LoRA to the U-Net.

        Args:
            args: the flags.
            device: where the modules go.
            dtype: of the frozen weights. The LoRA is float32 in any case, and so is a VAE that asks for it.

        Raises:
            ValueError: the model predicts something else than noise or velocity, or has no such --lora_layers.
        """
        source = args.pretrained_model_name_or_path
        options = {"revision": args.revision, "cache_dir": args.cache_dir}
        vae_source, vae_options = source, {**options, "subfolder": "vae", "variant": args.variant}
        if args.pretrained_vae_model_name_or_path is not None:
            vae_source, vae_options = args.pretrained_vae_model_name_or_path, {"cache_dir": args.cache_dir}
        overflows_in_half = AutoencoderKL.load_config(vae_source, **vae_options).get("force_upcast", True)
        vae = AutoencoderKL.from_pretrained(
            vae_source, dtype=torch.float32 if overflows_in_half else dtype, **vae_options
        )
        pipeline = StableDiffusionXLPipeline.from_pretrained(
            source, vae=vae, dtype=dtype, variant=args.variant, **options
        ).to(device)
        pipeline.set_progress_bar_config(disable=True)
        for module in (vae, pipeline.unet, pipeline.text_encoder, pipeline.text_encoder_2):
            module.requires_grad_(False)

        noise_scheduler = DDPMScheduler.from_pretrained(source, subfolder="scheduler", **options)
        if args.prediction_type is not None:
            for scheduler in (noise_scheduler, pipeline.scheduler):
                scheduler.register_to_config(prediction_type=args.prediction_type)
        if noise_scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise ValueError(
                f"Cannot train for prediction type {noise_scheduler.config.prediction_type!r} of {source}."
            )
        model = cls(pipeline, noise_scheduler, dtype, args.resolution, args.vae_encode_batch_size)
        model._add_lora(args)
        if args.gradient_checkpointing:
            model.denoiser.enable_gradient_checkpointing()
        return model

    @property
    def denoiser(self) -> UNet2DConditionModel:
        """The module that trains."""
        return self.pipeline.unet

    @property
    def device(self) -> torch.device:
        return self.denoiser.device

    @torch.no_grad()
    def encode_images(self, pixel_values: torch.Tensor, generators: list[torch.Generator]) -> torch.Tensor:
        """Samples latents from the VAE's posterior.

        Args:
            pixel_values: uint8 (N, 3, H, W).
            generators: one for each image.

        Returns:
            Scaled latents (N, 4, H/8, W/8), float32.
        """
        vae, size = self.pipeline.vae, self.vae_encode_batch_size
        latents = []
        for i in range(0, len(pixel_values), size):
            pixels = pixel_values[i : i + size].to(self.device, vae.dtype) / 127.5 - 1
            latents.append(vae.encode(pixels).latent_dist.sample(generators[i : i + size]))
        return torch.cat(latents).float() * vae.config.scaling_factor

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes B prompts: both encoders' penultimate hidden states (B, 77, 2048) and the pooled output (B, 1280)."""
        pipeline, hidden_states = self.pipeline, []
        for tokenizer, text_encoder in (
            (pipeline.tokenizer, pipeline.text_encoder),
            (pipeline.tokenizer_2, pipeline.text_encoder_2),
        ):
            tokens = tokenizer(
                prompts,
                padding="max_length",
                max_length=tokenizer.model_max_length,
                truncation=True,
                return_tensors="pt",
            )
            output = text_encoder(tokens.input_ids.to(self.device), output_hidden_states=True)
            hidden_states.append(output.hidden_states[-2])
        return torch.cat(hidden_states, dim=-1), output.text_embeds

    def conditioning(self, batch: dict) -> dict:
        """What the U-Net is conditioned on, for the B winners and then the B losers of a batch."""
        prompt_embeds, pooled_prompt_embeds = self.encode_prompts(batch["prompts"])
        # Each image keeps its own original size and crop: (height, width, top, left, target height, target width).
        target_sizes = torch.full_like(batch["original_sizes"], self.resolution)
        time_ids = torch.cat([batch["original_sizes"], batch["crop_top_lefts"], target_sizes], dim=1)
        return {
            "encoder_hidden_states": prompt_embeds.repeat(2, 1, 1),
            "added_cond_kwargs": {
                "text_embeds": pooled_prompt_embeds.repeat(2, 1),
                "time_ids": time_ids.to(self.device, torch.float32),  # bfloat16 would round 1023 to 1024
            },
        }

    @torch.no_grad()
    def draw(self, prompt: str, seed: int, steps: int, guidance_scale: float):
        """Draws one image at the training resolution.

        Args:
            prompt: what to draw.
            seed: of the initial noise.
            steps: of the sampler.
            guidance_scale: of classifier-free guidance.

        Returns:
            A PIL image.
        """
        latents = self.pipeline(
            prompt,
            height=self.resolution,
            width=self.resolution,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
        ).images
        vae = self.pipeline.vae  # may be float32 beside a U-Net in half precision, so it decodes here
        image = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor).sample
        return self.pipeline.image_processor.postprocess(image.float())[0]

    def _add_lora(self, args) -> None:
        layers = [name.strip() for name in args.lora_layers.split(",")]
        modules = [name for name, _ in self.denoiser.named_modules()]
        unknown = [layer for layer in layers if not any(f".{name}".endswith(f".{layer}") for name in modules)]
        if unknown:
            raise ValueError(f"--lora_layers: the U-Net has no module called {', '.join(unknown)}.")
        self.denoiser.add_adapter(
            LoraConfig(
                r=args.rank,
                lora_alpha=args.lora_alpha,
                lora_dropout=args.lora_dropout,
                init_lora_weights="gaussian",
                target_modules=layers,
            )
        )
        cast_training_params(self.denoiser, dtype=torch.float32)

    def save_lora(self, directory: Path) -> None:
        """Writes `pytorch_lora_weights.safetensors`, with rank and alpha in its metadata."""
        StableDiffusionXLPipeline.save_lora_weights(
            directory,
            unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(self.denoiser)),
            **_collate_lora_metadata({"unet": self.denoiser}),
        )

    def load_lora(self, directory: Path) -> None:
        """Reads what `save_lora` wrote into the LoRA that is there.

        Raises:
            ValueError: the file's modules are not those of this LoRA.
        """
        state_dict, _ = StableDiffusionXLPipeline.lora_state_dict(directory, local_files_only=True)
        state_dict = {name.removeprefix("unet."): value for name, value in state_dict.items()}
        state_dict = convert_unet_state_dict_to_peft(state_dict)
        expected, found = get_peft_model_state_dict(self.denoiser).keys(), state_dict.keys()
        if expected != found:
            raise ValueError(
                f"{directory} holds a LoRA of other modules than --lora_layers names:"
                f" {len(expected - found)} are missing, {len(found - expected)} are not known."
            )
        set_peft_model_state_dict(self.denoiser, state_dict)

    @staticmethod
    def inference_snippet(args, lora: str, prompt: str) -> str:
        """Python code that draws an image with the trained LoRA."""
        vae_import, vae_argument = "", ""
        if args.pretrained_vae_model_name_or_path is not None:
            vae_import = "AutoencoderKL, "
            vae_argument = (
                f"    vae=AutoencoderKL.from_pretrained({args.pretrained_vae_model_name_or_path!r}, dtype=dtype),\n"
            )
        scheduler_line = ""
        if args.prediction_type is not None:
            scheduler_line = f"pipeline.scheduler.register_to_config(prediction_type={args.prediction_type!r})\n"
        return (
            "import torch\n"
            f"from diffusers import {vae_import}StableDiffusionXLPipeline\n\n"
            'device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)\n'
            "pipeline = StableDiffusionXLPipeline.from_pretrained(\n"
            f"    {args.pretrained_model_name_or_path!r},\n{vae_argument}    dtype=dtype,\n"
            ").to(device)\n"
            f"{scheduler_line}pipeline.load_lora_weights({lora!r})\n"
            f"image = pipeline({prompt!r}).images[0]\n"
            'image.save("image.png")\n'
        )
