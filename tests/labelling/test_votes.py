"""Votes: nothing is lost, nothing counts twice, no side is favoured, annotators share the work."""

import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from orpo.labelling.questions import Question, arranged, is_common, make_questions
from orpo.labelling.session import Session, Settings
from orpo.labelling.votes import VoteLog, find_copies, read_votes
from orpo.pairs.image_folder import ListedImage, read_listing
from PIL import Image
from scipy.stats import binomtest


SCRIPT = Path(__file__).parents[2] / "examples" / "diffusion_orpo" / "label_preferences.py"


def questions(count: int, k: int = 2):
    """Of images that are told apart by their names, as if those were their content."""
    groups = [[ListedImage(f"{i}-{j}.png", f"prompt {i}") for j in range(k)] for i in range(count)]
    return [Question.of(group, (image.name for image in group)) for group in groups]


def session(folder, count=20, annotator="me", overlap=0.2, k=2) -> Session:
    return Session(folder, annotator, questions(count, k), Settings(k, overlap, seed=0))


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
            asked, shown = at_work.asked, at_work.asked.images
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
            line = b'{"annotator": "me", "question": "0", "prompt": "p", "choice": "tie", "best": null, "worst": null, "shown": ["a"]'
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


def sides(question: Question, annotator: str) -> list[int]:
    return [question.images.index(image) for image in arranged(question, 0, annotator).images]


def test_no_side_is_favoured_and_a_restart_keeps_the_sides():
    found = questions(1000)
    firsts = {annotator: [sides(q, annotator)[0] for q in found] for annotator in ("ann", "bob")}
    for annotator in firsts:
        assert binomtest(sum(firsts[annotator]), 1000).pvalue > 0.001
        assert firsts[annotator] == [sides(q, annotator)[0] for q in found]
    same = sum(a == b for a, b in zip(firsts["ann"], firsts["bob"]))
    assert binomtest(same, 1000).pvalue > 0.001
    ranked = Counter(tuple(sides(q, "ann")) for q in questions(1200, k=3))
    assert len(ranked) == 6 and min(ranked.values()) > 150


def test_annotators_share_the_questions_and_overlap_in_some(tmp_path):
    ann, bob = (session(tmp_path, 60, annotator, overlap=0.25) for annotator in ("ann", "bob"))
    while ann.asked or bob.asked:
        for annotator in (ann, bob, bob):  # bob is twice as quick
            if annotator.asked:
                annotator.answer(annotator.asked.id, "tie", None, None, 1.0)
    votes = read_votes(tmp_path)
    by_number = Counter(Counter([*votes["ann"], *votes["bob"]]).values())
    assert sum(by_number.values()) == 60 and by_number.keys() == {1, 2}
    assert 5 <= by_number[2] <= 27
    assert ann.progress["answered"] == len(votes["ann"]) == ann.progress["total"]
    common = {q.id for q in questions(60) if is_common(q, 0, 0.25)}
    assert common <= set(votes["ann"]) & set(votes["bob"])
    assert by_number[2] <= len(common) + 6  # now and then both are at the same one, most of all near the end
    first, second = ([q for q in votes[annotator] if q in common] for annotator in ("ann", "bob"))
    assert first == second  # in the same order, so that there is something to compare early


def test_images_that_come_later_or_are_renamed_change_no_question_and_exchanged_ones_do(make_images):
    def ids(folder) -> list[str]:
        return [question.id for question in make_questions(folder, read_listing(folder), 2)[0]]

    folder = make_images(3)
    first = ids(folder)
    assert set(ids(make_images(4, name="more"))) > set(first)
    (folder / "made/000-0.png").rename(folder / "zz.png")
    lines = (folder / "metadata.jsonl").read_text().replace("made/000-0.png", "zz.png")
    (folder / "metadata.jsonl").write_text(lines)
    assert ids(folder) == first
    Image.new("RGB", (24, 16), "white").save(folder / "made/001-1.png")
    (folder / "metadata.jsonl").write_text(lines.replace("prompt 2", "other"))
    assert [a == b for a, b in zip(ids(folder), first)] == [True, False, False]


def test_images_that_are_too_few_for_a_question_are_counted(make_images):
    folder = make_images(1, k=5)
    made = [make_questions(folder, read_listing(folder), k) for k in (2, 3, 6)]
    assert [(len(questions), left_over) for questions, left_over in made] == [(2, 1), (1, 2), (0, 5)]


