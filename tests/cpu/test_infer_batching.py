"""Answers that come and go in one batch, log-probabilities and adapters, against transformers and PEFT."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer

from mswift.errors import ConfigError, DataError
from mswift.infer.batch_cache import join, keep, new_cache, trim
from mswift.infer.loading import load_model, load_tokenizer
from mswift.infer.request import BASE_MODEL, Request, Sampling, Score
from mswift.infer.roomy_layer import ROOM, RoomyLayer
from mswift.infer.transformers_engine import TransformersEngine
from tests.support.tiny import tiny_model, tiny_tokenizer


def _engine(path: Path, adapters: dict[str, Path] | None = None, max_rows: int = 64) -> TransformersEngine:
    return TransformersEngine(load_model(path, None, torch.device("cpu")), load_tokenizer(path), adapters, max_rows)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer(path)
    tiny_model(path, "qwen3", vocab_size=259)
    return _engine(path)


def _ask(text: str, **sampling: Any) -> Request:
    return Request(messages=({"role": "user", "content": text},), sampling=Sampling(**sampling))


def _generate(model: Any, prompt: list[int], count: int, **options: Any) -> list[int]:
    """New tokens of transformers' own greedy generate."""
    ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, use_cache=True,
        pad_token_id=0, **options,
    )  # fmt: skip
    new: list[int] = output[0, len(prompt) :].tolist()
    return new


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "kv_lora_rank": 16, "q_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4,
        "moe_intermediate_size": 32, "first_k_dense_replace": 1, "head_dim": 8,
    },
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
    "qwen3_next": {
        "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
        "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
    },
}  # fmt: skip
"""A layer of each kind that a cache can have: full, sliding, latent, recurrent, gated delta with full."""


@pytest.mark.parametrize("kind", FAMILIES)
def test_answers_that_come_and_go_are_those_of_transformers_generate(tmp_path: Path, kind: str) -> None:
    """Prompts of different length join a running batch and leave it, in every kind of cache."""
    tiny_tokenizer(tmp_path)
    tiny_model(tmp_path, kind, vocab_size=259, **FAMILIES[kind])
    engine = _engine(tmp_path, max_rows=3)
    requests = [
        Request(prompt=text, sampling=Sampling(max_new_tokens=count))
        for text, count in [("abc", 9), ("A prompt of more tokens", 3), ("xy", 24), ("What now?", 12), ("Q", 5)]
    ]
    answers = engine.generate(requests)
    oracle = load_model(tmp_path, None, torch.device("cpu"))
    for request, answer in zip(requests, answers, strict=True):
        expected = _generate(oracle, engine.prompt_tokens(request), request.sampling.max_new_tokens)
        assert list(answer.token_ids) == expected, request.prompt


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mamba2"])
def test_answers_that_are_dropped_between_two_tokens_leave_the_others_theirs(tmp_path: Path, kind: str) -> None:
    tiny_tokenizer(tmp_path)
    tiny_model(tmp_path, kind, vocab_size=259, **FAMILIES[kind])
    engine = _engine(tmp_path)
    requests = [Request(prompt=text, sampling=Sampling(max_new_tokens=9)) for text in ("abc", "A prompt", "xy", "What")]
    alone = [engine.generate([request])[0].token_ids for request in requests]
    answers = [answer for request in requests for answer in engine.submit(request)]
    for _ in range(len(requests) + 2):
        engine.step()
    engine.drop(answers[:2])  # by the thread that a client's hanging up is seen in: outside of any step
    assert engine.load == (2, 0)
    while engine.step():
        pass
    assert [tuple(answer.tokens[-len(own) :]) for answer, own in zip(answers[2:], alone[2:], strict=True)] == alone[2:]


def test_a_cache_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = tiny_model(tmp_path, "rwkv", attention_hidden_size=64, context_length=64)
    with pytest.raises(ConfigError, match="type rwkv: transformers keeps its state in a form of its own"):
        TransformersEngine(model, tiny_tokenizer(tmp_path))


