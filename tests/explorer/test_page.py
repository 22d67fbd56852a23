"""Pages hold every text whatever it is, and no markup but their own."""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memorizing_transformers_pytorch.explorer.charts import drawn
from memorizing_transformers_pytorch.explorer.explanation import Explanation, Passage
from memorizing_transformers_pytorch.explorer.markup import ENVIRONMENT, visible
from memorizing_transformers_pytorch.explorer.page import page, write_page
from memorizing_transformers_pytorch.explorer.run_page import run_page, write_run_page
from memorizing_transformers_pytorch.explorer.sources import Sources
from memorizing_transformers_pytorch.utils.charts import Chart, Curve
from tests.amounts import some

HOSTILE = [
    "<script>alert(1)</script>",
    "\" onmouseover='alert(1)' x=\"",
    "</title></style></script><img src=x onerror=alert(1)>",
    "&lt;b&gt; &amp;amp; &#x202e; ]]> <!-- -->",
    "\u202egnp.exe\u2066\u200f",
    "\x00\x07\x1b[31m\x7f\x85\r\n",
    "שלום עולם مرحبا",
    "👩\u200d👩\u200d👧 🏴\U000e0067\U000e007f",
    "x" * 5_000,
    "\ud800 \ufeff\ufffe",
]
TEXTS = st.one_of(st.sampled_from(HOSTILE), st.text(st.characters(), min_size=1, max_size=20))


