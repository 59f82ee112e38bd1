"""Every setting of every script, declared once: its type and default, its help, and what else depends on it.

A script's config is one frozen dataclass, made of groups that others share: `TrainingConfig` is a `ModelConfig`, a `LossConfig`
and so on, and a function takes the group that it needs. Flags, --help, FLAGS.md, what a resumed run must keep, what checkpoints
and trackers record, and the model card are all read from the fields: see `cli.py`. Nothing here imports anything heavy.
"""

import dataclasses
import math
import re
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from .runtime.cores import num_cores
from .runtime.messages import printable
from .runtime.shapes import Shape, parse_shapes


BUILT_IN = ("pickscore", "hpsv2", "imagereward", "aesthetic", "clip", "saturation", "high_frequency")  # scorers

ONE_DATASET = (
    "One dataset is read at a time: put the files of several into one folder, or join them by"
    " datasets.concatenate_datasets([...]).save_to_disk('joined')."
)

AnyConfig = TypeVar("AnyConfig", bound="Config")


@dataclass(frozen=True)
class Setting:
    """What a field of a config says of itself.

    Attributes:
        help: what it does, for --help and FLAGS.md.
        range: the lowest value, and the highest where there is one.
        choices: all possible values.
        required: whether a command line must give it.
        resume: what a resumed run does if it has changed: "same" refuses, "warn" warns, None ignores it.
        card: whether the model card shows it.
        path: "any" for a path, in which ~ is the home folder; "source" for one that must exist, or a name on the Hub.
        alone: its value where the flag is given without one; None where it needs one.
        aliases: other flags for it, with dashes.
    """

    help: str
    range: tuple[float, ...] = ()
    choices: tuple[str, ...] = ()
    required: bool = False
    resume: str | None = None
    card: bool = False
    path: str | None = None
    alone: object = None
    aliases: tuple[str, ...] = ()

    def problem(self, name: str, value: Any) -> str | None:
        """Why the setting can't have this value, or None where it can. NaN lies in no range."""
        if self.choices and value is not None and value not in self.choices:
            return f"--{name} must be one of {', '.join(self.choices)}; got {value}."
        if self.path == "source" and looks_like_a_path(value) and not Path(value).exists():
            several = any(mark in value for mark in "*,") and name == "dataset_name"
            return f"--{name}={value} does not exist.{f' {ONE_DATASET}' if several else ''}"
        if value is None or not self.range:
            return None
        lowest, *highest = self.range
        if lowest <= value <= (highest[0] if highest else sys.float_info.max):
            return None
        limits = f"between {lowest} and {highest[0]}" if highest else f"at least {lowest}, and finite"
        return f"--{name} must be {limits}; got {value}."


def setting(default: Any, help: str, **more: Any) -> Any:
    """A field of a config: its default and a `Setting`."""
    return dataclasses.field(default=default, metadata={"setting": Setting(help, **more)})


def refuse_inside(dataset: str | None, name: str, folder: Path | str | None) -> None:
    """Stops where a folder for output lies in that of the dataset, and would be read as data the next time."""
    if dataset is None or folder is None or not Path(dataset).is_dir():
        return
    if Path(folder).resolve().is_relative_to(Path(dataset).resolve()):
        raise ValueError(
            f"--{name}={folder} lies in the dataset's own folder, where it would be read as data: name another one."
        )


def looks_like_a_path(source: object) -> bool:
    """Whether a source can't be a name on the Hub, which has one slash at most."""
    if not isinstance(source, str) or "://" in source:
        return False
    return source.startswith(("/", "./", "../")) or source.count("/") > 1 or "\\" in source


@dataclass(frozen=True, kw_only=True)
class Config:
    """What all groups and all configs can do. A value out of its range, or two that exclude each other, raise ValueError."""

    title: ClassVar[str] = ""
    hidden: ClassVar[tuple[str, ...]] = ()  # settings of its groups that a script has no flag for
    given: frozenset[str] = dataclasses.field(
        default=frozenset(), repr=False, compare=False
    )  # those that the user named

    def __post_init__(self) -> None:
        for name, declared in self.settings().items():
            problem = declared.problem(name, getattr(self, name))
            if problem:
                raise ValueError(problem)
        for group in _with_bases(type(self)):
            if "check" in vars(group):
                group.check(self)

    def check(self) -> None:
        """Raises ValueError where settings of this group exclude each other. Every group's own is called."""

    @classmethod
    def settings(cls) -> dict[str, Setting]:
        """The declarations of all flags, group by group."""
        fields = {field.name: field.metadata["setting"] for field in dataclasses.fields(cls) if field.metadata}
        return {name: fields[name] for names in cls.groups().values() for name in names}

    @classmethod
    def groups(cls) -> dict[str, list[str]]:
        """The names of the flags by the title of the group that first declares them, for --help and FLAGS.md."""
        names = {field.name for field in dataclasses.fields(cls) if "setting" in field.metadata} - {*cls.hidden}
        groups: dict[str, list[str]] = {}
        for group in _with_bases(cls):
            own = [name for name in vars(group).get("__annotations__", {}) if name in names]
            if own:
                groups.setdefault(group.title, []).extend(own)
            names -= {*own}
        return groups

    @classmethod
    def type_of(cls, name: str) -> type:
        """The type of a setting, without `| None`."""
        hint = typing.get_type_hints(cls)[name]
        if isinstance(hint, types.UnionType):
            hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
        return hint

    @classmethod
    def default(cls, name: str) -> Any:
        return next(field.default for field in dataclasses.fields(cls) if field.name == name)

    def values(self, **wanted: object) -> dict[str, Any]:
        """The values of the settings whose declarations have these attributes: `config.values(resume="same")`."""
        return {
            name: getattr(self, name)
            for name, declared in self.settings().items()
            if all(getattr(declared, attribute) == value for attribute, value in wanted.items())
        }

    def replace(self: AnyConfig, **changes: Any) -> AnyConfig:
        """The same with other values."""
        return dataclasses.replace(self, **changes)


