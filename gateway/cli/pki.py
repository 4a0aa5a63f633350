"""`pki`: a private certificate authority for a fleet.

The authority's directory stays on a machine of its own; what a gateway, hub or app gets is its own certificate and
key, `ca.pem` and `crl.pem`. `cryptography` is loaded by the command that needs it, not by naming one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar, cast

import click

from gateway.cli.output import json_option, print_json, safe
from gateway.cli.tables import print_table
from gateway.errors import LinesideError

if TYPE_CHECKING:
    from cryptography import x509

    from security.pki import Authority, Validity
    from security.pki_store import Entry, Issued, Store

KINDS: Final = ("gateway", "hub", "app")
REASONS: Final = ("unspecified", "key-compromise", "affiliation-changed", "superseded", "cessation-of-operation")
CA_DAYS: Final = 3650
LEAF_DAYS: Final = 730
CRL_DAYS: Final = 365
OCSP_DAYS: Final = 30
BACKDATE_DAYS: Final = 7
SOON: Final = timedelta(days=30)
PASSPHRASE_BYTES_MAX: Final = 1024
FILES_MAX: Final = 1000

F = TypeVar("F", bound=Callable[..., Any])
Algorithm = Literal["p256", "ed25519"]


class PkiCommandError(LinesideError):
    """The authority can't do what was asked."""


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors of the authority and of the disk, as one line for a person."""
    from security.pki import PkiError

    try:
        yield
    except PkiError as error:
        raise PkiCommandError(str(error)) from None
    except OSError as error:
        raise PkiCommandError(f"{error.filename or 'disk'}: {error.strerror or error}") from None


# ---------------------------------------------------------------------- options


def _directory(command: F) -> F:
    return click.argument("directory", metavar="DIR", type=click.Path(path_type=Path, file_okay=False))(command)


def _passphrase_option(command: F) -> F:
    return click.option(
        "--passphrase-file",
        type=click.Path(path_type=Path),
        envvar="LINESIDE_CA_PASSPHRASE_FILE",
        show_envvar=True,
        help="The file with the passphrase of the authority's key (its first line).",
    )(command)


def _names_options(command: F) -> F:
    command = click.option("--ip", multiple=True, help="An address it is dialled by; may be repeated.")(command)
    return click.option("--dns", multiple=True, help="A DNS name it is dialled by; may be repeated.")(command)


def _validity_options(days: int) -> Callable[[F], F]:
    def decorate(command: F) -> F:
        command = click.option(
            "--backdate",
            type=int,
            default=BACKDATE_DAYS,
            show_default=True,
            help="Days before now at which it begins, for machines whose clock is late.",
        )(command)
        return click.option("--days", type=int, default=days, show_default=True, help="Days until it ends.")(command)

    return decorate


def _algorithm_option(command: F) -> F:
    return click.option(
        "--algorithm",
        type=click.Choice(("p256", "ed25519")),
        default="p256",
        show_default=True,
        help="The kind of key; Ed25519 needs Java 15 or OpenSSL 1.1.1 at every peer.",
    )(command)


def _crl_days_option(command: F) -> F:
    return click.option(
        "--crl-days",
        type=int,
        default=CRL_DAYS,
        show_default=True,
        help="Days until peers want a newer revocation list; past them they refuse everybody.",
    )(command)


# ---------------------------------------------------------------------- commands


@click.group()
def pki() -> None:
    """A private certificate authority for a fleet, in a directory of its own.

    On the machine of the authority: init, issue, renew, revoke, crl, ocsp, export. On the gateway: csr. Anywhere: show.
    """


@pki.command()
@_directory
@click.option("--name", help="The authority's name; default: Lineside CA and eight random digits.")
@_algorithm_option
@_validity_options(CA_DAYS)
@click.option("--permit-dns", multiple=True, help="Sign names of this domain only; may be repeated.")
@click.option("--permit-ip", multiple=True, help="Sign addresses of this network only; may be repeated.")
@_passphrase_option
@_crl_days_option
@json_option
def init(
    directory: Path,
    name: str | None,
    algorithm: str,
    days: int,
    backdate: int,
    permit_dns: tuple[str, ...],
    permit_ip: tuple[str, ...],
    passphrase_file: Path | None,
    crl_days: int,
    as_json: bool,
) -> None:
    """Make an authority in DIR (mode 0700).

    With --permit-dns or --permit-ip every peer refuses its certificates for other names, whoever has the key.
    """
    import secrets

    with _explained():
        from security import pki as core
        from security import pki_store

        pki_store.create(
            directory,
            f"Lineside CA {secrets.token_hex(4)}" if name is None else name,
            cast(Algorithm, algorithm),
            _validity(days, backdate),
            core.parse_constraints(permit_dns, permit_ip),
            _passphrase(passphrase_file),
            _validity(crl_days, backdate),
        )
    files = {"ca": str(directory / "ca.pem"), "key": str(directory / "ca.key"), "crl": str(directory / "crl.pem")}
    if as_json:
        print_json(files)
        return
    click.echo(safe(f"{files['ca']}: give it, and crl.pem, to every gateway, hub and app"))
    click.echo(safe(f"{files['key']}: stays here; back {directory} up, and keep the copy as safe"))


@pki.command()
@_directory
@click.argument("name")
@click.option("--kind", type=click.Choice(KINDS), required=True, help="Whose it is, and so what it is good for.")
@_names_options
@_algorithm_option
@_validity_options(LEAF_DAYS)
@click.option("--csr", type=click.Path(path_type=Path), help="Sign this request; the key stays where it was made.")
@click.option("--replace", is_flag=True, help="Also where NAME has a certificate or a key, which is overwritten.")
@_passphrase_option
@json_option
def issue(
    directory: Path,
    name: str,
    kind: str,
    dns: tuple[str, ...],
    ip: tuple[str, ...],
    algorithm: str,
    days: int,
    backdate: int,
    csr: Path | None,
    replace: bool,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Issue a certificate to NAME: the gateway's id, or the user a broker is to know an app by.

    A gateway dials hubs, and is dialled by apps if it has names; a hub is dialled; an app dials.
    """
    with _explained():
        from security import pki as core
        from security import pki_store

        names = core.parse_names(dns, ip)
        public_key = None if csr is None else _requested(csr, name, names)
        with pki_store.opened(directory) as store:
            issued = store.issue(
                store.authority(_passphrase(passphrase_file)),
                name,
                core.Kind(kind),
                names,
                _validity(days, backdate),
                _now(),
                algorithm=cast(Algorithm, algorithm),
                public_key=public_key,
                again=replace,
            )
    _print_issued([issued], as_json)


