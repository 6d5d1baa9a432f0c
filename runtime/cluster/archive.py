"""What is in an archive, on this machine's disks or in an object store, and how it is cut into parts.

A part is some hundred pictures that are scored and written together. It is known by its content: the names, sizes and
times of its pictures. Cuts follow from the names (content-defined chunking, as in LBFS, Muthitacharoen, Chen and
Mazieres, SOSP 2001), so pictures that come or go change the part they are in, and seldom the one beside it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fbclip.errors import FBClipError, ImageError, UsageError, require_package
from fbclip.folders import is_hidden, list_images
from fbclip.images import SUFFIXES, decode_image, read_image
from fbclip.opening import MAX_PIXELS
from fbclip.terminal import printable

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.fs
    import pyarrow.parquet as pq

STORES = frozenset({"s3", "gs", "gcs"})
TABLES = frozenset({".parquet", ".pq"})
LISTS = frozenset({".txt", ".lst"})
SMALLEST, LARGEST = 16, 1024  # pictures of a part: a table of one is slow to read, and a lost one is much to do again
PARTS = 128  # that an archive is cut into where it allows: enough to share out, and to tell how far it is
AT_ONCE = 16  # pictures that are fetched from a store while others are judged: each takes some ten ms to begin
MOST_AT_ONCE = 256 << 20  # bytes of these
MOST_BYTES = 2 << 30  # of a picture in a store; those of a disk are bounded when they are opened
ROWS_AT_ONCE = 16  # of a table, whose pictures may be large

Content: TypeAlias = "Path | bytes | ImageError | OSError"


class Item(NamedTuple):
    """A picture of an archive.

    Attributes:
        name: its path, or its address in a store, as results call it.
        size: bytes; -1 where nobody knows.
        changed: nanoseconds since 1970; -1 where nobody knows.
    """

    name: str
    size: int = -1
    changed: int = -1


class Rows(NamedTuple):
    """Rows of a Parquet table that hold pictures or their names.

    Attributes:
        table: the file.
        group: number of the row group.
        first: the first row in it.
        size: how many.
        column: like "image" or "image.bytes".
        before: rows of the groups before it, for the names of rows.
    """

    table: Item
    group: int
    first: int
    size: int
    column: str
    before: int


@dataclass(frozen=True)
class Part:
    """Pictures that are scored and written together: items, or rows of a table.

    Attributes:
        id: what its content is known by, 32 hexadecimal digits.
        store: the address that leads to the store of the names, with what it needs (region, endpoint); "" for none.
        known: the ids of older parts that have rows of some of its pictures, for the archive has changed since.
    """

    id: str
    items: tuple[Item, ...] = ()
    rows: Rows | None = None
    store: str = ""
    known: tuple[str, ...] = ()

    @classmethod
    def of(cls, items: tuple[Item, ...] = (), rows: Rows | None = None, store: str = "") -> Part:
        text = json.dumps([items, rows], ensure_ascii=True, allow_nan=False)
        return cls(hashlib.sha256(text.encode()).hexdigest()[:32], items, rows, store)

    def __len__(self) -> int:
        return self.rows.size if self.rows else len(self.items)

    def to_json(self) -> str:
        return json.dumps(asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Part:
        values = json.loads(text)
        rows = values["rows"]
        return cls(
            values["id"],
            tuple(Item(*item) for item in values["items"]),
            Rows(Item(*rows[0]), *rows[1:]) if rows else None,
            values["store"],
            tuple(values["known"]),
        )


class Archive(NamedTuple):
    """What is to be scored.

    Attributes:
        items: pictures by their names, sorted.
        rows: of tables, in their order.
        store: as in a `Part`.
    """

    items: list[Item]
    rows: list[Rows]
    store: str

    def __len__(self) -> int:
        return len(self.items) + sum(rows.size for rows in self.rows)

    def size_of_parts(self) -> int:
        """Pictures of a part, a power of two: so many that there are some `PARTS` parts."""
        return 1 << min(max(len(self) // PARTS, SMALLEST), LARGEST).bit_length() - 1

    def parts(self, size: int) -> list[Part]:
        """The archive in parts of about so many pictures, each of another content."""
        of_rows = (
            rows._replace(first=first, size=min(size, rows.first + rows.size - first))
            for rows in self.rows
            for first in range(rows.first, rows.first + rows.size, size)
        )
        return [
            *(Part.of(items, store=self.store) for items in _cut(self.items, size)),
            *(Part.of(rows=rows, store=self.store) for rows in of_rows),
        ]


def _cut(items: list[Item], size: int) -> Iterator[tuple[Item, ...]]:
    """Items in runs of half to double so many, that end where a hash of the last name says so."""
    run: list[Item] = []
    for item in items:
        run.append(item)
        ends = zlib.crc32(os.fsencode(item.name)) % max(1, size // 2) == 0
        if (ends and len(run) >= size // 2) or len(run) >= 2 * size:
            yield tuple(run)
            run = []
    if run:
        yield tuple(run)


def open_archive(
    sources: list[str], column: str | None, tell: Callable[[str], None], without: str | None = None
) -> Archive:
    """Find the pictures of folders, globs, lists and tables, on disks or in one store.

    Args:
        sources: paths or addresses: an image, a folder, a glob, a list (.txt: a path or address in each line), a Parquet
            table (.parquet) with a column of paths or of pictures.
        column: of tables; None for the only one that it could be.
        tell: told what is left out.
        without: the folder of results, whose pictures are none of the archive.

    Raises:
        UsageError: one that is none of these, several stores, or nothing in them.
    """
    require_package("pyarrow", "cluster")
    if not sources:
        raise UsageError("there is nothing to score: name folders, globs, lists or tables", option="source")
    addresses = [Address.parse(source) for source in sources if is_address(source)]
    stores = {address.store for address in addresses}
    if len(stores) > 1:
        names = ", ".join(sorted({f"{address.scheme}://{address.bucket}" for address in addresses}))
        raise UsageError(f"an archive lies in one store, with one login and options; got {names}", option="source")
    store = stores.pop() if stores else ""
    reader = Reader(store)
    found: list[Item] = []
    rows: list[Rows] = []
    for text in sources:
        source = placed(text) if text else ""  # which is refused below
        suffix = PurePosixPath(source).suffix.lower()
        if suffix in TABLES:
            rows += _rows(reader.item(source), column, reader)
        elif suffix in LISTS:
            found += _listed(source, reader)
        elif is_address(source):
            found += reader.list(source)
        else:
            found += [reader.item(str(path)) for path in list_images([source], tell)]
    if without:
        found = [item for item in found if not item.name.startswith(f"{without.rstrip('/')}/")]
    rows = list(dict.fromkeys(rows))
    if column is not None and not rows:
        raise UsageError(f"a column is of a Parquet table; got none with {column!r:.40}", option="column")
    archive = Archive(sorted(dict.fromkeys(found)), rows, store)
    if not len(archive):
        raise UsageError(f"there are no images in {', '.join(map(placed, sources))}", option="source")
    return archive


def brief(error: BaseException) -> str:
    """What a library says of an error, in a line that is not too long."""
    return shorten(printable(error), 160, placeholder=" …")


def plural(count: int, what: str) -> str:
    """ "1 table", "2 tables"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


