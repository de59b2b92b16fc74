"""Final answers found in completions, and what exact comparison can say about them."""

from __future__ import annotations

import re
from fractions import Fraction

__all__ = [
    "MAX_ANSWER_CHARACTERS",
    "exactly_equal",
    "extract_answer",
    "is_hopeless_power",
    "marked_answer",
    "parse_number",
]

MAX_ANSWER_CHARACTERS = 300  # longer answers are only compared as text

_UNSIGNED = r"(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?"
# A minus after a digit or a closing bracket is a subtraction, not a sign.
_LATEX_FRACTION = r"\\[dt]?frac\s*\{\s*\d+\s*\}\s*\{\s*\d+\s*\}"
_NUMBER_IN_TEXT = re.compile(
    rf"(?:(?<![\w)\]}}])[-+])?(?:{_LATEX_FRACTION}|{_UNSIGNED}(?:/{_UNSIGNED})?)"
)
_WHOLE_NUMBER = re.compile(
    rf"(?P<sign>[-+]?)\s*(?P<top>{_UNSIGNED})(?:\s*/\s*(?P<bottom>{_UNSIGNED}))?"
    r"\s*%?(?:\s+(?P<unit>[^\W\d_]{2,})\D*)?"
)
# Words after a number that are not its unit: "2 pi", "3 million", "5 or 6".
# fmt: off
_NOT_UNITS = frozenset((
    "pi", "sqrt", "half", "dozen", "hundred", "thousand", "million", "billion", "trillion", "and",
    "or", "to", "plus", "minus", "times", "over", "divided", "squared", "cubed", "point",
))
# fmt: on
_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_ANSWER_IS = re.compile(r"\banswer(?:\s+is\b\s*:?|\s*[:=])(.*?)(?=[.;]\s|\n|$)", re.IGNORECASE)
_UNFINISHED = re.compile(r"\d\s*(?:[-+*\u00d7\u00f7]|\\times|\\cdot|\\div)\s*\(?\d")
_TOWER = re.compile(r"(\d+)[\s{(]*\^[\s{(]*(\d+)[\s{(]*\^[\s{(]*(\d+)")
_HUGE_EXPONENT = re.compile(r"\^[\s{(]*\d{8,}")


def extract_answer(text: str, *, wants_number: bool = True) -> str | None:
    r"""The final answer in a completion, or None if there is none.

    The first of these that occurs, and its last occurrence: `\boxed{...}`; `<answer>...</answer>`;
    the rest of the line after `####`; what follows "answer is" or "answer:" up to the sentence's
    end. Otherwise the last number if `wants_number`, else the last line that is not blank.

    Args:
        text: a completion.
        wants_number: whether the reference answer is a number.
    """
    marked = marked_answer(text)
    if marked is not None:
        return marked or None
    if wants_number:
        plain = text.replace("\u2212", "-").replace(",\\!", ",").replace("{,}", ",")
        numbers: list[str] = _NUMBER_IN_TEXT.findall(plain)
        return numbers[-1] if numbers else None
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[-1] if lines else None


def parse_number(text: str) -> Fraction | None:
    r"""The number a short text states, or None if it states something else.

    Understands signs, decimals, thousands commas, `3/4`, `\frac{3}{4}`, exponents like 1e5, and
    drops math delimiters, currency signs, a percent sign (10% is 10) and a unit that is a word of
    two letters or more: "5 apples" and `5\text{ cm}` are 5; "5x", "2 pi", "3 million" and
    "5 hours 30 minutes" are not numbers.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        return None
    match = _WHOLE_NUMBER.fullmatch(_plain(text))
    if match is None or (match["unit"] or "").lower() in _NOT_UNITS:
        return None
    value = Fraction(match["top"].replace(",", ""))
    if match["bottom"]:
        divisor = Fraction(match["bottom"].replace(",", ""))
        if divisor == 0:
            return None
        value /= divisor
    return -value if match["sign"] == "-" else value


def marked_answer(text: str) -> str | None:
    """The answer a completion marks as such, maybe empty; None without a mark."""
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    tagged: list[str] = _ANSWER_TAG.findall(text)
    if tagged:
        return tagged[-1].strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().partition("\n")[0].strip()
    stated: list[str] = _ANSWER_IS.findall(text)
    # Markdown's emphasis is no part of "**Answer:** 19"; nothing on the line is no statement.
    return (stated[-1].strip(" \t*_`").rstrip(".") if stated else "") or None


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth = 0
    for position in range(start + len("\\boxed"), len(text)):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        if depth == 0:
            return text[start + len("\\boxed{") : position]
    return None  # cut off before it was closed


def exactly_equal(answer: str, reference: str) -> bool | None:
    """True or False where text or numbers decide, None where they cannot.

    Numbers further apart than 1e-5 are different; closer ones that are not equal, say 1/3 and
    0.333333, are left open. Beside a number, an answer without a digit
    and one that is still a computation ("12 + 7") are wrong.
    """
    if _as_text(answer) == _as_text(reference):
        return True
    if len(answer) > MAX_ANSWER_CHARACTERS:
        return False
    expected = parse_number(reference)
    if expected is None:
        return None
    # "12 + 7 = 19" and "x = 19" state what is on the right.
    stated = answer.rpartition("=")[2]
    found = parse_number(stated)
    if found is not None:
        difference = abs(found - expected)
        return difference == 0 or (False if difference > Fraction(1, 10**5) else None)
    if not re.search(r"\d", stated) or _UNFINISHED.search(stated):
        return False
    return None


def _plain(text: str) -> str:
    text = re.sub(r"\\[!,;: ]|\\left|\\right|\\\(|\\\)|\\\[|\\\]|\\?\$|[£€]", "", text)
    text = text.replace("\u2212", "-").replace("{,}", ",").replace("\\%", "%")
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|°", "", text)
    text = re.sub(r"\\(?:text|mathrm|mbox)\s*\{([^{}]*)\}", r" \1", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(
        r"^([-+]?)\s*\\frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}", r"\1\2/\3", text.strip()
    )
    return text.strip().rstrip(".").strip()


def _as_text(text: str) -> str:
    squeezed = re.sub(r"\s+", "", _plain(text))
    return squeezed.casefold() if squeezed.isalpha() and len(squeezed) > 1 else squeezed


def is_hopeless_power(answer: str) -> bool:
    """Whether it holds a power with an exponent of 8 digits or more, written out or a power."""
    if _HUGE_EXPONENT.search(answer):
        return True
    for _, base, exponent in _TOWER.findall(answer):
        # base^exponent has about exponent * len(base) digits; a cheap upper bound is enough.
        if int(base) > 1 and (len(exponent) > 4 or int(exponent) * len(base) >= 8):
            return True
    return False
