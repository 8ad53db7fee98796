"""Image-text rows: tokens, pixels and loss are those of transformers' own Qwen2-VL processor and model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mswift.data.loss_scale import parse_loss_scale
from mswift.data.multimodal import ImageTemplate, collate_images, open_image
from mswift.data.rows import read_row
from mswift.errors import ConfigError, DataError
from tests.support.shared import shared_file

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def processor() -> Any:
    """Qwen2-VL's, without its part for videos, which needs torchvision."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil, Qwen2VLProcessor
    from transformers.processing_utils import ProcessorMixin

    class Images(Qwen2VLProcessor):  # type: ignore[misc]
        def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
            self.image_token = "<|image_pad|>"
            self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
            self.video_token = "<|video_pad|>"
            self.video_token_id = tokenizer.convert_tokens_to_ids(self.video_token)
            ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    tokenizer = AutoTokenizer.from_pretrained(shared_file("data/tokenizers/qwen2-151k"))
    pixels = Qwen2VLImageProcessorPil(size={"shortest_edge": 28 * 28 * 4, "longest_edge": 28 * 28 * 24})
    return Images(image_processor=pixels, tokenizer=tokenizer, chat_template=TEMPLATE)


@pytest.fixture(scope="module")
def template(processor: Any) -> ImageTemplate:
    return ImageTemplate(processor)


@pytest.fixture(scope="module")
def rows() -> list[tuple[dict[str, Any], Path]]:
    """Published rows with pictures, and one with several pictures in one turn."""
    path = shared_file("data/sft/mllm_demo.json")
    rows = [row for row in json.loads(path.read_text()) if "images" in row and "videos" not in row]
    own = {
        "messages": [
            {"role": "system", "content": "Look."},
            {"role": "user", "content": "First <image>, then <image>: which is a cat?"},
            {"role": "assistant", "content": "The first one."},
            {"role": "user", "content": "And what is in <image>"},
            {"role": "assistant", "content": "A rocket."},
        ],
        "images": ["chelsea.png", "coffee.png", "rocket.jpg"],
    }
    return [*((row, path.parent) for row in rows), (own, shared_file("data/mm/chelsea.png").parent)]


def of_processor(processor: Any, row: dict[str, Any], folder: Path) -> Any:
    """The same conversation as transformers documents it: content in parts, images beside."""
    messages = []
    for message in row["messages"]:
        parts: list[dict[str, str]] = []
        for number, text in enumerate(message["content"].split("<image>")):
            parts += [{"type": "image"}] * (number > 0) + ([{"type": "text", "text": text}] if text else [])
        messages.append({"role": message["role"], "content": parts})
    text = processor.apply_chat_template(messages, tokenize=False)
    images = [open_image(name, folder, "row") for name in row["images"]]
    return processor(text=[text], images=images, return_tensors="np")


def test_tokens_and_pixels_are_the_processor_s(processor: Any, template: ImageTemplate, rows: Any) -> None:
    assert len(rows) >= 3
    for row, folder in rows:
        (sample,) = template.samples(read_row(row, "row"), folder, "row")
        expected = of_processor(processor, row, folder)
        assert sample.tokens.tolist() == expected["input_ids"][0].tolist()[: len(sample.tokens)]
        assert processor.tokenizer.decode(expected["input_ids"][0][len(sample.tokens) :]) == ""
        assert sample.inputs.keys() == {"pixel_values", "image_grid_thw"}
        for name, value in sample.inputs.items():
            np.testing.assert_array_equal(value, expected[name])
        answers = [m["content"] + "<|im_end|>" for m in row["messages"] if m["role"] == "assistant"]
        assert processor.tokenizer.decode(sample.tokens[sample.loss_weights > 0]) == "".join(answers)
        assert not ((sample.loss_weights > 0) & (sample.tokens == processor.image_token_id)).any()


def test_a_batch_has_the_loss_that_the_model_gives_its_processor_s_input(
    processor: Any, template: ImageTemplate, rows: Any
) -> None:
    model = tiny_model(processor)
    samples = [template.samples(read_row(row, "row"), folder, "row")[0] for row, folder in rows]
    batch, _ = collate_images(samples, max(len(s.tokens) for s in samples) + 3, pad_token_id=0)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        ours = model(**tensors, **token_types(processor, batch))
        total, count = 0.0, 0
        for (row, folder), sample in zip(rows, samples, strict=True):
            one = of_processor(processor, row, folder)
            given = {name: torch.from_numpy(np.asarray(value)) for name, value in one.items()}
            logits = model(**given).logits[0]
            targets = torch.from_numpy(sample.tokens).long()
            losses = torch.nn.functional.cross_entropy(logits[: len(targets) - 1], targets[1:], reduction="none")
            learned = torch.from_numpy(sample.loss_weights[1:] > 0)
            total, count = total + float(losses[learned].sum()), count + int(learned.sum())
            # the pictures matter: another one gives other logits
            other = {**given, "pixel_values": given["pixel_values"] + 1}
            assert (model(**other).logits[0] - logits).abs().max() > 1e-3
    assert abs(float(ours.loss) - total / count) < 1e-5 * total / count


