#!/bin/sh
# The programs that check what lies in deploy/, and the schemas that they check it by, of fixed versions:
#
#   tools.sh [DIRECTORY]     default: ~/.cache/acousticsense/deploy-tools; what is there already is not made again
#
# Needs Go and the project's npm packages; promtool comes out of Debian's package `prometheus`, which is not installed. Tests that need one of them say
# so and are skipped without it (deploy/*.test.ts); ACOUSTICSENSE_DEPLOY_TOOLS names another directory to them.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
cache=${XDG_CACHE_HOME:-$HOME/.cache}/acousticsense
directory=${1:-$cache/deploy-tools}
helm=v4.3.1
kubeconform=v0.7.0
kubernetes=v1.36.3
keda=v2.21.0
prometheus_operator=v0.85.0
mkdir -p "$directory/bin"
# TypeScript as it is wants the Node that the project brings.
node=$(ls "$here"/../node_modules/node-linux-*/bin/node 2>/dev/null | head -n 1)
: "${node:=node}"

# Each by its version, so that a new one in this file is fetched.
have() { [ -e "$directory/$1" ]; }
done_with() { : > "$directory/$1"; }

if ! have "helm-$helm"; then
  GOBIN=$directory/bin go install "helm.sh/helm/v4/cmd/helm@$helm" && done_with "helm-$helm"
fi
if ! have "kubeconform-$kubeconform"; then
  GOBIN=$directory/bin go install "github.com/yannh/kubeconform/cmd/kubeconform@$kubeconform" && done_with "kubeconform-$kubeconform"
fi
schemas=schemas-$kubernetes-$keda-$prometheus_operator
if ! have "$schemas"; then
  folder() { go mod download -json "$1" | sed -n 's/^\t"Dir": "\(.*\)",$/\1/p'; }
  rm -rf "$directory/schemas"
  "$node" "$here/schemas.ts" "$directory/schemas" \
    "$(folder "k8s.io/kubernetes@$kubernetes")/api/openapi-spec/swagger.json" \
    "$(folder "github.com/kedacore/keda/v2@$keda")/config/crd/bases/keda.sh_scaledobjects.yaml" \
    "$(folder "github.com/prometheus-operator/prometheus-operator@$prometheus_operator")/example/prometheus-operator-crd/monitoring.coreos.com_servicemonitors.yaml" \
    "$(folder "github.com/prometheus-operator/prometheus-operator@$prometheus_operator")/example/prometheus-operator-crd/monitoring.coreos.com_prometheusrules.yaml"
  done_with "$schemas"
fi
if ! have promtool && command -v promtool >/dev/null; then
  ln -sf "$(command -v promtool)" "$directory/bin/promtool" && done_with promtool
elif ! have promtool && command -v apt-get >/dev/null; then
  work=$(mktemp -d)
  (cd "$work" && apt-get -q download prometheus >/dev/null && dpkg-deb -x prometheus_*.deb . && cp usr/bin/promtool "$directory/bin/") && done_with promtool
  rm -rf "$work"
fi
