"""Builds the package: a virtual environment for /opt/lineside, units, maintainer scripts; as .deb and as tarball.

Everything it installs is pinned and hashed in lock.txt, what it builds with in lock-build.txt (`--lock` writes both
anew). The target needs that release's python3 and nothing else: no compiler, no network. Runs on the standard library.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path

import lockfile

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PREFIX = "opt/lineside"
MAINTAINER_SCRIPTS = ("preinst", "postinst", "prerm", "postrm")
# What a virtual environment holds only for people who type `activate`.
NOT_FOR_A_SERVICE = ("activate", "activate.csh", "activate.fish", "Activate.ps1")


def say(text: str) -> None:
    print(f"==> {text}", file=sys.stderr, flush=True)


def fail(text: str) -> SystemExit:
    return SystemExit(f"deploy/package: {text}")


def run(*command: str | Path, **more: object) -> str:
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more
    )
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:])
        raise fail(f"{Path(str(command[0])).name} {command[1]} failed with status {done.returncode}; see above")
    return done.stdout


def version() -> str:
    found: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return found


def epoch() -> int:
    """Seconds: the time every file of the package is given, so that the same commit makes the same package."""
    if "SOURCE_DATE_EPOCH" in os.environ:
        return int(os.environ["SOURCE_DATE_EPOCH"])
    try:
        return int(run("git", "-C", ROOT, "log", "-1", "--format=%ct").strip())
    except (OSError, SystemExit):
        return 1_700_000_000


def target_python() -> Path:
    """The interpreter of the release, of the same minor version as this one, which compiles for it."""
    path = Path("/usr/bin/python3")
    wanted = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if not path.exists():
        raise fail("there is no /usr/bin/python3, which the package runs on; apt install python3")
    found = run(path, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    if found != wanted:
        raise fail(
            f"/usr/bin/python3 is {found}, this is Python {wanted}, and compiled modules fit one only; "
            f"run PYTHON=/usr/bin/python3 deploy/package (apt install python3-venv python3-dev)"
        )
    return path


# ------------------------------------------------------------------------------------------------------ the parts


def make_builder(work: Path) -> Path:
    """An environment with the hashed build requirements; its pip does all the rest."""
    builder = work / "builder"
    python = builder / "bin" / "python"
    stamp = builder / "stamp"
    wanted = hashlib.sha256((HERE / "lock-build.txt").read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    say(f"build environment (Python {platform.python_version()})")
    run(sys.executable, "-m", "venv", "--clear", builder)
    run(python, "-m", "pip", "install", "-q", "--require-hashes", "-r", HERE / "lock-build.txt")
    stamp.write_text(wanted)
    return python


def make_wheels(python: Path, work: Path) -> Path:
    """A wheel of everything in lock.txt, checked against its hashes, and of Lineside itself."""
    wheels = work / "wheels"
    stamp = wheels / "stamp"
    wanted = hashlib.sha256((HERE / "lock.txt").read_bytes()).hexdigest() + sys.version
    if not (stamp.exists() and stamp.read_text() == wanted):
        say("wheels of what Lineside needs (Qpid Proton is compiled: about a minute)")
        shutil.rmtree(wheels, ignore_errors=True)
        wheels.mkdir(parents=True)
        flags = f"{os.environ.get('CFLAGS', '')} -g0 -ffile-prefix-map={work}=."
        # pip builds in a directory with a random name, which ends up in nothing but debugging information.
        run(
            *(python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--require-hashes", "--wheel-dir", wheels),
            *("-r", HERE / "lock.txt"),
            env=os.environ | {"CFLAGS": flags.strip()},
        )
        stamp.write_text(wanted)
    for old in wheels.glob("lineside-*.whl"):
        old.unlink()
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, source / name)
    for name in ("gateway", "storeforward", "security"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(python, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "--wheel-dir", wheels, source)
    return wheels


def make_venv(target: Path, builder: Path, wheels: Path, tree: Path) -> Path:
    """The virtual environment, as it will stand in /opt/lineside."""
    say("virtual environment for /opt/lineside")
    venv = tree / PREFIX
    run(target, "-m", "venv", "--without-pip", venv)
    lock = wheels / "lock.txt"
    # Hashes were of what was fetched; what was compiled from it has others.
    lock.write_text("".join(f"{pin.name}=={pin.version}\n" for pin in lockfile.read((HERE / "lock.txt").read_text())))
    run(
        *(builder, "-m", "pip", "--python", venv / "bin" / "python", "install", "-q", "--no-index", "--no-compile"),
        *("--find-links", wheels, "-r", lock, f"lineside=={version()}"),
    )
    # pip itself is a dependency that nothing here calls, and it would be a way to change a sealed environment.
    for name in ("pip", "setuptools", "wheel"):
        for found in venv.glob(f"lib/python3*/site-packages/{name}*"):
            shutil.rmtree(found)
    site = next(venv.glob("lib/python3*/site-packages"))
    for script in (venv / "bin").iterdir():
        keep = script.name in ("lineside", "python", "python3") or script.is_symlink()
        if not keep or script.name in NOT_FOR_A_SERVICE:
            script.unlink()
    lineside = venv / "bin" / "lineside"
    lineside.write_text(re.sub(r"\A#!.*", f"#!/{PREFIX}/bin/python -I", lineside.read_text()))
    config = venv / "pyvenv.cfg"
    lines = [line for line in config.read_text().splitlines() if not line.startswith(("command", "executable"))]
    config.write_text("\n".join(lines) + "\n")
    for record in site.glob("*.dist-info/direct_url.json"):
        record.unlink()
    # Compiled by content, not by time: whoever unpacks may give files other times, and nobody may write there later.
    run(
        *(target, "-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash"),
        *("-s", tree, "-p", "/", site),
    )
    left = [path for path in tree.rglob("*") if path.is_file() and str(ROOT).encode() in path.read_bytes()]
    if left:
        raise fail(f"{left[0].relative_to(tree)} names a directory of this machine")
    return venv


def lay_out(tree: Path) -> None:
    """Units, users, directories and documents."""
    systemd = ROOT / "systemd"
    for path in sorted(systemd.iterdir()):
        where = {
            ".service": "lib/systemd/system",
            ".socket": "lib/systemd/system",
            ".sysusers": "usr/lib/sysusers.d",
            ".tmpfiles": "usr/lib/tmpfiles.d",
        }.get(path.suffix)
        if where is None:
            continue
        name = path.name if where.startswith("lib") else f"{path.stem}.conf"
        copy(path, tree / where / name)
    doc = tree / "usr/share/doc/lineside"
    for name in ("README.md", "CHANGELOG.md", "ARCHITECTURE.md"):
        copy(ROOT / name, doc / name)
    copy(ROOT / "LICENSE", doc / "copyright")
    for path in sorted((ROOT / "deploy").glob("*.md")):
        copy(path, doc / path.name)
    # Configurations, and the other ways of installing; programs come with the source only.
    examples = ROOT / "deploy" / "examples"
    for pattern in ("*.toml", "*.yaml", "ansible/**/*.yml", "container/Containerfile"):
        for path in sorted(examples.glob(pattern)):
            copy(path, doc / "examples" / path.relative_to(examples))
    link = tree / "usr/bin/lineside"
    link.parent.mkdir(parents=True)
    link.symlink_to(f"/{PREFIX}/bin/lineside")


def copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o644)


# ------------------------------------------------------------------------------------------------------- the SBOM


def sbom(venv: Path, of: str, when: int) -> str:
    """A CycloneDX 1.5 document of everything in the environment."""
    hashes = {pin.name: pin.hashes for pin in lockfile.read((HERE / "lock.txt").read_text())}
    components = []
    for info in sorted(venv.glob("lib/python3*/site-packages/*.dist-info/METADATA")):
        fields = [line.partition(": ")[::2] for line in info.read_text().partition("\n\n")[0].splitlines()]
        first = dict(reversed(fields))
        name = lockfile.normal(first["Name"])
        component: dict[str, object] = {
            "type": "application" if name == "lineside" else "library",
            "bom-ref": f"pkg:pypi/{name}@{first['Version']}",
            "name": name,
            "version": first["Version"],
            "purl": f"pkg:pypi/{name}@{first['Version']}",
        }
        if name in hashes:
            component["hashes"] = [{"alg": "SHA-256", "content": digest} for digest in hashes[name]]
        if spoken := first.get("License-Expression") or first.get("License", ""):
            component["licenses"] = [{"license": {"name": spoken.splitlines()[0][:100]}}]
        components.append(component)
    document = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {
            "timestamp": iso(when),
            "component": {"type": "application", "name": "lineside", "version": of},
        },
        "components": components,
    }
    return json.dumps(document, indent=1) + "\n"


def iso(when: int) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# --------------------------------------------------------------------------------------------------- the archives


def entries(tree: Path) -> Iterator[Path]:
    return iter(sorted(tree.rglob("*")))


def tarball(tree: Path, target: Path, when: int, top: str) -> None:
    """Of this tree, with `install` beside it; the same bytes for the same tree."""
    raw = io.BytesIO()

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = "root"
        info.mtime = when
        return info

    with tarfile.open(fileobj=raw, mode="w", format=tarfile.PAX_FORMAT) as archive:
        archive.add(HERE / "install", f"{top}/install", filter=plain)
        for name in MAINTAINER_SCRIPTS:
            archive.add(tree.parent / "control" / name, f"{top}/scripts/{name}", filter=plain)
        for path in entries(tree):
            archive.add(path, f"{top}/root/{path.relative_to(tree)}", recursive=False, filter=plain)
    with target.open("wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=when) as packed:
        packed.write(raw.getvalue())


def debian(tree: Path, target: Path, when: int, of: str, arch: str) -> None:
    staged = tree.parent / "deb"
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(tree, staged, symlinks=True)
    control = staged / "DEBIAN"
    control.mkdir()
    size_kib = sum(path.lstat().st_size for path in tree.rglob("*") if not path.is_dir()) // 1024
    minor = sys.version_info[1]
    (control / "control").write_text(
        f"Package: lineside\nVersion: {of}\nArchitecture: {arch}\nSection: net\nPriority: optional\n"
        "Maintainer: Lineside maintainers <lineside@example.org>\n"
        f"Installed-Size: {size_kib}\n"
        f"Depends: python3 (>= 3.{minor}), python3 (<< 3.{minor + 1}), systemd\n"
        "Description: store-and-forward gateway for machines that lose the line\n"
        " Local apps speak MQTT or AMQP 1.0 to it; what they send is journaled in SQLite,\n"
        " acknowledged once it is on the disk, and forwarded over AMQP 1.0 and TLS\n"
        " whenever a link to a hub is up. What the hub sends comes back in order.\n"
    )
    for name in MAINTAINER_SCRIPTS:
        shutil.copyfile(tree.parent / "control" / name, control / name)
        (control / name).chmod(0o755)
    sums = [
        f"{hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()}  {path.relative_to(staged)}\n"
        for path in entries(staged)
        if path.is_file() and not path.is_symlink() and control not in path.parents
    ]
    (control / "md5sums").write_text("".join(sums))
    run(
        "dpkg-deb",
        "--build",
        "--root-owner-group",
        "-Zxz",
        staged,
        target,
        env=os.environ | {"SOURCE_DATE_EPOCH": str(when)},
    )


def scripts(control: Path) -> None:
    """The maintainer scripts; preinst is told which journals this version can read."""
    control.mkdir(exist_ok=True)
    schema = re.search(r"^MIGRATIONS: .* = \(([^)]*)\)", (ROOT / "storeforward" / "schema.py").read_text(), re.M)
    if schema is None:
        raise fail("storeforward/schema.py: the line MIGRATIONS: ... = (...) is not found")
    newest = len([each for each in schema[1].split(",") if each.strip()])
    for name in MAINTAINER_SCRIPTS:
        text = (HERE / name).read_text().replace("@SCHEMA@", str(newest))
        (control / name).write_text(text)
        (control / name).chmod(0o755)


def lock() -> None:
    """Resolve pyproject.toml anew."""
    with_tools = ROOT / "build" / "lock"
    run(sys.executable, "-m", "venv", "--clear", with_tools)
    run(with_tools / "bin" / "pip", "install", "-q", "pip-tools")
    for source, target in ((ROOT / "pyproject.toml", "lock.txt"), (HERE / "lock-build.in", "lock-build.txt")):
        say(f"deploy/packaging/{target}")
        run(
            *(with_tools / "bin" / "pip-compile", "-q", "--upgrade", "--allow-unsafe", "--generate-hashes"),
            *(
                "--no-emit-index-url",
                "--no-emit-trusted-host",
                "--no-emit-find-links",
                "--no-header",
                "--no-annotate",
                "--strip-extras",
            ),
            *("-o", HERE / target, source),
        )


def main() -> None:
    parser = argparse.ArgumentParser(prog="deploy/package", description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "dist", help="where the files go (default: dist)")
    parser.add_argument("--suffix", default="", help="appended to the version, as ~rc1 or +1")
    parser.add_argument("--lock", action="store_true", help="write the locks anew and build nothing")
    options = parser.parse_args()
    if options.lock:
        lock()
        return
    target = target_python()
    work = ROOT / "build" / f"package-{sys.version_info[0]}.{sys.version_info[1]}"
    work.mkdir(parents=True, exist_ok=True)
    when, of = epoch(), version() + options.suffix
    builder = make_builder(work)
    wheels = make_wheels(builder, work)
    tree = work / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    tree.mkdir()
    os.umask(0o022)
    venv = make_venv(target, builder, wheels, tree)
    lay_out(tree)
    bill = sbom(venv, of, when)
    scripts(work / "control")
    options.output.mkdir(parents=True, exist_ok=True)
    (tree / "usr/share/doc/lineside/sbom.cdx.json").write_text(bill)
    (options.output / f"lineside-{of}.cdx.json").write_text(bill)
    made = options.output / f"lineside-{of}-linux-{platform.machine()}-py3{sys.version_info[1]}.tar.gz"
    tarball(tree, made, when, f"lineside-{of}")
    done = [made]
    if shutil.which("dpkg-deb"):
        arch = run("dpkg", "--print-architecture").strip()
        done.append(options.output / f"lineside_{of}_{arch}.deb")
        debian(tree, done[-1], when, of, arch)
    else:
        say("no dpkg-deb here: no .deb, the tarball only")
    for path in done:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        print(
            f"{path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}  "
            f"{path.stat().st_size / 1e6:.1f} MB  sha256 {digest}"
        )


if __name__ == "__main__":
    main()
