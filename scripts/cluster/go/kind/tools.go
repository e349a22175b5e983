//go:build tools

// Package tools pins kind, which is used where Docker runs.
package tools

import (
	_ "sigs.k8s.io/kind"
)
