// Pins the Alertmanager of the test control plane. It is built in a copy of the module (the web page it
// embeds is not part of the module), whose own go.sum pins the rest; so there is nothing to tidy here.
module kvpilot.io/cluster/alertmanager

go 1.26.0

require github.com/prometheus/alertmanager v0.34.2
