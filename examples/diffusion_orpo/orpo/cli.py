"""Command lines: flags and --help from the fields of a config, and the way from these to a trained LoRA.

Torch and the libraries on top of it take seconds to load, so nothing here imports them before the flags are known to be good.
Only this module sees what argparse makes of a command line; all others get a config.
"""

import argparse
import difflib
import os
import sys
import typing
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from .config import ONE_DATASET, AnyConfig, CheckpointConfig, Config, ConversionConfig, ModelConfig, TrainingConfig
from .models.quantization import read_bnb_config
from .models.registry import FAMILIES, Family, find_family
from .runtime.start import begin


if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from .models.latent_diffusion import LatentDiffusion
    from .pairs.dataset import PreferenceData
    from .store.encode import EncodingJob
    from .training.protocols import ModelFamily, PairSource


# Flags that there were, or that scripts like these have, and what takes their place.
REPLACED = {
    "quantize_base": "use --bnb_quantization_config_path=8bit or =nf4",
    "scale_lr": "multiply --learning_rate yourself",
    "lr_num_cycles": "--lr_scheduler is linear, cosine, constant or constant_with_warmup",
    "lr_power": "--lr_scheduler is linear, cosine, constant or constant_with_warmup",
    "adam_beta1": "it is 0.9",
    "adam_beta2": "it is 0.999",
    "adam_epsilon": "it is 1e-8",
    "prodigy_beta3": "Prodigy is set up as its authors advise for diffusion models",
    "prodigy_decouple": "Prodigy is set up as its authors advise for diffusion models",
    "prodigy_use_bias_correction": "Prodigy is set up as its authors advise for diffusion models",
    "prodigy_safeguard_warmup": "Prodigy is set up as its authors advise for diffusion models",
    "allow_tf32": "set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment",
    "hub_token": "run `hf auth login`, or set HF_TOKEN in the environment",
    "logging_dir": "TensorBoard's files are in logs/ in --output_dir",
    "tracker_name": "set WANDB_PROJECT in the environment",
    "ddp_timeout": "processes wait 30 minutes for one another",
    "validation_draws": "each held-out pair is predicted at 12 levels of noise",
    "num_train_examples": "samples are counted",
    "image_0_column": "use --columns image_0=NAME image_1=NAME label=NAME prompt=NAME",
    "image_1_column": "use --columns image_0=NAME image_1=NAME label=NAME prompt=NAME",
    "label_column": "use --columns image_0=NAME image_1=NAME label=NAME prompt=NAME",
    "chosen_column": "use --columns chosen=NAME rejected=NAME prompt=NAME",
    "rejected_column": "use --columns chosen=NAME rejected=NAME prompt=NAME",
    "prompt_column": "use --columns prompt=NAME",
    "split": "use --dataset_split_name",
    "judge": "use --annotator",
}


