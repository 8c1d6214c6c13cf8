//! Uploading a blob: one `POST` that is also the attempt to mount, one `PUT` with the bytes
//! (distribution-spec, "Pushing a blob monolithically" and "Mounting a blob from another repository").

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Method, StatusCode,
    header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION},
};
use tokio::time::{Instant, sleep, sleep_until, timeout};
use url::Url;

use super::{
    body::{BodyState, HoldBack},
    error::{Error, ErrorKind, Step},
    repository::Repository,
    send::{Request, Response, host_of, transport_error},
};
use crate::{
    auth::Scope,
    oci::{Digest, RepositoryName},
};

/// Where at the same registry the blob may be already.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MountFrom {
    /// In the target repository itself: the registry then answers 201 instead of opening an upload.
    Itself,
    /// In another repository.
    Other(RepositoryName),
}

/// What the `POST` came to.
pub enum Started {
    /// The blob is there; nothing is to be sent.
    Present,
    /// The registry has taken the blob from the other repository; nothing is to be sent.
    Mounted,
    /// An upload session is open.
    Session(Upload),
}

/// An open upload session.
#[derive(Clone)]
pub struct Upload {
    repository: Repository,
    digest: Digest,
    location: Url,
}

/// Which side of a streamed upload failed.
#[derive(Debug)]
pub enum StreamError {
    /// The body could not be produced: the source failed, or its bytes are not what was promised.
    Body(Error),
    /// The upload itself failed.
    Upload(Error),
}

/// Whether the registry will not mount, rather than not now.
fn is_refused_mount(error: &Error) -> bool {
    error.status().is_some_and(|status| status.is_client_error() && !matches!(status.as_u16(), 408 | 429))
}

/// Best effort, never waited for longer.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(5);

impl Repository {
    /// Opens an upload, or finds that none is needed.
    ///
    /// Without `mount` the registry always opens an upload, also for a blob that it has.
    ///
    /// A mount from another repository that is refused is not tried again at this registry: the upload then starts as
    /// if none had been named.
    pub async fn start_upload(&self, digest: &Digest, mount: Option<&MountFrom>) -> Result<Started, Error> {
        if let Some(MountFrom::Other(from)) = mount
            && !self.login().refuses_mounts()
        {
            let mut request = self.upload_request(digest, Some(from))?;
            request.scope = Some(Scope::Mount(self.name().clone(), from.clone()));
            match self.start(&request, digest, true).await {
                Err(error) if is_refused_mount(&error) => {
                    tracing::debug!(%error, "mounts are not tried again at this registry");
                    self.login().mounts_refused();
                }
                result => return result,
            }
        }
        let request = self.upload_request(digest, mount.map(|_| self.name()))?;
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
        let location = self.location(request, &response)?;
        Ok(Started::Session(Upload { repository: self.clone(), digest: digest.clone(), location }))
    }

    /// The session's URL. Credentials and bytes go nowhere but to the registry itself (CVE-2026-50151).
    fn location(&self, request: &Request, response: &Response) -> Result<Url, Error> {
        let header = response.inner.headers().get(LOCATION).and_then(|value| value.to_str().ok());
        let location = header
            .and_then(|header| response.inner.url().join(header).ok())
            .ok_or_else(|| self.error(ErrorKind::Malformed("no valid Location".into()), request))?;
        if location.origin() != request.url.origin() {
            return Err(self.error(ErrorKind::LocationRefused(host_of(&location)), request));
        }
        Ok(location)
    }
}

impl Upload {
    /// Sends bytes that are in memory and have been verified. They are sent once, as a body that broke off may be in
    /// the session already: after a failure the outcome is unknown, and the caller looks.
    pub async fn put_bytes(&self, bytes: Bytes) -> Result<(), Error> {
        let mut request = self.request();
        request.headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        request.body = bytes;
        self.repository.execute_once(&request).await.map(|_| ())
    }

    /// Streams a body. It is sent once: after a failure the outcome is unknown, and the caller looks.
    pub async fn put_stream(&self, body: HoldBack) -> Result<(), StreamError> {
        let state = body.state();
        let result = self.send_stream(body, &state).await;
        result.map_err(|error| state.take_failure().map_or(StreamError::Upload(error), StreamError::Body))
    }

    async fn send_stream(&self, body: HoldBack, state: &BodyState) -> Result<(), Error> {
        let request = self.request();
        let repository = &self.repository;
        let index = repository.chosen().load(Ordering::Relaxed);
        let authorization = repository.authorization(index, None, repository.scope(), &request.subject).await?;
        let host = host_of(&request.url);
        let permit = repository.place(&host, &request).await?;
        let mut built = reqwest::Request::new(Method::PUT, request.url.clone());
        let headers = built.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        headers.insert(CONTENT_LENGTH, HeaderValue::from(http_body::Body::size_hint(&body).lower()));
        if let Some(value) = authorization.header() {
            headers.insert(AUTHORIZATION, value);
        }
        *built.body_mut() = Some(reqwest::Body::wrap(body));
        state.begin();
        let answer = tokio::select! {
            answer = repository.http().execute(built) => answer,
            () = self.stalled(state) => {
                return Err(Error::new(ErrorKind::TimedOut, Step::PutBlob, &host, &request.subject));
            }
        };
        let inner = answer.map_err(|error| transport_error(error, Step::PutBlob, &host, &request.subject))?;
        repository.respect_pause(&inner, &host);
        if inner.status().is_success() {
            return Ok(());
        }
        Err(repository.status_error(&request, Response { inner, permit }).await)
    }

    /// Ends when no byte has moved for too long, or the answer after the last one takes too long.
    async fn stalled(&self, state: &BodyState) {
        let timing = self.repository.client().timing();
        loop {
            if state.is_waiting_for_source() {
                // Downloads have bounds of their own.
                sleep(timing.idle).await;
                continue;
            }
            let patience = if state.is_sent() { timing.answer } else { timing.idle };
            let deadline = state.last_byte() + patience;
            if deadline <= Instant::now() {
                return;
            }
            sleep_until(deadline).await;
        }
    }

    /// Gives the session up. Best effort: the location is asked for again first, because once bytes have arrived
    /// registries know the session only by a newer one.
    pub async fn cancel(&self) {
        let cancel = async {
            let status = Request::new(Step::CancelUpload, Method::GET, self.location.clone(), self.subject());
            let location = match self.repository.execute(&status).await {
                Ok(response) => self.repository.location(&status, &response).unwrap_or_else(|_| self.location.clone()),
                Err(error) if error.is_not_found() => return,
                Err(_) => self.location.clone(),
            };
            let delete = Request::new(Step::CancelUpload, Method::DELETE, location, self.subject());
            if let Err(error) = self.repository.execute(&delete).await {
                tracing::debug!(%error, "an upload session was left to expire");
            }
        };
        let _ = timeout(CANCEL_TIMEOUT, cancel).await;
    }

    fn request(&self) -> Request {
        let mut url = self.location.clone();
        url.query_pairs_mut().append_pair("digest", &self.digest.to_string());
        Request::new(Step::PutBlob, Method::PUT, url, self.subject())
    }

    fn subject(&self) -> String {
        format!("{}@{}", self.repository.name(), self.digest)
    }
}
