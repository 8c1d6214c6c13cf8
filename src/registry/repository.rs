//! A handle on one repository: manifests and blobs, read and written.

use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use bytes::Bytes;
use futures::StreamExt as _;
use http::{
    HeaderValue, Method, StatusCode,
    header::{ACCEPT as ACCEPT_HEADER, ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, RANGE},
};
use tokio::time::timeout;
use url::Url;

use super::{
    body::BlobStream,
    client::Client,
    error::{Error, ErrorKind, Step},
    header::{content_digest, content_range, lists_by_subject},
    known::Known,
    pace::Pace,
    proxy::Proxy,
    send::{Authorization, Request, Response, host_of, is_refusal},
    transport::{Transport, TransportError},
    upload::MountFrom,
};
use crate::{
    auth::{Credential, CredentialStore, Scope, cloud::as_the_host_wants_it},
    oci::{ACCEPT, Descriptor, Digest, Host, RawManifest, RepositoryName, Tag},
};

/// Manifests are read this far (distribution-spec: registries should accept 4 MiB).
const MAX_MANIFEST: u64 = 4 << 20;
/// A mount from another repository costs a token of its own, which small blobs are not worth.
const WORTH_MOUNTING: u64 = 1 << 20;

/// How a registry is reached, and with which credentials.
#[derive(Clone, Debug)]
pub struct Access {
    /// The registry.
    pub host: Host,
    /// TLS and its certificates.
    pub transport: Transport,
    /// The credentials that may match.
    pub credentials: CredentialStore,
}

/// One repository at one registry. Cheap to clone; what is learned of credentials is shared by the clones.
#[derive(Clone)]
pub struct Repository {
    inner: Arc<Inner>,
}

struct Inner {
    client: Client,
    http: reqwest::Client,
    host: Host,
    plain_http: bool,
    proxy: Option<Arc<Proxy>>,
    registry_key: String,
    known: Arc<Known>,
    name: RepositoryName,
    scope: Scope,
    base: Url,
    credentials: Vec<Arc<Credential>>,
    chosen: AtomicUsize,
}

impl Repository {
    /// A handle for reading.
    pub fn for_pull(client: &Client, access: &Access, name: RepositoryName) -> Result<Self, Error> {
        let scope = Scope::Pull(name.clone());
        Self::new(client, access, name, scope)
    }

    /// A handle for reading and writing.
    pub fn for_push(client: &Client, access: &Access, name: RepositoryName) -> Result<Self, Error> {
        let scope = Scope::PullPush(name.clone());
        Self::new(client, access, name, scope)
    }