@pki.command()
@_directory
@click.argument("name")
@_names_options
@_algorithm_option
@click.option("--keep-key", is_flag=True, help="Make the request with the key that is there.")
@click.option("--replace", is_flag=True, help="Overwrite the key that is there.")
@json_option
def csr(
    directory: Path,
    name: str,
    dns: tuple[str, ...],
    ip: tuple[str, ...],
    algorithm: str,
    keep_key: bool,
    replace: bool,
    as_json: bool,
) -> None:
    """On the gateway: make a key and a signing request for NAME in DIR. The key never leaves it."""
    if keep_key and replace:
        raise click.UsageError("Use one of --keep-key and --replace.")
    with _explained():
        from security import pki as core
        from security import pki_store

        names = core.parse_names(dns, ip)
        key, request = pki_store.make_request(
            directory, name, names, cast(Algorithm, algorithm), keep_key=keep_key, replace_key=replace
        )
    if as_json:
        print_json({"key": str(key), "csr": str(request)})
        return
    options = "".join([*(f" --dns {each}" for each in names.dns), *(f" --ip {each}" for each in names.addresses)])
    click.echo(safe(f"{key}: stays here"))
    click.echo(safe(f"{request}: take it to the authority, and there:"))
    click.echo(safe(f"  lineside pki issue DIR {name} --kind gateway{options} --csr {request.name}"))
    if os.geteuid() == 0:
        click.echo(
            safe(f"note: only root can read {key}; for a gateway that runs as lineside: ")
            + safe(f"chgrp lineside {key} && chmod 640 {key}"),
            err=True,
        )


