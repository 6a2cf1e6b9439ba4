"""Builds the pre-training corpus of the built-in model from four public sources.

What: reads `en_gutenberg`, `ko_judgments`, `ko_reviews` and `ko_technical` (`.jsonl.xz`) from a
source folder, cleans them, cuts them into coherent passages, adds generated instruction-shaped
conversations, and writes `train.jsonl.xz` and `heldout.jsonl.xz` with {"text", "source"} lines.

Why: a model that is published must not learn people or abuse, and its held-out loss means
something only when no source document lies on both sides. Documents, not passages, are held out.

Sources: Project Gutenberg books (US public domain), Korean court judgments (public works),
e9t/nsmc raw reviews outside its splits (CC0), Microsoft Visual Studio documentation in Korean
(CC-BY-4.0, https://github.com/MicrosoftDocs/visualstudio-docs.ko-kr).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import instructions

HERE = Path(__file__).resolve().parent
MARKERS = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
PASSAGE_LIMIT = {"en_gutenberg": 2000, "ko_judgments": 1000, "ko_technical": 1000}
ROLES, NO_NAMES, GIVEN, SURNAMES = (
    "|".join(line.split()).replace("_", " ")
    for line in (HERE / "judgment_words.txt").read_text(encoding="utf-8").splitlines()[1:]
)


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows of an xz-compressed JSON-lines file, one at a time."""
    with lzma.open(path, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def stable_hash(text: str) -> int:
    """A 64-bit hash that is the same in every process and on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big")


def is_held_out(document_key: str) -> bool:
    """Whether a source document belongs to the held-out hundredth."""
    return stable_hash("heldout:" + document_key) % 100 == 0


def read_abuse() -> tuple[re.Pattern[str], frozenset[str]]:
    """The abuse list: Hangul as one pattern of substrings, Latin as whole lower-case words."""
    lines = (HERE / "abuse_words.txt").read_text(encoding="utf-8").splitlines()
    words = [word for line in lines if not line.startswith("#") for word in line.split()]
    hangul = [word for word in words if not word.isascii()]
    spaced = [r"[^가-힣ㄱ-ㅎ]{1,3}".join(word) for word in hangul if len(word) in (2, 3)]
    isolated = "(?<![가-힣])(?:" + "|".join(spaced) + ")(?![가-힣])"
    return re.compile("|".join([*map(re.escape, hangul), isolated])), frozenset(words)


HANGUL_ABUSE, LATIN_ABUSE = read_abuse()


def is_abusive(text: str) -> bool:
    """Whether a text holds a word of the abuse list."""
    if not LATIN_ABUSE.isdisjoint(re.findall(r"[a-z\-]+", text.lower())):
        return True
    return not text.isascii() and HANGUL_ABUSE.search(text) is not None


def split_sentences(paragraph: str, limit: int) -> list[str]:
    """Cuts a paragraph that is longer than the limit at sentence ends."""
    pieces, current = [], ""
    for sentence in re.split(r'(?<=[.!?]["\')])\s+|(?<=[.!?])\s+', paragraph):
        if current and len(current) + len(sentence) + 1 > limit:
            pieces.append(current)
            current = ""
        current = f"{current} {sentence}" if current else sentence
    return [piece for piece in [*pieces, current] if piece and len(piece) <= 2 * limit]


def to_passages(paragraphs: Iterable[str | None], limit: int, joint: str) -> Iterator[str]:
    """Groups paragraphs into passages of at most `limit` characters; None forces a break."""
    current: list[str] = []
    size = 0
    for paragraph in paragraphs:
        if paragraph is None:
            pieces: list[str | None] = [None]
        else:
            pieces = [*split_sentences(paragraph, limit)] if len(paragraph) > limit else [paragraph]
        for piece in pieces:
            if current and (piece is None or size + len(piece) + len(joint) > limit):
                yield joint.join(current)
                current, size = [], 0
            if piece is not None:
                current.append(piece)
                size += len(piece) + len(joint)
    if current:
        yield joint.join(current)


def without_repeats(paragraphs: Iterable[str | None], seen: set[int]) -> Iterator[str | None]:
    """Replaces a long paragraph that the source already had by a break."""
    for paragraph in paragraphs:
        if paragraph is None or len(paragraph) < 80:
            yield paragraph
            continue
        key = stable_hash(paragraph)
        yield None if key in seen else paragraph
        seen.add(key)


QUOTES = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "…": "...", "\u00a0": " "})
BOILERPLATE = re.compile(
    r"gutenberg|transcriber|etext|e-text|proofread|copyright|all rights reserved|"
    r"publish(?:ed|ers) by|\bprinted (?:in|by)\b|illustrat(?:ed|ions) by|electronic (?:text|work)|"
    r"archive\.org|www\.|https?:|first edition|frontispiece",
    re.IGNORECASE,
)
COMMON_ENGLISH = """the and of to a in was he that it his i you for with as had at on her she is be
not but they said him all have my so were this me we there from or what when out up one if no"""
ENGLISH_WORDS = frozenset(COMMON_ENGLISH.split())


def is_english_prose(paragraph: str) -> bool:
    """Whether a paragraph reads as running English text (no contents list, no other tongue)."""
    words = re.findall(r"[a-z']+", paragraph.lower())
    if not words or not re.search(r"""[.!?,;:"'\-]\)?$""", paragraph):
        return False
    if sum(character.isdigit() for character in paragraph) > 0.08 * len(paragraph):
        return False
    if sum(character.isalpha() and not character.isascii() for character in paragraph) > (0.02 * len(paragraph)):
        return False
    common = sum(word in ENGLISH_WORDS for word in words)
    return len(words) < 12 or common >= 0.25 * len(words)


def clean_book(text: str) -> Iterator[str | None]:
    """Paragraphs of a book; None where a chapter, a note or something dropped breaks the text."""
    text = unicodedata.normalize("NFC", text).translate(QUOTES)
    text = re.sub(r"\[(?:Illustration|Footnote|Sidenote)[^\]]*\]", "", text)
    text = re.sub(r"\[\w{1,3}\]|\{\w{1,4}\}|\*+|_|~|={2,}", "", text)
    story_began = False
    for block in re.split(r"\n\s*\n", text):
        lines = [re.sub(r"\s+", " ", line).strip() for line in block.strip().split("\n")]
        verse = len(lines) > 1 and max(map(len, lines)) < 50
        paragraph = ("\n" if verse else " ").join(line for line in lines if line)
        letters = [character for character in paragraph if character.isalpha()]
        shouting = sum(map(str.isupper, letters)) > 0.5 * len(letters)
        bad = shouting or BOILERPLATE.search(paragraph) or is_abusive(paragraph)
        if not paragraph or bad or not is_english_prose(paragraph):
            yield None
            continue
        story_began = story_began or len(paragraph) > 250
        yield paragraph if story_began else None


KEPT_SECTIONS = re.compile(r"이유|무죄부분|판시사항|판결요지|결정요지|쟁점")
NAMED_ROLE = re.compile(
    rf"(?<![가-힣])(?:{ROLES})(?:인|들|의)?\s*[:(]?\s*[{SURNAMES}][가-힣]{{1,2}}"
    r"(?=[은는이가을를의과와도에,.()·\s’]|$)"
)
NAME_THEN_TITLE = re.compile(
    rf"(?<![가-힣])[{SURNAMES}][가-힣]{{1,2}}\s?(?:씨|님|군|양|여사|의원|대통령|장관|교수|기자|대법관|판사|검사|"
    r"변호사|회장|사장|대표|위원장|박사|선생)(?![가-힣]{3})"
)
PERSONAL = re.compile(
    r"\d{6}-\d|주민등록번호|생년월일|\d{4}\.? ?\d{1,2}\. ?\d{1,2}\. ?생|\d{2,3}-\d{3,4}-\d{4}|"
    r"(?:시|군|구|읍|면|동|리|로|길) (?:산 ?)?\d+(?:-\d+)?(?:번지|호| 대| 전| 답|\b)|"
    r"@|법무법인|담당변호사|소송대리인|관여 (?:대)?법관|생략\)|"
    r"[가-힣]{2,4}\((?:기소|공판|재판장|주심)\)"
)
SENSITIVE = re.compile(
    "강간|간음|추행|음란|성교|성매매|유사성행위|성기|성관계|성폭|성적 |살해|자살|시체|사체|"
    "이승만|박정희|전두환|노태우|김영삼|김대중|노무현|이명박|박근혜|문재인|윤석열|이재명|김일성|김정일"
)
FULL_NAME = re.compile(
    rf"(?<![가-힣])[{SURNAMES}][{GIVEN}]{{2}}"
    "(?=(?:은|는|이|가|의|에|에게서?|을|를|과|와|도|만|측|으?로부터|이?가|이는|씨)?(?![가-힣]))"
)
NOT_NAMES = re.compile(rf"(?<![가-힣])(?:{ROLES})\s*(?:{NO_NAMES})")


def judgment_sections(text: str) -> Iterator[str]:
    """The running reasoning of a judgment: its headnotes and its grounds, no parties, no orders."""
    head, _, body = text.partition("판례내용")
    if body:
        parts = re.split(r"\n(판시사항|판결요지|결정요지|참조조문|참조판례)\n", head)
        for name, content in zip(parts[1::2], parts[2::2], strict=True):
            if KEPT_SECTIONS.search(name):
                yield content
    parts = re.split(r"【([^】]{1,40})】", body or text)
    for name, content in zip(parts[1::2], parts[2::2], strict=True):
        if KEPT_SECTIONS.search(name.replace(" ", "")):
            yield content


def names_a_person(line: str) -> bool:
    """Whether a line of a judgment names a person, an address, or what a model need not learn."""
    if PERSONAL.search(line) or SENSITIVE.search(line) or NAME_THEN_TITLE.search(line):
        return True
    return any(not NOT_NAMES.match(line, match.start()) for match in NAMED_ROLE.finditer(line))


def clean_judgment(text: str) -> Iterator[str | None]:
    """Paragraphs of reasoning; a line with a name, an address or a list of figures is a break."""
    for section in judgment_sections(unicodedata.normalize("NFC", text)):
        for line in section.split("\n"):
            line = re.sub(r"\s+", " ", line).strip()
            hangul = len(re.findall("[가-힣]", line))
            complete = re.search(r"[.)다음부]['\"’”]?$", line)
            if hangul < max(20, 0.45 * len(line)) or not complete or names_a_person(line):
                yield None
            else:
                yield line
        yield None


def clean_technical(text: str) -> Iterator[str | None]:
    """Prose of a Markdown page: code, tables, directives, links and marks are taken out."""
    text = unicodedata.normalize("NFC", text)
    text = re.sub(r"(?s)```.*?(?:```|$)|~~~.*?~~~|<!--.*?-->", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"<[^>\n]{1,200}>|\*\*|`|^>+ ?|!INCLUDE\[[^\]]*\]|\[!\w+\]", "", text, flags=re.M)
    text = re.sub(r"\\([_*\-#<>])", r"\1", text)
    for line in text.split("\n"):
        line = re.sub(r"%2A|https?://\S+|(?<!\S)\*(?=\S)|(?<=\S)\*(?!\S)", "", line)
        line = re.sub(r"\s+", " ", line).strip()
        heading = line.startswith("#")
        line = line.lstrip("#> ").strip()
        hangul = len(re.findall("[가-힣]", line))
        if line in ("참조", "참고 항목", "관련 항목", "추가 정보", "다음 단계"):
            yield None
        elif heading and hangul:
            yield None
            yield line
        elif line.startswith(("|", ":::", "{")) or not re.search(r"[.:다요?!)]$", line):
            continue
        elif hangul >= max(8, 0.3 * len(line)):
            yield line


NAME_CONTEXT = re.compile(
    rf"(?<![가-힣])([{SURNAMES}][가-힣]{{2}}) ?"
    "(?:배우|감독|씨|님|형|누나|언니|오빠|작가|연기|주연|출연|팬)"
)
ENDINGS = frozenset("의은는이가을를과와도한된인에로나게서고지며면다요네데야들만랑라니던할함적")
COMMON_WORDS = frozenset((HERE / "not_names.txt").read_text(encoding="utf-8").split())
TITLED_NAME = re.compile(
    r"(?<![가-힣])[가-힣]{2,4} ?(?:배우|감독|씨|님|작가|옹)(?:님|의|이|은|는|도|\s|$)|"
    rf"(?:배우|감독|주연|가수|작가|아역) ?[{SURNAMES}][가-힣]{{2}}(?![가-힣]{{2}})"
)


def find_names(rows: list[dict]) -> frozenset[str]:
    """Three-syllable words with a surname that stand before a title or `acting`.

    Twice is enough; once only for a rare word that does not end like an inflected one."""
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(NAME_CONTEXT.findall(row["text"]))
    once = {name for name, n in counts.items() if n == 1 and name[-1] not in ENDINGS}
    windows = (row["text"][i : i + 3] for row in rows for i in range(len(row["text"]) - 2))
    everywhere = Counter(window for window in windows if window in once)
    names = {name for name in once if everywhere[name] <= 60}
    names.update(name for name, n in counts.items() if n >= 2)
    return frozenset(names - COMMON_WORDS)


def clean_review(row: dict, names: frozenset[str]) -> str | None:
    """The review, or None if it is abusive, names people, or says too little."""
    text = unicodedata.normalize("NFC", row["text"])
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"([ㄱ-ㅎㅏ-ㅣ!?~^♥★☆;,])\1{2,}", r"\1\1\1", text)
    text = re.sub(r"(\.)\.{3,}|(.)\2{4,}", lambda run: 3 * run[0][0], text)
    if len(text) < 10 or (row["rating"] <= 3 and len(text) < 25):
        return None
    if len(re.findall("[가-힣]", text)) < 0.5 * len(text) or is_abusive(text):
        return None
    if SENSITIVE.search(text) or TITLED_NAME.search(text) or re.search("http|www|@", text):
        return None
    windows = (text[i : i + 3] for i in range(len(text) - 2))
    return None if any(window in names for window in windows) else text


