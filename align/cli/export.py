"""`align export`: a trained model as a plain folder that transformers, vLLM and llama.cpp's converter load."""

import argparse

HELP = "a run as one plain model folder, its adapter merged, for transformers, vLLM and llama.cpp"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_or_model", metavar="RUN", help="a run's or checkpoint's folder, or a hub name")
    add = parser.add_argument
    add("--to", required=True, metavar="DIR", help="a new folder")
    add(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the weights [auto: of the base model]",
    )


def run(args: argparse.Namespace) -> int:
    from functools import partial

    from align.modeling.export import export_model, is_reward_model
    from align.reward_models.export import copy_normalizer

    source = args.run_or_model
    scores = is_reward_model(source)
    # before the folder is there: without its normaliser a reward model would have other scores
    further = {"further": partial(copy_normalizer, source)} if scores else {}
    found = export_model(source, args.to, dtype=args.dtype, **further)
    what = "scores" if scores else "log-probs"
    _copy_card(args.run_or_model, found, what)
    print(f"wrote {found.folder} in {found.dtype}")
    print(
        f"checked: merging changes the {what} of the run by {found.merge:.1g}, the files hold what was written to "
        f"{found.files:.1g}"
    )
    print(
        f"{found.dtype} changes them by {found.gap:.2g} on average over {found.compared} values, {found.largest:.2g} "
        f"at most (an average of {found.bound:.2g} would be refused)"
    )
    if found.effect is not None:
        print(f"the adapter itself changes them by {found.effect:.2g} on average")
    return 0


def _copy_card(source: str, found, what: str) -> None:
    """The run's model card, with what has become of it; a text of the user's own as it is."""
    from pathlib import Path

    from align.trainers.core.card import MADE_BY

    path = Path(source) / "README.md"
    if not path.is_file():
        return
    text = path.read_text(encoding="utf-8")
    if MADE_BY in text:
        merged = "its adapter merged" if "library_name: peft" in text else "as it was"
        row = f"| exported | {merged}, in {found.dtype}; {what} differ by {found.gap:.2g} on average |"
        text = text.replace("library_name: peft", "library_name: transformers")
        text = text.replace("\n| versions |", f"\n{row}\n| versions |")
    (found.folder / "README.md").write_text(text, encoding="utf-8")
