"""The pages of a journal's file and of its WAL, read without SQLite: what is in them, whatever does not hold together.

SQLite gives up a file for one bit of its header, and a table for one of its root page. Here every page is looked at by
itself, by the format that SQLite has published (https://www.sqlite.org/fileformat2.html); whether a row is what was
written, those decide who know what was written. Knows no tables, and writes to working copies only.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

HEADER_BYTES = 100
MAGIC = b"SQLite format 3\0"
PAGE_SIZES = (8192, 16384, 4096)  # that journals have, or had
TABLE_LEAF, TABLE_INTERIOR, INDEX_LEAF, INDEX_INTERIOR = 13, 5, 10, 2
WITH_RECORDS = (TABLE_LEAF, INDEX_LEAF, INDEX_INTERIOR)
ROOT_PAGE, FREE_PAGE, TREE_PAGE = 1, 2, 5  # of a pointer map's entries
_PENDING_BYTE = 0x40000000
_WAL_HEADER, _FRAME_HEADER = 32, 24
_VALUES = {1: 1, 2: 2, 3: 3, 4: 4, 5: 6, 6: 8}  # serial types of integers, and their bytes
_COLUMNS_MAX = 32

Value = int | float | str | bytes | None
# Whether a record is a row that was written; given the rowid (None in an index) and the values.
Judge = Callable[[int | None, tuple[Value, ...]], bool]


class PageDamaged(Exception):
    """A page does not say what a page can say."""


class Header(NamedTuple):
    """Of the file, as far as it is asked for. `free_first`, `free_count`: of the list of free pages."""

    page_size: int
    page_count: int
    free_first: int
    free_count: int
    auto_vacuum: bool
    user_version: int
    application_id: int
    problem: str | None


def read_header(data: bytes) -> Header:
    """The first HEADER_BYTES of a file, and what of them no journal has."""
    if len(data) < HEADER_BYTES:
        return Header(0, 0, 0, 0, False, 0, 0, "shorter than a header")
    (size, writes, reads, reserved, max_share, min_share, leaf_share) = struct.unpack_from(">H6B", data, 16)
    page_size = 65536 if size == 1 else size
    counts = struct.unpack_from(">6I", data, 24)
    schema_format, _, largest_root, encoding, version, incremental, id_ = struct.unpack_from(">7I", data, 44)
    problem = None
    if data[:16] != MAGIC:
        problem = "not the header of an SQLite file"
    elif page_size.bit_count() != 1 or page_size < 512 or reserved:
        problem = f"pages of {page_size} bytes, {reserved} of them reserved"
    elif (writes, reads) not in ((1, 1), (2, 2)) or (max_share, min_share, leaf_share) != (64, 32, 32):
        problem = "a format that SQLite does not write"
    elif schema_format not in (0, 4) or encoding not in (0, 1) or incremental not in (0, 1) or any(data[72:92]):
        problem = "a schema format, an encoding or a setting that no journal has"
    free_first, free_count = counts[2], counts[3]
    return Header(page_size, counts[1], free_first, free_count, bool(largest_root), version, id_, problem)


class Pages:
    """`number`s count from 1. `overlay`: pages that stand in the WAL, `data`, and where in it."""

    def __init__(
        self,
        fd: int,
        page_size: int,
        count: int,
        data: bytes | mmap.mmap = b"",
        overlay: dict[int, int] | None = None,
    ) -> None:
        self._fd = fd
        self.size = page_size
        self.count = count
        self._data = data
        self._overlay = overlay or {}
        self._map: tuple[int, bytes] = (0, b"")

    def read(self, number: int) -> bytes:
        """One page; zeros where the file ends before it. Raises PageDamaged for a number that is none."""
        if not 1 <= number <= self.count:
            raise PageDamaged(f"there is no page {number}")
        at = self._overlay.get(number)
        if at is not None:
            return self._data[at : at + self.size]
        return os.pread(self._fd, self.size, (number - 1) * self.size).ljust(self.size, b"\0")

    def map_page(self, number: int) -> int:
        """Which page of the pointer map tells of a page: itself, if it is one."""
        step = self.size // 5 + 1
        at = (number - 2) // step * step + 2
        return at + 1 if at == _PENDING_BYTE // self.size + 1 else at

    def kind(self, number: int) -> int:
        """What the pointer map says of a page: ROOT_PAGE, FREE_PAGE, or another number."""
        at = self.map_page(number)
        if self._map[0] != at:
            self._map = at, self.read(at)
        return self._map[1][5 * (number - at - 1)]

    def free(self, first: int, total: int) -> Iterator[int]:
        """The list of free pages. Raises PageDamaged where it is none."""
        seen = 0
        trunks: set[int] = set()
        while first:
            if first in trunks or len(trunks) > total:
                raise PageDamaged("the list of free pages goes round")
            trunks.add(first)
            yield first
            next_, count = struct.unpack_from(">2I", page := self.read(first))
            if count > self.size // 4 - 2:
                raise PageDamaged(f"page {first} lists {count} free pages")
            yield from struct.unpack_from(f">{count}I", page, 8)
            seen += count + 1
            first = next_
        if seen != total:
            raise PageDamaged(f"{seen} free pages, and the header says {total}")

    # ------------------------------------------------------------------ trees

    def check_table(self, root: int) -> None:
        """Raises PageDamaged where a cell may have vanished from a table's tree: its bytes would be nobody's.

        As SQLite's own check does, but without reading what overflows.
        """
        todo, seen = [root], set[int]()
        while todo:
            number = todo.pop()
            if number in seen:
                raise PageDamaged(f"page {number} is twice in a tree")
            seen.add(number)
            page = self.read(number)
            interior = page[0] == TABLE_INTERIOR
            if not interior and page[0] != TABLE_LEAF:
                raise PageDamaged(f"page {number} is no table's")
            freed, count, content, fragments = struct.unpack_from(">3HB", page, 1)
            head = 12 if interior else 8
            if head + 2 * count > min(content or 65536, self.size):
                raise PageDamaged(f"page {number} has {count} cells")
            spans = _free_blocks(page, freed)
            for at in struct.unpack_from(f">{count}H", page, head):
                spans.append((at, self._cell_end(page, at, interior)))
                if interior:
                    todo.append(int.from_bytes(page[at : at + 4], "big"))
            if interior:
                todo.append(int.from_bytes(page[8:12], "big"))
            end = content or 65536
            for begin, end_ in sorted(spans):
                fragments -= begin - end
                if begin < end:
                    raise PageDamaged(f"two cells of page {number} overlap")
                end = end_
            if fragments != self.size - end:
                raise PageDamaged(f"a cell of page {number} has vanished")

    def _cell_end(self, page: bytes, at: int, interior: bool) -> int:
        try:
            if interior:
                return _varint(page, at + 4)[1]
            total, payload = _varint(page, at)
            _, payload = _varint(page, payload)
        except IndexError:
            raise PageDamaged("a cell beyond the end of its page") from None
        local = self._local(total, TABLE_LEAF)
        return max(at + 4, payload + local + (4 if local < total else 0))

    # ------------------------------------------------------------------ records

    def harvest(self, page: bytes, start: int, judge: Judge, rest: Callable[[bytes], None] | None = None) -> None:
        """Show `judge` every record that a page may hold. `start`: where in it its own header stands.

        First as its cell pointers say. With `rest`, a cell that none leads to is found, too: no good cell and no free
        block covers its bytes; and `rest` gets what is covered by nothing all the same.
        """
        kinds = [page[start]] if page[start] in WITH_RECORDS else [TABLE_LEAF, INDEX_LEAF]
        if page[start] == TABLE_INTERIOR:
            return
        for kind in kinds:
            cells = start + (12 if kind == INDEX_INTERIOR else 8)
            freed, count, content = struct.unpack_from(">3H", page, start + 1)
            count = min(count, (self.size - cells) // 2)
            content = content or 65536
            covered: list[tuple[int, int]] = []
            pointers = struct.unpack_from(f">{count}H", page, cells)
            for at in pointers:
                end = self._cell(page, at, kind, judge)
                if end:
                    covered.append((at, end))
            if cells + 2 * count <= content < self.size:
                covered.append((0, content))
            elif pointers:
                covered.append((0, min(pointers)))
            if rest is None:
                continue
            covered += _free_blocks(page, freed)
            at = 0
            for begin, end in [*sorted(covered), (self.size, self.size)]:
                lost = at
                while at <= begin - 4:
                    at = self._cell(page, at, kind, judge) or at + 1
                if lost < begin:
                    rest(page[lost:begin])
                at = max(at, end)

    def _cell(self, page: bytes, at: int, kind: int, judge: Judge) -> int:
        """Where the cell ends, 0 if it is none, or not one that counts: in an index any that can be one does."""
        try:
            begin = at
            if kind == INDEX_INTERIOR:
                at += 4
            total, at = _varint(page, at)
            rowid: int | None = None
            if kind == TABLE_LEAF:
                rowid, at = _varint(page, at)
                rowid -= (rowid >> 63) << 64
            local = self._local(total, kind)
            if not total or at + local > self.size or total > self.count * self.size:
                return 0
            payload = page[at : at + local]
            end = at + local
            if local < total:
                payload = self._overflowing(payload, total, int.from_bytes(page[end : end + 4], "big"))
                end += 4
            good = judge(rowid, _record(payload))
        except (PageDamaged, IndexError, struct.error):
            return 0
        return max(end, begin + 4) if good or kind != TABLE_LEAF else 0

    def _local(self, total: int, kind: int) -> int:
        most = self.size - 35 if kind == TABLE_LEAF else (self.size - 12) * 64 // 255 - 23
        if total <= most:
            return total
        least = (self.size - 12) * 32 // 255 - 23
        kept = least + (total - least) % (self.size - 4)
        return kept if kept <= most else least

    def _overflowing(self, payload: bytes, total: int, next_: int) -> bytes:
        parts, left = [payload], total - len(payload)
        while left > 0:
            page = self.read(next_)
            next_ = int.from_bytes(page[:4], "big")
            parts.append(page[4 : 4 + left])
            left -= self.size - 4
        return b"".join(parts)


def _free_blocks(page: bytes, first: int) -> list[tuple[int, int]]:
    out: list[tuple[int, int]] = []
    while first and first + 4 <= len(page) and len(out) < len(page) // 4:
        next_, size = struct.unpack_from(">2H", page, first)
        out.append((first, min(first + size, len(page))))
        if next_ <= first:
            break
        first = next_
    return out


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for n in range(8):
        byte = data[at + n]
        value = value << 7 | byte & 0x7F
        if byte < 0x80:
            return value, at + n + 1
    return value << 8 | data[at + 8], at + 9


def _record(payload: bytes) -> tuple[Value, ...]:
    """The values of a record. Raises PageDamaged and what comes of bytes that are none."""
    end, at = _varint(payload, 0)
    types: list[int] = []
    while at < end and len(types) <= _COLUMNS_MAX:
        kind, at = _varint(payload, at)
        types.append(kind)
    if at != end or not types or len(types) > _COLUMNS_MAX:
        raise PageDamaged("a record's header")
    values: list[Value] = []
    for kind in types:
        if kind >= 12:
            size = (kind - 12) // 2
            raw = payload[at : at + size]
            if len(raw) != size:
                raise PageDamaged("a record that ends early")
            # What is not UTF-8 must still be comparable with what should stand there.
            values.append(raw.decode(errors="surrogateescape") if kind & 1 else raw)
        elif size := _VALUES.get(kind, 0):
            values.append(int.from_bytes(payload[at : at + size], "big", signed=True))
        elif kind in (0, 8, 9):
            values.append(None if kind == 0 else kind - 8)
        else:
            raise PageDamaged(f"a value of type {kind}")
        at += size
    if at != len(payload):
        raise PageDamaged("a record of another length")
    return tuple(values)


# ---------------------------------------------------------------------- the WAL


class Frame(NamedTuple):
    """One page in a WAL. `at`: of its bytes; `commit`: pages of the file after it, 0 inside a transaction.

    `ours`: of this round of the WAL, by its salts; one bit of them may be flipped.
    `chained`: whether its checksum fits what the frame before it says of itself; `valid`: so do all before it.
    """

    page: int
    commit: int
    at: int
    ours: bool
    chained: bool
    valid: bool


class Wal:
    """A WAL's frames, the ones behind a damaged frame included, which SQLite forgets.

    `page_size` 0: there are none. `whole`: whether the header is. `summed`: without it all checksums are taken for
    right: they cost up to a millisecond a page. Raises OSError.
    """

    def __init__(self, path: Path, *, summed: bool = True) -> None:
        self._summed = summed
        self.data: bytes | mmap.mmap = b""
        if path.exists() and path.stat().st_size:
            with path.open("rb") as file:
                self.data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        data = self.data
        self.page_size = 0
        self.whole = True
        self.frames: list[Frame] = []
        if len(data) < _WAL_HEADER + _FRAME_HEADER:
            return
        magic, _, size, _, *salts_and_sums = struct.unpack_from(">8I", data)
        self.whole = magic in (0x377F0682, 0x377F0683) and size in PAGE_SIZES
        order = ">" if magic & 1 else "<"
        sums = _sums(data[:24], order)
        self.whole = self.whole and sums == tuple(salts_and_sums[2:])
        salts = data[16:24]
        if not self.whole:
            size, order, salts, sums = self._guessed()
        if size:
            self._read(size, order, salts, sums if self.whole else None)

    def _guessed(self) -> tuple[int, str, bytes, tuple[int, int]]:
        """The header says nothing: a page size with which the second frame's checksum fits what the first one says."""
        data = self.data
        salts = data[_WAL_HEADER + 8 : _WAL_HEADER + 16]
        for size in PAGE_SIZES:
            step = _FRAME_HEADER + size
            for order in "<>":
                for first in range(_WAL_HEADER, min(len(data) - 2 * step, _WAL_HEADER + 4 * step) + 1, step):
                    begin = struct.unpack_from(">2I", data, first + 16)
                    if any(salts) and self._chained(first + step, size, order, salts, begin):
                        return size, order, salts, begin
        return 0, "<", salts, (0, 0)

    def _chained(self, at: int, size: int, order: str, salts: bytes, begin: tuple[int, int]) -> bool:
        data = self.data
        if data[at + 8 : at + 16] != salts:
            return False
        sums = _sums(data[at : at + 8], order, begin)
        sums = _sums(data[at + _FRAME_HEADER : at + _FRAME_HEADER + size], order, sums)
        return sums == struct.unpack_from(">2I", data, at + 16)

    def _read(self, size: int, order: str, salts: bytes, begin: tuple[int, int] | None) -> None:
        data, step = self.data, _FRAME_HEADER + size
        self.page_size = size
        valid = begin is not None
        bad = 0
        for at in range(_WAL_HEADER, len(data) - step + 1, step):
            page, commit = struct.unpack_from(">2I", data, at)
            # The first frame has nothing to be chained to where the header is damaged: it counts if others follow it.
            chained = not self._summed or begin is None or self._chained(at, size, order, salts, begin)
            valid = valid and chained
            theirs = int.from_bytes(data[at + 8 : at + 16], "big")
            ours = (theirs ^ int.from_bytes(salts, "big")).bit_count() < 2
            bad = 0 if ours else bad + 1
            if bad > 1:  # one may be damaged; from here on they are of an earlier round
                break
            self.frames.append(Frame(page, commit, at + _FRAME_HEADER, ours, chained, valid))
            begin = struct.unpack_from(">2I", data, at + 16)
        if bad:
            self.frames.pop()

    def page(self, frame: Frame) -> bytes:
        return self.data[frame.at : frame.at + self.page_size]

    @property
    def header(self) -> Header | None:
        """What the newest first page in it says of the file; None if there is none in it."""
        at = next((f.at for f in reversed(self.frames) if f.page == 1 and f.chained), None)
        return None if at is None else read_header(self.data[at : at + HEADER_BYTES])


