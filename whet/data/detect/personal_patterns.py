"""The shapes of personal data in English and Korean text: one rule a kind of number or key, the surest first.

A rule is a pattern, a word that must stand before it where the shape alone could be anything (`near`), and a check of
the digits that gives the exact span. Rules look for ASCII: the caller folds full-width characters first.
Korean particles follow a number without a space, so that a border is "no digit, no Latin letter", never `\\b`.

Every pattern is linear in the text: repetitions are bounded, or what they may hold cannot start the next one.
Gives up: names and street addresses, which need a model; numbers that are read out in words; phone numbers in the
national form of other countries; e-mail addresses with letters beyond ASCII; company lines such as 1588-1234, which
identify no person and look like years; nine bare digits of a US passport without the word beside them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from whet.data.detect import personal_numbers as numbers

Kind = Literal[
    "secret", "email", "iban", "resident_number", "card", "ssn", "business_number", "driving_licence", "passport",
    "phone", "ip", "bank_account",
]  # fmt: skip
Span = tuple[int, int]
NEAR = 40


@dataclass(frozen=True, slots=True)
class Rule:
    """One kind of personal data and how to find it. near: pattern of the end of the 40 characters before; check: gives
    the span of the finding, None for a false alarm."""

    kind: Kind
    pattern: re.Pattern[str]
    check: Callable[[re.Match[str]], Span | None] | None = None
    near: re.Pattern[str] | None = None


_BEFORE = r"(?<![A-Za-z0-9_#])(?<!\d[.\-])"
_END = r"(?!\d)(?![.\-]\d)"  # a letter may follow: 010-1234-5678ext
_AFTER = r"(?![A-Za-z0-9_])(?![.\-]\d)"
_ENDINGS = (  # of mail domains, besides the two letters of a country
    " com net org edu gov mil int info biz name pro app dev xyz online shop site store tech cloud live page blog "
    "company academy email mail news media agency digital design studio group team work works life world today center "
    "global network systems software solutions services support school university club ventures capital finance bank "
    "health care clinic law legal museum aero coop jobs mobi travel asia kim art fun icu top vip wiki space website "
    "link zone land city seoul berlin london tokyo nyc paris example test invalid localhost "
)
_FILES = ("js", "ts")


def _shape(pattern: str, flags: int = 0) -> re.Pattern[str]:
    """Compile a pattern in which letters and digits are Latin ones: Korean may touch the finding."""
    return re.compile(pattern, re.ASCII | flags)


def _digits(text: str) -> str:
    return "".join(filter(str.isdigit, text))


def _email(match: re.Match[str]) -> Span | None:
    ending = match["end"].lower()
    country = len(ending) == 2 and ending not in _FILES and match["end"] in (ending, ending.upper())
    git = match["user"] == "git" and match.string[match.end() : match.end() + 1] in (":", "/")
    return match.span() if (country or f" {ending} " in _ENDINGS) and not git else None


def _iban(match: re.Match[str]) -> Span | None:
    """The span of as many characters as the country's numbers have: letters behind it may be the next word."""
    length = numbers.iban_length(match[1])
    if length is None:
        return None
    text, end, characters = match.string, match.start(), ""
    while len(characters) < length and end < len(text):
        character = text[end]
        if character.isascii() and character.isalnum():
            characters += character
        elif character not in " -" or text[end - 1] in " -":
            return None
        end += 1
    ends = not re.match(r"[A-Za-z0-9]", text[end : end + 1])
    return (match.start(), end) if ends and numbers.iban(characters) else None


def _resident(match: re.Match[str]) -> Span | None:
    """The span of a number with a right check digit; numbers that may have none need a recent date or a word."""
    digits = _digits(match[0])
    born = numbers.resident_date(digits)
    before = match.string[max(0, match.start() - 30) : match.start()]
    if born is None or "법인" in before:
        return None
    named = _RESIDENT_WORD.search(before) is not None
    if not match["sep"] and not named and (numbers.barcode(digits) or before.rstrip().endswith(tuple("=+*/×-"))):
        return None
    if numbers.resident(digits):
        return match.span()
    return match.span() if match["sep"] and (named or born >= numbers.NO_CHECK_DIGIT_FROM) else None


