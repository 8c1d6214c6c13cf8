//! Where connections may go. Who writes an `ImageMirror`, and whoever runs a registry, chooses hosts that the operator
//! then connects to from inside the cluster; so that its own surroundings are closed to them by default.
//!
//! Addresses are checked when a connection is made: of a name all that it resolves to, and those that pass are the ones
//! that are dialled, so that a name cannot change in between. Redirects, token servers and upload locations go the same
//! way.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use ipnet::IpNet;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// The networks that no connection goes to. The default denies nothing, as is right for a command that a user runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Networks {
    deny: Vec<IpNet>,
    allow: Vec<IpNet>,
}

/// An address that is not connected to.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is in a denied network")]
pub struct Denied(pub IpAddr);

/// Loopback, unspecified, link-local (with the metadata services of most clouds), multicast, and the metadata
/// addresses that are none of these. Private ranges are not among them: registries live there.
const SURROUNDINGS: [&str; 11] = [
    "0.0.0.0/8",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "224.0.0.0/4",
    "255.255.255.255/32",
    "100.100.100.200/32",
    "::/128",
    "::1/128",
    "fe80::/10",
    "ff00::/8",
    "fd00:ec2::254/128",
];

impl Networks {
    /// Denies the process's own surroundings and `deny`, apart from what is in `allow`.
    #[must_use]
    pub fn closed(deny: Vec<IpNet>, allow: Vec<IpNet>) -> Self {
        let surroundings = SURROUNDINGS.iter().filter_map(|network| network.parse().ok());
        Self { deny: surroundings.chain(deny).collect(), allow }
    }

    /// Whether a connection may go there. An IPv4 address written as IPv6 is the IPv4 address.
    pub fn check(&self, address: IpAddr) -> Result<(), Denied> {
        let address = address.to_canonical();
        let is_in = |networks: &[IpNet]| networks.iter().any(|network| network.contains(&address));
        if is_in(&self.deny) && !is_in(&self.allow) { Err(Denied(address)) } else { Ok(()) }
    }

    /// Checks a URL whose host is an address; names are checked when they are resolved.
    pub(super) fn check_url(&self, url: &Url) -> Result<(), Denied> {
        match url.host() {
            Some(Host::Ipv4(address)) => self.check(address.into()),
            Some(Host::Ipv6(address)) => self.check(address.into()),
            _ => Ok(()),
        }
    }
}

/// Resolves names as the system does, and leaves out what is denied.
pub(super) struct Resolver(pub(super) Arc<Networks>);

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let networks = Arc::clone(&self.0);
        Box::pin(async move {
            let found: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            let mut denied = None;
            let mut allowed = Vec::new();
            for address in found {
                match networks.check(address.ip()) {
                    Ok(()) => allowed.push(address),
                    Err(error) => denied = Some(error),
                }
            }
            match denied {
                Some(denied) if allowed.is_empty() => {
                    Err(io::Error::new(io::ErrorKind::PermissionDenied, denied).into())
                }
                _ => Ok(Box::new(allowed.into_iter()) as Addrs),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_allowed(networks: &Networks, address: &str) -> bool {
        networks.check(address.parse().unwrap()).is_ok()
    }

    #[test]
    fn the_surroundings_are_closed_and_private_networks_are_not() {
        let networks = Networks::closed(Vec::new(), Vec::new());
        for denied in [
            "127.0.0.1",
            "127.8.8.8",
            "0.0.0.0",
            "169.254.169.254",
            "224.0.0.1",
            "255.255.255.255",
            "100.100.100.200",
            "::1",
            "::",
            "fe80::1",
            "ff02::1",
            "fd00:ec2::254",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
        ] {
            assert!(!is_allowed(&networks, denied), "{denied} is allowed");
        }
        for allowed in ["10.0.0.1", "172.16.0.1", "192.168.1.1", "8.8.8.8", "fd00::1", "2001:db8::1"] {
            assert!(is_allowed(&networks, allowed), "{allowed} is denied");
        }
    }

    #[test]
    fn an_administrator_closes_and_opens_networks() {
        let networks = Networks::closed(vec!["10.96.0.0/12".parse().unwrap()], vec!["127.0.0.0/8".parse().unwrap()]);
        assert!(!is_allowed(&networks, "10.96.0.1") && is_allowed(&networks, "10.0.0.1"));
        assert!(is_allowed(&networks, "127.0.0.1") && !is_allowed(&networks, "::1"));
        assert!(is_allowed(&Networks::default(), "127.0.0.1"), "the default denies nothing");
    }

    #[tokio::test]
    async fn a_name_is_what_it_resolves_to() {
        let resolve = |networks| Resolver(Arc::new(networks)).resolve("localhost".parse().unwrap());
        assert!(resolve(Networks::closed(Vec::new(), Vec::new())).await.is_err());
        assert!(resolve(Networks::default()).await.is_ok_and(|mut found| found.next().is_some()));
    }
}
