#!/bin/sh
# Puts Floe Chat into the menu of a Linux desktop (or into the folder given). --remove takes it out again.
set -eu
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
installer=$(dirname -- "$here")
root=$(dirname -- "$installer")
if [ "${1:-}" = --remove ]; then
    rm -f "${XDG_DATA_HOME:-$HOME/.local/share}/applications/floechat.desktop"
    exit 0
fi
folder=${1:-${XDG_DATA_HOME:-$HOME/.local/share}/applications}
mkdir -p "$folder"

# Inside the quotes of Exec, the four characters " ` $ \ are written with a backslash, which is itself written twice in
# a desktop file; and % is doubled.
quoted=$(printf '%s' "$installer/start.sh" | sed -e 's/[\\"`$]/\\&/g' -e 's/\\/\\\\/g' -e 's/%/%%/g')
icon=$(printf '%s' "$root/assets/icons/floechat.png" | sed -e 's/\\/\\\\/g')

while IFS= read -r line; do
    case $line in
        Exec=*) printf 'Exec=sh "%s"\n' "$quoted" ;;
        Icon=*) printf 'Icon=%s\n' "$icon" ;;
        *) printf '%s\n' "$line" ;;
    esac
done < "$here/floechat.desktop.in" > "$folder/floechat.desktop"
chmod +x "$folder/floechat.desktop"
echo "Floe Chat is in the menu: $folder/floechat.desktop"
