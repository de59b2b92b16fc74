"""Personal data and secrets in texts: patterns, and checksums where the kind has one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal, get_args

__all__ = ["PII_KINDS", "PersonalData", "PiiKind", "find_pii"]

PiiKind = Literal["api_key", "iban", "resident_number", "card", "phone", "email"]
"""What is looked for."""

PII_KINDS: tuple[PiiKind, ...] = get_args(PiiKind)
"""All kinds; where two match the same characters, the earlier one names them."""

_DASHES = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212"), "-")

# Domains that RFC 2606 and RFC 6761 reserve for examples belong to nobody.
_EMAIL = re.compile(
    r"(?<![\w.+-])[a-z0-9][\w.+-]{0,63}@(?P<domain>(?:[a-z0-9-]+\.)+[a-z]{2,})(?![\w-])",
    re.IGNORECASE | re.ASCII,
)
_RESERVED_DOMAIN = re.compile(
    r"(?:.*\.)?example\.(?:com|net|org)|.*\.(?:example|test|invalid|localhost)", re.IGNORECASE
)

# A run of digits beside an operator is arithmetic.
_NO_SUM_BEFORE = r"(?<![\w.,+*/^=-])(?<![\d+*/^=-] )"
_NO_SUM_AFTER = r"(?![\w]|[.,]\d| ?[-+*/^=])"
_PHONES = tuple(
    re.compile(pattern, re.ASCII)  # a Korean particle may follow a number without a space
    for pattern in (
        # Korea: mobile numbers, then land lines, which need their separators. No sum begins with 0.
        r"(?<![\w.,-])01[016789][-. ]?\d{3,4}[-. ]?\d{4}(?!\w)",
        r"(?<![\w.,-])\(?0(?:2|3[1-3]|4[1-4]|5[1-5]|6[1-4]|70)[-). ]{1,2}\d{3,4}[-. ]\d{4}(?!\w)",
        # North America: area and exchange begin with 2 to 9.
        rf"{_NO_SUM_BEFORE}(?:\([2-9]\d\d\) ?|[2-9]\d\d(?P<gap>[-.]))"
        rf"[2-9]\d\d(?(gap)(?P=gap)|[-. ])\d{{4}}{_NO_SUM_AFTER}",
        # International form: plus, country, 8 to 15 digits in all; after a term it is a sum.
        r"(?<![\w.)\]}=+*/-])(?<![\d)\]}=] )"
        rf"\+[1-9]\d{{0,2}}(?:[-. ]?\(0\))?(?:[-. ]?\(?\d{{1,4}}\)?){{2,5}}{_NO_SUM_AFTER}",
    )
)
_FICTIONAL_PHONE = re.compile(r"55501\d\d$")

_CARD = re.compile(
    r"(?<![\d.,])(?:\d{13,19}|\d{4}(?P<gap>[- ])\d{4}(?P=gap)\d{4}(?P=gap)\d{1,7}"
    r"|\d{4}(?P<wide>[- ])\d{6}(?P=wide)\d{4,5})(?!\d|[.,]\d)"
)
# Number ranges of networks: Visa, Mastercard, American Express, Discover, JCB, Diners, UnionPay.
_NETWORKS = re.compile(
    r"4\d{12}(?:\d{3}){0,2}"
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}"
    r"|3(?:0[0-5]|[68]\d)\d{11}|62\d{14,17}"
)

_RESIDENT = re.compile(r"(?<![\d.,])(?P<birth>\d{6})(?P<gap>[- ]?)(?P<rest>\d{7})(?!\d|[.,]\d)")
_RANDOM_SINCE = date(2020, 10, 5)
"""Resident numbers given since then have a random end without a check digit."""

_IBAN_START = re.compile(r"(?<![A-Z0-9])(?P<country>[A-Z]{2})\d{2}(?= ?[A-Z0-9])")
# fmt: off
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28,
    "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23,
    "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24,
    "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24,
    "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}
# fmt: on

# Prefixes that the issuers put before their keys, so that they can be found.
_API_KEY = re.compile(
    r"(?<![\w-])(?:"
    r"sk-(?=[\w-]*\d)[A-Za-z0-9_-]{20,}|[srp]k_(?:live|test)_[A-Za-z0-9]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{22,}"
    r"|glpat-[\w-]{20,}|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[\w-]{35}|hf_[A-Za-z0-9]{30,}"
    r"|npm_[A-Za-z0-9]{36}|pypi-[\w-]{40,}"
    r"|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]{16,}"
    r")(?![\w-])|-----BEGIN [A-Z ]*PRIVATE KEY-----",
    re.ASCII,
)


@dataclass(frozen=True, kw_only=True)
class PersonalData:
    """Something personal or secret; the excerpt shows only its ends, so that reports hold none."""

    kind: PiiKind
    excerpt: str


def find_pii(text: str, kinds: Sequence[PiiKind] = PII_KINDS) -> list[PersonalData]:
    """What a text holds of e-mail addresses, phone, card, account and resident numbers, and keys.

    Compatibility forms (full-width digits) and dashes count as their plain forms. Cards pass
    Luhn's check and lie in a network's range; account numbers (IBAN) have their country's length
    and remainder 1 modulo 97; Korean resident numbers begin with a date and have their check digit,
    or a birth date from 2020-10-05 on and a hyphen, as those have no check digit.

    Not found: names, postal addresses, numbers spelled in words. Addresses at domains reserved for
    examples and 555-01xx numbers are nobody's and are left alone.

    Args:
        text: any.
        kinds: what to look for.

    Returns:
        Finds in the order of `PII_KINDS`, then of the text; no character counts twice.
    """
    plain = unicodedata.normalize("NFKC", text).translate(_DASHES)
    found: list[PersonalData] = []
    taken: list[tuple[int, int]] = []
    for kind in PII_KINDS:
        if kind not in kinds:
            continue
        for start, end in _FINDERS[kind](plain):
            if all(end <= first or last <= start for first, last in taken):
                taken.append((start, end))
                found.append(PersonalData(kind=kind, excerpt=_masked(plain[start:end])))
    return found


def _emails(text: str) -> Iterator[tuple[int, int]]:
    for match in _EMAIL.finditer(text):
        if not _RESERVED_DOMAIN.fullmatch(match["domain"]):
            yield match.span()


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for pattern in _PHONES:
        for match in pattern.finditer(text):
            digits = _digits(match[0])
            if 8 <= len(digits) <= 15 and not _FICTIONAL_PHONE.search(digits):
                yield match.span()


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in _CARD.finditer(text):
        digits = _digits(match[0])
        if _NETWORKS.fullmatch(digits) and _passes_luhn(digits):
            yield match.span()


def _passes_luhn(digits: str) -> bool:
    """Every second digit from the right doubled, its own digits added; the sum ends in 0."""
    doubled = sum(sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (doubled + sum(map(int, digits[-1::-2]))) % 10 == 0


def _resident_numbers(text: str) -> Iterator[tuple[int, int]]:
    for match in _RESIDENT.finditer(text):
        born = _birth_date(match["birth"], match["rest"][0])
        if born is None:
            continue
        has_check_digit = _passes_resident_check(match["birth"] + match["rest"])
        if has_check_digit or (match["gap"] == "-" and born >= _RANDOM_SINCE):
            yield match.span()


def _birth_date(digits: str, kind: str) -> date | None:
    """The date that a resident number begins with; its seventh digit says the century."""
    century = {"9": 1800, "0": 1800, "1": 1900, "2": 1900, "5": 1900, "6": 1900}.get(kind, 2000)
    try:
        return date(century + int(digits[:2]), int(digits[2:4]), int(digits[4:]))
    except ValueError:
        return None


def _passes_resident_check(digits: str) -> bool:
    """11 minus the weighted sum modulo 11, last digit of it; foreigners' numbers begin at 13."""
    weights = (2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 5)
    weighted = sum(int(d) * w for d, w in zip(digits[:12], weights, strict=True))
    start = 13 if digits[6] in "5678" else 11
    return (start - weighted % 11) % 10 == int(digits[12])


