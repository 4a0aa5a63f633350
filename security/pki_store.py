"""The directory of a certificate authority: where its files are, written so that a power cut leaves the old or the new.

    ca.pem, ca.key        the authority
    crl.pem               what it has revoked
    truststore.p12        the authority again, for Java, once `export` was asked for
    index.json            every certificate it ever signed: the record that revocation works from
    issued/NAME.*         .pem, .key, .p12, .ocsp

Keys have mode 0600, directories 0700. One process at a time: whoever opens the directory holds its lock. What is
signed stands in the index before its file is written, so that there is no certificate that can't be revoked. Decides
nothing about certificates: that is `pki`.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from cryptography import x509

from security import pki
from security.pki import Authority, Kind, Names, PkiError, PublicKey, Validity

INDEX_VERSION: Final = 1
ENTRIES_MAX: Final = 100_000
FILE_BYTES_MAX: Final = 64 << 20
CRL_DAYS_DEFAULT: Final = 365


@dataclass(frozen=True, slots=True)
class Entry:
    """One signed certificate. `revoked` is when, or None. Times are UTC, to the second."""

    serial: int
    name: str
    kind: Kind
    names: Names
    begins: datetime
    ends: datetime
    revoked: datetime | None = None
    reason: str = "unspecified"


@dataclass(frozen=True, slots=True)
class Issued:
    """What became of one wish. `key` is None where the holder keeps it."""

    entry: Entry
    cert: Path
    key: Path | None


def create(
    directory: Path,
    name: str,
    algorithm: pki.Algorithm,
    validity: Validity,
    constraints: pki.Constraints,
    passphrase: bytes | None,
    crl_validity: Validity,
) -> None:
    """Make a new authority in a directory that has none. Raises PkiError, OSError."""
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    with locked(directory):
        for taken in ("ca.key", "ca.pem", "index.json"):
            if (directory / taken).exists():
                raise PkiError(f"{directory / taken} exists: an authority is never overwritten; give another directory")
        check_private(directory)
        key = pki.new_key(algorithm)
        certificate = pki.new_authority(name, key, validity, constraints)
        (directory / "issued").mkdir(mode=0o700, exist_ok=True)
        write(directory / "ca.pem", pki.certificate_to_pem(certificate), 0o644)
        store = Store(directory, certificate, 0, ())
        store.revoke((), validity.begins, "unspecified", Authority(certificate, key), crl_validity)
        # The key comes last: a directory that has one is complete.
        write(directory / "ca.key", pki.key_to_pem(key, passphrase), 0o600)


class Store:
    """An authority's directory. Use `opened`, or `looked_at` to change nothing."""

    def __init__(
        self, directory: Path, certificate: x509.Certificate, crl_number: int, entries: Sequence[Entry]
    ) -> None:
        self.directory = directory
        self.certificate = certificate
        self.entries = list(entries)
        self._crl_number = crl_number

    # ------------------------------------------------------------------ what there is

    def path(self, name: str, ending: str) -> Path:
        return self.directory / "issued" / f"{name}.{ending}"

    def authority(self, passphrase: bytes | None) -> Authority:
        """Raises PkiError where the key is not here, or does not open."""
        path = self.directory / "ca.key"
        try:
            authority = Authority(self.certificate, pki.key_from_pem(read(path), passphrase))
            pki.check_authority(authority)
        except PkiError as error:
            raise PkiError(f"{path}: {error}") from None
        return authority

    def latest(self, name: str) -> Entry:
        """Raises PkiError."""
        found = [each for each in self.entries if each.name == name]
        if not found:
            raise PkiError(f"{self.directory} has issued nothing to {name}; `lineside pki show` lists all")
        return found[-1]

    def find(self, text: str) -> list[Entry]:
        """By name, all of that name; by serial number in hexadecimal, that one. Raises PkiError."""
        named = [each for each in self.entries if each.name == text]
        if named:
            return named
        digits = text.replace(":", "").lower()
        found = [each for each in self.entries if f"{each.serial:x}" == digits.lstrip("0")]
        if not found:
            raise PkiError(
                f"{self.directory} has issued nothing to {text}, nor anything with that serial number; "
                "`lineside pki show` lists all"
            )
        return found

    # ------------------------------------------------------------------ what changes it

    def issue(
        self,
        authority: Authority,
        name: str,
        kind: Kind,
        names: Names,
        validity: Validity,
        now: datetime,
        *,
        algorithm: pki.Algorithm = "p256",
        public_key: PublicKey | None = None,
        again: bool = False,
    ) -> Issued:
        """Sign one certificate: for `public_key`, or for a new key that is written beside it.

        Without `again`, a name that has a good certificate, or a key, is refused. Raises PkiError, OSError.
        """
        pki.parse_name(name)
        cert, key_path = self.path(name, "pem"), self.path(name, "key")
        if not again:
            for each in self.entries:
                if each.name == name and each.revoked is None and each.ends > now:
                    raise PkiError(
                        f"{name} has a certificate until {each.ends:%Y-%m-%d}: use `renew`, or --replace for another "
                        "one with a new key (the old one stays good until it ends or is revoked)"
                    )
            if public_key is None and key_path.exists():
                raise PkiError(f"{key_path} exists: use --replace to have it overwritten")
        key = pki.new_key(algorithm) if public_key is None else None
        certificate = pki.issue(authority, name, kind, names, public_key or _public(key), validity)
        if key is None and key_path.exists() and not pki.same_key(pki.key_from_pem(read(key_path)), certificate):
            raise PkiError(f"{key_path} is the key of an earlier certificate, and not of this one: move it away")
        entry = Entry(certificate.serial_number, name, kind, names, validity.begins, validity.ends)
        self._save([*self.entries, entry], self._crl_number)
        if key is not None:
            write(key_path, pki.key_to_pem(key), 0o600)
        write(cert, pki.certificate_to_pem(certificate), 0o644)
        return Issued(entry, cert, key_path if key_path.exists() else None)

    def renew(
        self,
        authority: Authority,
        name: str,
        validity: Validity,
        now: datetime,
        new_key: pki.Algorithm | None = None,
    ) -> Issued:
        """Sign again what the name had last: same kind, same names, and the same key unless told. Raises PkiError."""
        last = self.latest(name)
        if last.revoked is not None:
            raise PkiError(f"{name} was revoked on {last.revoked:%Y-%m-%d}: `issue` it anew, if it is to come back")
        if new_key is not None:
            if not self.path(name, "key").exists():
                raise PkiError(f"the key of {name} is not here: make a request where it is, and `issue --csr` with it")
            return self.issue(authority, name, last.kind, last.names, validity, now, algorithm=new_key, again=True)
        path = self.path(name, "pem")
        public_key = pki.public_key_of(read_certificate(path))
        return self.issue(authority, name, last.kind, last.names, validity, now, public_key=public_key, again=True)

    def renew_authority(self, authority: Authority, validity: Validity) -> None:
        """A later end for the authority itself. Raises PkiError, OSError."""
        self.certificate = pki.renew_authority(authority.certificate, authority.key, validity)
        write(self.directory / "ca.pem", pki.certificate_to_pem(self.certificate), 0o644)

    def revoke(
        self, entries: Sequence[Entry], when: datetime, reason: str, authority: Authority, validity: Validity
    ) -> None:
        """Revoke these, and write the list anew; with none, write it anew only. Raises OSError.

        What was revoked stays in the list past its end: the clock of whoever reads it may be late by years.
        """
        serials = {each.serial for each in entries if each.revoked is None}
        when = when.replace(microsecond=0)
        changed = [
            replace(each, revoked=when, reason=reason) if each.serial in serials else each for each in self.entries
        ]
        self._save(changed, self._crl_number + 1)
        revoked = [pki.Revoked(e.serial, e.revoked, e.reason) for e in self.entries if e.revoked is not None]
        crl = pki.revocation_list(authority, revoked, self._crl_number, validity)
        write(self.directory / "crl.pem", pki.revocation_list_to_pem(crl), 0o644)

    def staple(self, name: str, authority: Authority, validity: Validity) -> tuple[Path, Entry]:
        """Write the OCSP response about the name's last certificate, as the index has it. Raises PkiError, OSError."""
        entry, cert, path = self.latest(name), self.path(name, "pem"), self.path(name, "ocsp")
        certificate = read_certificate(cert)
        if certificate.serial_number != entry.serial:
            raise PkiError(f"{cert} is not the last certificate of {name} (serial {entry.serial:x})")
        revoked = None if entry.revoked is None else pki.Revoked(entry.serial, entry.revoked, entry.reason)
        write(path, pki.ocsp_response(authority, certificate, revoked, validity), 0o644)
        return path, entry

    def export(self, name: str, password: bytes) -> tuple[Path, Path]:
        """Write the keystore of a name and the truststore. Raises PkiError, OSError."""
        self.latest(name)
        key_path = self.path(name, "key")
        if not key_path.exists():
            raise PkiError(
                f"{key_path} is not here: the holder keeps it. There, `openssl pkcs12 -export` makes a keystore"
            )
        key, certificate = pki.key_from_pem(read(key_path)), read_certificate(self.path(name, "pem"))
        keystore, truststore = self.path(name, "p12"), self.directory / "truststore.p12"
        write(keystore, pki.keystore(name, key, certificate, self.certificate, password), 0o600)
        write(truststore, pki.truststore(self.certificate, password), 0o644)
        return keystore, truststore

    def _save(self, entries: list[Entry], crl_number: int) -> None:
        if len(entries) > ENTRIES_MAX:
            raise PkiError(f"{self.directory} has issued {ENTRIES_MAX} certificates: begin another authority")
        document = {"version": INDEX_VERSION, "crl_number": crl_number, "issued": [_to_json(e) for e in entries]}
        write(self.directory / "index.json", json.dumps(document, indent=1).encode() + b"\n", 0o600)
        self.entries, self._crl_number = entries, crl_number


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[Store]:
    """An authority's directory to work in, locked. Raises PkiError, OSError."""
    if not directory.is_dir():
        raise PkiError(f"{directory} is no directory: make an authority with `lineside pki init {directory}`")
    with locked(directory):
        check_private(directory)
        yield looked_at(directory)


