"""A user who makes every mistake: one message with file or flag, the numbers and a value that works, which is then run.

Real commands on a tiny model, in this process where one rank suffices.
"""

import json
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mswift.cli.main import main
from tests.support.commands import command, make_home
from tests.support.tiny import tiny_model, tiny_tokenizer

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model and data of `make_home`, a full and a LoRA run of two saves each, an adapter, a converted directory."""
    path = make_home(tmp_path_factory.mktemp("bad"))
    for name, flags in (("full", ()), ("lora", ("--tuner_type", "lora"))):
        assert main(train(path, path / name, "--train_iters", "2", "--save_steps", "1", *flags)) == 0
        leave_job()
    assert main(["export", "--model", str(path / "lora"), "--output_dir", str(path / "adapter")]) == 0
    assert main(["convert", "--model", str(path / "model"), "--to", "megatron", "--output_dir", str(path / "meg")]) == 0
    return path


@pytest.fixture(autouse=True)
def out_of_the_job() -> Iterator[None]:
    """A refused run leaves its process group to the end of the process; here the process goes on."""
    yield
    leave_job()


def leave_job() -> None:
    from mswift.parallel import groups
    from mswift.parallel.megatron import world

    world.leave()
    groups.destroy()


def train(home: Path, output: Path, *flags: object, kind: str = "sft", model: Path | None = None) -> list[str]:
    """A training command on the CPU; later flags win."""
    argv = command(home, kind, output, "--device", "cpu", "--tensorboard", "false")[3:]
    return [*argv, *(["--model", str(model)] if model else []), *map(str, flags)]


def refused(capsys: Capture, status: int, argv: list[str], *words: str) -> str:
    """The one line of a command that must fail with this status and these words."""
    capsys.readouterr()
    assert main(argv) == status, capsys.readouterr().err
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
    return error


def works(argv: list[str]) -> None:
    """A remedy."""
    assert main(argv) == 0, argv
    leave_job()


def edit_config(model: Path, **fields: Any) -> None:
    """Set fields of config.json; None removes one."""
    config = json.loads((model / "config.json").read_text()) | fields
    (model / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value is not None}))


def edit_tensors(model: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the tensors of model.safetensors."""
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def truncate(path: Path, size: int) -> None:
    """Cut the end off a file."""
    path.write_bytes(path.read_bytes()[:-size])