@pki.command()
@_directory
@click.argument("names", metavar="[NAME]...", nargs=-1)
@click.option("--expiring", type=click.IntRange(0), metavar="DAYS", help="All that end within so many days.")
@click.option("--ca", "ca", is_flag=True, help="The authority's own certificate; those it issued stay good.")
@click.option("--days", type=int, help=f"Days until it ends; default {LEAF_DAYS}, and {CA_DAYS} with --ca.")
@click.option("--backdate", type=int, default=BACKDATE_DAYS, show_default=True, help="Days before now it begins.")
@click.option("--new-key", type=click.Choice(("p256", "ed25519")), help="With a new key, where the old one is here.")
@_passphrase_option
@json_option
def renew(
    directory: Path,
    names: tuple[str, ...],
    expiring: int | None,
    ca: bool,
    days: int | None,
    backdate: int,
    new_key: str | None,
    passphrase_file: Path | None,
    as_json: bool,
) -> None:
    """Sign again, with a later end: same kind, names and key. The old certificate stays good until it ends."""
    if bool(names) + (expiring is not None) + ca != 1:
        raise click.UsageError("Use one of NAME..., --expiring DAYS and --ca.")
    if ca and new_key:
        raise click.UsageError("An authority with a new key is a new authority: use init with another directory.")
    now = _now()
    issued: list[Issued] = []
    with _explained():
        from security import pki_store

        validity = _validity((CA_DAYS if ca else LEAF_DAYS) if days is None else days, backdate)
        with pki_store.opened(directory) as store:
            wanted = list(names)
            if expiring is not None:
                wanted = [e.name for e in _current(store) if e.ends <= now + timedelta(days=expiring)]
            for name in wanted:
                store.latest(name)  # a name that is wrong should not leave half of the work done
            authority = store.authority(_passphrase(passphrase_file))
            if ca:
                store.renew_authority(authority, validity)
            for name in wanted:
                issued.append(store.renew(authority, name, validity, now, cast("Algorithm | None", new_key)))
    if not ca:
        _print_issued(issued, as_json)
    elif as_json:
        print_json({"ca": str(directory / "ca.pem"), "ends": validity.ends.isoformat()})
    else:
        click.echo(safe(f"{directory / 'ca.pem'}: until {_day(validity.ends)}; give it to every gateway, hub and app"))


@pki.command()
@_directory
@click.argument("who", metavar="NAME|SERIAL")
@click.option("--reason", type=click.Choice(REASONS), default="unspecified", show_default=True)
@_crl_days_option
@_passphrase_option
@json_option
def revoke(directory: Path, who: str, reason: str, crl_days: int, passphrase_file: Path | None, as_json: bool) -> None:
    """Revoke every certificate of NAME, or the one with SERIAL, and write DIR/crl.pem anew.

    It works where crl.pem has been brought: `crl` in [[hub]], [mqtt] and [amqp], and what the brokers call it.
    """
    now = _now()
    with _explained():
        from security import pki_store

        with pki_store.opened(directory) as store:
            found = [each for each in store.find(who) if each.revoked is None]
            if not found:
                raise PkiCommandError(f"{who} is revoked already; `lineside pki crl` writes the list anew")
            store.revoke(found, now, reason, _authority(store, passphrase_file), _validity(crl_days, BACKDATE_DAYS))
    crl = directory / "crl.pem"
    if as_json:
        print_json({"revoked": [{"name": e.name, "serial": f"{e.serial:x}"} for e in found], "crl": str(crl)})
        return
    for each in found:
        click.echo(safe(f"revoked {each.name}, serial {each.serial:x}, which would have ended {_day(each.ends)}"))
    click.echo(safe(f"{crl}: give it to every gateway and hub"))


@pki.command()
@_directory
@_crl_days_option
@_passphrase_option
@json_option
def crl(directory: Path, crl_days: int, passphrase_file: Path | None, as_json: bool) -> None:
    """Write the revocation list anew, before its time is over."""
    with _explained():
        from security import pki_store

        validity = _validity(crl_days, BACKDATE_DAYS)
        with pki_store.opened(directory) as store:
            store.revoke((), _now(), "unspecified", _authority(store, passphrase_file), validity)
    path = directory / "crl.pem"
    if as_json:
        print_json({"crl": str(path), "ends": validity.ends.isoformat()})
    else:
        click.echo(safe(f"{path}: until {_day(validity.ends)}; give it to every gateway and hub"))


@pki.command()
@_directory
@click.argument("name")
@click.option(
    "--days",
    type=int,
    default=OCSP_DAYS,
    show_default=True,
    help="Days until a newer one is wanted; past them gateways with `ocsp` refuse who staples it.",
)
@_passphrase_option
@json_option
def ocsp(directory: Path, name: str, days: int, passphrase_file: Path | None, as_json: bool) -> None:
    """Write the OCSP response that NAME, a hub, may staple: that its certificate is good, or is revoked.

    It is for a TLS server that takes it as a file, DER (HAProxy: beside the certificate, as FILE.pem.ocsp), and is
    heeded where `ocsp` is on in [[hub]].
    """
    with _explained():
        from security import pki_store

        validity = _validity(days, BACKDATE_DAYS)
        with pki_store.opened(directory) as store:
            path, entry = store.staple(name, _authority(store, passphrase_file), validity)
    status = "good" if entry.revoked is None else "revoked"
    if as_json:
        print_json({"ocsp": str(path), "status": status, "ends": validity.ends.isoformat()})
    else:
        click.echo(safe(f"{path}: {name} is {status}; until {_day(validity.ends)}; give it to {name}"))


