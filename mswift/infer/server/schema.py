"""What the server takes and gives: OpenAI's chat completions and completions, strictly.

A field that is not known, or that would be without effect, is refused, not ignored. Bounds keep a request from costing
more than its limits say.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

Text = Annotated[str, StringConstraints(max_length=4_000_000)]
Short = Annotated[str, StringConstraints(max_length=256)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=256)]


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(Strict):
    """A part of a message; only text is taken."""

    type: Literal["text"]
    text: Text


class Function(Strict):
    """A call: a name, and arguments as JSON text."""

    name: Short
    arguments: Text


class ToolCall(Strict):
    """A call of a message of the assistant."""

    id: Short = ""
    type: Literal["function"] = "function"
    function: Function


class ChatMessage(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[TextPart] | None = None
    name: Short | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Short | None = None
    refusal: None = None


class FunctionDescription(Strict):
    """What a tool is called and takes (JSON schema)."""

    name: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"] = "function"
    function: FunctionDescription


class StreamOptions(Strict):
    """What a stream holds besides."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class SamplingFields(Strict):
    """What both kinds of requests have. Numbers that are null count as not given."""

    model: Short
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    n: int | None = Field(None, ge=1, le=128)
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    seed: int | None = Field(None, ge=0, le=2**63 - 1)
    max_tokens: int | None = Field(None, ge=0, le=2**31 - 1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Short | None = None
    # not OpenAI's, spelled as vLLM spells them
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    ignore_eos: bool | None = None
    # only the values that change nothing
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None


class ResponseFormat(Strict):
    """Only plain text."""

    type: Literal["text"]


class ChatRequest(SamplingFields):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=4096)]
    max_completion_tokens: int | None = Field(None, ge=1, le=2**31 - 1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    tools: Annotated[list[Tool], Field(max_length=512)] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    response_format: ResponseFormat | None = None
    metadata: Annotated[dict[str, Any], Field(max_length=16)] | None = None
    store: Literal[False] | None = None


class CompletionRequest(SamplingFields):
    """POST /v1/completions."""

    prompt: (
        Text
        | list[TokenId]
        | Annotated[list[Text], Field(max_length=1024)]
        | Annotated[list[list[TokenId]], Field(max_length=1024)]
    )
    echo: bool | None = None
    logprobs: int | None = Field(None, ge=0, le=20)
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    suffix: Annotated[str, StringConstraints(max_length=0)] | None = None


# -- answers


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class TopLogprob(BaseModel):
    """A token and its log-probability; the bytes are those of its text."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprobs(TopLogprob):
    """The same of a token of the answer, with the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(BaseModel):
    """Of a chat answer."""

    content: list[TokenLogprobs] | None
    refusal: None = None


class AnswerMessage(BaseModel):
    """What the assistant says and calls."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_problem: str | None = None
    """Not OpenAI's: why what looks like a call is none; `content` is then the whole text."""


class ChatChoice(BaseModel):
    """One of n answers."""

    index: int
    message: AnswerMessage
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatCompletion(BaseModel):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ToolCallDelta(ToolCall):
    """A call in a stream."""

    index: int


class Delta(BaseModel):
    """What a chunk of a stream adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    tool_call_problem: str | None = None


class ChunkChoice(BaseModel):
    """Of one of n answers."""

    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None = None
    finish_reason: Literal["stop", "length", "tool_calls"] | None = None


class ChatChunk(BaseModel):
    """One event of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    """Of a completion, token by token; null for a first token that follows nothing."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One of the answers: n for each prompt, in order."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None


class TextCompletion(BaseModel):
    """The answer to POST /v1/completions, or one event of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class Model(BaseModel):
    """A name that `model` may take: the model, or an adapter on it."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mswift"
    parent: str | None = None
    max_model_len: int | None = None


class ModelList(BaseModel):
    """The answer to GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]


class ErrorDetail(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorReply(BaseModel):
    """Every status from 400 on."""

    error: ErrorDetail


class Health(BaseModel):
    """The answer to GET /health: answers that grow, and those that wait for room."""

    status: Literal["ok"] = "ok"
    running: int
    waiting: int
