//! The floor: the least that a client can do, and nothing else. For each blob one POST, one GET and one streaming PUT
//! whose last piece is held back until the digest agrees; 32 requests in flight at each host, 6 large streams. It is
//! no peer: it neither logs in nor repeats anything nor resumes.

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use futures::future::{try_join, try_join_all};
use futures::{StreamExt, TryStreamExt, stream};
use reqwest::header::{ACCEPT, CONTENT_LENGTH, CONTENT_TYPE, LOCATION};
use reqwest::{Body, Method, RequestBuilder, Response, StatusCode, Url};
use serde::Deserialize;
use sha2::{Digest, Sha256};
use testenv::images::{DOCKER_LIST, DOCKER_MANIFEST, OCI_INDEX, OCI_MANIFEST};
use tokio::sync::{OnceCell, Semaphore, SemaphorePermit};

const REQUESTS: usize = 32;
const STREAMS: usize = 6;
/// Larger blobs are streamed.
const SMALL: usize = 1 << 20;
/// With more tags than this in a repository, the list of tags is cheaper than to ask for each.
const FEW_TAGS: usize = 8;
const TAGS_AT_ONCE: usize = 32;
const DEADLINE: Duration = Duration::from_mins(5);

/// Copies the tags in `list`, a line `REPOSITORY TAG` for each, between two hosts whose authority is in `ca`.
pub(crate) fn run(source: &str, target: &str, list: &Path, ca: &Path) -> Result<()> {
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let ca = reqwest::Certificate::from_pem(&std::fs::read(ca)?)?;
    let http = reqwest::Client::builder().tls_certs_only([ca]).no_proxy().http1_only().timeout(DEADLINE).build()?;
    let side = |host: &str| Side { base: format!("https://{host}/v2"), requests: Semaphore::new(REQUESTS) };
    let streams = Semaphore::new(STREAMS);
    let floor = Floor { http, source: side(source), target: side(target), streams, done: Mutex::default() };
    let list = std::fs::read_to_string(list)?;
    let tags: Vec<(&str, &str)> = list.lines().filter_map(|line| line.split_once(' ')).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(floor.copy(&tags))?;
    Ok(())
}

struct Floor {
    http: reqwest::Client,
    source: Side,
    target: Side,
    streams: Semaphore,
    /// The blobs that are at the target, or on their way, by repository and digest.
    done: Mutex<HashMap<(String, String), Done>>,
}

/// Set once a blob is there.
type Done = Arc<OnceCell<()>>;

struct Side {
    base: String,
    requests: Semaphore,
}

#[derive(Deserialize)]
struct Manifest {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    config: Option<Descriptor>,
    #[serde(default)]
    layers: Vec<Descriptor>,
}

#[derive(Deserialize)]
struct Descriptor {
    digest: String,
    size: usize,
}

/// A manifest as it came.
struct Raw {
    media_type: String,
    bytes: Bytes,
}

impl Floor {
    async fn copy(&self, tags: &[(&str, &str)]) -> Result<()> {
        let lists = tags.chunk_by(|a, b| a.0 == b.0).map(async |tags| self.listed(tags).await);
        let listed = try_join_all(lists).await?;
        let copies = tags.iter().zip(listed.concat()).map(async |((name, tag), is_there)| {
            self.tag(name, tag, is_there).await.with_context(|| format!("{name}:{tag}"))
        });
        stream::iter(copies).buffer_unordered(TAGS_AT_ONCE).try_collect().await
    }

    /// Which of the tags of one repository are at the target, if there are so many that it is asked for its list.
    async fn listed(&self, tags: &[(&str, &str)]) -> Result<Vec<Option<bool>>> {
        let (name, _) = tags[0];
        if tags.len() <= FEW_TAGS {
            return Ok(vec![None; tags.len()]);
        }
        let there = self.tags(name).await?;
        Ok(tags.iter().map(|(_, tag)| Some(there.iter().any(|known| known == tag))).collect())
    }

    async fn tags(&self, name: &str) -> Result<Vec<String>> {
        #[derive(Deserialize)]
        struct List {
            tags: Vec<String>,
        }
        let (list, _permit) = self.send(&self.target, Method::GET, &format!("{name}/tags/list"), |list| list).await?;
        let (status, list) = (list.status(), list.bytes().await?);
        Ok(if status == StatusCode::NOT_FOUND { Vec::new() } else { serde_json::from_slice::<List>(&list)?.tags })
    }

    /// Copies a tag unless it is at the target as it is at the source. One that may be missing costs no HEAD there.
    async fn tag(&self, name: &str, tag: &str, is_there: Option<bool>) -> Result<()> {
        let (target, source) = (self.head(&self.target, name, tag), self.head(&self.source, name, tag));
        let (there, wanted) = match is_there {
            Some(true) => try_join(target, source).await?,
            Some(false) => (None, None),
            None => match target.await? {
                Some(there) => (Some(there), source.await?),
                None => (None, None),
            },
        };
        if there.is_some() && there == wanted {
            return Ok(());
        }
        let index = self.manifest(name, tag).await?;
        let children = serde_json::from_slice::<Manifest>(&index.bytes)?.manifests;
        try_join_all(children.iter().map(async |child| {
            let manifest = self.manifest(name, &child.digest).await?;
            let Manifest { config, layers, .. } = serde_json::from_slice(&manifest.bytes)?;
            try_join_all(config.iter().chain(&layers).map(|blob| self.blob_once(name, blob))).await?;
            self.put_manifest(name, &child.digest, manifest).await
        }))
        .await?;
        self.put_manifest(name, tag, index).await
    }

