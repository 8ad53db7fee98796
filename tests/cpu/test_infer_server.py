"""The server by the official openai client, and by clients that mean ill."""

import asyncio
import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import openai
import pytest
import torch
from transformers import AutoTokenizer

from mswift.agent.formats import FORMATS
from mswift.infer.loading import load_model, load_tokenizer
from mswift.infer.request import BASE_MODEL, Completion, Request, Sampling
from mswift.infer.server.replies import ChatReply
from mswift.infer.server.schema import ChatRequest
from mswift.infer.server.token_texts import TokenTexts
from mswift.infer.server.translate import Asked, Served, chat
from mswift.infer.server.worker import Worker
from mswift.infer.transformers_engine import TransformersEngine
from tests.support.adapters import random_adapter
from tests.support.serving import fixed_answer_model, serving
from tests.support.shared import shared_file
from tests.support.tiny import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> TransformersEngine:
    path = tmp_path_factory.mktemp("model")
    tiny_tokenizer(path)
    tiny_model(path, "qwen3", vocab_size=259, max_position_embeddings=1024)
    adapter = tmp_path_factory.mktemp("adapter")
    random_adapter(adapter, path, ["all-linear"])
    return TransformersEngine(load_model(path, None, CPU), load_tokenizer(path), {"mine": adapter}, max_rows=8)


@pytest.fixture(scope="module")
def url(engine: TransformersEngine) -> Iterator[str]:
    with serving(engine) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as found:
        yield found


def _ask(text: str, **sampling: Any) -> Request:
    adapter = sampling.pop("adapter", BASE_MODEL)
    return Request(messages=({"role": "user", "content": text},), adapter=adapter, sampling=Sampling(**sampling))


def _user(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


# -- what clients get


def test_models_are_the_model_and_its_adapters(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "mine"]
    assert client.models.retrieve("mine").id == "mine"
    with pytest.raises(openai.NotFoundError, match="no model 'gpt' is served here; there is tiny, mine"):
        client.models.retrieve("gpt")


@pytest.mark.parametrize("model", ["tiny", "mine"])
def test_chat_is_what_the_engine_answers_whole_and_streamed(
    client: openai.OpenAI, engine: TransformersEngine, model: str
) -> None:
    adapter = BASE_MODEL if model == "tiny" else model
    options: dict[str, Any] = {"max_tokens": 20, "temperature": 1.0, "seed": 3, "n": 2, "top_p": 0.9}
    expected = engine.generate(
        [_ask("Hi", adapter=adapter, max_new_tokens=20, temperature=1.0, seed=3, n=2, top_p=0.9)]
    )
    answer = client.chat.completions.create(model=model, messages=_user("Hi"), **options)
    assert [choice.message.content for choice in answer.choices] == [one.text for one in expected]
    assert [choice.finish_reason for choice in answer.choices] == [one.finish_reason for one in expected]
    assert answer.usage is not None
    new = sum(one.completion_tokens for one in expected)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (expected[0].prompt_tokens, new)
    texts, reasons, usage = ["", ""], [None, None], None
    with client.chat.completions.create(
        model=model, messages=_user("Hi"), stream=True, stream_options={"include_usage": True}, **options
    ) as stream:
        for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [one.text for one in expected]
    assert reasons == [one.finish_reason for one in expected]
    assert usage == answer.usage


def test_sampled_answers_without_a_seed_differ(client: openai.OpenAI) -> None:
    ask = {"model": "tiny", "messages": _user("Hi"), "max_tokens": 20, "temperature": 1.0}
    first, second = (client.chat.completions.create(**ask) for _ in range(2))  # type: ignore[call-overload]
    assert first.choices[0].message.content != second.choices[0].message.content


def test_answers_to_several_prompts_have_streams_of_their_own(client: openai.OpenAI) -> None:
    """The prompts are the same, so that answers differ by their streams alone; the first are those of it alone."""
    ask: dict[str, Any] = {"model": "tiny", "max_tokens": 20, "temperature": 1.0, "seed": 3, "n": 3}
    texts = [choice.text for choice in client.completions.create(prompt=["Hi"] * 3, **ask).choices]
    assert len(set(texts)) == 9
    assert [choice.text for choice in client.completions.create(prompt="Hi", **ask).choices] == texts[:3]


def test_completions_that_do_not_say_how_long_have_16_tokens_or_what_the_server_gives(
    engine: TransformersEngine, client: openai.OpenAI
) -> None:
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "extra_body": {"ignore_eos": True}}
    usage = client.completions.create(**ask).usage
    assert usage is not None
    assert usage.completion_tokens == 16
    with serving(engine, max_new_tokens=5) as url, openai.OpenAI(base_url=url, api_key="-", max_retries=0) as short:
        usage = short.completions.create(**ask).usage
        assert usage is not None
        assert usage.completion_tokens == 5


