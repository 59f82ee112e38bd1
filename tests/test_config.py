"""The settings as a whole: what command lines make of them, what they say of themselves, and that FLAGS.md lists them all."""

import dataclasses
import math
from dataclasses import dataclass

import pytest
from orpo import config
from orpo.cli import REPLACED, make_parser, parse_training_flags, read_flags, training_config, training_flags
from orpo.config import CheckConfig, Config, setting
from orpo.models.registry import FAMILIES, SD3, SDXL

from flags_page import PAGE, flags_page


@dataclass(frozen=True, kw_only=True)
class SomeConfig(Config):
    title = "some"
    rank: int = setting(4, "Rank.", range=(1,), resume="same", card=True)
    alpha: float | None = setting(None, "Alpha, 100 % of it.", range=(0, 100), aliases=("--lora_alpha", "-a"))
    name: str = setting("", "Name.", required=True, path="any")
    fast: bool = setting(False, "Fast.", resume="warn")
    paths: tuple[str, ...] = setting(("a", "b"), "Paths.")
    kind: str | None = setting(None, "Kind.", choices=("x", "y"))
    sizes: str | bool | None = setting(None, "Sizes.", alone=True)


@dataclass(frozen=True, kw_only=True)
class MoreConfig(SomeConfig):
    title = "more"
    hidden = ("fast",)
    steps: int = setting(9, "Steps.")

    def check(self) -> None:
        if self.steps == self.rank:
            raise ValueError("--steps and --rank must differ.")


CONFIGS = [
    value
    for value in vars(config).values()
    if isinstance(value, type) and issubclass(value, Config) and value is not Config
]


def read(*line: str, of: type = SomeConfig):
    return read_flags(of, None, list(line))


def test_a_command_line_becomes_values_of_their_types():
    found = read("--name=n", "--lora_alpha=8", "--fast", "--paths", "c", "d", "--kind=y", "--sizes")
    assert found == SomeConfig(name="n", alpha=8.0, fast=True, paths=("c", "d"), kind="y", sizes=True)
    assert type(found.alpha) is float and found.given == {"name", "alpha", "fast", "paths", "kind", "sizes"}
    assert read("--name=n").paths == ("a", "b") and read("--name=n", "--sizes=1,2").sizes == "1,2"


def test_the_home_folder_is_found_after_an_equals_sign(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert read("--name=~/x").name == "/home/me/x"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["--name=n", "--rank=0"], "--rank must be at least 1, and finite; got 0"),
        (["--name=n", "--alpha=101"], "--alpha must be between 0 and 100; got 101.0"),
        (["--name=n", "--alpha=nan"], "--alpha must be between"),
        (["--name=n", "--kind=z"], "--kind"),
        (["--name=n", "--rank=many"], "--rank"),
        ([], "--name"),
        (["--name=n", "--rnak=1"], "there is no --rnak. Did you mean --rank?"),
        (["--name=n", "--ran=1"], "there is no --ran. Did you mean --rank?"),
        (["--rnak=1"], "Did you mean --rank?"),
        (["--something_else"], "there is no --something_else. --help lists all flags."),
        (["--name=n", "stray"], "stray belongs to no flag."),
        (["--name=n", "--scale_lr"], f"there is no --scale_lr: {REPLACED['scale_lr']}."),
    ],
)
def test_a_mistake_is_one_line_and_status_2(line, said, capsys):
    with pytest.raises(SystemExit) as exit:
        read(*line)
    (error,) = capsys.readouterr().err.splitlines()
    assert said in error and exit.value.code == 2


def test_eight_bit_adam_by_the_flag_of_diffusers_scripts(capsys):
    line = ["--pretrained_model_name_or_path=x", "--dataset_name=y", "--use_8bit_adam"]
    families = (SDXL,)
    assert parse_training_flags(None, families, line).optimizer == "AdamW8bit"
    with pytest.raises(SystemExit):
        parse_training_flags(None, families, [*line, "--optimizer=prodigy"])
    assert "choose one" in capsys.readouterr().err


def test_of_a_flag_given_twice_the_last_counts_unless_values_would_be_lost(capsys):
    assert read("--name=n", "--rank=1", "--rank=2").rank == 2
    with pytest.raises(SystemExit):
        read_flags(CheckConfig, None, ["--dataset_path", "a", "--dataset_path", "b"])
    assert "Name all values after one" in capsys.readouterr().err


@pytest.mark.parametrize("more", [["--dataset_name=b"], ["b.parquet"]])
def test_two_datasets_are_refused_with_the_way_out(more, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.parquet").touch()
    with pytest.raises(SystemExit):
        read_flags(CheckConfig, None, ["--dataset_name=a", *more])
    assert "concatenate_datasets" in capsys.readouterr().err


def test_python_gets_the_same_messages_as_a_command_line():
    with pytest.raises(ValueError, match="--rank must be at least 1"):
        SomeConfig(rank=0)
    with pytest.raises(ValueError, match="--alpha must be between"):
        SomeConfig(alpha=math.inf)
    with pytest.raises(ValueError, match="--steps and --rank must differ"):
        MoreConfig(steps=4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        SomeConfig().rank = 3


def test_groups_are_those_that_declare_and_hidden_settings_have_no_flag(capsys):
    assert MoreConfig.groups() == {"some": ["rank", "alpha", "name", "paths", "kind", "sizes"], "more": ["steps"]}
    with pytest.raises(SystemExit):
        read("--name=n", "--fast", of=MoreConfig)
    text = make_parser(MoreConfig, "About it.").format_help()
    assert "Steps. (default: 9)" in text and "100 % of it" in text and "some:" in text and "--fast" not in text


def test_values_by_what_the_declaration_says():
    values = SomeConfig(rank=2, fast=True)
    assert values.values(resume="same") == values.values(card=True) == {"rank": 2}
    assert values.values(resume="warn") == {"fast": True}
    assert values.replace(rank=3).rank == 3 and values.rank == 2


@pytest.mark.parametrize("group", CONFIGS, ids=lambda group: group.__name__)
def test_every_setting_explains_itself_and_its_default_is_allowed(group):
    for name, declared in group.settings().items():
        assert declared.help.endswith((".", ")")), name
        assert declared.problem(name, group.default(name)) is None
    assert not set(group.hidden) - {field.name for field in dataclasses.fields(group)}


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.slug)
def test_a_familys_defaults_make_a_config(family):
    chosen = training_config((family,), pretrained_model_name_or_path="a", dataset_name="b")
    assert {name: getattr(chosen, name) for name in family.defaults} == family.defaults


def test_a_setting_of_another_family_is_refused_and_has_no_flag():
    with pytest.raises(ValueError, match="--snr_gamma has no effect with Stable Diffusion 3"):
        training_config((SD3,), pretrained_model_name_or_path="a", dataset_name="b", snr_gamma=5.0)
    _, hidden = training_flags((SDXL,))
    assert {"weighting_scheme", "max_sequence_length"} <= set(hidden) and "snr_gamma" not in hidden


def test_what_replaces_a_flag_is_a_flag_and_the_flag_is_gone():
    flags = {f"--{name}" for group in CONFIGS for name in group.settings()}
    assert not {f"--{name}" for name in REPLACED} & flags
    named = {
        word.split("=")[0].strip("`,.") for text in REPLACED.values() for word in text.split() if word[:2] == "--"
    }
    assert named <= flags


def test_the_page_of_flags_is_what_the_configs_declare():
    assert PAGE.read_text(encoding="utf-8") == flags_page(), "run `make flags`"