def looked_at(directory: Path) -> Store:
    """An authority's directory as it is now. Raises PkiError."""
    path = directory / "index.json"
    if not path.exists() or not (directory / "ca.pem").exists():
        raise PkiError(f"{directory} holds no authority: make one with `lineside pki init {directory}`")
    certificate = read_certificate(directory / "ca.pem")
    try:
        document = json.loads(read(path))
        if document["version"] != INDEX_VERSION:
            raise PkiError(f"{path}: version {document['version']} is from another Lineside; this one reads 1")
        entries = [_from_json(each) for each in document["issued"]]
        return Store(directory, certificate, int(document["crl_number"]), entries)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, PkiError):
            raise
        raise PkiError(f"{path} is damaged ({error}): put it back from a backup") from error


def make_request(
    directory: Path, name: str, names: Names, algorithm: pki.Algorithm, *, keep_key: bool, replace_key: bool
) -> tuple[Path, Path]:
    """Where the key is to live: make it and the request for it; return their paths. Raises PkiError, OSError."""
    pki.parse_name(name)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    key_path, csr_path = directory / f"{name}.key", directory / f"{name}.csr"
    with locked(directory):
        if keep_key:
            try:
                key = pki.key_from_pem(read(key_path))
            except PkiError as error:
                raise PkiError(f"{key_path}: {error}") from None
        elif key_path.exists() and not replace_key:
            raise PkiError(
                f"{key_path} exists: use --keep-key for a request with it, or --replace to have it overwritten (the "
                "certificate it has now is then of no use)"
            )
        else:
            key = pki.new_key(algorithm)
            write(key_path, pki.key_to_pem(key), 0o600)
        write(csr_path, pki.request(key, name, names), 0o644)
    return key_path, csr_path