def _card(match: re.Match[str]) -> Span | None:
    digits = _digits(match[0])
    return match.span() if numbers.card(digits, grouped=len(digits) < len(match[0])) else None


def _ssn(match: re.Match[str]) -> Span | None:
    return match.span() if numbers.social_security(_digits(match[0])) else None


def _business(match: re.Match[str]) -> Span | None:
    return match.span() if numbers.business(_digits(match[0])) else None


def _phone(match: re.Match[str]) -> Span | None:
    """The whole match, unless it is a number in binary."""
    return match.span() if set(match[0]) - {"0", "1"} else None


def _international(match: re.Match[str]) -> Span | None:
    """The span of at most 13 digits, cut between groups, since another number may follow after a space."""
    groups = list(re.finditer(r"\d+", match[0]))
    total = [len(group[0]) for group in groups]
    while sum(total) > 13 and len(total) > 2:
        total.pop()
    alone = len(total) == 1
    small = sum(length == 1 for length in total[1:]) > 1
    if not (10 if alone else 9) <= sum(total) <= 13 or small or match[0].startswith(("+1", "+0")):
        return None
    return match.start(), match.start() + groups[len(total) - 1].end()


def _ipv4(match: re.Match[str]) -> Span | None:
    """The span of an address; four short numbers, perhaps a section or a version, need a word, a port or a net beside
    them."""
    if not numbers.ipv4(match[0]):
        return None
    text, start, end = match.string, match.start(), match.end()
    before = text[max(0, start - 24) : start]
    if _VERSION_WORD.search(before):
        return None
    short = len(match[0]) - 3 <= 6 and match[0].index(".") == 1
    known = _ADDRESS_WORD.search(before) or re.match(r"[:/]\d", text[end : end + 2])
    return None if short and not known else match.span()


def _ipv6(match: re.Match[str]) -> Span | None:
    text = match[0].rstrip(":") if not match[0].endswith("::") else match[0]
    return (match.start(), match.start() + len(text)) if numbers.ipv6(text) else None


def _changes(text: str) -> int:
    """Count the changes of the sort of character: words have hardly any, random strings one at every second step."""
    sorts = ["d" if c.isdigit() else "u" if c.isupper() else "l" if c.islower() else "o" for c in text]
    return sum(a != b for a, b in pairwise(sorts))


_STAND_IN = _shape(
    r"(?i)your|exam?ple_|placeholder|change.?me|dummy|redacted|x{4}|\*{3}|\.{3}|<|\$|%\(|environ|getenv|process\.env"
)


def _key(match: re.Match[str]) -> Span | None:
    """The whole match, unless it is a stand-in such as sk-xxxx."""
    return match.span() if len(set(match[0])) >= 10 and not _STAND_IN.search(match[0]) else None


def _account(match: re.Match[str]) -> Span | None:
    """The whole match, unless it is a date that runs into a number, or zeros."""
    dated = re.search(r"(?:19|20)\d\d-(?:0?[1-9]|1[0-2])-", match[0])
    return None if dated or set(match[0]) <= {"0", "-"} else match.span()


def _assigned(match: re.Match[str]) -> Span | None:
    """The span of an assigned secret: random characters for a key; letters with digits or signs for a password."""
    value, span = match["value"].rstrip(".?") or match["value"], match.span("value")
    span = (span[0], span[0] + len(value))
    if (
        not value.isascii()
        or "://" in value
        or _STAND_IN.search(value)
        or re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+", value)
    ):
        return None
    letters, digits = any(map(str.isalpha, value)), any(map(str.isdigit, value))
    if match["word"]:
        signs = not value.replace("-", "").replace("_", "").isalnum() and not value.startswith("/")
        return span if (letters and (digits or signs)) or (digits and match["quote"]) else None
    random = len(value) >= 16 and letters and digits and _changes(value) >= 5 and len(set(value)) >= 8
    return span if random and "/" not in value[:1] else None


