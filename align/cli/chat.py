"""`align chat`: talk to a run in the terminal, beside another model and with the scores of rewards if wanted."""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from align.cli.option_types import add_seed, add_template_kwargs

HELP = "talk to a run or a model in the terminal, beside another one, with scores"
COMMANDS = """/reset            forget the conversation
/system TEXT      set the system message and forget the conversation; without TEXT take it away
/temperature T    0 is greedy
/tokens N         at most so many tokens an answer
/history          show the conversation
/help             show this
/exit             leave (also the end of the input)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="a run's folder (an adapter's too), or a hub name")
    add = parser.add_argument
    add("--compare", metavar="MODEL", help="a second model, asked the same; the conversation goes on with the first")
    add("--rewards", nargs="+", default=[], metavar="REWARD", help="scores beside each answer: as of align generate")
    add("--system", metavar="TEXT", help="a system message")
    add_template_kwargs(parser)
    add("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy [0.7]")
    add("--top_p", type=float, default=1.0, metavar="P", help="[1.0]")
    add("--max_tokens", type=int, default=512, metavar="N", help="of an answer [512]")
    add("--dtype", metavar="DTYPE", help="of the weights [as saved on a GPU, float32 on a CPU]")
    add_seed(parser)


def run(args: argparse.Namespace) -> int:
    import torch

    from align.errors import ConfigError
    from align.evaluation.scoring import build_rewards

    for name, low in (("temperature", 0.0), ("max_tokens", 1), ("top_p", 0.0)):
        if getattr(args, name) < low:
            raise ConfigError(f"--{name} must be at least {low:g}, not {getattr(args, name):g}")
    names = [args.model] if args.compare is None else [args.model, args.compare]
    speakers = [Speaker(name, args.dtype, args.chat_template_kwargs) for name in names]
    if args.system and not all(speaker.chat for speaker in speakers):
        raise ConfigError("--system needs a chat template, and a model has none")
    rewards = build_rewards(args.rewards, None, gold_name="", tokenizer=speakers[0].tokenizer)
    torch.manual_seed(args.seed)
    Talk(speakers, rewards, args).loop(_lines())
    return 0


def _lines() -> Iterator[str]:
    """What is typed, with a prompt on a terminal; or the lines of a file or pipe."""
    if not sys.stdin.isatty():
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return


class Talk:
    """A conversation: what was said, how answers are drawn, and the commands."""

    def __init__(self, speakers: list["Speaker"], rewards: dict, args: argparse.Namespace):
        self.speakers, self.rewards = speakers, rewards
        self.system: str | None = args.system
        self.options = {"temperature": args.temperature, "top_p": args.top_p, "max_tokens": args.max_tokens}
        self.messages: list[dict[str, str]] = []
        self.reset()

    def loop(self, lines: Iterator[str]) -> None:
        for speaker in self.speakers:
            kind = "" if speaker.chat else " (no chat template: texts are continued, each on its own)"
            print(f"{speaker.name}{kind}")
        print("/help lists the commands")
        for line in lines:
            if not line.strip():
                continue
            if line.startswith("/"):
                if self.command(*line[1:].strip().partition(" ")[::2]):
                    return
            else:
                self.ask(line)

    def reset(self) -> None:
        self.messages = [{"role": "system", "content": self.system}] if self.system else []

    def command(self, name: str, value: str) -> bool:
        """Do what a line with a slash says; True to leave."""
        value = value.strip()
        if name in ("exit", "quit"):
            return True
        if name == "reset":
            self.reset()
            print("the conversation is forgotten")
        elif name == "system":
            if not all(speaker.chat for speaker in self.speakers):
                print("a system message needs a chat template, and a model has none")
                return False
            self.system = value or None
            self.reset()
            print(f"system message: {self.system or 'none'}; the conversation is forgotten")
        elif name in ("temperature", "tokens"):
            self.set_number(name, value)
        elif name == "history":
            for message in self.messages:
                print(f"{message['role']}: {message['content']}")
        else:
            print(COMMANDS if name == "help" else f"there is no command /{name}:\n{COMMANDS}")
        return False

    def set_number(self, name: str, value: str) -> None:
        try:
            number = float(value) if name == "temperature" else int(value)
        except ValueError:
            print(f"/{name} needs a number, not {value!r}")
            return
        if number < (0 if name == "temperature" else 1):
            print(f"/{name} {value} is too small")
            return
        self.options["max_tokens" if name == "tokens" else name] = number
        print(f"{name}: {number:g}")

    def ask(self, text: str) -> None:
        """One turn: every model answers the same; the first one's answer stays in the conversation."""
        from align.data.messages import answered

        asked = [*self.messages, {"role": "user", "content": text}]
        kept = None
        for speaker in self.speakers:
            if len(self.speakers) > 1:
                print(f"[{speaker.name}]")
            prompt = asked if speaker.chat else text
            try:
                answer, ended = speaker.answer(prompt, self.options)
            except KeyboardInterrupt:
                print("\n(interrupted: this turn is forgotten)")
                return
            if answer is None:
                return
            if not ended:
                print(f"(cut at {self.options['max_tokens']:g} tokens)")
            self.show_scores(prompt, answer, ended)
            kept = answer if kept is None else kept
        if self.speakers[0].chat:
            self.messages = [*asked, answered(kept or "")]

    def show_scores(self, prompt: Any, answer: str, ended: bool) -> None:
        from align.errors import RewardError
        from align.reward_models.base import RewardBatch

        completion = answer if isinstance(prompt, str) else [{"role": "assistant", "content": answer}]
        for name, reward in self.rewards.items():
            try:
                score = reward.score(RewardBatch([prompt], [completion], ended=[ended])).scores.item()
            except RewardError as error:  # an empty answer: the talk goes on
                print(f"({error})")
            else:
                print(f"({name}: {score:.4g})")