# ---------------------------------------------------------------------- files


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Raises PkiError where another process works there, OSError where there is no such directory."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PkiError(f"another `lineside pki` works in {directory} just now: try again when it is done") from None
        yield
    finally:
        os.close(descriptor)


def check_private(directory: Path) -> None:
    """Raises PkiError where others can get at the authority's key."""
    for path in (directory, directory / "ca.key"):
        if path.exists() and path.stat().st_mode & 0o077:
            mode = "700" if path.is_dir() else "600"
            raise PkiError(f"others can get at {path}, which holds the authority's key: chmod {mode} {path}")


def read(path: Path) -> bytes:
    """The file, bounded. Raises PkiError."""
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise PkiError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if len(data) > FILE_BYTES_MAX:
        raise PkiError(f"{path}: larger than {FILE_BYTES_MAX >> 20} MiB")
    return data


def read_certificate(path: Path) -> x509.Certificate:
    """Raises PkiError."""
    try:
        return pki.certificate_from_pem(read(path))
    except PkiError as error:
        raise error if str(error).startswith(str(path)) else PkiError(f"{path}: {error}") from None


def write(path: Path, data: bytes, mode: int) -> None:
    """Readers see the old file or the new one, and so does whoever comes after a power cut. Raises OSError."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(file.fileno(), mode)
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


# ---------------------------------------------------------------------- the index


def _to_json(entry: Entry) -> dict[str, object]:
    return asdict(entry) | {
        "serial": f"{entry.serial:x}",
        "kind": entry.kind.value,
        "names": {"dns": list(entry.names.dns), "ip": [str(each) for each in entry.names.addresses]},
        "begins": entry.begins.isoformat(),
        "ends": entry.ends.isoformat(),
        "revoked": entry.revoked and entry.revoked.isoformat(),
    }


def _from_json(found: dict[str, object]) -> Entry:
    """Raises KeyError, TypeError, ValueError."""
    names = found["names"]
    if not isinstance(names, dict) or found["reason"] not in pki.REASONS:
        raise ValueError("an entry without names or reason")
    revoked = found["revoked"]
    return Entry(
        int(str(found["serial"]), 16),
        pki.parse_name(str(found["name"])),
        Kind(found["kind"]),
        pki.parse_names(names["dns"], names["ip"]),
        _time(str(found["begins"])),
        _time(str(found["ends"])),
        None if revoked is None else _time(str(revoked)),
        str(found["reason"]),
    )


def _time(text: str) -> datetime:
    when = datetime.fromisoformat(text)
    if when.tzinfo is None:
        raise ValueError(f"{text} without a zone")
    return when.astimezone(UTC)


def _public(key: pki.PrivateKey | None) -> PublicKey:
    assert key is not None
    return key.public_key()