@pytest.mark.parametrize("loss_scale", ["default", "all"])
def test_weights_of_messages_and_of_the_loss_scale_count(processor: Any, rows: Any, loss_scale: str) -> None:
    """The mean by weights, against logits of the processor's input and weights found in its text, not by spans."""
    model, (row, folder) = tiny_model(processor), rows[-1]
    messages = [dict(message) for message in row["messages"]]
    messages[2]["loss_scale"] = 0.25  # "The first one."
    template = ImageTemplate(processor, parse_loss_scale(loss_scale))
    samples = template.samples(read_row({**row, "messages": messages}, "row"), folder, "row") * 2
    batch, weights = collate_images(samples, len(samples[0].tokens) + 5, pad_token_id=0)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(value) for name, value in batch.items()}
        logits = model(**tensors, **token_types(processor, batch)).logits[:, :-1].flatten(0, 1)
        losses = torch.nn.functional.cross_entropy(logits, tensors["input_ids"][:, 1:].flatten(), reduction="none")
        counted = torch.from_numpy(weights[:, 1:]).flatten()
        ours = float((losses * counted).sum() / counted.sum())
        one = {
            name: torch.from_numpy(np.asarray(value)) for name, value in of_processor(processor, row, folder).items()
        }
        tokens = one["input_ids"][0]
        expected = torch.full((len(tokens),), float(loss_scale == "all"))
        for text, weight in (("The first one.<|im_end|>", 0.25), ("A rocket.<|im_end|>", 1.0)):
            said = torch.tensor(processor.tokenizer(text)["input_ids"])
            (place,) = (n for n in range(len(tokens)) if torch.equal(tokens[n : n + len(said)], said))
            expected[place : place + len(said)] = weight
        expected[tokens == processor.image_token_id] = 0
        expected, tokens = expected[: len(samples[0].tokens)], tokens[: len(samples[0].tokens)]
        alone = torch.nn.functional.cross_entropy(
            model(**one).logits[0][: len(tokens) - 1], tokens[1:], reduction="none"
        )
    assert weights[0, 1 : len(tokens)].tolist() == expected[1:].tolist()
    assert not weights[:, len(tokens) :].any()
    truth = float((alone * expected[1:]).sum() / expected[1:].sum())
    assert abs(ours - truth) < 1e-5 * truth
    assert abs(float(alone[expected[1:] > 0].mean()) - truth) > 1e-4 * truth  # without weights it is another number


def token_types(processor: Any, batch: Any) -> dict[str, torch.Tensor]:
    return {"mm_token_type_ids": torch.from_numpy((batch["input_ids"] == processor.image_token_id).astype(np.int64))}


def tiny_model(processor: Any) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    ids = {name: processor.tokenizer.convert_tokens_to_ids(f"<|{name.removesuffix('_token_id')}|>") for name in
           ("vision_start_token_id", "vision_end_token_id")}  # fmt: skip
    text = {
        "vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }  # fmt: skip
    vision = {"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2, "patch_size": 14}
    config = Qwen2VLConfig(
        text_config=text, vision_config=vision, image_token_id=processor.image_token_id,
        video_token_id=processor.video_token_id, **ids,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen2VLForConditionalGeneration(config).eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": ["missing.png"]}, "image missing.png cannot be read"),
        ({"images": ["https://host/a.png"]}, "nothing is downloaded"),
        ({"images": ["data:image/png;base64,%%%"]}, "cannot be read"),
        ({"images": [{"bytes": b"no image"}]}, "cannot be read"),
        ({"images": ["a", "b"]}, "marks <image> for 2 images"),
        ({"videos": ["a.mp4"]}, "`videos` cannot be trained on yet"),
        ({"query": "<image><|image_pad|>?"}, "holds '<|image_pad|>' itself"),
    ],
    ids=str,
)
def test_bad_rows(template: ImageTemplate, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    from PIL import Image

    Image.new("RGB", (60, 60)).save(tmp_path / "good.png")
    row = {"query": "<image>?", "response": "yes", "images": ["good.png"]} | change
    if "videos" in row:
        row |= {"query": "?", "images": []}
    with pytest.raises(DataError) as refusal:
        template.samples(read_row(row, "f.jsonl, row 3"), tmp_path, "f.jsonl, row 3")
    assert message in str(refusal.value)
    assert str(refusal.value).startswith("f.jsonl, row 3")


def test_an_image_in_an_answer_is_refused(template: ImageTemplate, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (60, 60)).save(tmp_path / "good.png")
    row = {"query": "draw", "response": "here: <image>", "images": ["good.png"]}
    with pytest.raises(DataError, match="an image inside an answer"):
        template.samples(read_row(row, "row"), tmp_path, "row")


def test_a_processor_without_images_is_refused(processor: Any) -> None:
    with pytest.raises(ConfigError, match="does not say how many tokens an image has"):
        ImageTemplate(processor.tokenizer)
