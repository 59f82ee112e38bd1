"""What label_preferences.py takes and gives: bad folders are refused with all that is wrong, exports train."""

import json
import os

import pyarrow.parquet as pq
import pytest
from helpers import train
from orpo.config import PromptsConfig
from orpo.generation.prompts import read_prompts
from orpo.labelling.agreement import Agreement, agreements, share_and_kappa
from orpo.labelling.questions import make_questions
from orpo.labelling.session import Session, Settings
from orpo.pairs.image_folder import read_listing
from PIL import Image
from sklearn.metrics import cohen_kappa_score

import check_preferences
import label_preferences


def label(folder, name: str, decide, k: int = 2, overlap: float = 1.0) -> None:
    """Lets a function of a question's names, from left to right, answer all of them: a pair of names, "tie" or "bad"."""
    at_work = Session(folder, name, make_questions(folder, read_listing(folder), k)[0], Settings(k, overlap, 0))
    while at_work.asked:
        names = [image.name for image in at_work.asked.images]
        answer = decide(names)
        choice, best, worst = (answer, None, None) if isinstance(answer, str) else ("best", *map(names.index, answer))
        at_work.answer(at_work.asked.id, choice, best, worst, 2.0)
    at_work.close()


def number(name: str) -> int:
    return int(name.split("/")[1].split("-")[0])


def test_only_line_ends_end_lines(make_images, tmp_path):
    """Others may stand in a prompt: U+2028 comes with text from the web, and Python's `splitlines` splits there, too."""
    folder, odd = make_images(2), "a red\u2028fox\x0band\x85a cat"
    lines = (folder / "metadata.jsonl").read_text().split("\n")
    entry = json.loads(lines[0]) | {"prompt": odd}
    (folder / "metadata.jsonl").write_text("\r\n".join([json.dumps(entry, ensure_ascii=False), *lines[1:]]))
    assert read_listing(folder)[0].prompt == odd
    (tmp_path / "prompts.txt").write_text(f"{odd}\r\na dog\n", newline="")
    assert read_prompts(PromptsConfig(prompt_file=tmp_path / "prompts.txt")) == ([odd, "a dog"], [])


