"""Torch-free parts of inference: pieces of text, stop texts, rows, results, and what a directory is."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mswift.errors import CheckpointError, ConfigError, DataError
from mswift.infer.detokenize import Detokenizer, StopFinder
from mswift.infer.model_dir import check_model_dir
from mswift.infer.request import Completion, Request, Sampling
from mswift.infer.results import answer_rows, request_hash
from mswift.infer.rows import Row, read_dataset, stream_seed, to_request
from mswift.tuners.peft_config import check_adapter_dir


class ByteDecoder:
    """Tokens are bytes; id 256 is a control token."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = False) -> str:
        return bytes(token for token in token_ids if token < 256).decode(errors="replace")


@given(text=st.text(max_size=30), specials=st.lists(st.integers(0, 60)), context=st.text("ab é", max_size=9))
def test_pieces_join_to_the_text_and_never_cut_a_character(text: str, specials: list[int], context: str) -> None:
    tokens = list(text.encode())
    for place in specials:
        tokens.insert(min(place, len(tokens)), 256)
    detokenizer = Detokenizer(ByteDecoder(), list(context.encode()))
    pieces = [detokenizer.add(token) for token in tokens]
    assert "".join(pieces) + detokenizer.finish() == text


def test_a_character_of_four_bytes_comes_out_whole_and_a_broken_one_at_the_end() -> None:
    detokenizer = Detokenizer(ByteDecoder())
    assert [detokenizer.add(byte) for byte in "🙂".encode()] == ["", "", "", "🙂"]
    assert detokenizer.add(0xF0) == ""
    assert detokenizer.finish() == "�"
    assert detokenizer.finish() == ""


@given(
    pieces=st.lists(st.text("ab", max_size=3), max_size=12),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
)
def test_stop_texts_are_found_across_pieces_and_nothing_else_is_lost(pieces: list[str], stops: list[str]) -> None:
    finder = StopFinder(stops)
    shown = "".join(finder.add(piece) for piece in pieces)
    text, place = "", None  # the oracle looks at the whole text after every piece
    for piece in pieces:
        text += piece
        found = [text.find(stop) for stop in stops if stop in text]
        if found:
            place = min(found)
            break
    assert finder.found == (place is not None)
    assert shown + finder.finish() == (text if place is None else text[:place])


def test_a_possible_beginning_of_a_stop_text_is_held_back() -> None:
    finder = StopFinder(["END"])
    assert finder.add("xE") == "x"
    assert finder.add("NX") == "ENX"
    assert finder.add("EN") == ""
    assert finder.add("D and more") == ""
    assert finder.found


@pytest.mark.parametrize(
    ("field", "bad", "remedy"),
    [
        ("max_new_tokens", 0, 512),
        ("temperature", -1.0, 0.7),
        ("top_p", 0.0, 0.9),
        ("top_p", 1.5, 0.9),
        ("top_k", -1, 20),
    ],
)
def test_sampling_settings_are_refused_with_a_value_that_works(field: str, bad: float, remedy: float) -> None:
    with pytest.raises(ConfigError, match=rf"--{field} {bad}: .*try {remedy}"):
        Sampling(**{field: bad})  # type: ignore[arg-type]
    Sampling(**{field: remedy})  # type: ignore[arg-type]


def test_an_empty_stop_text_and_a_request_of_two_kinds_are_refused() -> None:
    with pytest.raises(ConfigError, match="--stop"):
        Sampling(stop=("",))
    with pytest.raises(ConfigError, match="exactly one"):
        Request(prompt="a", messages=({"role": "user", "content": "a"},))


# -- rows


