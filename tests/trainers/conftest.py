import os
from pathlib import Path

import pytest

from align.data import toy
from tests.trainers.tiny_runs import tiny_model


@pytest.fixture(scope="session")
def tokenizer():
    return toy.tokenizer()


@pytest.fixture(scope="session")
def policy(tokenizer, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("policy")
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def wandb_offline(tmp_path, monkeypatch):
    """wandb writes into tmp_path/wandb and sends nothing."""
    for name, value in {"MODE": "offline", "SILENT": "true", "DIR": str(tmp_path)}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    import wandb

    wandb.teardown()  # a run that this process had before would keep the new one's files in its own folder
    yield tmp_path
    wandb.finish()
    wandb.teardown()


@pytest.fixture
def unflushed(monkeypatch):
    """By the name of each file that was put in its place: weights in its folder, or a member's, that were not on the
    disk by then."""
    flushed, found, fsync, replace = set(), {}, os.fsync, os.replace

    def flush(opened):
        fsync(opened)
        flushed.add(os.fstat(opened).st_ino)

    def put(source, target, **options):
        folder = Path(target).parent
        weights = [*folder.glob("*.safetensors"), *folder.glob("member_*/*.safetensors")]
        missing = [path.name for path in weights if path.stat().st_ino not in flushed]
        found.setdefault(Path(target).name, []).extend(missing)
        replace(source, target, **options)

    monkeypatch.setattr(os, "fsync", flush)
    monkeypatch.setattr(os, "replace", put)
    return found
