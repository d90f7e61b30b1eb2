"""Pages escape what they show, need nothing from elsewhere, and never take text for a place to fill."""

import re
from pathlib import Path

import pytest

from holdfast.pages import Link, details_element, heading, note, paragraph, picture_element, table_element, write_page
from holdfast.pictures import new_figure, picture

EVIL = '<script>alert("x")</script>&{{body}}'


def test_all_text_is_escaped_and_no_text_is_a_placeholder(tmp_path: Path) -> None:
    parts = [heading(EVIL), paragraph(EVIL), note(EVIL), table_element([EVIL], [[EVIL]], EVIL)]
    parts.append(details_element(EVIL, []))
    parts.append(picture_element(new_figure((1, 1)), f'" onerror="{EVIL}'))
    page = write_page(tmp_path / "page.html", EVIL, parts).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert '" onerror="' not in page
    assert page.count("&lt;script&gt;") == 2 + len(parts) + 2  # the title twice; a table has three texts
    assert page.count("{{body}}") == page.count("&lt;script&gt;")
    assert "default-src 'none'" in page
    assert not re.search(r"https?://", page)


def test_links_lead_to_headings() -> None:
    assert heading("A", 'a"b') == '<h2 id="a&quot;b">A</h2>'
    table = table_element(["", "m"], [[Link("<A>", 'a"b'), "1"]])
    assert '<td><a href="#a&quot;b">&lt;A&gt;</a></td><td>1</td>' in table


@pytest.mark.parametrize("from_file", [False, True])
def test_pictures_are_inside(tmp_path: Path, from_file: bool) -> None:
    with picture(tmp_path / "picture.png", (1, 1)) as figure:
        figure.add_subplot()
    element = picture_element(tmp_path / "picture.png" if from_file else figure, "axes")
    assert element.startswith('<img src="data:image/png;base64,iVBOR')
    assert element.endswith('alt="axes">')
