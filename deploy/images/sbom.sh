#!/bin/sh
# The bill of materials of finished images, one folder an image: what stands in it, for audits and scanners.
#
#   deploy/images/sbom.sh OUT IMAGE...     e.g. deploy/images/sbom.sh sbom acousticsense/decoder:0.1.0
#
#   OUT/NAME/debian.tsv      Debian's packages: name, version, architecture, source package
#   OUT/NAME/npm.cdx.json    npm packages that really lie in the image, CycloneDX 1.5
#   OUT/NAME/python.txt      Python's, where there is one
#   OUT/NAME/built.txt       what was built here or copied: Node, ffmpeg, ONNX Runtime's providers, with their SHA-256
#   OUT/NAME/image.json      the image's labels, digest, layers and size
#
# Nothing is installed into the images and no network is used.
set -eu
[ $# -ge 2 ] || { echo "Usage: $0 OUT IMAGE..." >&2; exit 2; }
out=$1
shift

# Runs inside the image, where packages are: the lockfile would also name what was pruned.
npm_packages='
const { readdirSync, readFileSync, existsSync } = require("node:fs");
const components = [];
const visit = (directory) => {
  if (!existsSync(directory)) return;
  for (const name of readdirSync(directory)) {
    const at = `${directory}/${name}`;
    if (name.startsWith("@")) { visit(at); continue; }
    if (name.startsWith(".") || !existsSync(`${at}/package.json`)) continue;
    const { name: own, version, license } = JSON.parse(readFileSync(`${at}/package.json`, "utf8"));
    const id = typeof license === "string" ? license : license?.type;
    if (own && version && !own.startsWith("@acousticsense/")) components.push({
      type: "library", name: own, version, purl: `pkg:npm/${own.replace("@", "%40")}@${version}`,
      ...(id ? { licenses: [/ /.test(id) ? { expression: id } : { license: { name: id } }] } : {}),
    });
    visit(`${at}/node_modules`);
  }
};
for (const root of ["/app", "/app/packages/shared", "/app/packages/egress", ...(existsSync("/app/services") ? readdirSync("/app/services").map((s) => `/app/services/${s}`) : [])]) visit(`${root}/node_modules`);
components.sort((a, b) => (a.purl < b.purl ? -1 : 1));
console.log(JSON.stringify({ bomFormat: "CycloneDX", specVersion: "1.5", version: 1, components }, null, 1));
'

for image; do
  name=$(basename "${image%%[:@]*}")
  place=$out/$name
  mkdir -p "$place"
  run() { program=$1; shift; docker run --rm --network none --read-only --entrypoint "$program" "$image" "$@"; }
  run dpkg-query -W -f '${Package}\t${Version}\t${Architecture}\t${source:Package}\n' >"$place/debian.tsv"
  if run sh -c 'command -v node >/dev/null'; then
    run node -e "$npm_packages" >"$place/npm.cdx.json"
  fi
  if run sh -c 'test -x /opt/python/bin/pip'; then
    run /opt/python/bin/pip list --format=freeze --disable-pip-version-check >"$place/python.txt"
  fi
  run sh -c '
    if command -v node >/dev/null; then echo "node $(node --version)"; fi
    if command -v ffmpeg >/dev/null; then echo "ffmpeg of source package $(cat /usr/local/share/doc/ffmpeg-audio/VERSION)"; fi
    for file in /usr/local/bin/node /usr/local/bin/ff* /app/node_modules/onnxruntime-node/bin/napi-v6/linux/*/*.so* /usr/local/lib/cuda/*.so*; do
      if [ -f "$file" ]; then sha256sum "$file"; fi
    done' >"$place/built.txt"
  docker image inspect "$image" --format '{"id":{{json .Id}},"size":{{.Size}},"created":{{json .Created}},"labels":{{json .Config.Labels}},"layers":{{json .RootFS.Layers}}}' >"$place/image.json"
  echo "$place: $(wc -l <"$place/debian.tsv") Debian packages, $(grep -c '"purl"' "$place/npm.cdx.json" 2>/dev/null || echo 0) npm packages"
done