class Parsed(HTMLParser):
    """Tags with the names of their attributes, identities, and all text."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[tuple[str, tuple[str, ...]]] = Counter()
        self.attributes: list[dict[str, str]] = []
        self.texts: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag, tuple(name for name, _ in attrs)] += 1
        self.attributes.append({"tag": tag, **{name: value or "" for name, value in attrs}})
        self.inside = tag

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside in ("script", "style"):
            self.scripts.append(data)
        else:
            self.texts.append(data)


class Told(Sources):
    """Sources that say the same of every place."""

    def __init__(self, text: str) -> None:
        super().__init__([], 0, None)
        self._text = text

    def text(self, document: int, first: int, last: int) -> str:
        return self._text


def explanation(texts: list[str], title: str, source: str, heads: int = 3, retrieved: int = 4) -> Explanation:
    """Each token looked up `retrieved` entries with each head of two layers."""
    count = len(texts)
    layer, head, token, place = (
        axis.reshape(-1) for axis in np.meshgrid([2, 5], range(heads), range(count), range(retrieved), indexing="ij")
    )
    weights = np.random.default_rng(0).uniform(0.01, 0.2, len(token))
    mass = weights.reshape(2, heads, count, retrieved).sum(-1)
    columns = {
        "token": token, "layer": layer, "head": head, "score": weights, "weight": weights,
        "document": place % 2, "position": 10 * place, "source_token": place, "age": place + 1,
    }  # fmt: skip
    losses = np.full(count, 1.5)
    losses[0] = np.nan
    passages = [Passage(0, title, 0, 63, source, 0.5, 0.25), Passage(1, title, 0, 63, source, 0.2)]
    return Explanation(
        texts, losses, losses + 1, [2, 5], mass, {0: title, 1: title}, columns, passages, Told(source), {}
    )


@settings(max_examples=some(20, 1_000), deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=4), TEXTS, TEXTS)
def test_no_text_becomes_markup_and_each_survives(texts: list[str], title: str, source: str) -> None:
    plain = Parsed(page(explanation(["a"] * len(texts), "b", "c"), "d"))
    parsed = Parsed(page(explanation(texts, title, source), title))
    assert parsed.tags.keys() <= plain.tags.keys() | {("mark", ())}
    assert {name: count for (name, _), count in parsed.tags.items() if name != "mark"} == {
        name: count for (name, _), count in plain.tags.items() if name != "mark"
    }
    assert parsed.scripts == plain.scripts
    everything = "".join(parsed.texts)
    for text in (title, source):
        assert visible(text) in everything
    for text in texts:
        assert visible(text).replace("\n", "↵\n") in everything


@given(st.text(st.characters()))
def test_nothing_is_hidden_in_a_shown_text(text: str) -> None:
    found = visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", found)
    assert not set("<>\"'") & set(ENVIRONMENT.from_string("{{ text }}").render(text=text))
    found.encode()
    if text.isascii() and text.isprintable():
        assert found == text


def test_only_the_script_and_style_of_the_page_itself_may_run_and_nothing_is_loaded() -> None:
    text = page(explanation(["a", "b"], "title", "source"))
    [policy] = re.findall('http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    rules = dict(rule.split(" ", 1) for rule in policy.split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    for tag in ("style", "script"):
        [content] = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.S)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    for attributes in Parsed(text).attributes:
        assert not attributes.keys() & {"src", "style", "srcset", "action"}
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")


def luminance(color: str) -> float:
    digits = color[1:] if len(color) == 7 else "".join(2 * digit for digit in color[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_text_and_curves_stand_out_in_both_schemes() -> None:
    """As WCAG AA asks: 4.5 for text, 3 for what is drawn."""
    schemes = re.findall(r":root \{(.*?)\}", page(explanation(["a"], "title", "source")), re.S)
    assert len(schemes) == 2
    for scheme in schemes:
        colors = dict(re.findall(r"--(\w+): (#\w+);", scheme))
        for text, grounds in (("text", "back soft heat mark"), ("quiet", "back soft"), ("link", "back soft")):
            assert min(contrast(colors[text], colors[ground]) for ground in grounds.split()) >= 4.5
        assert min(contrast(colors[f"c{i}"], colors["back"]) for i in range(6)) >= 3
        assert contrast(colors["edge"], colors["back"]) >= 3


def test_without_the_script_all_is_there_and_every_link_leads_somewhere() -> None:
    texts = ["one ", "two ", "three"]
    parsed = Parsed(page(explanation(texts, "title", "source")))
    names = [each["id"] for each in parsed.attributes if "id" in each]
    assert len(names) == len(set(names))
    links = {each["href"][1:] for each in parsed.attributes if each["tag"] == "a"}
    assert links <= set(names)
    assert {f"t{i}" for i in range(3)} <= links
    assert {"p0", "p1"} <= links
    rows = [each for each in parsed.attributes if each["tag"] == "tr" and "data-layer" in each]
    of_heads = 2 * 3
    assert 3 * 8 + of_heads <= len(rows) <= 3 * (8 + of_heads) + of_heads
    assert sum("hidden" in each for each in parsed.attributes) == 3  # the panel, the choice, and how to use them


def test_the_best_of_each_head_is_written() -> None:
    found = explanation(["a"], "title", "source", heads=3, retrieved=20)
    text = page(found)
    [details] = re.findall('<div id="t0">(.*?)</div></details>', text, re.S)
    heads = set(re.findall('data-layer="(\\d+)" data-head="(\\d+)"', details))
    assert heads == {(str(layer), str(head)) for layer in (2, 5) for head in range(3)}
    best = sorted(found.columns["weight"])[::-1][:8]
    assert all(f">{weight:.3f}<" in details for weight in best)


def test_a_page_of_two_thousand_tokens_stays_small(tmp_path: Path) -> None:
    found = explanation(["token "] * 2_000, "some/module.py", "what stands around it " * 5, heads=4, retrieved=16)
    write_page(found, tmp_path / "page.html")
    assert (tmp_path / "page.html").stat().st_size < 12_000_000
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_a_page_that_cannot_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text("before")
    found = explanation(["a"], "title", "source")
    with pytest.raises(IndexError):
        write_page(replace(found, texts=["a", "b"]), tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "before"
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_a_page_of_nothing_looked_up_says_so() -> None:
    found = explanation(["a", ""], "title", "source", retrieved=0)
    assert "What was looked up is of no known document." in page(replace(explanation(["a"], "", ""), passages=[]))
    text = page(replace(found, passages=[], mass=np.zeros((0, 0, 2)), layers=[]))
    assert "Nothing was looked up." in text
    assert ">·</a>" in text
    assert "nan" not in Parsed(text).texts


def test_curves_show_their_ends_and_their_numbers() -> None:
    curves = [Curve("on & off", [(1, 2.5), (2, 1.5)]), Curve("one", [(2, 3)]), Curve("no", [])]
    [loss] = drawn([Chart("Loss <b>", "x", "y", curves), Chart("Loss", "x", "y", [Curve("no", [])])])
    parsed = Parsed(str(ENVIRONMENT.get_template("macros.html").module.chart(loss)))
    labels = [each.get("aria-label") for each in parsed.attributes]
    assert "Loss <b>: on & off from 2.5 to 1.5; one from 3 to 3" in labels
    assert {"2.5", "1.5", "3", "-"} <= set(parsed.texts)
    assert ("b", ()) not in parsed.tags
    assert drawn([Chart("Sizes", "x", "y", [Curve("many", [(0, 1), (512, 1), (65_536, 1)])], log=True)])


def test_the_page_of_a_run_has_what_there_is(tmp_path: Path) -> None:
    empty = run_page("run", [], None, None, "")
    assert "Nothing was written down." in empty
    memory = {"layer 2": {"mass": [0.5, 0.25], "gate": [0.1, 0.2], "temperature": [9.0, 8.0], "age": [1, 2, 3]}}
    records = [
        {"step": 1, "loss": 3.0, "memory": memory},
        {"step": 2, "loss": None, "memory": {"layer 2": {"temperature": [9.0, 8.0]}}},
        {"step": 2, "validation": {"off": 3.0, "64": 2.5}},
    ]
    text = run_page("run", records, None, explanation(["a"], "title", "source"), "<b> held out")
    for words in ("Gate, by head", "Temperature, by head", "Age of what is retrieved", "validation, 64 entries"):
        assert words in text
    assert "&lt;b&gt; held out" in text
    assert write_run_page(tmp_path, None).read_text().startswith("<!DOCTYPE html>")
