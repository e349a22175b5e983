{{- define "kvpilot.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" }}
{{- end }}

{{- define "kvpilot.fullname" -}}
{{- if .Values.fullnameOverride }}
{{- .Values.fullnameOverride | trunc 63 | trimSuffix "-" }}
{{- else if contains (include "kvpilot.name" .) .Release.Name }}
{{- .Release.Name | trunc 63 | trimSuffix "-" }}
{{- else }}
{{- printf "%s-%s" .Release.Name (include "kvpilot.name" .) | trunc 63 | trimSuffix "-" }}
{{- end }}
{{- end }}

{{- define "kvpilot.selectorLabels" -}}
app.kubernetes.io/name: {{ include "kvpilot.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/component: operator
{{- end }}

{{- define "kvpilot.labels" -}}
{{ include "kvpilot.selectorLabels" . }}
app.kubernetes.io/part-of: kvpilot
app.kubernetes.io/managed-by: {{ .Release.Service }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{- define "kvpilot.serviceAccountName" -}}
{{- if .Values.serviceAccount.create }}
{{- default (include "kvpilot.fullname" .) .Values.serviceAccount.name }}
{{- else }}
{{- default "default" .Values.serviceAccount.name }}
{{- end }}
{{- end }}

{{- define "kvpilot.secretName" -}}
{{- default (printf "%s-keys" (include "kvpilot.fullname" .)) .Values.secret.existingSecret }}
{{- end }}

{{- define "kvpilot.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end }}

{{- /* All that the operator may do in a namespace that it serves. It writes Secrets and never reads one. */}}
{{- define "kvpilot.rules" -}}
- apiGroups: [kvpilot.io]
  resources: [kvcachedeployments]
  verbs: [get, list, watch]
- apiGroups: [kvpilot.io]
  resources: [kvcachedeployments/status]
  verbs: [update, patch]
- apiGroups: [kvpilot.io] # to own objects where OwnerReferencesPermissionEnforcement is on
  resources: [kvcachedeployments/finalizers]
  verbs: [update]
- apiGroups: [kvpilot.io] # an alert that was verified becomes an override; an expired one is deleted
  resources: [kvcacheoverrides]
  verbs: [get, list, watch, create, patch, delete]
- apiGroups: [kvpilot.io] # whether an override is in force, and why not
  resources: [kvcacheoverrides/status]
  verbs: [update]
- apiGroups: [apps]
  resources: [deployments]
  verbs: [get, create, patch]
- apiGroups: [apps]
  resources: [deployments/scale]
  verbs: [patch]
- apiGroups: [""]
  resources: [configmaps]
  verbs: [get, create, patch]
- apiGroups: [""]
  resources: [services, serviceaccounts] # get: an object of that name with another owner is left alone
  verbs: [get, list, watch, create, patch]
- apiGroups: [""]
  resources: [secrets]
  verbs: [create, patch]
- apiGroups: [policy]
  resources: [poddisruptionbudgets]
  verbs: [get, list, watch, create, patch]
- apiGroups: [autoscaling] # one that also scales the engines is reported
  resources: [horizontalpodautoscalers]
  verbs: [list]
- apiGroups: [""]
  resources: [pods] # the coldest goes first at a scale-in; an outlier is replaced where the resource allows it
  verbs: [get, list, watch, patch, delete]
- apiGroups: [events.k8s.io]
  resources: [events]
  verbs: [create]
{{- end }}