def _ibans(text: str) -> Iterator[tuple[int, int]]:
    for match in _IBAN_START.finditer(text):
        length = _IBAN_LENGTHS.get(match["country"])
        if length is None:
            continue
        rest = re.compile(rf"(?: ?[A-Z0-9]){{{length - 4}}}(?![A-Za-z0-9])").match(
            text, match.end()
        )
        if rest and _passes_iban_check((match[0] + rest[0]).replace(" ", "")):
            yield match.start(), rest.end()


def _passes_iban_check(account: str) -> bool:
    """ISO 7064 MOD 97-10, with the first four characters moved to the end and A = 10 to Z = 35."""
    return int("".join(str(int(sign, 36)) for sign in account[4:] + account[:4])) % 97 == 1


def _api_keys(text: str) -> Iterator[tuple[int, int]]:
    return (match.span() for match in _API_KEY.finditer(text))


def _digits(text: str) -> str:
    return "".join(sign for sign in text if sign.isdigit())


def _masked(text: str) -> str:
    return f"{text[:2]}...{text[-2:]}"


_FINDERS: dict[PiiKind, Callable[[str], Iterator[tuple[int, int]]]] = {
    "api_key": _api_keys,
    "iban": _ibans,
    "resident_number": _resident_numbers,
    "card": _cards,
    "phone": _phones,
    "email": _emails,
}
