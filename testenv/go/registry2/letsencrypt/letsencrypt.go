// Package letsencrypt stands in for rsc.io/letsencrypt, which is no longer published. Tests bring their certificates, so
// nothing here is ever called.
package letsencrypt

import (
	"crypto/tls"
	"errors"
)

var errAbsent = errors.New("this registry is built without Let's Encrypt")

// Manager cannot be used.
type Manager struct{}

func (Manager) CacheFile(string) error { return errAbsent }

func (Manager) Registered() bool { return false }

func (Manager) Register(string, func(string) bool) error { return errAbsent }

func (Manager) SetHosts([]string) {}

func (Manager) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errAbsent }
