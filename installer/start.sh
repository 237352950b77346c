#!/bin/sh
# Starts Floe Chat: finds a Python and hands over to bootstrap.py, which does everything else.
# Options: --repair --uninstall --cpu --offline --port N --data DIR --lan --no-browser
set -u
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 3

if py=$(sh "$here/python.sh"); then
    exec "$py" -I "$here/bootstrap.py" "$@"
fi
if [ -t 0 ]; then
    printf 'Press Enter to close this window. '
    read -r _
fi
exit 3
