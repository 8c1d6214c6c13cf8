//! Logins that are exchanged for others before a registry is shown them.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::StatusCode;
use url::Url;

use super::{
    envelope::clean,
    error::{Error, ErrorKind, Step},
    proxy::Proxy,
    repository::Repository,
    send::{Authorization, Request, Response, cause, host_of},
    transport::TransportError,
};
use crate::auth::{BoxError, Credential, ExchangeError, Http, ToMetadata, slots::Term};

/// How long it is remembered that a repository was made. Who writes to one that is gone since then has it made again.
const MADE: Duration = Duration::from_mins(10);
/// Where clouds tell a machine, and Amazon's also a container, who it is.
const METADATA: [&str; 5] = ["169.254.169.254", "[fd00:ec2::254]", "169.254.170.2", "169.254.170.23", "[fd00:ec2::23]"];
/// Answers are read this far.
const MAX_ANSWER: u64 = 64 << 10;

impl Repository {
    /// The credential of this number as the registry is shown it. One that was issued before `since` is not shown again.
    pub(super) async fn login(
        &self,
        index: usize,
        since: Option<Instant>,
        subject: &str,
    ) -> Result<Option<Arc<Credential>>, Error> {
        let Some(written) = self.credential(index) else { return Ok(None) };
        let Some(exchange) = written.exchange() else { return Ok(Some(Arc::clone(written))) };
        let http = Arc::new(Outside { repository: self.clone() });
        let fail = |error| self.exchange_error(error, written, (Step::Login, subject));
        let ask = || async { exchange.exchange(http).await.map_err(fail) };
        let issued = self.client().tokens().issued(self.registry_key(), written, since, ask).await;
        issued.map(Some).map_err(|error| error.about(subject, Some(written.origin())))
    }

    /// Whether a text repeats a password, also one that was issued.
    pub(super) fn repeats_a_secret(&self, text: &str) -> bool {
        let issued = |written| self.client().tokens().last_issued(self.registry_key(), written);
        self.credentials().iter().any(|written| {
            written.is_repeated_in(text) || issued(written).is_some_and(|issued| issued.is_repeated_in(text))
        })
    }

    /// Whether a write failed because there is no such repository, and the administrator wants it made.
    pub(super) fn wants_a_repository(&self, error: &Error) -> bool {
        let is_write = matches!(error.step, Step::StartUpload | Step::PutManifest | Step::MoveTag);
        is_write && error.code() == Some("NAME_UNKNOWN") && self.client().new_repository(self.host()).is_some()
    }

    /// Makes the repository, unless somebody has since the write `began` that failed with `missing`.
    pub(super) async fn create_repository(&self, began: Instant, missing: Error) -> Result<(), Error> {
        let written = self.credential(self.chosen().load(Ordering::Relaxed));
        let exchange = written.and_then(|written| Some((written, written.exchange()?)));
        let settings = self.client().new_repository(self.host());
        let (Some((written, exchange)), Some(settings)) = (exchange, settings) else { return Err(missing) };
        let http = Arc::new(Outside { repository: self.clone() });
        let subject = (Step::CreateRepository, self.name().as_str());
        let create = || async {
            let answer = exchange.create_repository(http, self.name(), settings).await;
            answer.map_err(|error| self.exchange_error(error, written, subject))?;
            tracing::info!(host = %self.host(), repository = %self.name(), "the repository was created");
            let now = Instant::now();
            Ok((now, Term::new(now, MADE)))
        };
        let key = (self.registry_key().to_owned(), written.fingerprint().clone(), self.name().clone());
        self.client().created().get(key, began, |at| *at > began, create).await.map(|_| ())
    }

    fn login_failure(&self, kind: ErrorKind) -> Error {
        Error::new(kind, Step::Login, self.host().as_str(), self.host().as_str())
    }

    fn exchange_error(&self, error: ExchangeError, written: &Credential, (step, subject): (Step, &str)) -> Error {
        let fail = |kind, host: &str| Error::new(kind, step, host, subject);
        match error {
            ExchangeError::Unanswered(source) => match cause::<Error>(&*source) {
                Some(of_client) => fail(of_client.kind.clone(), &of_client.host),
                None => fail(ErrorKind::Interrupted, self.host().as_str()).caused_by(source),
            },
            ExchangeError::Refused { host, status, code, message } => {
                let message = message.filter(|message| !self.repeats_a_secret(message));
                let message = message.map(|message| clean(&message));
                let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
                let credential = Some(written.origin().to_owned());
                fail(ErrorKind::Status { status, code, message, until: None, credential }, &host)
            }
            ExchangeError::Malformed { host, what } => fail(ErrorKind::Malformed(what), &host),
            ExchangeError::NotNow(unusable) => fail(ErrorKind::NotNow(unusable), self.host().as_str()),
            ExchangeError::Unusable(unusable) => fail(ErrorKind::Unusable(unusable), self.host().as_str()),
            ExchangeError::Advised { error, advice } => {
                let mut error = self.exchange_error(*error, written, (step, subject));
                error.advice = Some(advice);
                error
            }
        }
    }
}

/// Sends what an exchange asks: to the registry as it is reached, to other hosts as the administrator says.
struct Outside {
    repository: Repository,
}

