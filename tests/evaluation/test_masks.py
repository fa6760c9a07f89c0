"""Pictures of token masks: content, page, figure, table, the report's section, and `align masks`."""

import json
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from align.cli.main import main
from align.data import toy
from align.errors import DataError
from align.evaluation.masks import mask_figure, picture, pieces, read_content, tracker_rows, write_page
from align.evaluation.report import write_report
from align.evaluation.summary import build_summary
from align.modeling.token_masks import MaskSettings, TokenMasks, describe_masks, save_masks

PAIRS = [
    {"prompt": "tell me about the garden : ", "chosen": "rose soil thanks", "rejected": "wave"},
    {"prompt": "describe the ocean : ", "chosen": "tide", "rejected": "stupid <b> so"},
]
WEIGHTS = torch.tensor([[0.5, 0.0, 2.0], [1.0, 0, 0], [0.25, 0, 0], [0.0, 1.5, 3.0]])


@pytest.fixture(scope="module")
def tokenizer():
    return toy.tokenizer()


def rows(tokenizer):
    ids = [{key: tokenizer(text)["input_ids"] for key, text in pair.items()} for pair in PAIRS]
    return [{f"{key}_ids": value for key, value in row.items()} for row in ids]


def test_the_content_is_the_weights_of_the_tokens(tokenizer):
    content = picture(rows(tokenizer), tokenizer, WEIGHTS, WEIGHTS)
    first, second = content["pairs"]
    assert first["prompt"] == "tell me about the garden :"
    assert first["chosen"] == {"tokens": ["rose", " soil", " thanks"], "masks": {"m": [0.5, 0.0, 2.0]}}
    assert first["rejected"] == {"tokens": ["wave"], "masks": {"m": [0.25]}}
    assert second["rejected"]["masks"] == {"m": [0.0, 1.5, 3.0]}
    assert content["masks"] == {"m": {"max": 3.0, "mean": 8.25 / 8, "sparsity": 0.25}}
    two = picture(rows(tokenizer), tokenizer, WEIGHTS, 2 * WEIGHTS)
    assert list(two["masks"]) == ["m_u", "m_d"] and two["masks"]["m_d"]["max"] == 6.0
    assert list(picture(rows(tokenizer), tokenizer, None, WEIGHTS)["masks"]) == ["m_d"]


def test_pieces_of_a_byte_level_tokenizer_make_up_the_text():
    """A character of several tokens is shown by its last."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner = Tokenizer(models.BPE({letter: i for i, letter in enumerate(sorted(alphabet))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    bytewise = PreTrainedTokenizerFast(tokenizer_object=inner)
    found = pieces(bytewise, bytewise("né 大")["input_ids"])
    assert found == ["n", "", "é", " ", "", "", "大"]


def test_the_page_is_one_file_that_shows_every_token(tokenizer, tmp_path):
    content = picture(rows(tokenizer), tokenizer, WEIGHTS, 2 * WEIGHTS)
    html = write_page(tmp_path / "masks.html", content, title="Masks <of>", intro="Two pairs.").read_text()
    assert "http://" not in html and "https://" not in html and "<script" not in html
    assert "Masks &lt;of&gt;" in html
    spans = re.findall(r'<span style="--w:([\d.]+)"( class="\w+")? title="([^"]+)">([^<]*)</span>', html)
    assert len(spans) == 2 * 8  # tokens of four completions, twice
    assert spans[:3] == [
        ("0.167", "", "0.500", "rose"),
        ("0.000", ' class="zero"', "0", " soil"),
        ("0.667", ' class="dark"', "2", " thanks"),
    ]


def test_what_trackers_get(tokenizer):
    content = picture(rows(tokenizer), tokenizer, WEIGHTS, 2 * WEIGHTS)
    columns, table = tracker_rows(content, step=7)
    assert len(table) == 8 and all(len(row) == len(columns) for row in table)
    assert table[0] == [
        7,
        "tell me about the garden :",
        "chosen",
        "m_u",
        2.5 / 3,
        1 / 3,
        "rose 0.5 | soil 0 | thanks 2",
    ]
    axis = mask_figure(content).axes[0]
    assert len(axis.patches) == 16 and [t.get_text() for t in axis.texts[:3]] == ["rose", "soil", "thanks"]
    assert axis.patches[1].get_facecolor()[:3] == (1.0, 1.0, 1.0) and "m_u 3, m_d 6" in axis.get_title()


def test_the_report_has_a_section_of_them(tokenizer, tmp_path):
    content = picture(rows(tokenizer), tokenizer, WEIGHTS, WEIGHTS)
    summary = build_summary(masks={"run a": content})
    page = write_report(tmp_path / "report.html", title="t", intro="i", summary=summary).read_text()
    assert "<h2>Token masks</h2>" in page and "<h3>run a</h3>" in page and page.count('title="') >= 8
    without = write_report(tmp_path / "other.html", title="t", intro="i", summary=build_summary()).read_text()
    assert "Token masks" not in without and ".mask span" not in without


def test_what_a_run_left(tmp_path):
    assert read_content(tmp_path) is None
    (tmp_path / "masks.json").write_text("[]")
    with pytest.raises(DataError, match="is no file of token masks"):
        read_content(tmp_path)


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return str(path)


def run_of(folder, model, tokenizer, **options):
    tokenizer.save_pretrained(folder)
    masks = TokenMasks(MaskSettings("independent", 16, 2, **options)).initialise("unit", 0)
    save_masks(folder, describe_masks(masks.settings, str(model)), masks.state_dict())


def test_align_masks_of_a_model_and_of_a_run(model, data, tokenizer, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert main(["masks", str(model), "--data", data, "--activations", "attn", "--output", str(page)]) == 0
    assert "MaPO masks of" in page.read_text() and capsys.readouterr().out.strip() == str(page)
    run_of(tmp_path / "run", model, tokenizer)
    assert main(["masks", str(tmp_path / "run"), "--data", data, "--pairs", "1", "--output", str(page)]) == 0
    html = page.read_text()
    assert "m_u" in html and "m_d" in html and "1 pairs of" in html and html.count("<tr>") == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--pairs", "0"], "--pairs counts from 1"),
        (["--reference", "x"], "--reference is for a run"),
        (["--activations", "heads"], "no activations 'heads'"),
    ],
)
def test_mistakes_with_a_model(options, message, model, data, tmp_path, capsys):
    assert main(["masks", str(model), "--data", data, "--output", str(tmp_path / "p.html"), *options]) == 2
    assert message in capsys.readouterr().err


def test_mistakes_with_a_run(model, data, tokenizer, tmp_path, capsys):
    run_of(tmp_path / "run", tmp_path / "gone", tokenizer)
    command = ["masks", str(tmp_path / "run"), "--data", data, "--output", str(tmp_path / "p.html")]
    assert main(command) == 2
    assert "Name it with --reference" in capsys.readouterr().err
    assert main([*command, "--reference", str(model)]) == 0
    assert main([*command, "--activations", "attn"]) == 2
    assert "--activations is for a model" in capsys.readouterr().err
    other = TokenMasks(MaskSettings("common", 32, 2)).initialise("unit", 0)
    save_masks(tmp_path / "run", describe_masks(other.settings, str(model)), other.state_dict())
    assert main(command) == 2
    assert "it is not their reference" in capsys.readouterr().err