    fn new(client: &Client, access: &Access, name: RepositoryName, scope: Scope) -> Result<Self, Error> {
        let setup =
            |what: String| Error::new(ErrorKind::Setup(what), Step::HeadManifest, access.host.as_str(), name.as_str());
        let matching = access.credentials.matching(&access.host, &name);
        let credentials =
            matching.iter().map(|written| as_the_host_wants_it(&access.host, written)).collect::<Vec<_>>();
        let http =
            client.http(&access.transport, &credentials).map_err(|error: TransportError| setup(error.to_string()))?;
        let scheme = if access.transport.plain_http { "http" } else { "https" };
        let base = Url::parse(&format!("{scheme}://{}/v2/", access.host.endpoint()))
            .map_err(|_| setup("the host does not make a URL".into()))?;
        let registry_key = format!("{} {}", access.host, access.transport.fingerprint());
        let inner = Inner {
            client: client.clone(),
            http,
            host: access.host.clone(),
            plain_http: access.transport.plain_http,
            proxy: access.transport.proxy.clone(),
            known: client.known(&access.host, &registry_key),
            registry_key,
            credentials,
            name,
            scope,
            base,
            chosen: AtomicUsize::new(0),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The registry.
    #[must_use]
    pub fn host(&self) -> &Host {
        &self.inner.host
    }

    /// The repository's name.
    #[must_use]
    pub fn name(&self) -> &RepositoryName {
        &self.inner.name
    }

    /// What a connection for `url` is made to: that place, or the proxy on the way there.
    pub(super) fn dialled<'a>(&'a self, url: &'a Url) -> &'a Url {
        self.inner.proxy.as_deref().map_or(url, Proxy::address)
    }

    /// `host/name`, for messages.
    pub(super) fn place_name(&self) -> String {
        format!("{}/{}", self.inner.host, self.inner.name)
    }

    /// Whether this is at the registry itself, which alone gets its credentials.
    pub(super) fn is_same_origin(&self, url: &Url) -> bool {
        url.origin() == self.inner.base.origin()
    }

    /// The client behind this handle.
    #[must_use]
    pub fn client(&self) -> &Client {
        &self.inner.client
    }

    /// The host as it is dialled, by which limits are shared.
    pub(super) fn endpoint(&self) -> String {
        host_of(&self.inner.base)
    }

    /// The digest of a tag or digest; `None` if it does not exist.
    pub async fn head(&self, reference: &str) -> Result<Option<Digest>, Error> {
        let mut request = self.manifest_request(Step::HeadManifest, Method::HEAD, reference)?;
        request.headers.insert(ACCEPT_HEADER, HeaderValue::from_static(ACCEPT));
        let response = match self.execute(&request).await {
            Err(error) if error.is_not_found() => return Ok(None),
            // Whoever may not look at all is told so by the next request.
            Err(error) if error.status_code() == 403 && self.known().absent_is_forbidden() => return Ok(None),
            other => other?,
        };
        match content_digest(response.inner.headers()) {
            Some(digest) => Ok(Some(digest)),
            // Old registries send no digest with HEAD.
            None => match self.manifest(reference).await {
                Ok(manifest) => Ok(Some(manifest.digest)),
                Err(error) if error.is_not_found() => Ok(None),
                Err(error) => Err(error),
            },
        }
    }

    /// The manifest of a tag or digest, its bytes checked against the digest that was asked for or promised. Bytes that
    /// are wrong once may be one broken connection.
    pub async fn manifest(&self, reference: &str) -> Result<RawManifest, Error> {
        match self.manifest_once(reference).await {
            Err(Error { kind: ErrorKind::Integrity(_), .. }) => self.manifest_once(reference).await,
            result => result,
        }
    }

    async fn manifest_once(&self, reference: &str) -> Result<RawManifest, Error> {
        let mut request = self.manifest_request(Step::GetManifest, Method::GET, reference)?;
        request.headers.insert(ACCEPT_HEADER, HeaderValue::from_static(ACCEPT));
        let (headers, bytes) = self.fetch(&request, MAX_MANIFEST).await?;
        let asked: Option<Digest> = reference.parse().ok();
        let promised = content_digest(&headers);
        let content_type = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let media_type = content_type.unwrap_or_default().split(';').next().unwrap_or_default().trim().to_owned();
        let expected = asked.as_ref().or(promised.as_ref());
        let digest = expected.map_or_else(|| Digest::sha256(&bytes), |d| Digest::of(d.algorithm(), &bytes));
        if expected.is_some_and(|expected| *expected != digest) {
            let what = format!("the bytes received have the digest {digest}");
            return Err(self.error(ErrorKind::Integrity(what), &request));
        }
        Ok(RawManifest { bytes, media_type, digest })
    }

    /// Writes a manifest by its digest or under a tag. Idempotent.
    pub async fn put_manifest(&self, reference: &str, manifest: &RawManifest) -> Result<(), Error> {
        let mut request = self.manifest_request(Step::PutManifest, Method::PUT, reference)?;
        request.body = manifest.bytes.clone();
        let media_type = HeaderValue::from_str(&manifest.media_type)
            .map_err(|_| self.error(ErrorKind::Malformed("the media type is not a header value".into()), &request))?;
        request.headers.insert(CONTENT_TYPE, media_type);
        let response = self.execute(&request).await?;
        let stored = content_digest(response.inner.headers());
        // A page of somebody in between is a success too.
        if response.inner.status() != StatusCode::CREATED && stored.is_none() {
            drop(response);
            if self.head(reference).await?.as_ref() == Some(&manifest.digest) {
                return Ok(());
            }
            let what = "it was not the registry that said so: the manifest is not there".to_owned();
            return Err(self.error(ErrorKind::Malformed(what), &request));
        }
        let differs =
            stored.is_some_and(|stored| stored.algorithm() == manifest.digest.algorithm() && stored != manifest.digest);
        if differs {
            let what = "the registry stored the manifest under another digest".to_owned();
            return Err(self.error(ErrorKind::Integrity(what), &request));
        }
        if manifest.has_subject() {
            self.known().took_with_subject(lists_by_subject(response.inner.headers()));
        }
        Ok(())
    }

    /// Whether what has a subject is found by it without being listed under a tag. Asks for what is attached to `digest`
    /// where nothing is known yet.
    pub(super) async fn has_referrers_api(&self, digest: &Digest) -> Result<bool, Error> {
        match self.known().referrers_api() {
            Some(exists) => Ok(exists),
            None => Ok(self.referrers(digest).await?.is_some()),
        }
    }

    /// Whether what has a subject is listed under it by the registry itself.
    pub(super) async fn lists_by_subject(&self, digest: &Digest) -> Result<bool, Error> {
        Ok(!self.known().ignores_subjects() && self.has_referrers_api(digest).await?)
    }

    /// Moves a tag. The write ends, one way or the other, within [`Timing::tag_write`](super::Timing::tag_write): if no answer comes in that
    /// time the outcome is unknown and the tag is looked at. So it is where tags may not be moved: one that is right
    /// already is as good.
    pub async fn put_tag(&self, tag: &Tag, manifest: &RawManifest) -> Result<(), Error> {
        let error = match timeout(self.client().timing().tag_write, self.put_manifest(tag.as_str(), manifest)).await {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(error)) if matches!(error.status_code(), 400 | 403 | 405 | 409 | 412) => error,
            Ok(Err(error)) => return Err(error),
            Err(_) => {
                let request = self.manifest_request(Step::PutManifest, Method::PUT, tag.as_str())?;
                self.error(ErrorKind::TimedOut, &request)
            }
        };
        match self.head(tag.as_str()).await {
            Ok(Some(present)) if present == manifest.digest => Ok(()),
            Ok(Some(_)) => Err(error.of_existing_tag()),
            _ => Err(error),
        }
    }

    /// Whether a blob exists here.
    pub async fn has_blob(&self, digest: &Digest) -> Result<bool, Error> {
        let request = self.blob_request(Step::HeadBlob, Method::HEAD, digest)?;
        match self.execute(&request).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_not_found() => Ok(false),
            // Where it has sent us to takes the addresses for GET alone, as storage with signed ones does.
            Err(error) if error.host != self.host().as_str() && is_refusal(error.status()) => {
                let mut request = self.blob_request(Step::HeadBlob, Method::GET, digest)?;
                request.headers.insert(RANGE, HeaderValue::from_static("bytes=0-0"));
                match self.execute(&request).await {
                    Ok(_) => Ok(true),
                    Err(error) if error.is_not_found() => Ok(false),
                    Err(error) => Err(error),
                }
            }
            Err(error) => Err(error),
        }
    }

