"""What editing did to one text, as a page of its own: no network, no other files.

The text stands in the middle, every byte coloured by how many bits it cost; a switch shows the same
without editing, and what was gained. Above it are curves of cost, gradient norms and refusals.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import numpy as np
import numpy.typing as npt

from titans_runtime.editor import specification
from titans_runtime.report import Lesson

_SHOWN = 200_000
"""Bytes of a text that the page shows; curves and figures are of all of it."""

_LEVELS = 9
_BITS_OF_LEVEL = 1.0
_GAIN_OF_LEVEL = 0.75
_POINTS = 600
_WIDTH, _HEIGHT = 960, 150

Curve = tuple[npt.NDArray[Any], npt.NDArray[Any]]
"""Places in the text, and the values there."""


@dataclass(frozen=True)
class Page:
    """All that a page says.

    Attributes:
        name: of the text.
        text: its bytes.
        on: bits of every byte, edited.
        off: the same without editing.
        lessons: what was learnt.
        facts: rows of the table of figures.
        began: position of the text in its stream, as the lessons tell positions.
    """

    name: str
    text: bytes
    on: npt.NDArray[np.float32]
    off: npt.NDArray[np.float32]
    lessons: Sequence[Lesson]
    facts: dict[str, str]
    began: int = 0

    def render(self) -> str:
        """The page as HTML."""
        parts = {
            "name": html.escape(self.name),
            "facts": "".join(
                f"<div><dt>{html.escape(key)}</dt><dd>{html.escape(value)}</dd></div>"
                for key, value in self.facts.items()
            ),
            "curves": "".join(self._curves()),
            "text": "".join(self._text()),
            "cut": self._cut(),
            "losses": "".join(self._losses()),
            "refusals": self._refusals(),
        }
        return Template(_PAGE).substitute(parts)

    def _text(self) -> Iterator[str]:
        """Runs of bytes of one cost and one gain, as spans; bytes that are no text stand in hex."""
        shown = self.text[:_SHOWN]
        cost, plain, gain = self._levels(len(shown))
        begin = 0
        for end in range(1, len(shown) + 1):
            if end < len(shown) and not (self._starts(end) and self._differs(begin, end, cost, plain, gain)):
                continue
            on, off = self.on[begin:end].sum(), self.off[begin:end].sum()
            piece = html.escape(shown[begin:end].decode("utf-8", "backslashreplace"))
            classes = f"c{cost[begin]} p{plain[begin]} g{gain[begin]}"
            yield f'<i class="{classes}" title="{on:.2f} bits edited, {off:.2f} unedited">{piece}</i>'
            begin = end

    def _levels(self, count: int) -> tuple[Any, Any, Any]:
        cost, plain = (
            np.clip(bits[:count] / _BITS_OF_LEVEL, 0, _LEVELS - 1).astype(int) for bits in (self.on, self.off)
        )
        saved = (self.off - self.on)[:count] / _GAIN_OF_LEVEL
        gain = np.clip(np.round(saved), -(_LEVELS // 2), _LEVELS // 2).astype(int) + _LEVELS // 2
        return cost, plain, gain

    def _starts(self, place: int) -> bool:
        """Whether a character of UTF-8 may begin at a byte."""
        return self.text[place] & 0xC0 != 0x80

    @staticmethod
    def _differs(a: int, b: int, *levels: Any) -> bool:  # noqa: ANN401 - integer arrays
        return any(level[a] != level[b] for level in levels)

    def _cut(self) -> str:
        rest = len(self.text) - _SHOWN
        return (
            f"<p class=note>{rest:,} more bytes are not shown; figures and curves are of all.</p>"
            if rest > 0
            else ""
        )

    def _losses(self) -> Iterator[str]:
        """Loss before and after, of the lessons in which both were measured."""
        for objective in dict.fromkeys(lesson.objective for lesson in self.lessons):
            own = [one for one in self.lessons if one.objective == objective and np.isfinite(one.loss_after)]
            tokens = sum(lesson.learnt for lesson in own)
            if not tokens:
                continue
            before, after = (
                sum(getattr(lesson, name) * lesson.learnt for lesson in own) / tokens
                for name in ("loss", "loss_after")
            )
            yield (
                f"<p class=note>{html.escape(objective)}: loss of a token {before:.3f} before the steps, "
                f"{after:.3f} after the last step that was kept and measured ({len(own):,} lessons; "
                "without rollback the last of a lesson's steps is not measured).</p>"
            )

    def _refusals(self) -> str:
        counts: dict[str, int] = {}
        for lesson in self.lessons:
            if lesson.refused:
                counts[lesson.refused] = counts.get(lesson.refused, 0) + 1
        if not counts:
            return "<p class=note>No lesson was refused.</p>"
        rows = "".join(f"<tr><td>{html.escape(why)}</td><td>{n:,}</td></tr>" for why, n in counts.items())
        return f"<table><tr><th>lessons refused because</th><th>how many</th></tr>{rows}</table>"

    def _curves(self) -> Iterator[str]:
        size = max(len(self.on) // _POINTS, 1)
        places = np.arange(0, len(self.on), size)
        window = max(len(self.on) // 60, 16)
        unedited, edited = (_smooth(bits, window)[places] for bits in (self.off, self.on))
        costs = {"unedited": (places, unedited), "edited": (places, edited)}
        yield _chart("bits per byte along the text", costs, len(self.on), ("#b3554d", "#2f6f4f"))
        gained = np.cumsum(self.off - self.on, dtype=np.float64)[places] / 8
        yield _chart("bytes saved so far", {"saved": (places, gained)}, len(self.on), ("#2f6f4f",))
        norms = self._norms()
        if norms:
            title = "gradient norm of every lesson, by layer (over all memories of one)"
            thinned = max(-(-len(points) // _POINTS) for points in norms.values())
            title += f"; one lesson in {thinned} is drawn" if thinned > 1 else ""
            drawn = {name: _curve(points) for name, points in norms.items()}
            yield _chart(title, drawn, len(self.on), _colours(len(norms)))

    def _norms(self) -> dict[str, list[tuple[int, float]]]:
        """Places and norms of the lessons' gradients: over the memories of a layer, of others one by one."""
        found: dict[str, list[tuple[int, float]]] = {}
        for lesson in self.lessons:
            layers: dict[str, float] = {}
            for memory, norm in lesson.norms.items():
                layer = _layer(memory)
                layers[layer] = math.hypot(layers.get(layer, 0.0), norm)
            for layer, norm in layers.items():
                if math.isfinite(norm):
                    found.setdefault(layer, []).append((max(lesson.position - self.began, 0), norm))
        return found


