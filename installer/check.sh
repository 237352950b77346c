#!/bin/sh
# Runs every test in an environment of its own. --quick leaves the slow ones out; what follows goes to pytest.
set -u
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 3

py=$(sh "$here/python.sh") || exit 3
exec "$py" -I "$here/check.py" "$@"
