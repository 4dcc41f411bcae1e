#!/bin/sh
# Builds the images.
#
#   deploy/images/build.sh                   all but model-tools and inference-gpu (gigabytes each)
#   deploy/images/build.sh decoder webhook   those
#   deploy/images/build.sh ffmpeg DIR        the decoder's ffmpeg and ffprobe alone, into DIR
#
#   REGISTRY=registry.example.org/music      goes before the names; default: acousticsense
#   VERSION=1.2.3                            default: package.json's
#   CA_CERTIFICATES=/etc/ssl/certs/ca-certificates.crt   for networks whose proxy signs TLS itself
#   DEBIAN_IMAGE=... NODE_IMAGE=...          other names, or digests, of the base images
set -eu
cd "$(dirname "$0")/../.."
registry=${REGISTRY:-acousticsense}
version=${VERSION:-$(sed -n 's/^ *"version": "\(.*\)".*/\1/p' package.json | head -n 1)}
revision=$(git rev-parse HEAD 2>/dev/null || echo unknown)

build() { # TARGET [OPTION...]
  target=$1
  shift
  DOCKER_BUILDKIT=1 docker build -f deploy/images/Dockerfile --target "$target" \
    --build-arg VERSION="$version" --build-arg REVISION="$revision" \
    ${DEBIAN_IMAGE:+--build-arg DEBIAN_IMAGE="$DEBIAN_IMAGE"} ${NODE_IMAGE:+--build-arg NODE_IMAGE="$NODE_IMAGE"} \
    ${CA_CERTIFICATES:+--secret id=ca,src="$CA_CERTIFICATES"} "$@" .
}

if [ "${1:-}" = ffmpeg ]; then
  [ $# -eq 2 ] || { echo "Usage: $0 ffmpeg DIRECTORY" >&2; exit 2; }
  build ffmpeg-out --output "$2"
  exit
fi
[ $# -gt 0 ] || set -- api fetch feeder decoder webhook inference-cpu
for target; do
  build "$target" -t "$registry/$target:$version"
  docker image inspect "$registry/$target:$version" --format "$registry/$target:$version {{.Size}}" |
    awk '{ printf "%s: %.0f MB\n", $1, $2 / 1e6 }'
done
