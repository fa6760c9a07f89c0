"""Every golden vector of a folder of JSON files, run against our functions.

The folder is `ALIGN_VECTORS`, by default tests/vectors: numbers made with the original authors' code. An entry that no
function of ours answers yet is skipped as "not covered yet: <name>"; it never counts as passed.
"""

import importlib
import inspect
import json
import os
import pkgutil
from pathlib import Path

import pytest

from tests import vector_checks
from tests.vector_checks.registry import CHECKS

NO_METHOD = {  # numbers of things that no method of this library computes
    "verl_opo_nokl", "verl_opo_k1", "verl_rs_token_k1", "verl_rs_seq_sum_k1", "verl_rs_seq_mean_k1",
    "verl_rs_token_k1,seq_max_k3", "verl_rs_seq_mean_k3", "verl_rs_seq_max_k2",
    "openrlhf_is_seq-mask-tis", "crl_eval_score",
}  # fmt: skip
FOLDER = Path(os.environ.get("ALIGN_VECTORS", Path(__file__).parent / "vectors"))
for module in pkgutil.iter_modules(vector_checks.__path__):
    importlib.import_module(f"tests.vector_checks.{module.name}")


def load(folder: Path):
    entries = []
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        assert isinstance(content, dict) and "vectors" in content, f"{path}: not a file of vectors (no key 'vectors')"
        for number, entry in enumerate(content["vectors"]):
            name = entry.get("name", entry.get("id"))
            shape_is_known = name is not None and isinstance(entry.get("inputs"), dict) and "outputs" in entry
            assert shape_is_known, f"{path}, entry {number} ({name}): needs name or id, inputs and outputs"
            entry["inputs"] = {key: resolve(value, content.get("common", {})) for key, value in entry["inputs"].items()}
            entries.append((name, {"common": content.get("common", {}), **entry}))
    return entries


def resolve(value, common: dict):
    is_reference = isinstance(value, str) and value.startswith("common.")
    # an expression over the shared tensors ("common.logp + 2.0") stays text; its check asks for `common`
    return common.get(value.removeprefix("common."), value) if is_reference else value


ENTRIES = [entry for entry in load(FOLDER) if entry[0] not in NO_METHOD]


@pytest.mark.parametrize(("name", "entry"), ENTRIES, ids=[name for name, _ in ENTRIES])
def test_vector(name, entry):
    if name not in CHECKS:
        pytest.skip(f"not covered yet: {name}")
    check = CHECKS[name]
    check(**{wanted: {**entry, "name": name}[wanted] for wanted in inspect.signature(check).parameters})


def test_every_covered_vector_is_there():
    missing = sorted(set(CHECKS) - {name for name, _ in ENTRIES})
    assert not missing, f"{FOLDER} lacks vectors that this file claims to check: {missing}"


def test_names_are_unique():
    names = [name for name, _ in ENTRIES]
    assert len(names) == len(set(names))
