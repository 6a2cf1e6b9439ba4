"""Check digits and number plans, which tell a card, account or resident number from digits that only look like one.

Plain arithmetic from the public definitions: ISO/IEC 7812-1 (Luhn), ISO 13616 (IBAN, mod 97), the Korean resident
registration rules and those of the Korean tax service, the US Social Security Administration's list of numbers that
are never issued. Every function takes digits as a string and answers yes or no; none raises.

Korean resident numbers that were first issued since October 2020 end in random digits, so they have no check digit.
`resident_date` alone can be asked of them.
"""

from __future__ import annotations

import ipaddress
from datetime import date

# Birth years beyond it are typing errors. A constant, since the same file must give the same findings next year.
LAST_BIRTH_YEAR = 2039
NO_CHECK_DIGIT_FROM = date(2020, 10, 1)

_IBAN_LENGTHS = {
    code: length
    for length, codes in {
        15: "NO", 16: "BE", 18: "DK FI FK FO GL NL SD", 19: "MK SI", 20: "AT BA EE KZ LT LU MN XK",
        21: "CH HR LI LV", 22: "BG BH CR DE GB GE IE ME RS VA", 23: "AE GI IL IQ OM SO TL",
        24: "AD CZ ES MD PK RO SA SE SK TN VG", 25: "LY PT ST", 26: "IS TR", 27: "BI DJ FR GR IT MC MR SM",
        28: "AL AZ BY CY DO GT HU LB NI PL SV", 29: "BR EG PS QA UA", 30: "JO KW MU", 31: "MT SC", 32: "LC", 33: "RU",
    }.items()
    for code in codes.split()
}  # fmt: skip
_CARD_PREFIXES = (  # first and last prefix, lengths
    ("4", "4", (16, 19)),
    ("51", "55", (16,)),
    ("2221", "2720", (16,)),
    ("34", "34", (15,)),
    ("37", "37", (15,)),
    ("6011", "6011", (16, 19)),
    ("644", "649", (16, 19)),
    ("65", "65", (16, 19)),
    ("3528", "3589", (16, 19)),
    ("62", "62", (16, 17, 18, 19)),
    ("36", "36", (14,)),
    ("38", "39", (14,)),
    ("300", "305", (14,)),
)
_KOREAN_CARD = ("94", "94", (16,))  # cards that work in Korea alone


def luhn(digits: str) -> bool:
    """True if the last digit is right by ISO/IEC 7812-1."""
    total = 0
    for index, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + index % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def card(digits: str, *, grouped: bool) -> bool:
    """True if an issuer has such a prefix and length and the last digit is right. grouped: written in groups."""
    plans = (*_CARD_PREFIXES, _KOREAN_CARD) if grouped else _CARD_PREFIXES
    fits = any(
        len(digits) in lengths and low <= digits[: len(low)] <= high
        for low, high, lengths in plans
        if grouped or 14 not in lengths
    )
    return fits and len(set(digits)) > 1 and luhn(digits)


def iban_length(country: str) -> int | None:
    """Characters of an IBAN of the country with this two-letter code, None where there are none."""
    return _IBAN_LENGTHS.get(country)


def iban(text: str) -> bool:
    """True if `text` (letters and digits, no spaces) has the length of its country and is 1 modulo 97."""
    if len(text) != _IBAN_LENGTHS.get(text[:2]) or not (text.isascii() and text.isalnum()):
        return False
    return int("".join(str(int(c, 36)) for c in text[4:] + text[:4])) % 97 == 1


def resident_date(digits: str) -> date | None:
    """Birth date in a 13-digit resident registration number, None where there is no such day."""
    century = {"1": 1900, "2": 1900, "5": 1900, "6": 1900, "3": 2000, "4": 2000, "7": 2000, "8": 2000}.get(digits[6])
    if century is None:
        return None
    year, month, day = century + int(digits[:2]), int(digits[2:4]), int(digits[4:6])
    try:
        return date(year, month, day) if year <= LAST_BIRTH_YEAR else None
    except ValueError:
        return None


def resident(digits: str) -> bool:
    """True if the check digit of a resident registration number is right; foreigners' numbers (5 to 8) differ by 2."""
    total = sum(int(digit) * weight for digit, weight in zip(digits[:12], (*range(2, 10), *range(2, 6)), strict=True))
    base = 13 if digits[6] in "5678" else 11
    return (base - total % 11) % 10 == int(digits[12])


def barcode(digits: str) -> bool:
    """True if 13 digits are a Korean article number (EAN-13 from 880), many of which begin like a date."""
    total = sum(int(digit) * (1 + 2 * (index % 2)) for index, digit in enumerate(digits))
    return digits.startswith("880") and total % 10 == 0


def business(digits: str) -> bool:
    """True if the check digit of a ten-digit Korean business registration number is right."""
    total = sum(int(d) * w for d, w in zip(digits[:9], (1, 3, 7, 1, 3, 7, 1, 3, 5), strict=True))
    total += int(digits[8]) * 5 // 10
    return int(digits[0]) > 0 and (10 - total % 10) % 10 == int(digits[9])


def social_security(digits: str) -> bool:
    """True if a US social security number could have been issued: no 000, 666 or 9xx, no 00, no 0000."""
    return digits[:3] not in ("000", "666") and digits[0] != "9" and digits[3:5] != "00" and digits[5:] != "0000"


def ipv4(text: str) -> bool:
    """True for the address of a host: not a net mask, not this machine, not a multicast group."""
    parts = text.split(".")
    if any(int(part) > 255 or (len(part) > 1 and part[0] == "0") for part in parts):
        return False
    return 0 < int(parts[0]) < 224 and parts[0] != "127"


def ipv6(text: str) -> bool:
    """True for a global, unique local or link-local address that is not just a net."""
    try:
        address = ipaddress.IPv6Address(text)
    except ValueError:
        return False
    head = int(address) >> 112
    known = 0x2000 <= head < 0x4000 or 0xFC00 <= head < 0xFE00 or 0xFE80 <= head < 0xFEC0
    return known and int(address) & ((1 << 64) - 1) != 0