CLEANERS = {"en_gutenberg": clean_book, "ko_judgments": clean_judgment, "ko_technical": clean_technical}
JOINTS = {"en_gutenberg": "\n\n", "ko_judgments": "\n", "ko_technical": "\n"}


def choose_books(rows: list[dict], byte_budget: int) -> list[dict]:
    """Whole books in a stable shuffled order until the budget of bytes is reached."""
    chosen, total = [], 0
    for row in sorted(rows, key=lambda row: stable_hash(row["title"] + row["author"])):
        if "abridged" in row["title"].lower() or total >= byte_budget:
            continue
        chosen.append(row)
        total += len(row["text"].encode("utf-8"))
    return chosen


def rare_names(rows: list[dict]) -> frozenset[str]:
    """Words built like a full name that at most three judgments use: mostly names."""
    counts: Counter[str] = Counter()
    for row in rows:
        lines = "\n".join(filter(None, clean_judgment(row["text"])))
        counts.update(set(FULL_NAME.findall(lines)))
    return frozenset(name for name, n in counts.items() if n <= 3)


def document_passages(source: str, rows: list[dict]) -> Iterator[tuple[str, bool]]:
    """(passage, held out) of one source of long documents; training documents come first."""
    keyed = [(is_held_out(row["text"]), row) for row in rows]
    seen_paragraphs: set[int] = set()
    names = rare_names(rows) if source == "ko_judgments" else frozenset()
    for held_out, row in sorted(keyed, key=lambda pair: pair[0]):
        paragraphs = without_repeats(CLEANERS[source](row["text"]), seen_paragraphs)
        paragraphs = (None if text and names.intersection(FULL_NAME.findall(text)) else text for text in paragraphs)
        for passage in to_passages(paragraphs, PASSAGE_LIMIT[source], JOINTS[source]):
            if len(passage) >= 80 and not any(marker in passage for marker in MARKERS):
                yield passage, held_out