def test_logprobs_of_chat_are_the_engines(client: openai.OpenAI, engine: TransformersEngine) -> None:
    expected = engine.generate([_ask("Hi", max_new_tokens=6, logprobs=3)])[0].logprobs
    assert expected is not None
    ask: dict[str, Any] = {"model": "tiny", "messages": _user("Hi"), "max_tokens": 6, "temperature": 0}
    ask |= {"logprobs": True, "top_logprobs": 3}
    whole = client.chat.completions.create(**ask).choices[0].logprobs
    chunks = [chunk.choices[0].logprobs for chunk in client.chat.completions.create(stream=True, **ask)]
    streamed = [entry for chunk in chunks if chunk and chunk.content for entry in chunk.content]
    assert whole is not None
    assert whole.content == streamed
    for told, entry in zip(streamed, expected, strict=True):
        assert told.logprob == pytest.approx(entry.logprob, abs=1e-5)
        assert [top.logprob for top in told.top_logprobs] == pytest.approx([lp for _, lp in entry.top], abs=1e-5)
        assert told.bytes is not None
        if not told.token.startswith("bytes:"):
            assert bytes(told.bytes).decode() == told.token


def test_completions_of_the_published_text_and_prompts_echoed_with_logprobs() -> None:
    """stories260K: the text that its author printed; the loss that transformers gives, as lm-eval asks for it."""
    golden = json.loads(shared_file("data/weights/stories260K-golden.json").read_text(encoding="utf-8"))
    path = shared_file("data/weights/stories260K-hd32-hf")
    engine = TransformersEngine(load_model(path, None, CPU), load_tokenizer(path))
    with serving(engine, "stories") as url, openai.OpenAI(base_url=url, api_key="-") as client:
        ask: dict[str, Any] = {"model": "stories", "max_tokens": 256, "temperature": 0}
        assert client.completions.create(prompt="", **ask).choices[0].text == golden["greedy"]["text"]
        streamed = client.completions.create(prompt="", stream=True, **ask)
        assert "".join(chunk.choices[0].text for chunk in streamed) == golden["greedy"]["text"]
        stop = client.completions.create(prompt=["Once upon", ""], stop="little", n=1, **ask)
        assert [choice.text for choice in stop.choices] == [" a time, there was a ", "Once upon a time, there was a "]
        forced = golden["teacher_forced"]
        echo = client.completions.create(
            model="stories", prompt=forced["text"], echo=True, logprobs=1, max_tokens=0, temperature=0
        ).choices[0]
        assert echo.text == forced["text"]
        assert echo.logprobs is not None
        told = echo.logprobs.token_logprobs or []
        assert told[0] is None
        assert len(told) == forced["num_tokens"]
        assert -sum(value for value in told[1:] if value) / (len(told) - 1) == pytest.approx(
            forced["mean_loss"], abs=2e-5
        )
        ids = engine.tokenizer(forced["text"])["input_ids"]
        by_ids = client.completions.create(
            model="stories", prompt=ids, echo=True, logprobs=1, max_tokens=1, temperature=0
        )
        assert by_ids.choices[0].logprobs is not None
        assert (by_ids.choices[0].logprobs.token_logprobs or [])[:-1] == told
        top = by_ids.choices[0].logprobs.top_logprobs
        assert top is not None
        assert len(top) == len(ids) + 1
        assert max(top[-1].values()) == by_ids.choices[0].logprobs.token_logprobs[-1]  # greedy


