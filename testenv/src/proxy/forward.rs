//! One client connection: each request is recorded, met with the rules, passed on over a connection of its own to the
//! upstream, and the answer passed back. Bodies are never held as a whole, except a manifest's, which is checked first.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http::uri::PathAndQuery;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Frame, Incoming};
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;
use rustls::pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::sync::Mutex;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;

use super::Shared;
use super::action::{Action, Close};
use super::body::{Body, Direction, Flow, Stop};
use super::children;
use super::edit;
use super::key::{Key, Route};
use super::line::{Control, Line};
use super::log::{Done, Entry, Exchange};
use crate::pace::Pace;

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const ANSWER_DEADLINE: Duration = Duration::from_mins(2);
/// More than any registry accepts as a manifest.
const MANIFEST_LIMIT: usize = 16 << 20;

/// Only for one connection, never passed on (RFC 9110, section 7.6.1). `Expect` is answered by our own server.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::EXPECT,
    HeaderName::from_static("keep-alive"),
];

/// A client's connection and the one to the upstream that belongs to it.
pub(super) struct Connection {
    shared: Arc<Shared>,
    client: Arc<Control>,
    upstream: Mutex<Option<Upstream>>,
}

struct Upstream {
    sender: SendRequest<Body>,
    control: Arc<Control>,
    /// Drives the connection; aborted when dropped.
    _driver: JoinSet<()>,
}

impl Connection {
    pub(super) fn new(shared: Arc<Shared>, client: Arc<Control>) -> Self {
        Self { shared, client, upstream: Mutex::new(None) }
    }

    /// Answers one request. An error is an answer too: the proxy's own 502.
    pub(super) async fn answer(&self, request: Request<Incoming>) -> Result<Response<Body>, http::Error> {
        let (entry, actions) = self.record(&request);
        let done = Done(entry.clone());
        match self.exchange(request, &entry, &actions, done).await {
            Ok(response) => Ok(response),
            Err(error) => {
                let text = format!("testenv proxy: {error:#}");
                entry.change(|exchange| exchange.status = Some(StatusCode::BAD_GATEWAY.as_u16()));
                Response::builder().status(StatusCode::BAD_GATEWAY).body(full(text))
            }
        }
    }

    fn record(&self, request: &Request<Incoming>) -> (Entry, Vec<Action>) {
        let text = |name: HeaderName| {
            request.headers().get(name).map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
        };
        let exchange = Exchange {
            key: Key::of(&self.shared.label, request.method(), request.uri()),
            path: request.uri().path_and_query().map(ToString::to_string).unwrap_or_default(),
            headers: request.headers().clone(),
            user_agent: text(header::USER_AGENT).unwrap_or_default(),
            authorized: request.headers().contains_key(header::AUTHORIZATION),
            range: text(header::RANGE),
            status: None,
            request_bytes: 0,
            response_bytes: 0,
            actions: Vec::new(),
            done: false,
        };
        let mut actions = Vec::new();
        let entry = self.shared.log.begin(exchange, |key, path| {
            actions = self.shared.rules().actions_for(key, path);
            actions.clone()
        });
        (entry, actions)
    }

