#!/bin/sh
# Installs into the present directory what one service needs to run: the packages of the lockfile that it and the
# shared ones name, without install scripts, without what only other machines or developers use.
#
#   install-service.sh SERVICE      the manifests (package.json, lockfile, workspaces') lie here already
set -eu
service=$1

# The CUDA download of onnxruntime-node's script comes from outside the registry; scripts are off, this says it twice.
export ONNXRUNTIME_NODE_INSTALL=skip
npm ci --omit=dev --ignore-scripts --no-audit --no-fund --cache "$(mktemp -d)" \
  --workspace "services/$service" --workspace packages/shared --workspace packages/egress

# The root's pinned Node: the image has one.
rm -rf node_modules/node-linux-*
# ONNX Runtime comes for every platform at once.
arch=$(node -p process.arch)
if [ -d node_modules/onnxruntime-node ]; then
  find node_modules/onnxruntime-node/bin/napi-v6 -mindepth 2 -maxdepth 2 ! -path "*/linux/$arch" -exec rm -rf {} +
fi
# Types, source maps and packages' own tests and pages: nothing that runs. Licences stay.
find node_modules -type f \( -name '*.d.ts' -o -name '*.d.mts' -o -name '*.d.cts' -o -name '*.map' \) -delete
rm -rf node_modules/fluent-ffmpeg/doc node_modules/fluent-ffmpeg/test node_modules/bintrees/test node_modules/zod/src
# Links of workspaces that are not in this image.
find node_modules/@acousticsense -type l ! -name shared ! -name egress -delete
find packages services -mindepth 1 -maxdepth 1 ! -path packages/shared ! -path packages/egress ! -path "services/$service" -exec rm -rf {} +
