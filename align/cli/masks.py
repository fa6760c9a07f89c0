"""`align masks`: the tokens of preference pairs, coloured by a run's trained masks or by a model's activations."""

import argparse
from pathlib import Path

from align.errors import AlignError, ConfigError

HELP = "a picture of token masks: a SparsePO run's, or a model's activations (MaPO)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run of align sparsepo, or any model for MaPO's masks")
    parser.add_argument("--data", required=True, metavar="FILE", help="preference pairs, a file or a hub name")
    parser.add_argument("--split", default="train", help="of the data, e.g. train[100:104] [%(default)s]")
    parser.add_argument("--pairs", type=int, default=4, metavar="N", help="the first N pairs [%(default)s]")
    parser.add_argument(
        "--max_length", type=int, default=1024, metavar="N", help="tokens of a completion with its prompt"
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="whose states the masks of a run read [the reference it was trained with]"
    )
    parser.add_argument(
        "--activations", metavar="GROUP", help="of a model: mlp, attn, resid, logits or all [all]; a run knows its own"
    )
    parser.add_argument("--output", default="outputs/masks.html", metavar="FILE", help="the page [%(default)s]")


def run(args: argparse.Namespace) -> int:
    from align.data import load_rows
    from align.data.tokenize import tokenize_pairs
    from align.evaluation.masks import picture, write_page
    from align.modeling.load import load_policy, load_tokenizer
    from align.modeling.token_masks import FILE_NAME, TokenMasks, load_masks, read_masks

    if args.pairs < 1:
        raise ConfigError(f"--pairs counts from 1, got {args.pairs}")
    masks: TokenMasks | None = None
    masked = True, True
    if (Path(args.model) / FILE_NAME).exists():
        if args.activations is not None:
            raise ConfigError("--activations is for a model: a run's masks are what they were trained as")
        description, _ = read_masks(args.model)
        reference = args.reference or description["reference"]
        if description["variant"] == "mapo":
            layers, what = description["activations"], "the reference's activations"
            masked = description["on_reward"], description["on_kl"]
        else:
            masks, _ = load_masks(args.model)
            layers, what = masks.settings.layers, f"{description['variant']} masks"
        title = f"Token masks of {args.model}"
    else:
        if args.reference is not None:
            raise ConfigError(f"--reference is for a run, and {args.model} holds no {FILE_NAME}")
        reference, layers, what = args.model, args.activations or "all", "the model's activations"
        title = f"MaPO masks of {args.model}"
    tokenizer = load_tokenizer(args.model)
    rows = load_rows(args.data, args.split)
    rows = rows.select(range(min(args.pairs, len(rows))))
    rows = tokenize_pairs(rows, tokenizer, max_length=args.max_length, source=args.data).to_list()
    try:
        core = load_policy(reference)
    except AlignError as error:
        raise ConfigError(f"the masks read the states of {reference!r}: {error}. Name it with --reference") from error
    weights = masks_of_pairs(core, rows, tokenizer.pad_token_id, masks, layers)
    m_u, m_d = (m if on else None for m, on in zip(weights, masked, strict=True))
    intro = f"{len(rows)} pairs of {args.data}, weighed by {what} ({layers}); read by {reference}."
    print(write_page(args.output, picture(rows, tokenizer, m_u, m_d), title=title, intro=intro))
    return 0


def masks_of_pairs(core, rows: list[dict], pad_token_id: int, masks=None, groups: str = "all"):
    """(m_u, m_d) [2B, L] of tokenised pairs, from trained networks or from groups of activations of `core`."""
    import torch

    from align.data.collate import PairCollator
    from align.modeling.activation_masks import groups_of, watch_activations
    from align.modeling.logprobs import model_inputs
    from align.modeling.pairs import completions
    from align.modeling.token_masks import watch_states

    if masks is not None and masks.settings.hidden_size != core.config.get_text_config().hidden_size:
        raise ConfigError(
            f"the masks read states of size {masks.settings.hidden_size}, and those of {core.config.name_or_path} "
            f"have size {core.config.get_text_config().hidden_size}: it is not their reference"
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {name: value.to(device) for name, value in PairCollator(pad_token_id)(rows).items()}
    positions, core = completions(batch), core.to(device).eval()
    inputs = model_inputs(core, batch["input_ids"], batch["attention_mask"])
    with torch.no_grad():
        if masks is None:
            with watch_activations(core, positions, groups_of(groups)) as seen:
                core.base_model(**inputs)
            mask = seen.mask()
            return mask, mask
        with watch_states(core, positions, masks.settings.layers) as states:
            core.base_model(**inputs)
        return masks.to(device)(states, positions.mask)