    async fn exchange(
        &self,
        request: Request<Incoming>,
        entry: &Entry,
        actions: &[Action],
        done: Done,
    ) -> Result<Response<Body>> {
        let (mut parts, body) = request.into_parts();
        let mut body: Body = body.boxed_unsync();
        if let Some(response) = self.before(actions, entry, &mut body).await? {
            return Ok(response);
        }
        if let Some(repository) = manifest_put(&self.shared.label, &parts.method, &parts.uri) {
            let bytes = self.whole(body).await;
            self.check_children(&repository, &parts, &bytes).await;
            body = full(bytes);
        }
        let is_head = parts.method == Method::HEAD;
        strip(&mut parts.headers);
        // The origin form: path and query alone. The client's Host stays, so that the upstream answers with our address.
        let path = parts.uri.path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        parts.uri = Uri::from(path);
        edit::request(&mut parts, actions);

        let mut upstream = self.upstream.lock().await;
        let connected = self.connected(&mut upstream).await?;
        let flow = Flow {
            direction: Direction::Up,
            pace: pace(actions, &self.shared.up),
            entry: entry.clone(),
            outgoing: Arc::clone(&connected.control),
            client: Arc::clone(&self.client),
            stop: actions.iter().find_map(|action| match action {
                Action::CutRequestBody { after, close } => Some((*after, Stop::Cut(*close))),
                Action::StallRequestBody { after } => Some((*after, Stop::Stall)),
                _ => None,
            }),
            flip: actions.iter().find_map(|action| match action {
                Action::FlipRequestByte { at } => Some(*at),
                _ => None,
            }),
            done: None,
        };
        let sending = connected.sender.send_request(Request::from_parts(parts, flow.of(body)));
        let response = tokio::time::timeout(ANSWER_DEADLINE, sending).await.context("the upstream does not answer")?;
        let response = match response {
            Ok(response) => response,
            Err(error) => {
                // Whatever is left of it cannot be used again.
                *upstream = None;
                return Err(error).context("the upstream closed the connection");
            }
        };
        drop(upstream);
        Ok(self.back(response, is_head, entry, actions, done).await)
    }

    /// What comes before the upstream sees anything; an answer if there is one already.
    async fn before(&self, actions: &[Action], entry: &Entry, body: &mut Body) -> Result<Option<Response<Body>>> {
        for action in actions {
            match action {
                Action::Delay(duration) => tokio::time::sleep(*duration).await,
                Action::Gate(gate) => gate.pass().await,
                Action::DiscardRequestBody => self.discard(body, entry).await,
                Action::Stall => return std::future::pending().await,
                Action::CloseBefore(close) => return self.close(*close).await,
                Action::Respond { status, headers, body } => {
                    let mut response = Response::builder().status(*status);
                    for (name, value) in headers {
                        response = response.header(name, value);
                    }
                    entry.change(|exchange| {
                        exchange.status = Some(*status);
                        exchange.response_bytes = body.len() as u64;
                    });
                    return Ok(Some(response.body(full(body.clone()))?));
                }
                _ => {}
            }
        }
        Ok(None)
    }

    /// The answer on its way to the client.
    async fn back(
        &self,
        response: Response<Incoming>,
        is_head: bool,
        entry: &Entry,
        actions: &[Action],
        done: Done,
    ) -> Response<Body> {
        let (mut parts, body) = response.into_parts();
        edit::status(&mut parts, actions);
        entry.change(|exchange| exchange.status = Some(parts.status.as_u16()));
        for action in actions {
            match action {
                Action::DelayAnswer(duration) => tokio::time::sleep(*duration).await,
                Action::GateAnswer(gate) => gate.pass().await,
                Action::CloseAfterAnswer(close) => return self.close(*close).await,
                _ => {}
            }
        }
        strip(&mut parts.headers);
        if let Some(location) = parts.headers.get(header::LOCATION).and_then(|location| self.rewritten(location)) {
            parts.headers.insert(header::LOCATION, location);
        }
        let body = edit::body(&mut parts, body.boxed_unsync(), is_head, actions);
        edit::headers(&mut parts, actions);
        let flow = Flow {
            direction: Direction::Down,
            pace: pace(actions, &self.shared.down),
            entry: entry.clone(),
            outgoing: Arc::clone(&self.client),
            client: Arc::clone(&self.client),
            stop: actions.iter().find_map(|action| match action {
                Action::CutResponseBody { after, close } => Some((*after, Stop::Cut(*close))),
                Action::StallResponseBody { after } => Some((*after, Stop::Stall)),
                Action::TruncateBody { after } => Some((*after, Stop::End)),
                _ => None,
            }),
            flip: actions.iter().find_map(|action| match action {
                Action::FlipByte { at } => Some(*at),
                _ => None,
            }),
            done: Some(done),
        };
        Response::from_parts(parts, flow.of(body))
    }

    /// Ends the client's connection; whoever waits for this is dropped with it.
    async fn close<T>(&self, close: Close) -> T {
        self.client.end(close);
        std::future::pending().await
    }

