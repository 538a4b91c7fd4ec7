"""Runs drawn: pictures by what lies on their axes, the page as a browser would take it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ernie45.errors import NotFoundError
from ernie45.training import plot, plot_router
from ernie45.training.plot import draw, groups, span_of
from ernie45.training.plot_router import edges, thinned
from ernie45.training.plot_style import Drawing
from ernie45.training.report import inline_svg, write_report
from ernie45.training.run_log import Series, read_run, read_runs

pytest.importorskip("matplotlib")

LINE = {"step": 1, "loss": 2.5}


@pytest.fixture
def canvases(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Canvases by the name of their drawing, as they are when they would be saved."""
    found: dict[str, Any] = {}

    def keep(canvas: Any, name: str, heading: str, caption: str) -> Drawing:
        found[name] = canvas
        return Drawing(name=name, heading=heading, caption=caption, png=b"", svg="")

    for module in (plot, plot_router):
        monkeypatch.setattr(module, "finish", keep)
    return found


def panel(canvas: Any, title: str) -> Any:
    return next(axes for axes in canvas.axes if axes.get_title(loc="left").startswith(title))


def series(values: Sequence[float]) -> Series:
    return Series(steps=np.arange(len(values)), values=np.array(values, dtype=np.float64))


def test_few_values_have_no_mean_and_many_one_of_two_in_a_hundred() -> None:
    assert [span_of(series([0.0] * size)) for size in (1, 60, 61, 1000)] == [1, 1, 2, 20]


def test_columns_of_a_heatmap() -> None:
    assert edges(np.array([10.0, 20.0, 40.0])).tolist() == [5, 15, 30, 50]
    assert edges(np.array([7.0])).tolist() == [6.5, 7.5]
    steps, values = thinned(np.arange(1, 1002), np.arange(1, 1002, dtype=np.float64).reshape(-1, 1, 1) * [[1.0, 2.0]])
    assert len(steps) == 334, "three each, and two at the end"
    assert steps[[0, 1, -1]].tolist() == [2, 5, 1000.5]
    assert values[1].tolist() == [[5, 10]]
    same, kept = thinned(np.array([3, 9]), np.ones((2, 1, 2)))
    assert (same.tolist(), kept.shape) == ([3, 9], (2, 1, 2))


def test_unknown_measurements_are_drawn_by_their_prefix(write_run: Any) -> None:
    line = {"step": 1, "loss": 1.0, "lr": 0.1, "zest": 2.0, "kl/mean": 0.5, "kl/max": 1.0, "rewards/form": 1.0}
    assert groups([read_run(write_run("a", [line]), "a")]) == {
        "loss": ["loss"],
        "progress": ["lr"],
        "other": ["zest"],
        "kl": ["kl/mean", "kl/max"],
        "rewards": ["rewards/form"],
    }


@pytest.mark.usefixtures("canvases")
def test_a_moe_run_has_every_drawing_and_a_dense_one_no_router(write_run: Any, metrics: Any) -> None:
    expected = ["loss", "losses", "progress", "rewards"]
    moe, dense = (read_run(write_run(name, metrics(80, moe=name == "moe")), name) for name in ("moe", "dense"))
    assert [drawing.name for drawing in draw([dense])] == expected
    drawings = draw([moe])
    assert [drawing.name for drawing in drawings] == [*expected, "router-overview", "expert-load"]
    assert "mean over about 2 %" in drawings[0].caption
    assert "mean" not in draw([read_run(write_run("short", metrics(5)), "short")])[0].caption


