"""A server of this process on a free port: the real application, engine and sockets."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from mswift.agent.formats import FORMATS
from mswift.infer.request import Sampling
from mswift.infer.server.app import Limits, create_app
from mswift.infer.server.translate import Served
from mswift.infer.server.worker import Worker
from mswift.infer.transformers_engine import TransformersEngine


@contextlib.contextmanager
def serving(engine: TransformersEngine, name: str = "tiny", **changes: Any) -> Iterator[str]:
    """Its address, which ends with /v1. changes: fields of Served and Limits, and max_answers of the worker."""
    served: dict[str, Any] = {
        "model": name, "adapters": engine.adapters, "max_new_tokens": 500, "max_answers": 320, "defaults": Sampling(),
    }  # fmt: skip
    limits: dict[str, Any] = {"max_body_bytes": 2**20, "body_seconds": 10, "request_seconds": 120}
    for field, value in changes.items():
        (served if field in Served.__dataclass_fields__ else limits)[field] = value
    if isinstance(served.get("agent"), str):
        served["agent"] = FORMATS[served["agent"]]
    app = create_app(Worker(engine, served["max_answers"]), Served(**served), Limits(**limits))
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen(128)
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{bound.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def fixed_answer_model(path: Path, tokenizer: Any, text: str, **sizes: Any) -> Any:
    """A tiny model in `path` that was taught to write `text`, and learned it by heart."""
    import torch

    from tests.support.tiny import tiny_model

    model = tiny_model(path, "llama", num_hidden_layers=2, vocab_size=len(tokenizer), **sizes)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    model.train()
    for _ in range(400):
        output = model(input_ids=ids, labels=ids)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        with torch.no_grad():
            if bool((output.logits[0, :-1].argmax(-1) == ids[0, 1:]).all()) and float(output.loss) < 0.02:
                break
    model.eval().save_pretrained(path)
    return model
