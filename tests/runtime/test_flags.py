"""Declarations of flags: what they make of a command line, and what they say of themselves."""

import math

import pytest
from orpo.runtime.flags import Flag, FlagGroup, all_flags, assemble, make_parser, optional, parse, values


GROUP = FlagGroup(
    "some",
    (
        Flag("rank", "Rank.", int, 4, range=(1,), resume="same", card=True),
        Flag("alpha", "Alpha.", float, lambda args: 2 * args.rank, range=(0, 100), aliases=("--lora_alpha", "-a")),
        Flag("name", "Name.", required=True),
        Flag("fast", "Fast.", bool, resume="warn"),
        Flag("paths", "Paths.", nargs="+", default=["a", "b"]),
        Flag("kind", "Kind.", choices=("x", "y")),
    ),
)


def read(*line: str, groups=(GROUP,)):
    groups = assemble(groups)
    return parse(make_parser(None, groups), groups, list(line))


def test_a_command_line_is_read_as_declared():
    args = read("--name=n", "--rank=3", "--fast", "--paths", "c", "d", "e")
    assert vars(args) == {
        "name": "n",
        "rank": 3,
        "alpha": 6,
        "fast": True,
        "paths": ["c", "d", "e"],
        "kind": None,
    }
    assert read("--name=n", "--lora_alpha=5").alpha == read("--name=n", "-a", "5").alpha == 5.0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (["--rank=0"], "--rank must be at least 1, and finite; got 0"),
        (["--alpha=101"], "--alpha must be between 0 and 100; got 101.0"),
        (["--alpha=nan"], "--alpha must be between 0 and 100; got nan"),
        (["--kind=z"], "--kind"),
        (["--speed=1"], "--speed"),
    ],
)
def test_values_that_are_not_allowed_stop_with_the_flags_name(line, message, capsys):
    with pytest.raises(SystemExit):
        read("--name=n", *line)
    assert message in capsys.readouterr().err


def test_a_flag_without_a_highest_value_is_finite():
    assert Flag("x", "", float, range=(0,)).problem(math.inf)
    assert Flag("x", "", float).problem(math.inf) is None


def test_groups_of_one_title_are_joined_and_take_a_familys_defaults():
    more = FlagGroup("some", (Flag("steps", "Steps.", int, 1),))
    groups = assemble([GROUP, FlagGroup("other", ()), more], {"steps": 9, "of_another_script": 1})
    assert [group.title for group in groups] == ["some", "other"]
    assert parse(make_parser(None, groups), groups, ["--name=n"]).steps == 9
    assert more.flags[0].default == 1


def test_a_flag_declared_twice_is_an_error():
    with pytest.raises(ValueError, match="twice: rank"):
        assemble([GROUP, FlagGroup("other", (Flag("rank", "Again."),))])


def test_an_optional_group_requires_nothing():
    assert read(groups=[optional(GROUP)]).name is None


def test_settings_are_found_by_what_their_flags_declare():
    settings = vars(read("--name=n"))
    assert values([GROUP], settings, resume="same") == {"rank": 4}
    assert values([GROUP], settings, resume="warn") == {"fast": False}
    assert values([GROUP], settings, card=True, resume="same") == {"rank": 4}
    assert set(values([GROUP], settings)) == {flag.name for flag in all_flags([GROUP])}
