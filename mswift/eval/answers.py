"""What an answer is worth: choices by likelihood, numbers and texts by exact match, programs by pass@k. Torch-free.

The definitions are those of lm-evaluation-harness 0.4.13, where it has one.
"""

import re
from collections.abc import Sequence

NO_ANSWER = "[invalid]"
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_NUMBER_NOISE = tuple(map(re.compile, (",", r"\$", "(?s).*#### ", r"\.$")))
_TEXT_NOISE = tuple(map(re.compile, (r"\.$", ",", "\n", r"\\", '"')))


def choice_scores(log_probabilities: Sequence[float], choices: Sequence[str], gold: int) -> dict[str, float]:
    """acc: the likeliest choice; acc_norm: per character; acc_bytes: per UTF-8 byte. The first one wins a tie."""
    lengths = {"acc": [1] * len(choices), "acc_norm": [len(choice) for choice in choices]}
    lengths["acc_bytes"] = [len(choice.encode()) for choice in choices]
    scores = {}
    for name, sizes in lengths.items():
        values = [value / size for value, size in zip(log_probabilities, sizes, strict=True)]
        scores[name] = float(values.index(max(values)) == gold)
    return scores


def strict_number(text: str) -> str:
    """GSM8K's own form: the number behind the first "#### "."""
    found = _STRICT.findall(text)
    return found[0].strip() if found else NO_ANSWER


def flexible_number(text: str) -> str:
    """The last thing in the text that looks like a number."""
    found = _FLEXIBLE.findall(text)
    return next((group for group in found[-1] if group), NO_ANSWER).strip() if found else NO_ANSWER


def same_number(answer: str, reference: str) -> float:
    """1 where both are the same text, without commas, dollar signs, a last full stop and what precedes "#### "."""
    return float(_without(answer, _NUMBER_NOISE) == _without(reference, _NUMBER_NOISE))


def same_text(answer: str, reference: str) -> float:
    """1 where both are the same text, without case, commas, quotes, backslashes, line breaks and a last full stop."""
    return float(_without(answer.strip(), _TEXT_NOISE).strip() == _without(reference.strip(), _TEXT_NOISE).strip())


def _without(text: str, noise: Sequence[re.Pattern[str]]) -> str:
    for pattern in noise:
        text = pattern.sub("", text)
    return text.lower()


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Chance that one of k samples passes, unbiased: 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, arXiv 2107.03374)."""
    if not 1 <= k <= num_samples:
        raise ValueError(f"pass@{k} of {num_samples} samples")
    if num_samples - num_passed < k:
        return 1.0
    missed = 1.0
    for size in range(num_samples - num_passed + 1, num_samples + 1):
        missed *= 1 - k / size
    return 1 - missed
