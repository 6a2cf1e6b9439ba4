"""Conversations on which loss masks go wrong: markers in contents, repeats, white space, scripts, odd turns."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

from whet.data.example import Example, Message

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
    "marker_in_system": chat("s:Never say <|im_end|> or <|eot_id|>.", "u:q", "a:a"),
    "answer_begins_the_next_turn": chat("u:q", "a:yes", "u:yes please", "a:yes please do"),
    "question_begins_the_answer": chat("u:say", "a:say it", "u:say it", "a:say it again"),
    "six_turns": chat("u:a", "a:b", "u:b", "a:b", "u:b", "a:c"),
    "markers_of_gemma": chat("u:<start_of_turn>model\nx<end_of_turn>", "a:<end_of_turn>\n<start_of_turn>user"),
    "markers_of_llama": chat("u:<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nx", "a:x<|eot_id|>"),
    "markers_of_phi": chat("u:<|end|>\n<|assistant|>\nx", "a:<|user|>\ny<|end|>"),
    "markers_of_mistral": chat("u:x [/INST] y</s>", "a:</s>[INST] z [/INST]"),
    "only_a_marker": chat("u:<|im_end|>", "a:<|im_end|>", "u:<|eot_id|>", "a:<|end|>"),
    "contents_of_the_template": chat("u:user\n", "a:assistant\n", "u:\n", "a:user"),
}


def called(name: str, **arguments: Any) -> dict[str, Any]:
    """A tool call as templates take it."""
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def calls(message: Message) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments of the tools that a message calls."""
    return [(call["function"]["name"], call["function"]["arguments"]) for call in message.tool_calls]


def answer(content: str = "", *tool_calls: dict[str, Any], reasoning: str | None = None) -> Message:
    return Message("assistant", content, reasoning, tool_calls)


def tool(content: str) -> Message:
    return Message("tool", content)


TOOLS = json.dumps([{"type": "function", "function": {
    "name": "weather", "description": "The weather in a city", "parameters": {"type": "object", "properties": {
        "city": {"type": "string", "description": "Its name"}}, "required": ["city"]}}}])  # fmt: skip


def with_tools(*messages: Message, tools: str | None = TOOLS) -> Example:
    return Example("", messages, None, "", 0, tools=tools)


ASKED = Message("user", "Is it warm in Seoul?")
CALL = called("weather", city="Seoul")
TOOL_CASES = {
    "call_and_answer": with_tools(ASKED, answer("", CALL), tool("21"), answer("Yes, 21.")),
    "call_only": with_tools(ASKED, answer("", CALL)),
    "system_and_call": with_tools(Message("system", "Be brief."), ASKED, answer("", CALL), tool("21"), answer("Yes.")),
    "korean_call": with_tools(ASKED, answer("", called("weather", city="서울 👩‍👩‍👧")), tool("맑음"), answer("네")),
    "markers_in_a_call": with_tools(ASKED, answer("", called("weather", city="<|im_end|>\n<|eot_id|>")), tool("x"),
                                    answer("ok")),
    "marker_in_a_result": with_tools(ASKED, answer("", CALL), tool("<|im_end|><|im_start|>user\nno"), answer("ok")),
    "quotes_in_a_result": with_tools(ASKED, answer("", CALL), tool('{"t": "21\\n", "ok": true}'), answer("ok")),
    "empty_result": with_tools(ASKED, answer("", CALL), tool(""), answer("nothing")),
    "result_is_the_answer": with_tools(ASKED, answer("", CALL), tool("weather"), answer("weather")),
    "calls_twice": with_tools(ASKED, answer("", CALL), tool("1"), answer("", CALL), tool("2"), answer("3")),
    "call_then_turns": with_tools(ASKED, answer("", CALL), tool("21"), answer("Yes."), Message("user", "and now?"),
                                  answer("", CALL), tool("20"), answer("Less.")),
    "two_calls_in_a_turn": with_tools(ASKED, answer("", CALL, CALL), tool("1"), tool("2"), answer("3")),
    "words_and_a_call": with_tools(ASKED, answer("Let me look.", CALL)),
    "tools_unused": with_tools(ASKED, answer("I do not know."), tools=TOOLS),
    "numbers_in_a_call": with_tools(ASKED, answer("", called("weather", n=1, deep={"a": [1, None, True]})), tool("1"),
                                    answer("2")),
    "thinks": with_tools(ASKED, answer("Yes.", reasoning="Seoul is in the south."), tools=None),
    "thinks_twice": with_tools(ASKED, answer("Yes.", reasoning="first thought"), Message("user", "sure?"),
                               answer("Sure.", reasoning="second thought"), tools=None),
    "thought_earlier": with_tools(ASKED, answer("Yes.", reasoning="Yes."), Message("user", "Yes."), answer("Yes."),
                                  tools=None),
    "thinks_in_markers": with_tools(ASKED, answer("a", reasoning="x <|im_end|> </s> <|end|> y"), tools=None),
    "thinks_and_calls": with_tools(ASKED, answer("", CALL, reasoning="look it up"), tool("21"),
                                   answer("Yes.", reasoning="21 is warm")),
    "thinks_korean": with_tools(ASKED, answer("네", reasoning="서울은 \n 따뜻하다 "), tools=None),
}  # fmt: skip
