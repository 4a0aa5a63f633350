# shellcheck shell=bash
# Sourced by deploy/demo, deploy/test and others: makes .venv with Lineside in it. Knows nothing of what runs there.
# Needs bash, Python >= 3.11 with venv, and a C compiler (for Qpid Proton, which comes as source).

root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd -P)
venv=$root/.venv

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() {
    printf '\nlineside: %s\n' "$1" >&2
    shift
    for line in "$@"; do printf '    %s\n' "$line" >&2; done
    exit 2
}

# The first Python that is new enough; $PYTHON goes before all others.
find_python() {
    local name
    for name in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 python; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then
            command -v "$name"
            return 0
        fi
    done
    return 1
}

make_venv() {
    local python version
    python=$(find_python) || die "needs Python 3.11 or newer; found $(python3 --version 2>/dev/null || echo none)." \
        "Debian 12, Ubuntu 24.04 and newer: apt install python3 python3-venv python3-dev" \
        "Fedora: dnf install python3 python3-devel" \
        "Or name one yourself: PYTHON=/path/to/python3.12 ${0}"
    version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    say "Python $version ($python) → .venv"
    "$python" -c 'import venv, ensurepip' >/dev/null 2>&1 || die "$python has no venv module." \
        "Debian, Ubuntu: apt install python$version-venv"
    "$python" -m venv --clear "$venv" || die "could not make $venv"
    printf '%s\n' "$root" >"$venv/made-at"
}

# Why Qpid Proton would not compile, one reason a line; nothing if it should.
compiler_lacks() {
    "$venv/bin/python" - <<'PYTHON'
import os, shutil, sysconfig

if not any(map(shutil.which, filter(None, (os.environ.get("CC", "").split(" ")[0], "cc", "gcc", "clang")))):
    print("a C compiler (Debian: apt install build-essential · Fedora: dnf install gcc)")
if not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")):
    print("Python's headers (Debian: apt install python3-dev · Fedora: dnf install python3-devel)")
PYTHON
}

# Whether .venv can be used as it is. One that was moved can't: its scripts hold its path.
venv_usable() {
    [ "$(cat "$venv/made-at" 2>/dev/null)" = "$root" ] &&
        "$venv/bin/python" -c 'import sys, pip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

# install EXTRA: Lineside from this directory, editable, with the optional dependencies EXTRA ("" for none).
# Quick when pyproject.toml is what it was at the last installation.
install() {
    local extra=$1 stamp=$venv/installed${1:+-$1}.toml known lacks
    venv_usable || make_venv
    for known in "$stamp" "$venv"/installed-*.toml; do
        # What deploy/test installed is enough for deploy/demo.
        if { [ "$known" = "$stamp" ] || [ -z "$extra" ]; } && cmp -s "$root/pyproject.toml" "$known"; then
            return 0
        fi
    done
    lacks=$(compiler_lacks)
    say "Installing Lineside and what it needs (about a minute the first time: Qpid Proton is compiled)"
    if ! "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
        --editable "$root${extra:+[$extra]}" >"$venv/install.log" 2>&1; then
        tail -n 25 "$venv/install.log" >&2
        if [ -n "$lacks" ]; then
            die "the installation failed; this machine lacks:" "$lacks" "All of it: $venv/install.log"
        fi
        die "the installation failed; its last lines are above." "All of it: $venv/install.log"
    fi
    cp "$root/pyproject.toml" "$stamp"
}