@pytest.mark.parametrize("name", ["tokenizers/qwen2-8k", "weights/stories260K-hf"])
def test_tokens_are_told_by_bytes_that_join_to_the_text(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared_file(f"data/{name}"))
    text = "It’s 3 °C — naïve 日本語, 🙂🙃  two spaces\n\tand"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    texts = TokenTexts(tokenizer)
    assert b"".join(map(texts.bytes_of, ids)).decode().lstrip(" ") == tokenizer.decode(ids).lstrip(" ")
    distinct = [texts.text_of(token) for token in range(len(tokenizer))]
    assert len(set(distinct)) >= 0.99 * len(tokenizer)
    assert any(entry.startswith("bytes:\\x") for entry in distinct)


# -- tools

TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "description": "Now", "parameters": {"type": "object"}}}
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'


def test_a_call_that_the_model_writes_is_read_and_its_result_is_shown_to_it(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(tmp_path)
    agent = FORMATS["hermes"]
    system = agent.system(TOOLS, None)
    prompt = tokenizer.apply_chat_template(
        [{"role": "system", "content": system}, *_user("Weather?")], tokenize=False, add_generation_prompt=True
    )
    fixed_answer_model(tmp_path, tokenizer, f"{prompt}{CALL}<|im_end|>", max_position_embeddings=2048)
    engine = TransformersEngine(load_model(tmp_path, None, CPU), load_tokenizer(tmp_path))
    ask: dict[str, Any] = {"model": "tiny", "messages": _user("Weather?"), "tools": TOOLS, "max_tokens": 120}
    with serving(engine, agent="hermes") as url, openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
        choice = client.chat.completions.create(**ask).choices[0]
        assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
        (call,) = choice.message.tool_calls or ()
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Oslo"}
        with client.chat.completions.stream(**ask) as stream:
            final = stream.get_final_completion().choices[0]
        (streamed,) = final.message.tool_calls or ()
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
        ask["messages"] += [choice.message.model_dump(exclude_none=True)]
        ask["messages"] += [{"role": "tool", "tool_call_id": call.id, "content": "rain"}]
        again = client.chat.completions.create(**{**ask, "max_tokens": 2})
        whole = engine.prompt_tokens(Request(messages=tuple(_shown(agent, system))))
        assert again.usage is not None
        assert again.usage.prompt_tokens == len(whole)
        plain = client.chat.completions.create(
            **{**ask, "tool_choice": "none", "messages": _user("Hi"), "max_tokens": 2}
        )
        assert plain.choices[0].finish_reason == "length"


def _shown(agent: Any, system: str | None) -> list[Any]:
    return [
        {"role": "system", "content": system}, *_user("Weather?"),
        {"role": "assistant", "content": CALL}, {"role": "user", "content": agent.results(["rain"])[0]},
    ]  # fmt: skip


def test_results_are_shown_in_the_order_of_their_calls(engine: TransformersEngine) -> None:
    call: dict[str, Any] = {"type": "function", "function": {"name": "weather", "arguments": "{}"}}
    results = [{"role": "tool", "tool_call_id": name, "content": name} for name in ("first", "second")]
    asked = [*_user("Weather?"), {"role": "assistant", "tool_calls": [{**call, "id": n} for n in ("first", "second")]}]
    ways = [
        ChatRequest.model_validate({"model": "tiny", "messages": [*asked, *some]}) for some in (results, results[::-1])
    ]
    served = Served("tiny", (), 9, 9, Sampling(), FORMATS["hermes"])
    one, other = (chat(way, served).request for way in ways)
    assert one.messages == other.messages


def test_what_looks_like_a_call_and_is_none_stays_text_with_the_reason(engine: TransformersEngine) -> None:
    text = "<tool_call>\n{broken\n</tool_call>"
    asked = Asked(_ask("Hi"), FORMATS["hermes"])
    choice = ChatReply("tiny", asked, TokenTexts(engine.tokenizer)).whole([Completion(text, "stop", 1, 1)]).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (text, "stop", None)
    assert choice.message.tool_call_problem is not None


# -- keys, limits, leaving


def _post(url: str, path: str, body: bytes, **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}{path}", body, {"content-type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def _raw(url: str, path: str, body: Any) -> str:
    request = urllib.request.Request(f"{url}{path}", json.dumps(body).encode(), {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
        return text


def _get(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_only_a_known_key_opens_and_health_needs_none(engine: TransformersEngine) -> None:
    with serving(engine, keys=("first", "sécond")) as url:
        for key in ("none", "firs", "firstt", "FIRST", ""):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=url, api_key=key or "-", max_retries=0).models.list()
        assert openai.OpenAI(base_url=url, api_key="first").models.list().data[0].id == "tiny"
        assert _get(url.removesuffix("/v1") + "/health")[0] == 200
        for path in ("/metrics", "/openapi.json", "/v1/models", "/nowhere"):
            assert _get(url.removesuffix("/v1") + path)[0] == 401
        assert "sécond" not in _get(url.removesuffix("/v1") + "/health")[1]


def _until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _load(url: str) -> tuple[int, int]:
    told = json.loads(_get(url.removesuffix("/v1") + "/health")[1])
    return told["running"], told["waiting"]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_place(engine: TransformersEngine, url: str, stream: bool) -> None:
    """The answer would have 900 tokens; it ends when its reader hangs up."""
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    body = {"model": "tiny", "prompt": "Hi", "max_tokens": 500, "ignore_eos": True, "stream": stream, "n": 8}
    data = json.dumps(body).encode()
    before = _metric(url, "mswift_clients_left_total")
    with socket.create_connection((host, int(port))) as line:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
        line.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + data)
        _until(lambda: _load(url)[0] == 8)
        if stream:
            assert line.recv(100)
    _until(lambda: _load(url) == (0, 0))
    assert _metric(url, "mswift_clients_left_total") == before + 1


def test_a_reader_that_takes_nothing_gives_its_place_back(engine: TransformersEngine) -> None:
    """Its socket is full long before the answers are told: it is waited for as long as an answer may take."""
    ask: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "n": 8}
    ask |= {"stream": True, "logprobs": 20}
    data = json.dumps(ask).encode()
    with serving(engine, max_answers=8, request_seconds=8) as url, socket.socket() as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        line.connect(("127.0.0.1", int(url.removesuffix("/v1").rsplit(":", 1)[1])))
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
        line.sendall(head.encode() + b"content-type: application/json\r\n\r\n" + data)
        short = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 1}).encode()
        _until(lambda: _load(url)[0] == 8)
        assert _post(url, "/completions", short)[0] == 503
        _until(lambda: _post(url, "/completions", short)[0] == 200, 30)


