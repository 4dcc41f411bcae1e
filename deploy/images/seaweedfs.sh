#!/bin/sh
# Makes the S3 store of docker-compose.yml out of its Go module, for sites that reach a Go proxy and no registry with
# its image. Needs Go 1.26 or later; takes five minutes on two cores and up to 6 GB of Go's caches.
#
#   deploy/images/seaweedfs.sh [IMAGE]     default: the name that docker-compose.yml uses
set -eu
image=${1:-$(sed -n 's/^ *image: \(.*seaweedfs.*\)/\1/p' "$(dirname "$0")/../../docker-compose.yml")}
# Its releases are not numbered as Go wants them; this commit calls itself 4.53.
module=github.com/seaweedfs/seaweedfs@v0.0.0-20261109003541-7506e5f91cd6

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# Its go.mod replaces a module, which `go install` refuses: it is built where it lies.
source=$(cd "$work" && go mod download -json "$module" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p')
(cd "$source" && CGO_ENABLED=0 go build -trimpath -ldflags='-s -w' -o "$work/weed" ./weed)
cat >"$work/Dockerfile" <<'EOF'
ARG DEBIAN_IMAGE=debian:bookworm-slim
FROM ${DEBIAN_IMAGE}
RUN apt-get -q update && DEBIAN_FRONTEND=noninteractive apt-get -q -y install --no-install-recommends ca-certificates wget \
  && rm -rf /var/lib/apt/lists/*
COPY weed /usr/local/bin/weed
ENTRYPOINT ["weed"]
EOF
DOCKER_BUILDKIT=1 docker build -q -t "$image" ${DEBIAN_IMAGE:+--build-arg DEBIAN_IMAGE="$DEBIAN_IMAGE"} "$work" >/dev/null
echo "$image: made from $module"
