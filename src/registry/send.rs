//! One exchange with a registry: credentials, redirects, deadlines, limits of the host, and repetition.
//!
//! A request takes the gate and a permit of the host, goes out with what the host is known to ask for, answers a 401
//! with a fresh token once and then with the next credential that matches, follows redirects by hand, and is repeated
//! with full jitter when the failure is one that passes.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{AUTHORIZATION, CONTENT_LENGTH, LOCATION, WWW_AUTHENTICATE},
};
use jiff::{SignedDuration, Timestamp, Unit};
use secrecy::{ExposeSecret, SecretString};
use tokio::time::{Instant, timeout};
use url::Url;

use super::{
    envelope,
    error::{CertificateProblem, Error, ErrorKind, Step},
    header,
    limits::{Identity, Permit, Shut, Verdict},
    memory::Room,
    network::Denied,
    pace::Pace,
    repository::Repository,
};
use crate::auth::{Challenge, Credential, Scope, Token, TokenKey};

/// Repetitions of a request, the first one aside.
const MAX_RETRIES: u32 = 4;
pub(super) const MAX_REDIRECTS: u32 = 5;
/// Smaller bodies are not counted: as many as there may be requests in flight take little.
const UNCOUNTED: u64 = 64 << 10;
/// Error bodies and token answers are read this far.
pub(super) const MAX_SMALL_BODY: u64 = 64 << 10;

/// A request that can be sent again.
#[derive(Clone)]
pub(super) struct Request {
    pub(super) step: Step,
    pub(super) method: Method,
    pub(super) url: Url,
    /// What it is about, for messages.
    pub(super) subject: String,
    pub(super) headers: HeaderMap,
    pub(super) body: Bytes,
    /// What a token for it must grant, where that is not what the repository needs otherwise.
    pub(super) scope: Option<Scope>,
    /// How long a host that wants to be left alone is waited for, where that is less than everybody waits.
    pub(super) patience: Duration,
}

impl Request {
    pub(super) fn new(step: Step, method: Method, url: Url, subject: impl Into<String>) -> Self {
        let (headers, body) = (HeaderMap::new(), Bytes::new());
        Self { step, method, url, subject: subject.into(), headers, body, scope: None, patience: Duration::MAX }
    }
}

/// An answer whose body has not been read. It holds its place among the host's requests until it is dropped.
pub(super) struct Response {
    pub(super) inner: reqwest::Response,
    #[expect(dead_code, reason = "is there to be dropped")]
    pub(super) permit: Permit,
    /// How long it took to begin.
    pub(super) waited: Duration,
}

/// What a request is authorised with.
pub(super) struct Authorization {
    kind: AuthorizationKind,
    /// Whose it is.
    pub(super) identity: Identity,
}

enum AuthorizationKind {
    Nothing,
    Basic(SecretString),
    Token(Token),
}

impl Authorization {
    /// What hosts get that are not the registry.
    pub(super) fn nothing() -> Self {
        Self { kind: AuthorizationKind::Nothing, identity: None }
    }

    pub(super) fn basic(credential: &Credential, identity: Identity) -> Self {
        Self { kind: AuthorizationKind::Basic(credential.basic()), identity }
    }

    /// Whether it is not about to run out.
    pub(super) fn is_fresh(&self) -> bool {
        !matches!(&self.kind, AuthorizationKind::Token(token) if !token.is_fresh())
    }

    pub(super) fn token(&self) -> Option<&Token> {
        if let AuthorizationKind::Token(token) = &self.kind { Some(token) } else { None }
    }

    pub(super) fn header(&self) -> Option<HeaderValue> {
        let value = match &self.kind {
            AuthorizationKind::Nothing => return None,
            AuthorizationKind::Basic(value) => value.clone(),
            AuthorizationKind::Token(token) => token.bearer(),
        };
        let mut header = HeaderValue::from_str(value.expose_secret()).ok()?;
        header.set_sensitive(true);
        Some(header)
    }
}

