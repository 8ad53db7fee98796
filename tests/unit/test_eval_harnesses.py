"""What other harnesses are told and what is read back: OpenCompass's configuration and summary, EvalScope's data."""

import sys
from pathlib import Path
from typing import Any

import pytest

from mswift.config.eval import EvalConfig
from mswift.errors import ConfigError
from mswift.eval import evalscope_backend, opencompass_backend, results
from mswift.eval.run import main
from mswift.eval.server import Server, arguments_of
from mswift.eval.task import Settings

SERVER = Server("http://127.0.0.1:1/v1", 'a "model"', "EMPTY", {"max_num_workers": 2, "debug": True}, {})


def _config(**changes: Any) -> EvalConfig:
    return EvalConfig(**{"model": "m", "eval_dataset": ("gsm8k_gen",), "max_new_tokens": 99, **changes})


def test_opencompass_is_called_with_a_configuration_of_the_server(tmp_path: Path) -> None:
    flags = opencompass_backend.arguments(_config(), SERVER, tmp_path)
    assert flags[:4] == ["--models", "mswift_server", "--datasets", "gsm8k_gen"]
    assert flags[4:8] == ["--config-dir", str(tmp_path / "configs"), "--work-dir", str(tmp_path / "work")]
    assert flags[8:] == ["--max-num-workers", "2", "--debug"]
    source = (tmp_path / "configs" / "models" / "mswift_server.py").read_text()
    found: dict[str, Any] = {"OpenAISDK": "OpenAISDK"}
    exec(source.replace("from opencompass.models import OpenAISDK\n", ""), found)  # noqa: S102 - it is ours
    (model,) = found["models"]
    assert (model["path"], model["openai_api_base"], model["key"]) == ('a "model"', SERVER.url, "EMPTY")
    assert (model["max_out_len"], model["type"], model["temperature"]) == (99, "OpenAISDK", 0.0)
    assert model["tokenizer_path"] == str(Path("m").absolute())
    with pytest.raises(ConfigError, match="OpenCompass finds its data itself"):
        opencompass_backend.arguments(_config(eval_dataset=("gsm8k=f",)), SERVER, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eval_limit": 3}, "--eval_limit: OpenCompass has it in the configurations"),
        ({"num_fewshot": 0}, "--num_fewshot"),
        ({"model": None}, "give --model DIR as well, for its tokenizer"),
    ],
)
def test_what_opencompass_would_leave_out_or_fetch_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opencompass_backend.evaluate(_config(eval_url=SERVER.url, **changes), Settings())


def test_the_key_stays_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "not-to-be-written")
    source = opencompass_backend.model_config(_config(), SERVER)
    assert "not-to-be-written" not in source
    assert "key='ENV'" in source


def test_opencompass_summary_is_read(tmp_path: Path) -> None:
    path = tmp_path / "summary_1.csv"
    path.write_text(
        "dataset,version,metric,mode,mswift_server\ngsm8k,1d7fe4,accuracy,gen,41.50\nmmlu,-,-,-,-\n"
        "ifeval,3321a3,Prompt-level-strict-accuracy,gen,20.00\nifeval,3321a3,Inst-level-strict-accuracy,gen,30.00\n"
    )
    found = opencompass_backend.read_summary(path)
    assert {result.name: dict(result.reported) for result in found} == {
        "gsm8k": {"accuracy": 41.5},
        "ifeval": {"Prompt-level-strict-accuracy": 20.0, "Inst-level-strict-accuracy": 30.0},
    }
    table = results.write(tmp_path / "out", found, {"model": "m"}, 0)
    assert "| gsm8k | - | accuracy | 41.5000 | as reported | - |" in table
    assert results.read(tmp_path / "out")[1] == found
    path.write_text("dataset,version,metric,mode,other\ngsm8k,1,accuracy,gen,1\n")
    with pytest.raises(ConfigError, match="no column mswift_server"):
        opencompass_backend.read_summary(path)
    path.write_text("dataset,version,metric,mode,mswift_server\n")
    with pytest.raises(ConfigError, match="scored nothing"):
        opencompass_backend.read_summary(path)


def test_evalscope_takes_folders_and_files(tmp_path: Path) -> None:
    for name in ("arc_val.jsonl", "arc_dev.jsonl", "law_test.csv", "notes.md"):
        (tmp_path / name).write_text("")
    task = evalscope_backend._task(_config(eval_dataset=(f"general_mcq={tmp_path}", "ifeval"), eval_limit=3), SERVER)
    assert task["datasets"] == ["general_mcq", "ifeval"]
    assert task["dataset_args"] == {
        "general_mcq": {"local_path": str(tmp_path), "subset_list": ["arc", "law"]},
        "ifeval": {},
    }
    assert (task["limit"], task["generation_config"]["max_tokens"], task["debug"]) == (3, 99, True)
    one = evalscope_backend._task(_config(eval_dataset=(f"general_mcq={tmp_path / 'law_test.csv'}",)), SERVER)
    assert one["dataset_args"]["general_mcq"] == {"local_path": str(tmp_path), "subset_list": ["law"]}


@pytest.mark.parametrize(("backend", "variable"), [("evalscope", "EVALSCOPE_PYTHON"), ("opencompass", "OPENCOMPASS")])
def test_what_is_not_installed_is_named(
    backend: Any, variable: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(**changes: Any) -> None:
        config = _config(eval_backend=backend, eval_output_dir=str(tmp_path / "out"), **changes)
        assert main(config) == 1

    monkeypatch.setenv(f"MSWIFT_{variable}", str(tmp_path / "none"))
    with pytest.raises(ConfigError, match=rf"environment of its own.*MSWIFT_{variable}=|MSWIFT_{variable}="):
        run(eval_url="http://127.0.0.1:9/v1")
    monkeypatch.setenv(f"MSWIFT_{variable}", sys.executable)
    with pytest.raises(ConfigError, match="no answer from models"):
        run(eval_url="http://127.0.0.1:9/v1")
    with pytest.raises(ConfigError, match=f"--eval_backend {backend} asks a server: start one"):
        run(model=str(tmp_path))


def test_arguments_are_json_or_text() -> None:
    given = ("model=hf", "limit=3", 'dataset_args={"a": 1}', "x=true", "path=/a=b")
    wanted = {"model": "hf", "limit": 3, "dataset_args": {"a": 1}, "x": True, "path": "/a=b"}
    assert arguments_of(_config(eval_args=given)) == wanted
    with pytest.raises(ConfigError, match="write NAME=VALUE"):
        arguments_of(_config(eval_args=("hf",)))
