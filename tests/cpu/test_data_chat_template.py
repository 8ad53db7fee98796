"""--chat_template: which template is used, what is refused, and that it travels with a model and its token cache."""

import json
import pickle
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from mswift.cli.main import main
from mswift.data.chat_template import (
    own_template,
    read_chat_template,
    template_of_adapters,
    use_chat_template,
    with_chat_template,
)
from mswift.data.tokenizer import load_tokenizer, tokenizer_identity
from mswift.errors import ConfigError
from mswift.train.identity import check_chat_template
from mswift.tuners.export import _tokenizer_files
from tests.support import chat_templates
from tests.support.tiny import CHAT_TEMPLATE, tiny_model, tiny_tokenizer

SHOUTS = CHAT_TEMPLATE.replace("message.role }}", "message.role | upper }}").replace("assistant\n{%", "ASSISTANT\n{%")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer(path)
    return path


def written(path: Path, content: object) -> str:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return str(path)


def test_a_path_a_json_file_and_a_name(folder: Path, tmp_path: Path) -> None:
    named = [{"name": "default", "template": chat_templates.PLAIN}, {"name": "loud", "template": SHOUTS}]
    files = {
        written(tmp_path / "a.jinja", SHOUTS): SHOUTS,
        written(tmp_path / "tokenizer_config.json", {"chat_template": SHOUTS, "eos_token": "x"}): SHOUTS,
        written(tmp_path / "chat_template.json", {"chat_template": named}): chat_templates.PLAIN,
    }
    for file, template in files.items():
        tokenizer = load_tokenizer(folder)
        before = tokenizer_identity(tokenizer)
        use_chat_template(tokenizer, file)
        assert tokenizer.chat_template == template
        assert tokenizer_identity(tokenizer) != before  # it is part of the name of a cache entry
        assert pickle.loads(pickle.dumps(tokenizer)).chat_template == template  # noqa: S301  (how processes get it)
    tokenizer = load_tokenizer(folder)
    use_chat_template(tokenizer, None)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.chat_template = {entry["name"]: entry["template"] for entry in named}
    use_chat_template(tokenizer, "loud")
    assert tokenizer.chat_template == SHOUTS
    use_chat_template(tokenizer, "loud", chosen_before=True)  # in a checkpoint it is the only one
    assert tokenizer.chat_template == SHOUTS


