"""The report as one HTML file and as Markdown."""

from __future__ import annotations

from html import escape

from dsft.report.advice import question, recommendation
from dsft.report.chart import chart
from dsft.report.content import SamplePair, Verdict, charts, facts, samples, verdicts
from dsft.report.goals import Goal, goals
from dsft.report.history import History

_STYLE = """
:root{color-scheme:light dark;--line:#8884;--soft:#777}
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:1200px;overflow-wrap:anywhere}
h1{font-size:1.5rem}h2{font-size:1.2rem;margin-top:2rem}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22rem),1fr));gap:1rem}
figure{margin:0}svg{width:100%;height:auto}svg text{font-size:13px;fill:currentColor}
.grid{stroke:var(--line);fill:none}.mark{stroke:var(--soft);stroke-dasharray:2 3;fill:none}
.line,.key path{fill:none;stroke-width:2}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:0;font-size:.9rem}
svg.key{width:24px;height:8px;margin-right:.4rem}
.wide{overflow-x:auto}table{border-collapse:collapse}td,th{padding:.25rem .75rem .25rem 0;text-align:left;
border-bottom:1px solid var(--line);vertical-align:top}th,.scores td{overflow-wrap:normal}
td.number{white-space:nowrap;font-variant-numeric:tabular-nums}
.better,.reached,.kept{color:#0a7d33}.worse,.missed,.passed{color:#c62828}
@media(prefers-color-scheme:dark){.better,.reached,.kept{color:#5fd38d}.worse,.missed,.passed{color:#ff8a80}}
.sample{border-top:1px solid var(--line);padding:.5rem 0}.sample dl{display:grid;gap:.25rem 1rem;margin:0;
grid-template-columns:repeat(auto-fit,minmax(min(100%,16rem),1fr))}dt{color:var(--soft);font-size:.9rem}
dd{margin:0;white-space:pre-wrap}
@media(max-width:600px){.scores,.scores tbody{display:block}.scores tr:first-child{display:none}
.scores tr{display:grid;grid-template-columns:1fr 1fr;gap:0 1rem;padding:.4rem 0;border-bottom:1px solid var(--line)}
.scores td{border:0;padding:0;overflow-wrap:anywhere}.scores td:first-child{font-weight:bold}
.scores td:nth-child(3){grid-column:1/-1}.scores .number{white-space:normal;font-size:.9rem}
.scores .number::before{content:"before ";color:var(--soft)}.scores .number:last-child::before{content:"after "}}
"""
_GOALS_EXPLANATION = (
    "What the run's evaluate section set out to do or to keep. Reached and missed need 95 % intervals that do not "
    "overlap; a limit is kept or passed by the rule that training itself goes by, at the last evaluation."
)
_EXPLANATION = (
    "First against last evaluation. A verdict needs 95 % intervals (bootstrap over documents) that do not overlap. "
    "They say how much a score depends on the documents that were drawn, not how it would change with another seed; "
    "dsft eval --against compares two models pairwise, which is sharper."
)


def html_page(history: History) -> str:
    """A self-contained page: no script, nothing loaded from anywhere."""
    name = str(history.config["run"]["name"])
    marks = [float(record["step"]) for record in history.resumes]
    figures = "".join(chart(one.title, "step", one.unit, one.lines, marks) for one in charts(history))
    sections = [f"<h2>{title}</h2>{_fact_table(rows)}" for title, rows in _fact_sections(history)]
    aims = goals(history)
    if aims:
        items = "".join(_goal_item(one) for one in aims)
        sections.append(f"<h2>Goals</h2><p>{escape(_GOALS_EXPLANATION)}</p><ul>{items}</ul>")
    found = verdicts(history)
    if found:
        head = "<tr><th>set</th><th>score</th><th>verdict</th><th>before</th><th>after</th></tr>"
        body = "".join(_verdict_row(one) for one in found)
        table = f'<div class="wide"><table class="scores">{head}{body}</table></div>'
        sections.append(f"<h2>Did it work</h2><p>{escape(_EXPLANATION)}</p>{table}")
    if history.warnings:
        items = "".join(f"<li>{escape(str(record['message']))}</li>" for record in history.warnings)
        sections.append(f"<h2>Warnings</h2><ul>{items}</ul>")
    if figures:
        note = "<p>A dotted line is a restart.</p>" if marks else ""
        sections.append(f'<h2>Curves</h2>{note}<div class="charts">{figures}</div>')
    pairs = samples(history)
    if pairs:
        sections.append("<h2>Answers before and after</h2>" + "".join(_sample_block(one) for one in pairs))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(name)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{escape(name)}</h1>{''.join(sections)}</body></html>\n"
    )


