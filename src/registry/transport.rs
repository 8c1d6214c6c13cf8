//! How a registry is reached: TLS or not, whose certificates are trusted, which certificate is shown.

use std::{
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, OnceLock, PoisonError},
};

use bytes::Bytes;
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
};
use secrecy::{ExposeSecret, SecretSlice};

use super::{
    client::Timing,
    network::{Networks, Resolver},
    proxy::Proxy,
};
use crate::{auth::Credential, oci::Digest};

/// How a registry is reached. The default is TLS with the system's roots.
#[derive(Clone, Default)]
pub struct Transport {
    /// Talk HTTP without TLS.
    pub plain_http: bool,
    /// Certificates (PEM) to trust beside the system's roots.
    pub ca: Option<Bytes>,
    /// Certificate chain (PEM) and key (PEM) to show to the registry.
    pub identity: Option<(Bytes, Arc<SecretSlice<u8>>)>,
    /// The proxy that connections go through.
    pub proxy: Option<Arc<Proxy>>,
}

/// Certificates that cannot be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// `ca.crt` holds no certificate, or a broken one.
    #[error("ca.crt holds no valid PEM certificate")]
    Ca,
    /// `tls.crt` and `tls.key` are not a valid pair.
    #[error("tls.crt and tls.key are not a valid PEM certificate and key")]
    Identity,
    /// The client could not be built.
    #[error("the HTTP client could not be built")]
    Client,
}

impl Transport {
    /// The same for equal transports and no others: what connection pools and token caches are keyed by.
    #[must_use]
    pub fn fingerprint(&self) -> Digest {
        let mut hasher = crate::oci::Algorithm::Sha256.hasher();
        hasher.update(&[u8::from(self.plain_http)]);
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_be_bytes());
            hasher.update(bytes);
        };
        part(self.ca.as_deref().unwrap_or_default());
        if let Some((chain, key)) = &self.identity {
            part(chain);
            part(key.expose_secret());
        }
        if let Some(proxy) = &self.proxy {
            part(b"proxy");
            proxy.identity().into_iter().for_each(&mut part);
        }
        hasher.finish()
    }

    /// Checks the certificates without making a connection.
    pub fn check(&self) -> Result<(), TransportError> {
        self.tls_config().map(|_| ())
    }

    pub(super) fn tls_config(&self) -> Result<ClientConfig, TransportError> {
        let mut roots = system_roots().clone();
        if let Some(ca) = &self.ca {
            let certificates = certificates(ca).ok_or(TransportError::Ca)?;
            for certificate in certificates {
                roots.add(certificate).map_err(|_| TransportError::Ca)?;
            }
        }
        let builder = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .with_safe_default_protocol_versions()
            .map_err(|_| TransportError::Client)?
            .with_root_certificates(roots);
        let mut config = match &self.identity {
            None => builder.with_no_client_auth(),
            Some((chain, key)) => {
                let chain = certificates(chain).ok_or(TransportError::Identity)?;
                let key = PrivateKeyDer::from_pem_slice(key.expose_secret()).map_err(|_| TransportError::Identity)?;
                builder.with_client_auth_cert(chain, key).map_err(|_| TransportError::Identity)?
            }
        };
        // HTTP/1.1 alone: parallel connections move blobs faster than one connection with windows.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(config)
    }

    pub(super) fn build(
        &self,
        tls: ClientConfig,
        timing: &Timing,
        resolver: Resolver,
    ) -> Result<reqwest::Client, TransportError> {
        let builder = reqwest::Client::builder()
            .redirect(reqwest::redirect::Policy::none())
            .referer(false)
            .http1_only()
            .connect_timeout(timing.connect)
            .pool_idle_timeout(timing.pool_idle)
            .pool_max_idle_per_host(32)
            .tcp_nodelay(true)
            // None from the environment: it would resolve names out of sight of the closed networks.
            .no_proxy()
            .dns_resolver(resolver)
            .user_agent(concat!("imagemirror/", env!("CARGO_PKG_VERSION")))
            .tls_backend_preconfigured(tls);
        let builder = match &self.proxy {
            None => builder,
            Some(proxy) => builder.proxy(proxy.to_client().map_err(|_| TransportError::Client)?),
        };
        builder.build().map_err(|_| TransportError::Client)
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("plain_http", &self.plain_http)
            .field("ca", &self.ca.is_some())
            .field("identity", &self.identity.is_some())
            .field("proxy", &self.proxy)
            .finish()
    }
}

