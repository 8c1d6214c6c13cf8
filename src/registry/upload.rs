//! Upload sessions: the `POST` that is also the attempt to mount, the requests that carry bytes, the look at what has
//! arrived, and giving up (distribution-spec, "Pushing blobs" and "Mounting a blob from another repository").

use std::{
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION},
};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use url::Url;

use super::{
    body::{BodyState, FeedBody},
    error::{Error, ErrorKind, Step},
    header,
    pace::Pace,
    repository::Repository,
    send::{Authorization, Request, Response, host_of, note_answer, transport_error},
};
use crate::{
    auth::Scope,
    oci::{Digest, RepositoryName},
};

/// Where at the same registry the blob may be already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum MountFrom {
    /// In the target repository itself: the registry then answers 201 instead of opening an upload.
    Itself,
    /// In another repository.
    Other(RepositoryName),
}

/// What the `POST` came to.
pub(super) enum Started {
    /// The blob is there; nothing is to be sent.
    Present,
    /// The registry has taken the blob from the other repository; nothing is to be sent.
    Mounted,
    /// An upload session is open.
    Session(Upload),
}

/// An open upload session. Its location changes with every answer.
#[derive(Clone)]
pub(super) struct Upload {
    repository: Repository,
    digest: Digest,
    location: Arc<Mutex<Url>>,
    /// The least that a chunk may have, the last one aside.
    pub(super) chunk_min: u64,
}

/// Which side of a streamed upload failed.
#[derive(Debug)]
pub enum PutError {
    /// The body could not be produced: the source failed, or its bytes are not what was promised.
    Source(Error),
    /// The upload itself failed.
    Target(Error),
}

/// The uploads of a run that are open. What is dropped unfinished is cancelled by [`clean_up`](Self::clean_up).
#[derive(Default)]
pub struct Sessions {
    abandoned: Mutex<Vec<Upload>>,
}

impl Sessions {
    /// Cancels the uploads that were left open by copies that failed or were dropped.
    pub async fn clean_up(&self) {
        let abandoned = std::mem::take(&mut *self.abandoned.lock().unwrap_or_else(PoisonError::into_inner));
        futures::future::join_all(abandoned.iter().map(Upload::cancel)).await;
    }

    pub(super) fn open(&self, upload: Upload) -> OpenSession<'_> {
        OpenSession { sessions: self, upload: Some(upload) }
    }
}

/// An open session at the target.
pub(super) struct OpenSession<'a> {
    sessions: &'a Sessions,
    upload: Option<Upload>,
}

impl OpenSession<'_> {
    /// The blob is committed, or the registry has forgotten the session.
    pub(super) fn finish(mut self) {
        self.upload = None;
    }
}

impl Drop for OpenSession<'_> {
    fn drop(&mut self) {
        if let Some(upload) = self.upload.take() {
            self.sessions.abandoned.lock().unwrap_or_else(PoisonError::into_inner).push(upload);
        }
    }
}

/// Whether the registry will not mount, rather than not now.
fn is_refused_mount(error: &Error) -> bool {
    error.status().is_some_and(|status| status.is_client_error() && !matches!(status.as_u16(), 408 | 429))
}