class Parser(argparse.ArgumentParser):
    """Errors are one line: what is wrong, and what may have been meant."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        line = sys.argv[1:] if args is None else args
        given = [argument.partition("=")[0] for argument in line if argument.startswith("--")]
        for flag in given:
            if flag not in self._option_string_actions:
                self.error(self._about_unknown(flag))
            takes_several = self._option_string_actions[flag].nargs == "+"
            if given.count(flag) > 1 and (takes_several or flag == "--dataset_name"):
                several = f" {ONE_DATASET}" if flag == "--dataset_name" else " Name all values after one."
                self.error(f"{flag} is given twice, and only the last one would count.{several}")
        if {"--optimizer", "--use_8bit_adam"} <= set(given):
            self.error("--optimizer and --use_8bit_adam set the same: choose one.")
        values, rest = self.parse_known_args(line, namespace)
        if rest:
            self.error(f"{rest[0]} belongs to no flag.{f' {ONE_DATASET}' if os.path.exists(rest[0]) else ''}")
        return values

    def _about_unknown(self, flag: str) -> str:
        if flag[2:] in REPLACED:
            return f"there is no {flag}: {REPLACED[flag[2:]]}."
        near = difflib.get_close_matches(flag, self._option_string_actions, n=1, cutoff=0.7)
        return f"there is no {flag}." + (f" Did you mean {near[0]}?" if near else " --help lists all flags.")


def make_parser(
    config: type[Config],
    description: str | None,
    defaults: dict[str, Any] | None = None,
    hidden: Iterable[str] = (),
) -> Parser:
    """A parser whose result holds the settings that a command line names, and no others.

    Args:
        config: whose settings become flags.
        description: for --help, shown as it is written.
        defaults: for --help, of settings that have another default than the config's.
        hidden: settings without a flag.
    """
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for title, names in config.groups().items():
        group = parser.add_argument_group(title)
        for name in names:
            if name not in hidden:
                _add_flag(group, config, name, (defaults or {}).get(name, config.default(name)))
    if "optimizer" in config.settings():  # as diffusers' scripts call it
        parser.add_argument(
            "--use_8bit_adam", dest="optimizer", action="store_const", const="AdamW8bit", help="--optimizer=AdamW8bit."
        )
    parser.add_argument("--debug", action="store_true", help="Show where an error arose.")
    return parser


def _add_flag(group: argparse._ArgumentGroup, config: type[Config], name: str, default: Any) -> None:
    setting, kind = config.settings()[name], config.type_of(name)
    shown = "" if default in (None, False, "", ()) or isinstance(default, tuple) else f" (default: {default})"
    options: dict[str, Any] = {"dest": name, "help": f"{setting.help}{shown}".replace("%", "%%")}
    if kind is bool:
        options["action"] = "store_true"
    else:
        options["required"] = setting.required
        options["choices"] = setting.choices or None
        item = kind
        if typing.get_origin(kind) is tuple:
            options["nargs"], item = "+", typing.get_args(kind)[0]
        elif setting.alone is not None:
            options["nargs"], options["const"] = "?", setting.alone
        if setting.path is not None or item is Path:
            options["type"] = lambda text: item(os.path.expanduser(text))  # a shell leaves --name=~/folder as it is
        else:
            options["type"] = item
        if setting.choices:
            options["type"] = lambda text: next((c for c in setting.choices if c.lower() == text.lower()), text)
            options["metavar"] = "{" + ",".join(setting.choices) + "}"
    group.add_argument(f"--{name}", *setting.aliases, **options)


def parse(parser: Parser, line: list[str] | None) -> dict[str, Any]:
    """The settings that a command line names."""
    given: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(line)).items()
        if name != "debug"
    }
    if "bnb_quantization_config_path" in given:
        given["bnb_quantization_config_path"] = read_bnb_config(given["bnb_quantization_config_path"])
    return given


def read_flags(config: type[AnyConfig], description: str | None, line: list[str] | None = None) -> AnyConfig:
    """The config that a command line stands for; exits with status 2 where it stands for none."""
    parser = make_parser(config, description)
    try:
        given = parse(parser, line)
        return config(**given, given=frozenset(given))
    except ValueError as error:
        parser.error(str(error))


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a script's `main` and ends the process: what a user can put right is said in one message, without a traceback."""
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        if "--debug" in sys.argv:
            raise
        if os.environ.get("RANK", "0") == "0" or not getattr(error, "is_shared", False):
            print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(1)


# Training.


