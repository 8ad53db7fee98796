"""Requests a second and latency of `mswift deploy` against vLLM's server and `transformers serve`, on one machine.

    python benchmarks/serve.py [--size 10M] [--rounds 5] [--threads 1] [--requests 32] [--together 16] [--new_tokens 32]
        [--write benchmarks/results/serve.md]

One random Llama (fp32; its tokens are words), greedy, streamed chat completions of 20 to 200 prompt tokens. All
servers run at once and idle but for the one that is asked, in rotated order: --requests with --together at once, and a
quarter of them one after the other. Contenders: mswift (transformers engine), vLLM where it is installed, transformers
as it comes, and with --continuous-batching. Everything has the same number of threads. Time to the first text, time for
each further token (the rest of an answer by its tokens); p50 and p95 over all requests of all rounds. CPU seconds are
the server's own for each request and leave out what other processes took. The answers of the servers are compared.
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.measure import cpu_name, publish
from benchmarks.train import SIZES, model_config
from mswift.infer.backends import EngineConfig
from mswift.infer.child_server import ChildServer, ServerOptions, free_port
from mswift.infer.vllm_options import vllm_version
from mswift.infer.vllm_server import ServerOptions as VllmOptions
from mswift.infer.vllm_server import VllmServer

SEED = 3
CACHE_BLOCKS = 512
"""Of transformers' continuous batching, 32 tokens each; its own choice is most of the machine's memory."""


@dataclass(frozen=True)
class Taken:
    """One request: text, its tokens, seconds to the first and to the last of it."""

    text: str
    tokens: int
    first: float
    whole: float


def write_model(path: Path, size: str) -> None:
    """A random model of that size, each token of which is a word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    fields = model_config(size)
    words = ["<unk>", "<end>", *(f"w{number}" for number in range(fields["vocab_size"] - 2))]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<end>", pad_token="<end>")
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }} {% endfor %}"
    tokenizer.save_pretrained(path)
    torch.manual_seed(SEED)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**fields, initializer_range=0.1))
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)