def test_lines_show_the_values_in_their_units(write_run: Any, metrics: Any, canvases: dict[str, Any]) -> None:
    run = read_run(write_run("a", metrics(80)), "a")
    draw([run])
    raw, mean = panel(canvases["loss"], "loss").lines
    assert raw.get_xdata().tolist() == run.series["loss"].steps.tolist()
    assert raw.get_ydata().tolist() == run.series["loss"].values.tolist()
    assert mean.get_ydata().tolist() == run.series["loss"].smoothed(2).tolist()
    assert panel(canvases["loss"], "loss").get_ylabel() == "nats per token"
    (held_out,) = panel(canvases["loss"], "loss on held-out").lines
    assert held_out.get_ydata().tolist() == [2.5] * 16
    assert held_out.get_marker() == "o", "few values are points"
    share = panel(canvases["progress"], "model FLOP")
    assert share.lines[0].get_ydata().tolist() == [50.0] * 79
    assert share.get_ylabel() == "% of peak"
    memory = panel(canvases["progress"], "memory")
    assert (memory.lines[0].get_ydata()[0], memory.get_ylabel()) == (pytest.approx(3.000000001), "GB")
    assert len(panel(canvases["progress"], "learning rate").lines) == 1, "no mean of what does not scatter"
    for axes in canvases["progress"].axes:
        if axes.lines:
            assert axes.get_xlabel() == "step"
            assert all(place == round(place) for place in axes.get_xticks())


def test_a_preference_loss_is_not_called_nats(
    write_run: Any, metrics: Any, about: Any, canvases: dict[str, Any]
) -> None:
    draw([read_run(write_run("a", metrics(2), about={**about, "method": "dpo"}), "a")])
    assert panel(canvases["loss"], "loss").get_ylabel() == ""


def test_load_is_drawn_as_multiples_of_the_even_share(write_run: Any, metrics: Any, canvases: dict[str, Any]) -> None:
    draw([read_run(write_run("a", metrics(20)), "a")])
    at_the_end = panel(canvases["router-overview"], "load, step 200").collections[0].get_array()
    assert np.asarray(at_the_end).tolist() == [[1, 1, 1, 1], [1, 1, 2, 0]]
    over_time = np.asarray(panel(canvases["expert-load"], "MoE layer 1").collections[0].get_array())
    assert over_time.shape == (4, 20), "experts over steps"
    assert over_time[:, 9].tolist() == [1, 1, 1.5, 0.5]
    assert np.asarray(panel(canvases["expert-load"], "MoE layer 0").collections[0].get_array()).min() == 1
    first, second = panel(canvases["router-overview"], "router entropy").lines
    assert first.get_ydata().tolist() == [1.25] * 20
    assert second.get_ydata()[-1] == 1.02


def test_counts_instead_of_shares_and_layers_without_tokens(write_run: Any, canvases: dict[str, Any]) -> None:
    draw([read_run(write_run("a", [{"step": 1, "expert_load": [[30, 10], [0, 0]]}]), "a")])
    drawn = np.ma.filled(panel(canvases["router-overview"], "load").collections[0].get_array(), np.nan)
    assert drawn[0].tolist() == [1.5, 0.5]
    assert np.isnan(drawn[1]).all()


def test_several_runs_lie_on_each_other(write_run: Any, metrics: Any, canvases: dict[str, Any]) -> None:
    folders = [write_run("with", metrics(20)), write_run("without", metrics(30, offset=0.5))]
    drawings = draw(read_runs(folders))
    assert [drawing.name for drawing in drawings][-3:] == ["router-overview", "expert-load-with", "expert-load-without"]
    first, second = panel(canvases["loss"], "loss").lines
    assert (len(first.get_xdata()), len(second.get_xdata())) == (20, 30)
    assert first.get_color() != second.get_color()
    (key,) = canvases["loss"].legends
    assert [text.get_text() for text in key.get_texts()] == ["with", "without"]
    assert [handle.get_color() for handle in key.get_lines()] == [first.get_color(), second.get_color()]
    band, _ = panel(canvases["router-overview"], "router entropy, mean").collections
    assert band.get_paths()[0].vertices[:, 1].max() == 1.25


def test_drawing_changes_nothing_global(write_run: Any) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw([read_run(write_run("a", [LINE]), "a")])
    assert dict(mpl.rcParams) == before


