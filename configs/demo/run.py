"""The whole road in a few minutes: `make demo`, or `python configs/demo/run.py [--output_dir DIR] [--seed N]`.

It writes a tokenizer, a random Qwen3 checkpoint and data, then runs the commands that a user would type, printing each.
Exit status 1 when a command fails or fewer than 90 % of the held-out questions are answered in the end.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

from materials import write_data, write_model

RECIPES = Path(__file__).resolve().parent
MARK = ".mswift-demo"
PARTS = (
    "adapter", "answers", "base", "base-again", "base-megatron", "cache", "data", "merged", "pt", "pt-hf", "sft",
)  # fmt: skip
WANTED = 0.9


class CommandFailed(Exception):
    """A command of the demo ended with another status than 0."""


class Demo:
    """One run of the demo in one directory."""

    def __init__(self, directory: Path, seed: int, processes: int) -> None:
        self.dir = directory
        self.seed = seed
        self.processes = processes
        self.scores: dict[str, float] = {}

    def run(self) -> bool:
        """Everything, in order; whether the final score is good enough."""
        self.prepare()
        self.there_and_back()
        self.pretrain()
        self.finetune()
        self.merge()
        return self.report()

    def prepare(self) -> None:
        """Data, tokenizer and random weights."""
        _title("A tokenizer, a Qwen3 with random weights, and data")
        write_data(self.dir / "data", self.seed)
        rows = (self.dir / "data" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(row)["text"] for row in rows]
        parameters = write_model(self.dir / "base", texts[:2000], self.seed)
        print(f"{self.dir / 'base'}: {parameters:,} parameters; {len(texts):,} documents such as {texts[0]!r}")

    def there_and_back(self) -> None:
        """Hugging Face -> Megatron -> Hugging Face: the same bits."""
        _title("Hugging Face -> Megatron -> Hugging Face, bit for bit")
        self.mswift("convert", "--model", "base", "--to", "megatron", "--output_dir", "base-megatron")
        self.mswift("convert", "--model", "base-megatron", "--to", "hf", "--output_dir", "base-again")
        self.mswift("verify", "base", "base-again")
        self.score("untrained", "--model", "base")

    def pretrain(self) -> None:
        """Full training on plain text, tensor parallel where there are two devices; export."""
        _title(f"Pretraining on plain text (tensor parallel over {self.processes})")
        self.mswift(
            "pt", RECIPES / "pt.yaml", "--model", "base-megatron", "--dataset", "data/pretrain.jsonl",
            "--output_dir", "pt", "--tensor_model_parallel_size", self.processes, *self.training(),
        )  # fmt: skip
        self.mswift("export", "--model", "pt", "--output_dir", "pt-hf")
        self.score("after pretraining, asked in chat form", "--model", "pt-hf")

    def finetune(self) -> None:
        """LoRA on conversations, data parallel where there are two devices; export; the base must not have changed."""
        _title(f"LoRA on conversations (data parallel over {self.processes})")
        self.mswift(
            "sft", RECIPES / "sft.yaml", "--model", "pt-hf", "--dataset", "data/chat.jsonl",
            "--output_dir", "sft", *self.training(),
        )  # fmt: skip
        self.mswift("export", "--model", "sft", "--output_dir", "adapter")
        self.mswift("verify", "pt", "pt-hf")
        self.score("after LoRA", "--model", "pt-hf", "--adapters", "adapter")

    def merge(self) -> None:
        """The adapter folded into a copy of its base answers alike."""
        _title("The adapter merged into a copy of its base")
        self.mswift("merge", "--model", "pt-hf", "--adapters", "adapter", "--output_dir", "merged")
        self.score("after LoRA, merged", "--model", "merged")

    def training(self) -> list[object]:
        """Flags that both trainings share."""
        return ["--nproc_per_node", self.processes, "--cache_dir", "cache", "--seed", self.seed]

    def mswift(self, *words: object) -> None:
        """Run one mswift command; words after it that name a part of the demo mean its path."""
        argv = [str(words[0]), *(self._word(word) for word in words[1:])]
        print(f"\n$ mswift {shlex.join(argv)}", flush=True)
        status = subprocess.run([sys.executable, "-m", "mswift.cli.main", *argv], check=False).returncode
        if status != 0:
            raise CommandFailed(f"mswift {argv[0]} ended with status {status}")

    def _word(self, word: object) -> str:
        if isinstance(word, Path):
            return os.path.relpath(word)
        is_part = str(word).partition("/")[0] in PARTS
        return str(self.dir / str(word)) if is_part else str(word)

    def score(self, name: str, *model: str) -> None:
        """Answer the held-out questions and count exact answers."""
        results = self.dir / "answers" / f"{name.replace(',', '').replace(' ', '-')}.jsonl"
        self.mswift(
            "infer", *model, "--val_dataset", "data/held_out.jsonl", "--result_path", f"answers/{results.name}",
            "--max_new_tokens", 16, "--max_batch_size", 100,
        )  # fmt: skip
        rows = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
        self.scores[name] = sum(row["response"].strip() == row["label"] for row in rows) / len(rows)
        question = rows[0]["messages"][-1]["content"]
        print(f"{name}: {self.scores[name]:.1%} of {len(rows)}; for instance {question!r} -> {rows[0]['response']!r}")

    def report(self) -> bool:
        """Scores, where the files are, and what to try next."""
        _title("Held-out questions answered")
        for name, score in self.scores.items():
            print(f"  {name:<40}{score:>7.1%}")
        program = _program()
        print(f"\nfiles         {self.dir}/: base, base-megatron, pt, pt-hf, sft, adapter, merged, answers")
        print(f"loss curves   {self.dir / 'pt' / 'loss.png'}, {self.dir / 'sft' / 'loss.png'}")
        print("\ntry next")
        print(f"  {program} infer --model {self.dir / 'pt-hf'} --adapters {self.dir / 'adapter'}")
        print(f'  {program} infer --model {self.dir / "merged"} --prompt "What number comes after 4731?"')
        print(
            f"  {program} sft {os.path.relpath(RECIPES / 'sft.yaml')} --model {self.dir / 'pt-hf'} "
            f"--dataset {self.dir / 'data' / 'chat.jsonl'} --micro_batch_size 2 --dry_run --world_size 8"
        )
        return min(self.scores["after LoRA"], self.scores["after LoRA, merged"]) >= WANTED


def _program() -> str:
    """How the user's shell finds mswift."""
    script = Path(sys.executable).parent / "mswift"
    return "mswift" if shutil.which("mswift") == str(script) else os.path.relpath(script)


