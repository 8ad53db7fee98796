"""`mswift export --to vllm` and `mswift handover`: what was trained passes and is served; what was damaged is named."""

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from mswift.cli.main import main
from mswift.infer.child_server import free_port
from tests.support.commands import command, run
from tests.support.tiny import tiny_model, tiny_tokenizer
from tests.support.vllm import needs_vllm

FILES_ONLY = ("--gate_engines",)
TP2 = ("--tensor_model_parallel_size", "2")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full run and a LoRA run on two ranks, of two steps, with heads that vLLM takes."""
    path = tmp_path_factory.mktemp("handover")
    tiny_model(path / "model", head_dim=32, vocab_size=259, use_cache=True)
    tiny_tokenizer(path / "model")
    (path / "model" / "generation_config.json").write_text('{"eos_token_id": 258}')
    rows = [{"query": f"say {i}", "response": "x" * (1 + i * 7 % 23) + str(i)} for i in range(20)]
    (path / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(command(path, "sft", path / "full", "--train_iters", "2"))
    lora = ("--tuner_type", "lora", "--lora_rank", "4", "--target_modules", "all-linear")
    run(command(path, "sft", path / "lora", "--train_iters", "2", *lora, "--nproc_per_node", "2", *TP2))
    (path / "text.txt").write_text("".join(f"Say {n}, and then {n * n}.\n" for n in range(200)))
    return path


@pytest.fixture(scope="module")
def exported(home: Path) -> Path:
    assert main(["export", "--model", str(home / "full"), "--output_dir", str(home / "exported")]) == 0
    return home / "exported"


@needs_vllm
def test_a_full_run_is_handed_over_and_serve_sh_serves_it(home: Path) -> None:
    out = home / "served"
    assert main(["export", "--model", str(home / "full"), "--output_dir", str(out), "--to", "vllm"]) == 0
    report = json.loads((out / "handover.json").read_text())
    assert report["passed"]
    pairs = [tuple(each["engines"]) for each in report["comparisons"]]
    assert pairs == [("megatron", "transformers"), ("megatron", "vllm"), ("transformers", "vllm")]
    assert all(each["num_tokens"] == 4080 and 0 < each["max"] < 5e-5 for each in report["comparisons"])
    assert "# Handover passed" in (out / "handover.md").read_text()
    moved = Path(shutil.move(out, home / "moved"))
    port = free_port("127.0.0.1")
    said = home / "serve.txt"
    server = subprocess.Popen(
        ["/bin/sh", str(moved / "serve.sh"), "--max-num-seqs", "4"],
        env={**os.environ, "PORT": str(port)}, stdout=said.open("w"), stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    try:
        while not _healthy(port):
            assert server.poll() is None, said.read_text()[-5000:]
            time.sleep(0.2)
        question = {"model": "served", "messages": [{"role": "user", "content": "say 3"}], "max_tokens": 5}
        asked = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(question).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        with urllib.request.urlopen(asked) as answer:
            assert json.loads(answer.read())["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait()


def _healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


@pytest.mark.whole
@needs_vllm
def test_an_adapter_of_two_ranks_is_handed_over_with_the_merged_model(home: Path) -> None:
    """Trained and scored by two tensor-parallel ranks, on a text."""
    out, text = home / "adapter", ("--gate_text", str(home / "text.txt"), "--gate_tokens", "1024")
    assert main(["export", "--model", str(home / "lora"), "--output_dir", str(out), "--to", "vllm", *TP2, *text]) == 0
    report = json.loads((out / "handover.json").read_text())
    compared = {(each["subject"], *each["engines"]): each["max"] for each in report["comparisons"]}
    of_each = [("megatron", "transformers"), ("megatron", "vllm"), ("transformers", "vllm")]
    assert {(name, *engines) for name in ("adapter", "merged", "model") for engines in of_each} <= compared.keys()
    assert all(each["num_tokens"] == 4 * 255 and each["max"] < 5e-5 for each in report["comparisons"])
    assert min(compared.values()) > 0
    assert '--lora-modules adapter="$here"' in (out / "serve.sh").read_text()


def test_a_text_that_cannot_be_scored_is_named(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--gate_engines", "transformers", "--gate_text")
    status, out = gate(capsys, exported, *words, tmp_path / "absent.txt")
    assert status == 1
    assert f"problem: --gate_text {tmp_path / 'absent.txt'}: cannot be read as text" in out
    (tmp_path / "short.txt").write_text("Say 3.")
    status, out = gate(capsys, exported, *words, tmp_path / "short.txt")
    assert status == 1
    assert "6 tokens, a row needs 256" in out


def damaged(exported: Path, tmp_path: Path) -> Path:
    """A copy without the manifest, as other tools leave it."""
    copy = Path(shutil.copytree(exported, tmp_path / "copy"))
    (copy / "mswift_manifest.json").unlink()
    return copy


def gate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    capsys.readouterr()
    status = main(["handover", *map(str, words)])
    return status, capsys.readouterr().out


def test_a_changed_element_is_named(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gate(capsys, exported, "--run", home / "full", *FILES_ONLY)[0] == 0
    copy = damaged(exported, tmp_path)
    tensors = load_file(copy / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][5, 7] *= -1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    status, out = gate(capsys, copy, "--run", home / "full", *FILES_ONLY)
    assert status == 1
    assert f"{name}[5, 7]" in out
    assert "1 of 6,144 elements differ" in out
    whole = bytearray((exported / "model.safetensors").read_bytes())
    whole[-1] ^= 1
    (copy / "model.safetensors").write_bytes(whole)
    shutil.copy(exported / "mswift_manifest.json", copy)
    status, out = gate(capsys, copy, *FILES_ONLY)
    assert status == 1
    assert re.search(r"problem: \S+weight: BLAKE3 \w+, the manifest says", out), out
    assert not (copy / "serve.sh").exists()


def test_another_rope_theta_is_named_and_measured(
    home: Path, exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = damaged(exported, tmp_path)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 20_000.0
    (copy / "config.json").write_text(json.dumps(config))
    words = ("--run", home / "full", "--gate_tokens", 512, "--gate_engines", "megatron", "transformers")
    status, out = gate(capsys, copy, *words)
    assert status == 1
    assert "config.json: rope_parameters is" in out
    assert "**DIFFERENT**" in out
    assert json.loads((copy / "handover.json").read_text())["comparisons"][0]["max"] > 0.01


def test_missing_files_are_named(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = damaged(exported, tmp_path)
    for path in copy.glob("chat_template*"):
        path.unlink()
    (copy / "generation_config.json").unlink()
    status, out = gate(capsys, copy, *FILES_ONLY)
    assert status == 1
    assert "there is no chat template" in out
    assert "generation_config.json is missing" in out
    (copy / "generation_config.json").write_text("{}")
    assert gate(capsys, copy, "--use_chat_template", "false", *FILES_ONLY)[0] == 0
    (copy / "tokenizer.json").unlink()
    status, out = gate(capsys, copy, "--use_chat_template", "false", *FILES_ONLY)
    assert status == 1
    assert "no tokenizer" in out


def test_fields_that_vllm_would_take_otherwise_are_named(tmp_path: Path) -> None:
    from mswift.handover.files import file_problems

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deepseek_v3"}))
    problems = " ".join(file_problems(tmp_path, None, chats=False))
    assert 'lacks topk_method, which vLLM reads and would take otherwise: it must be "noaux_tc"' in problems
    assert "lacks scoring_func" in problems
