//! A plain registry client for tests: pushes images, looks at what is there, deletes tags. It shares no code with the
//! engine under test, so that it can judge it. Logs in with the registry's credentials, Basic or Bearer.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use http::{HeaderMap, Method, StatusCode, header};
use reqwest::{RequestBuilder, Response, Url};
use serde_json::Value;

use crate::certs::{http_client, http_client_behind};
use crate::env::Env;
use crate::hosts::Hosts;
use crate::images::{Content, DOCKER_LIST, DOCKER_MANIFEST, Image, OCI_INDEX, OCI_MANIFEST};
use crate::registry::Registry;

/// In the access logs, so that tests can leave these requests out of a count.
pub const USER_AGENT: &str = "testenv-client";
const UPLOADS_AT_ONCE: usize = 4;

/// A client of one registry.
pub struct Client {
    http: reqwest::Client,
    registry: Registry,
    /// Bearer tokens by repository.
    tokens: Mutex<HashMap<String, String>>,
}

impl Client {
    pub fn new(env: &Env, registry: &Registry) -> Result<Self> {
        Self::trusting(&env.ca_pem, registry)
    }

    /// One that trusts this authority, where there is no environment.
    pub fn trusting(ca_pem: &str, registry: &Registry) -> Result<Self> {
        let http = http_client(ca_pem, None)?;
        Ok(Self { http, registry: registry.clone(), tokens: Mutex::default() })
    }

    /// One of a registry that is found by its own name behind these hosts, with a name and a password.
    pub fn behind(hosts: &Hosts, ca_pem: &str, host: &str, (name, password): (&str, &str)) -> Result<Self> {
        let http = http_client_behind(ca_pem, &hosts.url())?;
        let host = host.to_owned();
        let registry = Registry { host, tls: true, username: None, password: None, log: PathBuf::new() };
        Ok(Self { http, registry: registry.with_credentials(name, password), tokens: Mutex::default() })
    }

    /// Pushes blobs, then manifests, then the root as `reference`: a tag, or its digest.
    pub async fn push(&self, repository: &str, reference: &str, image: &Image) -> Result<()> {
        let uploads = image.blobs.iter().map(|blob| self.put_blob(repository, blob));
        futures::stream::iter(uploads).buffer_unordered(UPLOADS_AT_ONCE).try_collect::<()>().await?;
        for manifest in &image.manifests {
            self.put_manifest(repository, &manifest.digest, manifest).await?;
        }
        self.put_manifest(repository, reference, &image.root).await
    }

    pub async fn put_blob(&self, repository: &str, blob: &Content) -> Result<()> {
        let start = self.send(Method::POST, repository, "blobs/uploads/", |request| request).await?;
        let start = expect(start, StatusCode::ACCEPTED).await?;
        let location = start.headers().get(header::LOCATION).context("no Location")?.to_str()?;
        let mut url = Url::parse(&self.registry.url())?.join(location)?;
        url.query_pairs_mut().append_pair("digest", &blob.digest);
        let put = self.send_to(Method::PUT, repository, url, |request| {
            request.header(header::CONTENT_TYPE, "application/octet-stream").body(blob.bytes.clone())
        });
        expect(put.await?, StatusCode::CREATED).await?;
        Ok(())
    }

    pub async fn put_manifest(&self, repository: &str, reference: &str, manifest: &Content) -> Result<()> {
        let path = format!("manifests/{reference}");
        let put = self.send(Method::PUT, repository, &path, |request| {
            request.header(header::CONTENT_TYPE, &manifest.media_type).body(manifest.bytes.clone())
        });
        expect(put.await?, StatusCode::CREATED).await?;
        Ok(())
    }

    /// The digest of what `reference` names; none if there is no such thing.
    pub async fn digest_of(&self, repository: &str, reference: &str) -> Result<Option<String>> {
        let head = self.send(Method::HEAD, repository, &format!("manifests/{reference}"), accept).await?;
        let Some(head) = found(head).await? else { return Ok(None) };
        let digest = head.headers().get("Docker-Content-Digest").context("no Docker-Content-Digest")?;
        Ok(Some(digest.to_str()?.to_owned()))
    }

    /// The manifest that `reference` names, with the digest computed from its bytes.
    pub async fn manifest(&self, repository: &str, reference: &str) -> Result<Option<Content>> {
        let get = self.send(Method::GET, repository, &format!("manifests/{reference}"), accept).await?;
        let Some(get) = found(get).await? else { return Ok(None) };
        let media_type = get.headers().get(header::CONTENT_TYPE).context("no Content-Type")?.to_str()?.to_owned();
        Ok(Some(Content::new(&media_type, get.bytes().await?)))
    }

    pub async fn blob(&self, repository: &str, digest: &str) -> Result<Option<Bytes>> {
        let get = self.send(Method::GET, repository, &format!("blobs/{digest}"), |request| request).await?;
        match found(get).await? {
            Some(get) => Ok(Some(get.bytes().await?)),
            None => Ok(None),
        }
    }