def _title(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _claim(directory: Path) -> str | None:
    """Make the directory the demo's own and delete an earlier demo in it; the reason when it holds anything else."""
    there = [name for name in PARTS if (directory / name).exists()]
    if there and not (directory / MARK).exists():
        return f"--output_dir {directory} holds {there[0]}, which no demo wrote; give another --output_dir"
    directory.mkdir(parents=True, exist_ok=True)
    (directory / MARK).touch()
    for name in there:
        shutil.rmtree(directory / name)
    return None


def _processes() -> int:
    """Two on a CPU or on several GPUs, one on a single GPU (a GPU takes one rank)."""
    import torch

    return min(2, torch.cuda.device_count() or 2)


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output_dir", type=Path, default=Path("demo-output"), help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of data, weights and training; default: %(default)s")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    start = time.monotonic()
    if refusal := _claim(options.output_dir):
        print(refusal, file=sys.stderr)
        return 2
    try:
        good = Demo(options.output_dir, options.seed, _processes()).run()
    except CommandFailed as error:
        print(f"\nthe demo stopped: {error}", file=sys.stderr)
        return 1
    print(f"\n{time.monotonic() - start:.0f} seconds, seed {options.seed}")
    if not good:
        print(f"the demo failed: fewer than {WANTED:.0%} of the held-out questions were answered", file=sys.stderr)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
