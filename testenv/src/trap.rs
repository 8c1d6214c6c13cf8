//! A listener that no credentials and no bytes should reach, and that remembers whatever does: the place where a
//! redirect, a `Location` or a token realm points that must not be followed, or only without credentials.
//!
//! It lives in the test's process; dropping it closes everything.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use bytes::Bytes;
use http::{HeaderMap, Request, Response, header};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::TlsAcceptor;

use crate::env::Env;

/// A request that came.
#[derive(Clone, Debug)]
pub struct Trapped {
    pub method: String,
    /// With the query.
    pub path: String,
    pub headers: HeaderMap,
    /// Bytes of the body that have come so far.
    pub body_bytes: u64,
}

/// A running listener. It answers 200 without a body until [`Trap::answer`] says something else.
pub struct Trap {
    seen: Arc<Seen>,
    address: SocketAddr,
    tls: bool,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Seen(Mutex<State>);

struct State {
    connections: usize,
    requests: Vec<Trapped>,
    answer: (u16, HeaderMap, Bytes),
}

impl Default for State {
    fn default() -> Self {
        Self { connections: 0, requests: Vec::new(), answer: (200, HeaderMap::new(), Bytes::new()) }
    }
}

impl Trap {
    /// With a certificate of the test authority, or plain.
    pub async fn start(env: &Env, tls: bool) -> Result<Self> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("listen")?;
        let address = listener.local_addr()?;
        let acceptor = if tls { Some(TlsAcceptor::from(env.ca()?.server()?.server_config()?)) } else { None };
        let seen = Arc::new(Seen::default());
        let task = tokio::spawn(accept(listener, acceptor, Arc::clone(&seen)));
        Ok(Self { seen, address, tls, task })
    }

    /// What everybody is told from now on.
    pub fn answer(&self, status: u16, headers: &[(&str, &str)], body: impl Into<Bytes>) -> Result<()> {
        let mut map = HeaderMap::new();
        for (name, value) in headers {
            map.append(http::HeaderName::try_from(*name)?, http::HeaderValue::try_from(*value)?);
        }
        http::StatusCode::from_u16(status)?;
        self.seen.state().answer = (status, map, body.into());
        Ok(())
    }

    /// `127.0.0.1:PORT`
    #[must_use]
    pub fn host(&self) -> String {
        self.address.to_string()
    }

    /// `https://127.0.0.1:PORT`, or `http`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("{}://{}", if self.tls { "https" } else { "http" }, self.address)
    }

    /// How many connections were opened, whether or not a request came over them.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.seen.state().connections
    }

    /// All requests so far, oldest first.
    #[must_use]
    pub fn requests(&self) -> Vec<Trapped> {
        self.seen.state().requests.clone()
    }

    /// How many requests came with credentials.
    #[must_use]
    pub fn authorized(&self) -> usize {
        let with_credentials = |request: &&Trapped| request.headers.contains_key(header::AUTHORIZATION);
        self.seen.state().requests.iter().filter(with_credentials).count()
    }

    /// The bytes of all bodies.
    #[must_use]
    pub fn body_bytes(&self) -> u64 {
        self.seen.state().requests.iter().map(|request| request.body_bytes).sum()
    }
}

impl Drop for Trap {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Seen {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>> {
        let (parts, mut body) = request.into_parts();
        let number = {
            let mut state = self.state();
            state.requests.push(Trapped {
                method: parts.method.to_string(),
                path: parts.uri.to_string(),
                headers: parts.headers,
                body_bytes: 0,
            });
            state.requests.len() - 1
        };
        while let Some(frame) = body.frame().await {
            if let Ok(data) = frame?.into_data() {
                self.state().requests[number].body_bytes += data.len() as u64;
            }
        }
        let (status, headers, body) = self.state().answer.clone();
        let mut response = Response::builder().status(status).body(Full::new(body))?;
        *response.headers_mut() = headers;
        Ok(response)
    }
}

async fn accept(listener: TcpListener, acceptor: Option<TlsAcceptor>, seen: Arc<Seen>) {
    // Dropped with this task, and its connections with it.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok((stream, _)) = listener.accept().await else { continue };
        seen.state().connections += 1;
        let (acceptor, seen) = (acceptor.clone(), Arc::clone(&seen));
        connections.spawn(async move {
            match acceptor {
                Some(acceptor) => {
                    let Ok(stream) = acceptor.accept(stream).await else { return };
                    serve(stream, seen).await;
                }
                None => serve(stream, seen).await,
            }
        });
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + 'static, seen: Arc<Seen>) {
    let service = hyper::service::service_fn(|request| seen.answer(request));
    let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
}
