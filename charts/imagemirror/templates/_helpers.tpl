{{/* The chart's name, or nameOverride. */}}
{{- define "imagemirror.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{/* The name of every object: the release's, with the chart's where that is not in it already. */}}
{{- define "imagemirror.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- $name := include "imagemirror.name" . -}}
{{- if contains $name .Release.Name -}}
{{- .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name $name | trunc 63 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}
{{- end -}}

{{/* Where everything is that is in a namespace. */}}
{{- define "imagemirror.namespace" -}}
{{- default .Release.Namespace .Values.namespaceOverride -}}
{{- end -}}

{{/* The name of the metrics Service, cut so that it still fits. */}}
{{- define "imagemirror.metricsName" -}}
{{- printf "%s-metrics" (include "imagemirror.fullname" . | trunc 55 | trimSuffix "-") -}}
{{- end -}}

{{/* Cluster-scoped objects carry the namespace, so that two releases of one name do not meet. */}}
{{- define "imagemirror.clusterName" -}}
{{- printf "%s:%s" (include "imagemirror.namespace" .) (include "imagemirror.fullname" .) -}}
{{- end -}}

{{- define "imagemirror.selectorLabels" -}}
app.kubernetes.io/name: {{ include "imagemirror.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{/* Those of the pod of `helm test`, which no selector of the chart finds. */}}
{{- define "imagemirror.testLabels" -}}
app.kubernetes.io/name: {{ printf "%s-test" (include "imagemirror.name" . | trunc 58 | trimSuffix "-") }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "imagemirror.testName" -}}
{{- printf "%s-test" (include "imagemirror.fullname" . | trunc 58 | trimSuffix "-") -}}
{{- end -}}

{{/* commonLabels come last, and cannot replace the labels of the chart. */}}
{{- define "imagemirror.labels" -}}
{{- $own := dict
  "helm.sh/chart" (printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-")
  "app.kubernetes.io/name" (include "imagemirror.name" .)
  "app.kubernetes.io/instance" .Release.Name
  "app.kubernetes.io/version" (.Chart.AppVersion | replace "+" "_")
  "app.kubernetes.io/managed-by" .Release.Service -}}
{{- merge $own (deepCopy .Values.commonLabels) | toYaml -}}
{{- end -}}

{{- define "imagemirror.serviceAccountName" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "imagemirror.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{/* global.imageRegistry takes the place of a registry that the repository begins with. */}}
{{- define "imagemirror.image" -}}
{{- $repository := .Values.image.repository -}}
{{- with .Values.global.imageRegistry -}}
{{- $repository = printf "%s/%s" . (regexReplaceAll "^([^/]*[.:][^/]*|localhost)/" $repository "") -}}
{{- end -}}
{{- if .Values.image.digest -}}
{{- printf "%s@%s" $repository .Values.image.digest -}}
{{- else -}}
{{- printf "%s:%s" $repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end -}}
{{- end -}}

{{- define "imagemirror.imagePullSecrets" -}}
{{- with concat .Values.imagePullSecrets (.Values.global.imagePullSecrets | default list) | uniq -}}
imagePullSecrets:
{{ toYaml . }}
{{- end -}}
{{- end -}}

{{/* The operator's configuration: config, and what has values of its own because roles and mounts follow it. */}}
{{- define "imagemirror.config" -}}
{{- $config := deepCopy .Values.config -}}
{{- $_ := set $config "log" (dict "format" .Values.logFormat "level" .Values.logLevel) -}}
{{- with .Values.identityNamespaces -}}
{{- $_ := set $config "identityNamespaces" . -}}
{{- end -}}
{{- with .Values.watchNamespaces -}}
{{- $_ := set $config "watchNamespaces" . -}}
{{- end -}}
{{- if .Values.secrets.watch -}}
{{- $_ := set $config "secrets" (dict "watch" true) -}}
{{- end -}}
{{- if or .Values.caBundle.configMap .Values.caBundle.secret -}}
{{- $_ := set $config "caFile" (printf "/etc/imagemirror/ca-bundle/%s" .Values.caBundle.key) -}}
{{- end -}}
{{- with .Values.metrics.secure -}}
{{- if .enabled -}}
{{- $files := "/etc/imagemirror/metrics-tls" -}}
{{- $_ := set $config "metrics" (dict "certFile" (printf "%s/tls.crt" $files) "keyFile" (printf "%s/tls.key" $files) "authentication" .authentication) -}}
{{- end -}}
{{- end -}}
{{- toYaml $config -}}
{{- end -}}

{{/* The address with this port: IPv6 addresses want brackets before it. */}}
{{- define "imagemirror.listen" -}}
{{- $host := .root.Values.metrics.bindAddress -}}
{{- if contains ":" $host -}}{{- $host = printf "[%s]" $host -}}{{- end -}}
{{- printf "%s:%d" $host (int .port) -}}
{{- end -}}

{{/* A network, also where an address alone stands for itself. */}}
{{- define "imagemirror.cidr" -}}
{{- if contains "/" . -}}{{ . }}{{- else if contains ":" . -}}{{ . }}/128{{- else -}}{{ . }}/32{{- end -}}
{{- end -}}

{{/* What the operator does with ImageMirrors, in the whole cluster or in one namespace. */}}
{{- define "imagemirror.mirrorRules" -}}
# The objects themselves. The operator never creates, changes or deletes one.
- apiGroups: [imagemirror.dev]
  resources: [imagemirrors]
  verbs: [get, list, watch]
# Their status, by server-side apply and nothing else.
- apiGroups: [imagemirror.dev]
  resources: [imagemirrors/status]
  verbs: [patch]
# Registry credentials and CA certificates, one by one and by name, in the object's own namespace. No list, no watch.
- apiGroups: [""]
  resources: [secrets]
  verbs: [get]
# The imagePullSecrets and the annotations of spec.serviceAccountName.
- apiGroups: [""]
  resources: [serviceaccounts]
  verbs: [get]
# One event per transition; patch counts a repeated one up.
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create, patch]
{{- end -}}

{{/* Beside them, where the administrator has switched it on. */}}
{{- define "imagemirror.moreRules" -}}
{{- if .Values.serviceAccountTokens.create }}
# serviceAccountTokens.create: tokens for clouds, for the ServiceAccount of an ImageMirror with a provider.
- apiGroups: [""]
  resources: [serviceaccounts/token]
  verbs: [create]
{{- end }}
{{- if .Values.secrets.watch }}
# secrets.watch: the metadata of all Secrets. RBAC cannot tell that from their content.
- apiGroups: [""]
  resources: [secrets]
  verbs: [list, watch]
{{- end }}
{{- end -}}

{{/* Whether to create an object for the Prometheus operator: .of is its value. */}}
{{- define "imagemirror.isForPrometheus" -}}
{{- if and .of.enabled (or .of.force (.root.Capabilities.APIVersions.Has "monitoring.coreos.com/v1")) }}true{{ end -}}
{{- end -}}