def _with_bases(cls: type) -> list[type["Config"]]:
    """The groups that a config is made of, in the order in which it names them, then itself."""
    if not issubclass(cls, Config):
        return []
    groups = [group for base in cls.__bases__ for group in _with_bases(base)]
    return list(dict.fromkeys([*groups, cls]))


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Config):
    title = "model"
    cache_dir: str | None = setting(None, "Folder for downloaded models and datasets.", path="any")


# Sources of pairs, and what becomes of their images and captions.


@dataclass(frozen=True, kw_only=True)
class PairsConfig(Config):
    title = "pairs from a dataset"
    dataset_name: str | None = setting(
        None,
        "Identifier of a dataset on the Hub, a local folder of parquet, JSONL or CSV files, such a file, an imagefolder with "
        "metadata, or a folder with chosen/ and rejected/. Columns: jpg_0, jpg_1, label_0, caption; or chosen, rejected, "
        "prompt; or those of HPDv2, HPDv3, ImageRewardDB or Rapidata.",
        path="source",
    )
    dataset_config_name: str | None = setting(None, "Configuration of the dataset, if it has several.")
    dataset_split_name: str | None = setting(None, "Split to read. Default: the only one, else train.")
    columns: tuple[str, ...] = setting(
        (),
        "Columns, where the dataset has other names for them: chosen=NAME rejected=NAME prompt=NAME, or image_0=NAME "
        "image_1=NAME label=NAME prompt=NAME, where the label is 1 if the first image is preferred, 0 if the second is, and 0.5 "
        "for a tie; or prompt=NAME alone.",
    )
    image_root: str | None = setting(
        None,
        "Folder that paths of images in a table start from, and must stay in. Default: the table's own.",
        path="source",
    )
    soft_labels: bool = setting(
        False,
        "label_0 is the share of the votes that are for the first image, 0 to 1, instead of 1, 0 or 0.5. The majority decides; "
        "--min_agreement skips pairs on which it is small.",
    )
    min_agreement: float | None = setting(
        None,
        "Share of the votes, 0.5 to 1, that must be for the preferred image; other pairs are skipped, and counted. "
        "Default: a majority will do.",
        range=(0.5, 1),
    )
    pairs_per_group: str = setting(
        "all",
        "Pairs of the images that are ranked for a prompt: all, or the best against the worst.",
        choices=("all", "best_worst"),
    )

    @property
    def named_columns(self) -> dict[str, str]:
        """The columns that are named, by what they hold."""
        return dict(part.split("=", 1) for part in self.columns)

    def check(self) -> None:
        ways = {"chosen", "rejected", "prompt"}, {"image_0", "image_1", "label", "prompt"}, {"prompt"}
        wrong = next((part for part in self.columns if part.partition("=")[0] not in set.union(*ways)), None)
        if wrong is not None or not all(part.partition("=")[2] for part in self.columns):
            raise ValueError(
                f"--columns {' '.join(self.columns)}: write what a column holds and its name, as in --columns chosen=NAME"
                " rejected=NAME prompt=NAME, or image_0=NAME image_1=NAME label=NAME prompt=NAME."
            )
        if self.columns and set(self.named_columns) not in ways:
            raise ValueError(
                f"--columns {' '.join(self.columns)}: name all columns: chosen, rejected and prompt; or image_0, image_1,"
                " label and prompt; or prompt alone."
            )


@dataclass(frozen=True, kw_only=True)
class ShardsConfig(Config):
    title = "pairs from shards"
    dataset_path: tuple[str, ...] = setting(
        (),
        "Folders of shards, paths with braces or wildcards, s3:// or https:// URLs with braces, or `pipe:` commands. "
        "Commands run in a shell: name only those you trust. WDS_SECURE=1 in the environment refuses them.",
        path="any",
    )
    shuffle_buffer_size: int = setting(
        1024,
        "Samples, undecoded, that all processes together shuffle among; 1 keeps the order within shards. A resumed run must "
        "keep it.",
        range=(1,),
    )
    max_bad_samples: float = setting(
        0.01, "Share of a process's samples that may be bad before the run stops, from 0 to 1.", range=(0, 1)
    )