fn certificates(pem: &[u8]) -> Option<Vec<CertificateDer<'static>>> {
    let certificates: Vec<_> = CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().ok()?;
    (!certificates.is_empty()).then_some(certificates)
}

/// Read once: the bundle is large and does not change while the process runs.
fn system_roots() -> &'static RootCertStore {
    static ROOTS: OnceLock<RootCertStore> = OnceLock::new();
    ROOTS.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        let found = rustls_native_certs::load_native_certs();
        let (_, ignored) = roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            tracing::warn!(
                ignored,
                "no system certificates were found: only registries with a CA of their own can be reached"
            );
        }
        roots
    })
}

/// A transport and the credentials that may be shown over it.
type PoolKey = (Digest, Vec<Digest>);

/// One HTTP client, and so one connection pool, for each transport and the credentials that may be shown over it.
#[derive(Default)]
pub(super) struct Pools {
    clients: Mutex<HashMap<PoolKey, reqwest::Client>>,
    /// Its clones share the certificates, which are most of a client.
    configs: Mutex<HashMap<Digest, ClientConfig>>,
}

impl Pools {
    pub(super) fn get(
        &self,
        transport: &Transport,
        credentials: &[Arc<Credential>],
        timing: &Timing,
        networks: &Arc<Networks>,
    ) -> Result<reqwest::Client, TransportError> {
        let credentials = credentials.iter().map(|credential| credential.fingerprint().clone()).collect();
        let key = (transport.fingerprint(), credentials);
        let lock = || self.clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(client) = lock().get(&key) {
            return Ok(client.clone());
        }
        let client = transport.build(self.config(transport, &key.0)?, timing, Resolver::system(networks))?;
        let mut clients = lock();
        if clients.len() >= Self::MAX_CLIENTS {
            clients.clear();
        }
        Ok(clients.entry(key).or_insert(client).clone())
    }

    fn config(&self, transport: &Transport, fingerprint: &Digest) -> Result<ClientConfig, TransportError> {
        let lock = || self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(config) = lock().get(fingerprint) {
            return Ok(config.clone());
        }
        let config = transport.tls_config()?;
        let mut configs = lock();
        if configs.len() >= Self::MAX_CLIENTS {
            configs.clear();
        }
        Ok(configs.entry(fingerprint.clone()).or_insert(config).clone())
    }

    /// Rotated CAs and passwords leave old entries behind; who still uses one keeps it alive.
    const MAX_CLIENTS: usize = 256;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broken_certificates_are_named() {
        let garbage = Transport { ca: Some(Bytes::from_static(b"garbage")), ..Transport::default() };
        assert_eq!(garbage.check(), Err(TransportError::Ca));
        let key = Arc::new(SecretSlice::from(b"x".to_vec()));
        let identity = Transport { identity: Some((Bytes::from_static(b"x"), key)), ..Transport::default() };
        assert_eq!(identity.check(), Err(TransportError::Identity));
        assert_eq!(Transport::default().check(), Ok(()));
    }

    #[test]
    fn the_fingerprint_tells_transports_apart() {
        let plain = Transport { plain_http: true, ..Transport::default() };
        let with_ca = Transport { ca: Some(Bytes::from_static(b"x")), ..Transport::default() };
        assert_ne!(plain.fingerprint(), Transport::default().fingerprint());
        assert_ne!(with_ca.fingerprint(), Transport::default().fingerprint());
    }
}
