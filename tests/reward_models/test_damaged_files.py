"""Files beside a reward or a policy that are cut off, or hold something else: a sentence with the path."""

import json
import random

import pytest

from align.errors import AlignError
from align.reward_models.ensemble import load_ensemble, read_ensemble, save_ensemble
from align.reward_models.normalizer import Normalizer
from align.trainers.sweeps.front import finished
from tests.reward_models import worlds

NORMALIZER = {"mean": 0.5, "std": 2.0, "count": 10, "fitted_on": "x"}
ENSEMBLE = {"format": "align.reward_ensemble/2", "kind": "separate", "members": ["."]}
POINT = {"settings": {"beta": 0.1}, "seconds": 3.0}
KINDS = [
    (NORMALIZER, "reward_normalizer.json", Normalizer.load),
    (ENSEMBLE, "ensemble.json", read_ensemble),
    (POINT, "point.json", lambda folder: finished(folder / "point.json", POINT["settings"])),
]


@pytest.mark.parametrize(("content", "name", "read"), KINDS)
def test_damage_is_a_sentence_with_the_path(content, name, read, tmp_path):
    file, whole = tmp_path / name, json.dumps(content).encode()
    file.write_bytes(whole)
    assert read(tmp_path)
    for damaged in (
        *(whole[:n] for n in range(0, len(whole), 5)),
        b"[]",
        b"null",
        b"\xff" + whole,
        b"[" * 100_000,
        b"{}",
    ):
        file.write_bytes(damaged)
        with pytest.raises(AlignError, match=name):
            read(tmp_path)


@pytest.mark.parametrize(
    "change", [{"mean": "0.5"}, {"std": "2"}, {"mean": float("nan")}, {"std": 0}, {"std": 10**400}]
)
def test_a_normaliser_of_no_numbers(change, tmp_path):
    (tmp_path / "reward_normalizer.json").write_text(json.dumps(NORMALIZER | change))
    with pytest.raises(AlignError, match="mean must be a finite number and std one above 0"):
        Normalizer.load(tmp_path)


def test_a_flipped_bit_of_an_ensemble_is_seen(tmp_path):
    """Of any file that scores follow from; a normaliser that was fitted again is taken."""
    for i in range(2):
        worlds.reward_folder(tmp_path / f"member_{i}", seed=i)
        Normalizer(0.5, 2.0, 10, "x").save(tmp_path / f"member_{i}")
    save_ensemble(tmp_path, ["member_0", "member_1"])
    load_ensemble(tmp_path, "mean", device="cpu")
    rng = random.Random(0)
    for path in sorted((tmp_path / "member_1").glob("*")):
        whole = path.read_bytes()
        place = rng.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << rng.randrange(8)]) + whole[place + 1 :])
        with pytest.raises(AlignError, match=path.name):
            load_ensemble(tmp_path, "mean", device="cpu")
        path.write_bytes(whole)
    Normalizer(0.1, 3.0, 10, "other answers").save(tmp_path / "member_1")
    load_ensemble(tmp_path, "mean", device="cpu")