@pki.command()
@_directory
@click.argument("name")
@click.option(
    "--password-file", type=click.Path(path_type=Path), required=True, help="The password of both (its first line)."
)
@json_option
def export(directory: Path, name: str, password_file: Path, as_json: bool) -> None:
    """Write what Java reads, so Artemis: the PKCS #12 keystore of NAME, and truststore.p12."""
    with _explained():
        from security import pki_store

        with pki_store.opened(directory) as store:
            keystore, truststore = store.export(name, _secret(password_file))
    if as_json:
        print_json({"keystore": str(keystore), "truststore": str(truststore), "alias": name})
        return
    click.echo(safe(f"{keystore}: keyStorePath, keyStoreType=PKCS12"))
    click.echo(safe(f"{truststore}: trustStorePath, trustStoreType=PKCS12"))


@pki.command()
@click.argument("path", type=click.Path(path_type=Path, exists=True))
@json_option
def show(path: Path, as_json: bool) -> None:
    """What an authority's directory holds; or the certificates and lists of any directory or file."""
    now = _now()
    with _explained():
        if (path / "index.json").exists():
            from security import pki_store

            _show_authority(pki_store.looked_at(path), now, as_json)
        else:
            _show_files(path, now, as_json)


# ---------------------------------------------------------------------- what they share


def _now() -> datetime:
    return datetime.now(UTC)


def _validity(days: int, backdate_days: int) -> Validity:
    from security.pki import BACKDATE_DAYS_MAX, PkiError, Validity

    if abs(backdate_days) > BACKDATE_DAYS_MAX:
        raise PkiError(f"dated back by {backdate_days} days; give 0 to {BACKDATE_DAYS_MAX}")
    return Validity.of(_now(), days, timedelta(days=backdate_days))


def _authority(store: Store, passphrase_file: Path | None) -> Authority:
    return store.authority(_passphrase(passphrase_file))


def _passphrase(path: Path | None) -> bytes | None:
    return None if path is None else _secret(path)


def _secret(path: Path) -> bytes:
    from security.pki import PkiError
    from security.pki_store import read

    secret = read(path).partition(b"\n")[0].removesuffix(b"\r")
    if not 1 <= len(secret) <= PASSPHRASE_BYTES_MAX:
        raise PkiError(f"{path}: its first line is to have 1 to {PASSPHRASE_BYTES_MAX} bytes")
    return secret


def _requested(path: Path, name: str, names: Any) -> Any:
    """The key of a request that asks for nothing but what the person at the authority has typed."""
    from security.pki import PkiError, read_request
    from security.pki_store import read

    data = read(path)
    try:
        request = read_request(data)
    except PkiError as error:
        raise PkiError(f"{path}: {error}") from None
    if request.name != name:
        raise PkiError(f"{path} was made for {request.name}, not for {name}")
    beyond = [f"--dns {each}" for each in request.names.dns if each not in names.dns]
    beyond += [f"--ip {each}" for each in request.names.addresses if each not in names.addresses]
    if beyond:
        raise PkiError(f"{path} asks for names beyond those given; if it is right to have them, add {' '.join(beyond)}")
    return request.public_key


def _current(store: Store) -> list[Entry]:
    """The last certificate of every name, revoked ones left out."""
    latest = {each.name: each for each in store.entries}
    return [each for each in latest.values() if each.revoked is None]


def _print_issued(issued: list[Issued], as_json: bool) -> None:
    if as_json:
        print_json([_entry_json(each.entry) | _files(each.cert, each.key) for each in issued])
        return
    if not issued:
        click.echo("nothing to renew")
    for each in issued:
        entry = each.entry
        listed = f" ({entry.names})" if entry.names else ""
        click.echo(safe(f"{each.cert}: {entry.kind.value} {entry.name}{listed}, until {_day(entry.ends)}"))
        if each.key is not None:
            click.echo(safe(f"{each.key}: its key"))
        keystore = each.cert.with_name(f"{entry.name}.p12")
        if keystore.exists():
            click.echo(safe(f"note: {keystore} holds the certificate before: `export` it again"), err=True)


def _files(cert: Path, key: Path | None) -> dict[str, str | None]:
    return {"cert": str(cert), "key": None if key is None else str(key)}


