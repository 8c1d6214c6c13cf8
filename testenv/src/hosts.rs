//! Stands in for the hosts of the outside: an HTTP proxy (RFC 9110, section 9.3.6, CONNECT) behind which every name that it
//! knows is a server of this machine, with a certificate of the test authority for that name.
//!
//! What a path of a name leads to is a registry, another server of ours, or a function. Names that it does not know are
//! refused, so that nothing leaves this machine. Clients are sent here by the configuration of a proxy; the names in what is
//! tested stay as they are.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::combinators::BoxBody;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::{JoinHandle, JoinSet};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::certs::{Ca, client_config};

/// A request to a function, read whole.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    pub host: String,
    pub uri: Uri,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Asked {
    /// The value of a header, empty if there is none.
    #[must_use]
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    /// The fields of a form in the body.
    #[must_use]
    pub fn form(&self) -> HashMap<String, String> {
        crate::token::url_pairs(&String::from_utf8_lossy(&self.body)).into_iter().collect()
    }
}

const CLOSED: &str = "127.0.0.2";

/// Status and JSON, or other text.
pub type Answer = (u16, String);
type Function = Arc<dyn Fn(&Asked) -> Response<String> + Send + Sync>;
type Guard = Arc<dyn Fn(&Method, &str) -> Option<Answer> + Send + Sync>;

#[derive(Clone)]
enum Backend {
    /// `127.0.0.1:PORT`, with TLS, and what is there in place of the path.
    Server(String, &'static str),
    /// The same, unless this has an answer for a method and a path.
    Guarded(String, Guard),
    Function(Function),
}

/// What is to be known before the start.
#[derive(Default)]
pub struct HostsBuilder {
    routes: Vec<(String, &'static str, Backend)>,
}

impl HostsBuilder {
    /// Sends what begins with `path` at `host` to a server of this machine that speaks TLS.
    #[must_use]
    pub fn server(self, host: &str, path: &'static str, address: &str) -> Self {
        self.server_at(host, path, address, path)
    }

    /// The same where it has another path there.
    #[must_use]
    pub fn server_at(mut self, host: &str, path: &'static str, address: &str, there: &'static str) -> Self {
        self.routes.push((host.to_owned(), path, Backend::Server(address.to_owned(), there)));
        self
    }

    /// The same, where an answer to a method and a path comes before that of the server.
    #[must_use]
    pub fn guarded(
        mut self,
        host: &str,
        path: &'static str,
        address: &str,
        guard: impl Fn(&Method, &str) -> Option<Answer> + Send + Sync + 'static,
    ) -> Self {
        self.routes.push((host.to_owned(), path, Backend::Guarded(address.to_owned(), Arc::new(guard))));
        self
    }

    /// Answers what begins with `path` at `host`.
    #[must_use]
    pub fn function(
        self,
        host: &str,
        path: &'static str,
        answer: impl Fn(&Asked) -> Answer + Send + Sync + 'static,
    ) -> Self {
        self.function_with_headers(host, path, move |asked| response(answer(asked)))
    }

    /// The same where the answer has headers.
    #[must_use]
    pub fn function_with_headers(
        mut self,
        host: &str,
        path: &'static str,
        answer: impl Fn(&Asked) -> Response<String> + Send + Sync + 'static,
    ) -> Self {
        self.routes.push((host.to_owned(), path, Backend::Function(Arc::new(answer))));
        self
    }

    pub async fn start(self, ca: &Ca) -> Result<Hosts> {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.context("listen")?;
        let address = listener.local_addr()?;
        let mut acceptors = HashMap::new();
        for (host, ..) in &self.routes {
            if !acceptors.contains_key(host) {
                let identity = ca.server_for(&[host], 2020..2050)?;
                acceptors.insert(host.clone(), TlsAcceptor::from(identity.server_config()?));
            }
        }
        let connector = TlsConnector::from(client_config(ca.cert_pem())?);
        let state = Arc::new(State { routes: self.routes, acceptors, connector, log: Mutex::default() });
        let shared = Arc::clone(&state);
        let closed = TcpListener::bind((CLOSED, address.port())).await.context("listen")?;
        let task = tokio::spawn(async move {
            // Dropped with this task, and its connections with it.
            let mut connections = JoinSet::new();
            loop {
                while connections.try_join_next().is_some() {}
                let accepted = tokio::select! {
                    accepted = listener.accept() => accepted,
                    accepted = closed.accept() => accepted,
                };
                let Ok((client, _)) = accepted else { continue };
                let state = Arc::clone(&shared);
                connections.spawn(async move { state.tunnel(client).await });
            }
        });
        Ok(Hosts { address, state, task })
    }
}

/// The hosts; dropping them closes everything.
pub struct Hosts {
    address: SocketAddr,
    state: Arc<State>,
    task: JoinHandle<()>,
}

impl Hosts {
    /// The proxy's `http://127.0.0.1:PORT`.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// The same at another address of this machine, for what is not to be reached at the first one.
    #[must_use]
    pub fn closed_url(&self) -> String {
        format!("http://{CLOSED}:{}", self.address.port())
    }

