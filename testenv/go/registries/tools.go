//go:build tools

// Package registries pins the registries that tests run against and the independent clients that judge the result.
package registries

import (
	_ "github.com/distribution/distribution/v3/cmd/registry"
	_ "github.com/google/go-containerregistry/cmd/crane"
	_ "github.com/olareg/olareg/cmd/olareg"
	_ "github.com/regclient/regclient/cmd/regctl"
	_ "github.com/regclient/regclient/cmd/regsync"
)
