//go:build tools

// Package tools pins coredns for the test control plane.
package tools

import (
	_ "github.com/coredns/coredns"
)