def test_a_client_that_leaves_while_its_prompt_is_read_leaves_no_answer_behind() -> None:
    begun, go_on = threading.Event(), threading.Event()
    dropped: list[Any] = []

    class Engine:
        def submit(self, request: Request) -> list[Any]:
            begun.set()
            assert go_on.wait(60)
            return ["answer"]

        def drop(self, answers: list[Any]) -> None:
            dropped.extend(answers)

    async def leave() -> None:
        answers = Worker(Engine(), 1).answer([_ask("Hi")])  # type: ignore[arg-type]
        task = asyncio.ensure_future(anext(answers))
        await asyncio.to_thread(begun.wait, 60)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
        go_on.set()
        while not dropped:
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(leave(), 10))
    assert dropped == ["answer"]


def test_a_client_that_leaves_before_its_prompt_is_scored_costs_nothing() -> None:
    scored: list[str] = []

    async def leave() -> None:
        worker = Worker(SimpleNamespace(score=lambda pairs, adapter: scored.append(adapter)), 4)  # type: ignore[arg-type]
        first, second = (asyncio.ensure_future(worker.score([([1], [2])], name)) for name in ("left", "waits"))
        await asyncio.sleep(0)
        first.cancel()
        await asyncio.sleep(0)
        worker.start()
        await second
        worker.stop()

    asyncio.run(leave())
    assert scored == ["waits"]


