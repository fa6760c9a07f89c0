"""`align sparsepo` and `align masks` with the recipes of configs/, on published preference pairs and a tiny model."""

import yaml

from align.cli.main import main
from align.config import configs_dir
from align.modeling.token_masks import read_masks

COMMON = "--max_bad_share 0.8 --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --use_cpu"
COMMON += (
    " --save_strategy no --logging_steps 1 --dataset_train_split train[:60] --max_length 1024 --num_logged_pairs 2"
)
COMMON += " --eval_strategy no"


def train(file, model, rows, folder, *extra):
    tokens = ["--model_name_or_path", model, "--dataset_name", rows, "--output_dir", folder, *COMMON.split(), *extra]
    return main(["sparsepo", "--config", str(configs_dir() / file), *map(str, tokens)])


def test_learned_masks_and_the_page_of_them(tiny_model, real_pairs, tmp_path, capsys):
    extra = ("--variant", "independent", "--use_peft", "--lora_r", "4", "--mask_l1_kl", "0.01")
    assert train("sparsepo.yaml", tiny_model, real_pairs, tmp_path / "run", *extra, "--dry-run") == 0
    assert "4 pairs -> 8 sequences" in capsys.readouterr().out
    assert train("sparsepo.yaml", tiny_model, real_pairs, tmp_path / "run", *extra) == 0
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"adapter_model.safetensors", "token_masks.safetensors", "masks.html", "align_config.yaml"} <= files
    page = tmp_path / "page.html"
    look = ["masks", str(tmp_path / "run"), "--data", str(real_pairs), "--pairs", "2", "--output", str(page)]
    assert main(look) == 0 and "independent masks" in page.read_text()

    # what is trained on starts from the adapter, and the masks read its states, not those of its base
    run = str(tmp_path / "run")
    assert train("mapo.yaml", run, real_pairs, tmp_path / "on", "--max_steps", "1") == 0
    assert read_masks(run)[0]["reference"] == str(tiny_model) and read_masks(tmp_path / "on")[0]["reference"] == run

    # the resolved settings are a file that describes the same run
    settings = yaml.safe_load((tmp_path / "run" / "align_config.yaml").read_text())
    assert settings["variant"] == "independent" and settings["mask_l1_kl"] == 0.01
    command = ["sparsepo", "--config", str(tmp_path / "run" / "align_config.yaml"), "--output_dir", str(tmp_path / "b")]
    assert main(command) == 0
    first, second = (read_masks(tmp_path / name)[1] for name in ("run", "b"))
    assert all((first[name] == second[name]).all() for name in first)


def test_mapo(tiny_model, real_pairs, tmp_path, capsys):
    assert train("mapo.yaml", tiny_model, real_pairs, tmp_path / "run") == 0
    assert read_masks(tmp_path / "run")[0]["activations"] == "all"
    assert main(["sparsepo", "--config", str(tmp_path / "run" / "align_config.yaml"), "--dry-run"]) == 0
    capsys.readouterr()
    assert train("mapo.yaml", tiny_model, real_pairs, tmp_path / "b", "--mask_init", "unit") == 2
    assert "mask_init: variant mapo would ignore this" in capsys.readouterr().err
