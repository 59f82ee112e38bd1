"""The model families, each registered once, as far as they are known without loading torch or diffusers."""

import argparse
from dataclasses import dataclass, field, replace
from importlib import import_module

from ..runtime.flags import Flag, FlagGroup
from ..runtime.shapes import name_of, shapes_from_flags
from .flags import DDPM_FLAGS, FLOW_MATCHING_FLAGS, GUIDANCE_SCALE, MODEL, max_sequence_length


@dataclass(frozen=True)
class Family:
    """What scripts need to know of a family before its class is imported.

    Attributes:
        pipeline: the `_class_name` in model_index.json.
        module: in this room, where its class is.
        class_name: of its class.
        slug: in names of folders, and in the identity of encodings.
        name: for people.
        lora_layers: the default of --lora_layers.
        noise_flags: of its noise process.
        more_flags: that it alone has.
        own_defaults: of other flags, where it has its own.
        resolution_step: pixels that a side of an image is a multiple of.
    """

    pipeline: str
    module: str
    class_name: str
    slug: str
    name: str
    noise_flags: FlagGroup
    lora_layers: str = "to_k,to_q,to_v,to_out.0"
    more_flags: tuple[Flag, ...] = ()
    own_defaults: dict[str, object] = field(default_factory=dict)
    resolution_step: int = 8

    @property
    def flags(self) -> list[FlagGroup]:
        """Of the model and of its noise process."""
        return [MODEL, FlagGroup(MODEL.title, self.more_flags), self.noise_flags]

    @property
    def defaults(self) -> dict[str, object]:
        """Of all flags that have another default for this family than for the others."""
        name = f"diffusion-orpo-lora-{self.slug}"
        return {"lora_layers": self.lora_layers, "output_dir": name, "tracker_name": name, **self.own_defaults}

    def check_flags(self, parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
        """Stops with a message where the family can't do what the flags say."""
        if args.resolution % self.resolution_step != 0:
            parser.error(f"--resolution must be a multiple of {self.resolution_step}; got {args.resolution}.")
        try:
            shapes = shapes_from_flags(args)
        except ValueError as error:
            parser.error(str(error))
        wrong = [name_of(shape) for shape in shapes if any(side % self.resolution_step for side in shape)]
        if wrong:
            parser.error(
                f"--aspect_ratio_buckets: sides must be multiples of {self.resolution_step} for {self.name}, and"
                f" {', '.join(wrong)} {'are' if len(wrong) > 1 else 'is'} not."
            )
        if args.quantize_base is not None and args.bnb_quantization_config_path is not None:
            parser.error(
                "--quantize_base and --bnb_quantization_config_path quantize the same weights: give one of them."
            )
        if args.validation_model_path is not None and not args.run_validation:
            parser.error("--validation_model_path is drawn with in validation: add --run_validation, or leave it out.")

    def load_class(self) -> type:
        """Imports the family's class, and with it torch and diffusers."""
        return getattr(import_module(f".{self.module}", __package__), self.class_name)


SD = Family(
    "StableDiffusionPipeline",
    "sd",
    "StableDiffusion",
    "sd",
    "Stable Diffusion",
    DDPM_FLAGS,
    own_defaults={"resolution": 512, "validation_guidance_scale": 7.5},
)

SDXL = Family("StableDiffusionXLPipeline", "sdxl", "StableDiffusionXL", "sdxl", "SDXL", DDPM_FLAGS)

JOINT_ATTENTION = (
    "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out"
)

SD3 = Family(
    "StableDiffusion3Pipeline",
    "sd3",
    "StableDiffusion3",
    "sd3",
    "Stable Diffusion 3",
    FLOW_MATCHING_FLAGS,
    lora_layers=JOINT_ATTENTION,
    more_flags=(max_sequence_length(77, "; CLIP reads 77"),),
    own_defaults={"validation_guidance_scale": 7.0},
    resolution_step=16,
)

FLUX = Family(
    "FluxPipeline",
    "flux",
    "Flux",
    "flux",
    "FLUX.1",
    FLOW_MATCHING_FLAGS,
    lora_layers=f"{JOINT_ATTENTION},ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2",
    more_flags=(max_sequence_length(512), GUIDANCE_SCALE),
    own_defaults={"weighting_scheme": "none", "validation_guidance_scale": 3.5},
    resolution_step=16,
)

Z_IMAGE = Family(
    "ZImagePipeline",
    "z_image",
    "ZImage",
    "z-image",
    "Z-Image",
    FLOW_MATCHING_FLAGS,
    more_flags=(max_sequence_length(512, reader="Qwen3"),),
    own_defaults={"weighting_scheme": "none"},
    resolution_step=16,
)

FLUX2_KLEIN = Family(
    "Flux2KleinPipeline",
    "flux2",
    "Flux2Klein",
    "flux2-klein",
    "FLUX.2 klein",
    FLOW_MATCHING_FLAGS,
    lora_layers="to_k,to_q,to_v,to_out.0,to_qkv_mlp_proj,single_transformer_blocks.*.attn.to_out",
    more_flags=(max_sequence_length(512, reader="Qwen3 or Mistral"), GUIDANCE_SCALE),
    own_defaults={"weighting_scheme": "none", "validation_guidance_scale": 4.0},
    resolution_step=16,
)

FLUX2 = replace(FLUX2_KLEIN, pipeline="Flux2Pipeline", class_name="Flux2", slug="flux2", name="FLUX.2")

QWEN_IMAGE = Family(
    "QwenImagePipeline",
    "qwen_image",
    "QwenImage",
    "qwen-image",
    "Qwen-Image",
    FLOW_MATCHING_FLAGS,
    more_flags=(max_sequence_length(512, reader="Qwen2.5-VL", highest=1024),),
    own_defaults={"weighting_scheme": "none", "validation_guidance_scale": 4.0},
    resolution_step=16,
)

FAMILIES = {family.pipeline: family for family in (SD, SDXL, SD3, FLUX, Z_IMAGE, FLUX2_KLEIN, FLUX2, QWEN_IMAGE)}