def training_flags(families: tuple[Family, ...]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Defaults of a script that trains these families, and the settings that none of them has."""
    defaults = families[0].defaults if len(families) == 1 else {}
    return defaults, tuple(name for name in Family.special() if not any(name in family.own for family in families))


def parse_training_flags(
    description: str | None, families: tuple[Family, ...], line: list[str] | None = None
) -> TrainingConfig:
    """The config of a training run; exits with status 2 where flags are wrong or contradict each other."""
    defaults, hidden = training_flags(families)
    parser = make_parser(TrainingConfig, description, defaults, hidden)
    try:
        return training_config(families, **parse(parser, line))
    except ValueError as error:
        parser.error(str(error))


def training_config(families: tuple[Family, ...] = tuple(FAMILIES.values()), **settings: Any) -> TrainingConfig:
    """The config of a training run, with the defaults of the model's family.

    Args:
        families: those that the model may belong to.
        settings: fields of `TrainingConfig`.

    Raises:
        ValueError: a setting is wrong, or two contradict each other, or the model belongs to none of the families.
    """
    family = families[0]
    if len(families) > 1:
        TrainingConfig(
            **settings, given=frozenset(settings)
        )  # flags that are wrong for every family, before torch loads
        family = find_family(CheckpointConfig(**_part_of(CheckpointConfig, settings)), families)
    config = TrainingConfig(**family.fill_in(settings), given=frozenset(settings))
    family.check(config)
    if config.validation_scorer is not None and os.environ.get("RANK", "0") == "0":  # the main process scores
        from .scoring.scorers import check_scorer

        try:
            check_scorer(config.validation_scorer, config.resolution)
        except ValueError as error:
            raise ValueError(f"--validation_scorer: {error}") from error
    return config


def encoding_config(config: ConversionConfig) -> ModelConfig:
    """What `--encode` encodes with: what the flags say, and the family's defaults for the rest.

    Raises:
        ValueError: the model does not exist or belongs to no known family, or the family can't do what the flags say.
    """
    declared, family = ModelConfig.settings(), find_family(config)
    settings = {name: getattr(config, name) for name in config.given if name in declared}
    for name, value in settings.items():
        if declared[name].path is not None and os.path.isdir(value):
            settings[name] = os.path.abspath(value)  # the encoders run elsewhere
    model = ModelConfig(**_part_of(ModelConfig, family.fill_in(settings)))
    family.check(model)
    return model


def plan_encoding(config: ConversionConfig) -> "EncodingJob":
    """How `--encode` encodes.

    Raises:
        ValueError: see `encoding_config`, or the model can't be used.
    """
    from .models.identity import encoding_identity
    from .runtime.precision import DTYPES
    from .store.encode import EncodingJob

    model = encoding_config(config)
    family, dtype = find_family(model).load_class(), DTYPES[model.mixed_precision or "no"]
    family.check(model)
    load, identity = partial(_load_encoders, family, model, dtype), encoding_identity(family, model, dtype)
    return EncodingJob(load, identity, model.shapes, model.vae_encode_batch_size)


def _load_encoders(family: "type[LatentDiffusion]", config: ModelConfig, dtype: "torch.dtype") -> "LatentDiffusion":
    """VAE and text encoders of a model, on the GPU where there is one."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return family.load(config, device, dtype, denoiser=False)


def _part_of(config: type[Config], settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name in config.settings()}


def train(script: str, config: TrainingConfig, families: tuple[Family, ...]) -> int:
    """Opens the pairs, loads the model and trains its LoRA.

    Args:
        script: its path, for messages.
        config: of the run.
        families: those that the script trains.

    Returns:
        The exit status: see `Trainer.train`.
    """
    begin(script)

    from .training.run import start_run
    from .training.trainer import Trainer

    with start_run(config) as run:
        family = find_family(config, families).load_class()
        family.check(config, is_resumed=run.checkpoint is not None)
        pairs = load_pairs(config, run.accelerator)
        model = load_model(config, run.accelerator, encoders=not pairs.is_encoded)
        return Trainer(config, model, pairs, run).train()


def load_model(
    config: TrainingConfig, accelerator: "Accelerator | None" = None, encoders: bool = True
) -> "ModelFamily":
    """Loads the model of a training run, with a LoRA that changes nothing yet.

    Args:
        config: of the run.
        accelerator: of the run. Default: as the config and `accelerate launch` say.
        encoders: whether VAE and text encoders are needed.
    """
    from accelerate.utils import set_seed

    from .runtime.precision import DTYPES
    from .training.run import make_accelerator

    if accelerator is None:
        accelerator = make_accelerator(config)
        if config.seed is not None:
            set_seed(config.seed)  # the LoRA begins at random; a script has done so already
    dtype = DTYPES[accelerator.mixed_precision]
    return find_family(config).load_class().load(config, accelerator.device, dtype, encoders=encoders)


def load_pairs(config: TrainingConfig, accelerator: "Accelerator | None" = None) -> "PairSource":
    """Opens the source that the config names, and encodes it where it says so.

    Args:
        config: of the run.
        accelerator: of the run. Default: as the config and `accelerate launch` say.

    Raises:
        ValueError, OSError: see `load_pairs` of the dataset, and `load_shards`.
    """
    from .runtime.precision import DTYPES
    from .runtime.processes import main_process_first
    from .training.run import make_accelerator

    accelerator = accelerator or make_accelerator(config)
    family, dtype = find_family(config).load_class(), DTYPES[accelerator.mixed_precision]
    if config.dataset_path:
        from .store.stream import load_shards

        return load_shards(config, accelerator, lambda: family.encoding_identity(config, dtype))
    from .pairs.dataset import DataOptions, load_pairs

    with main_process_first(accelerator):  # the others then find the data in the cache
        data = load_pairs(DataOptions.from_config(config))
    return encode_pairs(data, config, accelerator, family, dtype) if config.cache_latents else data


def encode_pairs(
    data: "PreferenceData",
    config: TrainingConfig,
    accelerator: "Accelerator",
    family: "type[LatentDiffusion]",
    dtype: "torch.dtype",
) -> "PreferenceData":
    """The same pairs, encoded by the family's VAE and text encoders or found in the cache: see `cache_encodings`."""
    from .store.encode import cache_encodings

    return cache_encodings(
        data,
        accelerator,
        identify=lambda: family.encoding_identity(config, dtype),
        load_model=lambda: family.load(config, accelerator.device, dtype, denoiser=False),
        vae_batch_size=config.vae_encode_batch_size,
        cache_dir=config.cache_dir,
    )
