"""What is found in an archive, and how it is cut into parts."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fbclip.errors import ImageError, UsageError
from fbclip.runtime.cluster.archive import Address, Archive, Item, Part, Reader, beside, open_archive

NAMES = st.sets(st.text("abcdefgh/0123456789", min_size=1, max_size=12), min_size=1, max_size=400)


def items(names: set[str]) -> list[Item]:
    return [Item(name, 1, 1) for name in sorted(names)]


def open_(*sources: object, column: str | None = None) -> Archive:
    return open_archive([str(source) for source in sources], column, lambda line: None)


@given(NAMES, st.sampled_from([16, 64]))
def test_each_picture_is_in_one_part(names: set[str], size: int) -> None:
    parts = Archive(items(names), [], "").parts(size)
    assert [item for part in parts for item in part.items] == items(names)
    assert all(len(part) <= 2 * size for part in parts)
    assert len({part.id for part in parts}) == len(parts)


def test_a_new_picture_changes_the_part_that_it_is_in() -> None:
    names = {f"{day:02}/{number:05}.png" for day in range(20) for number in range(500)}
    before = {part.id for part in Archive(items(names), [], "").parts(64)}
    after = {part.id for part in Archive(items(names | {"07/00123b.png"}), [], "").parts(64)}
    assert 1 <= len(after - before) <= 4 < len(before) / 20


def test_a_part_is_known_by_the_size_and_time_of_its_pictures() -> None:
    ids = {Part.of((item,)).id for item in (Item("a", 1, 1), Item("a", 2, 1), Item("a", 1, 2), Item("b", 1, 1))}
    assert len(ids) == 4


def test_parts_travel_as_text(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"path": ["a.png", "b.png", "c.png"]}), table, row_group_size=2)
    strange = Archive([Item("caf\udce9.png", 3, 4)], open_(table).rows, "s3://user:key@bucket?region=x").parts(16)
    assert len(strange) == 3
    assert [Part.from_json(part.to_json()) for part in strange] == strange


def test_lists_name_pictures_relative_to_themselves(tmp_path: Path) -> None:
    (tmp_path / "one.png").write_bytes(b"12")
    (tmp_path / "list.txt").write_text(f"one.png\n\n{tmp_path}/gone.png\n")
    assert [(Path(item.name).name, item.size) for item in open_(tmp_path / "list.txt").items] == [
        ("gone.png", -1),
        ("one.png", 2),
    ]


def contents(archive: Archive) -> list[tuple[str, object]]:
    return [pair for part in archive.parts(16) for pair in Reader(part.store).contents(part)]


def test_tables_hold_names_or_pictures(tmp_path: Path) -> None:
    names = tmp_path / "names.parquet"
    pq.write_table(pa.table({"path": ["one.png", None, "/two.png"], "label": [1, 2, 3]}), names, row_group_size=2)
    found = contents(open_(names))
    assert found == [
        (f"{tmp_path}/one.png", tmp_path / "one.png"),
        (f"{names}#1", Path(f"{names}#1")),
        ("/two.png", Path("/two.png")),
    ]
    pictures = tmp_path / "pictures.parquet"
    rows = [{"bytes": bytes([n]), "path": f"{n}.png"} for n in range(40)] + [{"bytes": None, "path": "x"}]
    pq.write_table(pa.table({"image": rows}), pictures, row_group_size=30)
    archive = open_(pictures)
    assert [len(part) for part in archive.parts(16)] == [16, 14, 11]
    *whole, empty = contents(archive)
    assert whole == [(f"{pictures}#{n}", bytes([n])) for n in range(40)]
    assert isinstance(empty[1], ImageError)


def test_columns_of_tables_are_named_where_several_fit(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    pq.write_table(pa.table({"front": ["a.png"], "back": ["b.png"], "n": [1]}), table)
    with pytest.raises(UsageError, match="those that fit are: front, back"):
        open_(table)
    assert contents(open_(table, column="back"))[0][0] == f"{tmp_path}/b.png"
    with pytest.raises(UsageError, match="got n"):
        open_(table, column="n")


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("ftp://u:SECRET@host/x", "a store is s3://BUCKET/PATH or gs://BUCKET/PATH, .*; got ftp://…$"),
        ("s3://KEY:TOP/SECRET@b/x", "in a secret as %2F; got s3://…$"),
        ("none", "matches none"),
        ("bad.parquet", "is no Parquet table"),
    ],
)
def test_what_is_no_archive_is_said(name: str, rule: str, tmp_path: Path) -> None:
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(UsageError, match=rule):
        open_(name if "://" in name else tmp_path / name)


def test_names_of_stores_hold_any_letter_and_no_login() -> None:
    address = Address.parse("s3://KEY:SECRET@line/a@b/c?d#e?region=x&endpoint_override=http://127.0.0.1:1")
    assert address.name == "s3://line/a@b/c?d#e"
    assert address.store == "s3://KEY:SECRET@line?region=x&endpoint_override=http://127.0.0.1:1"
    _, path = Reader(address.store).place("s3://line/a@b/q?1.jpg")
    assert path == "line/a@b/q?1.jpg"
    assert beside("/lists/l.txt", "s3://KEY:SECRET@line/x@y.jpg") == "s3://line/x@y.jpg"
    assert beside("s3://line/lists/l.txt", "x.jpg") == "s3://line/lists/x.jpg"


def test_a_row_of_a_table_is_taken_once(tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    names = pa.array(["a.png", "b.png", "a.png"]).dictionary_encode()
    pq.write_table(pa.table({"name": names, "my.path": ["1", "2", "3"]}), table)
    assert len(open_(table, table, tmp_path / "." / "t.parquet")) == 3
    assert [Path(name).name for name, _ in contents(open_(table))] == ["a.png", "b.png", "a.png"]


def test_what_went_away_may_come_back(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"1")
    archive = open_(tmp_path)
    (tmp_path / "a.png").unlink()
    ((_, content),) = contents(archive)
    assert isinstance(content, OSError)


def test_the_first_run_chooses_the_size_of_parts() -> None:
    def size(count: int) -> int:
        return Archive([Item(str(n)) for n in range(count)], [], "").size_of_parts()

    assert [size(count) for count in (1, 2048, 20_000, 300_000)] == [16, 16, 128, 1024]
