//! The fault proxy: stands in front of a registry or the API server, speaks HTTP/1.1 with TLS of the test authority,
//! records every request under a [`Key`], limits bytes per second, and does what rules say to the requests they match.
//! Whatever the test is about, at every manifest that is put it checks that all its children are at the upstream.
//!
//! It lives in the test's process; dropping it closes everything.

mod action;
mod body;
mod children;
mod edit;
mod forward;
mod key;
mod line;
mod log;

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use self::action::Rules;
pub use self::action::{Action, Close, Gate};
pub use self::children::USER_AGENT as CHECK_USER_AGENT;
use self::forward::Connection;
pub use self::key::{Key, Matcher, Route};
use self::line::{Control, Line};
pub use self::log::Exchange;
use self::log::Log;
use crate::certs::{Identity, client_config, http_client};
use crate::env::Env;
use crate::pace::Pace;
use crate::registry::Registry;
use crate::token::TokenEndpoint;

const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// What is known before the start.
pub struct ProxyBuilder<'a> {
    env: &'a Env,
    registry: Registry,
    label: String,
    listen: String,
    tls: bool,
    identity: Option<Identity>,
    up: Option<u64>,
    down: Option<u64>,
}

impl ProxyBuilder<'_> {
    /// The `side` in the keys; `proxy` if it is not set.
    #[must_use]
    pub fn label(self, label: &str) -> Self {
        Self { label: label.to_owned(), ..self }
    }

    /// At this address of this machine instead of 127.0.0.1.
    #[must_use]
    pub fn listen(self, address: &str) -> Self {
        Self { listen: address.to_owned(), ..self }
    }

    /// Without TLS on the client's side.
    #[must_use]
    pub fn plain(self) -> Self {
        Self { tls: false, ..self }
    }

    /// With this certificate instead of one that is right.
    #[must_use]
    pub fn identity(self, identity: Identity) -> Self {
        Self { identity: Some(identity), ..self }
    }

    /// Limits what all clients together send, in bytes of bodies per second.
    #[must_use]
    pub fn bytes_per_second_up(self, bytes: u64) -> Self {
        Self { up: Some(bytes), ..self }
    }

    /// Limits what all clients together receive, in bytes of bodies per second.
    #[must_use]
    pub fn bytes_per_second_down(self, bytes: u64) -> Self {
        Self { down: Some(bytes), ..self }
    }

    pub async fn start(self) -> Result<Proxy> {
        let listener = TcpListener::bind((self.listen.as_str(), 0)).await.context("listen")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            label: self.label,
            host: address.to_string(),
            tls: self.tls,
            upstream: self.registry.host.clone(),
            upstream_tls: if self.registry.tls { Some(client_config(&self.env.ca_pem)?) } else { None },
            checker: http_client(&self.env.ca_pem, None)?,
            up: Arc::new(Pace::new(self.up)),
            down: Arc::new(Pace::new(self.down)),
            log: Log::default(),
            rules: Mutex::default(),
            cut: Notify::new(),
        });
        let identity = self.identity.map_or_else(|| self.env.ca()?.server(), Ok)?;
        let acceptor = if self.tls { Some(TlsAcceptor::from(identity.server_config()?)) } else { None };
        let task = tokio::spawn(accept(listener, acceptor, Arc::clone(&shared)));
        let registry = Registry { tls: self.tls, ..self.registry.at(&shared.host) };
        Ok(Proxy { shared, registry, address, task })
    }
}

