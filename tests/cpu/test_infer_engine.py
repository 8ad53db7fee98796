"""The transformers engine against transformers' own generate, and the published text of stories260K."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from mswift.agent.calls import Call, Reply
from mswift.agent.formats import FORMATS
from mswift.errors import DataError
from mswift.infer.answer import Answer
from mswift.infer.detokenize import Detokenizer
from mswift.infer.loading import load_model, load_tokenizer
from mswift.infer.request import Completion, Request, Sampling
from mswift.infer.rows import Row, to_request
from mswift.infer.sampler import RowSampler
from mswift.infer.transformers_engine import TransformersEngine
from tests.support.shared import shared_file
from tests.support.tiny import tiny_model, tiny_tokenizer

QUESTIONS = ("Hi", "What number comes after 41?", "Say a much longer thing, with more words than the others have.")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer(path)
    tiny_model(path, "qwen3", vocab_size=259)
    return path


def _engine(path: Path) -> TransformersEngine:
    return TransformersEngine(load_model(path, None, torch.device("cpu")), load_tokenizer(path))


@pytest.fixture(scope="module")
def engine(model_dir: Path) -> TransformersEngine:
    return _engine(model_dir)


def _ask(text: str, **sampling: Any) -> Request:
    return Request(messages=({"role": "user", "content": text},), sampling=Sampling(**sampling))


def _oracle(path: Path, question: str, max_new_tokens: int) -> str:
    """Greedy answer of a plain transformers program."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    end = tokenizer.eos_token_id
    output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=end, pad_token_id=0)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.parametrize("name", ["stories260K-hf", "stories260K-hd32-hf"])
def test_published_greedy_text_streamed_and_batched(name: str) -> None:
    golden = json.loads(shared_file("data/weights/stories260K-golden.json").read_text(encoding="utf-8"))["greedy"]
    engine = _engine(shared_file(f"data/weights/{name}"))
    request = Request(prompt="", sampling=Sampling(max_new_tokens=golden["max_new_tokens"]))
    assert engine.prompt_tokens(request) == golden["prompt_ids"]
    pieces = list(engine.stream(request))
    text = "".join(piece.text for piece in pieces)
    assert len(text) == 565
    assert text == golden["text"]
    assert pieces[-1].completion is not None
    ids = pieces[-1].completion.token_ids
    assert engine.tokenizer.decode(ids) == text
    assert pieces[-1].completion == Completion(text, "length", 1, 256, ids)
    assert engine.generate([Request(prompt="Once upon"), request])[1] == pieces[-1].completion


def test_equals_transformers_generate(model_dir: Path, engine: TransformersEngine) -> None:
    for question in QUESTIONS:
        assert engine.generate([_ask(question, max_new_tokens=40)])[0].text == _oracle(model_dir, question, 40)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral", "qwen2"])
def test_batch_equals_one_by_one(tmp_path: Path, kind: str, temperature: float) -> None:
    tiny_tokenizer(tmp_path)
    tiny_model(tmp_path, kind, vocab_size=259)
    engine = _engine(tmp_path)
    requests = [
        _ask(question, max_new_tokens=20 + 5 * i, temperature=temperature, top_p=0.95, seed=i)
        for i, question in enumerate(QUESTIONS)
    ]
    assert engine.generate(requests) == [engine.generate([request])[0] for request in requests]