    async fn discard(&self, body: &mut Body, entry: &Entry) {
        while let Some(frame) = body.frame().await {
            match frame.map(Frame::into_data) {
                Ok(Ok(data)) => entry.change(|exchange| exchange.request_bytes += data.len() as u64),
                Ok(Err(_trailers)) => {}
                Err(_) => self.close(Close::Fin).await,
            }
        }
    }

    async fn whole(&self, body: Body) -> Bytes {
        match Limited::new(body, MANIFEST_LIMIT).collect().await {
            Ok(body) => body.to_bytes(),
            // The client is gone or sends nonsense: a part of a manifest must not reach the upstream.
            Err(_) => self.close(Close::Fin).await,
        }
    }

    async fn check_children(&self, repository: &str, parts: &http::request::Parts, manifest: &[u8]) {
        let shared = &self.shared;
        let authorization = parts.headers.get(header::AUTHORIZATION);
        let missing =
            children::missing(&shared.checker, &shared.upstream_url(), repository, manifest, authorization).await;
        for line in missing {
            shared.log.violation(format!("{} {}: {line}", parts.method, parts.uri.path()));
        }
    }

    /// The connection to the upstream, a new one if there is none or the upstream has closed it.
    async fn connected<'a>(&self, upstream: &'a mut Option<Upstream>) -> Result<&'a mut Upstream> {
        let usable = match upstream {
            // Waits until the answer before is read to its end.
            Some(upstream) => upstream.sender.ready().await.is_ok(),
            None => false,
        };
        if !usable {
            let connect = tokio::time::timeout(CONNECT_DEADLINE, self.connect()).await;
            *upstream = Some(connect.context("connecting to the upstream takes too long")??);
        }
        upstream.as_mut().context("no connection")
    }

    async fn connect(&self) -> Result<Upstream> {
        let stream = TcpStream::connect(&self.shared.upstream).await.context("connect to the upstream")?;
        let (line, control) = Line::new(stream);
        let mut driver = JoinSet::new();
        let ended = Arc::clone(&control);
        let sender = if let Some(config) = &self.shared.upstream_tls {
            let name = self.shared.upstream.rsplit_once(':').map_or("localhost", |(host, _)| host).to_owned();
            let connector = TlsConnector::from(Arc::clone(config));
            let stream = connector.connect(ServerName::try_from(name)?, line).await.context("TLS to the upstream")?;
            let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
            driver.spawn(drive(connection, ended));
            sender
        } else {
            let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(line)).await?;
            driver.spawn(drive(connection, ended));
            sender
        };
        Ok(Upstream { sender, control, _driver: driver })
    }

    /// An absolute location at the upstream as one at the proxy.
    fn rewritten(&self, location: &HeaderValue) -> Option<HeaderValue> {
        let uri: Uri = location.to_str().ok()?.parse().ok()?;
        let authority = uri.authority()?.as_str();
        if authority != self.shared.upstream && authority != self.shared.host {
            return None;
        }
        let path = uri.path_and_query().map_or("/", PathAndQuery::as_str);
        HeaderValue::try_from(format!("{}{path}", self.shared.url())).ok()
    }
}

async fn drive(connection: impl Future, control: Arc<Control>) {
    tokio::select! {
        _ = connection => {}
        () = control.ended() => {}
    }
}

/// The repository, if the request puts a manifest.
fn manifest_put(label: &str, method: &Method, uri: &Uri) -> Option<String> {
    let key = Key::of(label, method, uri);
    (method == Method::PUT && key.route == Route::Manifest).then_some(key.repository).flatten()
}

fn pace(actions: &[Action], of_the_proxy: &Arc<Pace>) -> Arc<Pace> {
    let own = actions.iter().find_map(|action| match action {
        Action::Throttle { bytes_per_second } => Some(Arc::new(Pace::new(Some(*bytes_per_second)))),
        _ => None,
    });
    own.unwrap_or_else(|| Arc::clone(of_the_proxy))
}

fn strip(headers: &mut HeaderMap) {
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

pub(super) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}