def _sums(data: bytes, order: str, sums: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """SQLite's checksum of a WAL, which goes on where the last one ended."""
    one, two = sums
    words = iter(struct.unpack(f"{order}{len(data) // 4}I", data))
    for word in words:
        one = (one + word + two) & 0xFFFFFFFF
        two = (two + next(words) + one) & 0xFFFFFFFF
    return one, two


# ---------------------------------------------------------------------- working copies


def mend(path: Path, wal: Wal) -> tuple[int, int]:
    """Make a working copy one that SQLite opens: what a header can't be is put right, and the WAL is copied into it.

    Also frames behind a damaged one, up to the last commit; no WAL is beside it afterwards. Returns the size of a page,
    and how many commits the damage would have cost.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        header = bytearray(os.pread(fd, HEADER_BYTES, 0).ljust(HEADER_BYTES, b"\0"))
        told = read_header(bytes(header)).page_size
        size = told if told in PAGE_SIZES else wal.page_size or _page_size(fd)
        pages = -(-os.fstat(fd).st_size // size)
        last = max((n for n, f in enumerate(wal.frames, 1) if f.commit and f.chained), default=0)
        behind = 0
        for frame in wal.frames[:last] if wal.page_size == size else []:
            if frame.chained and frame.page:
                os.pwrite(fd, wal.page(frame), (frame.page - 1) * size)
                pages = frame.commit or pages
                behind += bool(frame.commit) and not frame.valid
        pages = max(pages, 1)
        os.ftruncate(fd, pages * size)
        header[:] = os.pread(fd, HEADER_BYTES, 0)
        header[:24] = MAGIC + struct.pack(">H6B", size, 1, 1, 0, 64, 32, 32)
        struct.pack_into(">I", header, 28, pages)
        struct.pack_into(">I", header, 44, 4)
        struct.pack_into(">I", header, 56, 1)
        header[72:92] = bytes(20)
        header[92:96] = header[24:28]
        os.pwrite(fd, header, 0)
    finally:
        os.close(fd)
    for suffix in ("-wal", "-shm"):
        Path(f"{path}{suffix}").unlink(missing_ok=True)
    return size, behind


def _page_size(fd: int) -> int:
    """The size with which most pages begin as pages of a tree do."""
    kinds = (TABLE_LEAF, TABLE_INTERIOR, INDEX_LEAF, INDEX_INTERIOR)

    def share(size: int) -> float:
        begins = [os.pread(fd, 1, n * size) for n in range(1, 1000)]
        return sum(begin[0] in kinds for begin in begins if begin) / max(1, sum(map(len, begins)))

    return max(PAGE_SIZES, key=share)