def _dataset(path: Path, *rows: dict[str, object]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_last_answer_of_a_row_is_its_label(tmp_path: Path) -> None:
    spec = _dataset(
        tmp_path / "rows.jsonl",
        {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": "2"}]},
        {"query": "2?", "response": "3", "history": [["1?", "2"]]},
        {"query": "no answer?"},
        {"text": "Once upon"},
    )
    first, second, third, fourth = read_dataset([spec], "be brief")
    assert first.label == "2"
    assert [m["content"] for m in first.messages or ()] == ["be brief", "1?"]
    assert second.label == "3"
    assert [m["content"] for m in second.messages or ()] == ["be brief", "1?", "2", "2?"]
    assert third.label is None
    assert (fourth.prompt, fourth.messages) == ("Once upon", None)
    assert [row.prompt for row in read_dataset([spec + "#3"], None)] == [None] * 3


def test_rows_without_a_question_and_empty_files_are_refused(tmp_path: Path) -> None:
    spec = _dataset(tmp_path / "rows.jsonl", {"messages": [{"role": "assistant", "content": "2"}]})
    with pytest.raises(DataError, match=r"rows\.jsonl, row 1: no question"):
        read_dataset([spec], None)
    with pytest.raises(DataError, match="no rows"):
        read_dataset([_dataset(tmp_path / "empty.jsonl")], None)


def test_without_a_chat_template_a_lone_question_is_plain_text_and_more_is_refused() -> None:
    question = {"role": "user", "content": "Once"}
    assert to_request(Row("r", (question,), None, None, None), Sampling(), 0, chat_template=False).prompt == "Once"
    with pytest.raises(DataError, match="need a chat template"):
        to_request(Row("r", (question, question), None, None, None), Sampling(), 0, chat_template=False)


def test_every_answer_has_its_own_random_stream() -> None:
    seeds = {stream_seed(seed, index) for seed in range(20) for index in range(20)}
    assert len(seeds) == 400
    with pytest.raises(ConfigError, match="--seed -1"):
        stream_seed(-1, 0)


# -- results


class Answers:
    """Stands for a model: upper case, and counts what it was asked."""

    def __init__(self, fail_after: int = 1000) -> None:
        self.asked: list[str] = []
        self.fail_after = fail_after

    def __call__(self, requests: object) -> list[Completion]:
        prompts = [str(request.prompt) for request in requests]  # type: ignore[attr-defined]
        self.asked += prompts
        if len(self.asked) > self.fail_after:
            raise KeyboardInterrupt
        return [Completion(prompt.upper(), "stop", 1, 1) for prompt in prompts]


def _answer(
    path: Path, answers: Answers, names: str = "abcde", model: str = "m", **sampling: object
) -> tuple[int, int]:
    rows = [Row(name, None, name, None, None) for name in names]
    requests = [to_request(row, Sampling(**sampling), i, False) for i, row in enumerate(rows)]  # type: ignore[arg-type]
    return answer_rows(rows, requests, answers, path, model, 2, lambda _: None)


def test_a_stopped_file_is_continued_and_ends_as_an_unstopped_one(tmp_path: Path) -> None:
    whole, stopped = tmp_path / "whole.jsonl", tmp_path / "stopped.jsonl"
    assert _answer(whole, Answers()) == (0, 5)
    with pytest.raises(KeyboardInterrupt):
        _answer(stopped, Answers(fail_after=3))
    assert len(stopped.read_text().splitlines()) == 2
    with stopped.open("a") as file:
        file.write('{"prompt": "c", "resp')  # a line cut short by a crash
    rest = Answers()
    assert _answer(stopped, rest) == (2, 3)
    assert rest.asked == ["c", "d", "e"]
    assert stopped.read_bytes() == whole.read_bytes()
    assert _answer(stopped, rest) == (5, 0)
    assert rest.asked == ["c", "d", "e"]


@pytest.mark.parametrize(
    "change", [{"names": "abxde"}, {"names": "abc"}, {"model": "other"}, {"temperature": 1.0}, {"seed": 1}]
)
def test_answers_to_something_else_are_never_continued(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "results.jsonl"
    _answer(path, Answers())
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"--result_path .*another --result_path, or delete"):
        _answer(path, Answers(), **change)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    path.unlink()
    assert _answer(path, Answers(), **change)[0] == 0  # type: ignore[arg-type]


def test_the_hash_covers_question_sampling_and_model() -> None:
    base = Request(prompt="a")
    assert request_hash(base, "m") == request_hash(Request(prompt="a"), "m")
    others = [request_hash(Request(prompt="b"), "m"), request_hash(base, "n")]
    others.append(request_hash(Request(prompt="a", sampling=Sampling(top_k=3)), "m"))
    assert len({request_hash(base, "m"), *others}) == 4


# -- directories


def _touch(directory: Path, *names: str) -> Path:
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return directory


@pytest.mark.parametrize(
    ("names", "remedy"),
    [
        ((".metadata", "hf/config.json"), "mswift convert --model .* --to hf"),
        (("checkpoint-3/COMMIT",), "mswift export --model"),
        (("COMMIT", ".metadata"), "mswift export --model"),
        (("adapter_config.json",), "--adapters"),
        (("readme",), "not a model"),
        (("config.json",), "no tokenizer"),
    ],
)
def test_a_directory_that_is_no_model_is_named_with_its_remedy(
    tmp_path: Path, names: tuple[str, ...], remedy: str
) -> None:
    with pytest.raises(ConfigError, match=rf"(?s)--model {tmp_path}: .*{remedy}"):
        check_model_dir(_touch(tmp_path, *names))


def test_a_directory_that_is_no_adapter_is_named_with_its_remedy(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        check_adapter_dir(tmp_path / "absent")
    with pytest.raises(ConfigError, match="not a PEFT adapter"):
        check_adapter_dir(tmp_path)
    with pytest.raises(ConfigError, match="mswift export --model"):
        check_adapter_dir(_touch(tmp_path / "run", "checkpoint-1/COMMIT"))
    with pytest.raises(CheckpointError, match=r"without adapter_model\.safetensors"):
        check_adapter_dir(_touch(tmp_path / "half", "adapter_config.json"))
    with pytest.raises(CheckpointError, match="not JSON"):
        check_adapter_dir(_touch(tmp_path / "half", "adapter_model.safetensors"))