NORM = "model.norm.weight"
BROKEN_MODELS: dict[str, tuple[Callable[[Path], object], int, list[str]]] = {
    "a tensor is missing": (lambda m: edit_tensors(m, lambda t: t.pop(NORM)), 1, ["46", "47", f"1 missing ({NORM})"]),
    "a tensor too many": (
        lambda m: edit_tensors(m, lambda t: t.update(extra=np.zeros(2, np.float32))), 1, ["48", "47", "(extra)"],
    ),
    "another shape": (
        lambda m: edit_tensors(m, lambda t: t.update({NORM: np.zeros(65, np.float32)})), 1, [NORM, "[65]", "[64]"],
    ),
    "cut short": (lambda m: truncate(m / "model.safetensors", 100), 1, ["652736 bytes", "652636", "truncated"]),
    "no weights but a folder": (
        lambda m: ((m / "model.safetensors").unlink(), (m / "model.safetensors").mkdir()), 1, ["is not a file"],
    ),
    "more layers than tensors": (
        lambda m: edit_config(m, num_hidden_layers=5, layer_types=None), 1, ["has 47 tensors", "58"],
    ),
    "model_type": (lambda m: edit_config(m, model_type="qwen33"), 2, ["'qwen33' is not supported", "'qwen3'?"]),
    "no model_type": (lambda m: edit_config(m, model_type=None), 2, ["has no model_type", "qwen3"]),
    "a field": (lambda m: edit_config(m, hidden_sizes=3), 2, ["'hidden_sizes'", "did you mean 'hidden_size'?"]),
    "a type": (lambda m: edit_config(m, hidden_size="64"), 2, ["hidden_size", "positive integer", "'64'"]),
    "no JSON": (lambda m: (m / "config.json").write_bytes(b"\xff\xfe"), 1, ["config.json: not valid JSON"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN_MODELS)
def test_a_broken_model_is_refused_by_launch_dry_run_and_conversion(
    home: Path, tmp_path: Path, capsys: Capture, case: str
) -> None:
    change, status, words = BROKEN_MODELS[case]
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    change(model)
    for argv in (
        train(home, tmp_path / "run", "--train_iters", 1, model=model),
        train(home, tmp_path / "run", "--train_iters", 1, "--dry_run", model=model),
        train(home, tmp_path / "run", "--train_iters", 1, "--nproc_per_node", 2, model=model),  # before any rank starts
        ["convert", "--model", str(model), "--to", "megatron", "--output_dir", str(tmp_path / "out")],
    ):
        refused(capsys, status, argv, *words)
    if case != "a field":  # transformers accepts any field, and says the rest in its own words
        assert main(["infer", "--model", str(model), "--prompt", "a", "--max_new_tokens", "1"]) in (1, 2)
        error = capsys.readouterr().err
        assert error.startswith(f"mswift infer: --model {model}: "), error
        assert error.count("\n") == 1, error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]  # nothing was begun


def test_a_file_of_the_tokenizer_is_missing_or_broken(home: Path, tmp_path: Path, capsys: Capture) -> None:
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    run = train(home, tmp_path / "run", "--train_iters", 1, model=model)
    infer = ["infer", "--model", str(model), "--prompt", "a", "--max_new_tokens", "1"]
    (model / "chat_template.jinja").write_text("{% for x %}")
    refused(capsys, 2, run, str(model), "chat template")
    refused(capsys, 1, infer, "chat template refuses", "--use_chat_template false")
    works([*infer, "--use_chat_template", "false"])
    (model / "tokenizer.json").write_text("{}")
    refused(capsys, 2, run, "tokenizer cannot be loaded", "copy tokenizer.json")
    refused(capsys, 2, infer, "tokenizer cannot be loaded")
    (model / "tokenizer.json").unlink()
    for argv in (run, infer):
        refused(capsys, 2, argv, f"--model {model}: no tokenizer", "copy tokenizer.json and tokenizer_config.json")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(home / "model" / name, model)
    works(run)


def test_directories_of_another_kind_and_the_command_that_makes_the_right_one(
    home: Path, tmp_path: Path, capsys: Capture
) -> None:
    model, run, adapter, megatron = home / "model", home / "full", home / "adapter", home / "meg"
    hf = tmp_path / "hf"

    def dry(path: Path) -> list[str]:
        return train(home, tmp_path / "run", "--train_iters", 1, "--dry_run", model=path)

    def proposed(error: str, *more: str) -> list[str]:
        found = re.search(r"`mswift (.+?)`", error)
        assert found is not None, error
        return [*shlex.split(found[1].replace("HF_DIR", str(hf)).replace("ADAPTER_DIR", str(hf))), *more]

    infer = ["infer", "--prompt", "a", "--max_new_tokens", "1", "--model"]
    merge = ["merge", "--adapters", str(adapter), "--output_dir", str(hf), "--model"]
    for path, argv, more in (
        (run, dry(run), []),
        (run / "checkpoint-2", [*infer, str(run / "checkpoint-2")], []),
        (megatron, [*infer, str(megatron)], []),
        (adapter, dry(adapter), ["--model", str(model), "--output_dir", str(hf)]),
    ):
        works(proposed(refused(capsys, 2, argv, str(path), "no config.json"), *more))
        works(dry(hf))
        shutil.rmtree(hf)
    lora = ["infer", "--prompt", "a", "--max_new_tokens", "1", "--model", str(model), "--adapters", str(home / "lora")]
    works(proposed(refused(capsys, 2, lora, "--adapters", "not a PEFT adapter")))
    works([*lora[:-1], str(hf)])
    refused(capsys, 2, [*merge, str(run)], str(run), "training run")
    refused(capsys, 1, dry(home / "lora" / "checkpoint-2"), "holds a LoRA adapter and no model weights")
    file, absent = model / "model.safetensors", tmp_path / "absent"
    for path, what in ((file, "file"), (absent, "")):
        for argv in (dry(path), [*infer, str(path)], [*merge, str(path)], ["verify", str(path)],
                     ["export", "--model", str(path), "--output_dir", str(hf)],
                     ["convert", "--model", str(path), "--to", "hf", "--output_dir", str(hf)]):  # fmt: skip
            refused(capsys, 2, argv, str(path), *([what] if argv[0] not in ("verify", "convert") else []))
        for argv in ([*dry(model), "--tuner_type", "lora"], [*infer, str(model)], [*merge[:1], *merge[3:], str(model)]):
            refused_adapter = [*argv, "--adapters", str(path)]
            if "--dry_run" in argv:
                capsys.readouterr()
                assert main(refused_adapter) == 2
                assert f"refused: --adapters {path}" in capsys.readouterr().out
                refused_adapter.remove("--dry_run")
            refused(capsys, 2, refused_adapter, f"--adapters {path}", what)


TP, PP, RANKS = "--tensor_model_parallel_size", "--pipeline_model_parallel_size", "--nproc_per_node"
MISFITS: dict[tuple[str, ...], tuple[list[str], str, list[str]]] = {  # flags: (words, pattern of the remedies, beside)
    (TP, "4", RANKS, "4"): ([f"{TP} 4", "2 key/value heads"], r"can be (.+)$", [TP, RANKS]),
    (PP, "8", RANKS, "8"): ([f"{PP} 8", "4 layers"], r"can be (.+)$", [PP, RANKS]),
    (PP, "3", RANKS, "3"): ([f"{PP} 3", "4 layers"], r"can be (.+)$", [PP, RANKS]),
    (RANKS, "3"): (["--global_batch_size 8", "size 3 = 3"], r"use --global_batch_size (.+)$", ["--global_batch_size"]),
    ("--micro_batch_size", "3"): (["_size 3", "_size 8"], r"use --global_batch_size (.+)$", ["--global_batch_size"]),
    (RANKS, "0"): ([f"{RANKS} 0", "at least 1"], r"use --nproc_per_node (\d+)", [RANKS]),
    (RANKS, "3", TP, "2"): (["3 ranks", f"{TP} 2"], r"use (.+) ranks", [RANKS]),
    (TP, "2"): (["1 rank ", f"{TP} 2"], r"use (.+) ranks", [RANKS]),
    ("--max_length", "0"): (["--max_length 0", "at least 2"], r"use --max_length (\d+)", ["--max_length"]),
    ("--seed", "99999999999"): (["--seed 99999999999", "4294967295"], r"use --seed (\d+)", ["--seed"]),
    ("--lora_rank", "4"): (["--lora_rank 4"], r"use --tuner_type (.+)$", ["--tuner_type"]),
    ("--tuner_type", "lora", "--target_modules", "q_prj"): (
        ["--target_modules q_prj"], r"nearest: (\w+)", ["--target_modules"],
    ),
    ("--resume", "true"): (["--resume true", "--output_dir"], r"pass --resume (\w+)", ["--resume"]),
}  # fmt: skip


@pytest.mark.parametrize("flags", MISFITS, ids=" ".join)
def test_flags_that_do_not_fit_name_values_that_do(
    home: Path, tmp_path: Path, capsys: Capture, flags: tuple[str, ...]
) -> None:
    words, pattern, mended = MISFITS[flags]
    base = train(home, tmp_path / "run", "--train_iters", 1, *flags)
    found = re.search(pattern, refused(capsys, 2, base, *words).strip())
    assert found is not None
    for value in re.split(r", | or ", found[found.lastindex or 1]):
        works([*base, *(word for flag in mended for word in (flag, value)), "--dry_run"])


ROW = json.dumps({"query": "hi", "response": "you"}) + "\n"
ROWS: dict[str, tuple[bytes, list[str]]] = {
    "empty.jsonl": (b"", ["the data set is empty"]),
    "empty.json": (b"[]", ["the data set is empty"]),
    "head.csv": (b"query,response\n", ["the data set is empty"]),
    "question.jsonl": (ROW.encode() + b'{"query": "q"}\n', ["row 2 has no assistant turn"]),
    "torn.jsonl": (ROW.encode() + b'{"query": "a", "resp', ["line 2, column 16", "bad JSON"]),
    "binary.jsonl": (bytes(range(256)), ["line 1", "NUL byte"]),
    "latin.jsonl": (ROW.replace("you", "d\xe9j\xe0").encode("latin-1"), ["line 1", "not UTF-8", "save the file as"]),
    "utf16.jsonl": (ROW.encode("utf-16"), ["line 1", "iconv -f UTF-16 -t UTF-8"]),
    "deep.jsonl": (b'{"query":' + b"[" * 100_000 + b"\n", ["line 1", "cannot be read"]),
    "digits.jsonl": (b'{"query":' + b"1" * 5000 + b"}\n", ["line 1", "cannot be read"]),
    "half.jsonl": (b'{"query": "\\ud800", "response": "a"}\n', ["line 1", "cannot be read", "surrogates"]),
    "wrong.jsonl.gz": (b"xx", ["damaged gzip file"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_data_that_cannot_be_read(home: Path, tmp_path: Path, capsys: Capture, name: str) -> None:
    content, words = ROWS[name]
    path = tmp_path / name
    path.write_bytes(content)
    run = train(home, tmp_path / "run", "--train_iters", 1, "--strict")
    refused(capsys, 1, [*run, "--dataset", str(path)], str(path), *words)
    refused(capsys, 1, [*run, "--val_dataset", str(path)], str(path), *words)


def test_data_that_is_mended_as_the_message_says(home: Path, tmp_path: Path, capsys: Capture) -> None:
    path = tmp_path / "rows.jsonl"
    long_row = json.dumps({"query": "q", "response": "x" * 400}) + "\n"

    def run(*flags: object) -> list[str]:
        return train(home, tmp_path / str(time.monotonic_ns()), "--train_iters", 1, "--dataset", path, *flags)

    path.write_bytes(ROW.encode("utf-16"))
    found = re.search(r"iconv .*", refused(capsys, 1, run(), "UTF-16"))
    assert found is not None
    subprocess.run(["bash", "-c", found[0]], check=True, cwd=tmp_path)
    works(run("--dataset", tmp_path / "rows-utf8.jsonl"))
    path.write_bytes(b"\xef\xbb\xbf" + ROW.replace("\n", "\r\n").encode() * 8)  # byte-order mark, CRLF: fine
    works(run())
    path.write_text(ROW)
    error = refused(capsys, 1, run("--max_length", 5), "--max_length 5;", "the shortest has 25 tokens")
    works(run(*re.findall(r"(--max_length) (\d+) takes", error)[0]))
    error = refused(capsys, 2, run("--dataset", f"{path}#0"), f"--dataset {path}#0", "rows from 1")
    works(run("--dataset", error.split("from 1: ")[1].strip()))
    path.write_text(long_row)
    error = refused(capsys, 1, run(), "tokens, the model takes 256", "--truncation_strategy right --max_length 256")
    works(run(*error.split("cut them with ")[1].split()))
    error = refused(
        capsys,
        2,
        run("--max_length", 1000),
        "--dataset",
        "256 positions",
        "pass --max_length 256",
        "--rope_scaling yarn --max_model_len",
    )
    works(run(*error.split("pass ")[1].split(), "--truncation_strategy", "right"))


def test_a_bad_row_is_left_out_said_and_written_down(home: Path, tmp_path: Path, capsys: Capture) -> None:
    """Mixtures and the validation split reach training too: the shares are printed, the rows apart are evaluated."""
    good, bad = (tmp_path / name for name in ("good.jsonl", "bad.jsonl"))
    good.write_text(ROW * 10)
    bad.write_text(ROW * 5 + "{\n" + ROW * 4)
    run = train(home, tmp_path / "run", "--train_iters", 1, "--dataset", good, bad, "--dataset_weights", 1, 3)
    works([*run, "--split_dataset_ratio", "0.2", "--eval_steps", "1", "--seed", "1"])
    printed = capsys.readouterr().out
    assert "bad.jsonl: 8 rows of 10; 7 samples; 1 rejected (row 6), the first:" in printed
    assert "source 2: weight 3, 11 of 7 samples (1.57 times)" in printed
    (line,) = (tmp_path / "run" / "rejected.jsonl").read_text().splitlines()
    assert (json.loads(line)["file"], json.loads(line)["row"]) == ("bad.jsonl", 6)
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["eval_loss"] > 0
    assert 0 < metrics[0]["data_wait"] < 1
    assert f"waiting for data: {metrics[0]['data_wait']:.2%} of the time of all steps" in printed
    refused(capsys, 1, [*run, "--output_dir", str(tmp_path / "other"), "--strict"], "line 6, column 2: bad JSON")


def test_a_vocabulary_smaller_than_the_tokenizers(home: Path, tmp_path: Path, capsys: Capture) -> None:
    small, fitting = tmp_path / "small", tmp_path / "fitting"
    tiny_model(small, vocab_size=250, bos_token_id=None, eos_token_id=None)
    tiny_tokenizer(small)
    for kind in ("sft", "pt"):
        run = train(home, tmp_path / kind, "--train_iters", 1, kind=kind, model=small)
        error = refused(capsys, 2, run, "--dataset", "id 25", "250 rows")
    infer = ["infer", "--prompt", "a", "--max_new_tokens", "1", "--model"]
    refused(capsys, 1, [*infer, str(small)], "id 258", "250 embedding rows")
    rows = re.findall(r"give the model (\d+) rows", error)
    tiny_model(fitting, vocab_size=int(rows[0]), bos_token_id=None, eos_token_id=None)
    tiny_tokenizer(fitting)
    works(train(home, tmp_path / "run", "--train_iters", 1, model=fitting))
    works([*infer, str(fitting)])


def test_weights_that_are_no_numbers(home: Path, tmp_path: Path, capsys: Capture) -> None:
    model = Path(shutil.copytree(home / "model", tmp_path / "model"))
    edit_tensors(model, lambda t: t["model.layers.0.mlp.gate_proj.weight"].fill(np.nan))
    run = train(home, tmp_path / "run", "--train_iters", 1, model=model)
    refused(capsys, 1, run, "step 1: loss nan", "nothing was saved", "weights that it started from")
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    refused(capsys, 1, ["infer", "--prompt", "a", "--model", str(model)], "logits are nan", "--torch_dtype float32")


def test_adapters_of_another_model_or_rank(home: Path, tmp_path: Path, capsys: Capture) -> None:
    other, adapter = tmp_path / "other", str(home / "adapter")
    tiny_model(other, hidden_size=32, head_dim=8)
    tiny_tokenizer(other)
    infer = ["infer", "--prompt", "a", "--max_new_tokens", "1", "--adapters", adapter, "--model"]
    merge = ["merge", "--adapters", adapter, "--output_dir", str(tmp_path / "merged"), "--model"]
    tune = train(home, tmp_path / "run", "--train_iters", 1, "--tuner_type", "lora", "--adapters", adapter)
    for argv in ([*infer, str(other)], [*merge, str(other)], [*tune, "--model", str(other)]):
        refused(capsys, 1, argv, adapter, "q_proj.lora_A", "[8, 64]", "[8, 32]")
    for argv in ([*infer, str(home / "model")], [*merge, str(home / "model")], tune):
        works(argv)
    error = refused(capsys, 2, [*tune, "--lora_rank", "4"], "--lora_rank 4", adapter, "has 8")
    again = train(home, tmp_path / "again", *tune[tune.index("--train_iters") :])
    works([*again, *re.findall(r"use (--lora_rank) (\d+)", error)[0]])
    refused(capsys, 2, [*merge[:1], "--adapters", *merge[3:], str(home / "model")], "--adapters is required")


@contextmanager
def full_disk(size_bytes: int) -> Iterator[None]:
    """The kernel refuses files beyond that size, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_publishes_nothing(home: Path, tmp_path: Path, capsys: Capture) -> None:
    model, out = str(home / "model"), tmp_path / "out"
    commands = {
        "convert": ["convert", "--model", model, "--to", "hf", "--output_dir"],
        "to megatron": ["convert", "--model", model, "--to", "megatron", "--output_dir"],
        "export": ["export", "--model", str(home / "full"), "--output_dir"],
        "adapter": ["export", "--model", str(home / "lora"), "--output_dir"],
        "merge": ["merge", "--model", model, "--adapters", str(home / "adapter"), "--output_dir"],
    }
    for name, argv in commands.items():
        with full_disk(50_000):
            refused(
                capsys, 1, [*argv, str(out)], f"--output_dir {out}", "disk is full", "bytes free", "nothing was pub"
            )
        assert list(tmp_path.iterdir()) == [], name
        works([*argv, str(out)])
        refused(capsys, 2, [*argv, str(out)], f"--output_dir {out} exists already")
        shutil.rmtree(out)
    run = train(home, tmp_path / "run", "--train_iters", 1)
    with full_disk(200_000):
        refused(
            capsys, 1, run, "checkpoint-1", "the disk is full", "nothing was published", "give the same command again"
        )
    leave_job()
    works(run)


def test_an_output_directory_that_cannot_be_one(home: Path, tmp_path: Path, capsys: Capture) -> None:
    file, model = tmp_path / "file", Path(shutil.copytree(home / "model", tmp_path / "model"))
    file.write_text("")
    before = sorted(model.iterdir())
    for output in (file, model, home / "full" / "checkpoint-2"):
        for more in ((), ("--nproc_per_node", 2)):
            error = refused(capsys, 2, train(home, output, "--train_iters", 1, *more), f"--output_dir {output}")
        works(train(home, Path(error.split("--output_dir ")[-1].strip()), "--train_iters", 1))
    said = "--output_dir /proc/run cannot be written (No such file or directory): name a directory that can be"
    refused(capsys, 2, train(home, Path("/proc/run"), "--train_iters", 1), said)
    shutil.rmtree(home / "full" / "checkpoint-2-run")
    assert sorted(model.iterdir()) == before
    rows = ["--val_dataset", str(home / "val.jsonl"), "--model", str(model), "--max_new_tokens", "1", "--result_path"]
    error = refused(capsys, 2, ["infer", *rows, str(tmp_path)], f"--result_path {tmp_path}", "is a folder")
    works(["infer", *rows, error.split("--result_path ")[-1].strip()])


def flip(checkpoint: Path) -> None:
    """Change one bit in the middle of a shard."""
    path = next(iter(sorted(checkpoint.glob("*.distcp"))))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a bit": (flip, [".distcp is damaged: BLAKE3"]),
    "a shard": (lambda c: next(c.glob("*.distcp")).unlink(), [".distcp is missing", "bytes"]),
    "run.json": (lambda c: (c / "run.json").write_text("{"), ["run.json is damaged: 1 bytes"]),
    "COMMIT": (lambda c: (c / "COMMIT").write_text('{"version": 1'), ["COMMIT is damaged"]),
    ".metadata": (lambda c: (c / ".metadata").write_bytes(b"xx"), [".metadata is damaged: 2 bytes"]),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_never_used(home: Path, tmp_path: Path, capsys: Capture, case: str) -> None:
    change, words = DAMAGE[case]
    run = Path(shutil.copytree(home / "full", tmp_path / "run"))
    change(run / "checkpoint-2")
    out = ["--output_dir", str(tmp_path / "out")]
    for argv in (["export", "--model", str(run), *out], ["convert", "--model", str(run), "--to", "hf", *out]):
        refused(capsys, 1, argv, str(run / "checkpoint-2"), *words)
    assert not (tmp_path / "out").exists()
    go_on = train(home, run, "--train_iters", "3")
    assert main(go_on) == 1
    assert str(run / "checkpoint-2") in capsys.readouterr().err
    leave_job()
    shutil.rmtree(run / "checkpoint-2")  # "use an older checkpoint"
    works(go_on)
    works(["export", "--model", str(run), *out])


def test_what_is_not_committed_is_not_taken(home: Path, tmp_path: Path, capsys: Capture) -> None:
    run = Path(shutil.copytree(home / "full", tmp_path / "run"))
    (run / "checkpoint-2" / "COMMIT").unlink()
    out = ["--output_dir", str(tmp_path / "out")]
    refused(capsys, 1, ["export", "--model", str(run / "checkpoint-2"), *out], "COMMIT", "--save_steps")
    works(["export", "--model", str(run), *out])
    assert f"exporting {run / 'checkpoint-1'}\n" in capsys.readouterr().out


def test_a_metrics_file_that_holds_something_else(home: Path, tmp_path: Path, capsys: Capture) -> None:
    run = Path(shutil.copytree(home / "full", tmp_path / "run"))
    metrics = run / "metrics.jsonl"
    argv = train(home, run, "--train_iters", "3")
    for content in (b"[]\n", b"\xff\xfe\n", b'{"loss": 1}\n'):
        metrics.write_bytes(content)
        refused(capsys, 1, argv, f"{metrics}, line 1", "move the file away")
        leave_job()
    metrics.rename(tmp_path / "away")
    works(argv)


# -- real processes


def test_an_error_of_all_ranks_and_an_interrupt(home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "q"}\n')
    output = tmp_path / "run"
    two = command(home, "sft", output, "--nproc_per_node", "2", "--tensorboard", "false", "--save_steps", "1")
    done = subprocess.run(
        [*two, "--train_iters", "1", "--dataset", str(rows)], capture_output=True, text=True, timeout=300, check=False
    )
    lines = done.stderr.strip().split("\n")
    assert done.returncode == 1, done.stderr
    first, second, where = sorted(lines)  # rank 0 writes to the console, of rank 1 its file is repeated
    assert first.startswith("mswift sft [rank 0]: ") and f"{rows}, row 1 has no assistant turn" in first  # noqa: PT018
    assert second.startswith("mswift sft [rank 1]: ")
    assert re.fullmatch(r"mswift: rank 1 ended with 1; .*rank-0*1\.err ends:", where)
    process = subprocess.Popen([*two, "--train_iters", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text():
        time.sleep(0.01)  # until the launcher has started its agent, which is seconds away from handling a signal
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=200)[1], process.returncode) == (b"", 130)
    process = subprocess.Popen([*two, "--train_iters", "100000"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 300
    while not (output / "checkpoint-3").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=200)
    assert (process.returncode, error) == (130, b"")
    saved = max(int(path.name.split("-")[1]) for path in output.glob("checkpoint-*"))
    works(train(home, output, "--train_iters", saved + 1))  # on one rank, from the newest checkpoint


def test_a_reader_that_leaves(home: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "mswift.cli.main", *train(home, tmp_path / "run", "--train_iters", 2)]
    line = f"{shlex.join(run)} | head -1 >&2; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=300, env={**os.environ})
    assert (done.returncode, done.stderr) == (141, "command    sft, full, F32 on cpu\n")
