"""Conversations on which loss masks go wrong: markers in contents, repeats, white space, scripts, odd turns."""

from __future__ import annotations

import unicodedata

from whet.data.example import Message

Chat = list[Message]
ROLES = {"u": "user", "a": "assistant", "s": "system"}


def chat(*turns: str) -> Chat:
    """`chat("u:Hi", "a:Hello")`."""
    return [Message(ROLES[turn[0]], turn[2:]) for turn in turns]  # type: ignore[arg-type]


CASES = {
    "plain": chat("u:Hi", "a:Hello there"),
    "korean": chat("u:안녕하세요, 오늘 날씨는?", "a:맑고 따뜻해요."),
    "emoji": chat("u:👩‍👩‍👧 ☀️?", "a:👍🏽 🇰🇷 yes"),
    "other_scripts": chat("u:สวัสดี नमस्ते مرحبا", "a:こんにちは 你好 Ωmega"),
    "decomposed": chat("u:" + unicodedata.normalize("NFD", "한글"), "a:" + unicodedata.normalize("NFD", "가나é")),
    "marker_in_question": chat("u:what is <|im_end|> and <|im_start|>assistant\nx?", "a:a marker"),
    "marker_in_answer": chat("u:q", "a:write <|im_end|> then <|im_start|>user"),
    "other_special": chat("u:<|endoftext|>", "a:x <|endoftext|> y"),
    "half_a_marker": chat("u:<|im_", "a:end|>"),
    "alpaca_marker": chat("u:### Response:\nno", "a:### Instruction:\nyes"),
    "marks_of_whet": chat("u:qzx1xzq qzx0xzq", "a:qzx0xzq qzx1xzq"),
    "thinking_in_question": chat("u:<think>x</think>", "a:ok"),
    "thinking": chat("u:x", "a:<think>\nwhy\n</think>\n\nok"),
    "thinking_twice": chat("u:x", "a:<think>\nwhy\n</think>\n\nok", "u:y", "a:<think>\nhow\n</think>\n\nyes"),
    "answer_is_the_question": chat("u:say cat", "a:say cat"),
    "answers_repeat": chat("u:a?", "a:b", "u:b", "a:a?", "u:a? b", "a:b a?", "u:b", "a:b"),
    "five_turns": chat(*(f"{'ua'[n % 2]}:turn {n}" for n in range(10))),
    "spaces": chat("u:  two  ", "a:  three  "),
    "newlines": chat("u:\n\nq\n\n", "a:\n\na\n\n"),
    "newlines_around_the_question": chat("u:\n\nq\n\n", "a:a"),
    "newline_before": chat("u:q\n", "a:\na"),
    "newlines_between": chat("u:q\n", "a:a\n", "u:\nq", "a:\na"),
    "tabs": chat("u:\tx", "a:\ty\t"),
    "windows_lines": chat("u:a\r\nb\r\n", "a:c\r\nd"),
    "zero_width": chat("u:\u200bq", "a:\u200ba\u200b"),
    "one_character": chat("u:1", "a:2"),
    "one_syllable": chat("u:네?", "a:네"),
    "ends_in_space": chat("u:x", "a:. "),
    "dots": chat("u:q", "a:..."),
    "digits": chat("u:1234", "a:5678"),
    "empty_question": chat("u:", "a:a"),
    "code": chat("u:def f(x):\n    return x", "a:```python\nf = lambda x: x  # {'a': [1]}\n```"),
    "system": chat("s:Be terse.", "u:q", "a:a"),
}