class Speaker:
    """A model that answers in the terminal, token by token."""

    def __init__(self, source: str, dtype: str | None, template_kwargs: dict[str, Any] | None = None):
        import torch
        from transformers import GenerationConfig

        from align.modeling.load import load_policy, load_tokenizer
        from align.modeling.logprobs import language_model
        from align.rollout.engine import end_tokens

        self.name, self.template_kwargs = source, template_kwargs or {}
        self.tokenizer = load_tokenizer(source)
        self.chat = bool(self.tokenizer.chat_template)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model: Any = load_policy(source, dtype=dtype or ("auto" if device == "cuda" else "float32"))
        self.model.to(device).eval()
        self.ends = end_tokens(language_model(self.model), self.tokenizer)
        # what it says beside (a repetition penalty, a shortest answer) would be added to what is asked for
        self.model.generation_config = GenerationConfig()

    def answer(self, prompt: Any, options: dict) -> tuple[str | None, bool]:
        """(the answer, whether it ended by itself), printed as it comes; (None, False) if the prompt cannot be asked,
        and why is printed."""
        import torch
        from transformers import GenerationConfig, TextStreamer

        from align.data.bad_rows import BadRow
        from align.data.ending import written_text
        from align.data.limits import positions

        try:
            text = prompt if isinstance(prompt, str) else self._rendered(prompt)
        except BadRow as reason:
            print(f"({reason})")
            return None, False
        ids = self.tokenizer(text, add_special_tokens=isinstance(prompt, str), return_tensors="pt").to(
            self.model.device
        )
        width, limit = ids["input_ids"].shape[1], positions(self.model.config.get_text_config())
        if limit is not None and width + options["max_tokens"] > limit:
            print(f"(the conversation has {width} tokens, and the model takes {limit}: /reset it, or lower /tokens)")
            return None, False
        sampling: dict[str, Any] = {"do_sample": False}
        if options["temperature"] > 0:
            sampling = {"do_sample": True, "temperature": options["temperature"], "top_p": options["top_p"], "top_k": 0}
        config = GenerationConfig(
            max_new_tokens=options["max_tokens"],
            eos_token_id=list(self.ends),
            pad_token_id=self.tokenizer.pad_token_id,
            use_cache=True,
            **sampling,
        )
        streamer = TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            output = self.model.generate(
                ids["input_ids"], attention_mask=ids["attention_mask"], generation_config=config, streamer=streamer
            )
        drawn = output[0, width:].tolist()
        ended = bool(drawn) and drawn[-1] in self.ends
        return written_text(self.tokenizer, drawn, ended), ended

    def _rendered(self, prompt: list[dict]) -> str:
        from align.data.encode import render

        return render(prompt, self.tokenizer, self.template_kwargs, answer_next=True)