@pytest.mark.parametrize(
    "answer, problem",
    [
        (("best", 0, 0, 1.0), "can't be 0 and 0"),
        (("best", 0, 2, 1.0), "can't be 0 and 2"),
        (("best", None, None, 1.0), "None"),
        (("best", True, False, 1.0), "can't be True and False"),
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
        session(tmp_path, annotator="bob", overlap=0.5)
    (tmp_path / "votes" / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="settings.json is damaged. Remove it"):
        session(tmp_path)


def test_a_damaged_line_is_named(tmp_path):
    at_work = session(tmp_path)
    for _ in range(3):
        at_work.answer(at_work.asked.id, "tie", None, None, 1.0)
    at_work.close()
    path = tmp_path / "votes" / "me.jsonl"
    path.write_text(path.read_text().replace('"tie"', '"tea"', 1))
    with pytest.raises(ValueError, match=r"me.jsonl, line 1 is damaged \(.*'tea'"):
        session(tmp_path)


@pytest.mark.parametrize("annotator", ["../me", "", ".hidden", "a/b", "a\nb", "x" * 65])
def test_a_annotators_name_is_no_path(tmp_path, annotator):
    with pytest.raises(ValueError, match="--annotator="):
        VoteLog(tmp_path, annotator)
    assert list(tmp_path.iterdir()) == []


def test_one_annotator_has_one_server_on_a_folder(make_images):
    folder = make_images(4)
    images = read_listing(folder)
    at_work = Session(folder, "ann", make_questions(folder, images, 2)[0], Settings(2, 0.2, 0))
    command = [sys.executable, str(SCRIPT), f"--images_dir={folder}", "--port=0", "--annotator=ann"]
    second = subprocess.run(command, capture_output=True, text=True)
    assert second.returncode == 1
    assert f"ann is already at work in this folder, in process {os.getpid()} on " in second.stderr
    assert at_work.answer(at_work.asked.id, "tie", None, None, 1.0)


COPIES = (
    "me (conflicted copy 2026-11-30).jsonl",
    "me (1).jsonl",
    "me - Kopie.jsonl",
    "Copy of me.jsonl",
    "me.jsonl~",
    "me.jsonl.bak",
    "me.bak.jsonl",  # these could be names
    "me-LAPTOP.jsonl",
    "me.sync-conflict-20261130-101010-ABCDEFG.jsonl",
    "ann.jsonl",
)


def test_copies_of_an_annotators_file_are_no_annotators(tmp_path):
    at_work = session(tmp_path)
    at_work.answer(at_work.asked.id, "tie", None, None, 1.0)
    at_work.close()
    for name in COPIES:
        shutil.copy(tmp_path / "votes" / "me.jsonl", tmp_path / "votes" / name)
    (tmp_path / "votes" / "._me.jsonl").write_bytes(b"\0\5\26\7 of macOS")
    assert {name: len(votes) for name, votes in read_votes(tmp_path).items()} == {"me": 1}
    assert set(find_copies(tmp_path)) == set(COPIES)
    with pytest.raises(ValueError, match="ann.jsonl holds votes of me"):
        session(tmp_path, annotator="ann")
    assert session(tmp_path, annotator="bob").progress["answered"] == 0


FAULTS = {
    "no hard links": "os.link = refuse",
    "no locks": "fcntl.lockf = lambda *a: refuse(errno.ENOLCK)",
    "no fsync of folders": "fsync = os.fsync; os.fsync = lambda d: refuse() if stat.S_ISDIR(os.fstat(d).st_mode) else fsync(d)",
    "no fsync": "os.fsync = lambda d: refuse(errno.ENOSYS)",
    "read-only": "Path.mkdir = lambda self, *a, **k: refuse(errno.EROFS)",
    "no new files": "Path.write_text = lambda self, *a, **k: refuse(errno.EROFS)",
    "no lock file": "io.open = builtins.open = lambda f, m='r', *a, **k: refuse(errno.EACCES) if 'a' in m else real(f, m, *a, **k)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_drives_that_lack_something_work_or_are_named(tmp_path, fault):
    """exFAT, network drives, read-only ones: in a process in which the operation fails as it does there."""
    code = f"""
import builtins, errno, io, os, stat, sys
from pathlib import Path
real = open
def refuse(number=errno.EINVAL, *a): raise OSError(number, os.strerror(number))
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(SCRIPT.parent)!r}]
import fcntl
from test_votes import session
{FAULTS[fault]}
try:
    at_work = session(Path({str(tmp_path)!r}))
    assert at_work.answer(at_work.asked.id, "tie", None, None, 1.0)
except ValueError as error:
    print(error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    if fault in ("read-only", "no new files", "no lock file"):
        assert (
            f"Votes can't be stored in {tmp_path / 'votes'}: " in result.stdout and "Copy the images" in result.stdout
        )
        assert list(tmp_path.iterdir()) == []
    else:
        assert len(read_votes(tmp_path)["me"]) == 1 and result.stdout == ""