def test_a_repetition_penalty_is_transformers_own(engine: TransformersEngine) -> None:
    prompt = engine.prompt_tokens(_ask("Hi"))
    answer, plain = engine.generate([_ask("Hi", max_new_tokens=30, repetition_penalty=p) for p in (1.3, 1.0)])
    assert list(answer.token_ids) == _generate(engine.model, prompt, 30, repetition_penalty=1.3)
    assert answer.token_ids != plain.token_ids


def test_logprobs_and_scores_are_those_of_a_plain_forward_pass(engine: TransformersEngine) -> None:
    asked = _ask("Hi", max_new_tokens=12, temperature=1.0, top_k=5, logprobs=3)
    answer, silent = engine.generate([asked, _ask("Hello there", max_new_tokens=12)])
    prompt = engine.prompt_tokens(asked)
    tokens = [*prompt, *answer.token_ids]
    with torch.no_grad():
        oracle = engine.model(torch.tensor([tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
    assert silent.logprobs is None
    assert answer.logprobs is not None
    assert [entry.token for entry in answer.logprobs] == list(answer.token_ids)
    for place, entry in enumerate(answer.logprobs):
        values, ids = oracle[place].topk(3)
        assert entry.logprob == pytest.approx(float(oracle[place, entry.token]), abs=1e-5)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-5)
    pairs = [(prompt, list(answer.token_ids)), (prompt, list(silent.token_ids)), (tokens[:5], tokens[5:9])]
    scores = engine.score(pairs)
    _same(scores[0], Score(answer.logprobs))
    for pair, score in zip(pairs, scores, strict=True):
        _same(engine.score([pair])[0], score)
    greedy = engine.generate([_ask("Hi", max_new_tokens=12)])[0]
    assert engine.score([(prompt, greedy.token_ids)])[0].is_greedy
    assert not scores[0].is_greedy
    with pytest.raises(DataError, match="pair 2 to score: an empty continuation"):
        engine.score([pairs[0], (prompt, [])])


def _same(score: Score, other: Score) -> None:
    assert [entry.token for entry in score.tokens] == [entry.token for entry in other.tokens]
    assert [entry.logprob for entry in score.tokens] == pytest.approx([e.logprob for e in other.tokens], abs=1e-5)


def test_n_answers_have_streams_of_their_own_and_the_first_is_that_of_n_1(engine: TransformersEngine) -> None:
    asked = _ask("Hi", max_new_tokens=15, temperature=1.0, seed=5, n=3)
    answers = engine.generate([_ask("Hello", max_new_tokens=4), asked])[1:]
    assert [answer.index for answer in answers] == [0, 1, 2]
    assert len({answer.text for answer in answers}) == 3
    assert answers[0] == engine.generate([_ask("Hi", max_new_tokens=15, temperature=1.0, seed=5)])[0]
    pieces = list(engine.stream(asked))
    for answer in answers:
        assert "".join(piece.text for piece in pieces if piece.index == answer.index) == answer.text


def test_adapters_are_chosen_by_request_and_are_those_of_peft(tmp_path: Path) -> None:
    base = tmp_path / "base"
    tiny_tokenizer(base)
    model = tiny_model(base, vocab_size=259)
    kinds = {"one": {"target_modules": "all-linear"}, "two": {"target_modules": ["q_proj"], "use_dora": True}}
    for seed, (name, options) in enumerate(kinds.items()):
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, **options))  # type: ignore[arg-type]
        torch.manual_seed(seed)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.2)
        peft.save_pretrained(tmp_path / name)
    engine = _engine(base, {name: tmp_path / name for name in kinds})
    assert engine.adapters == ("one", "two")
    asked = [
        Request(prompt=text, adapter=name, sampling=Sampling(max_new_tokens=10, ignore_eos=True))
        for text in ("Hello", "What number is it?")
        for name in ("one", BASE_MODEL, "two")
    ]
    answers = engine.generate(asked)
    for request, answer in zip(asked, answers, strict=True):
        oracle = AutoModelForCausalLM.from_pretrained(base)
        if request.adapter:
            oracle = PeftModel.from_pretrained(oracle, str(tmp_path / request.adapter))
        assert list(answer.token_ids) == _generate(oracle, engine.prompt_tokens(request), 10), request
    assert len({answer.token_ids for answer in answers}) == 6  # or the adapters would do nothing
    scores = {name: engine.score([([5, 6], [7, 8])], name)[0].logprob for name in ("one", "two", BASE_MODEL)}
    with torch.no_grad():
        plain = model(torch.tensor([[5, 6, 7]])).logits[0].log_softmax(-1)
    assert scores[BASE_MODEL] == pytest.approx(float(plain[1, 7] + plain[2, 8]), abs=1e-4)
    assert len(set(scores.values())) == 3
    with pytest.raises(ConfigError, match="adapters one, two: name one of them"):
        engine.generate([Request(prompt="a")])
    with pytest.raises(ConfigError, match="no adapter 'three'; it has one, two"):
        engine.generate([Request(prompt="a", adapter="three")])


