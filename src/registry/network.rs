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

use futures::{FutureExt as _, future::BoxFuture};
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
pub const SURROUNDINGS: [&str; 11] = [
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

/// Finds the addresses of a name.
type Lookup = Box<dyn Fn(Name) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> + Send + Sync>;

/// Resolves names, and leaves out what is denied. A connection asks once, and dials what it is given.
pub(super) struct Resolver {
    networks: Arc<Networks>,
    lookup: Lookup,
}

impl Resolver {
    /// As the system resolves names.
    pub(super) fn system(networks: &Arc<Networks>) -> Self {
        let lookup =
            |name: Name| async move { Ok(tokio::net::lookup_host((name.as_str(), 0)).await?.collect()) }.boxed();
        Self { networks: Arc::clone(networks), lookup: Box::new(lookup) }
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let (networks, found) = (Arc::clone(&self.networks), (self.lookup)(name));
        Box::pin(async move {
            let found = found.await?;
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
    use std::sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    };

    use http::Method;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
        task::JoinHandle,
    };

    use super::*;
    use crate::registry::{Error, ErrorKind, Step, Timing, Transport, send::transport_error};

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
        let resolve = |networks| Resolver::system(&Arc::new(networks)).resolve("localhost".parse().unwrap());
        assert!(resolve(Networks::closed(Vec::new(), Vec::new())).await.is_err());
        assert!(resolve(Networks::default()).await.is_ok_and(|mut found| found.next().is_some()));
    }

    const OPEN: &str = "127.0.0.2";
    const CLOSED: &str = "127.0.0.3";

    /// A name of which an attacker says at each lookup what it is, and what is there: at an address that is open and at one
    /// that is not, on one port.
    struct Rebinding {
        http: reqwest::Client,
        url: String,
        lookups: Arc<AtomicUsize>,
        connections: [Arc<AtomicUsize>; 2],
        tasks: [JoinHandle<()>; 2],
    }

    impl Rebinding {
        async fn new(answers: Vec<io::Result<Vec<&'static str>>>) -> Self {
            let open = TcpListener::bind((OPEN, 0)).await.unwrap();
            let port = open.local_addr().unwrap().port();
            let closed = TcpListener::bind((CLOSED, port)).await.unwrap();
            let lookups = Arc::<AtomicUsize>::default();
            let (count, answers) = (Arc::clone(&lookups), Mutex::new(answers));
            let lookup: Lookup = Box::new(move |_| {
                count.fetch_add(1, Ordering::Relaxed);
                let mut answers = answers.lock().unwrap();
                let answer = answers.remove(0);
                let address = |text: &str| SocketAddr::new(text.parse().unwrap(), 0);
                let answer = answer.map(|texts| texts.into_iter().map(address).collect());
                async { answer }.boxed()
            });
            let networks = Networks::closed(Vec::new(), vec![format!("{OPEN}/32").parse().unwrap()]);
            let resolver = Resolver { networks: Arc::new(networks), lookup };
            let transport = Transport::default();
            let http = transport.build(transport.tls_config().unwrap(), &Timing::default(), resolver).unwrap();
            let connections = [Arc::<AtomicUsize>::default(), Arc::default()];
            let tasks = [serve(open, &connections[0]), serve(closed, &connections[1])];
            Self { http, url: format!("http://registry.example:{port}/v2/"), lookups, connections, tasks }
        }

        async fn ask(&self) -> Result<(), Error> {
            let request = reqwest::Request::new(Method::GET, self.url.parse().unwrap());
            let answer = self.http.execute(request).await;
            answer.map(|_| ()).map_err(|error| transport_error(error, Step::GetBlob, "registry.example", "a:1"))
        }

        fn came(&self) -> [usize; 2] {
            [0, 1].map(|number| self.connections[number].load(Ordering::Relaxed))
        }
    }

    /// Answers one request on each connection.
    fn serve(listener: TcpListener, connections: &Arc<AtomicUsize>) -> JoinHandle<()> {
        let connections = Arc::clone(connections);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                connections.fetch_add(1, Ordering::Relaxed);
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n").await;
            }
        })
    }

    #[tokio::test]
    async fn a_name_that_changes_leads_nowhere_else() {
        let name = Rebinding::new(vec![Ok(vec![OPEN]), Ok(vec![CLOSED]), Ok(vec![OPEN])]).await;
        name.ask().await.unwrap();
        let error = name.ask().await.unwrap_err();
        assert!(matches!(error.kind, ErrorKind::Denied(Denied(address)) if address.to_string() == CLOSED), "{error}");
        assert!(!error.is_retryable(), "it would be asked until it says something else");
        name.ask().await.unwrap();
        assert_eq!(name.came(), [2, 0]);
        assert_eq!(name.lookups.load(Ordering::Relaxed), 3, "what is dialled is what was checked");
    }

    #[tokio::test]
    async fn of_several_addresses_those_that_are_open_are_dialled() {
        for both in [[OPEN, CLOSED], [CLOSED, OPEN]] {
            let name = Rebinding::new(vec![Ok(both.to_vec())]).await;
            name.ask().await.unwrap();
            assert_eq!(name.came(), [1, 0], "{both:?}");

            // Nor is the other one tried when nobody answers there.
            let name = Rebinding::new(vec![Ok(both.to_vec())]).await;
            name.tasks[0].abort();
            while !name.tasks[0].is_finished() {
                tokio::task::yield_now().await;
            }
            let error = name.ask().await.unwrap_err();
            assert_eq!(
                (&error.kind, error.is_retryable(), name.came()),
                (&ErrorKind::Connect, true, [0, 0]),
                "{both:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_name_that_is_not_found_may_be_found_later() {
        for answer in [Ok(Vec::new()), Err(io::Error::other("temporary failure in name resolution"))] {
            let name = Rebinding::new(vec![answer]).await;
            let error = name.ask().await.unwrap_err();
            assert_eq!(
                (&error.kind, error.is_retryable(), name.came()),
                (&ErrorKind::Connect, true, [0, 0]),
                "{error}"
            );
            assert!(error.to_string().contains("registry.example"), "{error}");
        }
    }
}