    /// The size of a blob.
    pub(super) async fn blob_size(&self, descriptor: &Descriptor) -> Result<u64, Error> {
        let pace = Arc::new(Pace::new(self.client().timing().floor));
        Ok(self.blob(descriptor, 0, &pace, Duration::MAX).await?.0)
    }

    /// The bytes of a blob from `offset` on, and the size of the whole, from a registry that does not want to be left
    /// alone for longer than `patience`. The stream fails after [`Timing::idle`](super::Timing::idle) without a byte, or
    /// with too few. Nothing is hashed here.
    pub(super) async fn blob(
        &self,
        descriptor: &Descriptor,
        offset: u64,
        pace: &Arc<Pace>,
        patience: Duration,
    ) -> Result<(u64, BlobStream), Error> {
        let mut request = self.blob_request(Step::GetBlob, Method::GET, &descriptor.digest)?;
        request.patience = patience;
        request.headers.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        if offset > 0 {
            let range = HeaderValue::from_str(&format!("bytes={offset}-"));
            request
                .headers
                .insert(RANGE, range.map_err(|_| self.error(ErrorKind::Malformed("range".into()), &request))?);
        }
        let ranged = match self.execute(&request).await {
            Err(error) if error.is_not_found() && descriptor.is_foreign() => {
                self.foreign_blob(&request, descriptor, error).await
            }
            response => response,
        };
        let checked =
            ranged.and_then(|response| Ok((self.check_range(&request, &response, descriptor, offset)?, response)));
        let ((total, skip), response) = match checked {
            // A range that is refused or answered with another one: then all of it, without what is there already.
            Err(error)
                if offset > 0 && (error.status_code() == 416 || matches!(error.kind, ErrorKind::Malformed(_))) =>
            {
                request.headers.remove(RANGE);
                let response = self.execute(&request).await?;
                (self.check_range(&request, &response, descriptor, offset)?, response)
            }
            checked => checked?,
        };
        let integrity = |what: String| self.error(ErrorKind::Integrity(what), &request);
        if response.inner.headers().get(CONTENT_ENCODING).is_some_and(|encoding| encoding != "identity") {
            return Err(integrity("the registry encoded the blob although it was asked not to".into()));
        }
        if descriptor.size != Descriptor::UNKNOWN_SIZE && total != descriptor.size {
            let what = format!("the blob has {total} bytes where the manifest says {}", descriptor.size);
            return Err(integrity(what));
        }
        Ok((total, self.stream(response, request.subject, skip, pace)))
    }