class Address(NamedTuple):
    """An address of a store, as people write it: `s3://KEY:SECRET@BUCKET/PATH?region=…&endpoint_override=…`."""

    scheme: str
    login: str
    bucket: str
    path: str
    options: str

    @classmethod
    def parse(cls, text: str, option: str = "source") -> Address:
        """Take an address apart.

        Raises:
            UsageError: it is none; nothing of it but its scheme is shown.
        """
        if found := _ADDRESS.fullmatch(text):
            return cls(found[1].lower(), found[2] or "", found[3], (found[4] or "").rstrip("/"), found[5] or "")
        scheme = printable(text.partition("://")[0])[:10]
        raise UsageError(
            f"a store is s3://BUCKET/PATH or gs://BUCKET/PATH, with options behind a ?, and a / in a secret as %2F; got "
            f"{scheme}://…",
            option=option,
        )

    @property
    def name(self) -> str:
        """What results call it: without login and options."""
        return f"{self.scheme}://{self.bucket}/{self.path}"

    @property
    def store(self) -> str:
        """What opens the store."""
        return f"{self.scheme}://{self.login and self.login + '@'}{self.bucket}{self.options}"


_ADDRESS = re.compile(
    r"(s3|gs|gcs)://(?:([^/]*)@)?([A-Za-z0-9._-]+)(?:/(.*?))?(\?[\w.]+=[^&]*(?:&[\w.]+=[^&]*)*)?",
    re.IGNORECASE | re.DOTALL,
)
_NAME = re.compile(r"(s3|gs|gcs)://(?:[^/]*@)?([^/@]+)/?(.*)", re.IGNORECASE | re.DOTALL)


