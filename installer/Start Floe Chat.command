#!/bin/sh
# Double-click on macOS. Apple computers run the CPU path only: good for a look, not for speed.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 3
if [ -f "$here/installer/start.sh" ]; then here=$here/installer; fi
exec sh "$here/start.sh" "$@"
