"""Write what `whet plan` foretells as one HTML file that needs nothing else: no network and no script.

It leads with whether it fits and how long it takes, then a bar for each phase with the memory of every class, beside
the memory that is free; then tables of the same, of other memory modes, of several cards, of host memory and disk. Bars
are boxes whose width CSS gives, so colours follow the theme. Text that is not whet's own passes `markup.safe`. Gives
up: changing anything on the page; the command is quick enough to be asked again.
"""

from __future__ import annotations

from pathlib import Path

from whet.base.files import write_bytes
from whet.base.language import phrase
from whet.report.charts import JsonObject, as_number, own_label, part, plain, seconds_text, size_text
from whet.report.markup import Html, objects, pairs, paragraph, safe, table, told
from whet.report.static_page import static_page

COLOURS = 10  # of page classes c0 to c9
COMMAND = "plan"


def plan_page(plan: JsonObject) -> str:
    """The whole page. plan: the object of `whet plan --json`; any key may be absent."""
    sections = {
        "memory": (phrase("Memory by phase"), _bars(plan) + _classes(plan)),
        "time": (phrase("Time of a step"), _time(plan)),
        "modes": (phrase("Other memory modes"), _modes(plan)),
        "several": (phrase("Several cards"), _several(plan)),
        "elsewhere": (phrase("Host memory and disk"), _elsewhere(plan)),
    }
    shown = {name: both for name, both in sections.items() if both[1]}
    return static_page(
        safe(plan.get("model"), 80), _head(plan), shown, command=COMMAND, style="plan_page.css", eyebrow=phrase("plan"),
        source=phrase("Made by <code>whet plan</code>."),
    )  # fmt: skip


def write_plan_page(path: Path, plan: JsonObject) -> Path:
    """Write the page to `path`, whole or not at all. Raises OSError where that is not possible."""
    write_bytes(path, plan_page(plan).encode("utf-8", errors="replace"))
    return path


def _head(plan: JsonObject) -> str:
    assumed, free = part(plan, "assumed"), size_text(plan.get("free_bytes"))
    name, fits = safe(told(assumed.get("hardware"))), plan.get("fits")
    tone, text = "", phrase("The memory of {0} has no hard end that is known.", name)
    if fits is True:
        tone, text = "good", phrase("<b>Fits</b> on {0}, where {1} are free.", name, free)
    elif fits is False:
        tone, text = "bad", phrase("<b>Does not fit</b> on {0}, where {1} are free.", name, free)
    step = as_number(plan.get("seconds_per_step"))
    tiles = {
        phrase("Peak of training"): size_text(part(plan, "peak_bytes").get("train")),
        phrase("A step"): "–" if step is None else phrase("{0} s", plain(step, 3)),
        phrase("The run"): seconds_text(plan.get("seconds")),
        phrase("Trained parameters"): plain(as_number(plan.get("trainable_params")) or 0),
    }
    shown = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in tiles.items())
    how = phrase("{0} weights and {1} arithmetic, {2} tokens in a forward pass", safe(assumed.get("storage")),
                 safe(assumed.get("compute")), plain(as_number(assumed.get("tokens_per_forward")) or 0))  # fmt: skip
    return f'<p class="verdict {tone}">{text}</p><p class="small">{how}</p><dl class="facts">{shown}</dl>'


def _names(plan: JsonObject) -> list[str]:
    """All classes of all phases, each once."""
    phases = part(plan, "phases")
    return list(dict.fromkeys(name for phase in phases for name in part(phases, phase)))


