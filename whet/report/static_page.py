"""The frame of a page without scripts: one HTML file that needs nothing else. Its parts are made elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

from whet.base.language import korean, phrase

PAGE = Template("""<!doctype html>
<html lang="$language">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>$title · whet $command</title>
<style>
$style
</style>
</head>
<body>
<header>
<p class="eyebrow">whet · $eyebrow</p>
<h1>$title</h1>
$head
</header>
<main>
$sections
</main>
<footer>$source $alone</footer>
</body>
</html>
""")


def static_page(
    title: str, head: str, sections: Mapping[str, tuple[str, str]], *, command: str, style: str, eyebrow: str,
    source: str,
) -> str:  # fmt: skip
    """The whole page. All texts are HTML. sections: heading and body by id; command: of whet; style: the file of
    styles beside page.css; source: what made the page."""
    here = Path(__file__).parent
    styles = "".join((here / name).read_text(encoding="utf-8") for name in ("page.css", style))
    return PAGE.substitute(
        language="ko" if korean() else "en", title=title, command=command, style=styles, eyebrow=eyebrow, head=head,
        source=source, alone=phrase("Nothing on this page is loaded from anywhere else."),
        sections="\n".join(
            f'<section id="{name}"><h2>{heading}</h2>{body}</section>' for name, (heading, body) in sections.items()
        ),
    )  # fmt: skip