impl Repository {
    /// Sends a request until it succeeds or there is no point in repeating it.
    pub(super) async fn execute(&self, request: &Request) -> Result<Response, Error> {
        let began = std::time::Instant::now();
        match self.repeat(|| self.execute_once(request)).await {
            Err(error) if self.wants_a_repository(&error) => {
                Box::pin(self.create_repository(began, error)).await?;
                self.repeat(|| self.execute_once(request)).await
            }
            answer => answer,
        }
    }

    /// The same for an answer that is read whole: one that breaks off is asked for again.
    pub(super) async fn fetch(&self, request: &Request, limit: u64) -> Result<(HeaderMap, Bytes), Error> {
        let once = async || {
            let response = self.execute_once(request).await?;
            let headers = response.inner.headers().clone();
            let body = self.read_body(response, limit, request.step, &request.subject).await?;
            Ok((headers, body))
        };
        self.repeat(once).await
    }

    async fn repeat<T, F: Future<Output = Result<T, Error>>>(&self, mut once: impl FnMut() -> F) -> Result<T, Error> {
        let mut retries = 0;
        loop {
            let error = match once().await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if retries == MAX_RETRIES || !error.is_retryable() {
                return Err(error);
            }
            tracing::debug!(host = %error.host, %error, retries, "repeating a request");
            // A connection that was kept may have been closed just then: that says nothing of the registry.
            if retries > 0 || error.kind != ErrorKind::Interrupted {
                self.back_off(retries).await;
            }
            retries += 1;
        }
    }

    /// Waits between repetitions: full jitter below a bound that doubles.
    pub(crate) async fn back_off(&self, retries: u32) {
        let timing = self.client().timing();
        let bound = timing.backoff_first.saturating_mul(1 << retries.min(16)).min(timing.backoff_max);
        tokio::time::sleep(bound.mul_f64(fastrand::f64())).await;
    }

    /// Sends a request once, with whatever logging in it takes.
    pub(super) async fn execute_once(&self, request: &Request) -> Result<Response, Error> {
        let mut refused: Option<Token> = None;
        // When a login that was issued before is not good any more.
        let mut since: Option<std::time::Instant> = None;
        let began = std::time::Instant::now();
        let mut was_asked = false;
        // What is asked for beside the usual says nothing of the credential.
        let may_choose = request.scope.is_none();
        let known = self.known();
        loop {
            let first = known.first_contact().await;
            let index = self.chosen().load(Ordering::Relaxed);
            let scope = request.scope.as_ref().unwrap_or_else(|| self.scope());
            let is_issued = self.credential(index).is_some_and(|written| written.exchange().is_some());
            let may_renew = is_issued && since.is_none();
            let found = self.authorization(index, (refused.as_ref(), since), scope, &request.subject).await;
            let authorization = match found {
                Ok(authorization) => authorization,
                Err(error) if error.step == Step::Token && is_refusal(error.status()) && may_renew => {
                    since = Some(began);
                    continue;
                }
                Err(error) if is_refusal(error.status()) && may_choose && self.choose_next(index) => {
                    since = None;
                    continue;
                }
                Err(error) => return Err(self.advised(error, index)),
            };
            let answer = self.follow(request, &authorization).await;
            known.contacted();
            let response = answer?;
            let status = response.inner.status();
            // What another host says that the registry sent us to is no matter of credentials: it gets none.
            let is_ours = self.is_same_origin(response.inner.url());
            let learned = is_ours && status == StatusCode::UNAUTHORIZED && known.learn(challenges_of(&response));
            drop(first);
            if status.is_success() {
                return Ok(response);
            }
            let scope_refused = scope_was_refused(&response);
            let mut error = self.status_error(request, response).await;
            if !is_ours {
                return Err(error);
            }
            if status == StatusCode::UNAUTHORIZED || (error.is_unauthorized() && may_renew) {
                match authorization.kind {
                    AuthorizationKind::Token(token) if refused.is_none() => {
                        refused = Some(token);
                        continue;
                    }
                    AuthorizationKind::Basic(_) if learned => continue,
                    AuthorizationKind::Basic(_) if may_renew => {
                        since = Some(began);
                        continue;
                    }
                    // What is asked for may have been learned by another request meanwhile.
                    AuthorizationKind::Nothing if !was_asked => {
                        was_asked = true;
                        continue;
                    }
                    _ => {}
                }
            }
            if is_refusal(Some(status)) {
                if may_choose && self.choose_next(index) {
                    (refused, since) = (None, None);
                    continue;
                }
                if let ErrorKind::Status { credential, message, .. } = &mut error.kind {
                    *credential = self.credential(index).map(|credential| credential.origin().to_owned());
                    if scope_refused {
                        *message = Some(format!("the token server did not grant {scope}"));
                    }
                }
            }
            return Err(self.advised(error, index));
        }
    }

