//! Logins that are exchanged for others before a registry is shown them.

use std::{
    fmt,
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

use bytes::Bytes;
use futures::future::BoxFuture;
use http::StatusCode;
use url::Url;

use super::{
    error::{Error, ErrorKind, Step, clean},
    repository::Repository,
    send::{Reach, Request, cause},
};
use crate::auth::{BoxError, Credential, ExchangeError, Http};

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
        let ask = || async { exchange.exchange(http).await };
        let issued = self.client().tokens().issued(self.registry_key(), written, since, ask).await;
        issued.map(Some).map_err(|error| self.exchange_error(error, written, (Step::Login, subject)))
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
        let mut created = self.client().created().lock().await;
        let key = (self.registry_key().to_owned(), self.name().clone());
        if created.get(&key).is_some_and(|at| *at > began) {
            return Ok(());
        }
        let http = Arc::new(Outside { repository: self.clone() });
        let answer = exchange.create_repository(http, self.name(), settings).await;
        answer.map_err(|error| self.exchange_error(error, written, (Step::CreateRepository, self.name().as_str())))?;
        tracing::info!(host = %self.host(), repository = %self.name(), "the repository was created");
        created.insert(key, Instant::now());
        Ok(())
    }

    fn login_failure(&self, kind: ErrorKind) -> Error {
        Error::new(kind, Step::Login, self.host().as_str(), self.host().as_str())
    }

    fn exchange_error(&self, error: ExchangeError, written: &Credential, (step, subject): (Step, &str)) -> Error {
        let fail = |kind, host: &str| Error::new(kind, step, host, subject);
        match error {
            ExchangeError::Unanswered(source) => match cause::<Error>(&*source) {
                Some(of_client) => fail(of_client.kind.clone(), &of_client.host),
                None => fail(ErrorKind::Interrupted, self.host().as_str()),
            },
            ExchangeError::Refused { host, status, code, message } => {
                let message = message.filter(|message| !self.repeats_a_secret(message));
                let message = message.map(|message| clean(&message));
                let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_GATEWAY);
                let credential = Some(written.origin().to_owned());
                fail(ErrorKind::Status { status, code, message, until: None, credential }, &host)
            }
            ExchangeError::Malformed { host, what } => fail(ErrorKind::Malformed(what), &host),
            ExchangeError::Unusable(unusable) => fail(ErrorKind::Unusable(unusable), self.host().as_str()),
        }
    }
}

/// Sends what an exchange asks: to the registry as it is reached, to other hosts as the administrator says.
struct Outside {
    repository: Repository,
}

impl Outside {
    async fn ask(&self, request: http::Request<Bytes>, reach: Reach) -> Result<http::Response<Bytes>, Error> {
        let (parts, body) = request.into_parts();
        let malformed = |what: String| self.repository.login_failure(ErrorKind::Malformed(what));
        let url = Url::parse(&parts.uri.to_string()).map_err(|error| malformed(error.to_string()))?;
        let mut request = Request::new(Step::Login, parts.method, url, self.repository.host().as_str());
        (request.headers, request.body) = (parts.headers, body);
        let answer = self.repository.send_outside(&request, reach).await?;
        let (status, headers) = (answer.inner.status(), answer.inner.headers().clone());
        let body = self.repository.read_body(answer, MAX_ANSWER, Step::Login, &request.subject).await?;
        let mut answer = http::Response::new(body);
        (*answer.status_mut(), *answer.headers_mut()) = (status, headers);
        Ok(answer)
    }
}

impl Http for Outside {
    fn send(&self, request: http::Request<Bytes>) -> BoxFuture<'_, Result<http::Response<Bytes>, BoxError>> {
        Box::pin(async move { Ok(self.ask(request, Reach::Open).await?) })
    }

    fn send_as_the_program(
        &self,
        request: http::Request<Bytes>,
    ) -> BoxFuture<'_, Result<http::Response<Bytes>, BoxError>> {
        Box::pin(async move { Ok(self.ask(request, Reach::Surroundings).await?) })
    }
}

impl fmt::Debug for Outside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Outside({})", self.repository.host())
    }
}