def _entry_json(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "kind": entry.kind.value,
        "serial": f"{entry.serial:x}",
        "dns": list(entry.names.dns),
        "ip": [str(each) for each in entry.names.addresses],
        "begins": entry.begins.isoformat(),
        "ends": entry.ends.isoformat(),
        "revoked": entry.revoked and entry.revoked.isoformat(),
    }


def _state(ends: datetime, now: datetime, revoked: datetime | None = None) -> str:
    if revoked is not None:
        return f"revoked {_day(revoked)}"
    if ends <= now:
        return "ended"
    return f"ends in {(ends - now).days} d" if ends <= now + SOON else "good"


def _day(when: datetime) -> str:
    return f"{when:%Y-%m-%d}"


def _show_authority(store: Store, now: datetime, as_json: bool) -> None:
    from security import pki as core
    from security.pki_store import read

    directory = store.directory
    crl = core.revocation_list_from_pem(read(directory / "crl.pem")) if (directory / "crl.pem").exists() else None
    crl_ends = None if crl is None else crl.next_update_utc
    ends = store.certificate.not_valid_after_utc
    name = core.common_name(store.certificate.subject)
    limits = core.constraints_of(store.certificate)
    permitted = [*limits.dns, *map(str, limits.networks)]
    latest = {each.name: each for each in store.entries}
    if as_json:
        print_json(
            {
                "ca": {
                    "name": name,
                    "file": str(directory / "ca.pem"),
                    "ends": ends.isoformat(),
                    "key_here": (directory / "ca.key").exists(),
                    "permitted": permitted,
                },
                "crl": {
                    "file": str(directory / "crl.pem"),
                    "ends": crl_ends and crl_ends.isoformat(),
                    "revoked": 0 if crl is None else len(crl),
                },
                "issued": [
                    _entry_json(each)
                    | {"state": _state(each.ends, now, each.revoked)}
                    | (_paths(store, each) if latest[each.name] is each else _files_of_none())
                    for each in store.entries
                ],
            }
        )
        return
    click.echo(safe(f"authority {name}: {directory / 'ca.pem'}, until {_day(ends)}, {_state(ends, now)}"))
    if permitted:
        click.echo(safe(f"signs only for {', '.join(permitted)}"))
    if crl is not None and crl_ends is not None:
        ended = _state(crl_ends, now)
        click.echo(safe(f"revoked: {len(crl)}, in {directory / 'crl.pem'}, until {_day(crl_ends)}, {ended}"))
    rows = [
        (e.name, e.kind.value, str(e.names) or "-", _day(e.ends), _state(e.ends, now, e.revoked), f"{e.serial:x}")
        for e in store.entries
    ]
    print_table(("name", "kind", "names", "ends", "state", "serial"), rows, "nothing issued")


def _paths(store: Store, entry: Entry) -> dict[str, str | None]:
    found = {ending: store.path(entry.name, ending) for ending in ("pem", "key", "p12")}
    return {{"pem": "cert"}.get(ending, ending): str(path) if path.exists() else None for ending, path in found.items()}


def _files_of_none() -> dict[str, str | None]:
    return {"cert": None, "key": None, "p12": None}


def _show_files(path: Path, now: datetime, as_json: bool) -> None:
    from security import pki as core
    from security.pki_store import read

    found = sorted(path.glob("*.pem"))[:FILES_MAX] if path.is_dir() else [path]
    shown: list[dict[str, Any]] = []
    for each in found:
        data = read(each)
        if b"-----BEGIN X509 CRL-----" in data:
            crl = core.revocation_list_from_pem(data)
            ends = crl.next_update_utc or datetime.max.replace(tzinfo=UTC)
            shown.append(_file_json(each, "revocation list", crl.issuer, ends, now))
        elif b"-----BEGIN CERTIFICATE-----" in data:
            certificate = core.certificate_from_pem(data)
            ends = certificate.not_valid_after_utc
            shown.append(_file_json(each, "certificate", certificate.subject, ends, now))
        elif not path.is_dir():
            raise PkiCommandError(f"{path} holds neither a certificate nor a revocation list in PEM form")
    if as_json:
        print_json(shown)
        return
    rows = [(each["file"], each["what"], each["name"], each["ends"][:10], each["state"]) for each in shown]
    print_table(("file", "what", "name", "ends", "state"), rows, "no certificates")


def _file_json(path: Path, what: str, name: x509.Name, ends: datetime, now: datetime) -> dict[str, Any]:
    from security.pki import common_name

    return {
        "file": str(path),
        "what": what,
        "name": common_name(name) or name.rfc4514_string(),
        "ends": ends.isoformat(),
        "state": _state(ends, now),
    }