    /// Whether `reference` names exactly this image, and every manifest and blob of it is there byte by byte.
    pub async fn holds(&self, repository: &str, reference: &str, image: &Image) -> Result<bool> {
        let manifests = image.manifests.iter().map(|manifest| (manifest.digest.as_str(), manifest));
        for (reference, manifest) in manifests.chain([(reference, &image.root)]) {
            let is_it = |found: Content| found.media_type == manifest.media_type && found.bytes == manifest.bytes;
            if !self.manifest(repository, reference).await?.is_some_and(is_it) {
                return Ok(false);
            }
        }
        for blob in &image.blobs {
            if self.blob(repository, &blob.digest).await?.is_none_or(|bytes| bytes != blob.bytes) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The descriptors of what refers to `digest`, by the referrers API; none where there is no such API.
    pub async fn referrers(&self, repository: &str, digest: &str) -> Result<Option<Vec<Value>>> {
        let get = self.send(Method::GET, repository, &format!("referrers/{digest}"), |request| request).await?;
        let Some(get) = found(get).await? else { return Ok(None) };
        let index: Value = serde_json::from_slice(&get.bytes().await?)?;
        Ok(Some(index["manifests"].as_array().context("no list of referrers")?.clone()))
    }

    /// The tags of a repository, empty if there is no such repository.
    pub async fn tags(&self, repository: &str) -> Result<Vec<String>> {
        #[derive(serde::Deserialize)]
        struct List {
            tags: Option<Vec<String>>,
        }
        let get = self.send(Method::GET, repository, "tags/list", |request| request).await?;
        let Some(get) = found(get).await? else { return Ok(Vec::new()) };
        let list: List = serde_json::from_slice(&get.bytes().await?)?;
        Ok(list.tags.unwrap_or_default())
    }

    /// The bearer token for reading `repository`; none if the registry wants none.
    pub(crate) async fn token_for(&self, repository: &str) -> Result<Option<String>> {
        self.tags(repository).await?;
        Ok(self.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(repository).cloned())
    }

    /// Deletes a tag, or what a digest names.
    pub async fn delete(&self, repository: &str, reference: &str) -> Result<()> {
        let path = format!("manifests/{reference}");
        let delete = self.send(Method::DELETE, repository, &path, |request| request).await?;
        expect(delete, StatusCode::ACCEPTED).await?;
        Ok(())
    }

    async fn send(
        &self,
        method: Method,
        repository: &str,
        path: &str,
        with: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response> {
        let url = Url::parse(&format!("{}/v2/{repository}/{path}", self.registry.url()))?;
        self.send_to(method, repository, url, with).await
    }

    /// Sends with the token that there is, and once more after a login if the registry asks for one.
    async fn send_to(
        &self,
        method: Method,
        repository: &str,
        url: Url,
        with: impl Fn(RequestBuilder) -> RequestBuilder,
    ) -> Result<Response> {
        let request = || {
            let request = self.http.request(method.clone(), url.clone()).header(header::USER_AGENT, USER_AGENT);
            with(request)
        };
        let token = self.tokens.lock().unwrap_or_else(PoisonError::into_inner).get(repository).cloned();
        let response = match token {
            Some(token) => request().bearer_auth(token).send().await,
            None => request().send().await,
        };
        let response = response.with_context(|| format!("{method} {url}"))?;
        if response.status() != StatusCode::UNAUTHORIZED || self.registry.username.is_none() {
            return Ok(response);
        }
        let challenge = challenge(response.headers())?;
        let again = if let Some(realm) = challenge.get("bearer realm") {
            let token = self.token(realm, &challenge).await?;
            self.tokens.lock().unwrap_or_else(PoisonError::into_inner).insert(repository.to_owned(), token.clone());
            request().bearer_auth(token)
        } else {
            request().basic_auth(self.registry.username.as_deref().unwrap_or_default(), self.registry.password.as_ref())
        };
        again.send().await.with_context(|| format!("{method} {url}"))
    }

    async fn token(&self, realm: &str, challenge: &HashMap<String, String>) -> Result<String> {
        #[derive(serde::Deserialize)]
        struct Answer {
            token: String,
        }
        let mut url = Url::parse(realm)?;
        for name in ["service", "scope"] {
            if let Some(value) = challenge.get(name) {
                url.query_pairs_mut().append_pair(name, value);
            }
        }
        let username = self.registry.username.as_deref().unwrap_or_default();
        let get = self.http.get(url).basic_auth(username, self.registry.password.as_ref());
        let answer = expect(get.header(header::USER_AGENT, USER_AGENT).send().await?, StatusCode::OK).await?;
        Ok(serde_json::from_slice::<Answer>(&answer.bytes().await?)?.token)
    }
}

/// The parameters of `Bearer realm="…",service="…"`; the first one's name is kept with the scheme, in lower case.
fn challenge(headers: &HeaderMap) -> Result<HashMap<String, String>> {
    let value = headers.get(header::WWW_AUTHENTICATE).context("401 without WWW-Authenticate")?.to_str()?;
    let mut parameters = HashMap::new();
    let mut rest = value;
    while let Some((name, after)) = rest.split_once("=\"") {
        let (value, after) = after.split_once('"').context("a broken WWW-Authenticate")?;
        parameters.insert(name.trim_start_matches([',', ' ']).to_ascii_lowercase(), value.to_owned());
        rest = after;
    }
    Ok(parameters)
}

fn accept(request: RequestBuilder) -> RequestBuilder {
    request.header(header::ACCEPT, [OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST, "*/*"].join(", "))
}

async fn found(response: Response) -> Result<Option<Response>> {
    if response.status() == StatusCode::NOT_FOUND { Ok(None) } else { expect(response, StatusCode::OK).await.map(Some) }
}

async fn expect(response: Response, status: StatusCode) -> Result<Response> {
    if response.status() == status {
        return Ok(response);
    }
    let (got, url) = (response.status(), response.url().clone());
    bail!("{url}: expected {status}, got {got}: {}", response.text().await.unwrap_or_default());
}
