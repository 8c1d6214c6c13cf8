//go:build tools

// Package cluster pins etcd and helm, which share their dependencies well.
package cluster

import (
	_ "go.etcd.io/etcd/server/v3"
	_ "helm.sh/helm/v4/cmd/helm"
)