def review_passages(rows: list[dict]) -> Iterator[tuple[str, bool, int]]:
    """(review, held out, rating) of the reviews that pass the filters."""
    names = find_names(rows)
    for row in rows:
        text = clean_review(row, names)
        if text is not None and not any(marker in text for marker in MARKERS):
            yield text, is_held_out(text), row["rating"]


def build_sources(folder: Path, book_bytes: int) -> tuple[dict, dict, list, list]:
    """Passages by source, then rated reviews, each as (train, held out)."""
    sides: tuple[dict[str, list[str]], dict[str, list[str]]] = ({}, {})
    rated: tuple[list, list] = ([], [])
    seen: set[int] = set()
    for source in [*CLEANERS, "ko_reviews"]:
        rows = list(read_jsonl(folder / f"{source}.jsonl.xz"))
        if source == "ko_reviews":
            found: Iterable[tuple] = sorted(review_passages(rows), key=lambda item: item[1])
        else:
            books = source == "en_gutenberg"
            found = document_passages(source, choose_books(rows, book_bytes) if books else rows)
        for passage, held_out, *rating in found:
            key = stable_hash(passage)
            if key in seen:
                continue
            seen.add(key)
            sides[held_out].setdefault(source, []).append(passage)
            if rating:
                rated[held_out].append((passage, rating[0]))
    return *sides, *rated


