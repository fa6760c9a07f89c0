"""What is built and installed: a wheel in an environment of its own, used beside a `trainers/` of somebody else."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).parents[1]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"

CHECK = """
import importlib.metadata
import importlib.util
from pathlib import Path

import align
from align import GRPOTrainer
from align.cli.main import main
from align.data import toy
from align.quickstart.phases import make_policy

here = Path.cwd()
assert Path(align.__file__).is_relative_to(here.parent / "env"), align.__file__
assert GRPOTrainer.__module__ == "align.trainers.grpo"
assert importlib.metadata.distribution("align-rlhf").locate_file("align") == Path(align.__file__).parent
for name in ("trainers", "reward_models", "configs"):
    assert Path(importlib.util.find_spec(name).origin).is_relative_to(here), name  # the user's, untouched
tokenizer = toy.tokenizer()
policy = make_policy(len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id, seed=0)
policy.save_pretrained("policy")
tokenizer.save_pretrained("policy")

site = Path(align.__file__).parent
arguments = [
    *("dpo", "--config", "dpo"),  # the ready one, by its name
    *("--model_name_or_path", "policy", "--dataset_name", str(site / "examples/pairs.jsonl")),
    *("--output_dir", "runs/dpo"),
    *("--max_steps", "1", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "1"),
    *("--eval_strategy", "no", "--max_bad_share", "0.5"),  # a third of the example's pairs are ties
]
assert main(arguments) == 0
assert Path("runs/dpo/model.safetensors").exists()
"""


def run(*command: str, cwd: Path) -> str:
    """Standard output of a command that has to succeed, without this process's own `PYTHONPATH`."""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Path:
    """The tracked files, as a clone has them (links as links), without what earlier builds left."""
    tree = tmp_path_factory.mktemp("tree")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_symlink() or (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    return tree


@pytest.fixture(scope="module")
def sdist(tree) -> Path:
    name = run(sys.executable, "-c", BUILD, "build_sdist", "dist", cwd=tree).splitlines()[-1]
    return tree / "dist" / name


@pytest.fixture(scope="module")
def wheel(tree) -> Path:
    name = run(sys.executable, "-c", BUILD, "build_wheel", "dist", cwd=tree).splitlines()[-1]
    return tree / "dist" / name


def modules_and_data() -> set[str]:
    """What has to be installed, by its path in the repository, with the links followed."""
    files = {path for path in (ROOT / "align").rglob("*.py")}
    for folder in ("trainers", "reward_models", "configs", "examples"):
        files |= {ROOT / "align" / path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file()}
    files |= {
        *(ROOT / "align/evaluation/templates").iterdir(),
        ROOT / "align/py.typed",
        ROOT / "align/constraints.txt",
        ROOT / "align/config/options.json",
    }
    return {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}


def test_the_wheel_holds_align_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    installed = {name for name in names if ".dist-info/" not in name}
    assert installed == modules_and_data()
    assert {name.split("/")[0] for name in names} == {
        "align",
        next(n for n in names if ".dist-info/" in n).split("/")[0],
    }


def test_the_source_archive_holds_files_and_builds_the_same_wheel(sdist, wheel, tmp_path):
    with tarfile.open(sdist) as archive:
        assert all(member.isfile() or member.isdir() for member in archive)
        archive.extractall(tmp_path, filter="data")
    (folder,) = tmp_path.iterdir()
    name = run(sys.executable, "-c", BUILD, "build_wheel", "dist", cwd=folder).splitlines()[-1]
    with zipfile.ZipFile(folder / "dist" / name) as rebuilt, zipfile.ZipFile(wheel) as built:
        assert {i.filename: i.CRC for i in rebuilt.infolist() if "dist-info" not in i.filename} == {
            i.filename: i.CRC for i in built.infolist() if "dist-info" not in i.filename
        }


def test_the_wheel_trains_beside_packages_of_the_same_names(wheel, tmp_path):
    """In an environment with this one's dependencies and without this one's align."""
    run(sys.executable, "-m", "venv", "--without-pip", "env", cwd=tmp_path)
    python = str(tmp_path / "env/bin/python")
    pip = (
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "--disable-pip-version-check",
        "install",
        "-q",
        "--no-compile",
    )
    run(*pip, "--no-deps", "--no-index", str(wheel), cwd=tmp_path)
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    assert {path.name.split("-")[0] for path in site.iterdir()} == {"align", "align_rlhf"}
    # a path in a .pth file: the packages there are found, the .pth files there (an editable align) are not read
    paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "dependencies.pth").write_text("".join(f"{path}\n" for path in paths))

    work = tmp_path / "work"
    for package in ("trainers", "reward_models", "configs"):
        (work / package).mkdir(parents=True)
        (work / package / "__init__.py").write_text("raise ImportError('not the library')")
    (work / "check.py").write_text(CHECK)
    run(python, "check.py", cwd=work)
    assert "dpo" in run(python, "-m", "align", "configs", cwd=work)
    launch = ("launch", str(site / "align/configs/dpo.yaml"), "--cpu", "--num-processes", "1", "--dry-run")
    shown = run(python, "-m", "align", *launch, cwd=work)
    assert shown == run(str(tmp_path / "env/bin/align"), *launch, cwd=work)
    assert str(site / "align/configs/accelerate/ddp.yaml") in shown