impl Repository {
    /// Opens an upload, or finds that none is needed. Without `mount` the registry always opens an upload, also for a
    /// blob that it has.
    ///
    /// A mount that is refused is not tried again at this registry: the upload then starts as if none had been named.
    pub(super) async fn start_upload(&self, digest: &Digest, mount: Option<&MountFrom>) -> Result<Started, Error> {
        let known = self.known();
        if let Some(MountFrom::Other(from)) = mount
            && known.mounts()
        {
            let mut request = self.upload_request(digest, Some(from))?;
            request.scope = Some(Scope::Mount(self.name().clone(), from.clone()));
            match self.start(&request, digest, true).await {
                Err(error) if is_refused_mount(&error) => {
                    tracing::debug!(host = %error.host, %error, "mounts are not tried again at this registry");
                    known.mounts_refused();
                }
                result => return result,
            }
        }
        if mount.is_some() && known.self_mounts() {
            let mut request = self.upload_request(digest, Some(self.name()))?;
            // A refusal may be about the form: it says nothing of the credential.
            request.scope = Some(self.scope().clone());
            match self.start(&request, digest, false).await {
                Err(error) if is_refused_mount(&error) => {
                    tracing::debug!(host = %error.host, %error, "an upload is opened without the attempt to mount");
                    let request = self.upload_request(digest, None)?;
                    let started = self.start(&request, digest, false).await?;
                    known.self_mounts_useless();
                    return Ok(started);
                }
                result => return result,
            }
        }
        let request = self.upload_request(digest, None)?;
        self.start(&request, digest, false).await
    }

    fn upload_request(&self, digest: &Digest, mount_from: Option<&RepositoryName>) -> Result<Request, Error> {
        let mut url = self.url("blobs/uploads/")?;
        if let Some(from) = mount_from {
            url.query_pairs_mut().append_pair("mount", &digest.to_string()).append_pair("from", from.as_str());
        }
        Ok(Request::new(Step::StartUpload, Method::POST, url, format!("{}@{digest}", self.name())))
    }

    async fn start(&self, request: &Request, digest: &Digest, is_mount: bool) -> Result<Started, Error> {
        let response = self.execute(request).await?;
        if response.inner.status() == StatusCode::CREATED {
            return Ok(if is_mount { Started::Mounted } else { Started::Present });
        }
        let location = self
            .location(request, &response)?
            .ok_or_else(|| self.error(ErrorKind::Malformed("no valid Location".into()), request))?;
        Ok(Started::Session(Upload {
            repository: self.clone(),
            digest: digest.clone(),
            location: Arc::new(Mutex::new(location)),
            chunk_min: header::chunk_min_length(response.inner.headers()).unwrap_or(0),
        }))
    }

    /// The session's URL, where the answer names one. It is at the registry itself, or at a host that the administrator
    /// allows: nothing else gets bytes (CVE-2026-50151).
    fn location(&self, request: &Request, response: &Response) -> Result<Option<Url>, Error> {
        let header = response.inner.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let Some(location) = header.and_then(|header| response.inner.url().join(header).ok()) else { return Ok(None) };
        if self.is_same_origin(&location) {
            return Ok(Some(location));
        }
        let host = host_of(&location);
        let is_allowed = location.scheme() == "https"
            && self.client().upload_hosts(self.host()).iter().any(|allowed| allowed.as_str() == host);
        if is_allowed {
            return Ok(Some(location));
        }
        Err(self.error(ErrorKind::LocationRefused(host), request))
    }
}

impl Upload {
    /// Sends bytes that are in memory and have been verified, and commits them. They are sent once, as a body that broke
    /// off may be in the session already: after a failure the outcome is unknown, and the caller looks.
    pub(super) async fn put_bytes(&self, bytes: Bytes) -> Result<(), Error> {
        let mut request = self.request(Method::PUT, true);
        request.headers.insert(CONTENT_TYPE, OCTETS);
        request.body = bytes;
        let response = self.repository.execute_once(&request).await?;
        self.check_committed(&request, response.inner.status())
    }

    /// The same in two requests, for registries that lose what comes with the end of an upload.
    pub(super) async fn patch_bytes(&self, bytes: Bytes) -> Result<(), Error> {
        let mut request = self.request(Method::PATCH, false);
        request.headers.insert(CONTENT_TYPE, OCTETS);
        request.body = bytes;
        let response = self.repository.execute_once(&request).await?;
        self.moved(&request, &response)?;
        drop(response);
        self.close().await
    }