def markdown(history: History) -> str:
    """The same without curves, for a terminal, an issue or a wiki."""
    lines = [f"# {history.config['run']['name']}"]
    for title, rows in _fact_sections(history):
        lines += ["", f"## {title}", "", "| | |", "|---|---|"]
        lines += [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows]
    aims = goals(history)
    if aims:
        lines += ["", "## Goals", "", _GOALS_EXPLANATION, ""]
        lines += [f"- **{one.word}**: {_cell(one.wanted)}{_found(one)}" for one in aims]
    found = verdicts(history)
    if found:
        lines += ["", "## Did it work", "", _EXPLANATION, "", "| set | score | before | after | verdict |"]
        lines += ["|---|---|---|---|---|"]
        for one in found:
            before, after = _score(one.before, one.before_interval), _score(one.after, one.after_interval)
            lines.append(f"| {_cell(one.set_name)} | {one.score} | {before} | {after} | {one.word} |")
    if history.warnings:
        lines += ["", "## Warnings", "", *(f"- {_cell(str(record['message']))}" for record in history.warnings)]
    pairs = samples(history)
    if pairs:
        lines += ["", "## Answers before and after", "", "| set | prompt | reference | before | after |"]
        lines += ["|---|---|---|---|---|"]
        for pair in pairs:
            cells = (pair.set_name, pair.prompt, pair.reference, pair.before, pair.after)
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _fact_sections(history: History) -> list[tuple[str, list[tuple[str, str]]]]:
    sections = [
        ("The question", question(history)),
        ("What was recommended", recommendation(history)),
        ("What ran", facts(history)),
    ]
    return [(title, rows) for title, rows in sections if rows]


def _fact_table(rows: list[tuple[str, str]]) -> str:
    body = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
    return f'<div class="wide"><table>{body}</table></div>'


def _goal_item(one: Goal) -> str:
    return f'<li><b class="{one.word.replace(" ", "-")}">{one.word}</b>: {escape(one.wanted + _found(one))}</li>'


def _found(one: Goal) -> str:
    return f" ({one.found})" if one.found else ""


def _verdict_row(one: Verdict) -> str:
    before, after = _score(one.before, one.before_interval), _score(one.after, one.after_interval)
    steps = f"step {one.first_step}, then {one.last_step}"
    word = f'<td class="{one.word}" title="{steps}">{one.word}</td>'
    values = f'<td class="number">{before}</td><td class="number">{after}</td>'
    return f"<tr><td>{escape(one.set_name)}</td><td>{escape(one.score)}</td>{word}{values}</tr>"


def _sample_block(one: SamplePair) -> str:
    parts = (("prompt", one.prompt), ("reference", one.reference), ("before", one.before), ("after", one.after))
    cells = "".join(f"<div><dt>{name}</dt><dd>{escape(text)}</dd></div>" for name, text in parts)
    return f'<div class="sample">{escape(one.set_name)}<dl>{cells}</dl></div>'


def _score(value: float, found: tuple[float, float] | None) -> str:
    return f"{value:.4g}" + ("" if found is None else f" [{found[0]:.4g}, {found[1]:.4g}]")


def _cell(text: str) -> str:
    return escape(text, quote=False).replace("|", "\\|").replace("\n", "<br>")