    /// A refusal of a login that was exchanged, with what to do.
    fn advised(&self, mut error: Error, index: usize) -> Error {
        if is_refusal(error.status()) && error.advice.is_none() {
            let exchange = self.credential(index).and_then(|written| written.exchange());
            error.advice = exchange.and_then(|exchange| exchange.advice()).map(str::to_owned);
        }
        error
    }

    /// Sends one request and follows its redirects. Credentials stay with the registry.
    pub(super) async fn follow(&self, request: &Request, authorization: &Authorization) -> Result<Response, Error> {
        let mut url = request.url.clone();
        let mut redirects = 0;
        loop {
            let elsewhere = Authorization::nothing();
            let authorization = if self.is_same_origin(&url) { authorization } else { &elsewhere };
            let response = self.dispatch(request, url.clone(), authorization).await?;
            if !response.inner.status().is_redirection() {
                return Ok(response);
            }
            let refuse = |why: &str| self.error(ErrorKind::RedirectRefused(why.to_owned()), request);
            redirects += 1;
            if redirects > MAX_REDIRECTS {
                return Err(refuse("more than 5 in a row"));
            }
            let location = response.inner.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let next =
                location.and_then(|location| url.join(location).ok()).ok_or_else(|| refuse("no valid Location"))?;
            if next.scheme() != "https" && next.scheme() != url.scheme() {
                return Err(refuse("it leads from HTTPS to plain HTTP"));
            }
            let writes = request.method != Method::GET && request.method != Method::HEAD;
            let keeps_the_method = matches!(response.inner.status().as_u16(), 307 | 308);
            let stays = keeps_the_method && next.origin() == url.origin();
            if writes && !stays {
                return Err(refuse("a write goes to no other place"));
            }
            url = next;
        }
    }

    pub(super) async fn dispatch(
        &self,
        request: &Request,
        url: Url,
        authorization: &Authorization,
    ) -> Result<Response, Error> {
        self.dispatch_over(self.http(), Some(self.dialled(&url)), request, &url, authorization).await
    }

    pub(super) async fn dispatch_over(
        &self,
        http: &reqwest::Client,
        checked: Option<&Url>,
        request: &Request,
        url: &Url,
        authorization: &Authorization,
    ) -> Result<Response, Error> {
        let host = host_of(url);
        if let Some(Err(denied)) = checked.map(|dialled| self.client().networks().check_url(dialled)) {
            return Err(Error::new(ErrorKind::Denied(denied), request.step, &host, &request.subject));
        }
        let permit = self.place(&host, &authorization.identity, request).await?;
        let mut built = reqwest::Request::new(request.method.clone(), url.clone());
        *built.headers_mut() = request.headers.clone();
        if let Some(value) = authorization.header() {
            built.headers_mut().insert(AUTHORIZATION, value);
        }
        let writes = matches!(request.method, Method::POST | Method::PUT | Method::PATCH);
        if writes {
            built.headers_mut().insert(CONTENT_LENGTH, HeaderValue::from(request.body.len()));
            *built.body_mut() = Some(request.body.clone().into());
        }
        let timing = self.client().timing();
        // What is written may take long to be looked through; what asks for a login is small.
        let is_small = request.body.is_empty() || request.step.is_beside();
        let patience = if is_small { timing.head } else { timing.answer };
        let sent = Instant::now();
        let counted = permit.sent(&request.method);
        let answer = match timeout(patience, http.execute(built)).await {
            Err(_) => Err(Error::new(ErrorKind::TimedOut, request.step, &host, &request.subject)),
            Ok(answer) => answer.map_err(|error| transport_error(error, request.step, &host, &request.subject)),
        };
        counted.came_to(&answer);
        let inner = answer?;
        note_answer(&inner, &permit);
        Ok(Response { inner, permit, waited: sent.elapsed() })
    }

