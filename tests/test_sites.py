"""Site names: parsing, printing, refusals, order."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from taskvec.errors import UnknownName
from taskvec.sites import Site, SiteKind

LAYERED: tuple[SiteKind, ...] = ("resid", "attn", "mlp", "heads")
numbers = st.integers(0, 10**6)
sites = st.one_of(
    st.builds(Site, st.sampled_from(LAYERED), numbers),
    st.builds(Site, st.just("heads"), numbers, numbers),
    st.builds(Site, st.sampled_from(["embed", "lm_head_in"])),
)
MALFORMED = [
    "resid",
    "attn",
    "mlp",
    "heads",
    "resid[]",
    "resid[-1]",
    "resid[1,2]",
    "attn[0,0]",
    "mlp[0,0]",
    "embed[0]",
    "lm_head_in[1]",
    "heads[1,]",
    "heads[,1]",
    "heads[1,2,3]",
    "heads[1,-2]",
    "heads[-1,2]",
    "Resid[1]",
    "resid[1.0]",
    "resid[+1]",
    "resid[x]",
    "resid(1)",
    "resid[1",
    "resid1]",
    "resid1",
    "[1]",
    "residual[1]",
    "resid[1]x",
    "xresid[1]",
    "resid[1][2]",
    "block[3]",
    "lm_head",
    "embed_in",
    "resid[0x1]",
    "resid[1_0]",
]


@given(sites)
@settings(deadline=None, max_examples=60)
def test_every_site_is_read_back_from_its_name(site: Site) -> None:
    again = Site.parse(str(site))
    assert again == site
    assert (again.kind, again.layer, again.head) == (site.kind, site.layer, site.head)
    assert repr(site) == f"Site({str(site)!r})"


def test_names_are_read_into_their_parts() -> None:
    assert Site.parse("resid[0]") == Site("resid", 0)
    assert Site.parse(" heads[3, 11] ") == Site("heads", 3, 11)
    assert Site.parse("heads[12]") == Site("heads", 12)
    assert Site.parse("embed") == Site("embed")
    assert [str(Site("heads", 3, 0)), str(Site("mlp", 10)), str(Site("lm_head_in"))] == [
        "heads[3,0]",
        "mlp[10]",
        "lm_head_in",
    ]


def test_a_site_is_parsed_to_itself() -> None:
    site = Site("attn", 2)
    assert Site.parse(site) is site


@pytest.mark.parametrize("text", [*MALFORMED, "", " ", "resid [1]", "resid[ 1]", "resid[1\n]", "resid[\u0663]"])
def test_a_malformed_name_is_refused(text: str) -> None:
    with pytest.raises(UnknownName, match="wanted a site") as caught:
        Site.parse(text)
    assert repr(text) in caught.value.found


def test_an_absurdly_large_layer_is_refused_too() -> None:
    with pytest.raises(UnknownName):
        Site.parse(f"resid[{'9' * 5000}]")


@given(
    st.one_of(st.text(max_size=8), st.text("embdrsihat[],0 1", max_size=10), st.from_regex(r"heads\[\s*\d+,\s*\d+\]"))
)
@settings(deadline=None, max_examples=100)
def test_any_text_is_a_site_or_an_unknown_name(text: str) -> None:
    try:
        site = Site.parse(text)
    except UnknownName:
        return
    assert Site.parse(str(site)) == site


@pytest.mark.parametrize(
    "parts",
    [
        ("resid",),
        ("heads",),
        ("embed", 0),
        ("lm_head_in", 3),
        ("resid", 1, 2),
        ("attn", 1, 0),
        ("mlp", 1, 2),
        ("heads", None, 1),
        ("embed", None, 0),
        ("resid", -1),
        ("heads", 0, -1),
    ],
)
def test_a_site_without_a_name_cannot_be_built(parts: tuple[Any, ...]) -> None:
    with pytest.raises(UnknownName):
        Site(*parts)


def test_whole_takes_the_head_away_and_nothing_else() -> None:
    assert Site("heads", 4, 7).whole == Site("heads", 4)
    for site in (Site("heads", 4), Site("resid", 0), Site("embed")):
        assert site.whole == site


def test_equal_sites_hash_alike_and_different_ones_are_told_apart() -> None:
    names = ["resid[1]", "resid[2]", "attn[1]", "heads[1]", "heads[1,0]", "heads[1,1]", "embed", "lm_head_in"]
    assert len({Site.parse(name) for name in names * 2}) == len(names)


def test_order_is_by_number_and_not_by_text() -> None:
    assert sorted([Site("resid", 10), Site("resid", 9)]) == [Site("resid", 9), Site("resid", 10)]
    assert sorted([Site("heads", 2, 0), Site("heads", 1, 10), Site("heads", 1, 9)]) == [
        Site("heads", 1, 9),
        Site("heads", 1, 10),
        Site("heads", 2, 0),
    ]


@given(st.permutations([Site(kind, n) for kind in LAYERED for n in (0, 9, 10)] + [Site("embed"), Site("heads", 9, 1)]))
@settings(deadline=None, max_examples=20)
def test_sites_of_all_kinds_can_be_sorted_together(some: list[Site]) -> None:
    assert [str(site) for site in sorted(some)] == [
        *("attn[0]", "attn[9]", "attn[10]", "embed", "heads[0]", "heads[9]", "heads[9,1]", "heads[10]"),
        *("mlp[0]", "mlp[9]", "mlp[10]", "resid[0]", "resid[9]", "resid[10]"),
    ]


def test_a_whole_site_sorts_before_its_heads() -> None:
    assert sorted([Site("heads", 1, 0), Site("heads", 1)]) == [Site("heads", 1), Site("heads", 1, 0)]
