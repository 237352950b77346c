#!/bin/sh
# Prints the path of a Python that can run the launcher (3.11 to 3.14 with venv), or a sentence and exit code 3.
# Order: the one used last time; the uv beside the launcher or on the path, if its checksum is known; the system's.
set -u
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 3
root=$(dirname -- "$here")
unset PYTHONPATH PYTHONHOME
export PYTHONNOUSERSITE=1

suits() {
    "$1" -I -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

known() {
    sum=$( { sha256sum "$1" || shasum -a 256 "$1"; } 2>/dev/null | cut -d ' ' -f 1)
    [ -n "$sum" ] && grep -q "^$sum " "$here/pins/uv.sha256"
}

from_uv() {
    for uv in "$here/bin/uv" "$(command -v uv)"; do
        if [ ! -x "$uv" ]; then continue; fi
        if ! known "$uv"; then
            echo "$uv is not the uv that Floe Chat was tested with, and is left alone." >&2
            continue
        fi
        echo "Fetching Python (about 30 MB) ..." >&2
        export UV_PYTHON_INSTALL_DIR="$root/.app/python" UV_CACHE_DIR="$root/.app/cache/uv"
        "$uv" python install --no-bin --quiet 3.12 >&2 && "$uv" python find --managed-python 3.12 && return 0
        echo "Python could not be fetched; looking for one on this computer." >&2
    done
    return 1
}

if [ -f "$root/.app/python-path" ]; then
    py=$(cat "$root/.app/python-path")
    if suits "$py"; then
        printf '%s\n' "$py"
        exit 0
    fi
fi
if py=$(from_uv) && suits "$py"; then
    printf '%s\n' "$py"
    exit 0
fi
for name in python3 python3.12 python3.13 python3.11 python3.14 python; do
    if suits "$name"; then
        command -v "$name"
        exit 0
    fi
done
echo "Floe Chat needs Python 3.11 to 3.14 with its venv module." >&2
echo "Install it from your system's software (Debian and Ubuntu: sudo apt install python3 python3-venv) and start again." >&2
exit 3
