#!/bin/sh
# In the finished GPU image: is the CUDA provider of onnxruntime-node's own release, and is everything here that it
# links, the driver aside? Both would otherwise show only on a machine with a GPU.
set -eu
place=/app/node_modules/onnxruntime-node
release=$(node -p "require('$place/package.json').version")
given=$(cat "$place/bin/napi-v6/linux/x64/CUDA_PROVIDER_RELEASE")
if [ "$release" != "$given" ]; then
  echo "The CUDA provider is of ONNX Runtime $given, onnxruntime-node of $release." >&2
  exit 1
fi
missing=$(ldd "$place/bin/napi-v6/linux/x64/libonnxruntime_providers_cuda.so" | awk '/not found/ { print $1 }' | grep -v '^libcuda\.so\.1$' || true)
for library in libcudnn.so.9 libcufft.so.12 libnvrtc.so.13; do
  ldconfig -p | grep -q "$library" || missing="$missing $library"
done
if [ -n "$missing" ]; then
  echo "The CUDA provider misses libraries: $missing" >&2
  exit 1
fi
