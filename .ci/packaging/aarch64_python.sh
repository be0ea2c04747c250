#!/usr/bin/env bash
# Unpacks this Debian's Python for aarch64 into a new directory, to be run by qemu-user. It keeps lists and packages of
# its own there, so that neither root nor a change of the system is needed.
#
#     .ci/packaging/aarch64_python.sh DIRECTORY
set -euo pipefail

root=$(realpath -m "$1")
state="$root/apt"
mkdir -p "$state/lists/partial" "$state/archives/partial"
touch "$state/status"
options=(
    -qq -o APT::Architecture=arm64 -o APT::Architectures=arm64 -o APT::Install-Recommends=false
    -o APT::Sandbox::User=root -o Dir::State="$state" -o Dir::State::status="$state/status" -o Dir::Cache="$state"
)
apt-get "${options[@]}" update
apt-get "${options[@]}" --yes --download-only install python3-minimal libpython3-stdlib libstdc++6
for package in "$state"/archives/*.deb; do
    dpkg-deb --extract "$package" "$root"
done
rm -r "$state"
