{{- define "acousticsense.fullname" -}}
{{- if .Values.fullnameOverride }}{{ .Values.fullnameOverride | trunc 40 | trimSuffix "-" }}
{{- else if contains (default .Chart.Name .Values.nameOverride) .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name (default .Chart.Name .Values.nameOverride) | trunc 40 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "acousticsense.selector" -}}
app.kubernetes.io/name: {{ default .Chart.Name .Values.nameOverride }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "acousticsense.labels" -}}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{ include "acousticsense.selector" . }}
{{- end }}

{{- define "acousticsense.image" -}}
{{ .root.Values.image.registry }}/{{ .name }}:{{ default .root.Chart.AppVersion .root.Values.image.tag }}
{{- end }}

{{/* What a model's bundle is to the pod: MODEL_URL, the volumes and the init container. */}}
{{- define "acousticsense.modelPath" -}}
{{- $source := .source -}}
{{- if $source.embedded }}/app/models/default
{{- else if $source.url }}/models/{{ .digest | trunc 16 }}
{{- else if $source.claim }}/models/{{ $source.claim.path | default "" | trimPrefix "/" }}
{{- else }}/models/{{ $source.image.path | default "" | trimPrefix "/" }}
{{- end }}
{{- end }}

{{- define "acousticsense.modelVolumes" -}}
- name: chart-files
  configMap:
    name: {{ include "acousticsense.fullname" .root }}-files
{{- with .model.source }}
{{- if .url }}
- name: models
  emptyDir: { sizeLimit: {{ .sizeLimit | default "8Gi" | quote }} }
{{- else if .claim }}
- name: models
  persistentVolumeClaim: { claimName: {{ .claim.name | quote }}, readOnly: true }
{{- else if .image }}
- name: models
  image: { reference: {{ .image.reference | quote }}, pullPolicy: IfNotPresent }
{{- end }}
{{- end }}
{{- end }}