def test_what_is_no_template_is_refused(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    broken = written(tmp_path / "broken.jinja", "{% for m in messages %}\n{{ m.role }\n{% endfor %}")
    wrong = {
        str(tmp_path / "absent.jinja"): r"absent\.jinja: there is no such file",
        str(tmp_path): r"is a folder; name the file in it: --chat_template .*chat_template\.jinja",
        broken: r"broken\.jinja is no jinja template: line 2: unexpected '}'",
        written(tmp_path / "text.jinja", "You are kind."): "is no chat template: it does not speak of `messages`",
        written(tmp_path / "a.json", "{"): r"a\.json is not JSON: ",
        written(tmp_path / "b.json", {"eos_token": "x"}): "holds no `chat_template`; name a .jinja file",
        written(tmp_path / "c.json", {"chat_template": [{"name": "a", "template": "b"}]}): r"several templates \(a\)",
        "loud": "loud: there is no such file, and the tokenizer of .* has one template, without a name; give the path",
    }
    for value, message in wrong.items():
        with pytest.raises(ConfigError, match=f"^--chat_template {message}|^--chat_template .*{message}"):
            use_chat_template(tokenizer, value)
    assert tokenizer.chat_template == CHAT_TEMPLATE
    tokenizer.chat_template = {"default": CHAT_TEMPLATE, "tool_use": SHOUTS}
    with pytest.raises(ConfigError, match="loud: the tokenizer has no template of this name; it has default, tool_use"):
        use_chat_template(tokenizer, "loud")
    assert read_chat_template(written(tmp_path / "broken.jinja", SHOUTS)) == SHOUTS  # {% generation %} parses


@pytest.mark.parametrize("kept_in", ["jinja", "config", "several"])
def test_the_saved_tokenizer_has_it_and_no_other(folder: Path, tmp_path: Path, kept_in: str) -> None:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    if kept_in != "jinja":
        files.pop("chat_template.jinja")
        config = json.loads(files["tokenizer_config.json"])
        several = [{"name": "default", "template": CHAT_TEMPLATE}, {"name": "rag", "template": CHAT_TEMPLATE}]
        config["chat_template"] = CHAT_TEMPLATE if kept_in == "config" else several
        files["tokenizer_config.json"] = json.dumps(config).encode()
    for name, data in with_chat_template(files, SHOUTS).items():
        (tmp_path / name).write_bytes(data)
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == SHOUTS
    assert "chat_template" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_continued_run_keeps_its_template(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for name, data in with_chat_template({p.name: p.read_bytes() for p in folder.iterdir()}, SHOUTS).items():
        (tmp_path / "hf" / name).write_bytes(data)
    first, moved = (written(tmp_path / name, SHOUTS) for name in ("a.jinja", "b.jinja"))
    other = written(tmp_path / "c.jinja", chat_templates.PLAIN)

    def check(now: str | None, then: str | None) -> None:
        tokenizer = load_tokenizer(folder)
        use_chat_template(tokenizer, now, chosen_before=True)
        check_chat_template(tmp_path, now, then, tokenizer)

    for now in (first, moved):
        check(now, first)
    check(None, None)
    for now, then in ((other, first), (None, first), ("loud", "quiet"), (other, None)):
        with pytest.raises(ConfigError, match=r"^--chat_template: the run .* another chat template .*; pass the"):
            check(now, then)


def test_an_exported_adapter_has_the_tokenizer_of_its_run(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    for name, data in with_chat_template({p.name: p.read_bytes() for p in folder.iterdir()}, SHOUTS).items():
        (tmp_path / "hf" / name).write_bytes(data)
    for name in ("config.json", "adapter_config.json"):
        written(tmp_path / "hf" / name, {})
    written(tmp_path / "run.json", {"config": {"chat_template": "a.jinja"}})
    beside = _tokenizer_files(tmp_path)
    assert beside["chat_template.jinja"].decode() == SHOUTS
    assert beside.keys() == {path.name for path in folder.iterdir()}
    written(tmp_path / "run.json", {"config": {"chat_template": None}})
    assert _tokenizer_files(tmp_path) == {}


def test_an_adapter_brings_the_template_it_was_trained_with(folder: Path, tmp_path: Path) -> None:
    with_own, other = tmp_path / "a", tmp_path / "b"
    for path in (with_own, other, tmp_path / "c"):
        path.mkdir()
    written(with_own / "chat_template.jinja", SHOUTS)
    assert template_of_adapters([tmp_path / "c", with_own]) == with_own / "chat_template.jinja"
    assert template_of_adapters([tmp_path / "c"]) is None
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert own_template(files) == CHAT_TEMPLATE
    assert own_template(with_chat_template(files, SHOUTS)) == SHOUTS
    assert own_template({"tokenizer_config.json": json.dumps({"chat_template": "x"}).encode()}) == "x"
    assert own_template({}) is None
    written(other / "chat_template.jinja", CHAT_TEMPLATE)
    with pytest.raises(
        ConfigError, match="--adapters: .*a/chat.* and .*b/chat.* are different chat templates; remove one"
    ):
        template_of_adapters([with_own, other])


def test_show_and_infer_take_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    tiny_tokenizer(model)
    tiny_model(model, num_hidden_layers=1, vocab_size=259, bos_token_id=None)
    data = written(tmp_path / "a.jsonl", {"query": "q", "response": "a"})
    template = written(tmp_path / "a.jinja", SHOUTS)
    assert main(["data", "show", "--model", str(model), "--dataset", data, "--chat_template", template]) == 0
    assert "<|im_start|>USER\nq<|im_end|>\n<|im_start|>ASSISTANT\n⟦a<|im_end|>⟧" in capsys.readouterr().out
    asked = ["infer", "--model", str(model), "--val_dataset", data, "--max_new_tokens", "1"]
    own, other = (["--result_path", str(tmp_path / name)] for name in ("own.jsonl", "other.jsonl"))
    louder = written(tmp_path / "b.jinja", SHOUTS.replace("{% for", "Louder!{% for"))
    for flags in (own, [*other, "--chat_template", louder]):
        assert main([*asked, *flags]) == 0
    few, more = (json.loads((tmp_path / name).read_text())["prompt_tokens"] for name in ("own.jsonl", "other.jsonl"))
    assert more == few + len("Louder!")
    for flags, message in (
        ([*own, "--chat_template", louder], "row 1 is not the answer to row 1"),
        ([*own, "--chat_template", "absent.jinja"], "--chat_template absent.jinja: there is no such file"),
        ([*own, "--chat_template", louder, "--use_chat_template", "false"], "which does without: leave one out"),
    ):
        capsys.readouterr()
        assert main([*asked, *flags]) == 2
        assert message in capsys.readouterr().err