def test_captions_of_other_encodings_are_named(tmp_path):
    for i, content in enumerate(
        ("\ufeffa red cat\r\n".encode(), "a cat".encode("utf-16"), "a cat".encode("utf-16-le"))
    ):
        Image.new("RGB", (24, 16), (i, 0, 0)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_bytes(content)
    with pytest.raises(ValueError, match="(?s)2 problems.*1.txt is UTF-16.*Save it as UTF-8.*2.txt is UTF-16"):
        read_listing(tmp_path)
    for i in (1, 2):
        (tmp_path / f"{i}.txt").write_text("a cat")
    assert [image.prompt for image in read_listing(tmp_path)] == ["a red cat", "a cat", "a cat"]


def test_every_problem_of_a_folder_is_listed(make_images, tmp_path):
    folder = make_images(6)
    (tmp_path / "secret.png").write_bytes((folder / "made/000-0.png").read_bytes())
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    for name in ("001-0", "001-1", "004-0"):
        (folder / f"made/{name}.png").unlink()
    (folder / "made/005-1.png").write_bytes(b"no image")
    more = [
        {"file_name": "../secret.png", "prompt": "p"},
        {"file_name": "link.png", "prompt": "p"},
        {"file_name": str(tmp_path / "secret.png"), "prompt": "p"},
        {"file_name": "made/000-0.png", "prompt": "p"},
        {"file_name": "made/000-1.png"},
        {"file_name": "x.png", "prompt": 7},
        {"file_name": "x.png", "prompt": "p", "caption": "q"},
        {"file_name": "x.png", "prompt": "\ud800"},
        [],
    ]
    with open(folder / "metadata.jsonl", "a") as file:
        file.writelines(json.dumps(entry) + "\n" for entry in more)
        file.write('{"file_name": \n')
    with pytest.raises(ValueError) as error:
        read_listing(folder)
    message = str(error.value)
    for part in (
        "14 problems",
        *(f"made/{name}.png: No such file" for name in ("001-0", "001-1", "004-0")),
        "made/005-1.png: not a readable image",
        "../secret.png is outside",
        "link.png is outside",
        "secret.png is outside the folder",
        "line 16: made/000-0.png is listed twice",
        "line 17: no prompt",
        "line 18: prompt is 7",
        "line 19: several prompts (prompt, caption)",
        r"line 20: prompt is '\ud800'",
        "line 21: not a JSON object",
        "line 22: not JSON",
    ):
        assert part in message


def test_kappa_is_scikit_learns(make_images):
    folder = make_images(40)
    label(folder, "ann", lambda names: "bad" if number(names[0]) % 5 == 0 else sorted(names))
    label(
        folder,
        "bob",
        lambda names: "tie" if number(names[0]) % 3 == 0 else sorted(names, reverse=number(names[0]) > 25),
    )
    votes = label_preferences.read_votes(folder)
    (found,) = agreements(votes)
    answers = [[votes[name][q].best or votes[name][q].choice for q in votes["ann"]] for name in ("ann", "bob")]
    answers = [[a[-5] if a.endswith(".png") else a for a in column] for column in answers]
    assert found.kappa == pytest.approx(cohen_kappa_score(*answers))
    assert found.share == sum(a == b for a, b in zip(*answers)) / 40 and found.questions == 40
    assert share_and_kappa(["a", "b"], ["a", "b"]) == (1.0, 1.0)
    assert share_and_kappa(["a", "b"], ["b", "a"]) == (0.0, -1.0)
    assert share_and_kappa(["a", "a"], ["a", "a"]) == (1.0, None)
    assert "undefined" in str(Agreement(("ann", "bob"), "choice", 2, 1.0, None))


def test_an_export_is_accepted_and_its_labels_are_the_annotators(make_images, tmp_path, capsys):
    folder, pairs = make_images(12), tmp_path / "pairs"
    label(folder, "ann", lambda names: "tie" if number(names[0]) == 3 else sorted(names, reverse=number(names[0]) % 2))
    label(
        folder, "bob", lambda names: "bad" if number(names[0]) == 4 else sorted(names, reverse=number(names[0]) == 6)
    )
    label_preferences.main([f"--images_dir={folder}", f"--export={pairs}"])
    rows = pq.read_table(pairs / "train.parquet").to_pylist()
    assert [row["file_0"] for row in rows] == [f"made/{i:03d}-0.png" for i in range(12)]
    for i, row in enumerate(rows):
        assert row["jpg_0"] == (folder / row["file_0"]).read_bytes()
        assert row["jpg_1"] == (folder / row["file_1"]).read_bytes()
        assert json.loads(row["details_1"]) == {"seed": 2 * i + 1}
        expected = {
            "votes_0": (i % 2 == 0) + (i not in (4, 6)),
            "votes_1": (i % 2 == 1 and i != 3) + (i == 6),
            "votes_tie": int(i == 3),
            "votes_bad": int(i == 4),
        }
        assert {name: row[name] for name in expected} == expected
        best = max(expected.values())
        labels = {"votes_0": 1.0, "votes_1": 0.0}
        winners = [name for name, value in expected.items() if value == best]
        assert row["label_0"] == (labels.get(winners[0], 0.5) if len(winners) == 1 else 0.5)
    printed = capsys.readouterr().out
    assert "ann and bob: " in printed and "Cohen's kappa" in printed
    assert "12 pairs" in printed and "12 pairs" in (pairs / "README.md").read_text()
    assert (
        check_preferences.main([f"--dataset_name={pairs}", f"--output_dir={tmp_path / 'check'}", "--num_workers=0"])
        == 0
    )

    with pytest.raises(ValueError, match="holds other files"):
        label_preferences.main([f"--images_dir={folder}", f"--export={folder}"])
    label_preferences.main([f"--images_dir={folder}", f"--export={pairs}"])  # its own folder is replaced
    assert [path.name for path in sorted(pairs.iterdir())] == ["README.md", "train.parquet"]


def test_a_ranking_gives_its_best_against_its_worst(make_images, tmp_path, capsys):
    folder = make_images(6, k=4)
    label(folder, "ann", lambda names: "bad" if number(names[0]) == 2 else (max(names), min(names)), k=4)
    label_preferences.main([f"--images_dir={folder}", "--ranking=4", f"--export={tmp_path / 'pairs'}"])
    rows = pq.read_table(tmp_path / "pairs" / "train.parquet").to_pylist()
    assert [(row["file_0"][-5], row["file_1"][-5], row["label_0"]) for row in rows] == [("0", "3", 0.0)] * 5
    assert "Skipped: 1 rankings without a best image." in capsys.readouterr().out


def test_votes_count_for_the_content_and_prompt_that_were_shown(make_images, tmp_path, capsys):
    """Of five pairs: one is gone, one has an image exchanged, one its prompt corrected, one is renamed; one is as it was."""
    folder = make_images(5)
    label(folder, "ann", sorted)
    lines = (folder / "metadata.jsonl").read_text().replace("prompt 2", "a better prompt")
    (folder / "made/003-1.png").rename(folder / "new name.png")
    lines = lines.replace("made/003-1.png", "new name.png").splitlines(keepends=True)
    (folder / "metadata.jsonl").write_text("".join(lines[2:]))
    Image.new("RGB", (24, 16), "white").save(folder / "made/001-0.png")
    label_preferences.main([f"--images_dir={folder}", f"--export={tmp_path / 'pairs'}"])
    rows = pq.read_table(tmp_path / "pairs" / "train.parquet").to_pylist()
    assert [(row["file_0"], row["file_1"], row["label_0"]) for row in rows] == [
        ("made/003-0.png", "new name.png", 1.0),
        ("made/004-0.png", "made/004-1.png", 1.0),
    ]
    skipped = "Skipped: 3 votes on images or prompts that have changed since, or are gone."
    assert skipped in capsys.readouterr().out and skipped in (tmp_path / "pairs" / "README.md").read_text()
    label(folder, "ann", sorted)  # the two that are still there, and have changed, are asked again; the others are not
    assert len(label_preferences.read_votes(folder)["ann"]) == 7
    label_preferences.main([f"--images_dir={folder}", f"--export={tmp_path / 'pairs'}"])
    assert pq.read_table(tmp_path / "pairs" / "train.parquet").num_rows == 4


def test_what_an_export_can_not_write_is_said_and_not_left_behind(make_images, tmp_path, monkeypatch):
    folder = make_images(2)
    label(folder, "ann", sorted)

    def refuse(*args):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("orpo.labelling.export.write_pairs", refuse)
    with pytest.raises(ValueError, match="--export=.*pairs can't be written: Read-only file system"):
        label_preferences.main([f"--images_dir={folder}", f"--export={tmp_path / 'pairs'}"])
    assert not (tmp_path / "pairs").exists()


def test_training_takes_an_export(make_images, tmp_path, tiny_sdxl, output_dir):
    folder = make_images(4)
    label(folder, "ann", sorted)
    label_preferences.main([f"--images_dir={folder}", f"--export={tmp_path / 'pairs'}"])
    assert any(value.abs().sum() > 0 for value in train(tiny_sdxl, str(tmp_path / "pairs"), output_dir).values())


@pytest.mark.parametrize(
    "flags, problem",
    [
        ([], "has no prompt with 2 images"),
        (["--export={tmp}/pairs"], "no votes to export yet"),
        (["--annotator=a/b"], "--annotator=a/b"),
    ],
)
def test_what_can_not_be_labelled_is_said(make_images, tmp_path, flags, problem):
    folder = make_images(3, k=1)
    with pytest.raises(ValueError, match=problem):
        label_preferences.main([f"--images_dir={folder}", *(flag.format(tmp=tmp_path) for flag in flags)])
    with pytest.raises(ValueError, match="no caption file beside it"):
        label_preferences.main([f"--images_dir={tmp_path}"])
    assert not (folder / "votes").exists() and os.listdir(tmp_path) == ["images"]
