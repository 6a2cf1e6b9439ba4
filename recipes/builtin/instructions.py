"""Generates the instruction-shaped part of the built-in model's corpus.

What: short conversations in the chat template of the tokenizer, English and Korean, made by
seeded programs from word lists and message fragments that were written for this project
(`vocabulary.json`, `topics.json`, `prompts.json`) and from filtered
passages of the corpus (reviews with their ratings, openings of documents).

Why: the model should know turns, following a request, short answers with an end, fields on
lines, and the words of modern everyday life, which old books lack. It holds no support-ticket
task: that is what the quickstart teaches, so nothing here may look like its answers.

`generate(count, seed, reviews, passages)` gives the same texts for the same arguments.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
MOODS = {"calm": "차분함", "worried": "걱정", "angry": "화남", "happy": "기쁨"}
LANGUAGES = {"en": {"en": "English", "ko": "영어"}, "ko": {"en": "Korean", "ko": "한국어"}}
SOURCES = ("en_gutenberg", "ko_judgments", "ko_technical", "ko_reviews")
Turns = list[tuple[str, str]]


def read_data(name: str) -> dict:
    """A data file of this folder."""
    return json.loads((HERE / name).read_text(encoding="utf-8"))


def pairs(items: list[str]) -> list[list[str]]:
    """Items written as `left=right`, parted."""
    return [item.split("=") for item in items]


VOCABULARY = read_data("vocabulary.json")
WORDS = {tuple(kind.split("|")): pairs(items) for kind, items in VOCABULARY["words"].items()}
RELATIONS = {tuple(key.split("|")): pairs(items) for key, items in VOCABULARY["relations"].items()}
FRAMES = [
    (kinds.split(), *frame)
    for kinds, items in VOCABULARY["frames"].items()
    for frame in pairs(items)
]
POLITE = pairs(VOCABULARY["polite"])
TOPICS = read_data("topics.json")["topics"]
TONES = {
    tuple(key.split("|")): phrases
    for key, phrases in read_data("topics.json")["tones"].items()
}
PROMPTS = read_data("prompts.json")
PARTICLES = re.compile(r"(\w?)('?)\[(으로로|..)\]")
WITH_FINAL = {"이가": "이", "을를": "을", "은는": "은", "과와": "과"}


def fill(template: str, **values: object) -> str:
    """Puts values into a template and chooses the Korean particles in brackets after them."""

    def particle(match: re.Match[str]) -> str:
        before, quote, forms = match.groups()
        code = ord(before) - 0xAC00 if before else -1
        final = code % 28 if 0 <= code < 11172 else 0
        if forms == "으로로":
            return before + quote + ("로" if final in (0, 8) else "으로")
        with_final = WITH_FINAL[forms]
        return before + quote + (with_final if final else forms.replace(with_final, "", 1))

    for name, value in values.items():
        template = template.replace("{" + name + "}", str(value))
    return PARTICLES.sub(particle, template)


def words_of(language: str, *kinds: str) -> list[str]:
    """The words of some kinds (all when none is named) in one language."""
    column = int(language == "ko")
    chosen = [words for kind, words in WORDS.items() if not kinds or kind[0] in kinds]
    return list(dict.fromkeys(pair[column] for words in chosen for pair in words))


class Source:
    """Seeded choices over the word lists and over the corpus."""

    def __init__(self, seed: int, reviews: list[tuple[str, int]], passages: dict[str, list[str]]):
        self.random = Random(seed)
        self.pick, self.chance = self.random.choice, lambda share: self.random.random() < share
        self.reviews = {
            "positive": [text for text, rating in reviews if rating >= 9 and len(text) < 150],
            "negative": [text for text, rating in reviews if rating <= 2 and len(text) < 150],
        }
        self.passages = {name: passages[name] for name in SOURCES if passages.get(name)}

    def language(self) -> str:
        return self.pick(("en", "ko"))

    def prompt(self, key: str, language: str, **values: object) -> str:
        """One of the phrasings of a request."""
        return fill(self.pick(PROMPTS[key][language]), **values)

    def ask(self, key: str, language: str, text: str, **values: object) -> str:
        """A request with a text below it, a line further down, or before it."""
        prompt = self.prompt(key, language, **values)
        forms = (f"{prompt}\n{text}", f"{prompt}\n{text}", f"{prompt}\n\n{text}",
                 f"{text}\n\n{prompt}")
        return self.pick(forms)

    def message(self, topic: dict, language: str, mood: str | None = None) -> tuple[str, str]:
        """A message about a topic, and the noun that it names."""
        noun = self.pick(topic[f"{language}-nouns"])
        count = 2 if self.chance(0.25) else 1
        parts = self.random.sample(topic[f"{language}-messages"], count)
        parts = [fill(part, n=noun) for part in parts]
        parts = [part + ("" if part[-1] in "?!." else ".") for part in parts]
        if mood or self.chance(0.3):
            opening = self.pick(TONES[language, mood or "calm", "open"])
            if opening.endswith(",") and not parts[0].startswith(("I ", "I'")):
                parts[0] = parts[0][0].lower() + parts[0][1:]
            parts.insert(0, opening)
        if mood or self.chance(0.3):
            parts.append(self.pick(TONES[language, mood or "calm", "close"]))
        text = " ".join(parts)
        text = text.lower() if language == "en" and self.chance(0.15) else text
        return (text.rstrip(".") if self.chance(0.1) else text), noun

    def any_message(self, topic: dict, language: str) -> str:
        """A message with or without a mood."""
        return self.message(topic, language, self.pick((None, None, *MOODS)))[0]


def exchange(request: str, answer: object) -> Turns:
    """One request and its answer."""
    return [("user", request), ("assistant", str(answer))]


def topic_label(source: Source) -> Turns:
    topic, asked = source.pick(TOPICS), source.language()
    text = source.any_message(topic, source.language())
    return exchange(source.ask("topic", asked, text), topic[asked])


def topic_choice(source: Source) -> Turns:
    options, language = source.random.sample(TOPICS, source.random.randint(2, 6)), source.language()
    topic = source.pick(options)
    text = source.any_message(topic, source.language())
    names = ", ".join(option[language] for option in options)
    return exchange(source.ask("choice", language, text, names=names), topic[language])


def message_fields(source: Source) -> Turns:
    asked, written = source.language(), source.language()
    topic, mood = source.pick(TOPICS), source.pick(list(MOODS))
    text, noun = source.message(topic, written, mood)
    column = int(asked == "ko")
    values = {
        ("Topic", "주제")[column]: topic[asked],
        ("Mood", "기분")[column]: (mood, MOODS[mood])[column],
        ("Language", "언어")[column]: LANGUAGES[written][asked],
    }
    if noun in text:
        values[("Thing", "대상")[column]] = noun
    names = source.random.sample(list(values), source.random.randint(2, len(values)))
    request = source.ask("fields", asked, text, names=", ".join(names))
    return exchange(request, "\n".join(f"{name}: {values[name]}" for name in names))


def named_thing(source: Source) -> Turns:
    topic, language = source.pick(TOPICS), source.language()
    text, noun = source.message(topic, language, source.pick((None, *MOODS)))
    if noun not in text:
        return exchange(source.ask("topic", language, text), topic[language])
    return exchange(source.ask("thing", language, text), noun)


def mood_label(source: Source) -> Turns:
    language, mood = source.language(), source.pick(list(MOODS))
    text, _ = source.message(source.pick(TOPICS), language, mood)
    names = ", ".join(MOODS.values() if language == "ko" else MOODS)
    answer = MOODS[mood] if language == "ko" else mood
    return exchange(source.ask("mood", language, text, names=names), answer)


def about_question(source: Source) -> Turns:
    language = source.language()
    topic, other = source.random.sample(TOPICS, 2)
    text = source.any_message(topic, language)
    if source.chance(0.5):
        return exchange(source.ask("about", language, text, name=topic[language]),
                        source.prompt("yes", language))
    answer = source.prompt(source.pick(("no", "no_but")), language, name=topic[language])
    return exchange(source.ask("about", language, text, name=other[language]), answer)


def which_message(source: Source) -> Turns:
    language = source.language()
    topics = source.random.sample(TOPICS, 2)
    first, second = (source.any_message(topic, language) for topic in topics)
    wanted = source.random.randrange(2)
    question = source.prompt("which", language, name=topics[wanted][language])
    return exchange(f"A: {first}\nB: {second}\n{question}", "AB"[wanted])


def shop_dialog(source: Source) -> Turns:
    language = source.language()
    topics = [topic for topic in TOPICS if f"{language}-reply" in topic]
    turns: Turns = []
    if source.chance(0.4):
        turns.append(("system", source.prompt("reply", language)))
    for _ in range(source.random.randint(1, 2)):
        topic = source.pick(topics)
        text, _ = source.message(topic, language, source.pick((None, "calm", "worried", "angry")))
        turns += exchange(text, source.pick(topic[f"{language}-reply"]))
    if source.chance(0.4):
        turns += exchange(*source.prompt("thanks", language).split("|"))
    return turns


def review_sentiment(source: Source) -> Turns:
    language, label = source.language(), source.pick(list(source.reviews))
    answer = label if language == "en" else {"positive": "긍정", "negative": "부정"}[label]
    return exchange(source.ask("sentiment", language, source.pick(source.reviews[label])), answer)


def opening(source: Source, name: str) -> str:
    """The first sentence or two of a passage of a source."""
    text = source.pick(source.passages[name]).replace("\n", " ")
    return " ".join(re.split(r"(?<=[.!?])\s+", text)[:2])[:200].strip()


def text_kind(source: Source) -> Turns:
    name, language = source.pick(list(source.passages)), source.language()
    answer = PROMPTS["genres"][language][SOURCES.index(name)]
    return exchange(source.ask("genre", language, opening(source, name)), answer)


def which_language(source: Source) -> Turns:
    name, asked, written = source.pick(list(source.passages)), source.language(), source.language()
    if source.chance(0.5):
        text = source.any_message(source.pick(TOPICS), written)
    else:
        written, text = name[:2], opening(source, name)
    return exchange(source.ask("language", asked, text), LANGUAGES[written][asked])


def word_position(source: Source) -> Turns:
    language, key = source.language(), source.pick(("first", "last"))
    text = source.any_message(source.pick(TOPICS), language)
    answer = text.split()[0 if key == "first" else -1].strip(".,!?:")
    return exchange(source.ask(key, language, text), answer)


def copy_text(source: Source) -> Turns:
    language = source.language()
    if source.chance(0.6):
        text = source.any_message(source.pick(TOPICS), language)
        return exchange(source.ask("copy", language, text), text)
    word, count = source.pick(words_of(language)), source.random.randint(2, 5)
    request = source.prompt("times", language, word=word, count=count)
    return exchange(request, " ".join([word] * count))


def list_items(source: Source) -> Turns:
    kind, language = source.pick(list(WORDS)), source.language()
    items = source.random.sample(words_of(language, kind[0]), source.random.randint(2, 6))
    label = kind[language == "ko"]
    answer = ", ".join(items) if source.chance(0.5) else "\n".join(f"- {item}" for item in items)
    return exchange(source.prompt("list", language, kind=label, count=len(items)), answer)


def sort_or_count(source: Source) -> Turns:
    language, key = source.language(), source.pick(("sort", "count"))
    words = source.random.sample(words_of(language), source.random.randint(2, 6))
    answer = ", ".join(sorted(words)) if key == "sort" else len(words)
    return exchange(source.ask(key, language, ", ".join(words)), answer)


def change_word(source: Source) -> Turns:
    key = source.pick(("upper", "letters"))
    language = "en" if key == "upper" else source.language()
    word = source.pick(words_of(language))
    answer = word.upper() if key == "upper" else len(word.replace(" ", ""))
    return exchange(source.prompt(key, language, word=word), answer)


def arithmetic(source: Source) -> Turns:
    language, limit = source.language(), source.pick((9, 20, 99))
    second, first = sorted(source.random.randint(0, limit) for _ in range(2))
    sign = source.pick("+-×" if limit == 9 else "+-")
    result = {"+": first + second, "-": first - second, "×": first * second}[sign]
    if sign == "×" or source.chance(0.5):
        request = source.prompt("sum", language, sum=f"{first} {sign} {second}")
    else:
        request = source.prompt(
            "more" if sign == "+" else "less", language, first=first, second=second,
            name=source.prompt("names", language),
            item=source.pick(words_of(language, "fruit", "thing")),
        )
    return exchange(request, result)


def relation(source: Source) -> Turns:
    language, kind = source.pick(list(RELATIONS))
    word, answer = source.random.sample(source.pick(RELATIONS[language, kind]), 2)
    return exchange(source.prompt(kind, language, word=word), answer)


def belongs(source: Source) -> Turns:
    language = source.language()
    column = int(language == "ko")
    kind, asked = source.pick(list(WORDS)), source.pick(list(WORDS))
    word = source.pick(WORDS[kind])[column]
    if source.chance(0.5):
        return exchange(source.prompt("kind", language, word=word), kind[column])
    asked = kind if source.chance(0.5) else asked
    answer = "yes" if word in words_of(language, asked[0]) else "no"
    request = source.prompt("belongs", language, word=word, kind=asked[column])
    return exchange(request, source.prompt(answer, language))


def translate_word(source: Source) -> Turns:
    english, korean = source.pick(WORDS[source.pick(list(WORDS))])
    if source.chance(0.5):
        return exchange(source.prompt("to_korean", source.language(), word=english), korean)
    return exchange(source.prompt("to_english", source.language(), word=korean), english)


def translate_sentence(source: Source) -> Turns:
    kinds, *frames = source.pick(FRAMES)
    nouns = source.pick([pair for kind in WORDS if kind[0] in kinds for pair in WORDS[kind]])
    english, korean = (fill(frame, n=noun) for frame, noun in zip(frames, nouns, strict=True))
    if source.chance(0.5):
        return exchange(source.ask("sentence_to_korean", source.language(), english), korean)
    return exchange(source.ask("sentence_to_english", source.language(), korean), english)


def politeness(source: Source) -> Turns:
    casual, polite = source.pick(POLITE)
    if source.chance(0.6):
        return exchange(source.ask("polite", source.language(), casual), polite)
    return exchange(source.ask("casual", source.language(), polite), casual)


def extraction(source: Source) -> Turns:
    language, hour = source.language(), source.random.randint(1, 12)
    name, day = source.prompt("names", language), source.prompt("days", language)
    place = source.pick(words_of(language, "city"))
    text = source.prompt("meeting", language, name=name, day=day, place=place, hour=hour)
    if language == "en":
        fields = {"Name": name, "Day": day, "Place": place, "Time": f"{hour} o'clock"}
    else:
        fields = {"이름": name, "요일": day, "장소": place, "시간": f"{hour}시"}
    keys = source.random.sample(list(fields), source.random.randint(2, 4))
    request = source.ask("extract", language, text, names=", ".join(keys))
    return exchange(request, "\n".join(f"{key}: {fields[key]}" for key in keys))


def passage_question(source: Source) -> Turns:
    language = source.language()
    columns = (PROMPTS["names"][language], words_of(language, "city"),
               words_of(language, "appliance", "clothes", "thing"))
    samples = (source.random.sample(column, 2) for column in columns)
    rows = [dict(zip(("name", "place", "thing"), row, strict=True))
            for row in zip(*samples, strict=True)]
    text = " ".join(source.prompt("bought", language, **row) for row in rows)
    wanted = source.random.randrange(2)
    key, field = source.pick((("what", "thing"), ("where", "place"), ("who", "name")))
    question = source.prompt(key, language, **rows[wanted])
    turns = exchange(f"{text}\n{question}", rows[wanted][field])
    if field != "name" and source.chance(0.3):
        other = rows[1 - wanted]
        turns += exchange(source.prompt("and", language, **other), other[field])
    return turns


# Task and its share of the examples. Messages of everyday life weigh most.
TASKS: list[tuple[Callable[[Source], Turns], int]] = [
    (topic_label, 14), (topic_choice, 10), (message_fields, 9), (named_thing, 6), (mood_label, 4),
    (about_question, 4), (which_message, 3), (shop_dialog, 12), (review_sentiment, 6),
    (text_kind, 2), (which_language, 2), (word_position, 2), (copy_text, 4), (list_items, 4),
    (sort_or_count, 3), (change_word, 2), (arithmetic, 4), (relation, 4), (belongs, 4),
    (translate_word, 6), (translate_sentence, 8), (politeness, 3), (extraction, 6),
    (passage_question, 7),
]


def generate(
    count: int, seed: int, reviews: list[tuple[str, int]], passages: dict[str, list[str]]
) -> Iterator[str]:
    """Conversations as the chat template renders them; some hold two tasks or a system turn."""
    source = Source(seed, reviews, passages)
    tasks, weights = zip(*TASKS, strict=True)
    for _ in range(count):
        turns = source.random.choices(tasks, weights)[0](source)
        if source.chance(0.12) and len(turns) == 2:
            second = source.random.choices(tasks, weights)[0](source)
            turns += [turn for turn in second if turn[0] != "system"]
        if turns[0][0] != "system" and source.chance(0.12):
            turns = [("system", source.prompt("system", source.language())), *turns]
        yield "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
