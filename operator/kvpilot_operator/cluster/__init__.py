"""The operator process in a Kubernetes cluster: Kopf handlers, alerts, metrics, logs."""
