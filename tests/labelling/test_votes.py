"""Votes: nothing is lost, nothing counts twice, no side is favoured, judges share the work."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orpo.data.listing import ListedImage, read_listing
from orpo.labelling.questions import is_common, make_questions, places
from orpo.labelling.session import Session, Settings
from orpo.labelling.votes import VoteLog, read_votes
from scipy.stats import binomtest


SCRIPT = Path(__file__).parents[2] / "examples" / "diffusion_orpo" / "label_preferences.py"


def questions(count: int, k: int = 2):
    images = [ListedImage(f"{i}-{j}.png", f"prompt {i}") for i in range(count) for j in range(k)]
    return make_questions(images, k)[0]


def session(folder, count=20, judge="me", overlap=0.2, k=2) -> Session:
    return Session(folder, judge, questions(count, k), Settings(k, overlap, seed=0))


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("answer"), st.sampled_from(["best", "tie", "bad"]), st.integers(0, 1)),
        st.tuples(st.just("again")),  # the same request twice, as after a lost answer
        st.tuples(st.just("undo")),
        st.tuples(st.just("kill"), st.integers(0, 200)),  # in the middle of a line
    ),
    max_size=40,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(OPERATIONS)
def test_nothing_is_lost_and_nothing_counts_twice(tmp_path_factory, operations):
    """Any order of answers, repeated requests, undos and kills leaves exactly the votes that were acknowledged."""
    folder = tmp_path_factory.mktemp("votes")
    at_work, acknowledged, last = session(folder), {}, None
    for name, *values in operations:
        if name == "answer" and at_work.asked is not None:
            choice, best = values
            places = (best, 1 - best) if choice == "best" else (None, None)
            asked, shown = at_work.asked, at_work.shown(at_work.asked)
            last = (asked.id, choice, *places, 1.5)
            assert at_work.answer(*last)
            acknowledged[asked.id] = shown[best].name if choice == "best" else choice
            assert at_work.asked is not asked
        elif name == "again" and last is not None and at_work.asked and at_work.asked.id != last[0]:
            assert not at_work.answer(*last)
        elif name == "undo":
            assert at_work.undo() == bool(acknowledged)
            if acknowledged:
                question = list(acknowledged)[-1]
                del acknowledged[question]
                assert at_work.asked.id == question
        elif name == "kill":
            at_work.close()
            line = b'{"question": "0", "choice": "tie", "best": null, "worst": null, "shown": ["a", "b"], "seconds": 1.0, "time": "1"}'
            with open(folder / "votes" / "me.jsonl", "ab") as file:
                file.write(line[: values[0]])  # never with its end
            at_work = session(folder)
        on_disk = read_votes(folder).get("me", {})
        assert {id: vote.best or vote.choice for id, vote in on_disk.items()} == acknowledged
        assert list(on_disk) == list(acknowledged)
    at_work.close()


def test_a_full_disk_loses_no_vote_and_leaves_no_half_line(tmp_path):
    """Run in a process that may not write files beyond some size: the vote is refused, and the file as it was."""
    code = f"""
