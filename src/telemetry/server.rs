//! The server for probes and metrics: `/livez`, `/readyz`, `/metrics`.
//!
//! Probes have neither TLS nor authentication, so that whoever reaches the pod can talk to it: a connection carries one
//! request, lives ten seconds, and there are few of them at one time. Metrics can have both, on a listener of their own.
//! Readiness is made of named [`Gates`], each of
//! which says what it waits for; a standby that sees the lease held by another is ready.

use std::{
    fmt, io,
    net::SocketAddr,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Router,
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use futures::future::BoxFuture;
use prometheus_client::{encoding::text::encode, registry::Registry};
use rustls::ServerConfig;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    time::{Sleep, sleep},
};
use tokio_util::sync::CancellationToken;

use super::tls::Secured;

/// A connection lives this long: it is the time for one request, its answer included. Kubelets and Prometheus give up
/// earlier by default, so that nobody has a use for another.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Connections at one time. More wait in the kernel's queue.
const MAX_CONNECTIONS: usize = 64;
/// How long requests that are under way hold up the end. It is part of the 25 s that are promised for the end.
const DRAIN: Duration = Duration::from_secs(1);
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// What must be there before the operator can work. Cheap to clone: clones share the gates.
#[derive(Clone, Debug)]
pub struct Gates {
    gates: Arc<Mutex<Vec<Gate>>>,
}

#[derive(Clone, Debug)]
struct Gate {
    name: &'static str,
    waiting_for: Option<String>,
}