    /// Registries answer 201, old ones 204. What else is a success comes from somebody in between.
    fn check_committed(&self, request: &Request, status: StatusCode) -> Result<(), Error> {
        if matches!(status, StatusCode::CREATED | StatusCode::NO_CONTENT) {
            return Ok(());
        }
        let what = format!("{} to the end of an upload", status.as_u16());
        Err(self.repository.error(ErrorKind::Malformed(what), request))
    }

    /// Commits what has been sent. An answer that gets lost leaves the outcome unknown.
    pub(super) async fn close(&self) -> Result<(), Error> {
        self.put_bytes(Bytes::new()).await
    }

    /// Sends the body of this length and commits the blob with it. Never sent twice.
    pub(super) async fn put(&self, body: FeedBody) -> Result<(), PutError> {
        self.stream(self.request(Method::PUT, true), body).await.map(|_| ())
    }

    /// Sends the body as the bytes from `offset` on, of which this is a chunk or all there are.
    pub(super) async fn patch(&self, body: FeedBody, offset: u64, is_chunk: bool) -> Result<(), PutError> {
        let mut request = self.request(Method::PATCH, false);
        let end = offset + http_body::Body::size_hint(&body).lower();
        if is_chunk || offset > 0 {
            let range = HeaderValue::from_str(&format!("{offset}-{}", end.saturating_sub(1)));
            request.headers.insert(CONTENT_RANGE, range.unwrap_or(HeaderValue::from_static("")));
        }
        let headers = self.stream(request.clone(), body).await?;
        match header::stored_bytes(&headers) {
            // A part of it got lost: it goes on there, or begins anew.
            Some(stored) if stored != end => {
                Err(PutError::Target(self.repository.error(ErrorKind::Interrupted, &request)))
            }
            _ => Ok(()),
        }
    }

    async fn stream(&self, request: Request, body: FeedBody) -> Result<HeaderMap, PutError> {
        let state = body.state();
        let result = self.send_stream(request, body, &state).await;
        result.map_err(|error| state.take_failure().map_or(PutError::Target(error), PutError::Source))
    }

    async fn send_stream(&self, request: Request, body: FeedBody, state: &BodyState) -> Result<HeaderMap, Error> {
        let repository = &self.repository;
        let host = host_of(&request.url);
        let mut may_renew = true;
        let (authorization, permit) = loop {
            let authorization = self.authorization(&request).await?;
            let permit = repository.place(&host, &authorization.identity, &request).await?;
            // Waiting for a place may have taken longer than the token lives. One that cannot be renewed just now is shown.
            if authorization.is_fresh() || !std::mem::take(&mut may_renew) {
                break (authorization, permit);
            }
        };
        let mut built = reqwest::Request::new(request.method.clone(), request.url.clone());
        let headers = built.headers_mut();
        headers.extend(request.headers.clone());
        headers.insert(CONTENT_TYPE, OCTETS);
        headers.insert(CONTENT_LENGTH, HeaderValue::from(http_body::Body::size_hint(&body).lower()));
        if let Some(value) = authorization.header() {
            headers.insert(AUTHORIZATION, value);
        }
        *built.body_mut() = Some(reqwest::Body::wrap(body));
        state.begin();
        let counted = permit.sent(&request.method);
        let answer = tokio::select! {
            answer = repository.http().execute(built) => {
                answer.map_err(|error| transport_error(error, request.step, &host, &request.subject))
            }
            stalled = self.stalled(state) => Err(Error::new(stalled, request.step, &host, &request.subject)),
        };
        counted.came_to(&answer);
        let inner = answer?;
        note_answer(&inner, &permit);
        let response = Response { inner, permit, waited: Duration::ZERO };
        if !response.inner.status().is_success() {
            return Err(repository.status_error(&request, response).await);
        }
        if request.method == Method::PUT {
            self.check_committed(&request, response.inner.status())?;
        }
        self.moved(&request, &response)?;
        Ok(response.inner.headers().clone())
    }