    /// A place among the requests of a host that may be asked.
    pub(super) async fn place(&self, host: &str, identity: &Identity, request: &Request) -> Result<Permit, Error> {
        // What Docker Hub counts as a pull; asking whether a manifest is there is none.
        let is_pull = matches!(request.step, Step::GetManifest | Step::GetChild);
        let place = self.client().limits(host).request(identity, is_pull, request.patience).await;
        place.map_err(|shut| {
            let kind = match shut {
                Shut::ForNow(pause) => ErrorKind::Paused(pause),
                Shut::ForLong(pause) => ErrorKind::Closed(after(pause)),
            };
            Error::new(kind, request.step, host, &request.subject)
        })
    }

    /// What to send with a request, by what the host is known to ask for. A token that was refused, and a login that was
    /// issued before the one that was refused, are not given again.
    pub(super) async fn authorization(
        &self,
        index: usize,
        (refused, since): (Option<&Token>, Option<std::time::Instant>),
        scope: &Scope,
        subject: &str,
    ) -> Result<Authorization, Error> {
        let challenges = self.known().challenges();
        let bearer = challenges.iter().find(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        if let Some(Challenge::Bearer { realm, service, .. }) = bearer {
            let key = TokenKey {
                registry: self.registry_key().to_owned(),
                credential: self.credential(index).map(|credential| credential.fingerprint().clone()),
                scope: scope.clone(),
            };
            let identity = key.credential.clone();
            // Boxed, as it is large, rare, and a part of every request.
            let fetch = || {
                Box::pin(async {
                    let login = self.login(index, since, subject).await?;
                    self.fetch_token(realm, service.as_deref(), login.as_ref(), scope, subject).await
                })
            };
            // A refusal of a login that is had anew says nothing of the next one.
            let read_at = self.credential(index).filter(|_| since.is_none()).map(|credential| credential.read_at());
            let believed = read_at.unwrap_or_else(std::time::Instant::now);
            let token = self.client().tokens().get(key, (refused, believed), fetch).await;
            let origin = self.credential(index).map(|credential| credential.origin());
            let token = token.map_err(|error| error.about(subject, origin))?;
            return Ok(Authorization { kind: AuthorizationKind::Token(token), identity });
        }
        if !challenges.contains(&Challenge::Basic) {
            return Ok(Authorization::nothing());
        }
        let login = Box::pin(self.login(index, since, subject)).await?;
        // An identity token is for token servers alone.
        let shown = login.filter(|login| login.as_identity_token().is_none());
        let identity = self.credential(index).map(|credential| credential.fingerprint().clone());
        Ok(shown.map_or_else(Authorization::nothing, |login| Authorization::basic(&login, identity)))
    }

    pub(super) async fn status_error(&self, request: &Request, response: Response) -> Error {
        let status = response.inner.status();
        let elsewhere = Some(response.inner.url()).filter(|url| !self.is_same_origin(url)).map(host_of);
        let until = header::retry_after(response.inner.headers(), Timestamp::now()).map(after);
        let body = self.read_body(response, MAX_SMALL_BODY, request.step, &request.subject).await.unwrap_or_default();
        let (code, message) = envelope::parse(&body);
        // A message goes into the status, which more people may read than the Secret.
        let text = String::from_utf8_lossy(&body);
        let message = message.filter(|message| !self.repeats_a_secret(&text) && !self.repeats_a_secret(message));
        let mut error = self.error(ErrorKind::Status { status, code, message, until, credential: None }, request);
        // What another host says that the registry has sent us to.
        error.host = elsewhere.unwrap_or(error.host);
        error
    }

    /// Reads a body whose kind is bounded. An answer that declares more is refused unread.
    pub(super) async fn read_body(
        &self,
        response: Response,
        limit: u64,
        step: Step,
        subject: &str,
    ) -> Result<Bytes, Error> {
        let host = host_of(response.inner.url());
        let too_large = || Error::new(ErrorKind::TooLarge(limit), step, &host, subject);
        let declared = response.inner.content_length().unwrap_or(0);
        if declared > limit {
            return Err(too_large());
        }
        let mut room = None;
        if declared > UNCOUNTED {
            room = Some(self.room(declared, step, &host, subject).await?);
        }
        let mut response = response;
        let pace = Pace::new(self.client().timing().floor);
        // What grows by itself takes twice the room, for as long as it is kept.
        let mut body = BytesMut::with_capacity(usize::try_from(declared).unwrap_or_default());
        while let Some(chunk) = self.chunk(&mut response, &pace, step, &host, subject).await? {
            let bytes = (body.len() + chunk.len()) as u64;
            if bytes > limit {
                return Err(too_large());
            }
            if bytes > UNCOUNTED && room.is_none() {
                room = Some(self.room(limit, step, &host, subject).await?);
                body.reserve(usize::try_from(limit).unwrap_or_default() - body.len());
            }
            body.extend_from_slice(&chunk);
        }
        let bytes = body.freeze();
        Ok(match room {
            Some(mut room) => {
                room.shrink(bytes.len());
                room.around(bytes)
            }
            None => bytes,
        })
    }

    /// Room in memory for what a registry sends.
    pub(super) async fn room(&self, bytes: u64, step: Step, host: &str, subject: &str) -> Result<Room, Error> {
        let room = self.client().memory().take(bytes, self.client().timing().idle).await;
        room.ok_or_else(|| Error::new(ErrorKind::NoRoom(bytes), step, host, subject))
    }

    /// The next bytes of a body, in time and not too few at a time; none after the last.
    pub(super) async fn chunk(
        &self,
        response: &mut Response,
        pace: &Pace,
        step: Step,
        host: &str,
        subject: &str,
    ) -> Result<Option<Bytes>, Error> {
        let asked = Instant::now();
        let chunk = match timeout(self.client().timing().idle, response.inner.chunk()).await {
            Err(_) => return Err(Error::new(ErrorKind::TimedOut, step, host, subject)),
            Ok(Err(error)) => return Err(transport_error(error, step, host, subject)),
            Ok(Ok(None)) => return Ok(None),
            Ok(Ok(Some(chunk))) => chunk,
        };
        // A head that takes long is a part of a body that does.
        let waited = std::mem::take(&mut response.waited) + asked.elapsed();
        if pace.is_too_slow(waited, chunk.len() as u64) {
            return Err(Error::new(ErrorKind::TooSlow, step, host, subject));
        }
        Ok(Some(chunk))
    }

    pub(super) fn error(&self, kind: ErrorKind, request: &Request) -> Error {
        Error::new(kind, request.step, self.host().as_str(), &request.subject)
    }
}

pub(super) fn is_refusal(status: Option<StatusCode>) -> bool {
    matches!(status, Some(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN))
}

/// What a 401 asks for, without what is of this request alone.
fn challenges_of(response: &Response) -> Vec<Challenge> {
    let headers = response.inner.headers().get_all(WWW_AUTHENTICATE);
    let found = headers.iter().filter_map(|value| value.to_str().ok()).flat_map(Challenge::parse);
    let general = found.map(|challenge| match challenge {
        Challenge::Bearer { realm, service, .. } => Challenge::Bearer { realm, service, error: None },
        Challenge::Basic => Challenge::Basic,
    });
    general.collect()
}

fn scope_was_refused(response: &Response) -> bool {
    let headers = response.inner.headers().get_all(WWW_AUTHENTICATE);
    headers.iter().filter_map(|value| value.to_str().ok()).flat_map(Challenge::parse).any(
        |challenge| matches!(challenge, Challenge::Bearer { error: Some(error), .. } if error == "insufficient_scope"),
    )
}

/// `host[:port]` of a URL, as limits and messages name it.
pub(super) fn host_of(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    url.port().map_or_else(|| host.to_owned(), |port| format!("{host}:{port}"))
}

pub(super) fn transport_error(error: reqwest::Error, step: Step, host: &str, subject: &str) -> Error {
    if let Some(denied) = cause::<Denied>(&error) {
        return Error::new(ErrorKind::Denied(denied.clone()), step, host, subject);
    }
    let certificate = cause::<rustls::Error>(&error).and_then(certificate_problem);
    let kind = match () {
        () if let Some(problem) = certificate => ErrorKind::Tls(problem),
        () if error.is_connect() => ErrorKind::Connect,
        () if error.is_timeout() => ErrorKind::TimedOut,
        () => ErrorKind::Interrupted,
    };
    Error::new(kind, step, host, subject).caused_by(error.without_url())
}

fn certificate_problem(error: &rustls::Error) -> Option<CertificateProblem> {
    use rustls::CertificateError as Wrong;
    Some(match error {
        rustls::Error::AlertReceived(_) => CertificateProblem::Refused,
        rustls::Error::InvalidCertificate(Wrong::Expired | Wrong::ExpiredContext { .. }) => CertificateProblem::Expired,
        rustls::Error::InvalidCertificate(Wrong::NotValidYet | Wrong::NotValidYetContext { .. }) => {
            CertificateProblem::NotYetValid
        }
        rustls::Error::InvalidCertificate(Wrong::NotValidForName | Wrong::NotValidForNameContext { .. }) => {
            CertificateProblem::OtherName
        }
        rustls::Error::InvalidCertificate(_) => CertificateProblem::Untrusted,
        _ => return None,
    })
}

/// Looks for a cause of this type, also inside `io::Error`s, which do not name what they hold as their source.
pub(super) fn cause<'a, T: std::error::Error + 'static>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a T> {
    let mut current = Some(error);
    while let Some(error) = current {
        if let Some(found) = error.downcast_ref::<T>() {
            return Some(found);
        }
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        current = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// Lets everybody in the process know how the host is doing.
pub(super) fn note_answer(response: &reqwest::Response, permit: &Permit) {
    let pause = header::retry_after(response.headers(), Timestamp::now());
    let verdict = match response.status() {
        StatusCode::TOO_MANY_REQUESTS => Verdict::TooMany(pause),
        StatusCode::SERVICE_UNAVAILABLE => Verdict::Overloaded(pause),
        _ => Verdict::Fine,
    };
    permit.answered(verdict);
    if let Some(quota) = header::quota(response.headers()) {
        permit.learn_quota(quota);
    }
}

/// The second after such a pause from now.
fn after(pause: Duration) -> Timestamp {
    let now = Timestamp::now().round(Unit::Second).unwrap_or_default();
    let pause = SignedDuration::from_secs(i64::try_from(pause.as_secs()).unwrap_or(i64::MAX).saturating_add(1));
    now.checked_add(pause).unwrap_or(Timestamp::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_of_urls_carry_their_port() {
        assert_eq!(host_of(&Url::parse("https://a.example/v2/").unwrap()), "a.example");
        assert_eq!(host_of(&Url::parse("http://[::1]:5000/v2/").unwrap()), "[::1]:5000");
    }
}
