"""ROUGE and BLEU by the libraries that the field uses: rouge-score and sacreBLEU. Torch-free."""

from collections.abc import Sequence
from functools import cache
from typing import Any

from mswift.errors import ConfigError

BLEU_STATS = 10
"""System length, reference length, matching n-grams of 1 to 4 words, n-grams of 1 to 4 words."""


def rouge(prediction: str, reference: str) -> dict[str, float]:
    """ROUGE-1, ROUGE-2 and ROUGE-L (F measure, Porter stemmer, English words), each 0 to 1."""
    found = _scorer().score(reference, prediction)
    return {"rouge1": found["rouge1"].fmeasure, "rouge2": found["rouge2"].fmeasure, "rouge_l": found["rougeL"].fmeasure}


def rouge_l_words(prediction: str, reference: str) -> float:
    """ROUGE-L (F measure) over words as they are, apart by white space; no stemmer."""
    return float(_word_scorer().score(reference, prediction)["rougeL"].fmeasure)


def bleu_stats(prediction: str, references: Sequence[str]) -> list[float]:
    """What corpus BLEU adds up over answers (BLEU_STATS numbers); sacreBLEU's 13a words."""
    score = _bleu()().corpus_score([prediction], [[reference] for reference in references])
    return [float(number) for number in (score.sys_len, score.ref_len, *score.counts, *score.totals)]


def bleu(sums: Sequence[float]) -> float:
    """Corpus BLEU, 0 to 100, of added-up stats."""
    sys_len, ref_len, *grams = (int(number) for number in sums)
    return float(_bleu().compute_bleu(grams[:4], grams[4:], sys_len, ref_len, smooth_method="exp").score)


def bleu_signature() -> str:
    """sacreBLEU's own words for how it counts; for the report."""
    import sacrebleu

    return f"sacreBLEU {sacrebleu.__version__}, tok:13a, smooth:exp, case:mixed"


@cache
def _scorer() -> Any:
    scorer = _rouge_module()
    return scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


@cache
def _word_scorer() -> Any:
    return _rouge_module().RougeScorer(["rougeL"], tokenizer=_Words())


def _rouge_module() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ModuleNotFoundError as error:
        raise ConfigError(f"ROUGE needs the package {error.name}: pip install 'mswift[eval]'") from None
    return rouge_scorer


@cache
def _bleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ModuleNotFoundError as error:
        raise ConfigError(f"BLEU needs the package {error.name}: pip install 'mswift[eval]'") from None
    return BLEU


class _Words:
    """Words for rouge-score."""

    def tokenize(self, text: str) -> list[str]:
        """Apart by white space."""
        return text.split()