def test_a_layer_with_room_holds_what_one_that_is_copied_holds() -> None:
    """Tokens appended one by one and many at once, across the end of the room, between picks, cuts and new tensors."""
    generator = torch.Generator().manual_seed(2)
    roomy, plain = RoomyLayer(), DynamicLayer()

    def append(rows: int, count: int) -> None:
        new = torch.randn(2, rows, 3, count, 8, generator=generator)
        for one, other in zip(roomy.update(*new), plain.update(*new), strict=True):
            assert torch.equal(one, other)
        assert roomy.get_seq_length() == plain.get_seq_length()

    append(4, 5)
    for _ in range(ROOM + 3):
        append(4, 1)
    space = roomy._spaces
    append(4, 1)
    assert roomy._spaces is space  # written in place
    for layer in (roomy, plain):
        layer.reorder_cache(torch.tensor([3, 0]))
    append(2, 1)
    for layer in (roomy, plain):
        layer.keys, layer.values = layer.keys[..., 30:, :], layer.values[..., 30:, :]
    append(2, ROOM + 1)
    append(2, 1)


def test_rows_that_come_and_go_are_those_of_a_layer_that_is_copied() -> None:
    """Shorter and longer ones, more than there is room for, in a cache that was cut and one that was not."""
    generator = torch.Generator().manual_seed(3)
    chosen = random.Random(4)
    config = AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=8)
    model = AutoModelForCausalLM.from_config(config)
    cache, plain = new_cache(model), DynamicLayer()
    layer = cache.layers[0]
    assert isinstance(layer, RoomyLayer)
    spaces = set()

    def states(rows: int, count: int) -> Any:
        return torch.randn(2, rows, 2, count, 8, generator=generator)

    first = states(1, 6)
    layer.update(*first)
    plain.update(*first)
    for number in range(120):
        length = layer.get_seq_length()
        if plain.keys.shape[0] < 3 or (number % 4 and plain.keys.shape[0] < 20):
            other_length = chosen.randint(1, length + (40 if number % 10 == 0 else 0))
            other, added = new_cache(model), states(chosen.randint(1, 3), other_length)
            other.layers[0].update(*added)
            join(cache, other, length, other_length)
            longest = max(length, other_length)
            plain.keys, plain.values = (
                torch.cat([F.pad(part, (0, 0, longest - part.shape[-2], 0)) for part in pair])
                for pair in ((plain.keys, added[0]), (plain.values, added[1]))
            )
        else:
            rows = sorted(chosen.sample(range(plain.keys.shape[0]), chosen.randint(2, plain.keys.shape[0] - 1)))
            order = keep(cache, rows, torch.device("cpu"))
            assert sorted(order) == rows
            plain.reorder_cache(torch.tensor(order))
            if number % 3 == 0 and length > 5:
                trim(cache, length - 4)
                plain.keys, plain.values = plain.keys[..., 4:, :], plain.values[..., 4:, :]
        new = states(plain.keys.shape[0], 1)
        for one, other_one in zip(layer.update(*new), plain.update(*new), strict=True):
            assert torch.equal(one, other_one), number
        spaces.add(id(layer._spaces))
    assert len(spaces) < 40  # most came and went in place
