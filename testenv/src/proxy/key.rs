//! What a request is, in the words of the distribution specification: its route, repository and reference, and how
//! often it came before. Faults and assertions are keyed by that and not by a running number, which concurrency
//! would shuffle.

use std::fmt;

use http::{Method, Uri};

/// The kind of endpoint (distribution specification, "Endpoints").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Route {
    /// `/v2/NAME/manifests/REFERENCE`
    Manifest,
    /// `/v2/NAME/blobs/DIGEST`
    Blob,
    /// `/v2/NAME/blobs/uploads/`: the start of an upload, or a mount
    UploadStart,
    /// The location of an upload
    Upload,
    /// `/v2/NAME/tags/list`
    Tags,
    /// `/v2/NAME/referrers/DIGEST`
    Referrers,
    /// `/v2/`
    Ping,
    Other,
}

/// Identifies a request across runs.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The label of the proxy.
    pub side: String,
    pub method: Method,
    pub route: Route,
    pub repository: Option<String>,
    /// A tag or a digest; of an upload the `digest`, of a mount the `mount`, if the query has them.
    pub reference: Option<String>,
    /// 1 for the first request with everything above the same.
    pub nth: u32,
}

impl Key {
    /// The key of the first such request.
    pub(super) fn of(side: &str, method: &Method, uri: &Uri) -> Self {
        let (route, repository, reference) = parse(uri.path());
        let reference = reference.or_else(|| match route {
            Route::Upload => parameter(uri, "digest"),
            Route::UploadStart => parameter(uri, "mount").or_else(|| parameter(uri, "digest")),
            _ => None,
        });
        Self { side: side.to_owned(), method: method.clone(), route, repository, reference, nth: 1 }
    }

    pub(super) fn is_same_but_nth(&self, other: &Self) -> bool {
        (&self.side, &self.method, self.route, &self.repository, &self.reference)
            == (&other.side, &other.method, other.route, &other.repository, &other.reference)
    }
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {:?}", self.side, self.method, self.route)?;
        for part in [&self.repository, &self.reference].into_iter().flatten() {
            write!(f, " {part}")?;
        }
        write!(f, " #{}", self.nth)
    }
}

fn parse(path: &str) -> (Route, Option<String>, Option<String>) {
    let Some(path) = path.strip_prefix("/v2/") else { return (Route::Other, None, None) };
    if path.is_empty() {
        return (Route::Ping, None, None);
    }
    let owned = |text: &str| Some(text.to_owned());
    if let Some(repository) = path.strip_suffix("/tags/list") {
        return (Route::Tags, owned(repository), None);
    }
    // Parts of a repository's name may be called like an endpoint, so the last one counts.
    if let Some((repository, session)) = path.rsplit_once("/blobs/uploads") {
        let route = if session.len() <= 1 { Route::UploadStart } else { Route::Upload };
        return (route, owned(repository), None);
    }
    for (infix, route) in
        [("/manifests/", Route::Manifest), ("/blobs/", Route::Blob), ("/referrers/", Route::Referrers)]
    {
        if let Some((repository, reference)) = path.rsplit_once(infix)
            && !reference.contains('/')
        {
            return (route, owned(repository), owned(reference));
        }
    }
    (Route::Other, None, None)
}

fn parameter(uri: &Uri, name: &str) -> Option<String> {
    let pairs = crate::token::url_pairs(uri.query().unwrap_or_default());
    pairs.into_iter().find(|(key, _)| key == name).map(|(_, value)| value)
}

/// Picks requests. Everything that is not said matches.
#[derive(Clone, Debug, Default)]
pub struct Matcher {
    method: Option<Method>,
    route: Option<Route>,
    repository: Option<String>,
    reference: Option<String>,
    path: Option<String>,
    nth: Option<u32>,
    pub(super) skip: u32,
    pub(super) times: Option<u32>,
}

impl Matcher {
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// # Panics
    ///
    /// If `method` is not an HTTP method.
    #[must_use]
    #[allow(clippy::expect_used, reason = "a constant in a test")]
    pub fn method(self, method: &str) -> Self {
        Self { method: Some(method.parse().expect("an HTTP method")), ..self }
    }

    #[must_use]
    pub fn route(self, route: Route) -> Self {
        Self { route: Some(route), ..self }
    }

    #[must_use]
    pub fn repository(self, repository: &str) -> Self {
        Self { repository: Some(repository.to_owned()), ..self }
    }

    /// A tag or a digest.
    #[must_use]
    pub fn reference(self, reference: &str) -> Self {
        Self { reference: Some(reference.to_owned()), ..self }
    }

    /// Somewhere in path and query; for requests that are not a registry's.
    #[must_use]
    pub fn path_contains(self, part: &str) -> Self {
        Self { path: Some(part.to_owned()), ..self }
    }

    /// The nth request with the same key, from 1.
    #[must_use]
    pub fn nth(self, nth: u32) -> Self {
        Self { nth: Some(nth), ..self }
    }

    /// In a rule: let the first `count` requests that match pass.
    #[must_use]
    pub fn skip(self, count: u32) -> Self {
        Self { skip: count, ..self }
    }

    /// In a rule: apply to `count` requests and then no more.
    #[must_use]
    pub fn times(self, count: u32) -> Self {
        Self { times: Some(count), ..self }
    }

    /// Whether the request is one of those, `skip` and `times` aside.
    #[must_use]
    pub fn matches(&self, key: &Key, path: &str) -> bool {
        fn is<T: PartialEq>(wanted: Option<&T>, found: Option<&T>) -> bool {
            wanted.is_none() || wanted == found
        }
        is(self.method.as_ref(), Some(&key.method))
            && is(self.route.as_ref(), Some(&key.route))
            && is(self.repository.as_ref(), key.repository.as_ref())
            && is(self.reference.as_ref(), key.reference.as_ref())
            && is(self.nth.as_ref(), Some(&key.nth))
            && self.path.as_ref().is_none_or(|part| path.contains(part))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_is_recognised() {
        for (path, route, repository, reference) in [
            ("/v2/", Route::Ping, "", ""),
            ("/v2/_catalog", Route::Other, "", ""),
            ("/v2/a/b/manifests/latest", Route::Manifest, "a/b", "latest"),
            ("/v2/blobs/manifests/blobs/sha256:1", Route::Blob, "blobs/manifests", "sha256:1"),
            ("/v2/a/blobs/uploads/", Route::UploadStart, "a", ""),
            ("/v2/a/blobs/uploads/?mount=sha256:2&from=b", Route::UploadStart, "a", "sha256:2"),
            ("/v2/a/blobs/uploads/0-1?_state=x&digest=sha256%3A3", Route::Upload, "a", "sha256:3"),
            ("/v2/a/tags/list?n=10", Route::Tags, "a", ""),
            ("/v2/a/referrers/sha256:4", Route::Referrers, "a", "sha256:4"),
            ("/api/v1/pods", Route::Other, "", ""),
        ] {
            let key = Key::of("x", &Method::GET, &path.parse().unwrap());
            let got = (key.route, key.repository.unwrap_or_default(), key.reference.unwrap_or_default());
            assert_eq!(got, (route, repository.to_owned(), reference.to_owned()), "{path}");
        }
    }
}
