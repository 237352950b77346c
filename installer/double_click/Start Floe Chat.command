#!/bin/sh
# Double-click on macOS. Apple computers run the CPU path only: good for a look, not for speed.
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd) || exit 3
start=$here/installer/start.sh  # in the download this file stands at the top
[ -f "$start" ] || start=$here/../start.sh
exec sh "$start" "$@"
