#!/bin/sh
# Builds the decoder's ffmpeg and ffprobe: audio only, from the source package of the Debian release that it runs on,
# with Debian's patches and hardening flags. What is in it stands in ffmpeg-formats.txt beside this script.
#
#   build-ffmpeg.sh OUT     as root on Debian; writes OUT/ffmpeg, OUT/ffprobe and OUT/VERSION
#
# Needs the network for Debian's packages only. At run time the two need libc, libm and libsoxr0 (with libgomp1).
set -eu
out=$1
formats=$(dirname "$(readlink -f "$0")")/ffmpeg-formats.txt

export DEBIAN_FRONTEND=noninteractive
# Source packages lie where the binary ones do; Debian's two ways of naming the place.
if [ -f /etc/apt/sources.list.d/debian.sources ]; then
  sed -i 's/^Types: deb$/Types: deb deb-src/' /etc/apt/sources.list.d/debian.sources
elif ! grep -q '^deb-src ' /etc/apt/sources.list; then
  sed -n 's/^deb /deb-src /p' /etc/apt/sources.list > /etc/apt/sources.list.d/sources-of-sources.list
fi
apt-get -q update
apt-get -q -y install --no-install-recommends build-essential dpkg-dev libsoxr-dev nasm pkg-config

work=$(mktemp -d)
cd "$work"
# As root apt-get would drop to _apt, which may not write here.
apt-get -q -o APT::Sandbox::User=root source ffmpeg
version=$(dpkg-parsechangelog -l ffmpeg-*/debian/changelog -S Version)
cd ffmpeg-*/

parts=$(awk '!/^#/ && NF { for (i = 2; i <= NF; i++) print ($1 == "library" ? "--enable-" $i : "--enable-" $1 "=" $i) }' "$formats")
# shellcheck disable=SC2086 # one word a part
./configure \
  --prefix=/usr --extra-version="${version#*:}-audio" \
  --disable-everything --disable-autodetect --disable-network --disable-doc --disable-debug --disable-ffplay \
  --disable-avdevice --disable-swscale --disable-postproc --enable-swresample \
  --disable-shared --enable-static --toolchain=hardened \
  --extra-cflags="$(dpkg-buildflags --get CFLAGS | sed 's/-g //; s/-ffile-prefix-map=[^ ]*//')" \
  --extra-ldflags="$(dpkg-buildflags --get LDFLAGS)" \
  $parts
make -j"$(nproc)" ffmpeg ffprobe
mkdir -p "$out"
strip --strip-all -o "$out/ffmpeg" ffmpeg
strip --strip-all -o "$out/ffprobe" ffprobe
printf '%s\n' "$version" > "$out/VERSION"
cd /
rm -rf "$work"