def _in_address(match: re.Match[str]) -> Span | None:
    """The span of the password in scheme://user:password@host."""
    plain = {"password", "pass", "passwd", "pwd", "secret", "user", "username", "token"}
    return None if match[1].lower() in plain or _STAND_IN.search(match[1]) else match.span(1)


def _before(words: str) -> re.Pattern[str]:
    """A pattern of one of `words`, then few characters without a digit, then the number."""
    return _shape(rf"(?:{words})[^\d\n]{{0,14}}$", re.IGNORECASE)


_PHONE_WORD = _before(r"tel|phone|call(?:ing)?|mobile|cell|fax|whatsapp|text me|전화|연락처|핸드폰|휴대폰|팩스|문자")
_RESIDENT_WORD = _before(r"주민|외국인\s?등록|국내거소|resident|registration|rrn")
_VERSION_WORD = _shape(
    r"(?i)(?:(?:\bv|\bver|version|버전|release|릴리스|build|빌드|firmware|펌웨어|section|chapter|\brev)[^\d\n]{0,6}"
    r"|[A-Za-z][/-]|==|[~^<>]=?\s?)$"
)
_ADDRESS_WORD = _shape(
    r"(?i)(?:\bip\b|address|주소|server|서버|host|호스트|dns|ping|gateway|아이피|://|from)[^\d\n]{0,14}$"
)
_KOREAN_PHONE = rf"{_BEFORE}|(?<=tel)|(?<=Tel)|(?<=TEL)|(?<=HP)|(?<=hp)"
_SEP = r"(?: ?[-.] ?| )?"
_AREA = r"0(?:2|3[1-3]|4[1-4]|5[1-5]|6[1-4]|70|80|50[2-8])"
_KEY_KIND = "(?:[A-Z]{1,12} ){0,3}PRIVATE KEY(?: BLOCK)?"
_US_AREA = r"(?![2-7]00)[2-9][0-8]\d"
_REGION = "서울|부산|대구|인천|광주|대전|울산|경기|강원|충북|충남|전북|전남|경북|경남|제주"

