#!/bin/bash
# Stands in for Apptainer, which Debian and PyPI do not have: `exec` of an image that is a folder, as root. The image has
# what its file `paths` names of this machine, to be read; beside that there is what --bind says, and what Apptainer
# binds by itself where nobody has forbidden it: /proc, /dev, /sys and /etc/hosts.
set -eu
echo "$@" >> "$0.asked"
[ "$1" = exec ]
shift
binds=()
while :; do
  case $1 in
    --env) export "$2"; shift ;;
    --bind) binds+=("$2"); shift ;;
    --nv) ;;
    *) break ;;
  esac
  shift
done
image=$1
shift
export APPTAINER_CONTAINER=$image
exec unshare --mount -- bash -c '
set -eu
image=$1 number=$2
shift 2
binds=("${@:1:number}")
shift "$number"
mount -t tmpfs tmpfs /mnt
for link in /bin /sbin /lib /lib64; do cp -a "$link" /mnt; done
for path in $(cat "$image/paths"); do
  mkdir -p "/mnt$path"
  mount --bind -o ro "$path" "/mnt$path"
done
for bind in /proc /dev /sys /etc/hosts "${binds[@]}"; do
  IFS=: read -r from to _ <<< "$bind"
  [ -f "$from" ] || mkdir -p "/mnt${to:-$from}"
  mount --rbind "$from" "/mnt${to:-$from}"
done
mount -o remount,ro /mnt
exec chroot /mnt "$@"
' apptainer "$image" "${#binds[@]}" "${binds[@]}" "$@"