def write_records(path: Path, passages: dict[str, list[str]]) -> None:
    """Writes one side of the corpus in a stable shuffled order and prints its sizes."""
    records = [(source, text) for source, texts in passages.items() for text in texts]
    records.sort(key=lambda record: stable_hash(record[1]))
    with lzma.open(path, "wt", encoding="utf-8", preset=6) as output:
        for source, text in records:
            output.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
    for source, texts in passages.items():
        size = sum(len(text.encode("utf-8")) for text in texts)
        print(f"{path.name}\t{source}\t{len(texts)} passages\t{size} bytes")
    print(f"{path.name}\t{path.stat().st_size} bytes compressed")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Builds the corpus of the built-in model.")
    parser.add_argument("source", type=Path, help="folder with the four .jsonl.xz sources")
    parser.add_argument("output", type=Path, help="folder for train.jsonl.xz and heldout.jsonl.xz")
    parser.add_argument("--instructions", type=int, default=150_000, help="generated examples")
    parser.add_argument("--book-megabytes", type=int, default=66, help="English books to take")
    parser.add_argument("--seed", type=int, default=7, help="seed of the generated examples")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    train, heldout, train_reviews, heldout_reviews = build_sources(options.source, options.book_megabytes * 1_000_000)
    examples = instructions.generate(options.instructions, options.seed, train_reviews, train)
    train["instructions"] = list(dict.fromkeys(examples))
    known = set(train["instructions"])
    examples = instructions.generate(options.instructions // 100, options.seed + 1, heldout_reviews, heldout)
    heldout["instructions"] = [text for text in dict.fromkeys(examples) if text not in known]
    write_records(options.output / "train.jsonl.xz", train)
    write_records(options.output / "heldout.jsonl.xz", heldout)


if __name__ == "__main__":
    main()