def test_without_the_attention_mask_a_batch_would_differ(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partner of the test above: the padding is really there, and the mask is what hides it."""
    requests = [_ask(question, max_new_tokens=20) for question in QUESTIONS]
    right = engine.generate(requests)
    forward = engine.model.forward

    def unmasked(**kwargs: Any) -> Any:
        return forward(**{**kwargs, "attention_mask": torch.ones_like(kwargs["attention_mask"])})

    monkeypatch.setattr(engine.model, "forward", unmasked)
    assert engine.generate(requests) != right


def test_the_first_piece_is_shown_before_the_second_token_is_computed_and_closing_stops_the_model() -> None:
    engine = _engine(shared_file("data/weights/stories260K-hf"))
    steps = [0]
    engine.model.register_forward_pre_hook(lambda *_: steps.__setitem__(0, steps[0] + 1))
    with closing(engine.stream(Request(prompt="", sampling=Sampling(max_new_tokens=200)))) as pieces:
        assert next(pieces).text == "Once"
        assert steps == [1]
        assert next(pieces).text == " upon"
        assert steps == [2]
    assert steps == [2]
    assert engine.generate([Request(prompt="", sampling=Sampling(max_new_tokens=2))])[0].text == "Once upon"


def test_an_error_in_the_model_reaches_the_reader(engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(engine.stream(_ask("Hi")))
    assert engine.generate([_ask("Hi", max_new_tokens=3)])[0].completion_tokens == 3  # it goes on


def test_stop_texts_end_streams_and_batches_alike(engine: TransformersEngine) -> None:
    whole = engine.generate([_ask("Hi", max_new_tokens=60)])[0].text
    stop = whole[20:23]
    requests = [_ask("Hi", max_new_tokens=60, stop=(stop,)), _ask("Hi", max_new_tokens=60)]
    stopped, unstopped = engine.generate(requests)
    assert stopped.text == whole[: whole.index(stop)]
    assert stopped.finish_reason == "stop"
    assert stopped.completion_tokens < 60
    assert unstopped.text == whole
    pieces = list(engine.stream(requests[0]))
    assert "".join(piece.text for piece in pieces) == stopped.text
    assert pieces[-1].completion == stopped


def test_an_end_token_ends_the_answer_and_is_not_shown(model_dir: Path) -> None:
    engine = _engine(model_dir)
    prompt = engine.prompt_tokens(_ask("Hi"))
    output = engine.model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
    tokens = output[0, len(prompt) :].tolist()
    engine.model.generation_config.eos_token_id = [tokens[5]]
    place = tokens.index(tokens[5])
    ended = TransformersEngine(engine.model, engine.tokenizer).generate([_ask("Hi", max_new_tokens=12)])[0]
    assert ended == Completion(
        engine.tokenizer.decode(tokens[:place]), "stop", len(prompt), place + 1, (*tokens[: place + 1],)
    )


def test_a_prompt_longer_than_the_model_is_refused_and_an_answer_is_cut_at_its_limit(
    engine: TransformersEngine,
) -> None:
    limit = engine.model.config.max_position_embeddings
    with pytest.raises(DataError, match=rf"max_position_embeddings is {limit}; shorten it to {limit - 1}"):
        engine.generate([Request(prompt="x" * limit)])
    answer = engine.generate([Request(prompt="x" * (limit - 1))])[0]
    assert (answer.finish_reason, answer.completion_tokens) == ("length", 1)
    shorter = TransformersEngine(engine.model, engine.tokenizer, max_length=limit - 3)
    with pytest.raises(DataError, match=rf"room for an answer: --max_model_len is {limit - 3}; .* to {limit - 4} or"):
        shorter.generate([Request(prompt="x" * (limit - 3))])


def test_an_empty_prompt_without_a_start_token_is_refused(engine: TransformersEngine) -> None:
    with pytest.raises(DataError, match="empty prompt"):
        engine.generate([Request(prompt="")])


# -- sampling


def test_draws_follow_the_probabilities() -> None:
    """Chi-squared of 4,000 draws against softmax(scores / temperature) over 6 tokens: 99.9 % of the time below 20.5."""
    scores = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -0.5])
    sampler = RowSampler(Sampling(temperature=0.7), seed=3)
    counts = torch.zeros(6)
    for _ in range(4000):
        counts[sampler.choose([], scores.clone())] += 1
    expected = 4000 * (scores / 0.7).softmax(-1)
    assert ((counts - expected) ** 2 / expected).sum() < 20.5
    greedy = 4000 * (scores / 0.35).softmax(-1)  # the partner: another temperature must not pass
    assert ((counts - greedy) ** 2 / greedy).sum() > 20.5


@pytest.mark.parametrize(
    ("fields", "kept"),
    [({"top_k": 2}, {0, 1}), ({"top_p": 0.5}, {0}), ({"min_p": 0.2}, {0, 1}), ({"min_p": 0.1}, {0, 1, 2})],
)
def test_top_k_top_p_and_min_p_keep_the_likeliest_tokens(fields: dict[str, Any], kept: set[int]) -> None:
    scores = torch.tensor([3.0, 2.0, 1.0, 0.0])  # probabilities 0.64, 0.24, 0.09, 0.03
    sampler = RowSampler(Sampling(temperature=1.0, **fields), seed=1)
    assert {int(sampler.choose([], scores.clone())) for _ in range(80)} == kept


@pytest.mark.parametrize("temperature", [1e-30, 1e-40, 1e-300])
def test_the_coldest_draw_is_the_likeliest_token(temperature: float) -> None:
    sampler = RowSampler(Sampling(temperature=temperature), 0)
    assert sampler.choose([], torch.tensor([-3.0, 11.0, 40.0, 39.9, -60.0])).tolist() == [2]


def test_a_seed_repeats_its_answer_and_another_gives_another(engine: TransformersEngine) -> None:
    state = torch.random.get_rng_state()
    answers = engine.generate([_ask("Hi", max_new_tokens=20, temperature=1.0, seed=seed) for seed in (1, 1, 2)])
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("name", ["tokenizers/qwen2-8k", "weights/stories260K-hf"])
def test_pieces_of_real_tokenizers_join_to_the_decoded_text(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_file(f"data/{name}"))
    text = "It’s 3 °C — naïve 日本語, 🙂🙃  two spaces\n\tand a tab. Once upon a time"
    ids = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    assert "".join([*map(detokenizer.add, ids), detokenizer.finish()]) == tokenizer.decode(
        ids, skip_special_tokens=True
    )


@pytest.mark.parametrize("name", ["glm4", "deepseek_v3_1", "mistral", "hermes"])
def test_calls_that_are_told_by_control_tokens_are_read(tmp_path: Path, name: str) -> None:
    """Tokenizers of these models have [TOOL_CALLS] and its kin as control tokens, which text leaves out."""
    agent, tokenizer = FORMATS[name], tiny_tokenizer(tmp_path)
    tokenizer.add_special_tokens({"additional_special_tokens": [*agent.tokens, "<|other|>"]}, False)
    reply = Reply("I look.", (Call("weather", {"city": "Oslo"}), Call("time", {})))
    said = agent.write(reply, "")
    row = Row("row 1", ({"role": "user", "content": "Weather?"},), None, None, None, agent)
    request = to_request(row, Sampling(), 0, chat_template=True)
    answer = Answer(request, [0], 500, [tokenizer.eos_token_id], tokenizer)
    for token in tokenizer(f"<|other|>{said}<|im_end|>")["input_ids"]:
        answer.add(token)
    assert answer.completion().text == said
    assert agent.read(answer.completion().text) == reply
