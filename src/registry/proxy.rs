//! A proxy that connections go through. What it connects to it resolves itself: only its own address is checked.

use std::fmt;

use secrecy::{ExposeSecret as _, SecretString};
use url::Url;

/// A proxy for HTTP and HTTPS, with its login.
#[derive(Clone)]
pub struct Proxy {
    address: Url,
    login: Option<(String, SecretString)>,
}

/// An address that no proxy can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the address of the proxy is not http://host:port or https://host:port")]
pub struct ProxyError;

impl Proxy {
    /// A proxy at `http://host:port` or `https://host:port`, and the name and password that it asks for. The address
    /// itself holds neither.
    pub fn new(address: &str, login: Option<(String, SecretString)>) -> Result<Self, ProxyError> {
        let address = Url::parse(address.trim()).map_err(|_| ProxyError)?;
        let is_bare = address.username().is_empty()
            && address.password().is_none()
            && matches!(address.path(), "" | "/")
            && address.query().is_none()
            && address.fragment().is_none();
        let is_http = matches!(address.scheme(), "http" | "https") && address.has_host();
        if is_bare && is_http { Ok(Self { address, login }) } else { Err(ProxyError) }
    }

    /// Where it is.
    pub(super) fn address(&self) -> &Url {
        &self.address
    }

    /// What tells it from other proxies and other logins at it.
    pub(super) fn identity(&self) -> [&[u8]; 3] {
        let (username, password) = match &self.login {
            None => ("", ""),
            Some((username, password)) => (username.as_str(), password.expose_secret()),
        };
        [self.address.as_str().as_bytes(), username.as_bytes(), password.as_bytes()]
    }

    pub(super) fn to_client(&self) -> reqwest::Result<reqwest::Proxy> {
        let proxy = reqwest::Proxy::all(self.address.clone())?;
        Ok(match &self.login {
            None => proxy,
            Some((username, password)) => proxy.basic_auth(username, password.expose_secret()),
        })
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("address", &self.address.as_str()).field("login", &self.login.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_a_scheme_a_host_and_a_port() {
        for good in ["http://proxy.example.com:3128", "https://10.0.0.1", "http://[fd00::1]:8080/\n"] {
            assert!(Proxy::new(good, None).is_ok(), "{good}");
        }
        for bad in
            ["", "proxy:3128", "socks5://proxy:1080", "http://u:p@proxy:3128", "http://proxy/path", "http://proxy?x"]
        {
            assert!(Proxy::new(bad, None).is_err(), "{bad}");
        }
    }

    #[test]
    fn its_password_is_not_printed() {
        let proxy = Proxy::new("http://proxy:3128", Some(("u".into(), "hunter2".into()))).unwrap();
        assert!(!format!("{proxy:?}").contains("hunter2"));
    }
}