def _bars(plan: JsonObject) -> str:
    phases, names, free = part(plan, "phases"), _names(plan), as_number(plan.get("free_bytes"))
    sums = {phase: sum(as_number(value) or 0 for value in part(phases, phase).values()) for phase in phases}
    whole = max([*sums.values(), free or 0, 1])
    end = "" if free is None else f'<span class="end" style="left:{100 * free / whole:.2f}%"></span>'
    rows = ""
    for phase in phases:
        pieces = "".join(
            f'<i class="c{names.index(name) % COLOURS}" style="width:{100 * (as_number(value) or 0) / whole:.2f}%" '
            f'title="{own_label(name)}: {size_text(value)}"></i>'
            for name, value in part(phases, phase).items()
        )
        rows += (f'<div class="phase"><b>{own_label(phase)}</b><span class="stack"><span class="filled">{pieces}</span>'
                 f'{end}</span><span class="total">{size_text(sums[phase])}</span></div>')  # fmt: skip
    keys = "".join(
        f'<li><i class="c{number % COLOURS}"></i>{own_label(name)}</li>' for number, name in enumerate(names)
    )
    keys += "" if free is None else f'<li><i class="end"></i>{phrase("free memory: {0}", size_text(free))}</li>'
    if not rows:
        return ""
    note = ""
    if free is not None and sums.get("merge", 0) > free:
        note = paragraph("small", phrase("The merge does not fit: what was merged is compared on the CPU."))
    return f'<div class="card"><div class="phases">{rows}</div><ul class="keys">{keys}</ul></div>{note}'


def _classes(plan: JsonObject) -> str:
    phases = part(plan, "phases")
    if not phases:
        return ""
    columns = {phrase("Class"): "key"} | {own_label(phase): "num" for phase in phases}
    rows = [[own_label(name), *(_size(part(phases, phase).get(name)) for phase in phases)] for name in _names(plan)]
    return table(columns, rows)


def _size(value: object) -> str:
    """A number of bytes; nothing where a phase holds none of it."""
    return size_text(value) if value else ""


def _time(plan: JsonObject) -> str:
    time, step = part(plan, "time"), as_number(plan.get("seconds_per_step"))
    if step is None:
        return paragraph("lead", phrase("Not known: {0}.", safe(told(time.get("reason")))))
    parts = {name: as_number(value) or 0.0 for name, value in part(time, "parts").items()}
    rows = [
        [own_label(name), _bar(value / step), phrase("{0} s", plain(value, 3))]
        for name, value in parts.items()
        if value
    ]
    note = phrase("By {0}. Loading, compiling and evaluation come on top.", safe(told(time.get("rests_on"))))
    shown = table({phrase("Part"): "key", "": "wide", phrase("Seconds"): "num"}, rows)
    return f'{paragraph("lead", note)}<div class="card">{shown}</div>'


def _bar(share: float) -> Html:
    width = 100 * min(1.0, share)
    return Html(f'<span class="bar" aria-hidden="true"><i style="width:{width:.1f}%"></i></span>')


def _fit(value: object) -> Html:
    if value is None:
        return Html("–")
    tone, text = ("good", phrase("it fits")) if value is True else ("bad", phrase("too large"))
    return Html(f'<span class="tag {tone}">{text}</span>')


def _modes(plan: JsonObject) -> str:
    modes = objects(plan, "modes")
    rows = [
        [told(mode.get("mode")), size_text(mode.get("peak_bytes")), size_text(mode.get("host_bytes")),
         _fit(mode.get("fits"))] for mode in modes
    ]  # fmt: skip
    columns = {phrase("Mode"): "key", phrase("Peak"): "num", phrase("Host memory"): "num", "": ""}
    return table(columns, rows) if rows else ""


def _several(plan: JsonObject) -> str:
    several = part(plan, "several")
    if not several:
        return ""
    rows = [
        [own_label(name), size_text(part(several, name).get("peak_bytes")), told(part(several, name).get("mode")),
         _fit(part(several, name).get("fits"))] for name in ("replicate", "shard")
    ]  # fmt: skip
    columns = {phrase("Way"): "key", phrase("On each"): "num", phrase("Mode"): "", "": ""}
    cards = phrase("{0} cards", safe(several.get("cards")))
    return f"{paragraph('warn', safe(told(several.get('notice'))))}<h3>{cards}</h3>{table(columns, rows)}"


def _elsewhere(plan: JsonObject) -> str:
    host = {own_label(name): size_text(value) for name, value in part(plan, "host").items() if value}
    disk = {own_label(name): size_text(value) for name, value in part(plan, "disk").items()}
    found = f"<h3>{phrase('Host memory')}</h3>{pairs(host)}" if host else ""
    return found + (f"<h3>{phrase('Disk')}</h3>{pairs(disk)}" if disk else "")
