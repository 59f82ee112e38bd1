"""The emoji benchmark on a base and instruments that were trained for a moment: resuming, pairs, runs, and what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import drawings
import instruments
import make_base
import preferences
from protocol import AXES, Run, Setting
from runs import checksum, load_results, train


SUBJECTS = 6
pytestmark = pytest.mark.campaign  # not all of them have been run yet


@pytest.fixture(scope="module")
def emoji() -> drawings.Emoji:
    whole = drawings.load_emoji()
    split = {"pairs": np.arange(4), "tuning": np.array([4]), "test": np.array([5])}
    return replace(
        whole,
        names=whole.names[:SUBJECTS],
        captions=whole.captions[:SUBJECTS],
        images=whole.images[:SUBJECTS],
        split=split,
    )


@pytest.fixture(scope="module")
def made(emoji, tmp_path_factory):
    """Instruments with random weights, and a base of four steps each in two parts."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("emoji")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_base, "BASE", folder / "base")
        patch.setattr(instruments, "WEIGHTS", folder / "instruments.safetensors")
        with pytest.raises(SystemExit, match="is missing: train them with make_base.py"):
            checksum()
        for steps in (2, 4):
            make_base.make_base(emoji, folder, vae_steps=2, unet_steps=steps, save_steps=2)
        with pytest.raises(SystemExit, match="keep --vae_steps"):
            make_base.make_base(emoji, folder, vae_steps=3, unet_steps=4, save_steps=2)
        torch.manual_seed(0)
        weights = {}
        for name, (width, *_) in instruments.SETTINGS.items():
            classifier = instruments.Classifier(instruments.task_of(emoji, name)[2], width)
            weights |= {f"{name}.{key}": value.clone() for key, value in classifier.state_dict().items()}
        save_file(weights, instruments.WEIGHTS)
        yield instruments.load_instruments(emoji)


def test_a_base_trained_in_two_parts_is_that_of_one(emoji, made, tmp_path, monkeypatch):
    parts = load_file(next(make_base.BASE.glob("unet/*.safetensors")))
    monkeypatch.setattr(make_base, "BASE", tmp_path / "base")
    make_base.make_base(emoji, tmp_path, vae_steps=2, unet_steps=4, save_steps=2)
    once = load_file(next(make_base.BASE.glob("unet/*.safetensors")))
    for key in once:
        assert torch.equal(once[key], parts[key]), key


def test_the_larger_reward_is_chosen_unless_noise_decides(emoji, made, monkeypatch):
    """A reward that is the image's own brightness, so that any tensor of pairs can be checked against the drawings."""
    vae = make_base.load_base().vae
    monkeypatch.setattr(preferences, "reward", lambda *args: 1e3 * args[2].float().mean(dim=(1, 2, 3)).numpy())
    pairs = preferences.make_pairs("drawings", emoji, made, 1)
    latents = make_base.encode(vae, emoji.images[:4].flatten(0, 1)).view(4, 3, *pairs.latents_w.shape[1:])
    brightness = emoji.images[:4].float().mean(dim=(2, 3, 4))
    assert pairs.noise == 0
    for subject in range(4):
        w, l = (
            (latents[subject] - side[subject]).abs().amax(dim=(1, 2, 3)).argmin()
            for side in (pairs.latents_w, pairs.latents_l)
        )
        assert brightness[subject, w] > brightness[subject, l]
    again, other = (preferences.make_pairs("drawings", emoji, made, number) for number in (1, 2))
    assert torch.equal(again.latents_w, pairs.latents_w) and not torch.equal(other.latents_w, pairs.latents_w)


def test_a_lora_changes_nothing_before_its_first_step_and_each_objective_trains_another(emoji, made):
    pairs = preferences.make_pairs("drawings", emoji, made, 1)

    def generate(pipeline) -> torch.Tensor:
        return preferences.generate(pipeline, emoji, np.array([0]), first_seed=1)

    fresh, base = generate(train(emoji, pairs, Setting("sft", 0.0, 1e-2), 1, 0)), generate(make_base.load_base())
    assert (fresh.int() - base.int()).abs().max() <= 2  # another memory layout rounds otherwise
    images = [fresh]
    for objective, strengths in AXES.items():
        setting = Setting(objective, strengths[len(strengths) // 2], 1e-1, pairs_per_step=2)
        images.append(generate(train(emoji, pairs, setting, seed=1, steps=3)))
    for i, image in enumerate(images):
        assert not any(torch.equal(image, other) for other in images[:i]), ["fresh", *AXES][i]


def test_measures_are_read_from_the_image_of_the_subject(emoji, made, monkeypatch):
    """With an oracle for a judge: it knows each drawing's subject and artist by its pixels."""

    class Oracle(instruments.Classifier):
        def log_probs(self, images):
            flat = emoji.images.flatten(0, 1)
            which = torch.stack([(flat == image).flatten(1).all(dim=1) for image in images]).float()
            which = which.view(len(images), SUBJECTS, 3).sum(dim=2 if self.head.out_features == SUBJECTS else 1)
            return (which + 1e-9).log()

    judges = {"judge_artist": Oracle(3, 4), "judge_names": Oracle(SUBJECTS, 4)}
    monkeypatch.setattr(preferences, "FIRST", 1)
    subjects = np.arange(SUBJECTS)
    images = emoji.images[subjects, [2, 0, 2, 1, 2, 0]]
    measured = preferences.measure("style", emoji, judges, images, np.array([0, 1, 2, 3, 5, 4]))
    assert measured["style"] == [1, 0, 1, 0, 1, 0] and measured["adherence"] == [1, 1, 1, 1, 0, 0]


def test_results_of_another_base_are_refused(made, tmp_path):
    setting = {"objective": "even", "strength": 0.25, "rate": 1e-3}
    run = {"task": "style", "split": "tuning", "seed": 1, "steps": 2, "setting": setting}
    line = {"of": checksum(), "run": run, "measured": {"style": [0.5]}}
    file = tmp_path / "style.jsonl"
    file.write_text(json.dumps(line) + "\n")
    runs, _ = load_results("style", tmp_path)
    assert runs == {Run("style", "tuning", Setting(**setting), 1, 2): {"style": [0.5]}}
    file.write_text(json.dumps(line) + "\n" + json.dumps(line | {"of": "another"}) + "\n")
    with pytest.raises(SystemExit, match="style.jsonl holds results of another base"):
        load_results("style", tmp_path)