def test_without_matplotlib_the_remedy_is_said(write_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = read_run(write_run("a", [LINE]), "a")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(NotFoundError, match="pip install matplotlib"):
        draw([run])


class Page(HTMLParser):
    """What a browser would fetch or run, ids, and whether every element is closed."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.source = (folder / "report.html").read_text(encoding="utf-8")
        self.tags: Counter[str] = Counter()
        self.links: list[str] = []
        self.ids: list[str] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag != "meta":
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            assert not name.startswith("on"), "no handlers"
            if name in ("src", "href", "xlink:href", "srcset", "data", "action"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_report_is_whole_and_needs_nobody(write_run: Any, metrics: Any, tmp_path: Path, check_png: Any) -> None:
    run = read_run(write_run("a", metrics(80), end='\n{"step"'), "a")
    files = write_report([run], tmp_path / "new" / "plots")
    stems = ("loss", "losses", "progress", "rewards", "router-overview", "expert-load")
    assert {file.name for file in files} == {
        "report.html", "metrics.csv", "experts.csv", *(f"{stem}.{kind}" for stem in stems for kind in ("png", "svg"))
    }  # fmt: skip
    for file in files:
        if file.suffix == ".png":
            check_png(file)
    page = Page(tmp_path / "new" / "plots")
    assert page.open == []
    assert page.tags["svg"] == len(stems)
    assert not page.tags.keys() & {"script", "link", "iframe", "img", "object", "embed"}
    assert page.links
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import", page.source)
    assert max(Counter(page.ids).values()) == 1
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", page.source)) <= set(page.ids)
    assert "prefers-color-scheme:dark" in page.source
    words = " ".join(page.texts)
    for wanted in (
        *(
            "12.3 M, 4 M active per token",
            "328 k",
            "model.hidden_size",
            "2.13.0",
            "3 min 20 s",
            "loss on held-out data, step 50",
        ),
        "line 81 of metrics.jsonl is cut off",
    ):
        assert wanted in words


def test_drawings_take_the_colours_of_the_page(write_run: Any) -> None:
    drawing = draw([read_run(write_run("a", [LINE]), "a")])[0]
    svg = inline_svg(drawing)
    assert svg.startswith('<svg role="img" aria-label="Loss"')
    for variable in ("--c0", "--ink", "--grid", "--paper"):
        assert f"var({variable})" in svg
    assert not re.search(r"#(2a6f97|33383d|d9dde1|ffffff)", svg)
    assert "#2a6f97" in drawing.svg, "the file beside the page stands alone"
    assert "nats per token" in svg, "texts are texts"


def test_names_cannot_break_the_page(write_run: Any, about: Any, tmp_path: Path) -> None:
    nasty = '<i onclick="x">&amp;$\\x$'
    described = {**about, "config": {nasty: nasty}, "method": nasty}
    runs = read_runs([write_run("x<i>", [{**LINE, f"{nasty}/{nasty}": 1.0}], about=described), write_run("y", [LINE])])
    files = write_report(runs, tmp_path / "out")
    page = Page(tmp_path / "out")
    assert "i" not in page.tags
    assert nasty in page.texts
    assert page.open == []
    assert all(re.fullmatch(r"[\w.-]+", file.name) for file in files)


def test_equal_runs_give_equal_bytes(write_run: Any, tmp_path: Path) -> None:
    run = read_run(write_run("a", [{**LINE, "expert_load": [[0.5, 0.5]]}]), "a")
    first, second = (
        {file.name: file.read_bytes() for file in write_report([run], tmp_path / name)} for name in ("one", "two")
    )
    assert first == second


def test_a_report_is_replaced(write_run: Any, tmp_path: Path) -> None:
    for name in ("old", "new"):
        write_report([read_run(write_run(name, [LINE]), name)], tmp_path / "out")
    assert "<h1>new</h1>" in Page(tmp_path / "out").source
