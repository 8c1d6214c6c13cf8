//! The test certificate authority. One authority signs everything of a run: the API server, the registries, the token
//! server, the fault proxies that tests start themselves (so its key lies in the run directory), and client
//! certificates for Kubernetes.

use std::net::IpAddr;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType, date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// This machine as pods see it, where there is a node: an address of a network namespace of its own.
pub const HOST: &str = "10.84.0.1";
/// The API server's Service as pods see it: the first address of the range of Services.
const KUBERNETES: &str = "10.96.0.1";

/// Wide enough that a machine whose clock is off still runs the tests.
const YEARS: Range<i32> = 2020..2099;

/// A certificate authority with its key.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    cert_pem: String,
    key_pem: String,
}

/// A certificate with its private key, both PEM.
#[derive(Clone, Debug)]
pub struct Identity {
    pub cert_pem: String,
    pub key_pem: String,
}

impl Ca {
    /// Makes a new authority.
    pub fn generate() -> Result<Self> {
        let key = KeyPair::generate()?;
        let cert_pem = authority().self_signed(&key)?.pem();
        Self::from_pem(cert_pem, key.serialize_pem())
    }

    /// Reads the authority that [`Ca::save`] wrote.
    pub fn load(cert: &Path, key: &Path) -> Result<Self> {
        let read = |path: &Path| std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()));
        Self::from_pem(read(cert)?, read(key)?)
    }

    pub fn save(&self, cert: &Path, key: &Path) -> Result<()> {
        std::fs::write(cert, &self.cert_pem)?;
        std::fs::write(key, &self.key_pem)?;
        Ok(())
    }

    #[must_use]
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// A server certificate for `127.0.0.1`, `::1` and `localhost`, and for what pods know servers by.
    pub fn server(&self) -> Result<Identity> {
        self.server_for(&["127.0.0.1", "::1", "localhost", HOST, KUBERNETES], YEARS)
    }

    /// A server certificate for these names and addresses, from the first day of one year to that of another.
    pub fn server_for(&self, names: &[&str], years: Range<i32>) -> Result<Identity> {
        let mut params = params("localhost", None);
        let name = |name: &&str| match name.parse::<IpAddr>() {
            Ok(address) => Ok(SanType::IpAddress(address)),
            Err(_) => Ok(SanType::DnsName((*name).try_into()?)),
        };
        params.subject_alt_names = names.iter().map(name).collect::<Result<_>>()?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        (params.not_before, params.not_after) = (date_time_ymd(years.start, 1, 1), date_time_ymd(years.end, 1, 1));
        self.sign(params)
    }

    /// A client certificate; Kubernetes reads the common name as the user and the organization as the group.
    pub fn client(&self, user: &str, group: &str) -> Result<Identity> {
        let mut params = params(user, Some(group));
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(params)
    }

    fn sign(&self, mut params: CertificateParams) -> Result<Identity> {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, &self.issuer)?;
        Ok(Identity { cert_pem: cert.pem(), key_pem: key.serialize_pem() })
    }

    fn from_pem(cert_pem: String, key_pem: String) -> Result<Self> {
        let issuer = Issuer::new(authority(), KeyPair::from_pem(&key_pem)?);
        Ok(Self { issuer, cert_pem, key_pem })
    }
}

impl Identity {
    pub fn save(&self, cert: &Path, key: &Path) -> Result<()> {
        std::fs::write(cert, &self.cert_pem)?;
        std::fs::write(key, &self.key_pem)?;
        Ok(())
    }

    /// What a server of ours listens with: HTTP/1.1 only.
    pub fn server_config(&self) -> Result<Arc<rustls::ServerConfig>> {
        let chain = CertificateDer::pem_slice_iter(self.cert_pem.as_bytes()).collect::<Result<Vec<_>, _>>()?;
        let key = PrivateKeyDer::from_pem_slice(self.key_pem.as_bytes())?;
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()?
            .with_no_client_auth()
            .with_single_cert(chain, key)?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }
}

/// A client that trusts `ca_pem` alone and speaks HTTP/1.1.
pub fn client_config(ca_pem: &str) -> Result<Arc<rustls::ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    for cert in CertificateDer::pem_slice_iter(ca_pem.as_bytes()) {
        roots.add(cert?)?;
    }
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// An HTTP client that trusts `ca_pem` alone, takes no proxy from the environment and follows no redirect.
pub fn http_client(ca_pem: &str, identity: Option<&Identity>) -> Result<reqwest::Client> {
    let mut builder = client_builder(ca_pem)?;
    if let Some(identity) = identity {
        let pem = format!("{}{}", identity.cert_pem, identity.key_pem);
        builder = builder.identity(reqwest::Identity::from_pem(pem.as_bytes())?);
    }
    Ok(builder.build()?)
}

/// The same that sends everything to a proxy.
pub(crate) fn http_client_behind(ca_pem: &str, proxy: &str) -> Result<reqwest::Client> {
    Ok(client_builder(ca_pem)?.proxy(reqwest::Proxy::all(proxy)?).build()?)
}

fn client_builder(ca_pem: &str) -> Result<reqwest::ClientBuilder> {
    // The process's default provider may have been set by the program under test: either way it is aws-lc-rs.
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    Ok(reqwest::Client::builder()
        .tls_certs_only([reqwest::Certificate::from_pem(ca_pem.as_bytes())?])
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(std::time::Duration::from_secs(5))
        .timeout(std::time::Duration::from_mins(1)))
}

fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// The same in every run, so that the key alone is enough to sign again.
fn authority() -> CertificateParams {
    let mut params = params("ImageMirror test CA", None);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params
}

fn params(common_name: &str, organization: Option<&str>) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    if let Some(organization) = organization {
        params.distinguished_name.push(DnType::OrganizationName, organization);
    }
    (params.not_before, params.not_after) = (date_time_ymd(YEARS.start, 1, 1), date_time_ymd(YEARS.end, 1, 1));
    params
}