    async fn blob_once(&self, name: &str, blob: &Descriptor) -> Result<()> {
        let key = (name.to_owned(), blob.digest.clone());
        let cell = Arc::clone(self.done.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default());
        cell.get_or_try_init(|| self.blob(name, blob)).await?;
        Ok(())
    }

    async fn blob(&self, name: &str, blob: &Descriptor) -> Result<()> {
        let _stream = if blob.size > SMALL { Some(self.streams.acquire().await?) } else { None };
        let (start, permit) =
            self.send(&self.target, Method::POST, &format!("{name}/blobs/uploads/"), |start| start).await?;
        ensure!(start.status() == StatusCode::ACCEPTED, "POST: {}", start.status());
        let location = start.headers().get(LOCATION).context("no Location")?.to_str()?;
        let mut location = start.url().join(location)?;
        location.query_pairs_mut().append_pair("digest", &blob.digest);
        drop(permit);
        let (get, from) =
            self.send(&self.source, Method::GET, &format!("{name}/blobs/{}", blob.digest), |get| get).await?;
        ensure!(get.status() == StatusCode::OK, "GET: {}", get.status());
        if blob.size > SMALL {
            let body = Body::wrap_stream(hold_back(get, blob.digest.clone(), blob.size));
            return self.put_blob(location, blob.size, body).await;
        }
        let bytes = get.bytes().await?;
        drop(from);
        ensure!(
            digest_of(Sha256::new_with_prefix(&bytes)) == blob.digest,
            "the bytes are not those of {}",
            blob.digest
        );
        self.put_blob(location, blob.size, bytes.into()).await
    }

    async fn put_blob(&self, location: Url, size: usize, body: Body) -> Result<()> {
        let _permit = self.target.requests.acquire().await?;
        let put = self.http.put(location).header(CONTENT_TYPE, "application/octet-stream");
        let put = put.header(CONTENT_LENGTH, size).body(body).send().await?;
        ensure!(put.status() == StatusCode::CREATED, "PUT: {}", put.status());
        Ok(())
    }

    async fn head(&self, side: &Side, name: &str, reference: &str) -> Result<Option<String>> {
        let (head, _permit) = self.send(side, Method::HEAD, &format!("{name}/manifests/{reference}"), accept).await?;
        match head.headers().get("Docker-Content-Digest") {
            Some(digest) => Ok(Some(digest.to_str()?.to_owned())),
            None if head.status() == StatusCode::NOT_FOUND => Ok(None),
            None => bail!("HEAD: {}", head.status()),
        }
    }

    async fn manifest(&self, name: &str, reference: &str) -> Result<Raw> {
        let path = format!("{name}/manifests/{reference}");
        let (get, _permit) = self.send(&self.source, Method::GET, &path, accept).await?;
        ensure!(get.status() == StatusCode::OK, "GET: {}", get.status());
        let media_type = get.headers().get(CONTENT_TYPE).context("no Content-Type")?.to_str()?.to_owned();
        Ok(Raw { media_type, bytes: get.bytes().await? })
    }

    async fn put_manifest(&self, name: &str, reference: &str, manifest: Raw) -> Result<()> {
        let path = format!("{name}/manifests/{reference}");
        let body = |put: RequestBuilder| put.header(CONTENT_TYPE, &manifest.media_type).body(manifest.bytes.clone());
        let (put, _permit) = self.send(&self.target, Method::PUT, &path, body).await?;
        ensure!(put.status() == StatusCode::CREATED, "PUT: {}", put.status());
        Ok(())
    }

    async fn send<'a>(
        &self,
        side: &'a Side,
        method: Method,
        path: &str,
        with: impl FnOnce(RequestBuilder) -> RequestBuilder,
    ) -> Result<(Response, SemaphorePermit<'a>)> {
        let permit = side.requests.acquire().await?;
        let request = self.http.request(method, format!("{}/{path}", side.base));
        Ok((with(request).send().await?, permit))
    }
}

fn accept(request: RequestBuilder) -> RequestBuilder {
    request.header(ACCEPT, [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST].join(", "))
}

/// The body of an answer, but for its last piece unless all of it is what was asked for.
fn hold_back(
    body: Response,
    digest: String,
    size: usize,
) -> impl futures::TryStream<Ok = Bytes, Error = std::io::Error> {
    let state = (body, Sha256::new(), 0, digest);
    stream::try_unfold(state, move |(mut body, mut hash, mut received, digest)| async move {
        let Some(piece) = body.chunk().await.map_err(std::io::Error::other)? else { return Ok(None) };
        hash.update(&piece);
        received += piece.len();
        if received >= size && (received > size || digest_of(hash.clone()) != digest) {
            return Err(std::io::Error::other("the bytes are not those that were asked for"));
        }
        Ok(Some((piece, (body, hash, received, digest))))
    })
}

fn digest_of(hash: Sha256) -> String {
    use std::fmt::Write;
    hash.finalize().iter().fold("sha256:".to_owned(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