@dataclass(frozen=True, kw_only=True)
class SourceConfig(PairsConfig, ShardsConfig):
    """Pairs from a dataset or from shards."""

    title = "pairs"
    max_train_samples: int | None = setting(None, "Train on at most this many pairs, the first ones.", range=(1,))
    cache_latents: bool = setting(
        False,
        "Encode every image and prompt once, before training, and train from datasets' cache. Later on, the VAE is loaded "
        "for validation images only, and text encoders once, for their prompts.",
    )
    dataloader_num_workers: int = setting(
        0, "Processes that decode images. 0: the main process decodes them.", range=(0,)
    )

    def check(self) -> None:
        if (self.dataset_name is None) == (not self.dataset_path):
            raise ValueError("Name one source of pairs: --dataset_name for a dataset, or --dataset_path for shards.")
        source, others = ("shards", PairsConfig) if self.dataset_path else ("a dataset", ShardsConfig)
        useless = [name for name in others.settings() if name in self.given]
        if self.dataset_path and "cache_latents" in self.given:
            useless.append("cache_latents")
        if useless:
            raise ValueError(f"--{useless[0]} has no effect with pairs from {source}.")


@dataclass(frozen=True, kw_only=True)
class ShapesConfig(Config):
    title = "images"
    resolution: int = setting(
        1024,
        "Images are resized by their shorter side and cropped to this.",
        range=(8,),
        resume="same",
        card=True,
    )
    aspect_ratio_buckets: str | bool | None = setting(
        None,
        "Crop each pair to the shape, of several, that cuts away least of its two images, instead of to a square. Alone: "
        'shapes of the area of --resolution, from 1:2 to 2:1. Or list them, in quotes: "height,width;height,width;...".',
        alone=True,
        resume="same",
        card=True,
    )

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Heights and widths that images are cropped to, in pixels."""
        return parse_shapes(self.aspect_ratio_buckets, self.resolution)

    def check(self) -> None:
        self.shapes  # raises where the list can't be read


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(ShapesConfig):
    title = "images"
    max_crop: float = setting(
        1.0,
        "Skip, and count, pairs of which an image would lose more than this share of its area.",
        range=(0, 1),
        resume="same",
        card=True,
    )
    random_crop: bool = setting(
        False, "Crop at random, both images of a pair alike. Default: the centre.", resume="warn", card=True
    )
    random_flip: bool = setting(False, "Mirror half of the pairs, both images alike.", resume="warn", card=True)
    proportion_empty_prompts: float = setting(
        0.0,
        "Share of captions replaced by the empty string, from 0 to 1.",
        range=(0, 1),
        resume="warn",
        card=True,
        aliases=("--caption_dropout",),
    )


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(Config):
    title = "validation"
    run_validation: bool = setting(
        False,
        "Measure held-out pairs and generate images during training, and both with and without the LoRA after it.",
    )
    num_validation_pairs: int = setting(
        64,
        "Pairs, at most, kept out of training to measure preference accuracy on, with --run_validation: in a dataset, "
        "those that share an image stay together; in shards, they are the first samples.",
        range=(0,),
    )

    @property
    def num_held_out(self) -> int:
        """Pairs to keep out of training, at most."""
        return self.num_validation_pairs if self.run_validation else 0


@dataclass(frozen=True, kw_only=True)
class LoadingConfig(SourceConfig, ImagesConfig, HeldOutConfig, CacheConfig):
    """Which pairs to train on and which to hold out, and what becomes of their images and captions."""


# The model.


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(CacheConfig):
    title = "model"
    pretrained_model_name_or_path: str = setting(
        "",
        "Path to pretrained model or model identifier from huggingface.co/models.",
        required=True,
        path="source",
    )
    pretrained_vae_model_name_or_path: str | None = setting(
        None,
        "Path or identifier of a VAE to use instead of the model's own, such as madebyollin/sdxl-vae-fp16-fix, "
        "which works in float16. A VAE whose config says `force_upcast` runs in float32.",
        card=True,
        path="source",
    )
    revision: str | None = setting(None, "Revision of the pretrained model.")
    variant: str | None = setting(None, "Variant of the pretrained model's files, e.g. fp16.")
    source_flag: str = "pretrained_model_name_or_path"  # which flag named the model

    @property
    def named_source(self) -> str:
        """The model as a message names it."""
        return f"--{self.source_flag}={printable(self.pretrained_model_name_or_path)}"

    @property
    def source_options(self) -> dict[str, str | None]:
        """Arguments of diffusers' loaders that say which files of the model are meant."""
        return {"revision": self.revision, "cache_dir": self.cache_dir}