{{- define "acousticsense.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities: { drop: [ALL] }
{{- end }}

{{/*
One Deployment. Takes: root, component (of labels), name, image, settings (of values), env (a map, which wins over env
of the values), secrets (list of groups), model (or none), port, volumes: [{ name, path, size }], extraLabels, seccomp,
replicas (0: left to the autoscaler), surge, files (of the bundle: all or manifest), affinityKey.
*/}}
{{- define "acousticsense.deployment" -}}
{{- $root := .root -}}
{{- $component := .component -}}
{{- $labels := merge (dict "app.kubernetes.io/component" $component) (default dict .extraLabels) -}}
{{- $env := merge (dict) .env (default dict .settings.env) (default dict $root.Values.env) -}}
{{- $port := default 9100 .port | int -}}
{{- $drain := $root.Values.drainSeconds | int -}}
apiVersion: apps/v1
kind: Deployment
metadata:
  name: {{ .name }}
  namespace: {{ $root.Release.Namespace }}
  labels:
    {{- include "acousticsense.labels" $root | nindent 4 }}
    {{- toYaml $labels | nindent 4 }}
spec:
  {{- if .replicas }}
  replicas: {{ .replicas }}
  {{- end }}
  revisionHistoryLimit: 3
  # Loading a model takes its time, readiness says when it is over.
  progressDeadlineSeconds: 900
  strategy:
    type: RollingUpdate
    rollingUpdate:
      {{- if .surge }}
      maxSurge: {{ .surge }}
      maxUnavailable: 0
      {{- else }}
      maxSurge: 0
      maxUnavailable: 1
      {{- end }}
  selector:
    matchLabels:
      {{- include "acousticsense.selector" $root | nindent 6 }}
      {{- toYaml $labels | nindent 6 }}
  template:
    metadata:
      labels:
        {{- include "acousticsense.labels" $root | nindent 8 }}
        {{- toYaml $labels | nindent 8 }}
      {{- if .model }}
      annotations:
        acousticsense.io/model: {{ .model.name | quote }}
        acousticsense.io/files: {{ $root.Files.Get "files/fetch-model.mjs" | sha256sum | trunc 16 | quote }}
      {{- end }}
    spec:
      serviceAccountName: {{ include "acousticsense.fullname" $root }}
      automountServiceAccountToken: false
      enableServiceLinks: false
      # What runs may end within DRAIN_SECONDS, 5 s are for giving back, 5 s for preStop.
      terminationGracePeriodSeconds: {{ add $drain 15 }}
      {{- with $root.Values.image.pullSecrets }}
      imagePullSecrets:
        {{- range . }}
        - name: {{ . }}
        {{- end }}
      {{- end }}
      securityContext:
        runAsNonRoot: true
        runAsUser: 10001
        runAsGroup: 10001
        fsGroup: 10001
        fsGroupChangePolicy: OnRootMismatch
        seccompProfile: { type: RuntimeDefault }
      {{- with .settings.nodeSelector }}
      nodeSelector:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      {{- with .settings.tolerations }}
      tolerations:
        {{- toYaml . | nindent 8 }}
      {{- end }}
      topologySpreadConstraints:
        {{- range list "topology.kubernetes.io/zone" "kubernetes.io/hostname" }}
        - maxSkew: 1
          topologyKey: {{ . }}
          whenUnsatisfiable: ScheduleAnyway
          labelSelector:
            matchLabels:
              {{- include "acousticsense.selector" $root | nindent 14 }}
              {{- toYaml $labels | nindent 14 }}
          matchLabelKeys: [pod-template-hash]
        {{- end }}
      {{- with .model }}
      initContainers:
        # The bundle that this Deployment is named after, or the pod does not start.
        - name: model
          image: {{ include "acousticsense.image" (dict "root" $root "name" $.image) }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          command: [node, --import=/app/deploy/images/given-files.mjs, /chart/fetch-model.mjs]
          env:
            - { name: MODEL_DIGEST, value: {{ .digest | quote }} }
            {{- if .source.url }}
            - { name: MODEL_SOURCE, value: {{ .source.url | quote }} }
            - { name: MODEL_TARGET, value: {{ include "acousticsense.modelPath" . | quote }} }
            - { name: MODEL_FILES, value: {{ $.files }} }
            {{- else }}
            - { name: MODEL_SOURCE, value: {{ printf "file://%s" (include "acousticsense.modelPath" .) | quote }} }
            {{- end }}
          securityContext:
            {{- include "acousticsense.containerSecurity" $root | nindent 12 }}
          resources:
            requests: { cpu: 100m, memory: 128Mi }
            limits: { memory: 512Mi }
          volumeMounts:
            - { name: chart-files, mountPath: /chart, readOnly: true }
            {{- if not .source.embedded }}
            - { name: models, mountPath: /models{{ if not .source.url }}, readOnly: true{{ end }} }
            {{- end }}
            {{- if and .source.url $root.Values.secrets.storage }}
            - { name: secrets-storage, mountPath: /run/secrets/storage, readOnly: true }
            {{- end }}
      {{- end }}
      containers:
        - name: {{ $component }}
          image: {{ include "acousticsense.image" (dict "root" $root "name" .image) }}
          imagePullPolicy: {{ $root.Values.image.pullPolicy }}
          ports:
            - { name: {{ ternary "http" "metrics" (eq $port 8000) }}, containerPort: {{ $port }} }
          env:
            {{- range $name, $value := $env }}
            - { name: {{ $name }}, value: {{ $value | toString | quote }} }
            {{- end }}
          # Not up yet: model.json is read, the session is made and proves itself. Then /healthz says that the process
          # lives, /readyz that it can take work; who is not ready is not restarted for it.
          startupProbe:
            httpGet: { path: /healthz, port: {{ $port }} }
            periodSeconds: 5
            timeoutSeconds: 3
            failureThreshold: 120
          livenessProbe:
            httpGet: { path: /healthz, port: {{ $port }} }
            periodSeconds: 15
            timeoutSeconds: 5
            failureThreshold: 4
          readinessProbe:
            httpGet: { path: /readyz, port: {{ $port }} }
            periodSeconds: 5
            timeoutSeconds: 4
            failureThreshold: 2
          {{- if eq $port 8000 }}
          # Until every proxy has heard that it leaves.
          lifecycle: { preStop: { sleep: { seconds: 5 } } }
          {{- end }}
          securityContext:
            {{- include "acousticsense.containerSecurity" $root | nindent 12 }}
            {{- with .seccomp }}
            seccompProfile: { type: Localhost, localhostProfile: {{ . | quote }} }
            {{- end }}
          resources:
            {{- toYaml .settings.resources | nindent 12 }}
          volumeMounts:
            - { name: tmp, mountPath: /tmp }
            {{- range .volumes }}
            - { name: {{ .name }}, mountPath: {{ .path }} }
            {{- end }}
            {{- if and .model (not .model.source.embedded) }}
            - { name: models, mountPath: /models, readOnly: true }
            {{- end }}
            {{- range .secrets }}
            {{- if index $root.Values.secrets . }}
            - { name: secrets-{{ . }}, mountPath: /run/secrets/{{ . }}, readOnly: true }
            {{- end }}
            {{- end }}
      volumes:
        - name: tmp
          emptyDir: { sizeLimit: 1Gi }
        {{- range .volumes }}
        - name: {{ .name }}
          emptyDir: { sizeLimit: {{ .size | quote }} }
        {{- end }}
        {{- if .model }}
        {{- include "acousticsense.modelVolumes" (dict "root" $root "model" .model) | nindent 8 }}
        {{- end }}
        {{- range .secrets }}
        {{- if index $root.Values.secrets . }}
        - name: secrets-{{ . }}
          secret: { secretName: {{ index $root.Values.secrets . | quote }}, defaultMode: 288 } # 0440
        {{- end }}
        {{- end }}
{{- end }}

{{- define "acousticsense.variantsOf" -}}
{{- $names := list -}}
{{- range $name, $variant := .root.Values.inference.variants -}}
{{- if and $variant.enabled (or (empty $.model.variants) (has $name $.model.variants)) -}}
{{- $names = append $names $name -}}
{{- end -}}
{{- end -}}
{{- $names | toJson -}}
{{- end }}

{{/* One model for each profile that is decoded for: the serving one, if it has it, else the first. */}}
{{- define "acousticsense.profiles" -}}
{{- $profiles := dict -}}
{{- range .Values.models -}}
{{- if or (not (hasKey $profiles .profileHash)) (eq .state "serving") -}}
{{- $_ := set $profiles .profileHash . -}}
{{- end -}}
{{- end -}}
{{- $profiles | toJson -}}
{{- end }}
