"""The model families, each registered once, as far as they are known without loading torch or diffusers."""

from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ..config import CheckpointConfig, ModelConfig
from ..runtime.shapes import name_of


if TYPE_CHECKING:
    from .latent_diffusion import LatentDiffusion


@dataclass(frozen=True)
class Family:
    """What scripts need to know of a family before its class is imported.

    Attributes:
        pipeline: the `_class_name` in model_index.json.
        module: in this package, where its class is.
        class_name: of its class.
        slug: in names of folders, and in the identity of encodings.
        name: for people.
        own: settings that it has and some other families don't, and their defaults.
        other_defaults: of settings that all families have.
        resolution_step: pixels that a side of an image is a multiple of.
        longest_prompt: tokens that its text encoder reads at most, where it reads as many as it is told to.
    """

    pipeline: str
    module: str
    class_name: str
    slug: str
    name: str
    own: dict[str, object]
    other_defaults: dict[str, object] = field(default_factory=dict)
    resolution_step: int = 8
    longest_prompt: int = 512

    @property
    def defaults(self) -> dict[str, object]:
        """Of all settings that have another default for this family than `TrainingConfig` has."""
        return {"output_dir": f"diffusion-orpo-lora-{self.slug}", **self.own, **self.other_defaults}

    @staticmethod
    def special() -> set[str]:
        """The settings that only some families have."""
        return {name for family in FAMILIES.values() for name in family.own}

    def fill_in(self, settings: dict[str, Any]) -> dict[str, Any]:
        """The settings, and the family's defaults for those that are not among them.

        Raises:
            ValueError: the family has no such setting.
        """
        unknown = next((name for name in settings if name in self.special() - {*self.own}), None)
        if unknown is not None and settings[unknown] is not None:
            raise ValueError(f"--{unknown} has no effect with {self.name}.")
        return self.defaults | settings

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError where the family can't do what the settings say."""
        if config.resolution % self.resolution_step != 0:
            raise ValueError(f"--resolution must be a multiple of {self.resolution_step}; got {config.resolution}.")
        wrong = [name_of(shape) for shape in config.shapes if any(side % self.resolution_step for side in shape)]
        if wrong:
            raise ValueError(
                f"--aspect_ratio_buckets: sides must be multiples of {self.resolution_step} for {self.name}, and"
                f" {', '.join(wrong)} {'are' if len(wrong) > 1 else 'is'} not."
            )
        if config.max_sequence_length is not None and config.max_sequence_length > self.longest_prompt:
            raise ValueError(
                f"--max_sequence_length must be between 1 and {self.longest_prompt}; got {config.max_sequence_length}."
            )

    def load_class(self) -> "type[LatentDiffusion]":
        """Imports the family's class, and with it torch and diffusers."""
        return getattr(import_module(f".{self.module}", __package__), self.class_name)


DDPM: dict[str, object] = {"prediction_type": None, "snr_gamma": None}
FLOW_MATCHING: dict[str, object] = {
    "weighting_scheme": "none",
    "logit_mean": 0.0,
    "logit_std": 1.0,
    "mode_scale": 1.29,
}

JOINT_ATTENTION = (
    "attn.to_k,attn.to_q,attn.to_v,attn.to_out.0,attn.add_k_proj,attn.add_q_proj,attn.add_v_proj,attn.to_add_out"
)

SD = Family(
    "StableDiffusionPipeline",
    "sd",
    "StableDiffusion",
    "sd",
    "Stable Diffusion",
    DDPM,
    {"resolution": 512, "validation_guidance_scale": 7.5},
)

SDXL = Family("StableDiffusionXLPipeline", "sdxl", "StableDiffusionXL", "sdxl", "SDXL", DDPM)

SD3 = Family(
    "StableDiffusion3Pipeline",
    "sd3",
    "StableDiffusion3",
    "sd3",
    "Stable Diffusion 3",
    FLOW_MATCHING | {"weighting_scheme": "logit_normal", "max_sequence_length": 77},
    {"lora_layers": JOINT_ATTENTION, "validation_guidance_scale": 7.0},
    resolution_step=16,
)

FLUX = Family(
    "FluxPipeline",
    "flux",
    "Flux",
    "flux",
    "FLUX.1",
    FLOW_MATCHING | {"max_sequence_length": 512, "guidance_scale": 3.5},
    {
        "lora_layers": f"{JOINT_ATTENTION},ff.net.0.proj,ff.net.2,ff_context.net.0.proj,ff_context.net.2",
        "validation_guidance_scale": 3.5,
    },
    resolution_step=16,
)

Z_IMAGE = Family(
    "ZImagePipeline",
    "z_image",
    "ZImage",
    "z-image",
    "Z-Image",
    FLOW_MATCHING | {"max_sequence_length": 512},
    resolution_step=16,
)

FLUX2_KLEIN = Family(
    "Flux2KleinPipeline",
    "flux2",
    "Flux2Klein",
    "flux2-klein",
    "FLUX.2 klein",
    FLOW_MATCHING | {"max_sequence_length": 512},
    {
        "lora_layers": "to_k,to_q,to_v,to_out.0,to_qkv_mlp_proj,single_transformer_blocks.*.attn.to_out",
        "validation_guidance_scale": 4.0,
    },
    resolution_step=16,
)

FLUX2 = replace(
    FLUX2_KLEIN,
    pipeline="Flux2Pipeline",
    class_name="Flux2",
    slug="flux2",
    name="FLUX.2",
    own=FLUX2_KLEIN.own | {"guidance_scale": 3.5},
)

QWEN_IMAGE = Family(
    "QwenImagePipeline",
    "qwen_image",
    "QwenImage",
    "qwen-image",
    "Qwen-Image",
    FLOW_MATCHING | {"max_sequence_length": 512},
    {"validation_guidance_scale": 4.0},
    resolution_step=16,
    longest_prompt=1024,
)

FAMILIES = {family.pipeline: family for family in (SD, SDXL, SD3, FLUX, Z_IMAGE, FLUX2_KLEIN, FLUX2, QWEN_IMAGE)}


def find_family(checkpoint: CheckpointConfig, families: tuple[Family, ...] = tuple(FAMILIES.values())) -> Family:
    """The family that the model's files name.

    Raises:
        ValueError: there is no such model, or it belongs to none of the families.
    """
    from .checks import read_index  # with it torch and diffusers

    name = read_index(checkpoint).get("_class_name")
    family = next((family for family in families if family.pipeline == name), None)
    if family is not None:
        return family
    if len(families) == 1:
        only = families[0]
        raise ValueError(f"{checkpoint.named_source} is a {name}: this script trains {only.name}, a {only.pipeline}.")
    known = ", ".join(family.pipeline for family in families)
    raise ValueError(f"{checkpoint.named_source} is a {name}. It must be one of {known}.")
