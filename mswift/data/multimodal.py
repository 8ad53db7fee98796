"""Image-text conversations -> samples and batches of a Hugging Face vision-language model, by the model's processor.

The text is the chat template's, with the same spans and the same proof as of text alone. What the template writes for
an image is found by asking it; the processor says how many image tokens that becomes, and the spans move along. Image
tokens are never learned. A sample carries its pixels; nothing of them is cached.
Shapes: n tokens, I images, P patches of all of them, F numbers of a patch.
"""

import base64
import binascii
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from mswift.data.batch import Sample
from mswift.data.blocks import MARKS
from mswift.data.loss_scale import PLAIN, LossScale
from mswift.data.rows import Conversation
from mswift.data.spans import tokenize
from mswift.data.template import ChatTemplate, Rendering
from mswift.data.tokenizer import Tokenizer
from mswift.errors import ConfigError, DataError

_MARK = MARKS["images"]
_LARGEST_PIXELS = 1 << 28


class Processor(Protocol):
    """The part of a transformers processor that is used here."""

    tokenizer: Any
    image_processor: Any
    image_token: str
    chat_template: Any

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...
    def replace_image_token(self, image_inputs: Any, image_idx: int) -> str: ...


@dataclass(frozen=True)
class ImageSample(Sample):
    """A sample with what the processor makes of its images."""

    inputs: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    """Names as the model takes them: pixel_values [P, F], image_grid_thw int64 [I, 3]; empty without images."""


class ImageTemplate:
    """Chat template and processor of a vision-language model; the processor's template becomes its tokenizer's.

    ConfigError for a processor that cannot say what becomes of an image.
    """

    def __init__(self, processor: Processor, loss_scale: LossScale = PLAIN) -> None:
        if not (hasattr(processor, "image_token") and hasattr(processor, "replace_image_token")):
            raise ConfigError(
                f"{type(processor).__name__} does not say how many tokens an image has (image_token, "
                "replace_image_token of transformers 5): use a model whose processor does, such as Qwen2-VL's"
            )
        self._processor = processor
        tokenizer: Tokenizer = processor.tokenizer
        if processor.chat_template:
            tokenizer.chat_template = processor.chat_template
        self._template = ChatTemplate(tokenizer, loss_scale)
        self._token_id = int(tokenizer.convert_tokens_to_ids(processor.image_token))
        self._written = self._what_an_image_becomes()

    def samples(self, conversation: Conversation, folder: Path, where: str) -> list[ImageSample]:
        """One sample or several (see `mswift.data.template`); image paths are relative to `folder`.

        DataError names `where`: an image that cannot be read, one inside an answer, media that are no images.
        """
        others = sorted(set(conversation.media) - {"images"})
        if others:
            raise DataError(f"{where}: `{others[0]}` cannot be trained on yet; only images can")
        images = [open_image(value, folder, where) for value in conversation.media.get("images", ())]
        written = replace(conversation, messages=[self._written_out(m, where) for m in conversation.messages])
        return [self._sample(rendering, images, where) for rendering in self._template.render(written, where)]

    def _sample(self, rendering: Rendering, images: Sequence[Any], where: str) -> ImageSample:
        count = rendering.text.count(self._processor.image_token)
        if count > len(images):
            raise DataError(f"{where}: the text has {count} image tokens for {len(images)} images")
        inputs = self._pixels(images[:count])
        (sample,) = tokenize(self._processor.tokenizer, [self._expanded(rendering, inputs, where)], [where])
        is_image = sample.tokens == self._token_id
        found = int(np.count_nonzero(is_image))
        merge = int(getattr(self._processor.image_processor, "merge_size", 1)) ** 2
        wanted = int(inputs["image_grid_thw"].prod(axis=1).sum()) // merge if "image_grid_thw" in inputs else found
        if found != wanted:
            raise DataError(f"{where}: {found} image tokens for images of {wanted}")
        weights = np.where(is_image, np.float32(0), sample.loss_weights)  # those of --loss_scale all
        return ImageSample(sample.tokens, weights, sample.channel, inputs=inputs)

    def _pixels(self, images: Sequence[Any]) -> dict[str, NDArray[Any]]:
        if not images:
            return {}
        made = self._processor.image_processor(images=list(images), return_tensors="np")
        return {name: np.asarray(value) for name, value in made.items()}

    def _expanded(self, rendering: Rendering, inputs: Mapping[str, Any], where: str) -> Rendering:
        """Every image token as often as the image has patches; spans after it move, one around it is refused."""
        token, text, shift = self._processor.image_token, [], 0
        places: list[tuple[int, int]] = []  # (character after an image token, characters added up to it)
        parts = rendering.text.split(token)
        end = 0
        for number, part in enumerate(parts[:-1]):
            end += len(part) + len(token)
            if any(span.start < end and end - len(token) < span.end for span in rendering.spans):
                raise DataError(f"{where}: an image inside an answer, which a model cannot write; move it to the user")
            tokens = self._processor.replace_image_token(inputs, number)
            text += [part, tokens]
            shift += len(tokens) - len(token)
            places.append((end, shift))
        text.append(parts[-1])

        def moved(place: int) -> int:
            return place + next((added for after, added in reversed(places) if after <= place), 0)

        spans = tuple(replace(s, start=moved(s.start), end=moved(s.end)) for s in rendering.spans)
        return replace(rendering, text="".join(text), spans=spans)

    def _written_out(self, message: dict[str, Any], where: str) -> dict[str, Any]:
        content = message["content"]
        if self._processor.image_token in content.replace(self._written, "") and self._processor.image_token != _MARK:
            raise DataError(
                f"{where}: a text holds {self._processor.image_token!r} itself; write {_MARK} where an image stands"
            )
        return {**message, "content": content.replace(_MARK, self._written)}

    def _what_an_image_becomes(self) -> str:
        """The text that the chat template writes for an image between two words."""
        said = [{"type": "text", "text": "before"}, {"type": "image"}, {"type": "text", "text": "behind"}]
        text = str(self._processor.apply_chat_template([{"role": "user", "content": said}], tokenize=False))
        _, found, rest = text.partition("before")
        written, closed, _ = rest.partition("behind")
        if not (found and closed and written.count(self._processor.image_token) == 1):
            raise ConfigError(
                "the chat template does not write one image token for an image among texts: "
                f"{text!r}; use the chat_template of the model's own processor"
            )
        return written