    /// A blob from the first of its `urls` that has it: HTTPS only, without credentials, and to no closed network.
    async fn foreign_blob(&self, request: &Request, blob: &Descriptor, absent: Error) -> Result<Response, Error> {
        let mut last = None;
        for url in blob.urls.iter().filter_map(|url| Url::parse(url).ok()).filter(|url| url.scheme() == "https") {
            let request = Request { url, ..request.clone() };
            match self.follow(&request, &Authorization::nothing()).await {
                Ok(response) if response.inner.status().is_success() => return Ok(response),
                Ok(response) => last = Some(self.status_error(&request, response).await),
                Err(error) => last = Some(error),
            }
        }
        match last {
            // Whatever a vendor wants that we have not: here it is the layer that is missing.
            Some(error) if error.status().is_some_and(|status| status.is_client_error()) => {
                Err(absent.caused_by(error))
            }
            last => Err(last.unwrap_or(absent)),
        }
    }

    /// The size of the whole blob, and how many bytes of this answer to leave out because the range was ignored.
    fn check_range(
        &self,
        request: &Request,
        response: &Response,
        blob: &Descriptor,
        offset: u64,
    ) -> Result<(u64, u64), Error> {
        let malformed = |what: &str| self.error(ErrorKind::Malformed(what.to_owned()), request);
        if response.inner.status() != StatusCode::PARTIAL_CONTENT {
            // Sent in chunks it has no length; whether it has the promised one is seen at its end.
            let length = response.inner.content_length();
            let promised = Some(blob.size).filter(|size| *size != Descriptor::UNKNOWN_SIZE);
            let length = length.or(promised).ok_or_else(|| malformed("no Content-Length"))?;
            return Ok((length, offset));
        }
        if offset == 0 {
            return Err(malformed("a part where the whole was asked for"));
        }
        let range = content_range(response.inner.headers());
        let (start, total) = range.ok_or_else(|| malformed("no valid Content-Range"))?;
        if start != offset {
            return Err(malformed("another range than was asked for"));
        }
        Ok((total, 0))
    }

    fn stream(&self, response: Response, subject: String, skip: u64, pace: &Arc<Pace>) -> BlobStream {
        let host = host_of(response.inner.url());
        let (this, pace) = (self.clone(), Arc::clone(pace));
        futures::stream::try_unfold((response, skip), move |(mut response, mut skip)| {
            let (this, pace, host, subject) = (this.clone(), Arc::clone(&pace), host.clone(), subject.clone());
            async move {
                loop {
                    let chunk = this.chunk(&mut response, &pace, Step::GetBlob, &host, &subject).await?;
                    let Some(chunk) = chunk else { return Ok(None) };
                    let dropped = skip.min(chunk.len() as u64);
                    skip -= dropped;
                    let kept: Bytes = chunk.slice(usize::try_from(dropped).unwrap_or(chunk.len())..);
                    if !kept.is_empty() {
                        return Ok(Some((kept, (response, skip))));
                    }
                }
            }
        })
        .boxed()
    }

