//go:build tools

package main

import (
	_ "github.com/helm-unittest/helm-unittest/cmd/helm-unittest"
)