@dataclass(frozen=True, kw_only=True)
class NoiseConfig(Config):
    """What some families are told. None: the family has no such setting."""

    title = "loss"
    prediction_type: str | None = setting(
        None,
        "What the U-Net predicts. Default: what the model's noise scheduler says.",
        choices=("epsilon", "v_prediction"),
        resume="same",
        card=True,
    )
    snr_gamma: float | None = setting(
        None,
        "Weigh each pair by min-SNR with this gamma (arXiv 2303.09556; 5.0 is usual). Default: no weighting.",
        range=(1e-6,),
        resume="warn",
        card=True,
    )
    weighting_scheme: str | None = setting(
        None,
        "How noise levels are weighted: logit_normal and mode sample some timesteps more often, sigma_sqrt and cosmap sample "
        "all equally and weigh the loss, none does neither.",
        choices=("logit_normal", "mode", "sigma_sqrt", "cosmap", "none"),
        resume="warn",
        card=True,
    )
    logit_mean: float | None = setting(
        None, "Mean of logit_normal: larger values mean less noise.", range=(-10, 10), resume="warn", card=True
    )
    logit_std: float | None = setting(
        None, "Standard deviation of logit_normal.", range=(0, 10), resume="warn", card=True
    )
    mode_scale: float | None = setting(
        None,
        "Scale of mode, from -1 to 1.75: above 0 samples the middle more often, below 0 the ends.",
        range=(-1, 1.75),
        resume="warn",
        card=True,
    )
    max_sequence_length: int | None = setting(
        None,
        "Tokens of a prompt that the text encoder reads, in families where it reads as many as it is told to.",
        range=(1,),
        resume="warn",
        card=True,
    )
    guidance_scale: float | None = setting(
        None,
        "Guidance scale that the model is told in training, where it takes one: FLUX.1-dev and FLUX.2-dev do, FLUX.1-schnell "
        "and FLUX.2 klein don't.",
        range=(0,),
        resume="warn",
        card=True,
    )

    @property
    def sampler_config(self) -> dict[str, str]:
        """Entries of the sampler's configuration that the settings override."""
        return {} if self.prediction_type is None else {"prediction_type": self.prediction_type}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(ShapesConfig, CheckpointConfig, NoiseConfig):
    """A base model, its LoRA, and how both are used."""

    title = "model"
    validation_model_path: str | None = setting(
        None,
        "Another checkpoint of the same architecture to generate the validation images with, such as the distilled one that "
        "the LoRA is for: a folder, or an identifier. It is loaded for each validation, with the LoRA as it is then, "
        "beside the model that trains. Give the steps and the guidance that it wants, as in "
        "--validation_inference_steps=4 --validation_guidance_scale=1. Default: the model that trains.",
        card=True,
        path="source",
    )
    bnb_quantization_config_path: str | None = setting(
        None,
        "Load the denoiser's linear layers in 8 or 4 bits with bitsandbytes: less memory, slower. 8bit, nf4, or a JSON file of "
        'what diffusers\' BitsAndBytesConfig takes: {"load_in_4bit": true, "bnb_4bit_quant_type": "nf4"}. A compute dtype '
        "that the file leaves out is that of --mixed_precision. The LoRA trains in float32 all the same, and loads into the "
        "model that is not quantized. Needs a GPU.",
        resume="same",
    )
    rank: int = setting(4, "Rank of the LoRA matrices.", range=(1,), resume="same", card=True)
    lora_alpha: float | None = setting(
        None, "The LoRA is scaled by alpha / rank. Default: the rank.", resume="same", card=True
    )
    lora_dropout: float = setting(
        0.0, "Dropout probability in the LoRA layers.", range=(0, 1), resume="warn", card=True
    )
    lora_layers: str = setting(
        "to_k,to_q,to_v,to_out.0",
        "Comma-separated names of the denoiser's modules that get a LoRA, or ends of names; * stands for anything. Default: "
        "all attention projections, and in FLUX.1 and FLUX.2 the feed-forward layers.",
        resume="same",
        card=True,
    )
    init_lora_weights: str | None = setting(
        None,
        "A LoRA to start from, in place of one that changes nothing, as for a second round on pairs generated with it: folder, "
        "file or name on the Hub, from diffusers, PEFT or kohya's scripts, for the modules and of the rank that the run "
        "trains. A resumed run continues from its checkpoint.",
        resume="warn",
        card=True,
        path="any",
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations backward: less memory, slower.")
    compile: bool = setting(
        False, "Compile the denoiser's repeated blocks with torch.compile: a minute at the start, then faster steps."
    )
    vae_encode_batch_size: int = setting(8, "Images that the VAE encodes at once; bounds its memory.", range=(1,))
    mixed_precision: str | None = setting(
        None,
        "Precision of the frozen weights and of the forward pass; the LoRA trains in float32 in any case. "
        "Default: as in the accelerate configuration.",
        choices=("no", "fp16", "bf16"),
        resume="same",
        card=True,
    )

    @property
    def alpha(self) -> float:
        """Of the LoRA, which is scaled by alpha / rank."""
        return self.rank if self.lora_alpha is None else self.lora_alpha

    @property
    def lora_layer_names(self) -> list[str]:
        return [name.strip() for name in self.lora_layers.split(",")]


# Training.


@dataclass(frozen=True, kw_only=True)
class LossConfig(Config):
    title = "loss"
    beta_orpo: float | None = setting(
        None,
        "Strength as in the paper, in place of --loser_share: the weight of the odds ratio term; 0 is supervised fine-tuning on "
        "the chosen images. It is strong at small errors and weak at large ones, so it means something else for every "
        "model and noise level.",
        range=(0,),
        resume="warn",
        card=True,
    )
    loser_share: float | None = setting(
        None,
        "Strength, above 0 and below 0.5: the rejected image's share of a pair's gradient while both images are "
        "predicted equally well. It means the same at every noise level and for every model. 0.375 is safe, 0.475 strong. "
        "Default: 0.375, unless --beta_orpo is given.",
        resume="same",
        card=True,
    )
    odds_temperature: float = setting(
        1.0,
        "Flattens the odds ratio's sigmoid where it is above 1: pairs whose chosen image has the larger error, as many of those "
        "with wrong labels have, then weigh less. 4 is good where people often disagree; 1 is ORPO as published.",
        range=(1e-3,),
        resume="warn",
        card=True,
    )

    def __post_init__(self) -> None:
        if self.beta_orpo is None and self.loser_share is None:
            object.__setattr__(self, "loser_share", 0.375)
        super().__post_init__()

    def check(self) -> None:
        if self.loser_share is None:
            return
        if not 0 < self.loser_share < 0.5:
            raise ValueError(
                f"--loser_share={self.loser_share} must lie above 0 and below 0.5. For fine-tuning on chosen images use"
                " --beta_orpo=0."
            )
        if self.beta_orpo is not None:
            raise ValueError("--loser_share and --beta_orpo are two ways to set the same strength: give one of them.")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    title = "optimization"
    seed: int | None = setting(
        None,
        "Seed of everything random. Default: a random one, which is logged.",
        range=(0, 2**32 - 1),
        resume="same",
        card=True,
    )
    train_batch_size: int = setting(4, "Pairs per device and forward pass.", range=(1,), card=True)
    num_train_epochs: int = setting(1, "Passes over the pairs.", range=(1,))
    max_train_steps: int | None = setting(None, "Optimizer steps; overrides --num_train_epochs.", range=(1,))
    gradient_accumulation_steps: int = setting(
        1, "Forward passes whose gradients make one step.", range=(1,), card=True
    )
    learning_rate: float = setting(1e-4, "Learning rate after warm-up.", range=(0,), resume="same", card=True)
    lr_scheduler: str = setting(
        "constant",
        "Learning-rate schedule.",
        choices=("linear", "cosine", "constant", "constant_with_warmup"),
        resume="same",
        card=True,
    )
    lr_warmup_steps: int = setting(0, "Optimizer steps of warm-up; `constant` has none.", range=(0,), card=True)
    optimizer: str = setting(
        "AdamW",
        "AdamW, the same with 8-bit states from bitsandbytes, or Prodigy (arXiv 2306.06101; `pip install prodigyopt`), which "
        "finds its own step size: give it --learning_rate=1.",
        choices=("AdamW", "AdamW8bit", "prodigy"),
        resume="same",
        card=True,
    )
    adam_weight_decay: float = setting(1e-2, "Weight decay.", range=(0,), resume="same")
    max_grad_norm: float = setting(1.0, "Gradient norm limit; 0 is no limit.", range=(0,), resume="warn", card=True)


# What the model generates when the run is validated: a face, a medium, a place and a relation between objects.
VALIDATION_PROMPTS = (
    "close-up portrait of an old fisherman laughing, window light, 85mm photograph",
    "a fox reading a newspaper in a cafe, watercolor on rough paper",
    "a quiet harbor at dawn, fog over wooden boats, wide angle, highly detailed",
    "a red teapot left of a stack of three blue books on a marble table",
)


@dataclass(frozen=True, kw_only=True)
class ValidationConfig(HeldOutConfig):
    title = "validation"
    keep_best: bool = setting(
        False,
        "Make the checkpoint with the best accuracy on held-out pairs the result, in place of the last step; never one whose "
        "eval_prompt_margin is below half of the base's. Each new best is saved when it is validated, and "
        "--checkpoints_total_limit keeps it.",
        resume="same",
        card=True,
    )
    validation_steps: int = setting(200, "Optimizer steps between validations.", range=(1,))
    validation_prompts: tuple[str, ...] = setting(
        VALIDATION_PROMPTS, "Prompts to generate images of. Default: four built-in ones."
    )
    num_validation_images: int = setting(1, "Images per validation prompt.", range=(1,))
    validation_inference_steps: int = setting(25, "Sampling steps per image.", range=(1,))
    validation_guidance_scale: float = setting(5.0, "Classifier-free guidance.")
    validation_scorer: str | None = setting(
        None,
        "Scorer of the validation images: logs how often the LoRA's beat the base's from the same seeds. A built-in "
        f"one ({', '.join(BUILT_IN)}), or your own as my_module:my_function or path/to/file.py:my_function. Its model "
        "stays in the first GPU's memory.",
        path="any",
    )

    def check(self) -> None:
        if self.keep_best and not self.num_held_out:
            raise ValueError(
                "--keep_best compares checkpoints on held-out pairs, and there are none: add --run_validation, and set "
                "--num_validation_pairs above 0."
            )
        if self.validation_scorer is not None and not self.run_validation:
            raise ValueError("--validation_scorer needs --run_validation.")


@dataclass(frozen=True, kw_only=True)
class OutputConfig(Config):
    title = "output"
    output_dir: str = setting("diffusion-orpo-lora", "Folder of checkpoints, logs and the trained LoRA.", path="any")
    checkpointing_steps: int = setting(500, "Optimizer steps between checkpoints.", range=(1,))
    checkpoints_total_limit: int | None = setting(None, "Keep this many of the newest. Default: all.", range=(1,))
    resume_from_checkpoint: str | None = setting(
        None,
        'A checkpoint folder (a path, or a name in --output_dir), or "latest": the newest in --output_dir, if there is one.',
        path="any",
    )
    report_to: str = setting("tensorboard", '"tensorboard", "wandb", "comet_ml", "all" (those installed) or "none".')
    push_to_hub: bool = setting(
        False, "Upload LoRA, model card and images at the end, with the token of `hf auth login` or HF_TOKEN."
    )
    hub_model_id: str | None = setting(None, "Repository to upload to. Default: the name of --output_dir.")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(LoadingConfig, ModelConfig, LossConfig, OptimizerConfig, ValidationConfig, OutputConfig):
    """Everything that decides a training run."""

    def check(self) -> None:
        refuse_inside(self.dataset_name, "output_dir", self.output_dir)
        if self.cache_latents and self.random_crop:
            raise ValueError("--cache_latents keeps one crop of each image, the centre: leave --random_crop out.")
        if self.validation_model_path is not None and not self.run_validation:
            raise ValueError(
                "--validation_model_path generates the images of validation: add --run_validation, or leave it out."
            )


# The other scripts.


@dataclass(frozen=True, kw_only=True)
class CheckConfig(LoadingConfig, CheckpointConfig):
    title = "output"
    hidden = (
        "cache_latents",
        "shuffle_buffer_size",
        "dataloader_num_workers",
        "random_crop",
        "random_flip",
        "proportion_empty_prompts",
        "pretrained_vae_model_name_or_path",
        "variant",
    )
    pretrained_model_name_or_path: str = setting(
        "",
        "Pipeline whose tokenizers measure the prompts: a path, or a model identifier from huggingface.co/models.",
        path="source",
    )
    max_sequence_length: int | None = setting(
        None,
        "Tokens of a prompt that training will read, for tokenizers other than CLIP's. Default: what the tokenizer says.",
        range=(1,),
    )
    scorers: tuple[str, ...] = setting(
        (),
        "Say how often these scorers agree with the labels. Built in: "
        f"{', '.join(BUILT_IN)}. Your own: my_module:my_function or path/to/file.py:my_function, a function of images "
        "and prompts that returns a score for each, the higher the better.",
        path="any",
    )
    output_dir: Path = setting(Path("preference_check"), "Folder for report.json and index.html.")
    num_sample_pairs: int = setting(12, "Pairs to show, sampled at random; 0: none.", range=(0,))
    filter: Path | None = setting(
        None,
        "New folder for a copy, as parquet, without the pairs that it complains about: contradictions, duplicates, pairs of an "
        "image with itself, bad rows, low agreement; and without ties.",
    )
    num_scored_pairs: int = setting(1000, "Pairs that --scorers score, sampled at random; 0: all.", range=(0,))
    num_workers: int | None = setting(None, "Processes that decode. Default: one per core.", range=(0,))

    @property
    def workers(self) -> int:
        return num_cores() if self.num_workers is None else self.num_workers

    def check(self) -> None:
        if self.filter is not None and self.filter.exists():
            if self.filter.is_file() or any(self.filter.iterdir()):
                raise ValueError(f"--filter={self.filter} already exists: name a new folder.")
        for name in ("filter", "output_dir"):
            refuse_inside(self.dataset_name, name, getattr(self, name))


# Settings of the model that decide an encoding.
ENCODED_WITH = (
    "pretrained_model_name_or_path",
    "pretrained_vae_model_name_or_path",
    "revision",
    "variant",
    "resolution",
    "aspect_ratio_buckets",
    "max_sequence_length",
    "mixed_precision",
    "vae_encode_batch_size",
)


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(PairsConfig, ModelConfig):
    title = "conversion"
    hidden = tuple(name for name in ModelConfig.settings() if name not in (*ENCODED_WITH, "cache_dir"))
    pretrained_model_name_or_path: str = setting(
        "", "Model to encode with: a path, or a model identifier from huggingface.co/models.", path="source"
    )
    output_dir: str = setting(
        "",
        "Folder for the shards, or s3://bucket/prefix. On a cluster a folder that all nodes share.",
        required=True,
        path="any",
    )
    shard_size_mb: float = setting(500.0, "Approximate size of a shard, in 10^6 bytes.")
    keep_ties: bool = setting(False, "Write pairs with label 0.5, too.")
    ray_address: str | None = setting(None, "Ray cluster to run on. Default: this machine, all its cores.")
    staging_dir: str | None = setting(
        None, "Folder where shards wait for their upload to S3. Default: the system's temporary one.", path="any"
    )
    verify: bool = setting(False, "Convert nothing; compare the shards in --output_dir with the manifest.")
    encode: bool = setting(
        False,
        "Write latents of both images, cropped at the centre, and the prompt's embeddings. On all GPUs that Ray finds, or else "
        "on this machine's cores.",
    )

    def check(self) -> None:
        useless = [name for name in ENCODED_WITH if name in self.given]
        if useless and not self.encode:
            raise ValueError(f"--{useless[0]} has no effect without --encode.")
        if self.encode and not self.pretrained_model_name_or_path:
            raise ValueError("--encode needs --pretrained_model_name_or_path.")
        if self.dataset_name is None and not self.verify:
            raise ValueError("--dataset_name is needed, except with --verify.")
        if self.dataset_split_name is not None and not re.fullmatch(r"\w+", self.dataset_split_name):
            raise ValueError(
                f"--dataset_split_name={self.dataset_split_name} is not the name of a split: letters, digits and _ only."
            )
        if not self.shard_size_mb > 0:
            raise ValueError(f"--shard_size_mb={self.shard_size_mb:g} must be above 0.")


@dataclass(frozen=True, kw_only=True)
class PromptsConfig(Config):
    """The prompts to generate images of."""

    title = "prompts"
    prompt_file: Path | None = setting(None, "Text file with one prompt per line. Default: the built-in prompts.")
    dataset_name: str | None = setting(
        None, "Dataset to take prompts from: on the Hub, or a local folder.", path="source"
    )
    dataset_config_name: str | None = setting(None, "Configuration of the dataset, if it has several.")
    dataset_split_name: str | None = setting(None, "Split to read. Default: the only one, else train.")
    caption_column: str | None = setting(
        None, "Column of the prompts. Default: the first that exists of caption, prompt, Prompt, text."
    )
    num_prompts: int | None = setting(
        None,
        "Take at most this many different prompts, the first ones. Default: all of a file, the first 100 of a dataset.",
        range=(1,),
    )

    def check(self) -> None:
        if self.prompt_file is not None and self.dataset_name is not None:
            raise ValueError("--prompt_file and --dataset_name: choose one.")
        if self.prompt_file is not None and not self.prompt_file.exists():
            raise ValueError(f"--prompt_file={self.prompt_file} does not exist.")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig(CheckpointConfig, PromptsConfig):
    """A model that generates images, and how."""

    title = "generation"
    lora_weights: str | None = setting(
        None,
        "A trained LoRA to generate with, for a second round: a folder, a file, or a name on the Hub.",
        path="source",
    )
    lora_scale: float = setting(1.0, "Strength of the LoRA.")
    prediction_type: str | None = setting(
        None,
        "What the U-Net predicts, where the training was told so. Default: what the model's scheduler says.",
        choices=("epsilon", "v_prediction"),
    )
    dtype: str | None = setting(
        None,
        "Precision to generate in. Default: fp16 or bf16 on a GPU, depending on the family; fp32 on a CPU.",
        choices=("fp32", "fp16", "bf16"),
    )
    resolution: int | None = setting(
        None,
        "Pixels per side. Default: 1024, and 512 for Stable Diffusion 1.x and 2.x; name 768 for 2.1.",
        range=(8,),
    )
    num_inference_steps: int = setting(30, "Sampling steps per image.", range=(1,))
    guidance_scale: float | None = setting(
        None, "Classifier-free guidance. Default: as in training's validation.", range=(0,)
    )
    max_sequence_length: int | None = setting(
        None, "Tokens of a prompt that are read, in families that have the flag. Default: as in training.", range=(1,)
    )
    seed: int = setting(
        0, "Seed of the first image; each further one has the next. A second round needs other seeds.", range=(0,)
    )
    batch_size: int = setting(4, "Images generated at once.", range=(1,))


def repeated_label(scorers: tuple[str, ...]) -> str | None:
    """A name that two scorers share, under which their results could not be told apart."""
    labels = [scorer.rpartition(":")[2] for scorer in scorers]
    return next((label for label in labels if labels.count(label) > 1), None)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(GenerationConfig):
    title = "scoring and output"
    lora_weights: str = setting(
        "", "The trained LoRA: a folder, a file, or a name on the Hub.", required=True, path="source"
    )
    num_images_per_prompt: int = setting(1, "Images per prompt and model.", range=(1,))
    scorers: tuple[str, ...] = setting(
        ("pickscore",),
        f"Built in: {', '.join(BUILT_IN)}. Your own: my_module:my_function or path/to/file.py:my_function, a "
        "function of images and prompts that returns a score for each, the higher the better.",
        path="any",
    )
    output_dir: Path = setting(Path("evaluation"), "Folder for all that is written.")
    base_images_dir: Path | None = setting(
        None, "Folder of the base's images, which several evaluations may share. Default: base, in --output_dir."
    )

    @property
    def base_dir(self) -> Path:
        return self.base_images_dir or self.output_dir / "base"

    def check(self) -> None:
        if (label := repeated_label(self.scorers)) is not None:
            raise ValueError(f"--scorers: names must differ; {label} is given twice.")


@dataclass(frozen=True, kw_only=True)
class MakingConfig(GenerationConfig):
    title = "scoring and output"
    chosen_dir: str | None = setting(
        None,
        "Folder of your own images, each with a caption file (fox.txt for fox.png), or with a metadata.jsonl: each of"
        " them is preferred to the model's images of its caption. Takes the place of prompts and scorers.",
        path="source",
        aliases=("--winners_dir",),
    )
    num_images_per_prompt: int | None = setting(
        None, "Images of each prompt, or of each caption in --chosen_dir. Default: 4, or 1.", range=(1,)
    )
    scorers: tuple[str, ...] = setting(
        (),
        f"Reward models that rank the images. Built in: {', '.join(BUILT_IN)}."
        " Your own: my_module:my_function or path/to/file.py:my_function, a function of images and prompts that"
        " returns a score for each, the higher the better. Default: none; label the images yourself with"
        " label_preferences.py.",
        path="any",
    )
    combine: str = setting(
        "consensus",
        "Several scorers: all must prefer the same image (consensus), or their weighted sum decides.",
        choices=("consensus", "sum"),
    )
    weights: tuple[float, ...] = setting(
        (), "Weights of the scorers, in their order, for --combine=sum. Default: equal."
    )
    min_margin: float = setting(
        0.25,
        "By how much an image must be better, in standard deviations of a scorer among the images of a prompt.",
        range=(0,),
    )
    pairs: str = setting(
        "best_worst",
        "The pair of each prompt that differs most (best against worst, with one scorer), or all with the margin.",
        choices=("best_worst", "all"),
    )
    output_dir: str = setting("preferences", "Folder for images/ and pairs/.", path="any")

    @property
    def images_per_prompt(self) -> int:
        return self.num_images_per_prompt or (4 if self.chosen_dir is None else 1)

    def check(self) -> None:
        if self.chosen_dir is not None:
            given = [f"--{name}" for name in ("prompt_file", "dataset_name", "scorers") if getattr(self, name)]
            if given:
                raise ValueError(
                    f"{', '.join(given)}: has no effect with --chosen_dir, which brings prompts and chosen images."
                )
        elif self.images_per_prompt < 2:
            raise ValueError(
                "--num_images_per_prompt must be at least 2: images of a prompt are compared with each other."
            )
        if (label := repeated_label(self.scorers)) is not None:
            raise ValueError(f"--scorers: names must differ; {label} is given twice.")
        if self.weights:
            if self.combine != "sum" or len(self.weights) != len(self.scorers):
                raise ValueError("--weights: one for each of the --scorers, with --combine=sum.")
            if not all(0 < weight < math.inf for weight in self.weights):
                raise ValueError("--weights must be positive, and finite.")


@dataclass(frozen=True, kw_only=True)
class LabellingConfig(Config):
    title = "labelling"
    images_dir: str = setting(
        "",
        "Folder of the images: with a metadata.jsonl, or with a caption file beside each image. Votes go there.",
        required=True,
        path="any",
    )
    annotator: str = setting("me", "Name of the annotator.")
    ranking: int | None = setting(
        None,
        "Show this many images of a prompt, and ask for the best, then the worst. Default: show two.",
        range=(3, 9),
    )
    overlap: float = setting(
        0.2,
        "Share of the questions that every annotator answers; each of the others goes to one.",
        range=(0, 1),
    )
    seed: int = setting(0, "Seed of the images' sides and of the order of questions.")
    port: int = setting(8765, "Port of the page; 0 for any free one.", range=(0, 65535))
    export: str | None = setting(
        None, "Write the votes of all annotators as a dataset to this folder, and serve no page.", path="any"
    )