def _layer(memory: str) -> str:
    """``layers.3`` of ``layers.3.memory.0``; what is no layer's keeps its name."""
    layer = re.match(r"layers\.\d+(?=\.)", memory)
    return layer[0] if layer else memory


def _curve(points: list[tuple[int, float]]) -> Curve:
    places, norms = np.array(points[:: -(-len(points) // _POINTS)]).T
    return places, norms


def _colours(count: int) -> list[str]:
    """As many colours as there are curves, around the wheel."""
    return [f"hsl({360 * number // count + 220} 45% 42%)" for number in range(count)]


def _smooth(bits: npt.NDArray[np.float32], window: int) -> npt.NDArray[np.float64]:
    """Mean over the last ``window`` bytes, fewer at the beginning."""
    total = np.concatenate([[0.0], np.cumsum(bits, dtype=np.float64)])
    end = np.arange(1, len(bits) + 1)
    start = np.maximum(end - window, 0)
    mean: npt.NDArray[np.float64] = (total[end] - total[start]) / (end - start)
    return mean


def _chart(title: str, series: dict[str, Curve], length: int, colours: Sequence[str]) -> str:
    """Lines over the text as an SVG, with a scale at the left."""
    values = np.concatenate([own for _, own in series.values()])
    low, high = min(float(np.nanmin(values)), 0.0), max(float(np.nanmax(values)), 1e-9)
    low = 0.0 if low > -0.01 * high else low
    lines, keys = [], []
    for (name, (places, own)), colour in zip(series.items(), colours, strict=True):
        x = places / max(length - 1, 1) * _WIDTH
        y = _HEIGHT - (own - low) / (high - low) * _HEIGHT
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>')
        keys.append(f'<span style="color:{colour}">■ {html.escape(name)}</span>')
    ticks = "".join(
        f'<line x1="0" x2="{_WIDTH}" y1="{y}" y2="{y}" class="grid"/>'
        f'<text x="-6" y="{y + 4}" text-anchor="end">{_tick(high - (high - low) * y / _HEIGHT)}</text>'
        for y in (0, _HEIGHT // 2, _HEIGHT)
    )
    return (
        f"<figure><figcaption>{html.escape(title)} &nbsp; {' &nbsp; '.join(keys)}</figcaption>"
        f'<svg viewBox="-48 -8 {_WIDTH + 56} {_HEIGHT + 16}" role="img" aria-label="{html.escape(title)}">'
        f"{ticks}{''.join(lines)}</svg></figure>"
    )


def _tick(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _shades() -> str:
    """Colours: cost from paper to red; gain from red over paper to green."""
    rules = []
    for level in range(_LEVELS):
        share = level / (_LEVELS - 1)
        red = f"rgba(196,62,40,{0.62 * share:.2f})"
        rules += [f"body.on .c{level}{{background:{red}}}", f"body.off .p{level}{{background:{red}}}"]
        side = 2 * share - 1
        colour = "34,120,72" if side > 0 else "196,62,40"
        rules.append(f"body.gain .g{level}{{background:rgba({colour},{0.6 * abs(side):.2f})}}")
    return "".join(rules)


_PAGE = (
    """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Editing: $name</title>
<style>
:root{color-scheme:light}
body{margin:0 auto;max-width:1080px;padding:28px 24px 60px;background:#fbfaf7;color:#23211d;
 font:15px/1.5 system-ui,sans-serif}
h1{font-size:22px;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:16px;margin:30px 0 8px}
dl{display:flex;flex-wrap:wrap;gap:10px 30px;margin:14px 0 6px}
dt{font-size:12px;color:#77716a}dd{margin:0;font-size:18px;font-variant-numeric:tabular-nums;overflow-wrap:anywhere}
figure{margin:18px 0 0}figcaption{font-size:13px;color:#55504a}
svg{width:100%;height:auto;overflow:visible}svg text{font:11px system-ui,sans-serif;fill:#77716a}
.grid{stroke:#e3dfd7;stroke-width:1}
pre{background:#fff;border:1px solid #e3dfd7;border-radius:6px;padding:16px;margin:8px 0 0;
 font:13px/1.65 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;overflow-wrap:anywhere;tab-size:4}
i{font-style:normal;border-radius:2px}i:hover{outline:1px solid #23211d}
.switch{display:flex;gap:6px;align-items:center;flex-wrap:wrap}
button{font:inherit;font-size:13px;padding:4px 12px;border:1px solid #c9c3b8;border-radius:14px;
 background:#fff;cursor:pointer}
body.on #b-on,body.off #b-off,body.gain #b-gain{background:#23211d;color:#fff;border-color:#23211d}
table{border-collapse:collapse;font-size:14px}td,th{text-align:left;padding:3px 18px 3px 0;
 border-bottom:1px solid #e3dfd7}.note{color:#77716a;font-size:13px}
"""
    + _shades()
    + """
</style></head>
<body class="on">
<h1>$name</h1>
<p class=note>Every byte was scored before the memory saw it.</p>
<dl>$facts</dl>
$curves
<h2>Lessons</h2>
$losses
$refusals
<h2>The text</h2>
<div class="switch">
<button id="b-on" type="button">surprise, edited</button>
<button id="b-off" type="button">surprise, unedited</button>
<button id="b-gain" type="button">what editing gained</button>
<span class=note>red costs bits; in the third view green was gained and red was lost;
point at text for figures</span>
</div>
<pre>$text</pre>
$cut
<script>
for (const name of ["on", "off", "gain"])
  document.getElementById("b-" + name).onclick = () => { document.body.className = name; };
</script>
</body></html>
"""
)


def facts_of(fields: dict[str, Any], off: float, on: float) -> dict[str, str]:
    """The table of figures from what ``titans run`` says."""
    prepared = fields.get("prepared")
    context = {"prepared by": f"{prepared['passes']} × {prepared['bytes']:,} bytes"} if prepared else {}
    return context | {
        "bits per byte, unedited": f"{off:.3f}",
        "edited": f"{on:.3f}",
        "fewer bits": f"{100 * (1 - on / off):.1f} %",
        "bytes": f"{fields['bytes']:,}",
        "edited bytes a second": f"{fields['tokens_per_second']:,.0f}",
        "editor": specification(fields["editor"]),
    }