    /// What to send with bytes: to the registry what it asks for, to other hosts nothing.
    async fn authorization(&self, request: &Request) -> Result<Authorization, Error> {
        let repository = &self.repository;
        if !repository.is_same_origin(&request.url) {
            return Ok(Authorization::nothing());
        }
        let index = repository.chosen().load(Ordering::Relaxed);
        repository.authorization(index, (None, None), repository.scope(), &request.subject).await
    }

    /// Ends when no byte has moved for too long, or too few have, or the answer after the last one takes too long.
    async fn stalled(&self, state: &BodyState) -> ErrorKind {
        let timing = self.repository.client().timing();
        let pace = Pace::new(timing.floor);
        let (mut waited, mut remaining) = state.of_target();
        loop {
            let (waits, remains) = state.of_target();
            let is_slow = pace.is_too_slow(waits.saturating_sub(waited), remaining - remains);
            if is_slow && !state.is_sent() {
                return ErrorKind::TooSlow;
            }
            (waited, remaining) = (waits, remains);
            if state.is_waiting_for_source() {
                // Downloads have bounds of their own. It may be the target's turn again soon.
                sleep(timing.idle.min(timing.floor.window)).await;
                continue;
            }
            let patience = if state.is_sent() { timing.answer } else { timing.idle };
            let deadline = state.last_byte() + patience;
            if deadline <= Instant::now() {
                return ErrorKind::TimedOut;
            }
            sleep_until(deadline.min(Instant::now() + timing.floor.window)).await;
        }
    }

    /// How many bytes the registry holds of this upload, and from now on its newest location. `None` where it does not
    /// say, or knows nothing of it any more.
    pub(super) async fn stored(&self) -> Option<u64> {
        let mut request = self.request(Method::GET, false);
        request.step = Step::UploadStatus;
        let response = self.repository.execute_once(&request).await.ok()?;
        self.moved(&request, &response).ok()?;
        header::stored_bytes(response.inner.headers())
    }

    /// Gives the session up. Best effort: the location is asked for again first, because once bytes have arrived
    /// registries know the session only by a newer one. Never holds up the end of a run.
    pub(super) async fn cancel(&self) {
        let cancel = async {
            // Bytes that were under way may arrive in between, and make the location an old one.
            let result = match self.give_up().await {
                Err(error) if error.status_code() == 416 => self.give_up().await,
                result => result,
            };
            if let Err(error) = result {
                tracing::debug!(host = %error.host, %error, "an upload session was left to expire");
            }
        };
        let _ = timeout(self.repository.client().timing().cancel, cancel).await;
    }

    async fn give_up(&self) -> Result<(), Error> {
        let mut status = self.request(Method::GET, false);
        status.step = Step::CancelUpload;
        // What is refused here says nothing of the credential.
        status.scope = Some(self.repository.scope().clone());
        match self.repository.execute_once(&status).await {
            Ok(response) => self.moved(&status, &response)?,
            Err(error) if error.is_not_found() => return Ok(()),
            Err(_) => {}
        }
        let mut delete = self.request(Method::DELETE, false);
        delete.step = Step::CancelUpload;
        delete.scope = Some(Scope::Delete(self.repository.name().clone()));
        self.repository.execute_once(&delete).await.map(|_| ())
    }

    /// Takes over the location that an answer names.
    fn moved(&self, request: &Request, response: &Response) -> Result<(), Error> {
        // The location of a committed blob is the blob's own.
        if response.inner.status() == StatusCode::CREATED && request.method == Method::PUT {
            return Ok(());
        }
        if let Some(location) = self.repository.location(request, response)? {
            *self.location.lock().unwrap_or_else(PoisonError::into_inner) = location;
        }
        Ok(())
    }

    fn request(&self, method: Method, commits: bool) -> Request {
        let mut url = self.location.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if commits {
            url.query_pairs_mut().append_pair("digest", &self.digest.to_string());
        }
        let subject = format!("{}@{}", self.repository.name(), self.digest);
        Request::new(Step::PutBlob, method, url, subject)
    }
}

const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");