def _metric(url: str, name: str) -> float:
    lines = _get(url.removesuffix("/v1") + "/metrics")[1].splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def test_a_full_queue_a_late_answer_and_a_large_request_are_refused(engine: TransformersEngine) -> None:
    ask = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 900, "ignore_eos": True, "n": 3}).encode()
    with serving(engine, max_answers=3, request_seconds=0.5, max_body_bytes=1000, max_new_tokens=900) as url:
        with ThreadPoolExecutor(1) as pool:
            running = pool.submit(_post, url, "/completions", ask)
            _until(lambda: _load(url)[0] == 3 or running.done())
            status, told = _post(url, "/completions", ask)
            assert running.result()[0] == 504
        assert status == 503
        assert told["error"]["message"] == "3 answers are under way and 3 is the most; try again later"
        _until(lambda: _load(url) == (0, 0))
        status, told = _post(url, "/completions", json.dumps({"model": "tiny", "prompt": "x" * 1000}).encode())
        assert (status, told["error"]["message"]) == (413, "the request is larger than 1000 bytes")
        ask_stream = {"model": "tiny", "prompt": "Hi", "max_tokens": 900, "stream": True, "ignore_eos": True, "n": 3}
        events = _raw(url, "/completions", ask_stream).split("\n\n")
        assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
        assert len(events) > 5
    with serving(engine, body_seconds=0.2) as url, closing(socket.socket()) as line:
        line.connect(("127.0.0.1", int(url.removesuffix("/v1").rsplit(":", 1)[1])))
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 50\r\n\r\n{")
        assert b" 408 " in line.recv(1000)


def test_streams_side_by_side_are_neither_lost_nor_crossed(engine: TransformersEngine, url: str) -> None:
    """64 at once over 8 places, by both names; each is what the engine gives for it alone."""
    asked = [
        (f"Number {index}", "mine" if index % 3 == 0 else "tiny", {"seed": index, "temperature": index % 2})
        for index in range(64)
    ]
    expected = [
        engine.generate([_ask(text, adapter=BASE_MODEL if model == "tiny" else model, max_new_tokens=16, **options)])[
            0
        ].text
        for text, model, options in asked
    ]
    barrier = threading.Barrier(64)

    def answer(entry: Any) -> str:
        text, model, options = entry
        with openai.OpenAI(base_url=url, api_key="-", max_retries=0) as client:
            barrier.wait()
            stream = client.chat.completions.create(
                model=model, messages=_user(text), max_tokens=16, stream=True, **options
            )
            return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(64) as pool:
        assert list(pool.map(answer, asked)) == expected
    assert _load(url) == (0, 0)


# -- requests that mean ill

CHAT: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
TEXT: dict[str, Any] = {"model": "tiny", "prompt": "Hi", "max_tokens": 2}
DEEP = "[" * 100_000 + "]" * 100_000
REFUSED: list[tuple[str, str | dict[str, Any], str]] = [
    ("/chat/completions", DEEP, ""),
    ("/chat/completions", '{"model": "tiny", "messages": ' + DEEP + "}", ""),
    ("/chat/completions", "", ""),
    ("/chat/completions", "\ud800".encode("utf-16-le", "surrogatepass").decode("latin-1"), ""),
    ("/chat/completions", '{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "unicode"),
    ("/chat/completions", '{"\\ud800": 1}', ""),
    ("/chat/completions", CHAT | {"temperature": "NaN"}, "temperature"),
    ("/chat/completions", '{"model": "tiny", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}', ""),
    ("/chat/completions", CHAT | {"messages": []}, "messages"),
    ("/chat/completions", CHAT | {"messages": [{"role": "user"}]}, "message 1 has no content"),
    ("/chat/completions", CHAT | {"messages": [{"role": "assistant", "content": "a"}]}, "nothing is left to answer"),
    ("/chat/completions", CHAT | {"messages": [{"role": "system", "content": {"a": 1}}]}, "content"),
    ("/chat/completions", CHAT | {"n": 10**9}, "n: "),
    ("/chat/completions", CHAT | {"n": 0}, "n: "),
    ("/chat/completions", CHAT | {"max_tokens": 10**30}, "max_tokens"),
    ("/chat/completions", CHAT | {"max_tokens": 501}, "at most 500"),
    ("/chat/completions", CHAT | {"max_tokens": 0}, "max_tokens: 0"),
    ("/chat/completions", CHAT | {"stop": [""]}, "stop"),
    ("/chat/completions", CHAT | {"stop": ["a"] * 17}, "stop"),
    ("/chat/completions", CHAT | {"logit_bias": {"5": 100}}, "logit_bias"),
    ("/chat/completions", CHAT | {"presence_penalty": 1}, "presence_penalty"),
    ("/chat/completions", CHAT | {"response_format": {"type": "json_object"}}, "response_format"),
    ("/chat/completions", CHAT | {"top_logprobs": 2}, "needs logprobs"),
    ("/chat/completions", CHAT | {"chat_template": "{{ x }}"}, "chat_template"),
    ("/chat/completions", CHAT | {"tools": TOOLS}, "--agent_template"),
    ("/completions", TEXT | {"prompt": []}, ""),
    ("/completions", TEXT | {"prompt": [[]]}, "empty prompt"),
    ("/completions", TEXT | {"prompt": ["a"] * 1025}, "prompt"),
    ("/completions", TEXT | {"prompt": ["a"] * 400}, "at most 320"),
    ("/completions", TEXT | {"prompt": [10**25]}, "prompt"),
    ("/completions", TEXT | {"prompt": [259]}, "259 embedding rows"),
    ("/completions", TEXT | {"prompt": [-1]}, "prompt"),
    ("/completions", TEXT | {"prompt": "x" * 2000}, "leaves no room"),
    ("/completions", TEXT | {"echo": True, "logprobs": 5}, "with echo at most 1"),
    ("/completions", TEXT | {"suffix": "x"}, "suffix"),
    ("/completions", TEXT | {"best_of": 3}, "best_of"),
    ("/completions", TEXT | {"seed": 2**64}, "seed"),
    ("/completions", TEXT | {"top_k": 2**40}, "top_k"),
]  # fmt: skip


def test_requests_that_mean_ill_are_refused_with_the_reason(url: str) -> None:
    for path, body, message in REFUSED:
        data = (body if isinstance(body, str) else json.dumps(body)).encode(errors="surrogatepass")
        status, told = _post(url, path, data)
        assert 400 <= status < 500, (path, str(body)[:100], told)
        assert message in told["error"]["message"], (path, str(body)[:100], told)
    assert _post(url, "/completions", json.dumps(TEXT).encode())[0] == 200  # it goes on


@pytest.mark.parametrize(
    "odd",
    [
        {"temperature": 1e-300}, {"temperature": 100}, {"top_p": 1e-300, "temperature": 1}, {"repetition_penalty": 100},
        {"repetition_penalty": 0.01}, {"top_k": 2**31 - 1, "temperature": 1}, {"min_p": 1, "temperature": 1},
        {"seed": 2**63 - 1, "temperature": 1}, {"stop_token_ids": [2**31 - 1]}, {"logprobs": 20},
        {"prompt": "<|im_end|><|im_start|>\x00\u202e"}, {"prompt": "{{ 7 * 7 }}{% include '/etc/passwd' %}"},
    ],
    ids=str,
)  # fmt: skip
def test_odd_values_are_answered(url: str, odd: dict[str, Any]) -> None:
    status, told = _post(url, "/completions", json.dumps(TEXT | odd).encode())
    assert status == 200, told
    assert told["usage"]["completion_tokens"] in (1, 2)


def test_schemathesis_finds_no_request_that_breaks_the_server(url: str) -> None:
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi.checks import (
        content_type_conformance,
        response_schema_conformance,
        status_code_conformance,
    )

    base = url.removesuffix("/v1")
    schema = schemathesis.openapi.from_url(f"{base}/openapi.json")
    checks = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
    statuses: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in schemathesis.GenerationMode:
            if mode is schemathesis.GenerationMode.NEGATIVE and operation.method == "get":
                continue  # nothing of it can be wrong

            @settings(
                max_examples=25,
                deadline=None,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
                database=None,
            )
            @given(case=operation.as_strategy(generation_mode=mode))
            def probe(case: Any) -> None:
                response = case.call()
                statuses[case.operation.path, response.status_code] += 1
                case.validate_response(response, checks=checks)

            probe()
    posts = ("/v1/chat/completions", "/v1/completions")
    assert all(statuses[path, 400] for path in posts), statuses
