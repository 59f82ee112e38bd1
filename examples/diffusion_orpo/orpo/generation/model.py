"""The model that generates images: a base of any registered family, with a LoRA or without."""

from dataclasses import asdict, dataclass, fields

import torch
from PIL.Image import Image

from diffusers import DDPMScheduler

from ..config import GenerationConfig, ModelConfig
from ..models.identity import module_identity
from ..models.lora_files import LoraFile, check_all_loaded, find_misfit, read_lora_file
from ..models.registry import Family, find_family
from ..models.vae import vae_source
from ..runtime.messages import printable


SHORT = {"float16": "fp16", "bfloat16": "bf16"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ADAPTER = "orpo"


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that decides an image besides prompt and seed; each field is the flag of its name."""

    pretrained_model_name_or_path: str
    pretrained_vae_model_name_or_path: str | None
    revision: str | None
    variant: str | None
    lora_weights: str | None
    lora_scale: float
    prediction_type: str | None
    dtype: str
    resolution: int
    num_inference_steps: int
    guidance_scale: float
    max_sequence_length: int | None

    @classmethod
    def of(cls, config: GenerationConfig, family: Family, device: torch.device) -> "GenerationSettings":
        """Takes what was configured, and the defaults of family and device for the rest.

        Raises:
            ValueError: the family can't generate at the resolution, or lacks a setting.
        """
        configured = {field.name: getattr(config, field.name) for field in fields(cls)}
        defaults = {
            "resolution": family.defaults.get("resolution", 1024),
            "guidance_scale": family.defaults.get("validation_guidance_scale", 5.0),
            "dtype": "fp32" if device.type == "cpu" else SHORT[family.load_class().inference_dtype],
        }
        for name in ("max_sequence_length", "prediction_type"):
            if configured[name] is not None and name not in family.own:
                raise ValueError(f"--{name} has no effect with {family.name}.")
            defaults[name] = family.own.get(name)
        settings = {name: defaults.get(name) if value is None else value for name, value in configured.items()}
        if settings["resolution"] % family.resolution_step != 0:
            raise ValueError(
                f"--resolution must be a multiple of {family.resolution_step}; got {settings['resolution']}."
            )
        return cls(**settings)


class Generator:
    """Generates images of prompts from seeds. No weights are loaded before `load`.

    Attributes:
        settings: that decide the images.
        model: the family's pipeline.
    """

    def __init__(self, config: GenerationConfig, device: torch.device) -> None:
        """Finds the family of the base model, and reads its configuration files.

        Raises:
            ValueError: there is no such model, it belongs to no registered family, or the family can't do what was configured.
        """
        family = find_family(config)
        self.settings = settings = GenerationSettings.of(config, family, device)
        self.cache_dir = config.cache_dir
        options = ModelConfig(
            pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
            pretrained_vae_model_name_or_path=settings.pretrained_vae_model_name_or_path,
            revision=settings.revision,
            variant=settings.variant,
            cache_dir=self.cache_dir,
            resolution=settings.resolution,
            max_sequence_length=settings.max_sequence_length,
            prediction_type=settings.prediction_type,
        )
        self.model = family.load_class()(options, device, DTYPES[settings.dtype])

    @property
    def name(self) -> str:
        """Of base and LoRA, for the pairs' columns."""
        settings = self.settings
        lora = f" + {settings.lora_weights}" if settings.lora_weights else ""
        scale = f" x {settings.lora_scale:g}" if lora and settings.lora_scale != 1 else ""
        return f"{settings.pretrained_model_name_or_path}{lora}{scale}"

    def identity(self) -> tuple[dict, dict, list[str]]:
        """What decides the base's images, by content; what else decides the LoRA's; and warnings where it fits in part only.

        Raises:
            ValueError: the base has no such files, the LoRA can't be read, or none of it fits.
        """
        base = asdict(self.settings) | self._base_identity()
        lora_weights, lora_scale = base.pop("lora_weights"), base.pop("lora_scale")
        if lora_weights is None:
            return base, {}, []
        lora = self._read_lora()
        name = self.settings.pretrained_model_name_or_path
        warning = find_misfit(self._lora_flag, lora, self.model.denoiser_name, name)
        return base, {"lora_scale": lora_scale, "lora_sha256": lora.digest}, [warning] if warning else []

    @property
    def _lora_flag(self) -> str:
        """The LoRA as a message names it."""
        return f"--lora_weights={printable(self.settings.lora_weights)}"

    def _read_lora(self) -> LoraFile:
        model, name = self.model, self.settings.lora_weights
        return read_lora_file(self._lora_flag, name, model.pipeline_class, model.empty_denoiser, self.cache_dir)

    def _base_identity(self) -> dict[str, object]:
        """The content of the base's modules, and its sampler."""
        options, model = self.model.options, self.model
        source, arguments = (
            options.pretrained_model_name_or_path,
            {"variant": options.variant, **options.source_options},
        )
        encoders = [name for name in model.text_encoder_names if name not in model.absent_modules]
        tokenizers = [name.replace("text_encoder", "tokenizer") for name in encoders]
        identity = {
            name: module_identity(source, subfolder=name, **arguments)
            for name in (model.denoiser_name, *encoders, *tokenizers)
        }
        vae, vae_arguments = vae_source(options)
        scheduler = DDPMScheduler.load_config(source, subfolder="scheduler", **options.source_options)
        scheduler = {name: value for name, value in scheduler.items() if name != "_diffusers_version"}
        vae_identity = module_identity(vae, **vae_arguments)
        return identity | {"vae": vae_identity, "scheduler": scheduler | options.sampler_config}

    def load(self) -> None:
        """Loads the base, and the LoRA if there is one.

        Raises:
            ValueError: the base can't be used, or the LoRA can't be loaded or doesn't fit it.
        """
        model, settings = self.model, self.settings
        model.load_modules()
        if settings.lora_weights is None:
            return
        try:
            model.pipeline.load_lora_weights(settings.lora_weights, adapter_name=ADAPTER, cache_dir=self.cache_dir)
            model.pipeline.set_adapters([ADAPTER], [settings.lora_scale])
        except (OSError, RuntimeError, ValueError) as error:
            raise ValueError(
                f"{self._lora_flag} does not fit {printable(settings.pretrained_model_name_or_path)}: {printable(str(error))}"
            ) from error
        check_all_loaded(self._lora_flag, self._read_lora(), model.denoiser)
        model.denoiser.eval()  # a LoRA whose file names a dropout is loaded with that switched on

    def generate(self, prompts: list[str], seeds: list[int], with_lora: bool = True) -> list[Image]:
        """An image of each prompt from its seed."""
        if self.settings.lora_weights is not None:
            (self.model.pipeline.enable_lora if with_lora else self.model.pipeline.disable_lora)()
        return self.model.generate(prompts, seeds, self.settings.num_inference_steps, self.settings.guidance_scale)