    /// What an operator's configuration says for all of these hosts to be found here.
    #[must_use]
    pub fn registries(&self, ca_file: &Path) -> Value {
        let all = self.state.acceptors.keys();
        all.map(|host| json!({"host": host, "proxy": self.url(), "caFile": ca_file})).collect()
    }

    /// What was asked so far, as `METHOD host/path`, without queries, and hosts that are not known as `CONNECT host:port`.
    #[must_use]
    pub fn asked(&self) -> Vec<String> {
        self.state.log.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        self.task.abort();
    }
}

struct State {
    routes: Vec<(String, &'static str, Backend)>,
    acceptors: HashMap<String, TlsAcceptor>,
    connector: TlsConnector,
    log: Mutex<Vec<String>>,
}

impl State {
    fn note(&self, line: String) {
        self.log.lock().unwrap_or_else(PoisonError::into_inner).push(line);
    }

    /// A tunnel, or where there is no TLS a request with its whole address (RFC 9112, section 3.2.2).
    async fn tunnel(self: Arc<Self>, client: TcpStream) -> Result<()> {
        let mut first = [0; 8];
        client.peek(&mut first).await?;
        if !first.starts_with(b"CONNECT") {
            let service = hyper::service::service_fn(|request: Request<Incoming>| {
                let host = request.uri().host().unwrap_or_default().to_owned();
                async {
                    let host = host;
                    self.answer(&host, request).await
                }
            });
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(client), service).await?;
            return Ok(());
        }
        let mut client = BufReader::new(client);
        let mut first = String::new();
        client.read_line(&mut first).await?;
        let mut line = String::new();
        while client.read_line(&mut line).await? > 0 && line != "\r\n" {
            line.clear();
        }
        let mut words = first.split(' ');
        let (Some("CONNECT"), Some(target)) = (words.next(), words.next()) else { bail!("not a CONNECT") };
        let known = target.strip_suffix(":443").and_then(|host| Some((host, self.acceptors.get(host)?)));
        let Some((host, acceptor)) = known else {
            self.note(format!("CONNECT {target}"));
            client.write_all(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n").await?;
            return Ok(());
        };
        client.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await?;
        let stream = acceptor.accept(client).await?;
        let service = hyper::service::service_fn(|request| self.answer(host, request));
        hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await?;
        Ok(())
    }

    async fn answer(&self, host: &str, request: Request<Incoming>) -> Result<Response<BoxBody<Bytes, hyper::Error>>> {
        let path = request.uri().path();
        self.note(format!("{} {host}{path}", request.method()));
        let route = self.routes.iter().find(|(name, prefix, _)| name == host && path.starts_with(prefix));
        match route {
            Some((_, here, Backend::Server(address, there))) => {
                let mut request = request;
                let rest = request.uri().to_string().strip_prefix(here).unwrap_or_default().to_owned();
                *request.uri_mut() = format!("{there}{rest}").parse()?;
                self.forward(address, request).await
            }
            Some((_, _, Backend::Guarded(address, guard))) => match guard(request.method(), path) {
                Some(answer) => Ok(whole(response(answer))),
                None => self.forward(address, request).await,
            },
            Some((_, _, Backend::Function(function))) => {
                let (parts, body) = request.into_parts();
                let body = body.collect().await?.to_bytes();
                let asked =
                    Asked { method: parts.method, host: host.to_owned(), uri: parts.uri, headers: parts.headers, body };
                Ok(whole(function(&asked)))
            }
            None => Ok(whole(response((404, String::new())))),
        }
    }

    /// As it is, the name of the host too: registries make the addresses of uploads of it.
    async fn forward(
        &self,
        address: &str,
        request: Request<Incoming>,
    ) -> Result<Response<BoxBody<Bytes, hyper::Error>>> {
        let stream = TcpStream::connect(address).await?;
        let stream = self.connector.connect(ServerName::try_from("127.0.0.1")?, stream).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        Ok(sender.send_request(request).await?.map(BodyExt::boxed))
    }
}

/// An answer of JSON.
pub(crate) fn response((status, text): Answer) -> Response<String> {
    let mut response = Response::new(text);
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn whole(response: Response<String>) -> Response<BoxBody<Bytes, hyper::Error>> {
    response.map(|text| Full::new(Bytes::from(text)).map_err(|never| match never {}).boxed())
}