/// A running proxy.
pub struct Proxy {
    shared: Arc<Shared>,
    registry: Registry,
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Proxy {
    /// In front of `registry`, with TLS if that has it.
    #[must_use]
    pub fn to<'a>(env: &'a Env, registry: &Registry) -> ProxyBuilder<'a> {
        let tls = registry.tls;
        let (registry, label, listen) = (registry.clone(), "proxy".to_owned(), "127.0.0.1".to_owned());
        ProxyBuilder { env, registry, label, listen, tls, identity: None, up: None, down: None }
    }

    /// In front of the API server. Client certificates do not pass, tokens do.
    #[must_use]
    pub fn to_apiserver(env: &Env) -> ProxyBuilder<'_> {
        let host = env.apiserver.trim_start_matches("https://").to_owned();
        let server = Registry { host, tls: true, username: None, password: None, log: std::path::PathBuf::new() };
        Self::to(env, &server).label("apiserver")
    }

    /// In front of a token server; [`TokenEndpoint::at`] its URL is what the registry then says.
    #[must_use]
    pub fn to_tokens<'a>(env: &'a Env, tokens: &TokenEndpoint) -> ProxyBuilder<'a> {
        let host = tokens.url.trim_start_matches("https://").trim_end_matches("/token").to_owned();
        let server = Registry { host, tls: true, username: None, password: None, log: tokens.log.clone() };
        Self::to(env, &server).label("token")
    }

    /// `127.0.0.1:PORT`, if no other address was asked for.
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// `https://127.0.0.1:PORT`, or `http`.
    #[must_use]
    pub fn url(&self) -> String {
        self.shared.url()
    }

    /// The registry behind it, with the same credentials, at the proxy's address.
    #[must_use]
    pub fn registry(&self) -> &Registry {
        &self.registry
    }

    /// Does `actions` (one, or several) to the requests that match. Of several rules the first that matches counts.
    pub fn rule(&self, matcher: Matcher, actions: impl Into<Vec<Action>>) {
        self.shared.rules().add(matcher, actions.into());
    }

    /// Forgets all rules; requests that are held or stalled stay so.
    pub fn clear(&self) {
        self.shared.rules().clear();
    }

    /// All requests since the start or [`Proxy::forget`], in the order in which they came.
    #[must_use]
    pub fn requests(&self) -> Vec<Exchange> {
        self.shared.log.exchanges()
    }

    /// How many requests match.
    #[must_use]
    pub fn count(&self, matcher: &Matcher) -> usize {
        self.requests().iter().filter(|exchange| matcher.matches(&exchange.key, &exchange.path)).count()
    }

    /// Empties the log. Later requests are still counted on in their keys.
    pub fn forget(&self) {
        self.shared.log.forget();
    }

    /// Each child that was not at the upstream when its manifest was put.
    #[must_use]
    pub fn violations(&self) -> Vec<String> {
        self.shared.log.violations()
    }

    /// Waits until `is_true` of the log. An error that shows the log if that is not so within `deadline`.
    pub async fn wait_for(&self, is_true: impl Fn(&[Exchange]) -> bool, deadline: Duration) -> Result<()> {
        self.shared.log.wait_for(is_true, deadline).await
    }

    /// Waits until a request that matches has come, at most 30 s.
    pub async fn wait_for_request(&self, matcher: &Matcher) -> Result<()> {
        let is_there = |log: &[Exchange]| log.iter().any(|exchange| matcher.matches(&exchange.key, &exchange.path));
        self.wait_for(is_there, Duration::from_secs(30)).await
    }

    /// Cuts all connections there are, as a server does that is killed. New ones are taken.
    pub fn cut(&self) {
        self.shared.cut.notify_waiters();
    }

    /// Closes all connections and waits until that is done.
    pub async fn stop(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What all connections need.
struct Shared {
    label: String,
    host: String,
    tls: bool,
    upstream: String,
    upstream_tls: Option<Arc<rustls::ClientConfig>>,
    checker: reqwest::Client,
    up: Arc<Pace>,
    down: Arc<Pace>,
    log: Log,
    rules: Mutex<Rules>,
    cut: Notify,
}

impl Shared {
    fn rules(&self) -> MutexGuard<'_, Rules> {
        self.rules.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.host)
    }

    fn upstream_url(&self) -> String {
        format!("{}://{}", if self.upstream_tls.is_some() { "https" } else { "http" }, self.upstream)
    }
}

async fn accept(listener: TcpListener, acceptor: Option<TlsAcceptor>, shared: Arc<Shared>) {
    // Dropped with this task, and its connections with it.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else { continue };
        connections.spawn(connection(stream, acceptor.clone(), Arc::clone(&shared)));
    }
}

async fn connection(stream: TcpStream, acceptor: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let (line, control) = Line::new(stream);
    match acceptor {
        Some(acceptor) => {
            let handshake = tokio::time::timeout(HANDSHAKE_DEADLINE, acceptor.accept(line)).await;
            // A client that does not trust the authority ends here; what it says about that is its matter.
            let Ok(Ok(stream)) = handshake else { return };
            serve(stream, control, shared).await;
        }
        None => serve(line, control, shared).await,
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, control: Arc<Control>, shared: Arc<Shared>) {
    let cut = Arc::clone(&shared);
    let connection = Arc::new(Connection::new(shared, Arc::clone(&control)));
    let service = hyper::service::service_fn(|request| {
        let connection = Arc::clone(&connection);
        async move { connection.answer(request).await }
    });
    let serving = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        _ = serving => {}
        () = control.ended() => {}
        () = cut.cut.notified() => control.end(Close::Reset),
    }
}