def is_address(text: str) -> bool:
    """Whether a text is of a store, or of something else that is no file here."""
    return "://" in text


def placed(text: str) -> str:
    """What is meant by a source: an absolute path, or the name of an address; the same wherever a command runs."""
    return Address.parse(text).name if is_address(text) else os.path.abspath(text)  # noqa: PTH100


def _listed(source: str, reader: Reader) -> Iterator[Item]:
    """The pictures that a text file names, relative to its folder; an empty line is none."""
    content = reader.fetch(reader.item(source))
    if isinstance(content, Exception):
        raise UsageError(f"{printable(source)} can't be read: {content}", option="source")
    try:
        text = content.read_bytes() if isinstance(content, Path) else content
    except OSError as error:
        raise UsageError(f"{printable(source)} can't be read: {error.strerror or error}", option="source") from error
    try:
        names = text.decode("utf-8-sig", "surrogateescape" if isinstance(content, Path) else "strict").splitlines()
    except UnicodeDecodeError as error:
        raise UsageError(f"a list of images is a text in UTF-8; got {printable(source)}") from error
    for name in filter(None, map(str.strip, names)):
        yield reader.item(beside(source, name))


def beside(source: str, name: str) -> str:
    """A name that a list or table has, as it is meant: relative to where that lies, without a login."""
    if found := _NAME.fullmatch(name):
        return f"{found[1].lower()}://{found[2]}/{found[3]}"
    if is_address(name) or name.startswith("/"):
        return name
    if is_address(source):
        return f"{source.rpartition('/')[0]}/{name}"
    return os.path.normpath(Path(source).parent / name)


def _rows(table: Item, column: str | None, reader: Reader) -> Iterator[Rows]:
    import pyarrow as pa

    try:
        with reader.table(table) as file:
            chosen = _column(file.schema_arrow, column, table.name)
            counts = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"{printable(table.name)} is no Parquet table that can be read: {brief(error)}") from error
    before = 0
    for group, count in enumerate(counts):
        if count:
            yield Rows(table, group, 0, count, chosen, before)
        before += count


def _column(schema: pa.Schema, column: str | None, name: str) -> str:
    """The column of a table that holds pictures or their names: the one that was asked for, or the only one."""
    import pyarrow as pa

    def leaves(fields: Iterable[pa.Field], head: str) -> Iterator[tuple[str, pa.DataType]]:
        for field in fields:
            if "." in field.name:  # which names a field of a struct
                continue
            if pa.types.is_struct(field.type):
                yield from leaves(field.type, f"{head}{field.name}.")
            else:
                yield head + field.name, field.type

    kinds = (_is_text, _is_bytes)
    found = [(path, kind) for path, kind in leaves(schema, "") if any(fit(kind) for fit in kinds)]
    names = [path for path, _ in found]
    fits = {path: kind for path, kind in found if names.count(path) == 1}
    if column is not None and column in fits:
        return column
    of_bytes = [path for path, kind in fits.items() if _is_bytes(kind)]
    chosen = of_bytes if len(of_bytes) == 1 else list(fits)
    if column is None and len(chosen) == 1:
        return chosen[0]
    there = ", ".join(map(printable, fits)) or "none"
    raise UsageError(
        f"a column of {printable(name)} holds paths or pictures; got {column or 'none'}, those that fit are: {there[:200]}",
        option="column",
    )


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_bytes(kind: pa.DataType) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