impl Outside {
    async fn ask(&self, request: http::Request<Bytes>) -> Result<http::Response<Bytes>, Error> {
        let (parts, body) = request.into_parts();
        let malformed = |what: String| self.repository.login_failure(ErrorKind::Malformed(what));
        let url = Url::parse(&parts.uri.to_string()).map_err(|error| malformed(error.to_string()))?;
        let is_marked = parts.extensions.get::<ToMetadata>().is_some();
        let is_to_metadata = is_marked && METADATA.contains(&host_of(&url).as_str());
        let mut request = Request::new(Step::Login, parts.method, url, self.repository.host().as_str());
        (request.headers, request.body) = (parts.headers, body);
        let answer = self.sent(&request, is_to_metadata).await?;
        let (status, headers) = (answer.inner.status(), answer.inner.headers().clone());
        let body = self.repository.read_body(answer, MAX_ANSWER, Step::Login, &request.subject).await?;
        let mut answer = http::Response::new(body);
        (*answer.status_mut(), *answer.headers_mut()) = (status, headers);
        Ok(answer)
    }

    /// To where a cloud tells who this machine is, whatever networks are closed.
    async fn sent(&self, request: &Request, is_to_metadata: bool) -> Result<Response, Error> {
        let (repository, url, nothing) = (&self.repository, &request.url, Authorization::nothing());
        if repository.is_same_origin(url) {
            return repository.dispatch(request, url.clone(), &nothing).await;
        }
        let (client, host) = (repository.client(), host_of(url));
        let transport = client.transport(&host);
        let setup = |error: TransportError| {
            Error::new(ErrorKind::Setup(error.to_string()), request.step, &host, &request.subject)
        };
        if is_to_metadata {
            let http = client.http_to_metadata(&transport).map_err(setup)?;
            return repository.dispatch_over(&http, None, request, url, &nothing).await;
        }
        let http = client.http(&transport, repository.credentials()).map_err(setup)?;
        let dialled = transport.proxy.as_deref().map_or(url, Proxy::address);
        repository.dispatch_over(&http, Some(dialled), request, url, &nothing).await
    }
}

impl Http for Outside {
    fn send(&self, request: http::Request<Bytes>) -> BoxFuture<'_, Result<http::Response<Bytes>, BoxError>> {
        Box::pin(async move { Ok(self.ask(request).await?) })
    }
}

impl fmt::Debug for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Outside({})", self.repository.host())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpListener,
    };

    use super::*;
    use crate::{
        auth::CredentialStore,
        registry::{Access, Client, ClientOptions, Networks, Proxy, Timing, Transport},
    };

    /// The ten minutes that a registry may look through an upload are not for those who ask for a login.
    #[tokio::test]
    async fn a_cloud_that_does_not_answer_is_waited_for_as_any_small_request_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Arc::new(Proxy::new(&format!("http://{}", listener.local_addr().unwrap()), None).unwrap());
        let silent = tokio::spawn(async move {
            let mut connections = Vec::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.push(stream);
            }
        });
        let transport = Transport { proxy: Some(proxy), ..Transport::default() };
        let (head, answer) = (Duration::from_millis(50), Duration::from_hours(1));
        let client = Client::new(ClientOptions {
            transports: HashMap::from([("sts.example".parse().unwrap(), transport)]),
            timing: Timing { head, answer, ..Timing::default() },
            ..ClientOptions::default()
        });
        let host = "myregistry.azurecr.io".parse().unwrap();
        let access = Access { host, transport: Transport::default(), credentials: CredentialStore::default() };
        let outside = Outside { repository: Repository::for_pull(&client, &access, "a".parse().unwrap()).unwrap() };
        let request = http::Request::post("http://sts.example/").body(Bytes::from_static(b"Action=x")).unwrap();
        let error = outside.send(request).await.unwrap_err();
        assert_eq!(cause::<Error>(&*error).unwrap().kind, ErrorKind::TimedOut);
        silent.abort();
    }

    /// What stands for the metadata service is at a closed address, too: a proxy of this machine.
    #[tokio::test]
    async fn the_metadata_service_is_open_to_what_is_marked_and_nothing_else_is() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let proxy = Arc::new(Proxy::new(&format!("http://{}", listener.local_addr().unwrap()), None).unwrap());
        let server = tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let _ = stream.read(&mut [0; 4096]).await;
                let _ =
                    stream.write_all(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 5\r\n\r\ntoken").await;
            }
        });
        let transport = Transport { proxy: Some(proxy), ..Transport::default() };
        let hosts = ["169.254.169.254", "evil.example"].map(|host| (host.parse().unwrap(), transport.clone()));
        let client = Client::new(ClientOptions {
            networks: Networks::closed(Vec::new(), Vec::new()),
            transports: HashMap::from(hosts),
            ..ClientOptions::default()
        });
        let host = "myregistry.azurecr.io".parse().unwrap();
        let access = Access { host, transport: Transport::default(), credentials: CredentialStore::default() };
        let repository = Repository::for_pull(&client, &access, "a".parse().unwrap()).unwrap();
        let outside = Outside { repository };
        let ask = async |url: &str, is_marked: bool| {
            let mut request = http::Request::get(url).body(Bytes::new()).unwrap();
            if is_marked {
                request.extensions_mut().insert(ToMetadata);
            }
            outside.send(request).await.map_err(|error| cause::<Error>(&*error).unwrap().kind.clone())
        };
        let metadata = "http://169.254.169.254/metadata/identity/oauth2/token";
        assert_eq!(ask(metadata, true).await.unwrap().body(), "token");
        for (url, is_marked) in [(metadata, false), ("http://evil.example/", true), ("http://evil.example/", false)] {
            let refused = ask(url, is_marked).await.unwrap_err();
            let is_closed = matches!(refused, ErrorKind::Denied(_) | ErrorKind::Setup(_));
            assert!(is_closed, "{url}: {refused:?}");
        }
        server.abort();
    }
}
