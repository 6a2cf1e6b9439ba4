"""Chat templates compiled once, in jinja's sandbox, in the dialect that the field's templates are written in.

The settings, the filter `tojson` and the functions are those that transformers gives a template, so a text is the same
here and on any server (a test compares them on every template at hand). What is added: strings keep their sources
(`template.traced`), and today's date is a constant, because a run must have the same tokens every day, and a contract
(`template.goldens`) must hold tomorrow. What that gives up: a model whose template writes the date is always trained
with this one.
"""

from __future__ import annotations

import json
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, ClassVar

from whet.data.template import watched
from whet.data.template.traced import changed, concat

if TYPE_CHECKING:
    from jinja2 import Environment, Template

DATE = datetime(2025, 1, 1)


def _no(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _date(format: str) -> str:
    return DATE.strftime(format)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without the escapes for HTML that jinja's own filter adds."""
    text = json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    return changed(text, value)


def _join(value: Any, d: str = "", attribute: str | None = None) -> str:
    items = [item[attribute] for item in value] if attribute else list(value)
    return concat([part for index, item in enumerate(items) for part in ((d, str(item)) if index else (str(item),))])


def _indent(value: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    from jinja2.filters import do_indent

    return changed(do_indent(value, width, first, blank), value)


def template_errors() -> tuple[type[Exception], ...]:
    """The exceptions that a template raises to refuse a row, and those that Python raises in one that adds text to a
    number, divides by zero or calls itself for ever."""
    from jinja2 import TemplateError

    python = (TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError)
    return TemplateError, *python


@lru_cache(maxsize=16)
def compiled(source: str) -> Template:
    """The template of this source. Raises jinja2.TemplateError."""
    return _sandbox(watching=False).from_string(source)


@lru_cache(maxsize=16)
def watching(source: str) -> Template:
    """The template of this source, for contents that record what they are asked (`template.watched`)."""
    return _sandbox(watching=True).from_string(source)


@lru_cache(maxsize=2)
def _sandbox(watching: bool) -> Environment:
    from jinja2 import nodes
    from jinja2.compiler import CodeGenerator
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Concatenating(CodeGenerator):
        """Values become text, and texts one text, in the environment's way, which keeps sources."""

        def _output_child_pre(self, node: nodes.Expr, frame: Any, finalize: Any) -> None:
            if frame.eval_ctx.volatile or frame.eval_ctx.autoescape:
                super()._output_child_pre(node, frame, finalize)
            else:
                self.write("environment.text(")

        def visit_Concat(self, node: nodes.Concat, frame: Any) -> None:
            self.write("environment.concat((")
            for part in node.nodes:
                self.write("environment.text(")
                self.visit(part, frame)
                self.write("), ")
            self.write("))")

    class Generation(Extension):
        """`{% generation %}`, by which some templates mark answers: here its body and nothing else."""

        tags = {"generation"}  # noqa: RUF012 (jinja's name and kind)

        def parse(self, parser: Any) -> list[Any]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        """jinja's sandbox; its answer about an attribute depends on the kind of object alone, so it is asked once."""

        code_generator_class = Concatenating
        text = staticmethod(watched.text if watching else str)  # type: ignore[arg-type]
        concat = staticmethod(watched.joined if watching else concat)  # type: ignore[assignment]
        decided: ClassVar[dict[tuple[type, str], bool]] = {}

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            safe = self.decided.get((type(obj), attr))
            if safe is None:
                safe = self.decided[type(obj), attr] = super().is_safe_attribute(obj, attr, value)
            return safe

    sandbox = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters |= {"tojson": _tojson, "join": _join, "indent": _indent}
    sandbox.globals |= {"raise_exception": _no, "strftime_now": _date}
    if watching:
        sandbox.filters = {name: watched.watching_filter(name, run) for name, run in sandbox.filters.items()}
        sandbox.tests = {name: watched.watching_test(name, run) for name, run in sandbox.tests.items()}
        del sandbox.filters["random"], sandbox.globals["lipsum"]  # another text at every run cannot be repeated
    return sandbox


@lru_cache(maxsize=16)
def attributes(source: str) -> frozenset[str]:
    """The names that a template looks up in objects: `message.content` and `message['content']` both give content."""
    from jinja2 import nodes

    try:
        tree = _sandbox(watching=False).parse(source)  # not compiled, since that computes what is constant
    except template_errors():
        return frozenset()  # the first run says what is wrong with it
    names = {node.attr for node in tree.find_all(nodes.Getattr)}
    names |= {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    return frozenset(names)