    pub(super) fn url(&self, path: &str) -> Result<Url, Error> {
        let path = format!("{}/{path}", self.inner.name);
        self.inner.base.join(&path).map_err(|error| {
            Error::new(ErrorKind::Setup("not a URL".into()), Step::HeadManifest, self.host().as_str(), &path)
                .caused_by(error)
        })
    }

    fn manifest_request(&self, step: Step, method: Method, reference: &str) -> Result<Request, Error> {
        let separator = if reference.contains(':') { '@' } else { ':' };
        let url = self.url(&format!("manifests/{reference}"))?;
        Ok(Request::new(step, method, url, format!("{}{separator}{reference}", self.inner.name)))
    }

    fn blob_request(&self, step: Step, method: Method, digest: &Digest) -> Result<Request, Error> {
        let url = self.url(&format!("blobs/{digest}"))?;
        Ok(Request::new(step, method, url, format!("{}@{digest}", self.inner.name)))
    }

    pub(super) fn http(&self) -> &reqwest::Client {
        &self.inner.http
    }

    pub(super) fn registry_key(&self) -> &str {
        &self.inner.registry_key
    }

    pub(super) fn known(&self) -> &Known {
        &self.inner.known
    }

    pub(super) fn scope(&self) -> &Scope {
        &self.inner.scope
    }

    pub(super) fn is_plain_http(&self) -> bool {
        self.inner.plain_http
    }

    pub(super) fn chosen(&self) -> &AtomicUsize {
        &self.inner.chosen
    }

    pub(super) fn credentials(&self) -> &[Arc<Credential>] {
        &self.inner.credentials
    }

    pub(super) fn credential(&self, index: usize) -> Option<&Arc<Credential>> {
        self.inner.credentials.get(index)
    }

    /// A large blob is here: other repositories of the registry can mount it.
    pub(super) fn holds(&self, descriptor: &Descriptor) {
        if descriptor.size >= WORTH_MOUNTING {
            self.client().remember_holder(self.login_key(), &descriptor.digest, self.name());
        }
    }

    /// A large blob of a source that is in the same registry, and is shown the same credential, can be mounted from there.
    pub(super) fn learn_of_neighbour(&self, source: &Self, descriptor: &Descriptor) {
        if source.login_key() == self.login_key() && source.name() != self.name() {
            source.holds(descriptor);
        }
    }

    /// Where this repository may take the blob from: another one that it was brought to with the same credential, else
    /// this one itself, which then says whether it is there.
    pub(super) fn mount_for(&self, descriptor: &Descriptor) -> MountFrom {
        let holder = self.client().holder(self.login_key(), &descriptor.digest);
        match holder.filter(|holder| holder != self.name()) {
            Some(holder) => MountFrom::Other(holder),
            None => MountFrom::Itself,
        }
    }

    /// Whether this process has brought the blob here.
    pub(super) fn is_holder(&self, descriptor: &Descriptor) -> bool {
        self.client().holder(self.login_key(), &descriptor.digest).as_ref() == Some(self.name())
    }

    /// The registry as it is reached, and the credential that it is shown.
    fn login_key(&self) -> (String, Option<Digest>) {
        let credential = self.credential(self.chosen().load(Ordering::Relaxed));
        (self.registry_key().to_owned(), credential.map(|credential| credential.fingerprint().clone()))
    }

    /// Goes on to the credential after `index`, for everybody. False if there is none.
    pub(super) fn choose_next(&self, index: usize) -> bool {
        if index + 1 >= self.inner.credentials.len() {
            return false;
        }
        let _ = self.chosen().compare_exchange(index, index + 1, Ordering::Relaxed, Ordering::Relaxed);
        true
    }
}