import json, resource, signal, sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(SCRIPT.parent)!r}]
from pathlib import Path
from test_votes import session
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
at_work, folder = session(Path({str(tmp_path)!r})), Path({str(tmp_path)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
given = 0
for i in range(10):
    try:
        at_work.answer(at_work.asked.id, "tie", None, None, 1.0)
        given += 1
    except OSError:
        asked = at_work.asked
        break
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
lines = [json.loads(line) for line in (folder / "votes" / "me.jsonl").read_text().splitlines()]
assert 0 < given < 10 and len(lines) == given, (given, len(lines))
assert at_work.answer(asked.id, "bad", None, None, 1.0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(read_votes(tmp_path)["me"].values())[-1].choice == "bad"


def test_no_side_is_favoured_and_a_restart_keeps_the_sides():
    found = questions(1000)
    firsts = {judge: [places(q, 0, judge)[0] for q in found] for judge in ("ann", "bob")}
    for judge in firsts:
        assert binomtest(sum(firsts[judge]), 1000).pvalue > 0.001
        assert firsts[judge] == [places(q, 0, judge)[0] for q in found]
    same = sum(a == b for a, b in zip(firsts["ann"], firsts["bob"]))
    assert binomtest(same, 1000).pvalue > 0.001
    ranked = Counter(tuple(places(q, 0, "ann")) for q in questions(1200, k=3))
    assert len(ranked) == 6 and min(ranked.values()) > 150


def test_judges_share_the_questions_and_overlap_in_some(tmp_path):
    ann, bob = (session(tmp_path, 60, judge, overlap=0.25) for judge in ("ann", "bob"))
    while ann.asked or bob.asked:
        for judge in (ann, bob, bob):  # bob is twice as quick
            if judge.asked:
                judge.answer(judge.asked.id, "tie", None, None, 1.0)
    votes = read_votes(tmp_path)
    by_number = Counter(Counter([*votes["ann"], *votes["bob"]]).values())
    assert sum(by_number.values()) == 60 and by_number.keys() == {1, 2}
    assert 5 <= by_number[2] <= 27
    assert ann.progress["answered"] == len(votes["ann"]) == ann.progress["total"]
    common = {q.id for q in questions(60) if is_common(q, 0, 0.25)}
    assert common <= set(votes["ann"]) & set(votes["bob"])
    assert by_number[2] <= len(common) + 6  # now and then both are at the same one, most of all near the end
    first, second = ([q for q in votes[judge] if q in common] for judge in ("ann", "bob"))
    assert first == second  # in the same order, so that there is something to compare early


def test_images_that_come_later_change_no_question():
    assert {q.id for q in questions(20)} < {q.id for q in questions(30)}
    one_left = [ListedImage(f"{i}.png", "prompt") for i in range(5)]
    assert [len(make_questions(one_left, k)[0]) for k in (2, 3, 6)] == [2, 1, 0]
    assert [make_questions(one_left, k)[1] for k in (2, 3, 6)] == [1, 2, 5]


@pytest.mark.parametrize(
    "answer, problem",
    [
        (("best", 0, 0, 1.0), "can't be 0 and 0"),
        (("best", 0, 2, 1.0), "can't be 0 and 2"),
        (("best", None, None, 1.0), "None"),
        (("better", 0, 1, 1.0), "no choice 'better'"),
        (("tie", None, None, float("nan")), "nan seconds"),
    ],
)
def test_what_is_no_answer_is_not_stored(tmp_path, answer, problem):
    at_work = session(tmp_path)
    with pytest.raises(ValueError, match=problem):
        at_work.answer(at_work.asked.id, *answer)
    assert read_votes(tmp_path) == {"me": {}}


def test_a_folder_has_one_set_of_settings(tmp_path):
    session(tmp_path).close()
    with pytest.raises(ValueError, match="overlap was 0.2 and is now 0.5"):
        session(tmp_path, judge="bob", overlap=0.5)


def test_a_damaged_line_is_named(tmp_path):
    at_work = session(tmp_path)
    for _ in range(3):
        at_work.answer(at_work.asked.id, "tie", None, None, 1.0)
    at_work.close()
    path = tmp_path / "votes" / "me.jsonl"
    path.write_text(path.read_text().replace('"tie"', '"tea"', 1))
    with pytest.raises(ValueError, match=r"me.jsonl, line 1 is damaged \(.*'tea'"):
        session(tmp_path)


@pytest.mark.parametrize("judge", ["../me", "", ".hidden", "a/b", "a\nb", "x" * 65])
def test_a_judges_name_is_no_path(tmp_path, judge):
    with pytest.raises(ValueError, match="--judge="):
        VoteLog(tmp_path, judge)
    assert list(tmp_path.iterdir()) == []


def test_one_judge_has_one_server_on_a_folder(make_images):
    folder = make_images(4)
    images = read_listing(folder)
    at_work = Session(folder, "ann", make_questions(images, 2)[0], Settings(2, 0.2, 0))
    command = [sys.executable, str(SCRIPT), f"--images_dir={folder}", "--port=0", "--judge=ann"]
    second = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert second.returncode == 1
    assert f"ann is already judging this folder, in process {os.getpid()} on " in second.stderr
    assert at_work.answer(at_work.asked.id, "tie", None, None, 1.0)
