"""When certificates and revocation lists begin and end, and what to say of it.

`python -m security.expiry FILE...` prints one JSON object a file: run in a child process, because the library that
reads certificates is 8 MB of memory that a daemon need not hold for a look now and then. Knows nothing of who uses
which file.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any, Final

# Days before the end at which it is said, the last day included.
NOTICE_DAYS: Final = (30, 7, 1)
# No clock that says less is set: this software is newer.
RELEASED_S: Final = 1_795_564_800  # 2026-11-25
_CRL_MARK: Final = b"-----BEGIN X509 CRL-----"


@dataclass(frozen=True, slots=True)
class Validity:
    """Of the first certificate in a file, or of the list that ends first. Times are seconds since 1970, UTC."""

    path: str
    subject: str
    not_before_s: float
    not_after_s: float
    is_list: bool = False


class Judgement(Enum):
    GOOD = "good"
    ENDS_SOON = "ends soon"
    EXPIRED = "expired"
    NOT_YET = "not yet valid"
    CLOCK = "clock not set"


def clock_not_set(now_s: float, synchronised: bool, begins_s: Iterable[float] = ()) -> bool:
    """Whether the wall clock is evidently wrong: before this software, or before the machine's own certificates.

    A clock that somebody keeps right is believed.
    """
    if synchronised:
        return False
    return now_s < RELEASED_S or any(now_s < begins for begins in begins_s)


def judge(validity: Validity, now_s: float, clock_set: bool) -> Judgement:
    """What to think of it at this time."""
    if not clock_set:
        return Judgement.CLOCK
    if now_s >= validity.not_after_s:
        return Judgement.EXPIRED
    if now_s < validity.not_before_s:
        return Judgement.NOT_YET
    if validity.not_after_s - now_s <= NOTICE_DAYS[0] * 86400:
        return Judgement.ENDS_SOON
    return Judgement.GOOD


def notice(validity: Validity, now_s: float) -> int | None:
    """Which of NOTICE_DAYS it is within, the least; 0 after the end; None before any."""
    left_s = validity.not_after_s - now_s
    if left_s <= 0:
        return 0
    return min((days for days in NOTICE_DAYS if left_s <= days * 86400), default=None)


def iso(seconds: float) -> str:
    """A time for people, whatever the clock believes."""
    try:
        return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")
    except OverflowError:
        return f"{seconds:.0f} s"


def read(path: Path) -> Validity:
    """Of a PEM file with certificates or revocation lists. Raises ValueError, OSError."""
    from cryptography import x509

    pem = path.read_bytes()
    if _CRL_MARK in pem:
        mark = b"-----END X509 CRL-----"
        lists = [x509.load_pem_x509_crl(part + mark) for part in pem.split(mark)[:-1]]
        ends = [each.next_update_utc or datetime.max.replace(tzinfo=UTC) for each in lists]
        first = min(range(len(lists)), key=lambda n: ends[n])
        found, end, begin = lists[first].issuer, ends[first], lists[first].last_update_utc
    else:
        leaf = x509.load_pem_x509_certificates(pem)[0]
        found, end, begin = leaf.subject, leaf.not_valid_after_utc, leaf.not_valid_before_utc
    return Validity(str(path), found.rfc4514_string(), begin.timestamp(), end.timestamp(), _CRL_MARK in pem)


def to_json(validity: Validity) -> dict[str, Any]:
    return {name: getattr(validity, name) for name in Validity.__slots__}


def main(paths: list[str]) -> None:
    from cryptography.x509 import InvalidVersion  # which is no ValueError; OpenSSL does not mind such a certificate

    for path in paths:
        try:
            answer = to_json(read(Path(path)))
        except (OSError, ValueError, InvalidVersion) as error:
            answer = {"path": path, "error": str(error)}
        print(json.dumps(answer))


if __name__ == "__main__":
    main(sys.argv[1:])
