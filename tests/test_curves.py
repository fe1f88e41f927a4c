"""Curves, drawn twice: the same numbers as SVG and as charts; text from data stays text."""

import html
import json
import re
from pathlib import Path

import pytest

from taskvec.analysis.finding import Found, panel, places, value
from taskvec.report.curves import Curve, Panel, as_drawings, as_svg
from taskvec.report.pictures import Page, Picture, picture_page
from taskvec.results import Metric
from tests.test_report_page import browse, browser

HOSTILE = "<b>x</b> & </script>"


def metric(middle: int | float) -> Metric:
    return Metric(float(middle), middle - 0.5, middle + 0.25)


def line() -> Panel:
    own = Curve(HOSTILE, tuple((x, metric(x)) for x in (0, 1, 2)))
    return Panel("a title", "layer", (own, Curve("null", ((0, metric(1)), (2, metric(1))), null=True)))


def test_a_chart_has_values_intervals_and_bands() -> None:
    (drawing,) = as_drawings("name", "What to see.", [line()])
    assert (drawing.name, drawing.title, drawing.says) == ("name-0", "a title", "What to see.")
    band, own, _, null = json.loads(drawing.figure.to_json())["data"]
    assert band["x"] == [0, 1, 2, 2, 1, 0]
    assert band["y"] == [0.25, 1.25, 2.25, 1.5, 0.5, -0.5]
    assert own["y"] == [0, 1, 2]
    assert own["customdata"] == [[-0.5, 0.25], [0.5, 1.25], [1.5, 2.25]]
    assert (own["line"]["dash"], null["line"]["dash"]) == ("solid", "dot")
    assert null["marker"]["symbol"] != own["marker"]["symbol"]


def test_text_from_data_stays_text() -> None:
    (drawing,) = as_drawings("name", "", [line()])
    own = json.loads(drawing.figure.to_json())["data"][1]
    assert own["name"] == "&lt;b&gt;x&lt;/b&gt; &amp; &lt;/script&gt;"
    assert "</script>" not in as_svg([line()])


def test_an_axis_of_names_is_not_joined() -> None:
    found: Found = [({"of": name, "kind": "own", "measure": "m"}, metric(i)) for i, name in enumerate("ab")]
    found.append(({"of": "b", "kind": "null", "measure": "m"}, metric(5)))
    made = places("t", found, x="of", by="kind", where={"measure": "m"}, nulls=["null"])
    assert made.ticks == ("a", "b")
    assert [curve.points[0][0] for curve in made.curves] == [0, 1]
    (drawing,) = as_drawings("name", "", [made])
    own, null = json.loads(drawing.figure.to_json())["data"]
    assert (own["mode"], own["error_y"]["array"], own["error_y"]["arrayminus"]) == ("markers", [0.25, 0.25], [0.5, 0.5])
    assert null["marker"]["symbol"].endswith("-open")


def test_what_is_below_the_floor_is_cut_and_the_picture_says_so() -> None:
    deep = Panel("t", "layer", (Curve("own", ((0, metric(-400)), (1, metric(1)))),), floor=-1.0)
    assert "below -1 not shown" in as_svg([deep])
    layout = json.loads(as_drawings("name", "", [deep])[0].figure.to_json())["layout"]
    assert layout["yaxis"]["range"] == [-1, pytest.approx(1.25 + 0.05 * 2.25)]
    assert layout["yaxis"]["title"]["text"] == "below -1 not shown"
    low = Panel("t", "layer", (Curve("own", ((0, metric(-400)), (1, metric(-3)))),), floor=-1.0)
    assert low.cut == pytest.approx((-1, 0.05))
    shallow = Panel("t", "layer", line().curves, floor=-1.0)
    assert "not shown" not in as_svg([shallow])
    assert "range" not in json.loads(as_drawings("name", "", [shallow])[0].figure.to_json())["layout"]["yaxis"]


def test_layers_are_ticked_at_whole_numbers() -> None:
    points = tuple((x, metric(x)) for x in range(18))
    drawn = as_svg([Panel("t", "layer", (Curve("own", points),))])
    assert re.search(r"<!-- \d+ -->", drawn)
    assert not re.search(r"<!-- \d+\.\d+ -->", drawn.split("matplotlib.axis_2")[0])


def test_a_picture_is_the_same_bytes_for_the_same_numbers() -> None:
    one, two = as_svg([line(), line()]), as_svg([line(), line()])
    assert one == two
    assert one.count("a title") >= 1


def test_a_panel_holds_the_rows_that_are_asked_for_in_order() -> None:
    found: Found = [({"layer": x, "of": "a", "measure": m}, metric(x)) for x in (2, 0, 1) for m in ("p", "q")]
    (curve,) = panel("t", found, by="of", where={"measure": "q"}).curves
    assert [x for x, _ in curve.points] == [0, 1, 2]
    assert value(found, measure="p", layer=2).value == 2


PROBE = """
const out = { charts: document.querySelectorAll(".chart").length };
out.drawn = document.querySelectorAll(".chart svg.main-svg").length;
out.page = [document.documentElement.clientWidth, document.documentElement.scrollWidth, document.images.length];
out.legend = document.querySelector(".legend text").textContent;
out.title = document.querySelector("h1").textContent;
"""


@browser
def test_in_a_browser_charts_are_drawn_and_names_are_text(tmp_path: Path) -> None:
    drawn = [line(), line()]
    picture = Picture("p", HOSTILE, HOSTILE, as_svg(drawn), tuple(as_drawings("p", HOSTILE, drawn)))
    text = picture_page(Page(HOSTILE, "about", HOSTILE, (), (picture,), ()))
    found = re.search(r'data-out="([^"]*)"', browse(tmp_path, text, probe=PROBE, width=390))
    assert found is not None
    out = json.loads(html.unescape(found[1]))
    assert out["charts"] == 2
    assert out["drawn"] >= 2
    assert out["page"] == [390, 390, 0]
    assert out["legend"] == out["title"] == HOSTILE