def open_image(value: Any, folder: Path, where: str) -> Any:
    """A PIL image in RGB: a path, {"path" or "bytes": ...} as `datasets` writes, or a data: URL; no download."""
    from PIL import Image, UnidentifiedImageError

    name = value if isinstance(value, str) else next((value[k] for k in ("path", "url") if value.get(k)), "")
    data = value.get("bytes") if isinstance(value, Mapping) else None
    try:
        if data is not None:
            source: Any = io.BytesIO(data)
        elif name.startswith("data:"):
            source = io.BytesIO(base64.b64decode(name.partition(",")[2], validate=True))
        elif "://" in name:
            raise DataError(f"{where}: image {name}: nothing is downloaded; save it and name the file")
        else:
            source = folder / name
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(source) as image:
                if image.width * image.height > _LARGEST_PIXELS:
                    raise DataError(f"{where}: image {name[:80]} has {image.width}x{image.height} pixels; shrink it")
                return image.convert("RGB")
    except (OSError, UnidentifiedImageError, binascii.Error, Image.DecompressionBombWarning) as error:
        raise DataError(f"{where}: image {name[:80] or '(bytes)'} cannot be read: {error}") from None


class ImageBatch(NamedTuple):
    """One micro batch."""

    inputs: dict[str, NDArray[Any]]
    """As a transformers model takes it: input_ids, attention_mask, labels int64 [b, length] (labels -100 where nothing
    is learned; the model shifts them); the images of all samples one after the other."""
    loss_weights: NDArray[np.float32]
    """float32 [b, length]; what predicting each token counts in the loss, 0 where nothing is learned. The mean by these
    weights is the loss; the model's own is that of weights 0 and 1."""


def collate_images(samples: Sequence[ImageSample], length: int, pad_token_id: int) -> ImageBatch:
    """Samples padded on the right. ValueError for a longer sample."""
    ids = np.full((len(samples), length), pad_token_id, dtype=np.int64)
    mask, labels = np.zeros_like(ids), np.full_like(ids, -100)
    weights = np.zeros(ids.shape, dtype=np.float32)
    for row, sample in enumerate(samples):
        size = len(sample.tokens)
        if size > length:
            raise ValueError(f"a sample of {size} tokens in a batch of length {length}")
        ids[row, :size], mask[row, :size] = sample.tokens, 1
        labels[row, :size] = np.where(sample.loss_weights, sample.tokens, -100)
        weights[row, :size] = sample.loss_weights
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": labels, **dict(_joined(samples))}
    return ImageBatch(inputs, weights)


def _joined(samples: Sequence[ImageSample]) -> Iterator[tuple[str, NDArray[Any]]]:
    for name in dict.fromkeys(name for sample in samples for name in sample.inputs):
        yield name, np.concatenate([sample.inputs[name] for sample in samples if name in sample.inputs])
