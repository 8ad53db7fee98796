"""A long text is encoded in pieces: the tokens are those of the whole, whatever the tokenizer; memory is bounded."""

import codecs
import random
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from mswift.data import documents, portions
from mswift.data.documents import encode_piece, long_pieces
from mswift.data.text_files import LongText
from mswift.data.tokenizer import encode, load_tokenizer
from mswift.errors import DataError
from tests.support.shared import shared_file
from tests.support.tiny import tiny_tokenizer

TEXTS = ["text/wagahai.300k.txt", "sft/c4_demo.jsonl"]


def _trained(kind):
    """A tokenizer trained here: `prefix` marks the start of a text (as Llama 2), `wordpiece` and `unigram` as named."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    model, trainer = {
        "prefix": (models.BPE(unk_token="?"), trainers.BpeTrainer(vocab_size=800, special_tokens=["?"])),
        "unsplit": (models.BPE(unk_token="?"), trainers.BpeTrainer(vocab_size=800, special_tokens=["?"])),
        "unigram": (models.Unigram(), trainers.UnigramTrainer(vocab_size=800, unk_token="?", special_tokens=["?"])),
        "wordpiece": (
            models.WordPiece(unk_token="?", max_input_chars_per_word=10**6),
            trainers.WordPieceTrainer(vocab_size=800, special_tokens=["?"]),
        ),
        "digits": (models.BPE(), trainers.BpeTrainer(vocab_size=1500)),
    }[kind]
    tokenizer = Tokenizer(model)
    if kind in ("prefix", "unigram"):
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
        tokenizer.decoder = decoders.Metaspace()
    elif kind == "unsplit":  # Llama 2's own: the whole text is one word for the merges
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    elif kind == "wordpiece":
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    else:  # digits in threes, from the left of their run
        from tokenizers import Regex

        split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]"), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    sample = shared_file("data/sft/c4_demo.jsonl").read_text()[:30_000].split("\n")
    tokenizer.train_from_iterator(sample, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module", params=["qwen", "bytes", "prefix", "unsplit", "unigram", "wordpiece", "digits"])
def tokenizer(request, tmp_path_factory):
    if request.param == "qwen":
        return load_tokenizer(shared_file("data/tokenizers/qwen2-8k"))
    if request.param == "bytes":
        return tiny_tokenizer(tmp_path_factory.mktemp("tiny"))
    return _trained(request.param)


def _joined(tokenizer, text, where="a"):
    return [token for piece in long_pieces(tokenizer, text, where) for token in encode_piece(tokenizer, piece)]


def _made_up(seed):
    """Words, numbers, runs of white space, control tokens and CJK in random order."""
    chosen = random.Random(seed)
    parts = [
        "word",
        " ",
        "  \n",
        "\n\n",
        "12345678901",
        "<|im_end|>",
        "猫である。",
        "e\u0301",
        "ﬁ",
        "\t",
        "...",
        "x" * 40,
    ]
    return "".join(chosen.choices(parts, k=2000))


@pytest.mark.parametrize("length", [1200])
def test_the_tokens_are_those_of_the_whole(tokenizer, monkeypatch, length):
    monkeypatch.setattr(documents, "LONG_CHARACTERS", length)
    texts = [shared_file(f"data/{name}").read_text()[:20_000] for name in TEXTS] + [_made_up(seed) for seed in range(2)]
    for text in texts:
        pieces = list(long_pieces(tokenizer, text, "a"))
        assert "".join(piece.text for piece in pieces) == text
        assert len(pieces) > len(text) // length // 2
        assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
        assert _joined(tokenizer, text) == encode(tokenizer, [text])[0]


def test_digits_that_count_from_the_start_have_no_cut_among_them(monkeypatch):
    tokenizer = _trained("digits")
    monkeypatch.setattr(documents, "LONG_CHARACTERS", 1500)
    number = "".join(random.Random(0).choices("0123456789", k=9001))
    assert _joined(tokenizer, number) == encode(tokenizer, [number])[0]
    assert len(list(long_pieces(tokenizer, number, "a"))) == 1
    monkeypatch.setattr(documents, "_MOST_CHARACTERS", 3000)
    with pytest.raises(DataError, match=r"a: its tokens depend on each other over 3,000 characters.*put line breaks"):
        _joined(tokenizer, number)


def test_partner_a_cut_without_its_proof_is_found(monkeypatch):
    tokenizer = _trained("digits")
    monkeypatch.setattr(documents, "LONG_CHARACTERS", 1500)
    monkeypatch.setattr(documents, "_is_proved", lambda *_: True)
    number = "".join(random.Random(0).choices("0123456789", k=9001))
    with pytest.raises((DataError, AssertionError)):
        assert _joined(tokenizer, number) == encode(tokenizer, [number])[0]


@pytest.mark.parametrize("name", TEXTS)
def test_portions_of_a_file_join_to_its_tokens(tokenizer, name, tmp_path, monkeypatch):
    """And those behind the end of one are the same, whoever begins there."""
    monkeypatch.setattr(documents, "LONG_CHARACTERS", 9000)
    monkeypatch.setattr(portions, "PORTION_BYTES", 30_000)
    monkeypatch.setattr(portions, "_WINDOW_BYTES", 20_000)
    path = tmp_path / "a.txt"
    path.write_bytes(
        codecs.BOM_UTF8 + shared_file(f"data/{name}").read_bytes()[:150_000].decode(errors="ignore").encode()
    )
    cut = partial(documents.proved_cut, tokenizer)
    found = list(portions.portions(path, 0, cut))
    assert len(found) >= 5
    assert list(portions.portions(path, found[2].start, cut)) == found[2:]
    pieces = [piece for text in found for piece in long_pieces(tokenizer, text, "a")]
    assert [piece.is_last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    whole = path.read_bytes().decode("utf-8-sig")
    assert "".join(piece.text for piece in pieces) == whole
    assert [n for piece in pieces for n in encode_piece(tokenizer, piece)] == encode(tokenizer, [whole])[0]


def test_a_file_is_read_as_it_is_encoded(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("")
    assert list(long_pieces(tiny_tokenizer(tmp_path / "t"), LongText(path), "a")) == []


_PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[4])
from pathlib import Path
from benchmarks.measure import peak_bytes, resident_bytes
from mswift.data import documents
from mswift.data.dataset import DataOptions, build_dataset
from mswift.data.tokenizer import encode, load_tokenizer

tokenizer = load_tokenizer(sys.argv[1])
encode(tokenizer, ["warm"])
if sys.argv[3] == "whole":
    documents.LONG_CHARACTERS = 1 << 30
before = resident_bytes()
options = DataOptions(max_length=64, cache_dir=Path(sys.argv[2]).parent / sys.argv[3], num_proc=1)
build_dataset("pt", [sys.argv[2]], tokenizer, options, is_writer=True, barrier=lambda: None, progress=False)
print(peak_bytes() - before)
"""


def test_the_peak_of_a_long_document_is_a_buffer(tmp_path):
    text = "The quick brown fox jumps over the lazy dog.\n" * 80_000
    path = tmp_path / "a.txt"
    path.write_text(text)
    model, root = str(shared_file("data/tokenizers/qwen2-8k")), str(Path(__file__).parents[2])

    def peak(how):
        argv = [sys.executable, "-c", _PROGRAM, model, str(path), how, root]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    bounded = peak("pieces")
    assert bounded < 120 << 20
    assert peak("whole") > 2 * bounded  # partner