@contextlib.contextmanager
def servers(model: Path, threads: int) -> Iterator[dict[str, ChildServer]]:
    """Name -> running server."""
    os.environ |= {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    os.environ.pop("MSWIFT_API_KEY", None)

    def started(name: str, *argv: str) -> ChildServer:
        options = ServerOptions(port=free_port("127.0.0.1"), ready_seconds=300)
        words = [sys.executable, *argv, "--host", "127.0.0.1", "--port", str(options.port)]
        return ChildServer(name, words, os.environ, options, options.port, model.name)

    transformers = (
        "-c",
        "from transformers.cli.transformers import main; main()",
        "serve",
        str(model),
        "--device",
        "cpu",
    )
    with contextlib.ExitStack() as stack:
        found = {"mswift": started("mswift deploy", "-m", "mswift.cli.main", "deploy", "--model", str(model))}
        stack.enter_context(found["mswift"])
        if vllm_version() is not None:
            found["vLLM"] = stack.enter_context(VllmServer(EngineConfig(model), VllmOptions()))
        found["transformers"] = stack.enter_context(started("transformers serve", *transformers))
        name = "transformers, continuous batching"
        found[name] = stack.enter_context(
            started(name, *transformers, "--continuous-batching", "--cb-num-blocks", str(CACHE_BLOCKS))
        )
        yield found


def prompts(count: int) -> list[str]:
    """Of different lengths."""
    chosen = random.Random(SEED)
    return [" ".join(f"w{chosen.randrange(4000)}" for _ in range(chosen.randint(20, 200))) for _ in range(count)]


def ask(server: ChildServer, model: str, prompt: str, new_tokens: int) -> Taken:
    """One streamed chat completion."""
    body = {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": new_tokens}
    body |= {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
    line = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=600)
    start = time.perf_counter()
    try:
        line.request("POST", "/v1/chat/completions", json.dumps(body), {"content-type": "application/json"})
        answer = line.getresponse()
    except OSError as error:
        raise RuntimeError(f"{server.name} (status {server.status}): {error}\n{server.output(40)}") from error
    if answer.status != 200:
        raise RuntimeError(f"{server.name}: {answer.status} {answer.read()[:500]!r}\n{server.output()}")
    text, tokens, first = "", 0, 0.0
    for words in answer:
        if not words.startswith(b"data: {"):
            continue
        event = json.loads(words[6:])
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        for choice in event["choices"]:
            new = choice["delta"].get("content") or ""
            if new and not text:
                first = time.perf_counter() - start
            text += new
    line.close()
    return Taken(text, tokens, first, time.perf_counter() - start)


def cpu_seconds(server: ChildServer) -> float:
    """Of the server and its children, until now."""
    import psutil

    own = psutil.Process(server.pid)
    return sum(one.cpu_times().user + one.cpu_times().system for one in (own, *own.children(recursive=True)))


def load(server: ChildServer, model: str, asked: Sequence[str], together: int, new_tokens: int) -> Any:
    """(requests, wall seconds, CPU seconds of the server)."""
    before, start = cpu_seconds(server), time.perf_counter()
    with ThreadPoolExecutor(together) as pool:
        taken = list(pool.map(lambda prompt: ask(server, model, prompt, new_tokens), asked))
    return taken, time.perf_counter() - start, cpu_seconds(server) - before


def measure(args: argparse.Namespace) -> tuple[dict[int, dict[str, list[Any]]], dict[str, list[str]]]:
    """Answers together -> contender -> what each round took; contender -> its texts."""
    asked = prompts(args.requests)
    taken: dict[int, dict[str, list[Any]]] = {args.together: {}, 1: {}}
    texts: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model, args.size)
        with servers(model, args.threads) as running:
            names = list(running)
            known = {name: str(model) if name.startswith("transformers") else running[name].model for name in names}
            for name in list(names):
                try:  # warm, twice: what breaks on a second load is no contender
                    for _ in range(2):
                        load(running[name], known[name], asked[: args.together], args.together, args.new_tokens)
                except RuntimeError as error:
                    print(f"left out: {name}: {error}", file=sys.stderr)
                    names.remove(name)
            for number in range(args.rounds):
                for name in names[number % len(names) :] + names[: number % len(names)]:
                    for together, part in ((args.together, asked), (1, asked[: max(len(asked) // 4, 1)])):
                        got = load(running[name], known[name], part, together, args.new_tokens)
                        taken[together].setdefault(name, []).append(got)
                        if together == args.together and number == 0:
                            texts[name] = [one.text for one in got[0]]
    return taken, texts


def table(rounds: dict[str, list[Any]], tokens: Sequence[int]) -> list[str]:
    """Of one load. tokens: of each answer, as mswift counts them."""
    lines = [
        "| server | requests/s (median) | least | most | tokens/s | first text p50 | p95 | further token p50 | p95 "
        "| CPU s a request | it / mswift |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    own = statistics.median(cpu / len(got) for got, _, cpu in rounds["mswift"])
    for name, each in rounds.items():
        rates = sorted(len(got) / wall for got, wall, _ in each)
        firsts = sorted(one.first for got, _, _ in each for one in got)
        further = sorted(
            (one.whole - one.first) / (count - 1)
            for got, _, _ in each for one, count in zip(got, tokens, strict=False) if count > 1
        )  # fmt: skip
        speed = statistics.median(sum(tokens[: len(got)]) / wall for got, wall, _ in each)
        cpu = statistics.median(cpu / len(got) for got, _, cpu in each)
        lines.append(
            f"| {name} | {statistics.median(rates):.2f} | {rates[0]:.2f} | {rates[-1]:.2f} | {speed:.0f} "
            f"| {_milliseconds(firsts)} | {_milliseconds(further)} | {cpu:.3f} | {cpu / own:.2f} |"
        )
    return lines


def _milliseconds(values: Sequence[float]) -> str:
    p50, p95 = (values[min(int(len(values) * share), len(values) - 1)] for share in (0.5, 0.95))
    return f"{1000 * p50:.1f} ms | {1000 * p95:.1f} ms"


def main() -> None:
    """Parse, measure, print, perhaps write."""
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SIZES), default="10M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--together", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    before = os.getloadavg()[0]
    taken, texts = measure(args)
    tokens = [one.tokens for one in taken[args.together]["mswift"][0][0]]
    words = {name: ["".join(text.split()) for text in own] for name, own in texts.items()}  # vLLM leaves out spaces
    same = {name: sum(a == b for a, b in zip(own, words["mswift"], strict=True)) for name, own in words.items()}
    flags = " ".join(f"--{name} {getattr(args, name)}" for name in
                     ("size", "rounds", "threads", "requests", "together", "new_tokens"))  # fmt: skip
    lines = [
        f"`python benchmarks/serve.py {flags}`",
        "",
        f"{cpu_name()}; torch {torch.__version__}, transformers {transformers.__version__}, vLLM {vllm_version()}; "
        f"load {before:.1f} before, {os.getloadavg()[0]:.1f} after. The same answers as mswift: "
        + ", ".join(f"{name} {count} of {args.requests}" for name, count in same.items() if name != "mswift")
        + f"; {sum(tokens) / len(tokens):.1f} tokens an answer.",
    ]
    for together, rounds in taken.items():
        lines += ["", f"{together} at once:" if together > 1 else "One after the other:", "", *table(rounds, tokens)]
    publish("\n".join(lines) + "\n", args.write)


if __name__ == "__main__":
    main()
