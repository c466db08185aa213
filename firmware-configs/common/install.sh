#!/bin/sh
# Makes this board ready: packages, an environment of Kedge's own, the user, the files of this kit, the service.
#
#   sudo sh install.sh               on the board; may be run again
#   sudo sh install.sh --root DIR    into the root of an image: files, user and service only, nothing is fetched
#
# Kedge's own wheel is in wheels/; of Python packages nothing is installed but that and what the lock for this release and
# architecture names, each with its hash. pip's settings hold here too: PIP_FIND_LINKS=/media/usb for wheels on a stick.
set -eu
cd "$(dirname "$0")"

fail() {
  echo "install.sh: $1" >&2
  exit 1
}

root=
case "${1-}" in
  "") ;;
  --root) root=$(realpath "${2:?--root needs a folder}") && [ -d "$root" ] || fail "no such folder: ${2}" ;;
  *) fail "unknown argument: $1" ;;
esac
[ "$(id -u)" -eq 0 ] || fail "must be run as root: sudo sh install.sh"

# Lists hold one name a line; # begins a comment.
listed() {
  sed 's/#.*//' "$1"
}

# The list for this release, else that for all.
list_of() {
  if [ -f "$lists/$1" ]; then echo "$lists/$1"; else echo "packages/$1"; fi
}

if [ -z "$root" ]; then
  # shellcheck source=/dev/null
  release=$(. /etc/os-release && echo "$ID-${VERSION_ID-}")
  lists="packages/$release"
  [ -d "$lists" ] || fail "this is $release; the kit holds for: $(cd packages && echo */)"
  architecture=$(dpkg --print-architecture)
  lock="$lists/lock-$architecture.txt"
  [ -f "$lock" ] || fail "this is $architecture; the kit holds for: $(cd "$lists" && echo lock-*.txt)"
  echo "packages of $release"
  apt-get update -qq
  # shellcheck disable=SC2046
  DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $(listed "$lists/apt.txt")
  echo "environment in /opt/kedge"
  # shellcheck disable=SC2046
  [ -x /opt/kedge/bin/python ] || python3 -m venv $(listed "$(list_of venv-options.txt)") /opt/kedge
  set -- --quiet --disable-pip-version-check --no-deps --only-binary=:all: --require-hashes
  /opt/kedge/bin/python -m pip install "$@" -r "$lock"
  # Anew each time: another kit's wheel may have the same version.
  /opt/kedge/bin/python -m pip install "$@" --no-index --force-reinstall -r packages/kedge.txt
  /opt/kedge/bin/python -c 'import numpy, sys; import cryptography.hazmat.primitives.ciphers.aead
sys.exit(tuple(map(int, numpy.__version__.split(".")[:2])) < (1, 23))' ||
    fail "numpy 1.23 or newer and cffi are missing; what must come from the board's image stands in $lock"
fi

echo "files"
for top in etc usr; do
  [ -d "$top" ] || continue
  find "$top" -type f | while IFS= read -r file; do
    install -D -m "$(stat -c %a "$file")" "$file" "$root/$file"
  done
done

echo "user and rights"
systemd-sysusers ${root:+--root="$root"} "$root"/etc/sysusers.d/kedge*.conf
systemd-tmpfiles ${root:+--root="$root"} --create "$root"/etc/tmpfiles.d/kedge*.conf

echo "service"
units=$(cd etc/systemd/system && echo *.service)
# shellcheck disable=SC2086
systemctl ${root:+--root="$root"} --quiet --no-reload enable $units
if [ -n "$root" ] || [ ! -d /run/systemd/system ]; then
  echo "no systemd runs here: the service starts with the next boot"
  exit 0
fi
if [ -d etc/udev/rules.d ]; then
  udevadm control --reload
  udevadm trigger
fi
if [ -d etc/modules-load.d ]; then
  systemctl restart systemd-modules-load || echo "install.sh: a module could not be loaded, see README.md" >&2
fi
systemctl daemon-reload
# One that fails tells why itself; the others start all the same.
for unit in $units; do
  systemctl restart "$unit" || echo "install.sh: $unit does not start: systemctl status $unit" >&2
done
echo "ready: systemctl status kedge-agent"