_KEYS = (
    Rule(
        "secret",
        _shape(
            rf"-----BEGIN {_KEY_KIND}-----(?:(?:[A-Za-z0-9+/=\s\\:,.]|-(?!----)){{0,8192}}?-----END {_KEY_KIND}-----"
            r"|(?:(?:\s|\\n){0,4}[A-Za-z0-9+/=]{30,80}){0,200})"
        ),
    ),
    Rule("secret", _shape(r"(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}")),
    Rule(
        "secret",
        _shape(
            r"(?<![A-Za-z0-9_])(?:sk-(?=[\w-]{0,60}\d)[A-Za-z0-9_-]{20,200}|gh[pousr]_[A-Za-z0-9]{36,80}"
            r"|github_pat_[A-Za-z0-9_]{22,100}|hf_[A-Za-z0-9]{30,50}|(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Za-z])"
            r"|xox[abeprs]-[A-Za-z0-9-]{10,100}|AIza[0-9A-Za-z_-]{35}|glpat-[A-Za-z0-9_-]{20,40}|npm_[A-Za-z0-9]{36}"
            r"|pypi-AgE[A-Za-z0-9_-]{50,300}|[srp]k_(?:live|test)_[A-Za-z0-9]{16,100}|SG\.[\w-]{22}\.[\w-]{43}"
            r"|ya29\.[\w-]{30,200}|whsec_[A-Za-z0-9]{24,64}|\d{8,10}:AA[A-Za-z0-9_-]{33})"
        ),
        _key,
    ),
    Rule("secret", _shape(r"[A-Za-z][A-Za-z0-9+.-]{1,15}://[^\s:/@]{0,64}:([^\s:/@\[\]]{3,128})@"), _in_address),
    Rule(
        "secret",
        _shape(
            r"(?i)(?:api[_ -]?key|(?:secret|access|auth|private|signing|encryption)[_ -]?key|secret"
            r"|(?<!public)(?<!publickey)token|authorization|인증\s?키|토큰|시크릿|비밀\s?키"
            r"|(?P<word>passw(?:or)?d|passwd|passphrase|\bpwd|비밀번호|비번|패스워드))"
            r"[\"'`]?(?:\s{0,3}(?::|=>?|:=)\s{0,3}|\s?[은는]\s|\s(?:is|to)\s|\s{0,2}Bearer\s)"
            r"(?:Bearer\s)?(?P<quote>[\"'`]?)(?P<value>[^\s\"'`,;<>(){}\[\]]{8,200})"
        ),
        _assigned,
    ),
)
_MAIL = (
    Rule(
        "email",
        _shape(
            r"(?<![A-Za-z0-9._%+-])(?P<user>[A-Za-z0-9_%+-][A-Za-z0-9._%+-]{0,63})"
            r"(?:@| ?[(\[] ?(?:at|AT|골뱅이) ?[)\]] ?)"
            r"(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,6}(?P<end>[A-Za-z]{2,24})(?![A-Za-z0-9(-])"
        ),
        _email,
    ),
)
_NUMBERS = (
    Rule("iban", _shape(r"(?<![A-Za-z0-9])([A-Z]{2})\d{2}(?=[ -]?[A-Z0-9]{4})"), _iban),
    Rule(
        "card",
        _shape(
            rf"{_BEFORE}(?:\d{{4}}([ -]?)\d{{4}}\1\d{{4}}\1\d{{4}}(?:\1\d{{1,3}})?|3\d{{3}}([ -]?)\d{{6}}\2\d{{4,5}})"
            rf"{_AFTER}"
        ),
        _card,
    ),
    Rule("resident_number", _shape(rf"{_BEFORE}\d{{6}}(?P<sep> ?- ?| )?[1-8]\d{{6}}{_AFTER}"), _resident),
    Rule("driving_licence", _shape(rf"{_BEFORE}(?:1[1-9]|2[0-8])-\d{{2}}-\d{{6}}-\d{{2}}{_AFTER}")),
    Rule("driving_licence", _shape(rf"{_BEFORE}\d{{2}}-\d{{6}}-\d{{2}}{_AFTER}"), None, _shape(rf"(?:{_REGION}) ?$")),
    Rule("ssn", _shape(rf"{_BEFORE}\d{{3}}-\d{{2}}-\d{{4}}{_AFTER}"), _ssn),
    Rule("ssn", _shape(rf"{_BEFORE}\d{{3}} ?\d{{2}} ?\d{{4}}{_AFTER}"), _ssn, _before(r"ssn|social security")),
    Rule("business_number", _shape(rf"{_BEFORE}\d{{3}}-\d{{2}}-\d{{5}}{_AFTER}"), _business),
    Rule("business_number", _shape(rf"{_BEFORE}\d{{10}}{_AFTER}"), _business, _before("사업자")),
    Rule(
        "passport",
        _shape(r"(?<![A-Za-z0-9])[A-Z](?:\d{8}|\d{3}[A-Z]\d{4})(?![A-Za-z0-9])"),
        None,
        _before("여권|passport"),
    ),
    Rule("passport", _shape(rf"{_BEFORE}\d{{9}}{_AFTER}"), None, _before("passport")),
    Rule(
        "phone",
        _shape(
            rf"(?:{_KOREAN_PHONE})(?:(?:\+|00)82[-. )]{{0,2}}(?:\(0\)|0)?|82[- ]|\(0(?=\d\d\))|0)"
            rf"(?:10\)?{_SEP}\d{{4}}{_SEP}\d{{4}}|1[16789]\)?{_SEP}\d{{3,4}}{_SEP}\d{{4}}){_END}"
        ),
        _phone,
    ),
    Rule(
        "phone",
        _shape(rf"(?:{_KOREAN_PHONE})(?:\({_AREA}\) ?|{_AREA}[)-] ?|{_AREA}\.)[1-9]\d{{2,3}} ?[-.] ?\d{{4}}{_END}"),
    ),
    Rule("phone", _shape(rf"{_BEFORE}{_AREA}{_SEP}[1-9]\d{{2,3}}{_SEP}\d{{4}}{_END}"), None, _PHONE_WORD),
    Rule(
        "phone",
        _shape(
            rf"{_BEFORE}(?:\+?\(?\+?1\)?[-. ]?)?(?:\({_US_AREA}\)[ -]?|{_US_AREA}[-.])[2-9]\d{{2}}[-. ]\d{{4}}"
            rf"{_END}"
        ),
    ),
    Rule("phone", _shape(rf"{_BEFORE}\+1[-. ]?{_US_AREA}[-. ]?[2-9]\d{{2}}[-. ]?\d{{4}}{_END}")),
    Rule("phone", _shape(rf"{_BEFORE}(?:1[-. ])?{_US_AREA} ?[2-9]\d{{2}} ?\d{{4}}{_AFTER}"), None, _PHONE_WORD),
    Rule("phone", _shape(r"(?<![\w+])\+[1-9]\d?(?:[ .\-()]{0,2}\d){7,16}+(?![A-Za-z0-9_%])"), _international),
)
_ADDRESSES = (
    Rule("ip", _shape(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?!\w)(?!-[A-Za-z])(?!\.\w)"), _ipv4),
    Rule("ip", _shape(r"(?<![\w:.])[0-9A-Fa-f]{4}:(?:[0-9A-Fa-f]{0,4}:){1,7}[0-9A-Fa-f]{0,4}(?![\w:])"), _ipv6),
)
_ACCOUNTS = (
    Rule("bank_account", _shape(rf"{_BEFORE}(?=(?:\d-?){{10,14}}(?![\d-]))\d{{2,6}}(?:-\d{{1,7}}){{1,4}}{_AFTER}"),
         _account, _before("계좌|입금|송금|은행|뱅크|농협|신협|수협|우체국|새마을금고|account|acct")),
    Rule("bank_account", _shape(rf"{_BEFORE}\d{{8,14}}{_AFTER}"), None,
         _before("계좌|bank account|account (?:number|no\\.?)|routing number|(?:checking|savings) account")),
)  # fmt: skip

_NUMBER = _shape(r"\d(?:[ .()-]{0,3}\d){6}|[A-Z]\d{3}[A-Z]\d{4}")
# A pattern for all texts that the rules of a group can match: one search instead of many. The surest group first.
GROUPS: tuple[tuple[re.Pattern[str], tuple[Rule, ...]], ...] = (
    (_shape(
        r"[Kk]ey|KEY|oken|OKEN|ecret|ECRET|assw|ASSW|assphrase|pwd|PWD|uthoriz|비밀|비번|패스워드|인증|토큰|시크릿"
        r"|://[^\s/]*:|sk-|gh[pousr]_|github_pat|hf_|AKIA|ASIA|xox|AIza|glpat|npm_|pypi-|k_live|k_test|eyJ|PRIVATE KEY"
        r"|ya29|SG\.|whsec|:AA"), _KEYS),
    (_shape(r"@|[\[(] ?(?:at|AT|골뱅이)"), _MAIL),
    (_NUMBER, _NUMBERS),
    (_shape(r"\d\.\d{1,3}\.\d{1,3}\.\d|[0-9A-Fa-f]{4}:[0-9A-Fa-f]{0,4}:"), _ADDRESSES),
    (_NUMBER, _ACCOUNTS),
)  # fmt: skip
