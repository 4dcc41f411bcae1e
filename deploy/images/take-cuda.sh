#!/bin/sh
# Takes ONNX Runtime's CUDA provider and the libraries that it loads out of Python wheels.
#
#   take-cuda.sh BUILD OUT    BUILD holds package-lock.json and cuda-requirements.txt;
#                             writes OUT/provider (beside onnxruntime_binding.node) and OUT/cuda (on the loader's path)
#
# The provider must be of the very release of onnxruntime-node: the two halves talk through an interface that changes
# with every release.
set -eu
build=$1 out=$2
if [ -s /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi

release=$(python3 -c 'import json, sys
print(json.load(open(sys.argv[1]))["packages"]["node_modules/onnxruntime-node"]["version"])' "$build/package-lock.json")
work=$(mktemp -d)
pip download --quiet --no-cache-dir --no-deps --only-binary=:all: -d "$work" \
  "onnxruntime-gpu==$release" -r "$build/cuda-requirements.txt"

mkdir -p "$out/provider" "$out/cuda"
unzip -q -j "$work"/onnxruntime_gpu-*.whl 'onnxruntime/capi/libonnxruntime_providers_shared.so' \
  'onnxruntime/capi/libonnxruntime_providers_cuda.so' -d "$out/provider"
for wheel in "$work"/nvidia_*.whl; do
  unzip -q -j -o "$wheel" '*/lib/*.so*' -d "$out/cuda"
  # Their licences go with them.
  unzip -q -o "$wheel" '*.dist-info/*' -x '*/RECORD' -d "$out/cuda/licences" || true
done
# Names that only a linker wants, and stubs: the real ones are the numbered ones.
find "$out/cuda" -maxdepth 1 -name '*.alt.so*' -delete
printf '%s\n' "$release" > "$out/provider/CUDA_PROVIDER_RELEASE"
rm -rf "$work"
