//! Where credentials may go. A registry names its token server in a header, and a hostile one names its own: so that
//! credentials are sent only to the registry's host, to its registrable domain (publicsuffix.org), or where the
//! administrator says (CVE-2026-48978, CVE-2026-33540).

use std::net::IpAddr;

use url::{Host as UrlHost, Url};

use crate::oci::Host;

/// Whether the credentials of `registry` may be sent to the token server at `realm`.
///
/// `plain_http` is whether the registry itself is reached without TLS; `auth_hosts` are further hosts that the
/// administrator allows for this registry.
#[must_use]
pub fn realm_is_trusted(registry: &Host, plain_http: bool, realm: &Url, auth_hosts: &[Host]) -> bool {
    let scheme_is_safe = realm.scheme() == "https" || (realm.scheme() == "http" && plain_http);
    let Some(realm_host) = realm.host() else { return false };
    scheme_is_safe
        && realm.username().is_empty()
        && (is_same_site(registry, &realm_host) || auth_hosts.iter().any(|host| is_host(host, realm, &realm_host)))
}

fn is_host(allowed: &Host, realm: &Url, realm_host: &UrlHost<&str>) -> bool {
    let (name, port) = crate::oci::split_port(allowed.as_str());
    let port = port.and_then(|port| port.parse().ok());
    realm_host.to_string() == name && port.is_none_or(|port| realm.port_or_known_default() == Some(port))
}

fn is_same_site(registry: &Host, realm_host: &UrlHost<&str>) -> bool {
    let endpoint = crate::oci::split_port(registry.endpoint()).0;
    if endpoint == realm_host.to_string() {
        return true;
    }
    let UrlHost::Domain(realm_name) = realm_host else { return false };
    if endpoint.trim_matches(['[', ']']).parse::<IpAddr>().is_ok() {
        return false;
    }
    match (psl::domain_str(endpoint), psl::domain_str(realm_name)) {
        (Some(ours), Some(theirs)) => ours == theirs,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn credentials_stay_with_the_registry_and_its_domain() {
        for (registry, realm, expected) in [
            ("docker.io", "https://auth.docker.io/token", true),
            ("gcr.io", "https://gcr.io/v2/token", true),
            ("registry.gitlab.com", "https://gitlab.com/jwt/auth", true),
            ("127.0.0.1:5000", "https://127.0.0.1:5001/token", true),
            ("127.0.0.1:5000", "https://127.0.0.2:5001/token", false),
            ("gcr.io", "http://gcr.io/v2/token", false),
            ("gcr.io", "https://gcr.io.evil.example/token", false),
            ("gcr.io", "https://evil.example/token", false),
            ("a.github.io", "https://b.github.io/token", false),
            ("a.co.uk", "https://b.co.uk/token", false),
            ("gcr.io", "https://gcr.io@evil.example/token", false),
            ("gcr.io", "file:///etc/passwd", false),
        ] {
            let realm = Url::parse(realm).unwrap();
            assert_eq!(
                realm_is_trusted(&registry.parse().unwrap(), false, &realm, &[]),
                expected,
                "{registry} {realm}"
            );
        }
    }

    #[test]
    fn the_administrator_can_allow_another_host() {
        let realm = Url::parse("https://login.example.com/token").unwrap();
        let allowed = ["login.example.com".parse().unwrap()];
        assert!(realm_is_trusted(&"registry.example.org".parse().unwrap(), false, &realm, &allowed));
    }

    #[test]
    fn plain_http_is_for_registries_that_are_plain_themselves() {
        let realm = Url::parse("http://localhost:81/token").unwrap();
        assert!(realm_is_trusted(&"localhost:80".parse().unwrap(), true, &realm, &[]));
    }
}