impl Gates {
    /// Gates of these names, all closed.
    #[must_use]
    pub fn new(names: &[&'static str]) -> Self {
        let closed = |&name| Gate { name, waiting_for: Some("its turn".to_owned()) };
        Self { gates: Arc::new(Mutex::new(names.iter().map(closed).collect())) }
    }

    /// Opens a gate.
    pub fn open(&self, name: &'static str) {
        self.set(name, None);
    }

    /// Closes a gate. `why` is what it waits for.
    pub fn close(&self, name: &'static str, why: &str) {
        self.set(name, Some(why.to_owned()));
    }

    /// Whether all gates are open.
    #[must_use]
    pub fn ready(&self) -> bool {
        self.snapshot().iter().all(|gate| gate.waiting_for.is_none())
    }

    /// Whether a gate is open.
    #[must_use]
    pub fn is_open(&self, name: &str) -> bool {
        self.snapshot().iter().any(|gate| gate.name == name && gate.waiting_for.is_none())
    }

    fn set(&self, name: &'static str, waiting_for: Option<String>) {
        let mut gates = self.gates.lock().unwrap_or_else(PoisonError::into_inner);
        match gates.iter_mut().find(|gate| gate.name == name) {
            Some(gate) => gate.waiting_for = waiting_for,
            None => gates.push(Gate { name, waiting_for }),
        }
    }

    fn snapshot(&self) -> Vec<Gate> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// The path of the metrics, as rights name it.
pub const METRICS_PATH: &str = "/metrics";

/// What a reviewer says of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Its owner may read the metrics.
    Allowed,
    /// It is nobody's.
    Unauthenticated,
    /// Its owner may not.
    Forbidden,
    /// That could not be found out.
    Unknown,
}

/// Says who may read the metrics.
pub trait Reviewer: Send + Sync {
    /// Whether the owner of a bearer token may.
    fn review<'a>(&'a self, token: &'a str) -> BoxFuture<'a, Verdict>;
}

/// The metrics, and who may read them: everybody, where nobody says.
#[derive(Clone)]
pub struct Exposition {
    /// What is shown.
    pub registry: Arc<Registry>,
    /// Who is asked before it is.
    pub reviewer: Option<Arc<dyn Reviewer>>,
}

/// Answers probes until `shutdown`, then ends within a second. And scrapes, unless they have a listener of their own.
pub async fn serve(
    listener: TcpListener,
    gates: Gates,
    exposition: Option<Exposition>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let router = Router::new()
        .route("/livez", get(async || close("ok\n".into_response())))
        .route("/readyz", get(readyz).with_state(gates))
        .merge(exposition.map(metrics_router).unwrap_or_default());
    serve_on(Bounded::new(listener), router, shutdown).await
}

/// Answers scrapes over TLS until `shutdown`, then ends within a second. A handshake is made by what `tls` is then.
pub async fn serve_metrics(
    listener: TcpListener,
    exposition: Exposition,
    tls: watch::Receiver<Arc<ServerConfig>>,
    shutdown: CancellationToken,
) -> io::Result<()> {
    let listener = Secured { listener: Bounded::new(listener), config: tls };
    serve_on(listener, metrics_router(exposition), shutdown).await
}

fn metrics_router(exposition: Exposition) -> Router {
    Router::new().route(METRICS_PATH, get(metrics).with_state(exposition))
}

async fn serve_on<L>(listener: L, router: Router, shutdown: CancellationToken) -> io::Result<()>
where
    L: Listener<Addr: fmt::Debug>,
{
    let router = router.fallback(async || close(StatusCode::NOT_FOUND.into_response()));
    let server = axum::serve(listener, router).with_graceful_shutdown(shutdown.clone().cancelled_owned());
    let too_long = async {
        shutdown.cancelled().await;
        sleep(DRAIN).await;
    };
    tokio::select! {
        result = server => result,
        () = too_long => Ok(()),
    }
}

async fn readyz(State(gates): State<Gates>) -> Response {
    let gates = gates.snapshot();
    let ready = gates.iter().all(|gate| gate.waiting_for.is_none());
    let lines = gates.iter().map(|gate| match &gate.waiting_for {
        None => format!("{}: ready\n", gate.name),
        Some(what) => format!("{}: waiting for {}\n", gate.name, what.replace(['\r', '\n'], " ")),
    });
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    close((status, lines.collect::<String>()).into_response())
}

async fn metrics(State(exposition): State<Exposition>, headers: HeaderMap) -> Response {
    let Exposition { registry, reviewer } = exposition;
    if let Some(refused) = refused(reviewer.as_deref(), &headers).await {
        return close(refused.into_response());
    }
    let mut text = String::new();
    close(match encode(&mut text, &registry) {
        Ok(()) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    })
}

/// What is answered to who may not read the metrics.
async fn refused(reviewer: Option<&dyn Reviewer>, headers: &HeaderMap) -> Option<(StatusCode, HeaderMap)> {
    let reviewer = reviewer?;
    let authorization = headers.get(header::AUTHORIZATION).and_then(|value| value.to_str().ok());
    let token = authorization.and_then(|value| value.split_once(' ')).filter(|(scheme, token)| {
        // RFC 9110, section 11.1: the name of a scheme has no case.
        scheme.eq_ignore_ascii_case("bearer") && !token.trim().is_empty()
    });
    let verdict = match token {
        Some((_, token)) => reviewer.review(token.trim()).await,
        None => Verdict::Unauthenticated,
    };
    let mut headers = HeaderMap::new();
    let status = match verdict {
        Verdict::Allowed => return None,
        Verdict::Unauthenticated => {
            headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            StatusCode::UNAUTHORIZED
        }
        Verdict::Forbidden => StatusCode::FORBIDDEN,
        Verdict::Unknown => StatusCode::SERVICE_UNAVAILABLE,
    };
    Some((status, headers))
}

/// One request a connection, so that the life of a connection bounds its request.
fn close(mut response: Response) -> Response {
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// A listener whose connections are few and short.
pub(super) struct Bounded {
    listener: TcpListener,
    places: Arc<Semaphore>,
}

impl Bounded {
    fn new(listener: TcpListener) -> Self {
        Self { listener, places: Arc::new(Semaphore::new(MAX_CONNECTIONS)) }
    }
}

impl Listener for Bounded {
    type Io = Connection;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Connection, SocketAddr) {
        // The semaphore is never closed: there is always a permit in the end.
        let place = Arc::clone(&self.places).acquire_owned().await.ok();
        let (stream, address) = Listener::accept(&mut self.listener).await;
        (Connection { stream, ends: Box::pin(sleep(REQUEST_TIMEOUT)), _place: place }, address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

pub(super) struct Connection {
    stream: TcpStream,
    ends: Pin<Box<Sleep>>,
    _place: Option<OwnedSemaphorePermit>,
}

impl Connection {
    /// An operation that has to wait fails when the connection's time is over.
    fn bounded<T>(&mut self, cx: &mut Context<'_>, outcome: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if outcome.is_pending() && self.ends.as_mut().poll(cx).is_ready() {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        outcome
    }
}

impl AsyncRead for Connection {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_read(cx, buffer);
        self.bounded(cx, outcome)
    }
}

impl AsyncWrite for Connection {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let outcome = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.bounded(cx, outcome)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_flush(cx);
        self.bounded(cx, outcome)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let outcome = Pin::new(&mut self.stream).poll_shutdown(cx);
        self.bounded(cx, outcome)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;
    use crate::telemetry::metrics::Metrics;

    async fn started(gates: &Gates) -> (SocketAddr, CancellationToken, tokio::task::JoinHandle<io::Result<()>>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let stop = CancellationToken::new();
        let (_, registry) = Metrics::new(&Arc::default());
        let exposition = Exposition { registry: Arc::new(registry), reviewer: None };
        let server = tokio::spawn(serve(listener, gates.clone(), Some(exposition), stop.clone()));
        (address, stop, server)
    }

    async fn get(address: SocketAddr, path: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn readiness_names_what_is_waited_for() {
        let gates = Gates::new(&["crd", "lease"]);
        let (address, stop, server) = started(&gates).await;
        assert!(get(address, "/livez").await.starts_with("HTTP/1.1 200 "));

        gates.open("crd");
        gates.close("lease", "the Lease\nto be read");
        let waiting = get(address, "/readyz").await;
        assert!(waiting.starts_with("HTTP/1.1 503 "), "{waiting}");
        assert!(waiting.ends_with("crd: ready\nlease: waiting for the Lease to be read\n"), "{waiting}");

        gates.open("lease");
        assert!(gates.ready());
        let ready = get(address, "/readyz").await;
        assert!(ready.starts_with("HTTP/1.1 200 ") && ready.ends_with("crd: ready\nlease: ready\n"), "{ready}");
        stop.cancel();
        server.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn metrics_are_open_metrics_text() {
        let (address, ..) = started(&Gates::new(&[])).await;
        let answer = get(address, "/metrics").await.to_ascii_lowercase();
        assert!(answer.contains("content-type: application/openmetrics-text; version=1.0.0"), "{answer}");
        assert!(answer.contains("\nimagemirror_leader 0\n"), "{answer}");
        assert!(get(address, "/").await.starts_with("HTTP/1.1 404 "));
    }

    #[tokio::test(start_paused = true)]
    async fn who_sends_nothing_neither_stays_nor_holds_up_the_end() {
        let (address, stop, server) = started(&Gates::new(&[])).await;
        let mut silent = TcpStream::connect(address).await.unwrap();
        // The clock of the test moves on by itself to the end of the connection.
        assert_eq!(silent.read(&mut [0; 1]).await.unwrap_or(0), 0);

        let _silent = TcpStream::connect(address).await.unwrap();
        stop.cancel();
        server.await.unwrap().unwrap();
    }
}