class Reader:
    """Reads what names mean: files here, or objects of a store.

    Args:
        store: the address of the store, as in a `Part`.
    """

    def __init__(self, store: str = "") -> None:
        self._store = store
        self._opened: dict[str, pyarrow.fs.FileSystem] = {}

    def place(self, name: str) -> tuple[pyarrow.fs.FileSystem, str]:
        """The file system of an address or a path, and the path in it.

        Raises:
            UsageError: there is no such store, or it can't be reached with what it was told.
        """
        import pyarrow.fs

        if not is_address(name):
            return pyarrow.fs.LocalFileSystem(), name
        found = _NAME.fullmatch(name)
        if not found:
            raise UsageError(f"a store is s3:// or gs://; got {printable(name.partition('://')[0])[:10]}://…")
        scheme, bucket, path = found.groups()
        own = Address.parse(self._store) if self._store else None
        login, options = (own.login, own.options) if own else ("", "")
        opens = Address(scheme.lower(), login, bucket, "", options).store
        if opens not in self._opened:
            try:
                self._opened[opens] = pyarrow.fs.FileSystem.from_uri(opens)[0]
            except (ValueError, OSError) as error:  # whose words may hold the login
                raise UsageError(
                    f"{scheme}://{printable(bucket)} can't be opened ({type(error).__name__}): look at its name, its options "
                    f"(region, endpoint_override) and its login, in which / is %2F"
                ) from None
        return self._opened[opens], f"{bucket}/{path}".rstrip("/")

    def item(self, name: str) -> Item:
        """A picture, list or table by its name; one that isn't there has no size, and is told of when it is read."""
        if not is_address(name):
            try:
                status = os.stat(name)  # noqa: PTH116
            except (OSError, ValueError):
                return Item(name)
            return Item(name, status.st_size, status.st_mtime_ns)
        system, path = self.place(name)
        try:
            return self._item(name, system.get_file_info(path))
        except OSError as error:
            raise UsageError(f"{printable(name)} can't be looked at: {brief(error)}") from error

    def list(self, source: str) -> Iterator[Item]:
        """The pictures of a store below a folder, that match a glob, or the one that it names.

        Raises:
            UsageError: it can't be listed.
        """
        from fsspec.implementations.arrow import ArrowFSWrapper
        from pyarrow.fs import FileSelector, FileType

        system, path = self.place(source)
        head = source.partition("://")[0]
        try:
            if any(sign in path for sign in "*?["):
                names = ArrowFSWrapper(system).glob(path)
                infos = system.get_file_info(list(names))
            elif system.get_file_info(path).type == FileType.File:
                infos = [system.get_file_info(path)]
            else:
                infos = system.get_file_info(FileSelector(path.rstrip("/"), recursive=True))
        except OSError as error:
            raise UsageError(f"{printable(source)} can't be listed: {brief(error)}") from error
        for info in infos:
            hidden = any(is_hidden(part) for part in info.path[len(path) :].split("/") if part)
            if info.type == FileType.File and not hidden and f".{info.extension.lower()}" in SUFFIXES:
                yield self._item(f"{head}://{info.path}", info)

    @staticmethod
    def _item(name: str, info: pyarrow.fs.FileInfo) -> Item:
        changed = -1 if info.mtime_ns is None else info.mtime_ns
        return Item(name, -1 if info.size is None else info.size, changed)

    def fetch(self, item: Item) -> Content:
        """A path of this machine, or what an object holds; or why it can't be had: an ImageError where it is not there or
        too large, an OSError where another try may give it."""
        if not is_address(item.name):
            was_there = item.size >= 0 and not os.path.lexists(item.name)
            return (
                FileNotFoundError(f"{printable(item.name)} isn't here, and was when it was listed")
                if was_there
                else Path(item.name)
            )
        if item.size > MOST_BYTES:
            return ImageError(f"an image in a store has at most {MOST_BYTES >> 30} GB; {printable(item.name)} has more")
        try:
            system, path = self.place(item.name)
        except UsageError as error:  # of a name that a table has
            return ImageError(str(error))
        try:
            with system.open_input_stream(path) as stream:
                content: bytes = stream.read(MOST_BYTES)
        except FileNotFoundError:
            return ImageError(f"{printable(item.name)} isn't there")
        except OSError as error:
            return error
        return content

    def contents(self, part: Part) -> Iterator[tuple[str, Content]]:
        """Name and content of each picture of a part, in its order; of a store those to come are fetched meanwhile."""
        if part.rows is None:
            return self._ahead(part.items)
        return self._of_table(part.rows)

    def _ahead(self, items: Iterable[Item]) -> Iterator[tuple[str, Content]]:
        coming: deque[tuple[Item, Future[Content]]] = deque()
        waiting, room = iter(items), MOST_AT_ONCE
        with ThreadPoolExecutor(AT_ONCE, "fetch") as pool:
            try:
                while True:
                    while len(coming) < AT_ONCE and room > 0 and (item := next(waiting, None)):
                        room -= max(item.size, 0)
                        coming.append((item, pool.submit(self.fetch, item)))
                    if not coming:
                        return
                    item, future = coming.popleft()
                    yield item.name, future.result()
                    room += max(item.size, 0)
            finally:
                for _, future in coming:
                    future.cancel()

    def table(self, table: Item) -> pq.ParquetFile:
        """A Parquet file, opened.

        Raises:
            OSError, pyarrow.ArrowException: it can't be read.
        """
        import pyarrow.parquet as pq

        system, path = self.place(table.name)
        return pq.ParquetFile(path, filesystem=system, pre_buffer=False)

    def _of_table(self, rows: Rows) -> Iterator[tuple[str, Content]]:
        """What rows hold, as `contents`.

        Raises:
            FBClipError: the table can't be read any more, or is damaged.
        """
        import pyarrow as pa

        try:
            yield from self._of_file(rows)
        except (OSError, pa.ArrowException) as error:
            raise FBClipError(f"{printable(rows.table.name)} can't be read: {brief(error)}") from error

    def _of_file(self, rows: Rows) -> Iterator[tuple[str, Content]]:
        with self.table(rows.table) as file:
            if _is_text(_type_of(file.schema_arrow, rows.column)):
                yield from self._ahead(self._named(rows, self._cells(file, rows)))
                return
            for number, content in self._cells(file, rows):
                name = f"{rows.table.name}#{number}"
                yield name, ImageError(f"{printable(name)} is empty") if content is None else content

    def _named(self, rows: Rows, cells: Iterable[tuple[int, str | None]]) -> Iterator[Item]:
        for number, name in cells:  # one that is empty names nothing that is there
            yield Item(beside(rows.table.name, name) if name else f"{rows.table.name}#{number}")

    def _cells(self, file: pq.ParquetFile, rows: Rows) -> Iterator[tuple[int, Any]]:
        """Number in the table and value of each row."""
        head, *path = rows.column.split(".")
        batches = file.iter_batches(ROWS_AT_ONCE, row_groups=[rows.group], columns=[rows.column])
        values = (value for batch in batches for value in batch.column(head).to_pylist())
        for number, value in islice(enumerate(values, rows.before), rows.first, rows.first + rows.size):
            for step in path:
                value = None if value is None else value[step]
            yield number, value


def _type_of(schema: pa.Schema, column: str) -> pa.DataType:
    head, *path = column.split(".")
    kind = schema.field(head).type
    for step in path:
        kind = kind.field(step).type
    return kind


def read_content(content: Content) -> NDArray[np.uint8]:
    """A picture that was fetched, uint8 (H, W, 3) RGB.

    Raises:
        ImageError: it is none that can be read.
        OSError: it was not fetched.
    """
    if isinstance(content, Exception):
        raise content
    return read_image(content) if isinstance(content, Path) else decode_image(content, MAX_PIXELS)
