from __future__ import annotations

import pytest

from vpt.screen import Table, markdown, show

LONG = ("gaussian_noise (mean of severities 1-5)", "gaussian_blur (mean of severities 1-5)")


def shown(table: Table, width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    show(table)
    return capsys.readouterr().out.splitlines()


def column(lines: list[str], place: int) -> str:
    """All that a column says, its folds put together."""
    return "".join(line.split("│")[1 + place].strip() for line in lines if line.startswith("│"))


@pytest.mark.parametrize("width", [40, 80, 200])
def test_a_table_shows_every_cell_whole(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table("test set", *(f"α = {alpha}" for alpha in (0, 0.25, 0.5, 0.75, 1)), "oracle", title="Top-1 (%)")
    for name in LONG:
        table.add_row(name, *(f"71.{digit}" for digit in range(5)), "71.4 (0.25)")
    lines = shown(table, width, monkeypatch, capsys)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    assert "".join(LONG).replace(" ", "") in column(lines, 0).replace(" ", "")
    for number in [*(f"71.{digit}" for digit in range(5)), "71.4 (0.25)"]:
        assert sum(line.count(f"{number}│") + line.count(f"{number} ") for line in lines) >= len(LONG), number


def test_a_word_that_has_no_room_is_folded(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("run", "test")
    names = [f"own/photos_split/vpt_deep/version_{number}" for number in range(2)]
    for name in names:
        table.add_row(name, "93.4")
    assert column(shown(table, 30, monkeypatch, capsys), 0) == "".join(names)


@pytest.mark.parametrize("name", ["mk[", "[red]x", "[/x]", ":smile:", "a|b", "'quoted' 12 http://x"])
def test_names_are_printed_as_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = Table(name, title=f"runs in {name}", caption=f"all of {name}")
    table.add_row(f"<{name}>")
    lines = shown(table, 80, monkeypatch, capsys)
    text = "".join("".join(lines).split())
    wanted = [f"runs in {name}", f"all of {name}", f"<{name}>"]
    assert ["".join(each.split()) in text for each in wanted] == [True, True, True]


def test_names_keep_their_cell_in_markdown() -> None:
    assert markdown("a|b\\ <b> `x` *y*\nz < 3") == r"a\|b\\ \<b> \`x\` \*y\* z < 3"
